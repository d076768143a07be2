"""Measure the speed and the memory of multrace beside those of the usual ways, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from cyclopts import App, Parameter

from .. import artefacts
from . import benchmarks
from .options import SHAPES, SOLVE_WIDTH, STYLE, CommandError, GeneralOptions, check_files, paragraphs

EXAMPLE = """examples:
  multrace bench trace --quick
  multrace bench flow --quick
  multrace bench edit --quick
  multrace bench trace --help
"""
app = App(name="bench", help=__doc__, help_epilogue=EXAMPLE, group_parameters=STYLE["group_parameters"])


@dataclass(frozen=True, kw_only=True)
class BenchOptions(GeneralOptions):
    """Options of every `multrace bench` command, each of which has a subclass."""

    QUICK: ClassVar[Mapping[str, Any]]
    """Values with --quick of the options that were not given."""
    FULL: ClassVar[Mapping[str, Any]]
    """Values without --quick of the options that were not given."""

    quick: Annotated[bool, Parameter(help="use a small model and smaller sizes; other options override this")] = False
    shape: Annotated[
        str | None, Parameter(help="sizes of the random model (default: base; small with --quick)", choices=SHAPES)
    ] = None
    layers: Annotated[
        int | None, Parameter(help="number of decoder layers (default: that of --shape)", metavar="N")
    ] = None
    width: Annotated[
        int | None,
        Parameter(
            help="hidden width, from which the widths of MLP and heads follow (default: that of --shape)", metavar="N"
        ),
    ] = None
    seed: Annotated[
        int,
        Parameter(help="random seed of the weights, the prompt, the noise and the choice of timed cells", metavar="N"),
    ] = 0
    baseline_cells: Annotated[
        int | None,
        Parameter(
            help="number of cells that each of the usual ways computes (default: 3; 1 with --quick)", metavar="N"
        ),
    ] = None
    dtype: Annotated[
        str | None,
        Parameter(
            help="precision of the weights (default: that of --shape)", choices=("float32", "bfloat16", "float16")
        ),
    ] = None
    device: Annotated[
        str | None, Parameter(help="device to run on: cpu, cuda:0, ... (default: the CPU)", metavar="NAME")
    ] = None
    json: Annotated[Path | None, Parameter(help="also write the table as JSON to this file", metavar="FILE")] = None

    def value(self, name: str) -> Any:
        """Return the value of an option whose default depends on --quick."""
        value = getattr(self, name)
        return (self.QUICK if self.quick else self.FULL)[name] if value is None else value

    def model_shape(self) -> benchmarks.Shape:
        """Return the sizes of the model: those of the shape, except those that were given."""
        shape = benchmarks.SHAPES[self.value("shape")]
        return benchmarks.resized(shape, layers=self.layers, width=self.width, dtype=self.dtype)

    def check(self) -> None:
        """Raises `CommandError` for numbers that no model can have and files that cannot be written."""
        self.check_least("layers", 2)
        self.check_least("baseline_cells", 1)
        if self.width is not None and (self.width < 16 or self.width % 16):
            raise CommandError(f"--width {self.width}: pass a multiple of 16, such as 512")
        if self.json is not None:
            check_files(self.json.parent, [self.json.name])

    def check_least(self, name: str, least: int) -> None:
        """Raises `CommandError` if the option has a number below this one."""
        value = getattr(self, name)
        if value is not None and value < least:
            raise CommandError(f"--{name.replace('_', '-')} {value}: pass at least {least}")


_FULL_TRACE = {"shape": "base", "samples": 10, "image_samples": 5, "baseline_cells": 3, "cells": ()}


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
    FULL = _FULL_TRACE

    samples: Annotated[
        int | None,
        Parameter(
            help=f"number of noise samples of the text corruption (default: {_FULL_TRACE['samples']}; 3 with --quick)",
            metavar="N",
        ),
    ] = None
    image_samples: Annotated[
        int | None,
        Parameter(
            help="number of noise samples of the image corruption "
            f"(default: {_FULL_TRACE['image_samples']}; 2 with --quick)",
            metavar="N",
        ),
    ] = None
    cells: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; two with --quick)",
            metavar="WORDS",
        ),
    ] = None

    def check(self) -> None:
        """Raises `CommandError` also for numbers of samples below 1."""
        for name in ("samples", "image_samples"):
            self.check_least(name, 1)
        super().check()


_WIDE = 9
"""The window of layers in the figures of the study (arXiv 2411.18620)."""


@dataclass(frozen=True, kw_only=True)
class BenchFlow(BenchOptions):
    """Options of `multrace bench flow`."""

    QUICK = {"shape": "small", "baseline_cells": 1, "flows": ("image -> last", "question and", "dropped")}
    FULL = {"shape": "base", "baseline_cells": 3, "flows": ()}

    windows: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help=f"numbers of neighbouring layers that are cut together (default: 1 and {_WIDE}, at most all layers)",
            metavar="LAYERS",
        ),
    ] = None
    flows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; four with --quick)",
            metavar="WORDS",
        ),
    ] = None

    def chosen_windows(self, layers: int) -> tuple[int, ...]:
        """Return the windows, each once. Raises `CommandError` for a window below 1 or above the number of layers."""
        windows = (1, min(_WIDE, layers)) if self.windows is None else self.windows
        outside = [window for window in windows if not 1 <= window <= layers]
        if outside:
            raise CommandError(f"--windows {outside[0]}: the decoder has {layers} layers; pass some of 1 to {layers}")
        return tuple(dict.fromkeys(windows))


_FULL_EDIT = {
    "shape": "base",
    "baseline_cells": 2,
    "facts": 8,
    "steps": 20,
    "prompts": 16,
    "solve_width": SOLVE_WIDTH,
    "rows": (),
}


@dataclass(frozen=True, kw_only=True)
class BenchEdit(BenchOptions):
    """Options of `multrace bench edit`."""

    QUICK = {
        "shape": "small",
        "baseline_cells": 1,
        "facts": 4,
        "steps": 10,
        "prompts": 4,
        "solve_width": 1376,
        "rows": ("lower third", "second moments", "1 edit, float32", "price of C"),
    }
    FULL = _FULL_EDIT

    baseline_cells: Annotated[
        int | None,
        Parameter(
            help="number of facts whose values the usual way searches for (default: 2; 1 with --quick)", metavar="N"
        ),
    ] = None
    facts: Annotated[
        int | None,
        Parameter(
            help=f"number of facts whose values multrace searches for (default: {_FULL_EDIT['facts']}; 4 with --quick)",
            metavar="N",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Parameter(
            help=f"number of steps of each value search (default: {_FULL_EDIT['steps']}; 10 with --quick)", metavar="N"
        ),
    ] = None
    prompts: Annotated[
        int | None,
        Parameter(
            help="number of prompts that second moments are collected over "
            f"(default: {_FULL_EDIT['prompts']}; 4 with --quick)",
            metavar="N",
        ),
    ] = None
    solve_width: Annotated[
        int | None,
        Parameter(
            help=f"input width of the weight in the solve (default: {SOLVE_WIDTH}, which takes minutes; 1376 with "
            "--quick)",
            metavar="N",
        ),
    ] = None
    rows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; five with --quick)",
            metavar="WORDS",
        ),
    ] = None
    markdown: Annotated[
        Path | None, Parameter(help="also write the table as Markdown to this file", metavar="FILE")
    ] = None

    def check(self) -> None:
        """Raises `CommandError` also for sizes that are too small."""
        least = {"facts": 1, "steps": 1, "prompts": 1, "solve_width": 16}
        for name, number in least.items():
            self.check_least(name, number)
        super().check()
        if self.markdown is not None:
            check_files(self.markdown.parent, [self.markdown.name])


@dataclass(frozen=True)
class _Table:
    """How to show the rows of a benchmark."""

    describe: Callable[[Any], Sequence[str]]
    """Lines that describe one row in words."""
    lines: Callable[[Sequence[Any]], Sequence[str]]
    """Lines of the table of all rows."""
    record: Callable[[Any], Mapping[str, Any]] = asdict
    """One row for the JSON file."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the JSON file besides the machine, the shape, the seed and the rows."""


def _bench(
    options: BenchOptions,
    shape: benchmarks.Shape,
    measure: Callable[[benchmarks.Recipe], Iterable[Any]],
    table: _Table,
    *,
    samples: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """Measure rows on a random model, print them and the table, and write the JSON; return the facts and the rows."""
    rows = []
    with benchmarks.random_model(shape, device=options.device, seed=options.seed, samples=samples) as recipe:
        facts = benchmarks.machine_facts(options.device or "cpu") | {"shape": asdict(shape)}
        print(*benchmarks.describe_machine(facts), "", sep="\n", flush=True)
        for row in measure(recipe):
            print(*table.describe(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*table.lines(rows), sep="\n")
    if options.json is not None:
        content = {**facts, **table.facts, "seed": options.seed, "rows": [table.record(row) for row in rows]}
        artefacts.write_whole(options.json, f"{json.dumps(content, indent=2)}\n".encode())
        print("written:", options.json)
    return facts, rows


TRACE = """Time causal tracing with multrace and in two usual ways, on a random model shaped like LLaVA or Qwen-VL.

The naive way makes one hooked call of the whole model for each cell, with the vision tower and a clean row, like the
script of ROME. The strong way runs the vision tower once, and then one hooked forward pass of the decoder for each
cell. In both ways all cells cost the same, so a few random cells are timed and their time is multiplied. Cells that
cost multrace nothing are counted separately and do not raise the ratios. Each row is measured in a process of its own
(on a CUDA device all rows share one), in which multrace runs first, so that its peak memory is known; the peaks of the
other ways are measured in one process each.
"""
TRACE_EXAMPLE = """examples:
  multrace bench trace --quick                             a small model, in less than a minute
  multrace bench trace --json out/bench.json               the whole table (about twenty minutes on two cores)
  multrace bench trace --cells "text tokens" last          only rows whose label contains one of these
  multrace bench trace --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
  multrace bench trace --quick --shape qwen2.5-vl-tiny     a tiny Qwen2.5-VL, in seconds
"""


@app.command(name="trace", help=paragraphs(TRACE), help_epilogue=TRACE_EXAMPLE)
def run_trace(options: BenchTrace = BenchTrace()) -> int:
    """Measure and print every row, print the table, and write the files."""
    options.check()
    shape, samples = options.model_shape(), {"text": options.value("samples"), "image": options.value("image_samples")}
    cases = benchmarks.chosen_cases(benchmarks.make_cases(shape), options.value("cells"))
    table = _Table(benchmarks.describe_row, benchmarks.table, facts={"samples": samples})
    work = partial(benchmarks.trace_rows, cases=cases, timed_cells=options.value("baseline_cells"))
    _bench(options, shape, work, table, samples=samples)
    return 0


FLOW = """Time attention knockout with multrace and in two usual ways, on a random model shaped like LLaVA or Qwen-VL.

A cell cuts the attention edges of one flow, such as "image -> last", in a window of layers. The published way lets the
whole model generate one token for each cell, with vision tower and prefill in each call, and builds the masks from
lists of pairs. The strong way runs the vision tower once, and then the decoder once for each cell. Both compute all
tokens for every cell, so a few random cells are timed and their time is multiplied. multrace takes only milliseconds,
so it runs three times and the median counts. Cells that cost multrace nothing are counted separately and do not raise
the ratios. Each row is measured in a process of its own (on a CUDA device all rows share one), in which multrace runs
first, so that its peak memory is known; the peaks of the other ways are not measured.
"""
FLOW_EXAMPLE = """examples:
  multrace bench flow --quick                             a small model, in about a minute
  multrace bench flow --json out/flow.json                the whole table (about six minutes on one core)
  multrace bench flow --flows "image -> last" dropped     only rows whose label contains one of these
  multrace bench flow --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
  multrace bench flow --quick --shape qwen2.5-vl-tiny      a tiny Qwen2.5-VL, in seconds
"""


@app.command(name="flow", help=paragraphs(FLOW), help_epilogue=FLOW_EXAMPLE)
def run_flow(options: BenchFlow = BenchFlow()) -> int:
    """Measure and print every row, print the table, and write the files."""
    options.check()
    shape = options.model_shape()
    windows = options.chosen_windows(shape.layers)
    cases = benchmarks.chosen_cases(benchmarks.make_flow_cases(shape, windows), options.value("flows"))
    table = _Table(benchmarks.describe_flow, benchmarks.flow_table, facts={"windows": windows})
    work = partial(benchmarks.flow_rows, cases=cases, timed_cells=options.value("baseline_cells"))
    _bench(options, shape, work, table)
    return 0


EDIT = """Measure each step of closed-form editing beside the usual way to compute the same result.

Value search: many facts at once, with only the upper layers and the last tokens rerun, against the whole model forward
and backward for each fact and step. Second moments: one pass for all layers against one early-stopped pass for each
layer. Solve: thin factors against the explicit inverse of a width x width matrix, and batches that share the
factorisation of C against one solve of that size for each. The results are compared, and a row whose two results differ
is an error. The usual value search costs the same for every fact, so a few facts are timed and their time is
multiplied. Each row is measured in a process of its own (on a CUDA device all rows share one).
"""
EDIT_EXAMPLE = """examples:
  multrace bench edit --quick                              a small model and a small solve, in about a minute
  multrace bench edit --json out/edit.json --markdown out/edit.md    the whole table
  multrace bench edit --rows solve --solve-width 2752      only rows whose label contains one of these words
  multrace bench edit --shape llava-7b --device cuda:0     LLaVA-1.5-7B's sizes, random bfloat16 weights
  multrace bench edit --quick --shape qwen2.5-vl-tiny       a tiny Qwen2.5-VL, in seconds
"""


@app.command(name="edit", help=paragraphs(EDIT), help_epilogue=EDIT_EXAMPLE)
def run_edit(options: BenchEdit = BenchEdit()) -> int:
    """Measure and print every row, print the table, and write the files."""
    options.check()
    shape = options.model_shape()
    sizes = {name: options.value(name) for name in ("facts", "steps", "prompts")}
    sizes |= {"timed_facts": options.value("baseline_cells"), "width": options.value("solve_width")}
    cases = benchmarks.make_edit_cases(shape, **sizes, seed=options.seed)
    cases = benchmarks.chosen_cases(cases, options.value("rows"))
    table = _Table(benchmarks.describe_edit, benchmarks.edit_table, record=benchmarks.EditRow.record)
    facts, rows = _bench(options, shape, partial(benchmarks.edit_rows, cases=cases), table)
    if options.markdown is not None:
        artefacts.write_whole(options.markdown, benchmarks.edit_markdown(rows, facts).encode())
        print("written:", options.markdown)
    return 0
