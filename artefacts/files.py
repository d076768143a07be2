"""Safetensors, JSON and files of lines: equal bytes for equal content, and digests that loading checks."""

import errno
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..data import parse_json
from .folders import ArtefactError, replacing, write_whole

logger = logging.getLogger("multrace")
LAYOUT = "layout"
"""The entry of a file that names its content and the version of its layout."""
DIGEST = "digest"
"""The entry of a file that holds the SHA-256 of everything else in the file, as hexadecimal digits."""

_DIGITS = 64
_OPENING = b'{"__metadata__":{"digest":"'
"""The start of the header of a safetensors file with a digest, after the eight bytes of the header's length."""
_JSON_OPENING = b'{\n "digest": "'
"""The start of a JSON file with a digest."""
_NO_DIGEST = "no digest vouches for its content"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    text: Mapping[str, str],
    *,
    error: type[ValueError] = ArtefactError,
) -> Path:
    """Write a safetensors file with a digest and return its path; equal tensors and text give equal bytes.

    Args:
        path: the file to write.
        tensors: the tensors by name; they may share memory or be strided, because copies are written.
        text: the metadata of the header; the name "digest" is taken.
        error: the class to raise if the file cannot be written.

    Returns:
        The path of the written file.

    Example:
        >>> import torch
        >>> from multrace.artefacts import read_tensors, write_tensors
        >>> path = write_tensors("numbers.safetensors", {"x": torch.ones(2)}, {"layout": "numbers 1"})
        >>> read_tensors(path)
        ({'x': tensor([1., 1.])}, {'layout': 'numbers 1'})
    """
    own = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    assert DIGEST not in text, "the digest is computed here"
    with replacing(path, error=error) as temporary:
        mode = temporary.stat().st_mode
        save_file(own, temporary, metadata={DIGEST: "0" * _DIGITS, **text})
        temporary.chmod(mode)  # safetensors creates files that only their owner may read
        with temporary.open("r+b") as file:
            _sort_header(file)
            place = 8 + len(_OPENING)
            digits = _digest_of_rest(file, place)
            file.seek(place)
            file.write(digits)
    return Path(path)


def read_tensors(
    path: str | Path, *, error: type[ValueError] = ArtefactError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file that `write_tensors` wrote, and check its digest.

    Raises `error` if the file is missing, has no digest, or differs in a single bit from what was written.
    """
    with _readable(path, error) as file:
        problem = _problem(file, 8, _OPENING)
    try:
        with safe_open(path, framework="pt") as opened:
            text = dict(opened.metadata() or {})
            tensors = {} if problem else {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as cause:
        raise error(
            f"{str(path)!r} is not a readable safetensors file ({problem or cause}); make it again, or pass another one"
        ) from cause
    if problem == _NO_DIGEST:
        layout, hint = text.get(LAYOUT, "something of another program"), "load another file"
        if LAYOUT in text:
            hint = "it is of another version of multrace, so make it again"
        raise error(f"{str(path)!r} holds {layout[:80]!r}, and {problem}; {hint}")
    if problem:
        raise error(f"{str(path)!r} is damaged ({problem}); make it again, or copy it again")
    return tensors, {name: value for name, value in text.items() if name != DIGEST}


def write_json(
    path: str | Path, layout: str, content: Mapping[str, Any], *, error: type[ValueError] = ArtefactError
) -> Path:
    """Write a JSON file with a digest and return its path; equal content gives equal bytes.

    Args:
        path: the file to write.
        layout: name and version of the layout, such as "multrace edit report 3".
        content: plain values by name; the names "digest" and "layout" are taken.
        error: the class to raise if the file cannot be written.

    Returns:
        The path of the written file.

    Example:
        >>> from multrace.artefacts import read_json, write_json
        >>> read_json(write_json("run.json", "my run 1", {"seed": 0}), "my run 1")
        {'seed': 0}
    """
    assert not content.keys() & {DIGEST, LAYOUT}, "these entries are made here"
    whole = {DIGEST: "0" * _DIGITS, LAYOUT: layout, **content}
    with replacing(path, error=error) as temporary:
        raw = bytearray(json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n")
        place = len(_JSON_OPENING)
        raw[place : place + _DIGITS] = _digest_of_rest(io.BytesIO(raw), place)
        temporary.write_bytes(raw)
    return Path(path)


def read_json(path: str | Path, layout: str, *, error: type[ValueError] = ArtefactError) -> dict[str, Any]:
    """Return the content of a file that `write_json` wrote with this layout, and check its digest.

    Raises `error` if the file is missing, has no digest or another layout, or differs in a single bit from what was
    written.
    """
    with _readable(path, error) as file:
        if problem := _problem(file, 0, _JSON_OPENING):
            raise error(
                f"{str(path)!r} is not a readable JSON file of multrace ({problem}); make it again, or pass another one"
            )
        file.seek(0)
        content = parse_json(file.read(), nan=True, error=error)
    check_layout(path, content.pop(LAYOUT, None), layout, error=error)
    return {name: value for name, value in content.items() if name != DIGEST}


def is_undamaged(path: str | Path) -> bool:
    """Return whether a JSON or safetensors file is there and holds what its digest vouches for, to the bit."""
    start, opening = (0, _JSON_OPENING) if Path(path).suffix == ".json" else (8, _OPENING)
    try:
        with Path(path).open("rb") as file:
            return _problem(file, start, opening) is None
    except OSError:
        return False


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> Path:
    """Write an npz file of these arrays without pickled objects and return its path.

    Raises `ArtefactError` for values that only a pickled array could hold, such as None.
    """
    content = io.BytesIO()
    converted: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    if pickled := [name for name, value in converted.items() if value.dtype.hasobject]:
        raise ArtefactError(f"cannot write {str(path)!r}: {pickled[0]!r} holds other values than numbers and text")
    np.savez(content, **converted)
    return write_whole(path, content.getvalue())


def check_layout(
    path: str | Path, layout: str | None, expected: str, *, error: type[ValueError] = ArtefactError
) -> None:
    """Raise `error` if the layout of a file is not the expected one."""
    if layout == expected:
        return
    is_other_version = str(layout).rstrip("0123456789") == expected.rstrip("0123456789")
    hint = "it is of another version of multrace, so make it again" if is_other_version else "load another file"
    raise error(f"{str(path)!r} holds {str(layout or 'something of another program')[:80]!r}, not {expected!r}; {hint}")


def digest(*parts: bytes | str | Tensor) -> str:
    """Return the SHA-256 of bytes, texts and tensors (dtype, shape and values), as hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = part.encode() if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()


@contextmanager
def _readable(path: str | Path, error: type[ValueError]) -> Iterator[BinaryIO]:
    """Yield the file, opened for reading. Raise `error` if there is none, or if it cannot be read."""
    if not Path(path).is_file():
        raise error(f"no file {str(path)!r}; pass a file that `save` has written")
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as cause:
        raise error(f"cannot read {str(path)!r}: {cause.strerror or cause}; pass a file that you may read") from cause


def _digest_of_rest(file: BinaryIO, place: int) -> bytes:
    """Return the digits of the SHA-256 of everything in the file except for the digest at this place."""
    file.seek(0)
    state = hashlib.sha256(file.read(place))
    file.seek(place + _DIGITS)
    while chunk := file.read(2**20):
        state.update(chunk)
    return state.hexdigest().encode()


def _problem(file: BinaryIO, start: int, opening: bytes) -> str | None:
    """Return what is wrong with the digest of a file that has the opening at its start, or None."""
    place = start + len(opening)
    head = file.read(place + _DIGITS)
    if head[start:place] != opening:
        return _NO_DIGEST
    return None if head[place:] == _digest_of_rest(file, place) else "its content is not what its SHA-256 vouches for"


def _sort_header(file: BinaryIO) -> None:
    """Sort the metadata of a safetensors file by name, after its digest; the library writes it in random order."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    header = {"__metadata__": {DIGEST: metadata.pop(DIGEST), **dict(sorted(metadata.items()))}} | header
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(content) <= length, "the same header is never longer"
    file.seek(8)
    file.write(content.ljust(length))


def append_line(
    path: Path, length: int, content: Mapping[str, Any], *, layout: str, error: type[ValueError] = ArtefactError
) -> int:
    """Append a line and return the new length of the file; the line is on the disk when this returns.

    Args:
        path: The file, which is begun if the length is 0.
        length: Length of the part that the line is to follow, in bytes; the rest of a line that was cut short is
            replaced.
        content: What the line says.
        layout: Name and version of the file's layout, for its first line.
        error: The class to raise if the file has more or fewer whole lines than this length, or cannot be written; it
            is then as it was.
    """
    check_length(path, length, error=error)
    line = (b"" if length else _line({"layout": layout})) + _line(content)
    with writable(path.parent, error=error), path.open("a+b", buffering=0) as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        _check_whole(path, _whole_length(file), length, error)  # again, since another process may have held the lock
        file.truncate(length)
        try:
            if not length:
                flush(path.parent)
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(length)
            raise
    return length + len(line)


def whole_lines(
    path: Path, *, layout: str, error: type[ValueError] = ArtefactError
) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Return the number and the content of each line after the first, and the length of the file in bytes.

    A last line that was not written to its end is left out, with a warning. Raises `error` for a file of another
    layout, and for a damaged line.
    """
    raw = path.read_bytes()
    length = raw.rfind(b"\n") + 1
    if _is_whole(raw[length:-1]):
        raise error(f"the last line of {str(path)!r} is damaged: it does not end as it should; restore it from a copy")
    if length < len(raw):
        logger.warning(
            "the last line of %s was not written to its end and is left out: what was being added when the program "
            "stopped is lost, everything before it is there",
            path,
        )
    lines = []
    for number, line in enumerate(raw[:length].split(b"\n")[:-1], start=1):
        with damaged_line(path, number, error=error):
            content = _content(line)
            if number > 1:
                lines.append((number, content))
            elif content.get("layout") != layout:
                raise ValueError(f"it holds {content.get('layout')!r}, not {layout!r}")
    return lines, length


@contextmanager
def damaged_line(path: Path, number: int, *, error: type[ValueError] = ArtefactError) -> Iterator[None]:
    """A block in which whatever is wrong with a line becomes one `error` that names it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise error(f"line {number} of {str(path)!r} is damaged: {cause}; restore it from a copy") from cause


@contextmanager
def writable(folder: Path, *, error: type[ValueError] = ArtefactError) -> Iterator[None]:
    """A block that writes into a folder, which is made if it is missing. Raises `error` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as cause:
        raise error(
            f"cannot add to {str(folder)!r}: {cause.strerror or cause}; free some room, or pass another folder"
        ) from cause


def check_length(path: Path, length: int, *, error: type[ValueError] = ArtefactError) -> None:
    """Raise `error` unless the whole lines of the file have this length in bytes."""
    present = 0
    if path.is_file():
        with path.open("rb") as file:
            present = _whole_length(file)
    _check_whole(path, present, length, error)


def _check_whole(path: Path, present: int, length: int, error: type[ValueError]) -> None:
    if present != length:
        raise error(f"{str(path)!r} has changed since it was read; open it again and go on from there")


def _whole_length(file: BinaryIO) -> int:
    """The length of a file without a last line that was not written to its end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def flush(*paths: Path) -> None:
    """Wait until these files, and the entries of these folders, are on the disk."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(content: Mapping[str, Any]) -> bytes:
    """One line, with a digest of its content."""
    body = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return (json.dumps({"digest": digest(body), "content": body}, ensure_ascii=False) + "\n").encode()


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
    if words["digest"] != digest(words["content"]):
        raise ValueError("its digest does not match")
    return parse_json(words["content"])
