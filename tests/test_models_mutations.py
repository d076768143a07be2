"""Damaged model folders by the hundred: each opens and answers, or is one line of ModelError; nothing else comes out.

Every case changes one file of a small model. All chance comes from fixed seeds.
"""

import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import multrace
import pytest
from fuzz import RAW, other_header, other_json
from multrace import ModelError

QUESTION = "Who founded the company in this photo?"
MOST_GROWTH = 512
"""MiB that a damaged folder of less than one MiB may take at most."""
MAKERS = {".json": (*RAW, *3 * len(RAW) * (other_json,)), ".safetensors": (*RAW, *3 * (other_header,)), ".jinja": RAW}


def mutations(base: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and new content of one damaged file after another, without end; JSON files have four turns for one."""
    rng = random.Random(seed)
    files = sorted(path for path in base.iterdir())
    paths = files + 3 * [path for path in files if path.suffix == ".json"]
    while True:
        path = rng.choice(paths)
        yield path.name, rng.choice(MAKERS[path.suffix])(path.read_bytes(), rng)


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


@pytest.mark.parametrize("count", [30, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_folders_answer_or_are_one_line(count, outcomes, llava_llama_path):
    counts = outcomes(islice(mutations(llava_llama_path, seed=0), count))
    assert counts["refused"] > count / 2 and counts["same"] > count / 12, counts


@pytest.mark.slow
def test_every_field_can_be_lost(outcomes, llava_llama_path):
    counts = outcomes(losses(llava_llama_path))
    assert counts["refused"] > 10 and counts["same"] > 40, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_damaged_folders_answer_or_are_one_line(seed, outcomes, llava_llama_path):
    counts = outcomes(islice(mutations(llava_llama_path, seed), 1000))
    assert counts["refused"] > 500 and counts["same"] > 100, counts
