"""Ask a model every question of the flags world, by picture and by name, and write the splits that follow.

Each fact is asked for once about held-out rendering 0 of the flag, in the first wording, and once by the name of the
country. What is right, wrong and unknown is said in multrace.data.worlds.flags.splits.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from tqdm import tqdm

from ...data import FlagWorld
from ...data.worlds.flags import HALVES, SPLITS, SplitRow, write_splits
from ...data.worlds.flags.countries import FOLDER
from ..demos import answers_about
from ..main import execute
from ..options import STYLE, CommandError, ModelOptions, check_files, paragraphs

EXAMPLE = """examples:
  python -m multrace.scripts.studies.flags_splits --model ~/.cache/multrace/flags-vlm      the table that is shipped
  python -m multrace.scripts.studies.flags_splits --model DIR --out out/splits.csv --limit 100
"""
app = App(
    name="python -m multrace.scripts.studies.flags_splits", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)
_TOGETHER = 128
"""Number of facts whose prompts are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class SplitsOptions(ModelOptions):
    """Options of the program."""

    out: Annotated[Path | None, Parameter(help="file to write (default: the world's splits.csv)", metavar="FILE")] = (
        None
    )
    limit: Annotated[int | None, Parameter(help="number of facts, as a trial (default: all)", metavar="N")] = None
    batch_size: Annotated[int, Parameter(help="number of questions answered together", metavar="N")] = 16

    def check(self) -> None:
        """Raise `CommandError` without a model, for numbers below 1, and for a file that cannot be written."""
        if self.model is None:
            raise CommandError("there is no --model; pass the folder of a model that reads flags")
        for name, value in (("limit", self.limit), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise CommandError(f"--{name} is {value}; pass at least 1")
        check_files(self.file.parent, (self.file.name,))

    @property
    def file(self) -> Path:
        """The file to write."""
        return self.out or FOLDER / "splits.csv"


@app.default
def run(options: SplitsOptions = SplitsOptions()) -> int:
    """Ask, write the table and print its sizes."""
    options.check()
    world, vlm = FlagWorld(), options.open_model()
    facts = world.facts[: options.limit]
    answers: dict[str, tuple[str, str]] = {}
    with tqdm(total=len(facts), desc="facts", unit="fact") as bar:
        for start in range(0, len(facts), _TOGETHER):
            part = facts[start : start + _TOGETHER]
            answers |= answers_about(vlm, world, part, batch_size=options.batch_size)
            bar.update(len(part))
    rows = world.splits_from(answers)
    target = write_splits(rows, options.file)
    print(sizes(rows), f"written: {target}", sep="\n")
    return 0


def sizes(rows: Sequence[SplitRow]) -> str:
    """Return a table of the number of facts in each half of each split, by relation."""
    counts = Counter((row.split, row.half, row.relation) for row in rows)
    relations = list(dict.fromkeys(row.relation for row in rows))
    lines = [f"{'split':10}{'half':10}{'all':>6}  " + "  ".join(relations)]
    for split in SPLITS:
        for half in HALVES:
            cells = [counts[split, half, relation] for relation in relations]
            numbers = "  ".join(f"{cell:>{len(relation)}}" for cell, relation in zip(cells, relations, strict=True))
            lines.append(f"{split:10}{half:10}{sum(cells):>6}  {numbers}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
