"""Batches of edits at the price of a second moment C: one factorisation for all, and a width x width solve for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...editing.solve import Problem, build_cost, solve
from .edit_rows import EditRow, apart
from .edit_solves import make_problem
from .rates import now

TOLERANCE = 1e-8
"""Of the changes; both are in float64."""
_WEIGHT = 100.0  # old keys that C stands for
_KEYS_PER_WIDTH = 2  # tokens that C is the mean of, so that it has full rank


@dataclass(frozen=True, kw_only=True)
class ReuseCase:
    """One row: so many batches of so many edits of one weight."""

    needs_model: ClassVar[bool] = False

    label: str
    batches: int
    edits: int
    width: int
    hidden: int
    seed: int

    def measure(self, device: torch.device) -> EditRow:
        """The row; both ways go through the batches one by one, as edits in a sequence do."""
        moment = _moment(self.width, device, self.seed)
        batches = [_batch(self, device, index) for index in range(self.batches)]
        started = now(device)
        cost = build_cost(self.width, ridge=0.0, moment=moment, moment_weight=_WEIGHT)
        factorised = now(device)
        solutions = [solve(cost, batch) for batch in batches]
        ended = now(device)
        usual = [published(moment, batch) for batch in batches]
        seconds_usual = now(device) - ended
        differences = [
            apart(mine.left @ mine.right, theirs, tolerance=TOLERANCE, label=f"{self.label}, batch {index}")
            for index, (mine, theirs) in enumerate(zip(solutions, usual, strict=True))
        ]
        edits, width, hidden = self.edits, self.width, self.hidden
        each = 2.0 * edits * width**2 + 2.0 * edits**2 * width + edits**3 / 3 + 2.0 * edits**2 * hidden
        each_usual = 2 / 3 * width**3 + 4.0 * edits * width**2 + 2.0 * edits * width * hidden
        return EditRow(
            label=self.label,
            seconds=ended - started,
            seconds_usual=seconds_usual,
            unit="GFLOP",
            work=(width**3 / 3 + self.batches * each) / 1e9,
            work_usual=self.batches * each_usual / 1e9,
            difference=max(differences),
            tolerance=TOLERANCE,
            details={
                "batches": self.batches,
                "edits": edits,
                "width": width,
                "hidden": hidden,
                "seconds_factorise": factorised - started,
                "seconds_per_batch": (ended - factorised) / self.batches,
                "seconds_per_batch_usual": seconds_usual / self.batches,
            },
        )


def published(moment: Tensor, problem: Problem) -> Tensor:
    """R K^T (mu C + K K^T)^-1 (hidden, width), as MEMIT's code has it (arXiv 2210.07229, eq. 14): one solve a batch."""
    keys, residuals = problem.keys.double(), problem.residuals.double()
    return residuals.T @ torch.linalg.solve(_WEIGHT * moment + keys.T @ keys, keys.T).T


def _moment(width: int, device: torch.device, seed: int) -> Tensor:
    """The mean of k k^T over random keys, float64."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(_KEYS_PER_WIDTH * width, width, generator=generator).to(device)
    return (keys.T @ keys).double() / len(keys)


def _batch(case: ReuseCase, device: torch.device, index: int) -> Problem:
    problem = make_problem(case.edits, case.width, case.hidden, torch.float64, device, case.seed + 1 + index)
    return Problem(
        keys=problem.keys,
        residuals=problem.wanted - problem.keys @ problem.weight.T,
        weights=torch.ones(case.edits, dtype=torch.float64, device=device),
        names=tuple(f"edit {number}" for number in range(case.edits)),
    )
