"""Run `multrace undo`."""

from ..editing import Delta
from ..editing.changes import Ledger, load_edit
from .errors import CommandError
from .options.undo import Undo
from .outputs import check_files, new_files

FILES = {Delta: "edit.safetensors", Ledger: "ledger.safetensors"}


def run(settings: Undo) -> int:
    """Write the edit or ledger without the named parts, and list the rest."""
    edit = load_edit(settings.edit)
    file = FILES[type(edit)]
    check_files(settings.out, (file,))
    left = _from_ledger(edit, settings) if isinstance(edit, Ledger) else _from_delta(edit, settings)
    if isinstance(left, Delta) and not left.requests:
        print(
            f"no request of {settings.edit} is left, so nothing is written: the model without the edit is the original "
            "one; ask it with multrace answer without --edit"
        )
        return 0
    with new_files(settings.out) as folder:
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
    return delta.without(*settings.request, resolve=settings.resolve)


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
