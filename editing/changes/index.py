"""A file that only grows: lines of JSON, each with a digest, of which a crash can cost only the one being written."""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...artefacts import files
from ...data import parse_json
from ..errors import EditError

logger = logging.getLogger("multrace")


def append_line(path: Path, length: int, content: Mapping[str, Any], *, layout: str) -> int:
    """Append a line and return the new length of the file; the line is on the disk when this returns.

    Args:
        path: The file, which is begun if the length is 0.
        length: Length of the part that the line is to follow, in bytes; the rest of a line that was cut short is
            replaced.
        content: What the line says.
        layout: Name and version of the file's layout, for its first line.

    Raises:
        EditError: The file has more or fewer whole lines than this length, or it cannot be written; it is then as it
            was.
    """
    check_length(path, length)
    line = (b"" if length else _line({"layout": layout})) + _line(content)
    with writable(path.parent), path.open("r+b" if length else "wb", buffering=0) as file:
        file.truncate(length)
        file.seek(length)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(length)
            raise
    return length + len(line)


def whole_lines(path: Path, *, layout: str) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Return the number and the content of each line after the first, and the length of the file in bytes.

    A last line that was not written to its end is left out, with a warning. Raises `EditError` for a file of another
    layout, and for a damaged line.
    """
    raw = path.read_bytes()
    length = raw.rfind(b"\n") + 1
    if _is_whole(raw[length:-1]):
        raise EditError(
            f"the last line of {str(path)!r} is damaged: it does not end as it should; restore it from a copy"
        )
    if length < len(raw):
        logger.warning(
            "the last line of %s was not written to its end and is left out: what was being added when the program "
            "stopped is lost, everything before it is there",
            path,
        )
    lines = []
    for number, line in enumerate(raw[:length].split(b"\n")[:-1], start=1):
        with damaged_line(path, number):
            content = _content(line)
            if number > 1:
                lines.append((number, content))
            elif content.get("layout") != layout:
                raise ValueError(f"it holds {content.get('layout')!r}, not {layout!r}")
    return lines, length


@contextmanager
def damaged_line(path: Path, number: int) -> Iterator[None]:
    """A block in which whatever is wrong with a line becomes one `EditError` that names it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EditError(f"line {number} of {str(path)!r} is damaged: {error}; restore it from a copy") from error


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """A block that writes into a folder, which is made if it is missing. Raises `EditError` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EditError(
            f"cannot add to {str(folder)!r}: {error.strerror or error}; free some room, or pass another folder"
        ) from error


def check_length(path: Path, length: int) -> None:
    """Raise `EditError` unless the whole lines of the file have this length in bytes."""
    if (_whole_length(path) if path.is_file() else 0) != length:
        raise EditError(f"{str(path)!r} has changed since it was read; open it again and go on from there")


def _whole_length(path: Path) -> int:
    """The length of a file without a last line that was not written to its end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                return start + place + 1
            end = start
    return 0


def _line(content: Mapping[str, Any]) -> bytes:
    """One line, with a digest of its content."""
    body = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return (json.dumps({"digest": files.digest(body), "content": body}, ensure_ascii=False) + "\n").encode()


def _is_whole(line: bytes) -> bool:
    """Whether this is a line with its digest."""
    try:
        _content(line)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def _content(line: bytes) -> dict[str, Any]:
    """What a line says. Raises `ValueError` if it is damaged."""
    words = parse_json(line)
    if words["digest"] != files.digest(words["content"]):
        raise ValueError("its digest does not match")
    return parse_json(words["content"])
