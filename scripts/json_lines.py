"""Lines of a file of records, each of which has to be a JSON object with a question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import CommandError


def read_lines(path: Path, what: str) -> list[tuple[int, bytes]]:
    """Return number and text of each line that is not blank. CommandError if there is no line or no such file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"cannot read the {what} {str(path)!r}: {error.strerror or error}; pass a file with a JSON object per line"
        ) from error
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines:
        raise CommandError(f"no {what} in {str(path)!r}: it is empty; write a JSON object per line")
    return lines


def read_object(line: bytes, known: Sequence[str]) -> dict[str, Any]:
    """Return the object of the line. Raises `CommandError` for anything else, and for a misspelt key."""
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f'no JSON ({error}); write an object such as {{"question": ...}} on one line') from error
    if not isinstance(found, dict):
        raise CommandError(f'a {type(found).__name__} instead of an object; write {{"question": ...}}')
    for key in found.keys() - set(known):
        if near := get_close_matches(key, known, n=1, cutoff=0.8):
            raise CommandError(f"no key {key!r}; did you mean {near[0]!r}?")
    return found


def read_texts(found: dict[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Return the texts under these names, a question among them. CommandError for other values, or for no question."""
    words = {key: found[key] for key in names if found.get(key) is not None}
    if wrong := [key for key, value in words.items() if not isinstance(value, str)]:
        raise CommandError(f"{wrong[0]!r} is of type {type(words[wrong[0]]).__name__}; write a string")
    if "question" not in words:
        raise CommandError(f"no 'question' (found {', '.join(map(repr, found)) or 'nothing'}); write what to ask")
    return words
