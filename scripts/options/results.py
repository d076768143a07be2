"""multrace results: measure every editor and baseline on the embedded model's own facts, and whether locating helps.

Settings were chosen on the "choose" halves of the world's edit splits; everything here is measured on the "report"
halves. Each measured row is kept in OUT, so that an interrupted run continues where it was.
"""

from dataclasses import dataclass
from pathlib import Path

from ... import data
from ..errors import CommandError
from ..outputs import check_files
from .choices import SPLITS
from .option import option

HELP = "measure every editor and baseline on the embedded model (the tables of docs/results.md)"
EXAMPLE = """examples:
  multrace results --out out/results                        everything, some hours on one core
  multrace results --out out/results --limit 10             a quick look
  multrace results --out out/results --parts editors --splits outdated

The command writes OUT/rows/*.json (one per measured row, reused on the next run) and OUT/results.md.
"""
PARTS = ("editors", "batch", "sequence", "locating")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Options of `multrace results`."""

    out: Path = option("folder for the rows and the tables", type=Path)
    limit: int = option("number of requests of each split (default: 100)", default=100, type=int, metavar="N")
    together: int = option(
        "number of edits of a sequence and of the largest batch (default: 160, all of one half of the outdated split)",
        default=160,
        type=int,
        metavar="N",
    )
    probes: int = option("number of probes of each kind per request (default: 4)", default=4, type=int, metavar="N")
    parts: tuple[str, ...] = option(
        f"parts to measure: {', '.join(PARTS)} (default: all)", default=PARTS, nargs="+", metavar="PART"
    )
    splits: tuple[str, ...] = option(
        f"splits to measure: {', '.join(SPLITS)} (default: both)", default=SPLITS, nargs="+", metavar="SPLIT"
    )

    def check(self) -> None:
        """Raises `CommandError` for unknown parts or splits, or numbers below 1."""
        unknown = [name for name in (*self.parts, *self.splits) if name not in (*PARTS, *SPLITS)]
        if unknown or self.limit < 1 or self.probes < 1 or self.together < 1:
            raise CommandError(
                f"cannot measure {', '.join(unknown) or 'so few'}; parts are {', '.join(PARTS)}, splits "
                f"{', '.join(SPLITS)}, --limit, --together and --probes at least 1"
            )
        check_files(self.out, ("results.md",))

    def most(self, split: str) -> int:
        """Return the most requests of a split that any row takes: more than `limit` only where its half has them."""
        if not {"batch", "sequence"} & {*self.parts}:
            return self.limit
        return max(self.limit, min(self.together, len(data.World().edit_cases(split, "report"))))


OPTIONS = Results
