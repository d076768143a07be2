"""How much an edit may change a weight, and how far a stream of edits may let it grow."""

import torch

from ...models import VisionLanguageModel
from ..changes import WeightChange
from ..requests import EditError
from .settings import ClosedFormSettings


def check_limits(
    vlm: VisionLanguageModel, name: str, change: WeightChange, settings: ClosedFormSettings, *, start: float | None
) -> None:
    """Raise `EditError` if a change is larger, or would make its weight larger, than the settings allow.

    An edit is refused rather than scaled down: a fact that is written by half is not answered, and grows the weight all
    the same.

    Args:
        vlm: The model as it is, without the change.
        name: Parameter name of the weight.
        change: The change of it.
        settings: The editor, with its `change_limit` and `growth_limit`.
        start: Frobenius norm of the weight before the first edit; None for its present one.
    """
    if not change.rank or (settings.change_limit is None and settings.growth_limit is None):
        return
    now = weight_norm(vlm, name)
    if settings.change_limit is not None and not _size(change) <= settings.change_limit * now:
        raise EditError(
            f"the edit would change {name} by {_size(change) / now:.3g} of its norm, more than the change_limit of "
            f"{settings.change_limit:g}; pass a larger ridge, a lower clamp or a higher change_limit"
        )
    if settings.growth_limit is None:
        return
    start, after = now if start is None else start, _norm_after(vlm, name, change)
    # An edit that makes a weight smaller is a way back below the limit.
    if not after <= max(settings.growth_limit * start, now):
        raise EditError(
            f"the edit would let {name} grow to {after / start:.4g} times its norm before the first edit, beyond the "
            f"growth_limit of {settings.growth_limit:g}; take edits out, weigh old keys, or pass a higher growth_limit"
        )


@torch.no_grad()
def weight_norm(vlm: VisionLanguageModel, name: str) -> float:
    """Return the Frobenius norm of a weight, summed in float64."""
    return torch.linalg.vector_norm(vlm.weight(name), dtype=torch.float64).item()


def _size(change: WeightChange) -> float:
    """The Frobenius norm of the change, from its factors."""
    left, right = change.left.double(), change.right.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()


@torch.no_grad()
def _norm_after(vlm: VisionLanguageModel, name: str, change: WeightChange) -> float:
    """The Frobenius norm of a weight with the change in it, a run of rows at a time."""
    runs = change.rows(vlm.weight(name), transposed=vlm.is_transposed(name))
    return sum(rows.double().square().sum().item() for _, rows in runs) ** 0.5
