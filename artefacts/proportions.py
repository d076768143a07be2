"""Confidence intervals of shares, such as accuracies, that stay within 0 and 1 also for few questions."""

from statistics import NormalDist

import torch
from torch import Tensor

from .intervals import LEVEL


def wilson_interval(shares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high), each in 0 to 1: Wilson's 95 % score interval of shares among so many; NaN where there is none.

    Of 10 right answers out of 10 it says 0.72 to 1, where an interval by the spread would have no width at all.
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    counts = counts.double()
    weight = z**2 / counts
    middle = (shares + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (shares * (1 - shares) / counts + weight / (4 * counts)).sqrt()
    low, high = (middle - half).clamp(min=0.0), (middle + half).clamp(max=1.0)
    return torch.where(counts > 0, low, torch.nan), torch.where(counts > 0, high, torch.nan)
