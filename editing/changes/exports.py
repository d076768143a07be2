"""Edits as files that other libraries open, a PEFT LoRA adapter or the edited model whole, and proof that they work."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...artefacts import ArtefactError, replacing_folder, write_tensors
from ...models import ModelError, Prompt, VisionLanguageModel
from ...models.placement import parameter_of
from ..requests import EditError
from .delta import Delta
from .weight_change import Change

logger = logging.getLogger("multrace")
_ENOUGH = 1e-3  # share of the edit's effect on the logits that an export may differ by


class LowRank(Protocol):
    """A change that is known by its factors, as a Delta is."""

    model: str
    revision: str | None

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(left, right) per parameter name, float32, (hidden, rank) and (rank, width), oriented as in y = W x."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a model that was opened from files compares with the edited one, over some prompts."""

    difference: float
    """Largest difference between their logits."""
    effect: float
    """Largest difference between the logits of the edited model and of the unedited one."""
    answers: tuple[tuple[str, str], ...]
    """(the edited model's answer, the reopened one's) for each prompt."""

    @property
    def holds(self) -> bool:
        """The answers are the same, and the logits to a thousandth of what the edit changes in them."""
        return self.difference <= _ENOUGH * self.effect and all(one == other for one, other in self.answers)

    def __str__(self) -> str:
        same = sum(one == other for one, other in self.answers)
        return (
            f"logits differ by at most {self.difference:.2g} (the edit changes them by up to {self.effect:.2g}); "
            f"{same} of {len(self.answers)} answers are the same"
        )


def to_peft(vlm: VisionLanguageModel, change: LowRank, folder: str | Path) -> Path:
    """Write the change as a PEFT LoRA adapter for `PeftModel.from_pretrained`, and return its folder.

    Slices of experts are `target_parameters` of the adapter, of which PEFT takes one adapter for a model. Each weight's
    adapter has the rank of its change and an alpha equal to it, so that its scale is 1. Adapters are
    float32 whatever the model's dtype, so nothing is rounded away. Write several edits as several adapters, or as one
    by `compose`. PEFT itself is not needed for writing. There is a whole folder afterwards, or none.

    Args:
        vlm: The model that was edited.
        change: A `Delta`, or the change that `Lora` made.
        folder: A new folder.

    Raises:
        EditError: The model has no such weight, the change is empty, the folder exists or cannot be written.

    Example:
        >>> import tempfile
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> request = mt.EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=5).edit(vlm, [request], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter = mt.to_peft(vlm, delta, f"{folder}/adapter")
        ...     sorted(path.name for path in adapter.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(folder)
    with vlm.one_writer() as is_writing:
        if is_writing and folder.exists():
            raise EditError(f"cannot write the adapter to '{folder}': it exists; pass a new folder")
    factors = {name: factors for name, factors in change.factors.items() if factors[1].shape[0]}
    if not factors:
        raise EditError(f"this edit of '{change.model}' changes nothing, and PEFT has no adapters of rank 0")
    for name, (left, right) in factors.items():
        _check_fits(change, vlm, name, (left.shape[0], right.shape[1]))
    tensors, config = _adapter(change, vlm, factors)
    text = json.dumps(config, indent=2) + "\n"
    try:
        with vlm.one_writer() as is_writing:
            if is_writing:
                with replacing_folder(folder) as new:
                    write_tensors(new / "adapter_model.safetensors", tensors, {"format": "pt"})
                    (new / "adapter_config.json").write_text(text, encoding="utf-8")
    except ArtefactError as error:
        raise EditError(f"cannot write the adapter to '{folder}': {error}") from error
    return folder


def with_adapters(vlm: VisionLanguageModel, *folders: str | Path) -> VisionLanguageModel:
    """The same model, in which PEFT has now put the adapters of these folders, all active; they add up.

    The modules are replaced for good, so pass a model that was opened for this. EditError where PEFT is not installed,
    no folder is given, or one holds no adapter for this model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:  # the extra `peft` is not installed
        raise EditError("opening adapters needs PEFT, which is not installed; pip install 'multrace[peft]'") from error
    if not folders:
        raise EditError("no adapters to open; pass at least one folder that to_peft wrote")
    names = [f"edit_{index}" for index in range(len(folders))]
    try:
        with vlm.lock, warnings.catch_warnings():
            # PEFT's talk with the newest transformers is none of the reader's business
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of experts, which it can adapt
            wrapped = PeftModel.from_pretrained(vlm.model, str(folders[0]), adapter_name=names[0])
            for name, folder in zip(names[1:], folders[1:], strict=True):
                wrapped.load_adapter(str(folder), adapter_name=name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # PEFT may not fit the quantiser that is here
        raise EditError(f"PEFT cannot open {[str(folder) for folder in folders]} on '{vlm.name}': {error}") from error
    wrapped.base_model.set_adapter(names)
    vlm.model.requires_grad_(False)
    vlm.model.eval()
    return vlm


def save_merged(
    vlm: VisionLanguageModel,
    change: Change,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the edited model as an ordinary Hugging Face directory and return it; the model ends unedited.

    Args:
        vlm: The model that was edited.
        change: The edit.
        folder: The directory to write.
        dtype: Dtype of the weights in the file; None keeps that of the file the model was loaded from. What a
            half-precision file rounds away of the edit is logged, as a warning if it is most of it.
        overwrite: Replace an existing directory.

    Returns:
        The directory.

    Raises:
        ModelError: The directory cannot be written.
        EditError: The change cannot be applied to this model.

    Example:
        >>> import tempfile
        >>> from multrace.editing import save_merged
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> request = mt.EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=5).edit(vlm, [request], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     merged = mt.load(save_merged(vlm, delta, f"{folder}/model"))
        >>> merged.fingerprint(delta.changes) == vlm.fingerprint(delta.changes)
        False
    """
    stored = dtype or vlm.stored_dtype or vlm.dtype
    if isinstance(change, Delta) and stored.itemsize < 4 and not vlm.is_quantised:
        for name, each in change.changes.items():
            rounding = each.rounding(vlm.weight(name).to(stored), transposed=vlm.is_transposed(name))
            level = logging.WARNING if rounding.is_lossy else logging.INFO
            logger.log(level, "%s in %s: %s; an adapter (to_peft) keeps all of it", name, folder, rounding)
    with change.applied(vlm):
        vlm.save_pretrained(folder, dtype=dtype, overwrite=overwrite)
    return Path(folder)


@torch.no_grad()
def verify_export(
    vlm: VisionLanguageModel, change: Change, reopened: VisionLanguageModel, prompts: Sequence[Prompt]
) -> Verification:
    """Compare a model that was opened from an export with the edited one, in logits of all tokens and in answers.

    Args:
        vlm: The unedited model.
        change: The edit that was exported.
        reopened: The exported model: `with_adapters` of a base model, or `load` of a merged directory.
        prompts: What both are asked; pass the edited question, with its picture, among them.

    Returns:
        The largest differences, and both answers to each prompt; `Verification.holds` is the verdict.

    Raises:
        EditError: There are no prompts, or the change cannot be applied to this model.

    Example:
        >>> import tempfile
        >>> from multrace.editing import save_merged, verify_export
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> request = mt.EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=5).edit(vlm, [request], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     merged = mt.load(save_merged(vlm, delta, f"{folder}/model"))
        >>> verify_export(vlm, delta, merged, [vlm.prompt_for(request.question)]).holds
        True
    """
    prompts = list(prompts)
    if not prompts:
        raise EditError("no prompts to compare the export on; pass at least one")
    plain = [vlm.logits(prompt).cpu() for prompt in prompts]
    with change.applied(vlm):
        edited, wanted = [vlm.logits(prompt).cpu() for prompt in prompts], vlm.answers(prompts)
    found, given = [reopened.logits(prompt).cpu() for prompt in prompts], reopened.answers(prompts)
    return Verification(
        difference=_largest(edited, found),
        effect=_largest(edited, plain),
        answers=tuple(zip(wanted, given, strict=True)),
    )


def _largest(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((one.double() - other.double()).abs().max().item() for one, other in zip(ones, others, strict=True))


def _check_fits(change: LowRank, vlm: VisionLanguageModel, name: str, shape: tuple[int, int]) -> None:
    wanted = shape[::-1] if vlm.is_transposed(name) else shape
    try:
        found = tuple(vlm.weight(name).shape)
    except ModelError as error:
        raise EditError(f"an edit of '{change.model}' does not fit '{vlm.name}': {error}") from error
    if found != wanted:
        raise EditError(
            f"an edit of '{change.model}' changes {name} of shape {wanted}; in '{vlm.name}' it is {found}; "
            "load the model that was edited"
        )


def _adapter(
    change: LowRank, vlm: VisionLanguageModel, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of PEFT's adapter with these factors (left, right) by weight."""
    slices: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (left, right) in factors.items():
        parameter, number = parameter_of(name)
        if number is None:
            pairs[name.removesuffix(".weight")] = right, left
        else:
            stored = (right.T, left.T) if vlm.is_transposed(name) else (left, right)
            slices.setdefault(parameter, {})[number] = stored
    stacks = {name: _stacked(vlm.weight(name), each) for name, each in slices.items()}
    modules = pairs | {name.rpartition(".")[0]: stack for name, stack in stacks.items()}
    tensors = {
        f"base_model.model.{path}.lora_{part}.weight": factor
        for path, pair in modules.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    ranks = {path: len(pair[0]) for path, pair in pairs.items()}
    stacked = {name: len(stack[0]) // len(vlm.weight(name)) for name, stack in stacks.items()}
    return tensors, _config(change, vlm, ranks, stacked)


def _stacked(weight: Tensor, slices: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """PEFT's factors for a weight (expert, row, column); some slices change by P (row, rank) @ Q (rank, column).

    They have one rank for all experts, A (expert x rank, row) with the ranks of an expert together and B (column,
    rank x expert) with the experts of a rank together.
    """
    count, rows, columns = weight.shape
    rank = max(left.shape[1] for left, _ in slices.values())
    down, up = torch.zeros(count, rank, rows), torch.zeros(columns, rank, count)
    for number, (left, right) in slices.items():
        down[number, : left.shape[1]], up[:, : left.shape[1], number] = left.T, right.T
    return down.flatten(0, 1), up.flatten(1)


def _config(
    change: LowRank, vlm: VisionLanguageModel, modules: Mapping[str, int], parameters: Mapping[str, int]
) -> dict[str, Any]:
    """PEFT's adapter_config.json for the ranks of modules and of three-dimensional parameters.

    Whatever is left out has PEFT's default.
    """
    ranks = {**modules, **parameters}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": change.model,
        "revision": change.revision,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": vlm.stores_transposed and bool(modules),
        "target_modules": sorted(modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "inference_mode": True,
    }
