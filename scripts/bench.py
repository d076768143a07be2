"""Measure how fast multrace is, side by side with the usual way in one run."""

from __future__ import annotations

from cyclopts import App

from . import benchmarks
from .benchmarks.options import BenchEdit, BenchFlow, BenchTrace
from .options.asking import STYLE, paragraphs

EXAMPLE = """examples:
  multrace bench trace --quick
  multrace bench flow --quick
  multrace bench edit --quick
  multrace bench trace --help
"""
app = App(name="bench", help=__doc__, help_epilogue=EXAMPLE, group_parameters=STYLE["group_parameters"])


TRACE = """Time causal tracing by the sweep and by the two usual ways, on a LLaVA-shaped random model.

The naive way makes one hooked call of the whole model per cell, with the vision tower and a clean row, as ROME's
script does. The strong way runs the vision tower once, then one hooked forward pass of the decoder per cell. The cost
of a cell does not depend on the cell in either way, so a few random cells are timed and multiplied. Cells that cost
the sweep nothing are counted separately and raise no ratio. Each row is measured in its own process (on a CUDA
device, all rows share one), in which the sweep runs first, so that its peak memory is known; the peaks of the other
ways are measured in one process each.
"""
TRACE_EXAMPLE = """examples:
  multrace bench trace --quick                             a small model, under a minute
  multrace bench trace --json out/bench.json               the whole table (some twenty minutes on two cores)
  multrace bench trace --cells "text tokens" last          only rows whose label contains one of these
  multrace bench trace --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""


@app.command(name="trace", help=paragraphs(TRACE), help_epilogue=TRACE_EXAMPLE)
def run_trace(options: BenchTrace = BenchTrace()) -> int:
    """Measure and print every row and the table, and write the files."""
    return benchmarks.bench_trace(options)


FLOW = """Time attention knockout by the sweep and by the two usual ways, on a LLaVA-shaped random model.

A cell cuts the attention edges of one flow, such as "image -> last", in a window of layers. The published way lets
the whole model generate one token per cell, with vision tower and prefill in each call, and builds the masks from
lists of pairs. The strong way runs the vision tower once, then the decoder once per cell. Both compute all tokens for
every cell, so a few random cells are timed and multiplied. multrace runs three times, since a sweep takes only
milliseconds, and the median counts. Cells that cost nothing are counted separately and raise no ratio. Each row is
measured in its own process (on a CUDA device, all rows share one), in which a sweep runs first, so that its peak
memory is known; the peaks of the other ways are not measured.
"""
FLOW_EXAMPLE = """examples:
  multrace bench flow --quick                             a small model, about a minute
  multrace bench flow --json out/flow.json                the whole table (some six minutes on one core)
  multrace bench flow --flows "image -> last" dropped     only rows whose label contains one of these
  multrace bench flow --shape llava-7b --device cuda:0    LLaVA-1.5-7B's sizes, random bfloat16 weights
"""


@app.command(name="flow", help=paragraphs(FLOW), help_epilogue=FLOW_EXAMPLE)
def run_flow(options: BenchFlow = BenchFlow()) -> int:
    """Measure and print every row and the table, and write the files."""
    return benchmarks.bench_flow(options)


EDIT = """Measure each step of closed-form editing beside the usual way to the same result.

Value search: many facts at once, rerunning only the upper layers and the last tokens, against the whole model forward
and backward for each fact and step. Second moments: one pass for all layers against one early-stopped pass per layer.
Solve: thin factors against the explicit inverse of a width x width matrix, and batches that share the factorisation
of C against one solve of that size for each. The results are compared, and a row whose two results differ is an
error. The cost of the usual value search does not depend on the fact, so a few facts are timed and multiplied. Each
row is measured in its own process (on a CUDA device, all rows share one).
"""
EDIT_EXAMPLE = """examples:
  multrace bench edit --quick                              a small model and a small solve, about a minute
  multrace bench edit --json out/edit.json --markdown out/edit.md    the whole table
  multrace bench edit --rows solve --solve-width 2752      only rows whose label contains one of these words
  multrace bench edit --shape llava-7b --device cuda:0     LLaVA-1.5-7B's sizes, random bfloat16 weights
"""


@app.command(name="edit", help=paragraphs(EDIT), help_epilogue=EDIT_EXAMPLE)
def run_edit(options: BenchEdit = BenchEdit()) -> int:
    """Measure and print every row and the table, and write the files."""
    return benchmarks.bench_edit(options)
