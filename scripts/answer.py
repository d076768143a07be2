"""Print the greedy answer of a model to a question, and on request the probability of a given answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import editing, models
from .options import ModelOptions, QuestionOptions

EXAMPLE = """examples:
  multrace answer --image photo.jpg --question "Who founded the company in this photo?"
  multrace answer --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map auto \\
      --image photo.jpg --question "Who founded the company in this photo?" --score "Ada Example"
  multrace answer --question "Who founded the company?" --edit out/edit/edit.safetensors
"""
app = App(name="answer", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Answer(ModelOptions, QuestionOptions):
    """Options of `multrace answer`."""

    score: Annotated[
        str | None, Parameter(help="also print the probability that the model gives to this answer", metavar="ANSWER")
    ] = None
    edit: Annotated[
        Path | None, Parameter(help="saved edit to apply to the weights first (default: none)", metavar="FILE")
    ] = None
    max_new_tokens: Annotated[int, Parameter(help="maximum number of tokens of the answer", metavar="N")] = 16


@app.default
def run(options: Answer) -> int:
    """Print the answer and, with --score, a probability."""
    options.check_question()
    delta = None if options.edit is None else editing.Delta.load(options.edit)
    vlm = options.open_model()
    with nullcontext() if delta is None else delta.applied(vlm):
        lines = list(_lines(vlm, options))
    print(*lines, sep="\n")
    return 0


def _lines(vlm: models.VisionLanguageModel, options: Answer) -> Iterator[str]:
    yield vlm.answers([options.prompt(vlm)], max_new_tokens=options.max_new_tokens)[0]
    if options.score is not None:
        score = vlm.score(options.image, options.question, options.score)
        yield f"probability of {options.score!r}: {score.probability:.4g} (log-probability {score.log_probability:.3f})"
