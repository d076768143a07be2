"""Statistics of a stream of edits: running mean, deviation and covariance of what a weight reads and of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ...artefacts import load_fields, save_fields
from ..requests import EditError

_LAYOUT = "multrace stream statistics 1"
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningStatistics:
    """Mean, deviation and, if asked for, covariance of rows that arrive in batches: a value, which `added` continues.

    However the rows are divided into batches, the numbers are those of all rows together, up to the rounding of
    float64.

    Example:
        >>> import torch
        >>> from multrace.editing.solve import RunningStatistics
        >>> rows = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, 1.0]])
        >>> statistics = RunningStatistics.empty(2).added(rows[:1]).added(rows[1:])
        >>> statistics.mean.tolist(), statistics.deviation[0].item()
        ([3.0, 3.0], 2.0)
    """

    count: int
    """Number of rows."""
    mean: Tensor
    """(size,) float64."""
    scatter: Tensor
    """Sum over the rows of their squared deviations from the mean, (size,) float64; with covariance, the sum of the
    outer products of these deviations, (size, size)."""

    @classmethod
    def empty(cls, size: int, *, covariance: bool = False, device: torch.device | None = None) -> Self:
        """Return the statistics of no rows of this size."""
        mean = torch.zeros(size, dtype=torch.float64, device=device)
        return cls(count=0, mean=mean, scatter=torch.diag(mean) if covariance else mean.clone())

    @property
    def has_covariance(self) -> bool:
        """Whether the covariance is known, and not the deviations alone."""
        return self.scatter.ndim > 1

    def added(self, rows: Tensor) -> Self:
        """Return the statistics with these rows (row, size) as well (Chan, Golub and LeVeque 1983)."""
        rows = rows.to(self.mean)
        if not len(rows):
            return self
        count = self.count + len(rows)
        centre = rows.mean(0)
        own, shift = rows - centre, centre - self.mean
        between = self.count * len(rows) / count
        if self.has_covariance:
            scatter = self.scatter + own.T @ own + between * torch.outer(shift, shift)
        else:
            scatter = self.scatter + own.square().sum(0) + between * shift.square()
        return replace(self, count=count, mean=self.mean + shift * (len(rows) / count), scatter=scatter)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of each entry with n - 1 in the denominator, (size,) float64; 0 for fewer than two."""
        squares = self.scatter.diagonal() if self.has_covariance else self.scatter
        return (squares / max(self.count - 1, 1)).sqrt()

    @property
    def covariance(self) -> Tensor:
        """The covariance with n - 1 in the denominator, (size, size) float64. Raises `EditError` if it is not known."""
        if not self.has_covariance:
            raise EditError(
                "these statistics have no covariance; begin them with RunningStatistics.empty(covariance=True)"
            )
        return self.scatter / max(self.count - 1, 1)

    def normalised(self, rows: Tensor) -> Tensor:
        """Return the rows (row, size) less the mean, over the deviation, float64; 0 in entries that never vary."""
        deviation = self.deviation
        scale = torch.where(deviation > 0, deviation.reciprocal(), torch.zeros_like(deviation))
        return (rows.to(self.mean) - self.mean) * scale

    def whitened(self, rows: Tensor, *, floor: float = _FLOOR) -> Tensor:
        """Return the rows (row, size) less the mean, times the inverse root of the covariance, float64.

        All directions then vary alike and independently. floor: least eigenvalue that is used, as a share of the mean
        eigenvalue. With no more rows than entries the covariance is singular, and the rows are `normalised` instead.
        """
        if self.count <= len(self.mean):
            return self.normalised(rows)
        values, vectors = torch.linalg.eigh(self.covariance)
        least = max(floor * values.mean().item(), torch.finfo(values.dtype).tiny)
        return (rows.to(self.mean) - self.mean) @ (vectors * values.clamp(min=least).rsqrt()) @ vectors.T


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightStatistics:
    """What a stream of edits has shown of one weight."""

    inputs: RunningStatistics
    """Of what the weight reads where answers are predicted."""
    gradients: RunningStatistics
    """Of the gradients of the loss at what it writes."""
    output_square: float
    """Mean squared norm of what it writes in the first step of the stream. Later steps see outputs that edits have
    moved, and a scale that grew with them would make each edit larger than the one before."""

    @classmethod
    def empty(cls, width: int, hidden: int, *, covariance: bool, device: torch.device) -> Self:
        """Return the statistics of nothing, for a weight of this shape."""
        return cls(
            inputs=RunningStatistics.empty(width, device=device),
            gradients=RunningStatistics.empty(hidden, covariance=covariance, device=device),
            output_square=0.0,
        )

    def added(self, inputs: Tensor, gradients: Tensor, outputs: Tensor) -> Self:
        """Return the statistics with these rows as well, (row, width) and twice (row, hidden)."""
        read, squares = self.inputs.added(inputs), self.output_square
        if not self.inputs.count and len(outputs):
            squares = outputs.double().square().sum(-1).mean().item()
        return replace(self, inputs=read, gradients=self.gradients.added(gradients), output_square=squares)

    def fits(self, other: Self) -> bool:
        """Return whether both are of weights of the same shape, both with a covariance of gradients or neither."""
        shapes = [[getattr(each, name).scatter.shape for name in ("inputs", "gradients")] for each in (self, other)]
        return shapes[0] == shapes[1]

    def on(self, device: torch.device) -> Self:
        """Return the statistics on a device."""
        moved = {}
        for name in ("inputs", "gradients"):
            own = getattr(self, name)
            moved[name] = replace(own, mean=own.mean.to(device), scatter=own.scatter.to(device))
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StreamStatistics:
    """What a stream of edits has shown of each edited weight; a later session can go on with it."""

    steps: int = 0
    """Number of steps, those that only gathered statistics included."""
    weights: Mapping[str, WeightStatistics]
    """By parameter name."""

    def __repr__(self) -> str:
        rows = max((each.inputs.count for each in self.weights.values()), default=0)
        return f"StreamStatistics({self.steps} steps, {rows} rows, {len(self.weights)} weights)"

    def save(self, path: str | Path) -> Path:
        """Write the statistics as a safetensors file and return the path. Raises `ArtefactError` if that fails."""
        return save_fields(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return statistics that `save` wrote. Raises `ArtefactError` for a missing or damaged file."""
        return load_fields(path, _LAYOUT, cls)
