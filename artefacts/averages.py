"""Statistics over prompts: averages whose results are added one by one, intervals, a paired test, and ROC areas.

Only running sums over named axes stay in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .folders import ArtefactError
from .results import Result

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


Single = TypeVar("Single", bound=Result)
Average = TypeVar("Average", bound=Result)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean:
    """The mean of a quantity over prompts, with its spread, entry by entry. A result may have a `Mean` as a field."""

    mean: Tensor
    """Mean over the prompts that have the entry, float64; NaN where no prompt has it."""
    deviation: Tensor
    """Standard deviation over these prompts (with n - 1), float64; 0 for a single prompt, NaN for none."""
    count: Tensor
    """Number of prompts that have the entry, int64."""

    def interval(self, *, comparisons: int = 1) -> tuple[Tensor, Tensor]:
        """Return (low, high) of the 95 % interval of the mean by Student's t; NaN where fewer than two have the entry.

        comparisons: number of intervals that jointly cover all means with 95 % confidence (Bonferroni). Raises
        `ArtefactError` if no entry has two prompts.
        """
        if int(self.count.max()) < 2:
            raise ArtefactError("an interval needs at least two results, here is one; average more prompts")
        return student_interval(self.mean, self.deviation, self.count, comparisons=comparisons)

    def band(self) -> tuple[Tensor, Tensor]:
        """Return `interval`, or NaN for both ends everywhere if no entry has two prompts."""
        unknown = torch.full_like(self.mean, torch.nan)
        return self.interval() if int(self.count.max()) > 1 else (unknown, unknown)

    def wilson(self) -> tuple[Tensor, Tensor]:
        """Return (low, high) of Wilson's 95 % interval, for means of zeros and ones."""
        return wilson_interval(self.mean, self.count)

    def __getitem__(self, index: Any) -> "Mean":
        """Return the `Mean` of some of the entries."""
        return Mean(mean=self.mean[index], deviation=self.deviation[index], count=self.count[index])

    @property
    def shape(self) -> torch.Size:
        """The sizes of the axes."""
        return self.mean.shape

    def fits(self, *shape: int) -> bool:
        """Return whether all three tensors have this shape, for the checks of loaded results."""
        return all(each.shape == shape for each in (self.mean, self.deviation, self.count))


class RunningMean:
    """A running mean of values that are added one by one (Welford's algorithm); NaN entries are left out.

    Values have named axes. Labels that first appear later, such as a flow that only some prompts have, are appended,
    and values that lack a label count as NaN there. With `joint`, covariances along the last axis are computed as well.
    """

    def __init__(self, *, joint: bool = False) -> None:
        self.axes: dict[str, tuple[Any, ...]] = {}
        self._products = torch.zeros((), dtype=torch.float64) if joint else None
        self._count = torch.zeros((), dtype=torch.int64)
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor, axes: Mapping[str, Sequence[Any]]) -> None:
        """Add values with these axes: the name of each dimension and its labels, in order."""
        named = {name: tuple(labels) for name, labels in axes.items()}
        self._grow(named)
        places = [[self.axes[name].index(label) for label in labels] for name, labels in named.items()]
        values = _spread(values.double(), list(self._mean.shape), places, torch.nan)
        is_there = ~values.isnan()
        self._count = self._count + is_there
        change = torch.where(is_there, values - self._mean, 0.0)
        self._mean = self._mean + change / self._count.clamp(min=1)
        rest = torch.where(is_there, values - self._mean, 0.0)
        self._squares = self._squares + change * rest
        if self._products is not None:
            self._products = self._products + change[..., :, None] * rest[..., None, :]

    def _grow(self, named: Mapping[str, tuple[Any, ...]]) -> None:
        """Make room for new labels."""
        known = {name: self.axes.get(name, ()) for name in named}
        grown = {name: tuple(dict.fromkeys((*known[name], *labels))) for name, labels in named.items()}
        if grown == self.axes:
            return
        kept, sizes = [range(len(each)) for each in known.values()], [len(each) for each in grown.values()]
        self._count, self._mean, self._squares = (
            _spread(each, sizes, kept, 0) for each in (self._count, self._mean, self._squares)
        )
        if self._products is not None:
            self._products = _spread(self._products, [*sizes, sizes[-1]], [*kept, kept[-1]], 0)
        self.axes = grown

    @property
    def covariance(self) -> Tensor:
        """(..., last axis, last axis) float64: covariances (with n - 1) between the entries along the last axis."""
        if self._products is None:
            raise ArtefactError("no covariances were kept; make the running mean with joint=True")
        return self._products / (self._count - 1).clamp(min=1)[..., None]

    @property
    def value(self) -> Mean:
        """The mean of the values that were added so far."""
        is_empty = self._count == 0
        deviation = (self._squares.clamp(min=0) / (self._count - 1).clamp(min=1)).sqrt()
        return Mean(
            mean=self._mean.masked_fill(is_empty, torch.nan),
            deviation=deviation.masked_fill(is_empty, torch.nan),
            count=self._count.clone(),
        )


class Averager(ABC, Generic[Single, Average]):
    """Average results of one experiment, which are added one by one.

    In a subclass, `alike` lists the fields that must be equal, `_take` adds the quantities of a result to running
    means, and `_average` builds the average from them.
    """

    alike: ClassVar[tuple[str, ...]]
    """Fields or properties that must be equal in all results."""

    def __init__(self) -> None:
        self._first: Single | None = None
        self.count = 0
        """Number of results that were averaged."""
        self._means: dict[str, RunningMean] = {}

    @property
    def first(self) -> Single:
        """The first result. Raises `ArtefactError` if there is none."""
        if self._first is None:
            raise ArtefactError("no results to average; pass at least one")
        return self._first

    def add(self, result: Single) -> None:
        """Add a result. Raises `ArtefactError` if it differs from the first one in a field that must be equal."""
        if self._first is None:
            self._first = result
        check_alike(self.first, result, self.alike)
        self._take(result)
        self.count += 1

    def average(self) -> Average:
        """Return the average of the results so far. Raises `ArtefactError` if there are none."""
        _ = self.first
        return self._average()

    @abstractmethod
    def _take(self, result: Single) -> None:
        """Add the quantities of a result to the running means."""

    @abstractmethod
    def _average(self) -> Average:
        """Return the average from the running means."""

    def _add(
        self,
        name: str,
        values: Tensor | float,
        axes: Mapping[str, Sequence[Any]] | None = None,
        *,
        joint: bool = False,
    ) -> None:
        """Add values with these axes (none for a single number) to the running mean of this name."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if not axes:
            values, axes = values.reshape(1), {"": ("",)}
        self._means.setdefault(name, RunningMean(joint=joint)).add(values, axes)

    def _mean(self, name: str) -> Mean:
        """Return the running mean of this name."""
        running = self._means[name]
        return running.value[0] if list(running.axes) == [""] else running.value

    def _labels(self, name: str, axis: str) -> tuple[Any, ...]:
        """Return the current labels of an axis of the running mean of this name."""
        return self._means[name].axes[axis]


def check_alike(first: Any, other: Any, names: Sequence[str]) -> None:
    """Raise `ArtefactError` if two results are of different types or differ in one of these attributes."""
    if type(first) is not type(other):
        raise ArtefactError(
            f"cannot average {type(first).__name__} and {type(other).__name__} together; pass results of one kind"
        )
    for name in names:
        values = getattr(first, name), getattr(other, name)
        if not _equal(*values):
            said = "" if isinstance(values[0], Tensor | Mapping) else f" ({values[0]} and {values[1]})"
            raise ArtefactError(f"these results differ in their {name}{said}; average equal ones only")


def averaged(averager: Averager[Single, Average], results: Iterable[Single]) -> Average:
    """Return the average of results; each result may be released once it has been added."""
    for result in results:
        averager.add(result)
    return averager.average()


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal, including tensors and mappings of tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _spread(values: Tensor, sizes: Sequence[int], places: Sequence[Sequence[int]], fill: float) -> Tensor:
    """Return a larger tensor with the values at these places along each axis, and the fill value elsewhere."""
    if list(values.shape) == list(sizes) and all(list(each) == list(range(len(each))) for each in places):
        return values
    spread = values.new_full(list(sizes), fill)
    if all(len(each) for each in places):
        spread[tuple(torch.meshgrid(*(torch.tensor(list(each)) for each in places), indexing="ij"))] = values
    return spread
