"""Run `multrace bench trace`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .benchmarks.cases import Case, chosen_cases, make_cases
from .benchmarks.machine import machine_facts
from .benchmarks.memory import Measurements
from .benchmarks.settings import check_settings, chosen_shape, random_model, write_json
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine, describe_row, table
from .benchmarks.timing import TimingRow, measure_row
from .options.bench_trace import BenchTrace


def run(settings: BenchTrace) -> int:
    """Create the model in a temporary folder, measure and print each row and the table, write the JSON."""
    check_settings(settings)
    shape = chosen_shape(settings)
    cases = chosen_cases(make_cases(shape), settings.value("cells"))
    samples = {"text": settings.value("samples"), "image": settings.value("image_samples")}
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with random_model(settings, shape, samples) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_row(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*table(rows), sep="\n")
    write_json(settings, {**facts, "samples": samples, "seed": settings.seed, "rows": [asdict(row) for row in rows]})
    return 0


def _measured(settings: BenchTrace, recipe: Recipe, cases: Sequence[Case]) -> Iterator[TimingRow]:
    """Yield each row as soon as it is measured."""
    timed_cells = settings.value("baseline_cells")
    if settings.runs_on_cuda:
        subject = open_subject(recipe)
        yield from (measure_row(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        measurements = Measurements(recipe, timed_cells)
        yield from (measurements.row(case) for case in cases)
