"""Run `multrace bench edit`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from .benchmarks.cases import chosen_cases
from .benchmarks.edit_cases import Case, make_edit_cases, measure_edit_anew
from .benchmarks.edit_rows import EditRow
from .benchmarks.edit_tables import describe_edit, edit_markdown, edit_table
from .benchmarks.machine import machine_facts
from .benchmarks.peaks import in_new_process
from .benchmarks.settings import check_settings, chosen_shape, random_model, write_json
from .benchmarks.shapes import Shape
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine
from .options.bench_edit import BenchEdit
from .outputs import new_files


def run(settings: BenchEdit) -> int:
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
        with new_files(settings.markdown.parent, [settings.markdown.name]) as work:
            (work / settings.markdown.name).write_text(text)
        print("written:", settings.markdown)
