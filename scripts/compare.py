"""Compare two runs over many records, on the records that both have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import artefacts, workflow
from .options import GeneralOptions

EXAMPLE = """examples:
  multrace compare out/one out/other
  multrace compare out/one out/other --csv out/difference.csv

The folders are those of finished runs over many records: the folder OUT of trace, flow or edit, or OUT/EDITOR of
evaluate. For each column of numbers in their tables the command prints the means over the records that both runs have,
the difference (second minus first) and its 95 % interval from a paired bootstrap; then the settings in which the runs
differ.
"""
app = App(name="compare", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True)
class TwoRuns:
    """The two runs; as the last base of the options, they can be named without --one and --other."""

    one: Annotated[Path, Parameter(help="folder of the first run", metavar="DIR")]
    other: Annotated[Path, Parameter(help="folder of the second run", metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class Compare(GeneralOptions, TwoRuns):
    """Options of `multrace compare`."""

    seed: Annotated[int, Parameter(help="random seed of the bootstrap", metavar="N")] = 0
    csv: Annotated[Path | None, Parameter(help="also write the table to this file", metavar="FILE")] = None


@app.default
def run(options: Compare) -> int:
    """Print how the numbers and the settings of the runs differ."""
    table = workflow.compare(options.one, options.other, seed=options.seed)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    differences = [f"differs in {line}" for line in table.attrs["settings"]]
    print(*(differences or ["the settings of both runs are the same"]), sep="\n")
    if options.csv is not None:
        with artefacts.replacing(options.csv) as path:
            table.to_csv(path, index=False)
    return 0
