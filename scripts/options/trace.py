"""Find the states that bring the answer back after the picture or the constraint was corrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lazy_loader
from cyclopts import App, Parameter

from ..errors import CommandError
from .asking import CorruptionOptions, EngineOptions, ModelOptions
from .choices import DIRECTIONS, EFFECTS, KINDS, METRICS, SITES

EXAMPLE = """examples:
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt swap:other.jpg --out out/trace
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt text-noise:auto --window 1 \\
      --positions image constraint_last last
  multrace trace --image photo.jpg --question "What is this?" --corrupt image-noise:3 \\
      --positions patches --effect direct --sites hidden
  multrace trace --data questions.jsonl --corrupt image-noise:3 --positions image constraint_last last --out out/all

The command writes OUT/trace.safetensors (multrace.tracing.CausalTrace.load), OUT/trace.png and, if parts of the picture
were restored, OUT/overlay.png. With --data it writes a folder of these for each line, OUT/report.json, and the average
of all traces as OUT/average.safetensors (multrace.tracing.AverageTrace.load) and OUT/average.png.
"""
app = App(name="trace", help=__doc__, help_epilogue=EXAMPLE)
_work: Any = lazy_loader.load("multrace.scripts.trace", suppress_warning=True)  # needs torch


@dataclass(frozen=True, kw_only=True)
class TraceOptions(ModelOptions, EngineOptions, CorruptionOptions):
    """Options of `multrace trace`."""

    # pyrefly: ignore[bad-override] -- not needed where records are given
    question: Annotated[str | None, Parameter(help="question to ask")] = None
    data: Annotated[
        Path | None,
        Parameter(
            help="trace every line of this file instead: a JSON object with question and, as needed, image, constraint, answer, "
            "foil and corrupt (if it differs from the option); paths are relative to the file; lines that are already done "
            "are skipped",
            metavar="FILE.jsonl",
        ),
    ] = None
    limit: Annotated[int | None, Parameter(help="trace only the first N lines of --data", metavar="N")] = None
    answer: Annotated[
        str | None,
        Parameter(help="answer whose first token is scored (default: the model's own answer)", metavar="ANSWER"),
    ] = None
    whole_answer: Annotated[bool, Parameter(help="score all tokens of the answer instead of its first")] = False
    foil: Annotated[
        str | None,
        Parameter(
            help="answer that a logit difference compares with (default: the answer of the corrupted run)",
            metavar="ANSWER",
        ),
    ] = None
    metrics: Annotated[
        tuple[str, ...],
        Parameter(
            help=f"scores to compute, the main one first: {', '.join(METRICS)}", choices=METRICS, metavar="METRIC"
        ),
    ] = ("probability",)
    sites: Annotated[
        tuple[str, ...], Parameter(help=f"kinds of sites to restore: {', '.join(SITES)}", choices=SITES, metavar="KIND")
    ] = KINDS
    direction: Annotated[
        str,
        Parameter(
            help="restore: patch clean states into the corrupted run; corrupt: patch corrupted states into the clean run",
            choices=DIRECTIONS,
        ),
    ] = "restore"
    effect: Annotated[
        str,
        Parameter(
            help="total: the patch acts through all later tokens; direct: the other image tokens keep their states, so that the patch acts on the text only",
            choices=EFFECTS,
        ),
    ] = "total"
    severed: Annotated[
        str | None,
        Parameter(
            help="kind of module that keeps its output of the unpatched run at the restored tokens in later layers",
            choices=("mlp", "attention"),
        ),
    ] = None
    exact_cells: Annotated[
        int | None,
        Parameter(
            help="number of cells to compute exactly, the most promising by one backward pass; the others are estimated "
            "(default: all)",
            metavar="N",
        ),
    ] = None
    even_if_weak: Annotated[
        bool, Parameter(help="trace even if the corruption does not lower the answer's score in the main metric")
    ] = False
    resume: Annotated[
        bool, Parameter(help="keep finished cells in OUT while tracing, and continue from those of an interrupted call")
    ] = False
    out: Annotated[Path, Parameter(help="folder for the results")] = Path("out/trace")

    def check(self) -> None:
        """Raises `CommandError` unless either a question or a file is given, each with options that belong to it."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question or --data FILE.jsonl")
        given = [name for name in ("image", "constraint", "answer", "foil") if getattr(self, name) is not None]
        if self.data is not None and given:
            raise CommandError(f"--{given[0]} belongs to one question; with --data, write it into each line")
        if self.limit is not None and (self.data is None or self.limit < 1):
            raise CommandError(f"--limit {self.limit}: pass at least 1, together with --data")


@app.default
def run(options: TraceOptions = TraceOptions()) -> int:
    """Run the command."""
    return _work.run(options)
