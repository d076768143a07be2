"""The weights of a model: digests of their values, and atomic writing of a model as a Hugging Face directory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from tqdm import tqdm

from ..artefacts import ArtefactError, replacing_folder
from .errors import ModelError, gist
from .guards import quiet_transformers
from .placement import Elsewhere, is_shared, packed_parts, processes_of, stored_weights, together, unpacked_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_THREADS = 4
"""Number of weights that are read at once; hashing one needs a copy in main memory if it is on another device."""
_QUIET_SECONDS = 2
"""Work that is done sooner shows no progress bar."""


def digest_weight(weight: Tensor) -> str:
    """Return a SHA-256 (hex) of a weight's dtype, shape and bytes; of a packed one, of all the tensors that it is."""
    digest = hashlib.sha256()
    for name, part in packed_parts(weight).items():
        raw = part.detach().cpu().contiguous()
        digest.update(f"{name}{raw.dtype} {tuple(raw.shape)} ".encode())
        digest.update(raw.flatten().view(torch.uint8).numpy().data)  # the bytes without a copy
    return digest.hexdigest()


def without_origin(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries that do not decide what the model computes, its parts included."""
    return {
        name: without_origin(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    }


class WeightDigests:
    """Digests of weights, each computed once and again after torch has counted a change of its weight.

    A copied or unpickled object has computed nothing yet.
    """

    def __init__(self) -> None:
        self._computed: dict[str, _Computed] = {}

    def __reduce__(self) -> tuple[type[WeightDigests], tuple[()]]:
        return type(self), ()

    def of(self, weights: Mapping[str, Tensor | Elsewhere], *, progress: bool) -> dict[str, str]:
        """Return the digest of each weight by name; only the values of changed weights are read."""
        changed = {
            name: weight
            for name, weight in weights.items()
            if name not in self._computed or not self._computed[name].is_current(weight)
        }
        with (
            ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool,
            tqdm(
                total=sum(weight.nbytes for weight in changed.values()),
                desc="hashing weights",
                unit="B",
                unit_scale=True,
                delay=_QUIET_SECONDS,
                leave=False,
                disable=not progress,
            ) as bar,
        ):
            in_turn = any(isinstance(weight, Elsewhere) and weight.is_shared for weight in changed.values())
            results = (map if in_turn else pool.map)(_Computed.of, changed.values())
            for (name, weight), computed in zip(changed.items(), results, strict=True):
                self._computed[name] = computed
                bar.update(weight.nbytes)
        return {name: self._computed[name].digest for name in weights}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Computed:
    """The digest of a weight, and what changes whenever the values of the weight change."""

    digest: str
    weight: ref[Tensor] | None
    """The tensor; None for a weight that is elsewhere."""
    mark: tuple[Any, ...]
    """For a tensor the address of its values, which an assignment to `weight.data` moves, and the number of changes in
    place (None if torch does not count them); for a weight that is elsewhere what its place says."""

    @classmethod
    def of(cls, weight: Tensor | Elsewhere) -> _Computed:
        if isinstance(weight, Elsewhere):
            return cls(digest=digest_weight(weight.read()), weight=None, mark=weight.mark)
        return cls(digest=digest_weight(weight), weight=ref(weight), mark=_mark(weight))

    def is_current(self, weight: Tensor | Elsewhere) -> bool:
        if isinstance(weight, Elsewhere):
            return self.mark == weight.mark
        if self.weight is None or self.weight() is not weight or weight.is_inference():
            return False
        return self.mark == _mark(weight)


def _mark(weight: Tensor) -> tuple[Any, ...]:
    address = 0 if hasattr(weight, "__tensor_flatten__") else weight.data_ptr()
    return address, None if weight.is_inference() else weight._version


def save_directory(
    model: PreTrainedModel,
    processor: Any,
    directory: str | PathLike[str],
    *,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    """Write model and processor to a sibling folder and rename it into place.

    Of several processes that hold the model together, all must call this, and the first one writes.

    Args:
        model: the Hugging Face model.
        processor: its processor or tokenizer.
        directory: the target folder; missing parents are created. Its files get the permissions of the umask.
        dtype: the dtype of the floating-point weights in the file; None for the model's own.
        overwrite: replace a folder that is not empty.

    Raises:
        ModelError: if the place is in use or cannot be written, the disk is full, or modules of the model were
            replaced, as PEFT does, so that the folder would not open again. The previous content stays.
    """
    target, processes = Path(directory), processes_of(model)
    with together(processes) as is_writing:
        if is_writing:
            _check_target(model, target, dtype=dtype, overwrite=overwrite)
    try:
        state = _whole_state(model, is_kept=is_writing)
        with together(processes):
            if is_writing:
                with replacing_folder(target) as new:
                    with quiet_transformers():
                        _write(model, state, processor, new, dtype=dtype)
                    _open_to_others(new)
    except (ArtefactError, OSError) as error:
        raise ModelError(
            f"cannot save a model to {str(target)!r}: {gist(error.__cause__ or error)}; pass a folder on a disk with "
            "room for it"
        ) from error


def _check_target(model: PreTrainedModel, target: Path, *, dtype: torch.dtype | None, overwrite: bool) -> None:
    """Raise `ModelError` if the model cannot be saved in this dtype, or to this place."""
    if hasattr(model, "hf_quantizer") and dtype not in (None, model.dtype):
        raise ModelError(
            f"cannot save a quantised model to {str(target)!r} in {dtype}: its scales belong to {model.dtype}; leave "
            "out dtype, or load the model without quantization= and save that"
        )
    if foreign := _foreign_weight(model):
        raise ModelError(
            f"cannot save a model to {str(target)!r}: its modules were replaced, as those of adapters are (it has the "
            f"weight {foreign!r}), so that the folder would not open again; merge the adapters first "
            "(merge_and_unload), or save them with PEFT's own save_pretrained"
        )
    if target.exists() and not target.is_dir():
        raise ModelError(f"cannot save a model to {str(target)!r}: it is a file; pass a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ModelError(
            f"the folder {str(target)!r} is not empty; pass another one, or overwrite=True to replace it whole"
        )


def _foreign_weight(model: PreTrainedModel) -> str | None:
    """Return the first weight that a new model of this class and configuration would not have, or None."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if hasattr(model, "hf_quantizer"):  # it renames weights of its own, and transformers writes and opens those
        return next((name for name in names if ".base_layer." in name), None)
    with torch.device("meta"), quiet_transformers():
        unchanged = type(model)(copy.deepcopy(model.config))
    own = {name for name, _ in unchanged.named_parameters(remove_duplicate=False)}
    return next((name for name in names if name not in own), None)


def _write(
    model: PreTrainedModel, state: dict[str, Tensor], processor: Any, folder: Path, *, dtype: torch.dtype | None
) -> None:
    own_name = str(model.config.dtype).removeprefix("torch.")
    written, plain = dtype or model.dtype, unpacked_modules(model) if hasattr(model, "hf_quantizer") else []
    state = _without_scales(state, plain)
    writing: Any = copy.copy(model)
    if not hasattr(model, "hf_quantizer"):
        state = _cast(state, written)
    writing.state_dict = lambda *_arguments, **_keywords: state  # a quantiser asks for it and takes no other
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            writing.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = own_name  # transformers writes the dtype into the live configuration
    processor.save_pretrained(folder)
    if plain:
        _name_unpacked(folder / "config.json", [*writing.hf_quantizer.modules_to_not_convert, *plain])
    if written != model.dtype:
        _name_dtype(folder / "config.json", str(written).removeprefix("torch."))


def _whole_state(model: PreTrainedModel, *, is_kept: bool) -> dict[str, Tensor]:
    """Return the state of the model with the values of weights that are elsewhere, each of which is read.

    is_kept: Whether this process needs the state; without it, it only takes part in reading what all hold together.
    """
    state = model.state_dict()
    missing = {name for name, value in state.items() if value.is_meta or is_shared(value)}
    if not missing:
        return state
    stored: dict[str, Tensor] = {}
    for name, weight in stored_weights(model).items():
        values = weight.read() if isinstance(weight, Elsewhere) else weight.detach()
        if is_kept:
            stored[name] = values.cpu() if name in missing else values
    if not is_kept:
        return {}
    tied = model.all_tied_weights_keys
    return {name: stored[tied.get(name, name)] if name in missing else value for name, value in state.items()}


def _without_scales(state: dict[str, Tensor], plain: Sequence[str]) -> dict[str, Tensor]:
    """Return the state in which the modules at these paths have a weight and a bias only."""
    own = {f"{path}.": (f"{path}.weight", f"{path}.bias") for path in plain}
    return {
        name: value
        for name, value in state.items()
        if all(not name.startswith(path) or name in parts for path, parts in own.items())
    }


def _name_unpacked(path: Path, modules: Sequence[str]) -> None:
    """Write into the configuration which modules of a quantised model have an ordinary weight in the file."""
    config = json.loads(path.read_text())
    settings = config["quantization_config"]
    field = "llm_int8_skip_modules" if "llm_int8_skip_modules" in settings else "modules_to_not_convert"
    settings[field] = sorted(set(modules))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
