"""Changes of weights that training made: whole matrices, or low-rank factors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.facts import counted
from ...models import ModelError, VisionLanguageModel
from ..changes import AppliedDelta, held, overwrite, requests_line
from ..requests import EditError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainedChange(ABC):
    """A change of weights that training made; it can be applied only to the weights on which it was trained."""

    fingerprints: Mapping[str, str]
    """Parameter name -> hash of the weight before the change."""
    model: str
    """Name or path of the model that was trained."""
    revision: str | None = None
    """Revision of the model; None if it has none."""
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str | float], ...]
    """For each request, its question, target and status, and the "loss" after the training in nats per label."""
    losses: tuple[float, ...]
    """Mean over the trained prompts of the mean negative log-probability per label, in nats, in each epoch and after
    the training. An epoch is one step, and its loss the one before that step, unless the training has a `BreadthFirst`
    order: then it is the mean over mini-batches, each before its own step."""
    held_out_losses: tuple[float, ...] = ()
    """The mean over the prompts that were held out, before the training and after each epoch; empty without any. The
    weights are those of the lowest."""
    steps: int
    """Number of steps that were taken."""

    def __repr__(self) -> str:
        editor = self.settings.get("editor", "hand")
        line = f"{type(self).__name__} of {self.model!r} by {editor}: {counted(len(self.fingerprints), 'weight')}"
        return f"{line}, {counted(self.steps, 'step')}\n{requests_line(self.requests)}"

    @abstractmethod
    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, float32 on the CPU, in the layout of the model."""

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Sums are computed in float32 or wider and rounded once to the dtype of the weight. Raises `EditError`, with
        nothing changed, if the model lacks a weight, if a weight is not the one that was trained, or if a changed
        weight would overflow.
        """
        return held(vlm, self._put_in)

    def write(self, vlm: VisionLanguageModel) -> None:
        """Write the change into the model's weights in place; the caller keeps what undoes it.

        Raises `EditError` in the same cases as `applied`.
        """
        overwrite(vlm, self._changed(vlm))

    def _put_in(self, handle: AppliedDelta) -> None:
        changed = self._changed(handle.vlm)
        handle.put_in(changed, lambda: overwrite(handle.vlm, changed))

    def _changed(self, vlm: VisionLanguageModel) -> dict[str, Tensor]:
        try:
            found = vlm.fingerprint(self.fingerprints)
        except ModelError as error:
            raise EditError(f"a change of '{self.model}' does not fit '{vlm.name}': {error}") from error
        changed = {}
        for name, wanted in self.fingerprints.items():
            if found[name] != wanted:
                raise EditError(
                    f"this change was trained on '{self.model}', where {name} has hash {wanted[:12]}; in '{vlm.name}' "
                    f"({vlm.dtype}) it has {found[name][:12]}: another model, precision or "
                    "quantisation, or an edit is applied; "
                    "go back to the weights that it was trained on, or train again on these"
                )
            changed[name] = summed(vlm.weight(name), self.difference(name))
            if not torch.isfinite(changed[name]).all():
                raise EditError(
                    f"the changed {name} overflows {changed[name].dtype}; train less, or load a half-precision model "
                    "in float32"
                )
        return changed


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DenseChange(TrainedChange):
    """A change of whole weight matrices. Made by `FineTune.edit`."""

    differences: Mapping[str, Tensor]
    """Parameter name -> what is added to it, float32 on the CPU, in the shape in which the model stores it."""

    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, float32 on the CPU."""
        return self.differences[name]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LowRankChange(TrainedChange):
    """A change of weights by trained low-rank factors. Made by `Lora.edit`."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Parameter name -> (left, right): float32 (hidden, rank) and (rank, width) on the CPU, oriented as in y = W x. The
    scale of the adapter, alpha / rank, is included in left."""
    transposed: bool
    """Whether the model stores its weights as (width, hidden)."""

    def difference(self, name: str) -> Tensor:
        """Return left @ right of the parameter of this name, in the shape in which the model stores it."""
        left, right = self.factors[name]
        return (left @ right).T if self.transposed else left @ right


def summed(weight: Tensor, difference: Tensor) -> Tensor:
    """Return weight plus difference in the dtype and on the device of the weight; gradients flow to the difference.

    The sum is computed in float32, or in the dtype of the weight if that is wider.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + difference.to(wide.device)).to(weight.dtype)
