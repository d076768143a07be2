"""Join the shards of one run over many records, which were computed in several folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import workflow
from .options import GeneralOptions, print_report

EXAMPLE = """examples:
  multrace merge out/part1 out/part2 out/part3 --out out/merged

The folders hold shards of one run: the same command, model and data, for the parts 1/3, 2/3 and 3/3 of the records. OUT
gets what that command would have written for all records, bit for bit. Shards in one folder need no merging.
"""
app = App(name="merge", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True)
class Folders:
    """The folders of the shards; as the last base of the options, they can be named without --folders."""

    folders: Annotated[tuple[Path, ...], Parameter(help="folders of the shards", metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class Merge(GeneralOptions, Folders):
    """Options of `multrace merge`."""

    out: Annotated[Path, Parameter(help="folder for the whole run", metavar="DIR")] = Path("out/merged")


@app.default
def run(options: Merge) -> int:
    """Join the shards and print the summary of the whole run."""
    return print_report(workflow.merge(options.folders, options.out))
