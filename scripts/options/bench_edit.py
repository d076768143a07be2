"""multrace bench edit: measure each step of closed-form editing beside the usual way to the same result.

Value search: many facts at once, rerunning only the upper layers and the last tokens, against the whole model forward
and backward for each fact and step. Second moments: one pass for all layers against one early-stopped pass per layer.
Solve: thin factors against the explicit inverse of a width x width matrix, and batches that share the factorisation
of C against one solve of that size for each. The results are compared, and a row whose two results differ is an
error. The cost of the usual value search does not depend on the fact, so a few facts are timed and multiplied. Each
row is measured in its own process (on a CUDA device, all rows share one).
"""

from dataclasses import dataclass
from pathlib import Path

from ..outputs import check_files
from .benchmarks import BenchOptions
from .choices import SOLVE_WIDTH
from .option import option

HELP = "time value search, second moments and solves against the usual way"
EXAMPLE = """examples:
  multrace bench edit --quick                              a small model and a small solve, about a minute
  multrace bench edit --json out/edit.json --markdown out/edit.md    the whole table
  multrace bench edit --rows solve --solve-width 2752      only rows whose label contains one of these words
  multrace bench edit --shape llava-7b --device cuda:0     LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_FULL = {
    "shape": "base",
    "baseline_cells": 2,
    "facts": 8,
    "steps": 20,
    "prompts": 16,
    "solve_width": SOLVE_WIDTH,
    "rows": (),
}


@dataclass(frozen=True, kw_only=True)
class BenchEdit(BenchOptions):
    """Options of `multrace bench edit`."""

    QUICK = {
        "shape": "small",
        "baseline_cells": 1,
        "facts": 4,
        "steps": 10,
        "prompts": 4,
        "solve_width": 1376,
        "rows": ("lower third", "second moments", "1 edit, float32", "price of C"),
    }
    FULL = _FULL

    baseline_cells: int | None = option(
        "number of facts that the usual way searches for (default: 2; 1 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    facts: int | None = option(
        f"number of facts that multrace searches for (default: {_FULL['facts']}; 4 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    steps: int | None = option(
        f"number of steps of each search (default: {_FULL['steps']}; 10 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    prompts: int | None = option(
        f"number of prompts that second moments are taken over (default: {_FULL['prompts']}; 4 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    solve_width: int | None = option(
        f"input width of the solved weight (default: {SOLVE_WIDTH}, which takes minutes; 1376 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    rows: tuple[str, ...] | None = option(
        "measure only the rows of the table whose label contains one of these words (default: all; five with --quick)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )
    markdown: Path | None = option("also write the table as Markdown", default=None, type=Path, metavar="FILE")

    def check(self) -> None:
        """Raises `CommandError` also for searches, moments and solves of nothing."""
        least = {"facts": 1, "steps": 1, "prompts": 1, "solve_width": 16}
        for name, number in least.items():
            self.check_least(name, number)
        super().check()
        if self.markdown is not None:
            check_files(self.markdown.parent, [self.markdown.name])


OPTIONS = BenchEdit
