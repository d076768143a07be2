"""Run `multrace bench flow`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .benchmarks.cases import chosen_cases
from .benchmarks.flow_cases import FlowCase, make_flow_cases
from .benchmarks.flow_tables import describe_flow, flow_table
from .benchmarks.flow_timing import FlowRow, measure_flow, measure_flow_anew
from .benchmarks.machine import machine_facts
from .benchmarks.peaks import in_new_process
from .benchmarks.settings import check_settings, chosen_shape, random_model, write_json
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine
from .options.bench_flow import BenchFlow


def run(settings: BenchFlow) -> int:
    """Create the model in a temporary folder, measure and print each row and the table, write the JSON."""
    check_settings(settings)
    shape = chosen_shape(settings)
    windows = settings.chosen_windows(shape.layers)
    cases = chosen_cases(make_flow_cases(shape, windows), settings.value("flows"))
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with random_model(settings, shape, {}) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_flow(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*flow_table(rows), sep="\n")
    write_json(settings, {**facts, "windows": windows, "seed": settings.seed, "rows": [asdict(row) for row in rows]})
    return 0


def _measured(settings: BenchFlow, recipe: Recipe, cases: Sequence[FlowCase]) -> Iterator[FlowRow]:
    """Yield each row as soon as it is measured."""
    timed_cells = settings.value("baseline_cells")
    if settings.runs_on_cuda:
        subject = open_subject(recipe)
        yield from (measure_flow(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        yield from (in_new_process(measure_flow_anew, recipe, case, timed_cells) for case in cases)
