"""The rows of the editing benchmark: value searches, second moments, and solves."""

from __future__ import annotations

import math

import torch

from .edit_moments import MomentCase
from .edit_reuse import ReuseCase
from .edit_rows import EditRow
from .edit_solves import SolveCase
from .edit_values import ValueCase
from .shapes import Shape
from .subjects import Recipe, open_subject

Case = ValueCase | MomentCase | SolveCase | ReuseCase

WIDTH = 11008
"""What the down projection of a model of seven billion parameters reads."""
_HIDDEN = 4096
_MANY = 100
_BATCHES = 4
_REUSED = 4096  # solving at 11008 for every batch would take most of an hour
_MOMENT_BATCH = 8


def make_edit_cases(
    shape: Shape, *, facts: int, timed_facts: int, steps: int, prompts: int, width: int, seed: int
) -> tuple[Case, ...]:
    """Every row of the table, for a model of this shape and a weight that reads `width` numbers.

    The lower third ends with layer `layers // 3 - 1`, counted from 0; the middle is `layers // 2`.
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
    """How many numbers a weight writes that reads so many, in the proportion of 4096 to 11008."""
    return math.ceil(width * _HIDDEN / WIDTH)


def measure_edit_anew(recipe: Recipe, case: Case) -> EditRow:
    """The row, measured from opening the model on, where it needs one."""
    if case.needs_model:
        return case.measure(open_subject(recipe))
    return case.measure(torch.device(recipe.device or "cpu"))


def _counted(edits: int) -> str:
    return "1 edit" if edits == 1 else f"{edits} edits"
