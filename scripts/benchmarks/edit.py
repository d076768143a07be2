"""The editing benchmark: value searches, second moments and solves, each beside the usual way.

The published formula (arXiv 2406.04236) gives the new weight (lambda W + Z K^T)(lambda I + K K^T)^-1, where keys and
wanted outputs are columns. The seconds of multrace are those of the change as factors, and those of the usual way are
those of the new weight; the cost of writing the factors into a weight is listed separately. Batches of edits with a
second moment C share one factorisation of C, or need one width x width solve each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ...editing.changes import WeightChange
from ...editing.solve import Problem, Solution, build_cost, solve
from .edit_values import MomentCase, ValueCase
from .machine import EditRow, apart, extra_mb, in_new_process, now
from .models import Recipe, Shape, Subject, measured_rows, open_subject

TOLERANCE = {"float32": 1e-2, "float64": 1e-8}
"""Largest difference of the changes. An inverse in float32 rounds W itself, which is large beside the change."""
_WRITTEN_TOLERANCE = {"float32": 1e-2, "float64": 1e-6}  # a change is stored as float32 factors
_RIDGE_FRACTION = 0.05
_REPEATS = 5
_DEVIATION = 0.02  # of weights, as in real models

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveInputs:
    """The inputs of a solve: a weight, keys, and the wanted outputs at the keys."""

    weight: Tensor
    """W (hidden, width) of y = W k."""
    keys: Tensor
    """K (n, width)"""
    wanted: Tensor
    """Z (n, hidden)"""
    ridge: float
    """lambda"""


@dataclass(frozen=True, kw_only=True)
class SolveCase:
    """A row of the table: a number of edits of one weight at once."""

    needs_model: ClassVar[bool] = False

    label: str
    edits: int
    width: int
    hidden: int
    dtype: str
    """The dtype of the weight and of the explicit inverse; multrace always solves in float64."""
    seed: int

    def measure(self, device: torch.device) -> EditRow:
        """Return the row: medians of five for the solve of multrace and for writing; one explicit inverse."""
        thin(make_problem(2, 32, 16, torch.float64, device, self.seed))  # the set-up of a first solve does not count
        problem = make_problem(self.edits, self.width, self.hidden, getattr(torch, self.dtype), device, self.seed)
        memory = {"extra_mb_solve": extra_mb(lambda: thin(problem), device)}
        seconds, solution = _timed(lambda: thin(problem), device)
        change = as_change(problem, solution)
        ours = problem.weight.clone()
        memory["extra_mb_write"] = extra_mb(lambda: write(change, ours), device)
        writing, _ = _timed(lambda: write(change, ours.copy_(problem.weight)), device)
        memory["extra_mb_write_with_undo"] = extra_mb(lambda: write_with_undo(change, ours), device)
        write(change, ours.copy_(problem.weight))
        started = now(device)
        found: list[Tensor] = []
        memory["extra_mb_usual"] = extra_mb(lambda: found.append(explicit(problem)), device)
        usual = now(device) - started
        (theirs,) = found
        step = theirs.double() - problem.weight.double()
        written = apart(ours, theirs, scale=step, tolerance=_WRITTEN_TOLERANCE[self.dtype], label=self.label)
        tolerance = TOLERANCE[self.dtype]
        return EditRow(
            label=self.label,
            seconds=seconds,
            seconds_usual=usual,
            unit="GFLOP",
            work=thin_flops(self.edits, self.width, self.hidden) / 1e9,
            work_usual=explicit_flops(self.edits, self.width, self.hidden) / 1e9,
            difference=apart(solution.left @ solution.right, step, tolerance=tolerance, label=self.label),
            tolerance=tolerance,
            details={
                "edits": self.edits,
                "width": self.width,
                "hidden": self.hidden,
                "dtype": self.dtype,
                "seconds_write": writing,
                "difference_written": written,
                "ratio_with_write": usual / (seconds + writing),
                "matrix_mb": self.width * self.hidden * 8 / 2**20,
                **memory,
            },
        )


def make_problem(
    edits: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int
) -> SolveInputs:
    """Return a weight of realistic size, normal keys, and wanted outputs as far away as the present ones are long."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(hidden, width, dtype=dtype).normal_(0, _DEVIATION, generator=generator).to(device)
    keys = torch.randn(edits, width, generator=generator).to(device, dtype)
    present = keys @ weight.T
    wanted = present + present.std() * torch.randn(edits, hidden, generator=generator).to(present)
    ridge = _RIDGE_FRACTION * keys.double().square().sum(-1).mean().item()
    return SolveInputs(weight=weight, keys=keys, wanted=wanted, ridge=ridge)


def thin(inputs: SolveInputs) -> Solution:
    """Return the change as factors, as multrace solves for it, from the present outputs to the wanted ones."""
    count = len(inputs.keys)
    problem = Problem(
        keys=inputs.keys,
        residuals=inputs.wanted - inputs.keys @ inputs.weight.T,
        weights=torch.ones(count, dtype=torch.float64, device=inputs.keys.device),
        names=tuple(f"edit {index}" for index in range(count)),
    )
    return solve(build_cost(inputs.keys.shape[1], ridge=inputs.ridge), problem)


def explicit(inputs: SolveInputs) -> Tensor:
    """Return the new weight (hidden, width) by the published formula, in the dtype of the weight."""
    keys = inputs.keys
    inverse = torch.linalg.inv(
        inputs.ridge * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ keys
    )
    return (inputs.ridge * inputs.weight + inputs.wanted.T @ keys) @ inverse


def as_change(inputs: SolveInputs, solution: Solution) -> WeightChange:
    """Return the solution in the form in which a delta holds it."""
    parts = {"left": solution.left, "right": solution.right, "keys": inputs.keys}
    parts["residuals"] = inputs.wanted - inputs.keys @ inputs.weight.T
    return WeightChange(**{name: part.float().cpu().contiguous() for name, part in parts.items()})


@torch.no_grad()
def write(change: WeightChange, weight: Tensor) -> None:
    """Add the change to the weight in place, by runs of rows, as applying a delta does."""
    for run, rows in change.rows(weight, transposed=False):
        weight[run] = rows


def write_with_undo(change: WeightChange, weight: Tensor) -> None:
    """Add the change to the weight, with a copy of it, and put the copy back, as undoing a delta does."""
    saved = weight.clone()
    write(change, weight)
    weight.copy_(saved)


def thin_flops(edits: int, width: int, hidden: int) -> float:
    """Return the operations of `thin`: outputs at the keys, the Gram matrix, its factorisation, a solve per output."""
    return 2.0 * edits * width * hidden + 2.0 * edits**2 * width + edits**3 / 3 + 2.0 * edits**2 * hidden


def explicit_flops(edits: int, width: int, hidden: int) -> float:
    """Return the operations of `explicit`: two sums of outer products, the inverse (2 width^3), the product with it."""
    return 2.0 * edits * width * (width + hidden) + 2.0 * width**3 + 2.0 * hidden * width**2


def _timed(work: Callable[[], _Result], device: torch.device) -> tuple[float, _Result]:
    """Return the median of five runs in seconds, and the last result."""
    seconds = []
    for _ in range(_REPEATS):
        started = now(device)
        found = work()
        seconds.append(now(device) - started)
    return median(seconds), found


REUSE_TOLERANCE = 1e-8
"""Largest difference of the changes, which are both in float64."""
_WEIGHT = 100.0  # number of old keys that C stands for
_KEYS_PER_WIDTH = 2  # number of tokens that C is the mean over; it then has full rank


@dataclass(frozen=True, kw_only=True)
class ReuseCase:
    """A row of the table: a number of batches of edits of one weight."""

    needs_model: ClassVar[bool] = False

    label: str
    batches: int
    edits: int
    width: int
    hidden: int
    seed: int

    def measure(self, device: torch.device) -> EditRow:
        """Return the row; both ways take the batches one by one, like edits in a sequence."""
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
            apart(mine.left @ mine.right, theirs, tolerance=REUSE_TOLERANCE, label=f"{self.label}, batch {index}")
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
            tolerance=REUSE_TOLERANCE,
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
    """Return R K^T (mu C + K K^T)^-1 (hidden, width) by one solve, as in code of MEMIT (arXiv 2210.07229, Eq. 14)."""
    keys, residuals = problem.keys.double(), problem.residuals.double()
    return residuals.T @ torch.linalg.solve(_WEIGHT * moment + keys.T @ keys, keys.T).T


def _moment(width: int, device: torch.device, seed: int) -> Tensor:
    """Return the mean of k k^T over random keys, in float64."""
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


Case = ValueCase | MomentCase | SolveCase | ReuseCase

WIDTH = 11008
"""Input width of the down projections of a model with seven billion parameters."""
_HIDDEN = 4096
_MANY = 100
_BATCHES = 4
_REUSED = 4096  # solving at 11008 for every batch would take most of an hour
_MOMENT_BATCH = 8


def make_edit_cases(
    shape: Shape, *, facts: int, timed_facts: int, steps: int, prompts: int, width: int, seed: int
) -> tuple[Case, ...]:
    """Return every row of the table, for a model of this shape.

    The lower third ends with layer `layers // 3 - 1`, counted from 0; the middle is layer `layers // 2`.

    Args:
        shape: The sizes of the model.
        facts: The number of facts that multrace searches together.
        timed_facts: The number of facts that the usual way searches, at most `facts`.
        steps: The number of steps of each search.
        prompts: The number of prompts of the second moments.
        width: The input width of the weight in the solves.
        seed: The random seed of the solves.
    """
    places = {"lower third": max(0, shape.layers // 3 - 1), "middle": shape.layers // 2}
    search = {"facts": facts, "timed_facts": min(timed_facts, facts), "steps": steps}
    reused = min(width, _REUSED)
    return (
        *(
            ValueCase(label=f"value search, {name}, {token}", layer=layer, token=token, **search)
            for name, layer in places.items()
            for token in ("constraint_last", "last")
        ),
        MomentCase(label="second moments of all layers", prompts=prompts, batch_size=_MOMENT_BATCH),
        *(
            SolveCase(
                label=f"solve, {_counted(edits)}, {dtype}",
                edits=edits,
                width=width,
                hidden=hidden_of(width),
                dtype=dtype,
                seed=seed,
            )
            for edits, dtype in ((1, "float32"), (_MANY, "float32"), (1, "float64"))
        ),
        ReuseCase(
            label=f"solve at the price of C, {_BATCHES} batches of {_MANY}",
            batches=_BATCHES,
            edits=_MANY,
            width=reused,
            hidden=hidden_of(reused),
            seed=seed,
        ),
    )


def hidden_of(width: int) -> int:
    """Return the output width of a weight with this input width, in the proportion of 4096 to 11008."""
    return math.ceil(width * _HIDDEN / WIDTH)


def edit_rows(recipe: Recipe, cases: Sequence[Case]) -> Iterator[EditRow]:
    """Yield the row of each case as soon as it is measured."""
    return measured_rows(
        recipe, cases, _measure_edit, lambda recipe, case: in_new_process(measure_edit_anew, recipe, case)
    )


def _measure_edit(subject: Subject, case: Case) -> EditRow:
    return case.measure(subject if case.needs_model else subject.vlm.device)


def measure_edit_anew(recipe: Recipe, case: Case) -> EditRow:
    """Return the row, after opening the model in this process if the row needs one."""
    if case.needs_model:
        return case.measure(open_subject(recipe))
    return case.measure(torch.device(recipe.device or "cpu"))


def _counted(edits: int) -> str:
    return "1 edit" if edits == 1 else f"{edits} edits"
