"""multrace answer: print a model's answer to a question, and how probable it finds a given answer."""

from dataclasses import dataclass
from pathlib import Path

from .asking import ModelOptions, QuestionOptions
from .option import option

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
    max_new_tokens: int = option(
        "maximum number of tokens of the answer (default: 16)", default=16, type=int, metavar="N"
    )


OPTIONS = Answer
