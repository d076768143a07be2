"""Recursive least squares: the inverse of a cost, kept while keys of earlier edits come and go.

Earlier keys K with weight w make M = lambda I + mu C + w K^T K. Instead of factorising M anew for each edit, which
takes a third of width^3 multiplications, its inverse P is kept. By Woodbury, keys U that come make it

    P - P U^T (1/w + U P U^T)^-1 U P

in 4 n width^2, and keys that go are the same with -w. With protected directions, the rows of Q, the inverse N within
the directions that are left obeys the same rule, so both are kept. Rounding cannot add up: each solution is refined
with residuals of M itself until it is one of float64, and an inverse that needs much of it is computed anew.
Source: Soft recursive least squares, arXiv 2601.15686, is this with mu C for the anchor of old keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .cost import Cost, refined_solution, without_directions

_FEW = 16  # an update with more keys than width / 16 costs more than a factorisation
_WORN = 1e-6  # share of a key by which the kept inverse alone may miss it before it is computed anew
_LEAST = 1e-6  # share of M that a direction keeps when keys go; below it, an update would be rounding
_COLUMNS = 1024  # columns of a matrix of another dtype that are widened at a time


class RunningInverse:
    """The inverse of a cost with the outputs at earlier keys held, which follows these keys.

    It is one float64 matrix of width x width, two with protected directions (1.6 GB each at a width of 14336), and
    takes about three more while it is made.
    """

    def __init__(self, held: Cost) -> None:
        """Invert the cost `held`, which has a ridge or a moment, once."""
        self.inverse = held.inverse()
        """P (width, width)."""
        self.free = None if held.protected is None else held.projected(self.inverse)
        """N (width, width), P with the protected directions taken out; None without any."""
        self.changes = 0
        """Number of times that keys came or went."""
        self.is_stale = False
        """Whether it has to be made anew before it is used for another edit."""

    def add(self, keys: Tensor, weight: float) -> None:
        """Follow keys (n, width) that come with this weight, or go with it if it is negative."""
        self.changes += 1
        if _FEW * len(keys) > keys.shape[1]:
            self.is_stale = True
        if self.is_stale or not len(keys):
            return
        changes = []
        for matrix in self._matrices():
            along = keys @ matrix
            solved = _solved(along @ keys.T, along, weight)
            if solved is None:
                self.is_stale = True
                return
            changes.append((matrix, along, solved))
        for matrix, along, solved in changes:
            matrix.addmm_(along.T, solved, alpha=-1)

    def _matrices(self) -> list[Tensor]:
        return [self.inverse] if self.free is None else [self.inverse, self.free]


def _solved(gram: Tensor, along: Tensor, weight: float) -> Tensor | None:
    """(1/w + U P U^T)^-1 U P; None where nearly all of M would go."""
    scaled = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + weight * (gram + gram.T) / 2
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed or factor.diagonal().min().square() < _LEAST:
        return None
    return torch.cholesky_solve(along, factor) * weight


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningCost(Cost):
    """The cost of a change that also leaves the outputs at earlier keys as they are, by means of a kept inverse.

    It gives what `Cost.holding` gives, for as long as no keys come or go.
    """

    base: Cost
    """The cost without earlier keys."""
    running: RunningInverse
    gram: Tensor
    """K^T K of all keys that the inverse knows."""
    gone: Tensor
    """(n, width), those of them that do not count this time."""
    weight: float
    """Weight of the keys."""
    changes: int
    """`RunningInverse.changes` when this cost was made."""

    @classmethod
    def of(cls, cost: Cost, running: RunningInverse, *, gram: Tensor, gone: Tensor, weight: float) -> RunningCost:
        """Return the cost with the keys of a Gram matrix held, apart from those that are gone."""
        own = {part.name: getattr(cost, part.name) for part in fields(Cost)}
        return cls(**own, base=cost, running=running, gram=gram, gone=gone, weight=weight, changes=running.changes)

    def parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return (K M^-1, K N), as `Cost.parts`; M is factorised where the kept inverse does not get to float64."""
        assert self.changes == self.running.changes, "a running cost is that of one edit"
        self.check_keys(keys)
        wide = keys.to(self.gram)
        whole = self._refined(wide, self.running.inverse)
        free = whole if self.running.free is None else self._refined(wide, self.running.free, self.protected)
        if whole is None or free is None:
            self.running.is_stale = True
            return self.base.holding(self.gram - self.gone.T @ self.gone, self.weight).parts(keys)
        return whole.to(keys.device), free.to(keys.device)

    def _refined(self, keys: Tensor, inverse: Tensor, protected: Tensor | None = None) -> Tensor | None:
        """K M^-1, or K N with protected directions; None if that does not get to float64."""
        # The keys that do not count go from this solution alone; the inverse forgets them once the edit is made.
        along = self.gone @ inverse
        back = _solved(along @ self.gone.T, along, -self.weight) if len(self.gone) else along
        if back is None:
            return None
        directions = None if protected is None else protected.to(keys)

        def step(residual: Tensor) -> Tensor:
            found = residual @ inverse - (residual @ along.T) @ back
            return found if directions is None else without_directions(found, directions)

        def product(found: Tensor) -> Tensor:
            result = self._product(found)
            # A residual along protected directions is none, since what is found cannot reach there.
            return result if directions is None else without_directions(result, directions)

        wanted = keys if directions is None else without_directions(keys, directions)
        found = refined_solution(wanted, step, product, size=self._size)
        if found is None:
            return None
        if found[1] > _WORN:
            self.running.is_stale = True
        return found[0]

    def _product(self, found: Tensor) -> Tensor:
        """X M (n, width)."""
        result = self.ridge * found + self.weight * (found @ self.gram - (found @ self.gone.T) @ self.gone)
        if self.moment is not None:
            for start in range(0, self.width, _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                result[:, columns] += self.moment_weight * (found @ self.moment[:, columns].to(found))
        return result

    @property
    def _size(self) -> float:
        size = self.ridge + self.weight * torch.linalg.matrix_norm(self.gram).item()
        if self.moment is not None:
            size += self.moment_weight * torch.linalg.matrix_norm(self.moment).item()
        return size
