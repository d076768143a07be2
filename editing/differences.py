"""Trained changes of weights, held outside the model: put in for the length of a block, and taken back bit by bit."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import ModelError, VisionLanguageModel
from .errors import EditError


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedChange(ABC):
    """What training changed in a model, per weight; it is put into no other weights than those it was trained on."""

    fingerprints: Mapping[str, str]
    """Hash of each touched weight before the change, per parameter name."""
    model: str
    """Name or path of the model that was trained."""
    revision: str | None = None
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str], ...]
    """What was asked, and the loss that was reached in nats per label, as text, one mapping per request."""
    losses: tuple[float, ...]
    """Mean negative log-probability in nats per label and prompt, before each step and after the last."""

    @abstractmethod
    def difference(self, name: str) -> Tensor:
        """What is added to the parameter of this name: float32, in the layout in which the model stores it."""

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        """The model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Sums are taken in float32 or wider and rounded once to the dtype of the weight. EditError, with nothing
        changed, if the model lacks a weight, if a weight is not the one that was trained, or if it would overflow.
        """
        with vlm.lock:
            changed = self._changed(vlm)
            saved = {name: vlm.weight(name).detach().clone() for name in changed}
            try:
                _write(vlm, changed)
                yield vlm
            finally:
                _write(vlm, saved)

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
                    f"({vlm.dtype}) it has {found[name][:12]}: another model or precision, or an edit is applied; "
                    "go back to the weights that it was trained on, or train again on these"
                )
            changed[name] = summed(vlm.weight(name), self.difference(name))
            if not torch.isfinite(changed[name]).all():
                raise EditError(f"the changed {name} overflows {changed[name].dtype}; load in float32 or train less")
        return changed


def summed(weight: Tensor, difference: Tensor) -> Tensor:
    """A copy of the weight plus the difference, in its dtype and on its device; autograd reaches the difference."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + difference.to(wide.device)).to(weight.dtype)


@torch.no_grad()
def _write(vlm: VisionLanguageModel, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        vlm.weight(name).copy_(value)
