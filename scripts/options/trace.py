"""multrace trace: find the states that bring the answer back after the picture or the constraint was corrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from .asking import CorruptionOptions, EngineOptions, ModelOptions
from .choices import DIRECTIONS, EFFECTS, KINDS, METRICS, SITES
from .option import option

HELP = "trace an answer to tokens and layers, and draw the map"
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


@dataclass(frozen=True, kw_only=True)
class TraceOptions(ModelOptions, EngineOptions, CorruptionOptions):
    """Options of `multrace trace`."""

    # pyrefly: ignore[bad-override] -- not needed where records are given
    question: str | None = option("question to ask", default=None)
    data: Path | None = option(
        "trace every line of this file instead: a JSON object with question and, as needed, image, constraint, answer, "
        "foil and corrupt (if it differs from the option); paths are relative to the file; lines that are already done "
        "are skipped",
        default=None,
        type=Path,
        metavar="FILE.jsonl",
    )
    limit: int | None = option("trace only the first N lines of --data", default=None, type=int, metavar="N")
    answer: str | None = option(
        "answer whose first token is scored (default: the model's own answer)", default=None, metavar="ANSWER"
    )
    whole_answer: bool = option(
        "score all tokens of the answer instead of its first", default=False, action="store_true"
    )
    foil: str | None = option(
        "answer that a logit difference compares with (default: the answer of the corrupted run)",
        default=None,
        metavar="ANSWER",
    )
    metrics: tuple[str, ...] = option(
        f"scores to compute, the main one first (default: probability): {', '.join(METRICS)}",
        default=("probability",),
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
    )
    sites: tuple[str, ...] = option(
        f"kinds of sites to restore (default: {' '.join(KINDS)}): {', '.join(SITES)}",
        default=KINDS,
        nargs="+",
        choices=SITES,
        metavar="KIND",
    )
    direction: str = option(
        "restore: patch clean states into the corrupted run (default); corrupt: patch corrupted states into the clean "
        "run",
        default="restore",
        choices=DIRECTIONS,
    )
    effect: str = option(
        "total: the patch acts through all later tokens (default); direct: the other image tokens keep their states, "
        "so that the patch acts on the text only",
        default="total",
        choices=EFFECTS,
    )
    severed: str | None = option(
        "kind of module that keeps its output of the unpatched run at the restored tokens in later layers",
        default=None,
        choices=("mlp", "attention"),
    )
    exact_cells: int | None = option(
        "number of cells to compute exactly, the most promising by one backward pass; the others are estimated "
        "(default: all)",
        default=None,
        type=int,
        metavar="N",
    )
    even_if_weak: bool = option(
        "trace even if the corruption does not lower the answer's score in the main metric",
        default=False,
        action="store_true",
    )
    resume: bool = option(
        "keep finished cells in OUT while tracing, and continue from those of an interrupted call",
        default=False,
        action="store_true",
    )
    out: Path = option("folder for the results (default: out/trace)", default=Path("out/trace"), type=Path)

    def check(self) -> None:
        """Raises `CommandError` unless either a question or a file is given, each with options that belong to it."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question or --data FILE.jsonl")
        given = [name for name in ("image", "constraint", "answer", "foil") if getattr(self, name) is not None]
        if self.data is not None and given:
            raise CommandError(f"--{given[0]} belongs to one question; with --data, write it into each line")
        if self.limit is not None and (self.data is None or self.limit < 1):
            raise CommandError(f"--limit {self.limit}: pass at least 1, together with --data")


OPTIONS = TraceOptions
