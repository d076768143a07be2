"""Results on disk: safetensors with text metadata, written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import ArtefactError

Loaded = TypeVar("Loaded")


def write_atomically(path: str | Path, content: bytes) -> Path:
    """The path, now holding exactly this content; missing folders are made.

    Written under a temporary name in the same folder and renamed, so nothing half-written is ever found there.
    ArtefactError if the folder cannot be made or written to.
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
        raise ArtefactError(message) from error
    return path


def save(path: str | Path, layout: str, result: Any) -> Path:
    """The written safetensors file of a dataclass: tensors as they are, all other fields as JSON in the metadata.

    A field may be a mapping from names to tensors. ArtefactError if it cannot be written.
    """
    header, tensors, mappings = {}, {}, {}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
            mappings[field.name] = list(value)  # the metadata keeps the order, which tensors have not
            tensors |= {f"{field.name}.{name}": each for name, each in value.items()}
        else:
            header[field.name] = _plain(value)
    metadata = {name: json.dumps(value) for name, value in (header | {"mappings": mappings}).items()}
    # safetensors takes neither strided tensors nor several views of one memory
    own = {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
    return write_atomically(path, safetensors.torch.save(own, {"layout": layout, **metadata}))


def load(
    path: str | Path,
    layout: str,
    result_type: type[Loaded],
    *,
    check: Callable[[Loaded], str | None],
    nested: Mapping[str, type] = MappingProxyType({}),
) -> Loaded:
    """The dataclass that `save` wrote in this layout.

    check: says what does not fit together in it, or None; nested: fields that are dataclasses themselves.
    ArtefactError if the file is missing, corrupt or another.
    """
    header, tensors = _read(path, layout)
    try:
        mappings = header.pop("mappings")
        members = {name: {key: tensors.pop(f"{name}.{key}") for key in keys} for name, keys in mappings.items()}
        found = header | tensors | members
        values = {field.name: found.pop(field.name) for field in fields(result_type)}
        values |= {name: inner(**values[name]) for name, inner in nested.items()}
        result = result_type(**values, **found)
        problem = check(result)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ArtefactError(f"{str(path)!r} is not a whole trace ({problem}); trace again and save anew")
    return result


def _read(path: str | Path, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, with tuples in place of lists, and tensors of a file in this layout."""
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"no file {str(path)!r}; pass a file that `.save(...)` of a trace has written")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtefactError(
            f"{str(path)!r} is not a readable safetensors file ({error}); trace again and save anew"
        ) from error
    found = metadata.pop("layout", None)
    if found != layout:
        is_other_version = found is not None and found.rstrip("0123456789") == layout.rstrip("0123456789")
        hint = "it is of another version of multrace, so trace again and save anew" if is_other_version else ""
        raise ArtefactError(
            f"{str(path)!r} holds {found or 'something of another program'!r}, not {layout!r}; "
            f"{hint or 'load another file'}"
        )
    try:
        return {name: _tuples(json.loads(value)) for name, value in metadata.items()}, tensors
    except json.JSONDecodeError as error:
        raise ArtefactError(f"the header of {str(path)!r} is corrupt ({error}); trace again and save anew") from error


def _plain(value: Any) -> Any:
    """What JSON can write of a field."""
    if is_dataclass(value):
        return asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
