"""Exported edits opened again: adapters put into a model by PEFT, models written whole, and proof that they work."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..requests import EditError
from .delta import Delta, RuntimeEdit
from .history import History
from .weight_change import Change, WeightState

logger = logging.getLogger("multrace")
_ENOUGH = 1e-3  # share of the edit's effect on the logits that an export may differ by


@dataclass(frozen=True, kw_only=True)
class CastVerification:
    """What becomes of an export whose weights are rounded to the dtype that a server computes in."""

    dtype: str
    """The dtype, such as "bfloat16"."""
    difference: float
    """Largest difference between the logits with the export as it is and with its weights rounded."""
    answers: tuple[tuple[str, str], ...]
    """(the edited model's answer, the rounded export's one) for each prompt."""

    @property
    def stay(self) -> int:
        """Number of prompts to which the answer is that of the edited model."""
        return sum(one == other for one, other in self.answers)

    def __str__(self) -> str:
        return (
            f"rounded to {self.dtype}, logits move by at most {self.difference:.2g}; "
            f"{self.stay} of {len(self.answers)} answers stay"
        )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a model that was opened from files compares with the edited one, over some prompts."""

    difference: float
    """Largest difference between their logits."""
    effect: float
    """Largest difference between the logits of the edited model and of the unedited one."""
    answers: tuple[tuple[str, str], ...]
    """(the edited model's answer, the reopened one's) for each prompt."""
    cast: CastVerification | None = None
    """The same with the exported weights rounded to the serving dtype; None where none was asked for."""

    @property
    def holds(self) -> bool:
        """The answers are the same, the logits to a thousandth of what the edit changes in them, and answers survive
        the cast to the serving dtype, if one was asked for."""
        is_same = self.difference <= _ENOUGH * self.effect and all(one == other for one, other in self.answers)
        return is_same and (self.cast is None or self.cast.stay == len(self.cast.answers))

    def __str__(self) -> str:
        same = sum(one == other for one, other in self.answers)
        return (
            f"logits differ by at most {self.difference:.2g} (the edit changes them by up to {self.effect:.2g}); "
            f"{same} of {len(self.answers)} answers are the same"
        ) + (f"; {self.cast}" if self.cast else "")


def with_adapters(vlm: VisionLanguageModel, *folders: str | os.PathLike[str]) -> VisionLanguageModel:
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
    paths = [os.fspath(folder) for folder in folders]
    names = [f"edit_{index}" for index in range(len(paths))]
    try:
        with vlm.lock, warnings.catch_warnings():
            # PEFT's talk with the newest transformers is none of the reader's business
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of experts, which it can adapt
            wrapped = PeftModel.from_pretrained(vlm.model, paths[0], adapter_name=names[0])
            for name, path in zip(names[1:], paths[1:], strict=True):
                wrapped.load_adapter(path, adapter_name=name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # PEFT may not fit the quantiser that is here
        raise EditError(f"PEFT cannot open {paths} on '{vlm.name}': {error}") from error
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
    vlm: VisionLanguageModel,
    change: Change,
    reopened: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    dtype: torch.dtype | str | None = None,
) -> Verification:
    """Compare a model that was opened from an export with the edited one, in logits of all tokens and in answers.

    With a serving dtype, the weights that the export brings (the adapters' tensors, or the changed weights of a merged
    model) are then rounded to it, as a server does when it loads them, and compared again; all other weights and the
    arithmetic stay in the dtype of the model. The reopened model ends as it was.

    Args:
        vlm: The unedited model.
        change: The edit that was exported.
        reopened: The exported model: `with_adapters` of a base model, or `load` of a merged directory.
        prompts: What both are asked; pass the edited question, with its picture, among them.
        dtype: The dtype that the export is served in, such as "bfloat16"; None leaves that comparison out.

    Returns:
        The largest differences, and both answers to each prompt; `Verification.holds` is the verdict.

    Raises:
        EditError: There are no prompts, the change cannot be applied to this model, or the export changes no weight
            that could be rounded, or there is no such dtype.

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
    prompts, served = list(prompts), None if dtype is None else _float_dtype(dtype)
    if not prompts:
        raise EditError("no prompts to compare the export on; pass at least one")
    plain = [vlm.logits(prompt).cpu() for prompt in prompts]
    with change.applied(vlm):
        edited, wanted = [vlm.logits(prompt).cpu() for prompt in prompts], vlm.answers(prompts)
    found, given = [reopened.logits(prompt).cpu() for prompt in prompts], reopened.answers(prompts)
    verification = Verification(
        difference=_largest(edited, found),
        effect=_largest(edited, plain),
        answers=tuple(zip(wanted, given, strict=True)),
    )
    if served is None:
        return verification
    with _rounded(change, reopened, served).applied(reopened):
        moved, given = [reopened.logits(prompt).cpu() for prompt in prompts], reopened.answers(prompts)
    cast = CastVerification(
        dtype=str(served).removeprefix("torch."),
        difference=_largest(found, moved),
        answers=tuple(zip(wanted, given, strict=True)),
    )
    return replace(verification, cast=cast)


def _float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise EditError(f"no dtype to serve in: {dtype!r}; pass one of floating point, such as 'bfloat16'")
    return found


def _rounded(change: Change, reopened: VisionLanguageModel, dtype: torch.dtype) -> WeightState:
    """Return the weights that the export brought into the reopened model, with values that the dtype has."""
    names = [name for name, _ in reopened.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    if not names:
        edit = change.delta if isinstance(change, RuntimeEdit) else change
        edit = edit.composed() if isinstance(edit, History) else edit
        names = [*getattr(edit, "fingerprints", ())]
    if not names:
        raise EditError(
            f"'{reopened.name}' holds no adapter, and this change names no weights, so there is nothing to round to "
            f"{dtype}; leave dtype= out"
        )
    weights = {name: reopened.weight(name).detach() for name in names}
    return WeightState(weights={name: weight.to(dtype).to(weight.dtype) for name, weight in weights.items()})


def _largest(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((one.double() - other.double()).abs().max().item() for one, other in zip(ones, others, strict=True))
