"""Damage as disks, networks, programs and people do it; everything is drawn from one `random.Random`."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

Damage = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """One bit is another."""
    changed = bytearray(data)
    changed[rng.randrange(start, end or len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def scribbled(data: bytes, rng: random.Random) -> bytes:
    """Up to sixteen bytes are others."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 16)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def truncated(data: bytes, rng: random.Random) -> bytes:
    """The end is missing, or all of it."""
    return data[: rng.randrange(len(data))] if rng.random() < 0.9 else b""


def appended(data: bytes, rng: random.Random) -> bytes:
    """Something follows."""
    return data + rng.randbytes(rng.randint(1, 4096))


def zeroed(data: bytes, rng: random.Random) -> bytes:
    """A run of bytes is zero, like a block that was never written."""
    start, size = rng.randrange(len(data)), rng.randint(1, max(1, len(data) // 4))
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


def repeated(data: bytes, rng: random.Random) -> bytes:
    """A piece is there twice."""
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.randint(1, 512)] + data[start:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """A piece is missing."""
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 512) :]


def swapped(data: bytes, rng: random.Random) -> bytes:
    """Two pieces of the same length have changed places."""
    size = rng.randint(1, max(1, len(data) // 8))
    one, other = sorted((rng.randrange(len(data) - size), rng.randrange(len(data) - size)))
    if other < one + size:
        return data
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


RAW: tuple[Damage, ...] = (flipped, scribbled, truncated, appended, zeroed, repeated, cut, swapped)

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 1e308, 0.5, float("nan"), float("inf")),
    *("", " ", "x", "\0", "\ud800", "ééé", "<script>alert(1)</script>", "../../etc/passwd", "/", ".", "/dev/zero"),
    *("9" * 5000, "a" * 100_000, "../" * 50, "nan", "-", "{}", "NaN", [], {}, [[]], [None], {"a": 1}),
)
"""Values that are valid JSON but seldom what a field holds."""
BOMBS = (b"[" * 100_000, b'{"question": ' * 50_000, b'{"id": ' + b"1" * 5000 + b"}", b"\xff\xfe{}", b"\x00" * 100)
"""Contents that hurt careless parsers."""


def otherwise(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Return a copy of a JSON value in which one thing somewhere is another."""
    if not isinstance(value, dict | list) or not value or (depth and rng.random() < 0.25):
        return rng.choice(ODD)
    changed = copy.copy(value)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place, how = rng.choice(places), rng.random()
    if how < 0.15:
        del changed[place]
    elif how < 0.25 and isinstance(changed, list):
        changed.insert(place, changed[place])
    elif how < 0.25:
        changed[rng.choice(["id", "x", "", f"{place}s", "\0", "__class__"])] = rng.choice(ODD)
    elif how < 0.5:
        changed[place] = rng.choice(ODD)
    else:
        changed[place] = otherwise(value[place], rng, depth + 1)
    return changed


def other_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON text in which one value is another, or a bomb."""
    if rng.random() < 0.05:
        return rng.choice(BOMBS)
    return json.dumps(otherwise(json.loads(data), rng)).encode()


def other_line(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines, one of which is damaged."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = rng.choice((other_json, other_json, *RAW))(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def other_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file in whose header one thing is another, with the right lengths."""
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 8, 2**62, 10**8])) + data[8:]
    header, names = json.loads(data[8 : 8 + size]), []
    names = [name for name in header if name != "__metadata__"]
    if rng.random() < 0.6 or not names:
        key = rng.choice(list(header["__metadata__"]))
        header["__metadata__"][key] = _other_text(header["__metadata__"][key], rng)
    else:
        entry = header.pop(rng.choice(names))
        if how := rng.randrange(4):
            shape = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [2**40]])
            header["renamed" if how == 1 else rng.choice(names)] = entry | (
                {"shape": shape} if how == 2 else {"dtype": "I32"}
            )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _other_text(text: str, rng: random.Random) -> str:
    """An entry of a header, which is JSON or plain text, with other content."""
    try:
        return json.dumps(otherwise(json.loads(text), rng))
    except ValueError:
        return rng.choice(["null", "0", '"x"', "[1]", '{"a": 1}', "[" * 2000, "", "x" * 1000])


def entries_changed(path: Path, rng: random.Random) -> tuple[dict[str, Any], dict[str, str]]:
    """Return tensors and metadata of a safetensors file, one of which is another, for a program to write anew."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = {name: value for name, value in file.metadata().items() if name != "digest"}
    name, how = rng.choice([*sorted(tensors), ""]), rng.random()
    if how < 0.7 or not name:
        key = rng.choice(sorted(text))
        text[key] = _other_text(text[key], rng)
    elif how < 0.8:
        tensors.pop(name)
    elif how < 0.9:
        tensors["surprise"] = tensors.pop(name)
    else:
        tensors[name] = rng.choice([tensors[name].flatten(), tensors[name][None], tensors[name].reshape(-1)[:0]])
    return tensors, text


def sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end of each part of a safetensors file: length, header, its metadata, and the tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    metadata = data.index(b'{"__metadata__":{')
    yield "length", 0, 8
    yield "metadata", metadata, data.index(b"}", metadata)
    yield "header", 8, 8 + size
    if 8 + size < len(data):
        yield "tensors", 8 + size, len(data)
