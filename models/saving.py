"""Writing a model as a Hugging Face directory, whole or not at all."""

import json
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError


def save_directory(
    model: nn.Module, processor: Any, directory: str | PathLike[str], *, dtype: torch.dtype | None, overwrite: bool
) -> None:
    """Writes model and processor to a sibling folder and renames it into place. ModelError if that cannot be done."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ModelError(f"cannot save a model to {str(target)!r}: it is a file; pass a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ModelError(
            f"the folder {str(target)!r} is not empty; pass another one, or overwrite=True to replace it whole"
        )
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        fresh = work / "new"
        _write(model, processor, fresh, dtype=dtype)
        if target.exists():
            target.rename(work / "old")
        try:
            fresh.rename(target)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(target)
            raise
    except OSError as error:
        raise ModelError(f"cannot save a model to {str(target)!r}: {error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _write(model: nn.Module, processor: Any, folder: Path, *, dtype: torch.dtype | None) -> None:
    kept = str(model.config.dtype).removeprefix("torch.")
    written = dtype or model.dtype
    state = _cast(model.state_dict(), written)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = kept  # transformers writes the dtype into the live configuration
    processor.save_pretrained(folder)
    if written != model.dtype:
        _name_dtype(folder / "config.json", str(written).removeprefix("torch."))


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state with floating-point tensors in this dtype; tied weights stay one tensor and are written once."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: cast.setdefault((value.data_ptr(), value.shape), value.to(dtype)) if value.is_floating_point() else value
        for name, value in state.items()
    }


def _name_dtype(path: Path, dtype: str) -> None:
    """Says in the configuration which dtype the file holds; transformers wrote the one the model computed in."""
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part or part is config:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
