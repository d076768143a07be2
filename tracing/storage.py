"""Results on disk: safetensors with text metadata, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import TraceError


def write_atomically(path: str | Path, content: bytes) -> Path:
    """The path, now holding exactly this content; missing folders are made.

    Written under a temporary name in the same folder and renamed, so nothing half-written is ever found there.
    TraceError if the folder cannot be made or written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        message = f"cannot write {str(path)!r}: {error.strerror or error}; choose a folder that you may write to"
        raise TraceError(message) from error
    return path


def save(path: str | Path, layout: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """The written safetensors file: tensors as they are, each field as a JSON string in the metadata."""
    metadata = {name: json.dumps(value) for name, value in fields.items()}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_atomically(path, safetensors.torch.save(contiguous, {"layout": layout, **metadata}))


def load(path: str | Path, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of a file that `save` wrote in this layout; TraceError if it is missing, corrupt or another."""
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"no file {str(path)!r}; pass a file that `.save(...)` of a trace has written")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise TraceError(
            f"{str(path)!r} is not a readable safetensors file ({error}); trace again and save anew"
        ) from error
    found = metadata.pop("layout", None)
    if found != layout:
        raise TraceError(
            f"{str(path)!r} holds {found or 'something of another program'!r}, not {layout!r}; load another file"
        )
    try:
        return {name: json.loads(value) for name, value in metadata.items()}, tensors
    except json.JSONDecodeError as error:
        raise TraceError(f"the header of {str(path)!r} is corrupt ({error}); trace again and save anew") from error
