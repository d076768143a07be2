"""Files of results that are neither weights nor tensors: JSON and pictures, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from ..artefacts import files
from .errors import EditError


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write the content and return the path; a failure leaves what was there. Raises `EditError` if it cannot be."""
    return files.write_whole(path, content, error=EditError)


def read_report(path: str | Path, wanted: str) -> dict[str, Any]:
    """The object in a JSON file of this format. EditError for anything else."""
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EditError(f"cannot read a report from '{path}': {error}; pass a file that save wrote") from error
    if not isinstance(words, dict) or words.get("format") != wanted:
        found = words.get("format") if isinstance(words, dict) else type(words).__name__
        raise EditError(f"'{path}' is no {wanted!r}: found {found!r}; pass a file that save wrote")
    return words
