"""Tensors and text in one safetensors file, written whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import EditError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> Path:
    """The path, which now holds the tensors and the text (as the header's metadata).

    Written under a temporary name in the same folder, which is made where it is missing, and renamed: a reader never
    sees half a file, and a failure leaves whatever was there before. EditError where the folder or file cannot be
    written.
    """
    path = Path(path)
    # copies, because the format refuses tensors that share memory
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, temporary, metadata=dict(text))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise EditError(
            f"cannot write '{path}': {error}; pass a file name in a folder that you may write to"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text of a safetensors file. EditError if it is missing, unreadable or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise EditError(f"cannot read '{path}': {error}; pass a file that multrace saved, or make it again") from error
