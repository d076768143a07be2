"""multrace answer: what a model answers, and how probable it finds a given answer."""

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..editing import Delta
from ..models import VisionLanguageModel
from .options import ModelOptions, QuestionOptions, add_options, option, read

HELP = "print a model's greedy answer to a question"
EXAMPLE = """examples:
  multrace answer --image photo.jpg --question "Who founded the company in this photo?"
  multrace answer --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map auto \\
      --image photo.jpg --question "Who founded the company in this photo?" --score "Ada Example"
  multrace answer --question "Who founded the company?" --edit out/edit/edit.safetensors
"""


@dataclass(frozen=True, kw_only=True)
class Answer(ModelOptions, QuestionOptions):
    """Options of `multrace answer`."""

    score: str | None = option("also print the probability of this answer", default=None, metavar="ANSWER")
    edit: Path | None = option("answer with this saved edit in the weights", default=None, type=Path, metavar="FILE")
    max_new_tokens: int = option("longest answer (default 16)", default=16, type=int, metavar="N")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Answer`."""
    add_options(parser, Answer)


def run(options: argparse.Namespace) -> int:
    """Prints the answer and, where asked for, a probability."""
    settings = read(Answer, options)
    settings.check_question()
    delta = None if settings.edit is None else Delta.load(settings.edit)
    vlm = settings.open_model()
    with nullcontext() if delta is None else delta.applied(vlm):
        lines = _lines(vlm, settings)
    print(*lines, sep="\n")
    return 0


def _lines(vlm: VisionLanguageModel, settings: Answer) -> list[str]:
    lines = [vlm.answers([settings.prompt(vlm)], max_new_tokens=settings.max_new_tokens)[0]]
    if settings.score is not None:
        score = vlm.score(settings.image, settings.question, settings.score)
        lines.append(
            f"probability of {settings.score!r}: {score.probability:.4g} (log-probability {score.log_probability:.3f})"
        )
    return lines
