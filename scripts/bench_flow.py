"""multrace bench flow: attention knockout by the sweep and by the two usual ways, on a LLaVA-shaped random model.

A cell cuts the attention edges of one flow, such as "image -> last", in a window of layers. Published lets the whole
model generate one token per cell, vision tower and prefill in each call, and makes the masks from lists of pairs.
Strong runs the vision tower once, then the decoder once per cell. Both compute all tokens for every cell, so a few
random cells are timed and multiplied. Ours runs three times, since a sweep takes only milliseconds; the median counts.
Cells that cost nothing are counted apart and raise no ratio. Each row is measured in a process of its own (on a CUDA
device in one for all), in which a sweep runs first, so that our way's peak memory is known; the others' is not taken.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .benchmarks.cases import chosen_cases
from .benchmarks.flow_cases import FlowCase, make_flow_cases
from .benchmarks.flow_tables import describe_flow, flow_table
from .benchmarks.flow_timing import FlowRow, measure_flow, measure_flow_anew
from .benchmarks.machine import machine_facts
from .benchmarks.peaks import in_new_process
from .benchmarks.settings import BenchOptions
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine
from .errors import CommandError
from .options import add_options, option, read

HELP = "time attention knockout against one model call per cell"
EXAMPLE = """examples:
  multrace bench flow --quick                             a small model, about a minute
  multrace bench flow --json out/flow.json                the whole table (some six minutes on one core)
  multrace bench flow --flows "-> last" dropped           only rows whose label holds one of these
  multrace bench flow --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_WIDE = 9
"""The window that the study's figures use."""


@dataclass(frozen=True, kw_only=True)
class BenchFlow(BenchOptions):
    """Options of `multrace bench flow`."""

    QUICK = {"shape": "small", "baseline_cells": 1, "flows": ("image -> last", "question and", "dropped")}
    FULL = {"shape": "base", "baseline_cells": 3, "flows": ()}

    windows: tuple[int, ...] | None = option(
        f"how many layers are cut together (default 1 and {_WIDE}, at most all)",
        default=None,
        nargs="+",
        type=int,
        metavar="LAYERS",
    )
    flows: tuple[str, ...] | None = option(
        "rows of the table: those whose label holds one of these words (default: all; with --quick four)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )

    def chosen_windows(self, layers: int) -> tuple[int, ...]:
        """The windows without repetitions. CommandError for one that no decoder of so many layers has."""
        windows = (1, min(_WIDE, layers)) if self.windows is None else self.windows
        wrong = [window for window in windows if not 1 <= window <= layers]
        if wrong:
            raise CommandError(f"--windows {wrong[0]}: the decoder has {layers} layers; pass some of 1 to {layers}")
        return tuple(dict.fromkeys(windows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `BenchFlow`."""
    add_options(parser, BenchFlow)


def run(options: argparse.Namespace) -> int:
    """Makes the model in a temporary folder, measures row after row, prints each and the table, writes the JSON."""
    settings = read(BenchFlow, options)
    settings.check()
    shape = settings.chosen_shape()
    windows = settings.chosen_windows(shape.layers)
    cases = chosen_cases(make_flow_cases(shape, windows), settings.value("flows"))
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with settings.model(shape, {}) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_flow(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*flow_table(rows), sep="\n")
    settings.write({**facts, "windows": windows, "seed": settings.seed, "rows": [asdict(row) for row in rows]})
    return 0


def _measured(settings: BenchFlow, recipe: Recipe, cases: Sequence[FlowCase]) -> Iterator[FlowRow]:
    """The rows, each as soon as it is known."""
    timed_cells = settings.value("baseline_cells")
    if settings.runs_on_cuda:
        subject = open_subject(recipe)
        yield from (measure_flow(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        yield from (in_new_process(measure_flow_anew, recipe, case, timed_cells) for case in cases)
