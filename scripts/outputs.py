"""Output folders of commands: checked before the long work, and written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import CommandError


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises `CommandError` unless files of these names can be written to the folder, which need not exist yet.

    An unnamed temporary file in the nearest folder is the proof: permission bits do not tell of read-only file
    systems, nor of the superuser. Nothing is left behind.
    """
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


@contextmanager
def new_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder for files of these names; they are moved to `folder` unless there is an error."""
    work = Path(tempfile.mkdtemp(prefix=".multrace-", dir=_nearest(folder)))
    try:
        yield work
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (work / name).replace(folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _nearest(path: Path) -> Path:
    """The path, or the nearest parent that exists (a dangling link counts as existing)."""
    path = path.absolute()
    return path if os.path.lexists(path) else _nearest(path.parent)
