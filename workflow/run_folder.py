"""The folder of a run: what was asked, the outcome of each record, and the lock that keeps other processes out.

    FOLDER/
      settings.json        the analysis, its settings and their hash, the model's digests, the version of multrace
      records.json         the names of all records of the run, in order, and the rows that could not be read
      calibration.json     what was measured once for all records, if the analysis needs that
      records/NAME/        one record: record.json with its row of the table or its error, and the files of its results
      traces/              a run of its own, whose outcomes of all records the analysis needs before it begins
      shared/              what is made once for all records, such as the one edit of a batch, if there is any
      summary/             report.json, rows.parquet and the averages, once every record is done
      costs.jsonl          how long the edits of an evaluation took, and the peak memory; only in this file two runs
                           that find the same differ
      .locks/              which processes are at work

A record's folder appears all at once, under a name made of the record's id and of a SHA-256 of its content, so that a
process that is killed at any moment leaves nothing half done. So do the folders of records that are computed together:
they are written into one hidden folder, which gets the name of a whole one and is then emptied into records/, by the
next process if this one is killed. Every JSON and safetensors file carries a digest of its
own content, and record.json holds the sizes and digests of the files beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from PIL import Image

from ..artefacts import ArtefactError, Result, remove_leftovers, replacing_files, replacing_folder
from ..artefacts.files import digest, is_undamaged, read_json, write_json
from ..data import DataError

SETTINGS, RECORDS, RECORD, REPORT, ROWS = (
    "settings.json",
    "records.json",
    "record.json",
    "report.json",
    "rows.parquet",
)
CALIBRATION, CONTENTS = "calibration.json", "contents.json"
COSTS = "costs.jsonl"
TRACES = "traces"
_LAYOUT = "multrace run {} {}"
_VERSIONS = {REPORT: 2}
"""Versions of the layouts of files; 1 unless they are named here."""
REMADE = "remove {} and start the run again, which makes it anew"
_NOT_OURS = "belongs to no run; remove it and start the run again"
SHARED = "shared"
_FOLDERS = ("records", "summary", TRACES, SHARED, ".locks")
_START = "start.lock"
_PART, _WHOLE = ".part-", ".whole-"
"""The name of a folder of new records starts with this while it is written, and once it is whole."""
_ID_LENGTH, _KEY_LENGTH = 60, 16
_NAMED = 3
"""Maximum number of differences or names in an error."""
_Kind = TypeVar("_Kind", bound=Result)


class RunError(ValueError):
    """Raised when a run cannot start or cannot go on; the message says what was found and what to do next."""


class FolderInUseError(RunError):
    """Raised when another process works on the same records in the same folder."""


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a run: the records whose position leaves the remainder `index`.

    Example:
        >>> from multrace.workflow import Shard
        >>> [Shard.parse("2/3").holds(position) for position in range(4)]
        [False, True, False, False]
    """

    index: int = 0
    """Which part, from 0."""
    count: int = 1
    """Number of parts."""

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that "i/n" means, with i from 1 to n. Raises `RunError` for anything else."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        index, count = (int(part) for part in match.groups()) if match else (0, 0)
        if not 1 <= index <= count:
            raise RunError(f"no shard {text!r}; write i/n with i from 1 to n, such as 1/8 for the first of eight")
        return cls(index - 1, count)

    @property
    def name(self) -> str:
        """Its name in folders and messages, such as "2-of-8"."""
        return f"{self.index + 1}-of-{self.count}"

    def part(self, index: int, count: int) -> Shard:
        """Return one of `count` equal parts of this shard."""
        return Shard(self.index + self.count * index, self.count * count)

    def holds(self, position: int) -> bool:
        """Return whether the record at this position of the run (from 0) belongs to the shard."""
        return position % self.count == self.index

    def overlaps(self, other: Shard) -> bool:
        """Return whether the two shards can have a record in common."""
        return (self.index - other.index) % gcd(self.count, other.count) == 0


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """The outcome of one record, as its folder holds it; results are read when they are asked for."""

    folder: Path
    id: str
    """The record's own id."""
    content: str
    """SHA-256 of the record, its pictures included."""
    row: Mapping[str, Any]
    """One row of the table of the run; empty for a record that failed."""
    skipped: Mapping[str, str]
    """Parts of the analysis that this record lacks, each with the reason."""
    error: str | None
    """Why the record failed, or None."""
    digest: str
    """SHA-256 of everything above and of the files."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    def has(self, name: str) -> bool:
        """Return whether there is a result of this name."""
        return (self.folder / f"{name}.safetensors").is_file()

    def load(self, name: str, kind: type[_Kind]) -> _Kind:
        """Return a result. Raises `RunError` if its file is missing or damaged."""
        try:
            return kind.load(self.folder / f"{name}.safetensors")
        except ValueError as error:
            raise RunError(f"{error}; {REMADE.format(repr(str(self.folder)))}") from error


class Contents:
    """Digests of the content of records; the file of a picture that many records share is read only once."""

    def __init__(self, *, by_path: bool = False) -> None:
        self._by_path = by_path
        self._files: dict[tuple[str, int, int], str] = {}

    def key(self, *values: Any) -> str:
        """Return a SHA-256 of plain values, in which paths and pictures count by the content of their files.

        The corruption that a question names is left out, since it names files; an analysis that uses it adds it.
        Raises `DataError` if a file cannot be read.
        """
        return hashlib.sha256(repr([self._plain(value) for value in values]).encode()).hexdigest()

    def file(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is read again only if its size or its date has changed."""
        state = path.stat()
        place = (str(path), state.st_size, state.st_mtime_ns)
        if place not in self._files:
            self._files[place] = file_digest(path)
        return self._files[place]

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Image.Image):
            return digest(f"{value.mode} {value.size}", value.tobytes())
        if isinstance(value, Path):
            return str(value) if self._by_path else self._picture(value)
        if is_dataclass(value):
            names = [each.name for each in fields(value) if self._by_path or each.name != "corrupt"]
            return [(name, self._plain(getattr(value, name))) for name in names]
        if isinstance(value, Mapping):
            return sorted((name, self._plain(each)) for name, each in value.items())
        return [self._plain(each) for each in value] if isinstance(value, tuple | list) else value

    def _picture(self, path: Path) -> str:
        try:
            return self.file(path)
        except OSError as error:
            raise DataError(
                f"no picture at {str(path)!r} ({error.strerror or error}); pass the path of an image file"
            ) from error


class RunFolder:
    """The files of one run. Its methods raise `RunError` or `ArtefactError` if the folder cannot be used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._contents = Contents()

    @cached_property
    def records(self) -> Path:
        """The folder with one folder for each record that is done."""
        return self.path / "records"

    @property
    def shared(self) -> Path:
        """The folder of what is made once for all records, such as the edit of a batch; made by who needs it."""
        return self.path / SHARED

    @property
    def summary(self) -> Path:
        """The folder of the table, the averages and the report."""
        return self.path / "summary"

    def prepare(self) -> None:
        """Create the folder. Raises `RunError` if it cannot be written, or if it holds anything but a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = {SETTINGS, RECORDS, CALIBRATION, COSTS, *_FOLDERS}
            others = sorted(each.name for each in self.path.iterdir() if each.name not in known)
            others = [name for name in others if not (name.startswith(".") and name.endswith(".part"))]
            if others:
                raise RunError(
                    f"{str(self.path)!r} holds files that belong to no run ({_listed(others)}); choose a new or empty "
                    "folder"
                )
            for name in ("records", ".locks"):
                (self.path / name).mkdir(exist_ok=True)
            (self.path / ".locks" / _START).open("ab").close()  # a folder may be whole and no longer be writable
        except OSError as error:
            raise RunError(_unwritable(self.path, error)) from error

    @contextmanager
    def working(self, shard: Shard) -> Iterator[None]:
        """Hold the lock of a shard. Raises `RunError` if another process works on the same records.

        The operating system releases the lock when its holder ends, however it ends.
        """
        locks = self.path / ".locks"
        with ExitStack() as stack:
            with FileLock(locks / _START):
                for path in sorted(locks.glob("*-of-*.lock")):
                    if shard.overlaps(_shard_of(path.stem)):
                        _take(path, self.path).release()
                lock = _take(locks / f"{shard.name}.lock", self.path)
                stack.callback(lock.release)
                _remove(self.records.glob(f"{_PART}{'*' if shard.count == 1 else shard.name}"))
                for path in sorted(self.records.glob(f"{_WHOLE}*")):
                    if shard.overlaps(_shard_of(path.name.removeprefix(_WHOLE))):
                        self._deliver(path)
                holder = f"process {os.getpid()} on {socket.gethostname()}"
                (locks / f"{shard.name}.holder").write_text(holder, encoding="utf-8")
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the other processes that write files of the whole run."""
        with FileLock(self.path / ".locks" / "whole.lock"):
            yield

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the content of one of the JSON files of the whole run, or None if there is none yet."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return read_json(path, _layout(name), error=RunError)
        except RunError as error:
            advice = (
                "choose another folder, since nothing else tells the settings of the records in this one"
                if name == SETTINGS
                else REMADE.format("that file")
            )
            raise RunError(f"{str(path)!r} is damaged; {advice}") from error

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of the JSON files of the whole run, unless it holds this content."""
        if not self.path.is_dir():
            raise RunError(f"the folder {str(self.path)!r} has vanished; bring it back and start the run again")
        if self.read(name) != content:
            write_json(self.path / name, _layout(name), content, error=RunError)

    def stored(self, name: str) -> StoredRecord | None:
        """Return the outcome of a record, or None if it is not done or its files are not those that were written.

        Raises `RunError` if its folder holds a file of something else.
        """
        folder = self.records / name
        try:
            content = read_json(folder / RECORD, _layout(RECORD), error=RunError)
            files = content.pop("files")
            if any(Path(file).name != file or self._contents.file(folder / file) != files[file][1] for file in files):
                return None
            stored = StoredRecord(folder=folder, digest=digest(repr((content, files))), **content)
        except (RunError, OSError, KeyError, TypeError):
            return None
        _refuse_others(folder, {RECORD, *files})
        return stored

    def stored_or_refuse(self, name: str) -> StoredRecord:
        """Return the outcome of a record. Raises `RunError` if it is not there or damaged."""
        stored = self.stored(name)
        if stored is None:
            raise RunError(f"{str(self.records / name)!r} is {self._state(name)}; {REMADE.format('that folder')}")
        return stored

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Return those of the records that have a folder, but not with the files that were written."""
        return [name for name in names if (self.records / name).exists() and self.stored(name) is None]

    def _state(self, name: str) -> str:
        return "damaged" if (self.records / name).exists() else "missing"

    def shared_files(self) -> dict[str, str]:
        """Return the SHA-256 of each file that is made once for all records, by its path in the folder."""
        paths = [self.path / CALIBRATION, *(self.shared.iterdir() if self.shared.is_dir() else ())]
        paths = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
        return {path.relative_to(self.path).as_posix(): self._contents.file(path) for path in paths}

    def damaged_shared(self) -> list[str]:
        """Return the files made once for all records whose own digests do not vouch for them, by path in the folder."""
        return [name for name in self.shared_files() if not is_undamaged(self.path / name)]

    def remove_changed(self, known: Mapping[str, str] | None) -> list[str]:
        """Remove what is made once for all records and has changed since the run was finished; return the names.

        known: the digests of that time; None for a run that is not finished, in which nothing is removed. Raises
        `RunError` for a file that the run has not made, and for a damaged one of a run that is not finished.
        """
        files = self.shared_files()
        if known is None:
            for name in self.damaged_shared():
                raise RunError(f"{str(self.path / name)!r} is damaged; {REMADE.format('that file')}")
            return []
        if others := sorted(set(files) - set(known)):
            raise RunError(f"{str(self.path / others[0])!r} {_NOT_OURS}")
        changed = [name for name, value in files.items() if known[name] != value]
        for name in changed:
            (self.path / name).unlink()
        return changed

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of the records that are not done."""
        done = set(self.names())
        return [name for name in names if name not in done]

    def names(self) -> list[str]:
        """Return the names of the records that are done, sorted."""
        try:
            return sorted(name for name in os.listdir(self.records) if not name.startswith("."))
        except OSError as error:
            raise RunError(f"the folder {str(self.records)!r} has vanished: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove what was stored of a record."""
        _remove([self.records / name])

    def others(self, names: Container[str]) -> list[str]:
        """Return the records that are done besides these. Raises `RunError` for what is no record of any run."""
        others = [name for name in self.names() if name not in names]
        if foreign := [name for name in others if not (self.records / name / RECORD).is_file()]:
            raise RunError(f"{str(self.records / foreign[0])!r} {_NOT_OURS}")
        return others

    @contextmanager
    def new_records(self, shard: Shard) -> Iterator[Path]:
        """Yield a new folder, whose folders become those of records when the block ends without an error, all at once.

        They replace what was stored of the same records.
        """
        part, whole = (self.records / f"{state}{shard.name}" for state in (_PART, _WHOLE))
        try:
            _remove([part])
            part.mkdir()
            yield part
            part.rename(whole)
            self._deliver(whole)
        except OSError as error:
            raise RunError(f"{_unwritable(self.path, error)}; what is done is kept") from error
        except (ArtefactError, RunError) as error:
            words = str(error).replace(str(part), str(self.records))
            raise RunError(f"{words}, and start the run again; what is done is kept") from error
        finally:
            with suppress(OSError):
                _remove([part])

    def _deliver(self, whole: Path) -> None:
        """Move the folders of finished records to their places; a process that is killed meanwhile leaves the rest."""
        for path in sorted(whole.iterdir()):
            self.remove(path.name)
            path.rename(self.records / path.name)
        whole.rmdir()

    def write_record(self, part: Path, content: Mapping[str, Any]) -> None:
        """Write record.json of a new record, after the files of its results: the fields of a `StoredRecord`."""
        paths = sorted(path for path in part.iterdir() if path.is_file())
        files = {path.name: [path.stat().st_size, file_digest(path)] for path in paths}
        write_json(part / RECORD, _layout(RECORD), {**content, "files": files}, error=RunError)

    def new_summary(self) -> AbstractContextManager[Path]:
        """Return a context with a new folder that replaces the summary when the block ends without an error."""
        self._refuse_others_in_summary()
        return replacing_folder(self.summary, error=RunError)

    def report(self) -> dict[str, Any] | None:
        """Return the report of a finished run, or None if there is none whose files are all there."""
        report = self._listed_summary()
        if report is None:
            return None
        changed = [name for name, value in report["files"].items() if not _is_file(self.summary / name, value)]
        return None if changed else report

    def _listed_summary(self) -> dict[str, Any] | None:
        """The content of the report, or None if there is none, or if it is damaged: then the summary is made again."""
        try:
            return read_json(self.summary / REPORT, _layout(REPORT), error=RunError)
        except RunError:
            return None

    def _refuse_others_in_summary(self) -> None:
        """Raise `RunError` if the summary, which is to be replaced, holds a file of something else."""
        if (report := self._listed_summary()) is not None:
            _refuse_others(self.summary, {REPORT, *report["files"]})

    def write_report(self, part: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return the report of a finished run, which holds the digests of the files beside it."""
        files = {path.name: file_digest(path) for path in sorted(part.iterdir())}
        write_json(part / REPORT, _layout(REPORT), {**content, "files": files}, error=RunError)
        return {**content, "files": files}

    def remove_summary(self) -> None:
        """Remove the summary of an earlier set of records. Raises `RunError` if it holds a file of something else."""
        self._refuse_others_in_summary()
        _remove([self.summary])


def check_result_folder(folder: str | Path, *, spare: str = "") -> list[str]:
    """Return the names of the files that `result_folder` put into the folder; none if it is new or empty.

    Raises `RunError` if the folder cannot be written, or if it holds anything else. Files whose names start with
    `spare` are no obstacle.
    """
    folder = Path(folder).absolute()
    remove_leftovers(folder)
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with TemporaryFile(dir=nearest):  # permission bits do not tell of read-only file systems
            pass
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise RunError(_unwritable(folder, error)) from error
    listed: Mapping[str, Any] = {}
    if CONTENTS in names:
        listed = read_json(folder / CONTENTS, _layout(CONTENTS), error=RunError)["files"]
    others = sorted(name for name in names - {CONTENTS, *listed} if not (spare and name.startswith(spare)))
    if others:
        raise RunError(
            f"{str(folder)!r} holds files of something else ({_listed(others)}); choose a new or empty folder"
        )
    return sorted(listed)


@contextmanager
def result_folder(folder: str | Path, *, spare: str = "") -> Iterator[Path]:
    """Yield a new folder for files that belong together; they replace an earlier set as a whole when the block ends.

    contents.json lists them with their digests, and tells them from files of something else, which are refused.

    Args:
        folder: The folder that the files are for.
        spare: Files whose names start like this may be there, and go with the earlier set.

    Raises:
        RunError: As `check_result_folder`.

    Example:
        >>> from multrace.workflow import result_folder
        >>> for name in ("old.txt", "new.txt"):
        ...     with result_folder("results") as new:
        ...         _ = (new / name).write_text("text")
        >>> import os
        >>> sorted(os.listdir("results"))
        ['contents.json', 'new.txt']
    """
    known = check_result_folder(folder, spare=spare)
    with replacing_files(folder, stale=[*known, f"{spare}*"] if spare else known, error=RunError) as new:
        yield new
        digests = {path.name: file_digest(path) for path in sorted(new.iterdir())}
        write_json(new / CONTENTS, _layout(CONTENTS), {"files": digests}, error=RunError)


def record_name(id: str, key: str) -> str:
    """Return the name of a record's folder: its id, as far as that is a valid name everywhere, and its key."""
    plain = re.sub(r"[^\w.-]+", "_", id, flags=re.ASCII).strip("._-")[:_ID_LENGTH]
    return f"{plain or 'record'}-{key[:_KEY_LENGTH]}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the entries in which two settings differ, in words: the value of `one`, then that of `other`."""
    left, right = _flat(one), _flat(other)
    names = [name for name in dict.fromkeys((*left, *right)) if left.get(name) != right.get(name)]
    return [f"{name} {_short(left.get(name))} instead of {_short(right.get(name))}" for name in names]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take(path: Path, folder: Path) -> FileLock:
    """The lock of this file, taken without waiting."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = path.with_suffix(".holder")
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise FolderInUseError(
            f"{who} works in {str(folder)!r} on shard {path.stem} of the same records; wait for it, or choose another "
            "folder"
        ) from error
    return lock


def _shard_of(name: str) -> Shard:
    """The shard of this name, such as "2-of-8"."""
    index, count = (int(part) for part in name.split("-of-"))
    return Shard(index - 1, count)


def _layout(name: str) -> str:
    return _LAYOUT.format(Path(name).stem, _VERSIONS.get(name, 1))


def _is_file(path: Path, value: str) -> bool:
    return path.is_file() and file_digest(path) == value


def _refuse_others(folder: Path, known: Container[str]) -> None:
    """Raise `RunError` if a folder holds anything but what has these names; hidden files are those of the system."""
    others = sorted(each.name for each in folder.iterdir() if not (each.name.startswith(".") or each.name in known))
    if others:
        raise RunError(f"{str(folder / others[0])!r} {_NOT_OURS}")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)


def _unwritable(path: Path, error: Exception) -> str:
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"cannot write to {str(path)!r}: {str(path)!r} is not a folder; choose another place"
    reason = getattr(error, "strerror", None) or error
    return f"cannot write to {str(path)!r}: {reason}; make room or choose another folder, and start the run again"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        label = f"{above} {name}".strip()
        found |= _flat(value, label) if isinstance(value, Mapping) else {label: value}
    return found


def _short(value: Any) -> str:
    text = value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
