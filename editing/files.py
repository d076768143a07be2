"""Tensors and text in one safetensors file, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..artefacts import files
from .errors import EditError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> Path:
    """Write the tensors, and the text as the header's metadata, and return the path. See `artefacts.files`.

    Raises `EditError` if the folder or the file cannot be written.
    """
    return files.write_tensors(path, tensors, text, error=EditError)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the text of a safetensors file. Raises `EditError` if it is missing or damaged."""
    return files.read_tensors(path, error=EditError)
