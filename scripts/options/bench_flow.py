"""multrace bench flow: time attention knockout by the sweep and by the two usual ways, on a LLaVA-shaped random model.

A cell cuts the attention edges of one flow, such as "image -> last", in a window of layers. The published way lets
the whole model generate one token per cell, with vision tower and prefill in each call, and builds the masks from
lists of pairs. The strong way runs the vision tower once, then the decoder once per cell. Both compute all tokens for
every cell, so a few random cells are timed and multiplied. multrace runs three times, since a sweep takes only
milliseconds, and the median counts. Cells that cost nothing are counted separately and raise no ratio. Each row is
measured in its own process (on a CUDA device, all rows share one), in which a sweep runs first, so that its peak
memory is known; the peaks of the other ways are not measured.
"""

from dataclasses import dataclass

from ..errors import CommandError
from .benchmarks import BenchOptions
from .option import option

HELP = "time attention knockout against one model call per cell"
EXAMPLE = """examples:
  multrace bench flow --quick                             a small model, about a minute
  multrace bench flow --json out/flow.json                the whole table (some six minutes on one core)
  multrace bench flow --flows "-> last" dropped           only rows whose label contains one of these
  multrace bench flow --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_WIDE = 9
"""The window that the study's figures use."""


@dataclass(frozen=True, kw_only=True)
class BenchFlow(BenchOptions):
    """Options of `multrace bench flow`."""

    QUICK = {"shape": "small", "baseline_cells": 1, "flows": ("image -> last", "question and", "dropped")}
    FULL = {"shape": "base", "baseline_cells": 3, "flows": ()}

    windows: tuple[int, ...] | None = option(
        f"numbers of layers that are cut together (default: 1 and {_WIDE}, at most all)",
        default=None,
        nargs="+",
        type=int,
        metavar="LAYERS",
    )
    flows: tuple[str, ...] | None = option(
        "measure only the rows of the table whose label contains one of these words (default: all; four with --quick)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )

    def chosen_windows(self, layers: int) -> tuple[int, ...]:
        """Return the windows without repetitions. Raises `CommandError` for one above the number of layers."""
        windows = (1, min(_WIDE, layers)) if self.windows is None else self.windows
        wrong = [window for window in windows if not 1 <= window <= layers]
        if wrong:
            raise CommandError(f"--windows {wrong[0]}: the decoder has {layers} layers; pass some of 1 to {layers}")
        return tuple(dict.fromkeys(windows))


OPTIONS = BenchFlow
