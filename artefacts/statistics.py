"""Intervals of means and of proportions, a paired test, and the separation of two classes by a score."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .folders import ArtefactError

LEVEL = 0.95
"""Confidence level of every interval."""
DRAWS = 2000
"""Number of bootstrap samples of an interval."""


def student_interval(mean: Tensor, deviation: Tensor, count: Tensor, *, comparisons: int = 1) -> tuple[Tensor, Tensor]:
    """Return (low, high) of the 95 % interval of a mean by Student's t; NaN for fewer than two values.

    Args:
        mean: mean of the values, of any shape.
        deviation: their standard deviation (with n - 1 in the denominator), of the same shape.
        count: number of values, of the same shape.
        comparisons: number of intervals that jointly cover all means with 95 % confidence (Bonferroni). Pass the number
            of cells before you judge the largest of them, which was selected for its size.

    Returns:
        Lower and upper ends, of the same shape as the mean.

    Example:
        >>> import torch
        >>> from multrace.artefacts import student_interval
        >>> low, high = student_interval(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2))
        >>> round(float(high), 2)
        8.98
    """
    from scipy.stats import t as student

    degrees = (count - 1).clamp(min=1).numpy()
    quantile = torch.as_tensor(student.ppf(1 - (1 - LEVEL) / 2 / comparisons, degrees), dtype=mean.dtype)
    half = quantile * deviation / count.clamp(min=1).to(mean.dtype).sqrt()
    half = half.masked_fill(count < 2, torch.nan)
    return mean - half, mean + half


def mean_interval(values: Tensor, *, comparisons: int = 1) -> tuple[Tensor, Tensor]:
    """Return (low, high) of the 95 % interval of the mean over the first axis by Student's t; NaN values are left out.

    See `student_interval` for `comparisons`. Raises `ArtefactError` for fewer than two values along the axis.
    """
    if len(values) < 2:
        raise ArtefactError(f"an interval needs at least two results, here is {len(values)}; average more prompts")
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    deviation = ((values - mean) ** 2).nansum(0).div((count - 1).clamp(min=1)).sqrt()
    return student_interval(mean, deviation, count, comparisons=comparisons)


def wilson_interval(shares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high), each in 0 to 1: Wilson's 95 % score interval of shares among `counts` cases; NaN for none.

    For 10 right answers out of 10 the interval is 0.72 to 1, whereas an interval from the spread would have no width.
    """
    from scipy.stats import binomtest

    shares, counts = torch.broadcast_tensors(shares.double(), counts)
    ends = torch.full((*shares.shape, 2), torch.nan, dtype=torch.float64)
    for place in (counts > 0).nonzero().tolist():
        count = int(counts[tuple(place)])
        hits = round(float(shares[tuple(place)]) * count)
        interval = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
        ends[tuple(place)] = torch.tensor([interval.low, interval.high], dtype=torch.float64)
    return ends[..., 0], ends[..., 1]


def auroc(scores: NDArray, is_right: NDArray) -> float:
    """Return the share of pairs of a right and a wrong answer in which the right one scores higher; ties count half.

    The scores are (record,), and is_right is (record,) booleans with at least one of each.
    """
    return float(weighted_auroc(scores, is_right, np.ones((1, len(scores))))[0])


def weighted_auroc(scores: NDArray, is_right: NDArray, counts: NDArray) -> NDArray:
    """Return the `auroc` (draw,) of samples that contain each record `counts` times; the counts are (draw, record)."""
    _, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    right, wrong = (
        np.add.reduceat((counts * members)[:, order], starts, axis=1, dtype=np.float64)
        for members in (is_right, ~is_right)
    )
    below = wrong.cumsum(1) - wrong
    return (right * (below + wrong / 2)).sum(1) / (right.sum(1) * wrong.sum(1))


def bootstrap_counts(is_right: NDArray, *, seed: int, draws: int = DRAWS) -> NDArray:
    """Return the number (draw, record) of times each record is drawn; right answers are as many as in the data."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((draws, len(is_right)), dtype=np.int64)
    for members in (is_right, ~is_right):
        size = int(members.sum())
        counts[:, members] = generator.multinomial(size, np.full(size, 1 / size), size=draws)
    return counts


def grouped_bootstrap(
    values: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> tuple[float, float]:
    """Return (low, high) of the percentile interval of a mean when whole groups are drawn with replacement.

    Args:
        values: the values, at least one.
        groups: the name of the group of each value; values of one group are not independent.
        seed: random seed; the same seed gives the same interval.
        draws: number of bootstrap samples.
        level: confidence level.
    """
    names, places = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(places, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(places)
    shares = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), shares, size=draws)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(differences: NDArray, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float, float]:
    """Return (low, high, p) of paired differences: the bootstrap interval of their mean, and a two-sided p-value.

    The p-value comes from a permutation test that flips the signs of the differences at random.
    """
    generator, size = np.random.default_rng(seed), (draws, len(differences))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(differences[generator.integers(0, len(differences), size)].mean(1), tails)
    flipped = np.abs((differences * generator.choice([-1.0, 1.0], size)).mean(1))
    p = (1 + (flipped >= abs(differences.mean()) - 1e-12).sum()) / (1 + draws)
    return float(low), float(high), float(p)
