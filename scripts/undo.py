"""Take requests out of a saved edit, or edits out of a history; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import editing
from .options import CommandError, GeneralOptions, check_files, new_files

EXAMPLE = """examples:
  multrace undo --edit out/edits/summary/edit.safetensors --request 2 --out out/less
  multrace undo --edit out/history --name monday --resolve --out out/less

The command writes OUT/edit.safetensors, or the folder OUT/history; the edit or history of --edit stays as it is. The
files of the model are never changed, so a whole edit is undone by answering without it; if no request is left, nothing
is written.
"""
app = App(name="undo", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Undo(GeneralOptions):
    """Options of `multrace undo`."""

    edit: Annotated[Path, Parameter(help="saved edit, or folder of a history", metavar="FILE_OR_DIR")]
    name: Annotated[
        str | None,
        Parameter(help="edit of a history to take out, or the edit that --request belongs to", metavar="NAME"),
    ] = None
    request: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help="numbers of the requests to take out, counted from 0 in the order of the edit (default: with a "
            "history, all requests of --name)",
            metavar="N",
        ),
    ] = None
    resolve: Annotated[
        bool,
        Parameter(
            help="solve for the remaining requests again, as if the others had never been made (default: keep the "
            "remaining part of the solution)"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the result", metavar="DIR")] = Path("out/undo")


@app.default
def run(options: Undo) -> int:
    """Write the edit or history without the named parts, and list what is left."""
    edit = editing.load_edit(options.edit)
    file = "history" if isinstance(edit, editing.History) else "edit.safetensors"
    check_files(options.out, (file,))
    left = _from_history(edit, options) if isinstance(edit, editing.History) else _from_delta(edit, options)
    if isinstance(left, editing.Delta) and not left.requests:
        print(
            f"no request of {options.edit} is left, so nothing is written: the model without the edit is the original "
            "one; ask it with multrace answer without --edit"
        )
        return 0
    if isinstance(left, editing.History):
        left.saved(options.out / file)
    else:
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
            f"say which request to take out of {str(options.edit)!r}: pass --request with numbers from 0 to "
            f"{len(delta.requests) - 1}"
        )
    return delta.without(*options.request, resolve=options.resolve)


def _from_history(history: editing.History, options: Undo) -> editing.History:
    if options.name is None:
        raise CommandError(
            f"say which edit to take out of the history {str(options.edit)!r}: pass --name with one of "
            f"{', '.join(history.names) or 'none'}"
        )
    history = history.in_memory()  # what is in the folder stays as it is
    left = history if options.request else history.without(options.name)
    for index in options.request or ():
        left = left.without(options.name, request=index)
    return left.resolved() if options.resolve else left


def _lines(left: editing.Delta | editing.History) -> list[str]:
    if isinstance(left, editing.History):
        return left.listing.splitlines()
    return [
        f"{index}  {request.get('question', '')!r} -> {request.get('target', '')!r}"
        for index, request in enumerate(left.requests)
    ]
