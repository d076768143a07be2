"""An edit beside the weights instead of in them: exact where a low precision would round part of it away."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import VisionLanguageModel, capture, patch
from .changes import WeightChange, check_fingerprints
from .delta import Delta


@dataclass(frozen=True, kw_only=True, eq=False)
class RuntimeEdit:
    """A delta that is added to what its weights compute, by forward hooks; no weight is touched.

    bfloat16 has 8 significant bits, so a weight takes up no change below a few thousandths of itself. The low-rank
    term is computed in float32 from what the weight reads, and the sum is rounded once, as an output. It costs two
    thin products per call. Use it wherever a change is taken, like a Delta.
    """

    delta: Delta

    @contextmanager
    def applied(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> Iterator[VisionLanguageModel]:
        """The model with the change beside its weights; on exit the hooks are gone.

        EditError as Delta.applied, though nothing can overflow.
        """
        paths = {name.removesuffix(".weight"): change for name, change in self.delta.changes.items()}
        with vlm.lock:
            self.delta.check_fits(vlm)
            if not on_other_weights:
                check_fingerprints(vlm, self.delta.fingerprints, self.delta.model)
        with capture(vlm, paths, inputs=True) as read:
            terms = {path: _adding(vlm, path, change, read) for path, change in paths.items()}
            with patch(vlm, terms):
                yield vlm

    @torch.no_grad()
    def retained(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> dict[str, Tensor]:
        """The share of the requested output change that this achieves, as Delta.retained gives it for the weights.

        Measured on what the edited modules put out for the keys, keys and outputs in the model's dtype.
        """
        outputs = {name: vlm.module(name.removesuffix(".weight")) for name in self.delta.changes}
        inputs = {name: change.keys.to(vlm.weight(name)) for name, change in self.delta.changes.items()}
        with vlm.running():
            before = {name: module(inputs[name]).double() for name, module in outputs.items()}
        with self.applied(vlm, on_other_weights=on_other_weights):
            after = {name: module(inputs[name]).double() for name, module in outputs.items()}
        return {name: change.share(after[name] - before[name]) for name, change in self.delta.changes.items()}


def _adding(
    vlm: VisionLanguageModel, path: str, change: WeightChange, read: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function that adds left @ right of the module's last input to its output."""
    weight = vlm.weight(f"{path}.weight")
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = (factor.to(weight.device, wide) for factor in (change.left, change.right))

    def add(output: Tensor) -> Tensor:
        return (output.to(wide) + read[path].to(wide) @ right.T @ left.T).to(output.dtype)

    return add
