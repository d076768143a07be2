"""Take requests out of a saved edit, or edits out of a ledger; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import editing
from .errors import CommandError
from .options.asking import GeneralOptions
from .outputs import check_files, new_files

EXAMPLE = """examples:
  multrace undo --edit out/edit/edit.safetensors --request 3 --out out/less
  multrace undo --edit out/ledger.safetensors --name monday --resolve --out out/less

The command writes OUT/edit.safetensors (or OUT/ledger.safetensors); the given file stays as it is. The model's own
files are never changed, so a whole edit is undone by answering without it: if no request is left, nothing is written.
"""
app = App(name="undo", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Undo(GeneralOptions):
    """Options of `multrace undo`."""

    edit: Annotated[Path, Parameter(help="saved edit or ledger", metavar="FILE")]
    name: Annotated[
        str | None, Parameter(help="edit of the ledger that is taken out, or that --request belongs to")
    ] = None
    request: Annotated[
        tuple[int, ...] | None,
        Parameter(help="requests to take out, counted from 0 in the order of the edit", metavar="N"),
    ] = None
    resolve: Annotated[
        bool,
        Parameter(
            help="solve the rest again, as if the requests taken out had never been made (default: keep their solution)"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the result")] = Path("out/undo")


@app.default
def run(options: Undo) -> int:
    """Write the edit or ledger without the named parts, and list the rest."""
    edit = editing.load_edit(options.edit)
    file = "ledger.safetensors" if isinstance(edit, editing.Ledger) else "edit.safetensors"
    check_files(options.out, (file,))
    left = _from_ledger(edit, options) if isinstance(edit, editing.Ledger) else _from_delta(edit, options)
    if isinstance(left, editing.Delta) and not left.requests:
        print(
            f"no request of {options.edit} is left, so nothing is written: the model without the edit is the original "
            "one; ask it with multrace answer without --edit"
        )
        return 0
    with new_files(options.out) as folder:
        left.save(folder / file)
    print(*_lines(left), sep="\n")
    print("written:", options.out / file)
    return 0


def _from_delta(delta: editing.Delta, options: Undo) -> editing.Delta:
    if options.name is not None:
        raise CommandError(f"{str(options.edit)!r} is one edit, in which nothing has a name; pass --request N")
    if options.request is None:
        raise CommandError(
            f"say which of its {len(delta.requests)} requests to take out of {str(options.edit)!r}: --request N"
        )
    return delta.without(*options.request, resolve=options.resolve)


def _from_ledger(ledger: editing.Ledger, options: Undo) -> editing.Ledger:
    if options.name is None:
        raise CommandError(
            f"say which edit to take out of the ledger {str(options.edit)!r}: --name with one of "
            f"{', '.join(ledger.names) or 'none'}"
        )
    left = ledger if options.request else ledger.without(options.name)
    for index in options.request or ():
        left = left.without(options.name, request=index)
    return left.resolved() if options.resolve else left


def _lines(left: editing.Delta | editing.Ledger) -> list[str]:
    if isinstance(left, editing.Ledger):
        return left.listing.splitlines()
    return [
        f"{index}  {request.get('question', '')!r} -> {request.get('target', '')!r}"
        for index, request in enumerate(left.requests)
    ]
