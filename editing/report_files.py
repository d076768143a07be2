"""Files of results that are neither weights nor tensors: JSON and pictures, written whole or not at all."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from .errors import EditError


def write_whole(path: str | Path, content: bytes) -> Path:
    """The path, which now holds the content; a failure leaves what was there. EditError where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise EditError(
            f"cannot write the result to '{path}': {error}; pass a file name in a folder that you may write to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
