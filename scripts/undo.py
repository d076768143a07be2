"""multrace undo: takes requests out of a saved edit, or edits out of a ledger; needs no model."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..editing import Delta
from ..editing.ledger import Ledger, load_edit
from .errors import CommandError
from .options import add_options, option, read
from .outputs import check_files, new_files

HELP = "take requests out of a saved edit, or edits out of a ledger"
EXAMPLE = """examples:
  multrace undo --edit out/edit/edit.safetensors --request 3 --out out/less
  multrace undo --edit out/ledger.safetensors --name monday --resolve --out out/less

writes OUT/edit.safetensors (or OUT/ledger.safetensors); the file given stays as it is. An edit is undone whole by
answering without it: the model's own files are never changed.
"""
FILES = {Delta: "edit.safetensors", Ledger: "ledger.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Undo:
    """Options of `multrace undo`."""

    edit: Path = option("the saved edit or ledger", type=Path, metavar="FILE")
    name: str | None = option("the edit of a ledger to take out, or to take requests out of", default=None)
    request: tuple[int, ...] | None = option(
        "requests to take out, counted from 0 as the edit was made", default=None, nargs="+", type=int, metavar="N"
    )
    resolve: bool = option(
        "solve what is left anew, as if what is taken out had never been made (default: leave it as it was solved)",
        default=False,
        action="store_true",
    )
    out: Path = option("folder for the result (default out/undo)", default=Path("out/undo"), type=Path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Undo`."""
    add_options(parser, Undo)


def run(options: argparse.Namespace) -> int:
    """Writes the edit or ledger without what was named, and lists what is left."""
    settings = read(Undo, options)
    edit = load_edit(settings.edit)
    file = FILES[type(edit)]
    check_files(settings.out, (file,))
    left = _from_ledger(edit, settings) if isinstance(edit, Ledger) else _from_delta(edit, settings)
    with new_files(settings.out, (file,)) as folder:
        left.save(folder / file)
    print(*_lines(left), sep="\n")
    print("written:", settings.out / file)
    return 0


def _from_delta(delta: Delta, settings: Undo) -> Delta:
    if settings.name is not None:
        raise CommandError(f"{str(settings.edit)!r} is one edit, in which nothing has a name; say --request N")
    if settings.request is None:
        raise CommandError(
            f"say which of its {len(delta.requests)} requests to take out of {str(settings.edit)!r}: --request N"
        )
    left = delta.without(*settings.request, resolve=settings.resolve)
    if not left.requests:
        raise CommandError(
            f"that takes every request out of {str(settings.edit)!r}; to undo an edit whole, answer without the file"
        )
    return left


def _from_ledger(ledger: Ledger, settings: Undo) -> Ledger:
    if settings.name is None:
        raise CommandError(
            f"say which edit to take out of the ledger {str(settings.edit)!r}: --name with one of "
            f"{', '.join(ledger.names) or 'none'}"
        )
    left = ledger if settings.request else ledger.without(settings.name)
    for index in settings.request or ():
        left = left.without(settings.name, request=index)
    return left.resolved() if settings.resolve else left


def _lines(left: Delta | Ledger) -> list[str]:
    if isinstance(left, Ledger):
        return left.listing.splitlines()
    return [
        f"{index}  {request.get('question', '')!r} -> {request.get('target', '')!r}"
        for index, request in enumerate(left.requests)
    ]
