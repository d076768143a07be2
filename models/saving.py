"""Atomic writing of a model as a Hugging Face directory."""

import json
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from .errors import ModelError, gist
from .quiet import quiet_transformers


def save_directory(
    model: PreTrainedModel,
    processor: Any,
    directory: str | PathLike[str],
    *,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    """Write model and processor to a sibling folder and rename it into place.

    Args:
        model: the Hugging Face model.
        processor: its processor or tokenizer.
        directory: the target folder; missing parents are created. Its files get the permissions of the umask.
        dtype: the dtype of the floating-point weights in the file; None for the model's own.
        overwrite: replace a folder that is not empty.

    Raises:
        ModelError: if the place is in use or cannot be written, or the disk is full. The previous content stays.
    """
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
        with quiet_transformers():
            _write(model, processor, fresh, dtype=dtype)
        _open_to_others(fresh)
        _replace(target, fresh, old=work / "old")
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        raise ModelError(
            f"cannot save a model to {str(target)!r}: {gist(error)}; pass a folder on a disk with room for it"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _write(model: PreTrainedModel, processor: Any, folder: Path, *, dtype: torch.dtype | None) -> None:
    own_name = str(model.config.dtype).removeprefix("torch.")
    written = dtype or model.dtype
    state = _cast(model.state_dict(), written)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = own_name  # transformers writes the dtype into the live configuration
    processor.save_pretrained(folder)
    if written != model.dtype:
        _name_dtype(folder / "config.json", str(written).removeprefix("torch."))


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state with floating-point tensors in this dtype; tied weights stay one tensor, written once."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: cast.setdefault((value.data_ptr(), value.shape), value.to(dtype)) if value.is_floating_point() else value
        for name, value in state.items()
    }


def _name_dtype(path: Path, dtype: str) -> None:
    """Write the dtype of the file into the configuration; transformers wrote the one the model computed in."""
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part or part is config:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _open_to_others(folder: Path) -> None:
    """Give each weight file the permissions of the configuration; safetensors lets only the owner read its files."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _replace(target: Path, fresh: Path, *, old: Path) -> None:
    """Replace the target by the fresh folder; restore the target if that fails."""
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
