"""How early or late in a model a flow matters: centres of mass of lost probability, with intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artefacts.intervals import mean_interval


@dataclass(frozen=True, kw_only=True)
class FlowCentre:
    """The centre of mass over layers of what a mean curve loses."""

    flow: str
    window: int
    layer: float
    """Between 0 and the last layer."""
    interval: tuple[float, float] | None
    """95 % interval over questions; None for fewer than two."""
    count: int
    """Questions that have this flow."""


def centre_of_loss(curves: Tensor) -> Tensor:
    """(...,) float64: the mean layer of curves (..., layer), weighted by how far each lies below zero; NaN for none."""
    loss = (-curves).clamp(min=0)
    return (loss * torch.arange(curves.shape[-1])).sum(-1) / loss.sum(-1)


def jackknife(curves: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[float | None, tuple[float, float] | None]:
    """A statistic of the mean of curves (question, layer), and its 95 % interval over questions.

    statistic: from (..., layer) to (...,). Tukey's jackknife: half the width is that of Student's interval of the
    pseudo-values n * (of all) - (n - 1) * (without one). None for a value that is NaN, and for an interval of fewer
    than two questions.
    """
    count, total = len(curves), curves.sum(0)
    value = statistic(total / max(count, 1))
    if value.isnan():
        return None, None
    if count < 2:
        return float(value), None
    without_one = statistic((total - curves) / (count - 1))
    low, high = mean_interval(count * value - (count - 1) * without_one)
    half = (high - low) / 2
    return float(value), (float(value - half), float(value + half))
