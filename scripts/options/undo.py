"""multrace undo: take requests out of a saved edit, or edits out of a ledger; needs no model."""

from dataclasses import dataclass
from pathlib import Path

from .option import option

HELP = "take requests out of a saved edit, or edits out of a ledger"
EXAMPLE = """examples:
  multrace undo --edit out/edit/edit.safetensors --request 3 --out out/less
  multrace undo --edit out/ledger.safetensors --name monday --resolve --out out/less

The command writes OUT/edit.safetensors (or OUT/ledger.safetensors); the given file stays as it is. The model's own
files are never changed, so a whole edit is undone by answering without it: if no request is left, nothing is written.
"""


@dataclass(frozen=True, kw_only=True)
class Undo:
    """Options of `multrace undo`."""

    edit: Path = option("saved edit or ledger", type=Path, metavar="FILE")
    name: str | None = option("edit of the ledger that is taken out, or that --request belongs to", default=None)
    request: tuple[int, ...] | None = option(
        "requests to take out, counted from 0 in the order of the edit",
        default=None,
        nargs="+",
        type=int,
        metavar="N",
    )
    resolve: bool = option(
        "solve the rest again, as if the requests taken out had never been made (default: keep their solution)",
        default=False,
        action="store_true",
    )
    out: Path = option("folder for the result (default: out/undo)", default=Path("out/undo"), type=Path)


OPTIONS = Undo
