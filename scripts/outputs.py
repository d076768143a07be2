"""Output folders of commands: checked and cleared of leftovers before long work, and written whole or not at all."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ..artefacts import remove_leftovers, replacing_files
from .errors import CommandError


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises `CommandError` unless files of these names can be written to the folder, which need not exist yet.

    An unnamed temporary file in the nearest folder is the proof: permission bits do not tell of read-only file
    systems, nor of the superuser. Nothing is left behind.
    """
    remove_leftovers(folder)
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise CommandError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder; choose another place")
    for name in names:
        if (folder / name).is_dir():
            raise CommandError(f"cannot write {str(folder / name)!r}: a folder has that name; choose another place")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"cannot write to {str(folder)!r}: {reason}; choose another place") from error


def check_new_folder(folder: Path) -> None:
    """Raises `CommandError` unless the folder can be created, or exists and is empty."""
    check_files(folder, ())
    if folder.is_dir() and any(folder.iterdir()):
        raise CommandError(f"the folder {str(folder)!r} is not empty; choose a new one")


def new_files(folder: Path, *, stale: Sequence[str] = ()) -> AbstractContextManager[Path]:
    """Return a context with a temporary folder, whose files go into `folder` together unless there is an error.

    stale: names or patterns of files of earlier results, which are removed unless they are written anew. See
    `replacing_files`.
    """
    return replacing_files(folder, stale=stale, error=CommandError)


def _nearest(path: Path) -> Path:
    """The path, or the nearest parent that exists (a dangling link counts as existing)."""
    path = path.absolute()
    return path if os.path.lexists(path) else _nearest(path.parent)
