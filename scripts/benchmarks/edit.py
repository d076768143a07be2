"""The editing benchmark: value searches, second moments and solves, each beside the usual way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from ...artefacts import write_whole
from .edit_rows import EditRow, describe_edit, edit_markdown, edit_table
from .edit_solves import ReuseCase, SolveCase
from .edit_values import MomentCase, ValueCase
from .machine import describe_machine, in_new_process, machine_facts
from .models import Recipe, Shape, check_settings, chosen_shape, open_subject, random_model, write_json
from .options import BenchEdit
from .trace_cells import chosen_cases

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


def bench_edit(settings: BenchEdit) -> int:
    """Create the model in a temporary folder, measure and print each row and the table, write the files."""
    check_settings(settings)
    shape = chosen_shape(settings)
    cases = _cases(settings, shape)
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with random_model(settings, shape, {}) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_edit(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*edit_table(rows), sep="\n")
    write_json(settings, {**facts, "seed": settings.seed, "rows": [row.record() for row in rows]})
    _write_markdown(settings, edit_markdown(rows, facts))
    return 0


def _measured(settings: BenchEdit, recipe: Recipe, cases: Sequence[Case]) -> Iterator[EditRow]:
    """Yield each row as soon as it is measured."""
    if not settings.runs_on_cuda:
        yield from (in_new_process(measure_edit_anew, recipe, case) for case in cases)
        return
    subject = open_subject(recipe) if any(case.needs_model for case in cases) else None
    device = torch.device(settings.device)
    yield from (case.measure(subject if case.needs_model else device) for case in cases)


def _cases(settings: BenchEdit, shape: Shape) -> tuple[Case, ...]:
    """The chosen rows. The `CommandError` for an unknown row lists the labels."""
    made = make_edit_cases(
        shape,
        facts=settings.value("facts"),
        timed_facts=settings.value("baseline_cells"),
        steps=settings.value("steps"),
        prompts=settings.value("prompts"),
        width=settings.value("solve_width"),
        seed=settings.seed,
    )
    return chosen_cases(made, settings.value("rows"))


def _write_markdown(settings: BenchEdit, text: str) -> None:
    """Write the Markdown if --markdown is given."""
    if settings.markdown is not None:
        write_whole(settings.markdown, text.encode())
        print("written:", settings.markdown)
