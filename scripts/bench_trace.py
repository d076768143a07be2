"""multrace bench trace: causal tracing by the sweep and by the two usual ways, on a LLaVA-shaped random model.

Naive is one hooked call of the whole model per cell, with the vision tower and a clean row, as ROME's script does it.
Strong runs the vision tower once, then one hooked forward pass of the decoder per cell. What a cell costs these two
does not depend on the cell, so a few random cells are timed and multiplied. Cells that cost the sweep nothing are
counted apart and raise no ratio. Each row is measured in a process of its own (on a CUDA device in one for all), in
which the sweep runs first, so that its peak memory is known; the other ways' peaks are taken in a process each.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..models.devices import check_device_map
from .benchmarks.cases import Case, chosen_cases, make_cases
from .benchmarks.machine import machine_facts
from .benchmarks.memory import Measurements
from .benchmarks.shapes import SHAPES, Shape, write_model
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine, describe_row, table
from .benchmarks.timing import Row, measure_row
from .errors import CommandError
from .options import add_options, option, read
from .outputs import check_files, new_files

HELP = "time causal tracing against one model call per cell"
EXAMPLE = """examples:
  multrace bench trace --quick                             a small model, under a minute
  multrace bench trace --json out/bench.json               the whole table (some twenty minutes on two cores)
  multrace bench trace --cells "text tokens" last          only rows whose label holds one of these
  multrace bench trace --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_QUICK = {
    "shape": "small",
    "samples": 3,
    "image_samples": 2,
    "baseline_cells": 1,
    "cells": ("text tokens, hidden", "text tokens, mlp, window 10"),
}
_FULL = {"shape": "base", "samples": 10, "image_samples": 5, "baseline_cells": 3, "cells": ()}


@dataclass(frozen=True, kw_only=True)
class BenchTrace:
    """Options of `multrace bench trace`."""

    quick: bool = option(
        "a small model, few samples, one timed cell (other options still hold)", default=False, action="store_true"
    )
    shape: str | None = option(
        f"sizes of the model: {', '.join(SHAPES)} (default {_FULL['shape']})", default=None, choices=tuple(SHAPES)
    )
    layers: int | None = option("decoder layers instead of the shape's", default=None, type=int)
    width: int | None = option("hidden width instead of the shape's; MLP and heads follow", default=None, type=int)
    samples: int | None = option(
        f"noise samples of the text corruption (default {_FULL['samples']})", default=None, type=int
    )
    image_samples: int | None = option(
        f"noise samples of the image corruption (default {_FULL['image_samples']})", default=None, type=int
    )
    seed: int = option("of weights, prompt, noise and the choice of timed cells (default 0)", default=0, type=int)
    cells: tuple[str, ...] | None = option(
        "rows of the table: those whose label holds one of these words (default: all; with --quick two)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )
    baseline_cells: int | None = option(
        f"cells that the other two ways answer (default {_FULL['baseline_cells']})", default=None, type=int, metavar="N"
    )
    dtype: str | None = option(
        "float32, bfloat16 or float16 (default: the shape's)", default=None, choices=("float32", "bfloat16", "float16")
    )
    device: str | None = option("cpu or cuda:0, ... (default: the CPU)", default=None)
    json: Path | None = option("also write the table to this file", default=None, type=Path, metavar="FILE")

    def value(self, name: str) -> Any:
        """An option that --quick has another default for."""
        given = getattr(self, name)
        return (_QUICK if self.quick else _FULL)[name] if given is None else given

    def check(self) -> None:
        """CommandError or ModelError for numbers that no model can have and devices that are not there."""
        for name in ("layers", "samples", "image_samples", "baseline_cells"):
            given, least = getattr(self, name), 2 if name == "layers" else 1
            if given is not None and given < least:
                raise CommandError(f"--{name.replace('_', '-')} {given}: pass at least {least}")
        if self.width is not None and (self.width < 16 or self.width % 16):
            raise CommandError(f"--width {self.width}: pass a multiple of 16, such as 512")
        check_device_map(self.device, "the random model")
        if self.json is not None:
            check_files(self.json.parent, [self.json.name])

    def chosen_shape(self) -> Shape:
        """The preset with the sizes that were asked for; MLP and heads keep their relation to the width."""
        shape = SHAPES[self.value("shape")]
        if self.width is not None:
            size, mlp = shape.width // shape.heads, 16 * math.ceil(shape.mlp / shape.width * self.width / 16)
            heads = 1 if self.width % size else self.width // size
            shape = replace(shape, width=self.width, mlp=mlp, heads=heads)
        changes = {"layers": self.layers, "dtype": self.dtype}
        return replace(shape, **{name: value for name, value in changes.items() if value is not None})


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
    with tempfile.TemporaryDirectory(prefix="multrace-bench-") as folder:
        recipe = Recipe(folder=Path(folder), shape=shape, device=settings.device, seed=settings.seed, samples=samples)
        write_model(shape, recipe.folder, seed=settings.seed, device=torch.device(settings.device or "cpu"))
        rows = []
        for row in _measured(recipe, cases, settings.value("baseline_cells")):
            print(*describe_row(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*table(rows), sep="\n")
    if settings.json is not None:
        content = {**facts, "samples": samples, "seed": settings.seed, "rows": [asdict(row) for row in rows]}
        with new_files(settings.json.parent, [settings.json.name]) as work:
            (work / settings.json.name).write_text(json.dumps(content, indent=2) + "\n")
        print("written:", settings.json)
    return 0


def _measured(recipe: Recipe, cases: Sequence[Case], timed_cells: int) -> Iterator[Row]:
    """The rows, each as soon as it is known."""
    if torch.device(recipe.device or "cpu").type == "cuda":
        subject = open_subject(recipe)
        yield from (measure_row(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        measurements = Measurements(recipe, timed_cells)
        yield from (measurements.row(case) for case in cases)
