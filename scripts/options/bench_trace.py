"""multrace bench trace: time causal tracing by the sweep and by the two usual ways, on a LLaVA-shaped random model.

The naive way makes one hooked call of the whole model per cell, with the vision tower and a clean row, as ROME's
script does. The strong way runs the vision tower once, then one hooked forward pass of the decoder per cell. The cost
of a cell does not depend on the cell in either way, so a few random cells are timed and multiplied. Cells that cost
the sweep nothing are counted separately and raise no ratio. Each row is measured in its own process (on a CUDA
device, all rows share one), in which the sweep runs first, so that its peak memory is known; the peaks of the other
ways are measured in one process each.
"""

from dataclasses import dataclass

from .benchmarks import BenchOptions
from .option import option

HELP = "time causal tracing against one model call per cell"
EXAMPLE = """examples:
  multrace bench trace --quick                             a small model, under a minute
  multrace bench trace --json out/bench.json               the whole table (some twenty minutes on two cores)
  multrace bench trace --cells "text tokens" last          only rows whose label contains one of these
  multrace bench trace --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_FULL = {"shape": "base", "samples": 10, "image_samples": 5, "baseline_cells": 3, "cells": ()}


@dataclass(frozen=True, kw_only=True)
class BenchTrace(BenchOptions):
    """Options of `multrace bench trace`."""

    QUICK = {
        "shape": "small",
        "samples": 3,
        "image_samples": 2,
        "baseline_cells": 1,
        "cells": ("text tokens, hidden", "text tokens, mlp, window 10"),
    }
    FULL = _FULL

    samples: int | None = option(
        f"number of noise samples of the text corruption (default: {_FULL['samples']}; 3 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    image_samples: int | None = option(
        f"number of noise samples of the image corruption (default: {_FULL['image_samples']}; 2 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    cells: tuple[str, ...] | None = option(
        "measure only the rows of the table whose label contains one of these words (default: all; two with --quick)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )

    def check(self) -> None:
        """Raises `CommandError` also for a corruption without samples."""
        for name in ("samples", "image_samples"):
            self.check_least(name, 1)
        super().check()


OPTIONS = BenchTrace
