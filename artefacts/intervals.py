"""Confidence intervals of means over prompts, also corrected for having looked at many cells."""

import math

import torch
from torch import Tensor

from .errors import ArtefactError

LEVEL = 0.95


def student_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with this many degrees of freedom stays below with this probability, in [0.5, 1).

    Bisection on the closed form of the distribution for whole degrees of freedom (Abramowitz and Stegun, 26.7.3-4).
    """
    low, high = 0.0, 1.0
    while student_below(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_below(middle, degrees) < probability else (low, middle)
    return high


def student_below(value: float, degrees: int) -> float:
    """Probability that Student's t with this many degrees of freedom is below a value of at least 0."""
    angle = math.atan2(value, math.sqrt(degrees))
    is_odd, cosine = degrees % 2, math.cos(angle)
    term = math.sin(angle) * (cosine if is_odd else 1.0)
    total = 0.0
    for step in range(1 + is_odd, degrees, 2):  # the terms cos, 2/3 cos^3, ... or 1, 1/2 cos^2, ... times the sine
        total += term
        term *= step / (step + 1) * cosine**2
    inside = 2 / math.pi * (angle + total) if is_odd else total
    return 0.5 + inside / 2


def mean_interval(values: Tensor, *, comparisons: int = 1) -> tuple[Tensor, Tensor]:
    """(low, high) of the 95 % interval of the mean over the first axis, by Student's t; NaN values are left out.

    comparisons > 1: intervals that together hold all so many means with 95 % (Bonferroni), so that the largest of them
    is covered too, though it was chosen for being the largest. NaN where fewer than two values are left. ArtefactError for
    fewer than two traces, whose spread is unknown.
    """
    if len(values) < 2:
        raise ArtefactError(
            f"an interval needs at least two traces, this average has {len(values)}; average more prompts"
        )
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    deviation = ((values - mean) ** 2).nansum(0).div((count - 1).clamp(min=1)).sqrt()
    quantiles = torch.full_like(mean, torch.nan)
    for size in count.unique().tolist():
        if size > 1:
            quantiles[count == size] = student_quantile(1 - (1 - LEVEL) / 2 / comparisons, size - 1)
    half = quantiles * deviation / count.clamp(min=1).to(mean.dtype).sqrt()
    return mean - half, mean + half
