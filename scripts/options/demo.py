"""multrace demo: show outdated facts of the embedded model, trace, edit, verify and undo them, and write a report."""

from dataclasses import dataclass
from pathlib import Path

from .option import option

HELP = "trace, edit and verify outdated facts of the embedded model, with a report"
EXAMPLE = """examples:
  multrace demo                                the first ten outdated facts, into out/demo
  multrace demo --seed 3 --out out/demo3       other facts
  multrace demo --limit 20 --every-layer       twenty facts, edited at the traced layer and at all others
"""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Options of `multrace demo`."""

    out: Path = option("folder for the report (default: out/demo)", default=Path("out/demo"), type=Path)
    seed: int = option("random seed of the choice of facts (default: 0)", default=0, type=int)
    limit: int = option("number of facts to edit, one at a time (default: 10)", default=10, type=int, metavar="N")
    every_layer: bool = option(
        "also edit at every other layer, to show what locating is worth (takes minutes more)",
        default=False,
        action="store_true",
    )


OPTIONS = Demo
