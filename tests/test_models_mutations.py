"""Damaged model folders by the hundred: each opens and answers, or is one line of ModelError; nothing else comes out.

Every case changes one file of a small model: bytes as disks and networks lose them, one value of its JSON, or one entry
of its safetensors header. All chance comes from fixed seeds.
"""

import copy
import json
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import multrace
import pytest
from multrace import ModelError

QUESTION = "Who founded the company in this photo?"
MOST_GROWTH = 512
"""MiB that a damaged folder of less than one MiB may take at most."""
ODD = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 1e308, 0.5, float("nan"), float("inf")),
    *("", " ", "x", "\0", "\ud800", "é" * 3, "../../etc", "9" * 5000, "a" * 100_000, "{}", "[]", "NaN"),
    *([], {}, [[]], [None], {"a": 1}),
]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    kind, out = rng.choice(["bit", "bytes", "truncate", "append", "zero", "cut", "double", "empty"]), bytearray(data)
    at, length = rng.randrange(len(out)), rng.randint(1, max(1, len(out) // 4))
    match kind:
        case "bit":
            out[at] ^= 1 << rng.randrange(8)
        case "bytes":
            for _ in range(rng.randint(1, 16)):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case "truncate":
            del out[at:]
        case "append":
            out += rng.randbytes(length)
        case "zero":
            out[at : at + length] = bytes(len(out[at : at + length]))
        case "cut":
            del out[at : at + length]
        case "double":
            out[at:at] = out[at : at + length]
        case "empty":
            out.clear()
    return bytes(out)


def damaged_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A copy of a JSON value in which one thing is removed, renamed or another."""
    is_nested = isinstance(value, dict | list) and value and (depth == 0 or rng.random() < 0.8)
    if not is_nested:
        if isinstance(value, int) and not isinstance(value, bool):
            return rng.choice([*ODD, value + 1, value - 1, -value, value * 1000, str(value), [value]])
        if isinstance(value, str) and value and rng.random() < 0.5:
            at = rng.randrange(len(value))
            return value[:at] + rng.choice(["", "x", "\0", "\ud800", value[at] * 3, "<"]) + value[at + 1 :]
        return rng.choice(ODD)
    out = copy.deepcopy(value)
    key = rng.choice(list(out)) if isinstance(out, dict) else rng.randrange(len(out))
    match rng.choice(["remove", "another", "inside", "inside", "inside", "double"]):
        case "remove":
            del out[key]
        case "another":
            out[key] = rng.choice(ODD)
        case "inside":
            out[key] = damaged_value(out[key], rng, depth + 1)
        case "double":
            out = out | {f"{key}s": out[key]} if isinstance(out, dict) else [*out, out[key]]
    return out


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another entry in its header, its lengths right."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    match rng.choice(["entry", "rename", "dtype", "shape", "drop", "length"]):
        case "entry":
            header[name] = rng.choice([{}, {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}])
        case "rename":
            header[name + "x"] = header.pop(name)
        case "dtype":
            header[name]["dtype"] = rng.choice(["I32", "F64", "BF16", "X"])
        case "shape":
            header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [*header[name]["shape"], 1], []])
        case "drop":
            del header[name]
        case "length":
            return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 8, 2**62, 10**8])) + data[8:]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def mutations(base: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and new content of one damaged file after another, without end."""
    rng = random.Random(seed)
    files = sorted(path.name for path in base.iterdir())
    names = files + 3 * [name for name in files if name.endswith(".json")]
    while True:
        name = rng.choice(names)
        data = (base / name).read_bytes()
        if name.endswith(".json") and rng.random() < 0.75:
            changed = json.dumps(damaged_value(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        elif name.endswith(".safetensors") and rng.random() < 0.5:
            changed = damaged_header(data, rng)
        else:
            changed = damaged_bytes(data, rng)
        yield name, changed


def losses(base: Path) -> Iterator[tuple[str, bytes]]:
    """Each JSON file without one of its fields, however deep, for every field in turn; tokenizer.json aside."""
    for path in sorted(base.glob("*.json")):
        if path.name != "tokenizer.json":
            content = json.loads(path.read_text())
            yield from ((path.name, json.dumps(less).encode()) for less in without_one(content))


def without_one(content: dict) -> Iterator[dict]:
    for name, value in content.items():
        rest = {other: content[other] for other in content if other != name}
        yield rest
        yield from (rest | {name: less} for less in (without_one(value) if isinstance(value, dict) else ()))


@pytest.fixture
def outcomes(llava_llama_path: Path, photo: Any, tmp_path: Path) -> Callable[[Iterable[tuple[str, bytes]]], Counter]:
    """Opens a damaged copy for each case and asks it if it opens; anything but an answer or one line is a failure."""

    def use(folder: Path) -> list[str]:
        vlm = multrace.load(folder)
        prompts = [vlm.prompt(photo, QUESTION, constraint="the company"), vlm.prompt(None, "Who?")]
        return [*vlm.answers(prompts, max_new_tokens=3), vlm.weights_digest()]

    def count(cases: Iterable[tuple[str, bytes]]) -> Counter:
        counts, whole = Counter(), use(llava_llama_path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, (name, content) in enumerate(cases):
            folder = Path(shutil.copytree(llava_llama_path, tmp_path / str(number)))
            (folder / name).write_bytes(content)
            try:
                counts["same" if use(folder) == whole else "other"] += 1
            except ModelError as error:
                assert "\n" not in str(error) and 40 < len(str(error)) < 1200, (number, name, error)
                counts["refused"] += 1
            except Exception as error:
                raise AssertionError(f"case {number}, {name}: {type(error).__name__}: {error}") from error
            shutil.rmtree(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH * 1024
        return counts

    return count


def test_damaged_folders_answer_or_are_one_line(outcomes, llava_llama_path):
    counts = outcomes(islice(mutations(llava_llama_path, seed=0), 150))
    assert counts["refused"] > 75 and counts["same"] > 15, counts


def test_every_field_can_be_lost(outcomes, llava_llama_path):
    counts = outcomes(losses(llava_llama_path))
    assert counts["refused"] > 10 and counts["same"] > 40, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_damaged_folders_answer_or_are_one_line(seed, outcomes, llava_llama_path):
    counts = outcomes(islice(mutations(llava_llama_path, seed), 1000))
    assert counts["refused"] > 500 and counts["same"] > 100, counts
