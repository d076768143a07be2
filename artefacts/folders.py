"""Files and folders that are replaced whole or not at all, with the permissions of the umask.

A process that is killed leaves the old content or the new one, and at most a hidden file or folder that ends in
".part", which the next writer removes. Errors name the path that the caller gave, never a temporary one.
"""

import ctypes
import errno
import glob
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from ..data import DataError, parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("multrace")

_PART, _READY = ".part", ".ready"
_STALE = "stale.json"
_MOST_FILES = 1000
"""A folder of more files than this is not swapped, because each of them would have to be linked."""
_YOUNG, _LOST = 0.5, 86400.0
"""Ages in seconds: a temporary file may not be locked yet before the first, and is abandoned after the second."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class ArtefactError(ValueError):
    """Raised when a file, an average or a figure cannot be made or read; the message says what to do next."""


def cache_folder() -> Path:
    """Return the user's cache, of models and moments: $MULTRACE_CACHE, else `multrace` in $XDG_CACHE_HOME or ~/.cache.

    Whatever lies there can be made again.
    """
    if own := os.environ.get("MULTRACE_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "multrace"


@contextmanager
def replacing(path: str | Path, *, error: type[ValueError] = ArtefactError) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Missing folders are created. A reader never sees half a file, and a failure leaves the previous file intact. The
    temporary file already exists, empty and with the permissions of the umask, when the block starts.

    Args:
        path: the file to write.
        error: the class to raise if the file or its folder cannot be written.
    """
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise error(f"cannot write {str(path)!r}: this is no name of a file; pass the path of a file")
    temporary = _hidden(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        with _in_use(temporary):
            yield temporary
            temporary.replace(path)
    except (OSError, SafetensorError, UnicodeEncodeError) as cause:
        raise error(_unwritable(path, cause)) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: bytes, *, error: type[ValueError] = ArtefactError) -> Path:
    """Write the content and return the path. Raises `error` if the file cannot be written."""
    with replacing(path, error=error) as temporary:
        temporary.write_bytes(content)
    return Path(path)


@contextmanager
def replacing_folder(folder: str | Path, *, error: type[ValueError] = ArtefactError) -> Iterator[Path]:
    """Yield a new empty folder, which replaces `folder` and everything in it when the block ends without an error.

    Missing parents are created. The swap is one step where the file system offers that (Linux does); elsewhere a crash
    between two renames leaves no folder for a moment, and the next writer restores the old one.

    Args:
        folder: the folder to write; it need not exist.
        error: the class to raise if the folder cannot be written.

    Example:
        >>> from multrace.artefacts import replacing_folder
        >>> with replacing_folder("run") as new:
        ...     _ = (new / "rows.csv").write_text("row")
        >>> with replacing_folder("run") as new:
        ...     _ = (new / "report.json").write_text("{}")
        >>> import os
        >>> os.listdir("run")
        ['report.json']
    """
    target = Path(os.path.realpath(folder))
    with _new_content(folder, target, _nearest(target.parent) / target.name, error) as work:
        yield work / "new"
        _swap(work, target)


@contextmanager
def replacing_files(
    folder: str | Path, *, stale: Sequence[str] = (), error: type[ValueError] = ArtefactError
) -> Iterator[Path]:
    """Yield a new empty folder, whose files go into `folder` together when the block ends without an error.

    Other files of the folder stay. The folder as a whole is swapped where it holds nothing but files, so that a reader,
    or a crash, finds all old or all new files. That is impossible for the current folder, a mount point, a folder with
    folders inside, or one whose parent is not writable: there the files are moved one after the other, and the next
    writer completes what a crash has cut short.

    Args:
        folder: the folder to write to; it need not exist.
        stale: names, or patterns such as "edit_*.png", of files that belong to earlier results and are removed in the
            same step unless they are among the new ones.
        error: the class to raise if the files cannot be written.

    Example:
        >>> from multrace.artefacts import replacing_files
        >>> with replacing_files("out", stale=["map*.png"]) as new:
        ...     _ = (new / "trace.txt").write_text("new")
    """
    target = Path(os.path.realpath(folder))
    is_swapped = _is_swappable(target)
    place, name = (_nearest(target.parent), target.name) if is_swapped else (target, "multrace")
    with _new_content(folder, target, place / name, error) as work:
        yield work / "new"
        if is_swapped:
            _carry_over(target, work / "new", stale)
            _swap(work, target)
        else:
            _move_in(_made_ready(work, target, stale), target)


@contextmanager
def one_at_a_time(folder: str | Path) -> Iterator[None]:
    """Let one process at a time into the block for folders beside each other; the others wait, and log that they do.

    The lock is on the nearest parent that exists, so that nothing is left behind, and the system releases it when the
    process ends, however it ends. Without locks (Windows, some network file systems), nobody waits.
    """
    parent = _nearest(Path(os.path.realpath(folder)).parent)
    if fcntl is None or not os.access(parent, os.R_OK):
        yield
        return
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process, which writes to %s", parent)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left in a folder and beside it, and complete a change that one of them began."""
    target = Path(os.path.realpath(folder))
    beside = _nearest(target.parent)
    with suppress(OSError):
        for work in beside.glob(f".{glob.escape(target.name)}.????????{_PART}"):
            if not _is_in_use(work):
                if (work / "old").exists() and not target.exists():
                    (work / "old").rename(target)
                _remove(work)
        for work in target.glob(f".multrace.????????{_READY}"):
            if not _is_in_use(work):
                _move_in(work, target)
        for work in target.glob(f".*.????????{_PART}"):
            if not _is_in_use(work):
                _remove(work)


@contextmanager
def _new_content(folder: str | Path, target: Path, name: Path, error: type[ValueError]) -> Iterator[Path]:
    """Yield a hidden folder with a folder `new` in it, named after `name`; it is removed afterwards.

    Errors of writing become `error`, and name the folder as the caller does.
    """
    remove_leftovers(folder)
    work = _hidden(name)
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        (work / "new").mkdir(parents=True)
        with _in_use(work):
            yield work
    except (OSError, SafetensorError) as cause:
        path = getattr(cause, "filename", None)
        if isinstance(path, str) and not any(Path(path).is_relative_to(each) for each in (work, target)):
            if not target.is_relative_to(path):
                raise  # something else that the block has opened
        raise error(_unwritable(folder, cause)) from cause
    except ValueError as cause:
        cause.args = tuple(
            part.replace(str(work / "new"), str(folder)) if isinstance(part, str) else part for part in cause.args
        )
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _carry_over(target: Path, new: Path, stale: Sequence[str]) -> None:
    """Give the files of the target that are neither new nor stale a second name among the new ones."""
    for path in target.iterdir() if target.exists() else ():
        fresh = new / path.name
        if os.path.lexists(fresh) or _matches(path.name, stale):
            continue
        try:
            os.link(path, fresh, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(path, fresh, follow_symlinks=False)


def _swap(work: Path, target: Path) -> None:
    """Put the folder `new` of a hidden folder in the place of the target."""
    new, old = work / "new", work / "old"
    new.stat()  # raises an error if it has vanished, before anything is made
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        new.rename(target)
        return
    state = target.stat()
    with suppress(OSError):  # only the superuser may give files away
        os.chown(new, state.st_uid, state.st_gid)
    shutil.copymode(target, new)
    if _exchanged(new, target):
        return
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:  # an interrupt between the two as well
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, and return whether the system has done that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = [os.fsencode(path) for path in (one, other)]
    return rename is not None and rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _made_ready(work: Path, target: Path, stale: Sequence[str]) -> Path:
    """Return the hidden folder under a name by which the next writer moves its files, should this one be killed."""
    names = [path.name for path in (work / "new").iterdir()]
    if taken := [name for name in names if (target / name).is_dir()]:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target / taken[0]))
    gone = [path.name for path in target.iterdir() if _matches(path.name, stale) and not path.is_dir()]
    gone = [name for name in gone if name not in names]
    (work / _STALE).write_text(json.dumps(gone), encoding="utf-8")
    return work.rename(work.with_suffix(_READY))


def _move_in(work: Path, target: Path) -> None:
    """Move the files of a finished hidden folder into the target one by one, and remove the stale ones."""
    for name in _stale_names(work / _STALE):
        (target / name).unlink(missing_ok=True)
    for path in sorted((work / "new").iterdir()):
        path.replace(target / path.name)
    shutil.rmtree(work.rename(work.with_suffix(_PART)), ignore_errors=True)


def _stale_names(path: Path) -> list[str]:
    """Return the names of files in a list that may come from anywhere: none from a damaged one, and no other paths."""
    try:
        names = parse_json(path.read_bytes())
    except DataError:
        return []
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return [name for name in names if Path(name).name == name and "\0" not in name] if is_list else []


def _is_swappable(target: Path) -> bool:
    """Return whether the folder can be replaced by another one with the same files, without anybody noticing."""
    if not target.is_dir():
        return True
    try:
        is_current = Path.cwd().is_relative_to(target)
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(target)]
    except OSError:
        return False
    is_plain = len(names) <= _MOST_FILES and not any(is_folder for _, is_folder in names)
    return is_plain and not is_current and not target.is_mount() and os.access(target.parent, os.W_OK | os.X_OK)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _hidden(path: Path) -> Path:
    """Return a new hidden name beside the path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest parent that exists (a dangling link counts as existing)."""
    return path if os.path.lexists(path) else _nearest(path.parent)


@contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Hold a lock on a temporary file or folder, which the system releases when the process ends, however it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(path: Path) -> bool:
    """Return whether a living process may hold a temporary file or folder."""
    try:
        age = time.time() - path.stat().st_mtime
        if fcntl is None or age < _YOUNG:
            return age < (_LOST if fcntl is None else _YOUNG)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return age < _LOST
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unwritable(path: str | Path, cause: Exception) -> str:
    """Return why the path cannot be written, and what to do."""
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
    is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
    hint = "make room on its disk, or choose another place" if is_full else "choose a folder that you may write to"
    return f"cannot write {str(path)!r}: {reason}; {hint}"
