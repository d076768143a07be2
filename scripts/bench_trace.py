"""multrace bench trace: causal tracing by the sweep and by the two usual ways, on a LLaVA-shaped random model.

Naive is one hooked call of the whole model per cell, with the vision tower and a clean row, as ROME's script does it.
Strong runs the vision tower once, then one hooked forward pass of the decoder per cell. What a cell costs these two
does not depend on the cell, so a few random cells are timed and multiplied. Cells that cost the sweep nothing are
counted apart and raise no ratio. Each row is measured in a process of its own (on a CUDA device in one for all), in
which the sweep runs first, so that its peak memory is known; the other ways' peaks are taken in a process each.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .benchmarks.cases import Case, chosen_cases, make_cases
from .benchmarks.machine import machine_facts
from .benchmarks.memory import Measurements
from .benchmarks.settings import BenchOptions
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine, describe_row, table
from .benchmarks.timing import Row, measure_row
from .options import add_options, option, read

HELP = "time causal tracing against one model call per cell"
EXAMPLE = """examples:
  multrace bench trace --quick                             a small model, under a minute
  multrace bench trace --json out/bench.json               the whole table (some twenty minutes on two cores)
  multrace bench trace --cells "text tokens" last          only rows whose label holds one of these
  multrace bench trace --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_FULL = {"shape": "base", "samples": 10, "image_samples": 5, "baseline_cells": 3, "cells": ()}


@dataclass(frozen=True, kw_only=True)
class BenchTrace(BenchOptions):
    """Options of `multrace bench trace`."""

    QUICK = {
        "shape": "small",
        "samples": 3,
        "image_samples": 2,
        "baseline_cells": 1,
        "cells": ("text tokens, hidden", "text tokens, mlp, window 10"),
    }
    FULL = _FULL

    samples: int | None = option(
        f"noise samples of the text corruption (default {_FULL['samples']})", default=None, type=int
    )
    image_samples: int | None = option(
        f"noise samples of the image corruption (default {_FULL['image_samples']})", default=None, type=int
    )
    cells: tuple[str, ...] | None = option(
        "rows of the table: those whose label holds one of these words (default: all; with --quick two)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )

    def check(self) -> None:
        """Also a CommandError for a corruption without samples."""
        for name in ("samples", "image_samples"):
            self.check_least(name, 1)
        super().check()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `BenchTrace`."""
    add_options(parser, BenchTrace)


def run(options: argparse.Namespace) -> int:
    """Makes the model in a temporary folder, measures row after row, prints each and the table, writes the JSON."""
    settings = read(BenchTrace, options)
    settings.check()
    shape = settings.chosen_shape()
    cases = chosen_cases(make_cases(shape), settings.value("cells"))
    samples = {"text": settings.value("samples"), "image": settings.value("image_samples")}
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with settings.model(shape, samples) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_row(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*table(rows), sep="\n")
    settings.write({**facts, "samples": samples, "seed": settings.seed, "rows": [asdict(row) for row in rows]})
    return 0


def _measured(settings: BenchTrace, recipe: Recipe, cases: Sequence[Case]) -> Iterator[Row]:
    """The rows, each as soon as it is known."""
    timed_cells = settings.value("baseline_cells")
    if settings.runs_on_cuda:
        subject = open_subject(recipe)
        yield from (measure_row(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        measurements = Measurements(recipe, timed_cells)
        yield from (measurements.row(case) for case in cases)
