"""multrace bench edit: what closed-form editing does, each step beside the usual way to the same result.

Value search: many facts at once, of which only the upper layers and the last tokens run again, against the whole model
forward and backward for each fact and step. Second moments: one pass for all layers against one early-stopped pass per
layer. Solve: thin factors against the explicit inverse of a width x width matrix, and batches that share the
factorisation of C against one solve of that size for each. Results are compared, and a row whose two ways do not agree
is refused. What the value search costs the usual way does not depend on the fact, so a few are timed and multiplied.
Each row is measured in a process of its own (on a CUDA device in one for all).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .benchmarks.cases import chosen_cases
from .benchmarks.edit_cases import WIDTH, Case, make_edit_cases, measure_edit_anew
from .benchmarks.edit_rows import EditRow
from .benchmarks.edit_tables import describe_edit, edit_markdown, edit_table
from .benchmarks.machine import machine_facts
from .benchmarks.peaks import in_new_process
from .benchmarks.settings import BenchOptions
from .benchmarks.shapes import Shape
from .benchmarks.subjects import Recipe, open_subject
from .benchmarks.tables import describe_machine
from .options import add_options, option, read
from .outputs import check_files, new_files

HELP = "time value search, second moments and solves against the usual way"
EXAMPLE = """examples:
  multrace bench edit --quick                              a small model and a small solve, about a minute
  multrace bench edit --json out/edit.json --markdown out/edit.md    the whole table
  multrace bench edit --rows solve --solve-width 2752      only rows whose label holds one of these words
  multrace bench edit --shape llava-7b --device cuda:0     LLaVA-1.5-7B's sizes, random bfloat16 weights
"""
_FULL = {
    "shape": "base",
    "baseline_cells": 2,
    "facts": 8,
    "steps": 20,
    "prompts": 16,
    "solve_width": WIDTH,
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
    FULL = _FULL

    baseline_cells: int | None = option(
        "facts that the usual way searches for (default 2; with --quick 1)", default=None, type=int, metavar="N"
    )
    facts: int | None = option(f"facts that ours searches for (default {_FULL['facts']})", default=None, type=int)
    steps: int | None = option(f"steps of each search (default {_FULL['steps']})", default=None, type=int)
    prompts: int | None = option(
        f"prompts that second moments are taken over (default {_FULL['prompts']})", default=None, type=int
    )
    solve_width: int | None = option(
        f"numbers that the solved weight reads (default {WIDTH}, which takes minutes; with --quick 1376)",
        default=None,
        type=int,
    )
    rows: tuple[str, ...] | None = option(
        "rows of the table: those whose label holds one of these words (default: all; with --quick five)",
        default=None,
        nargs="+",
        metavar="WORDS",
    )
    markdown: Path | None = option("also write the table as Markdown", default=None, type=Path, metavar="FILE")

    def check(self) -> None:
        """Also a CommandError for searches, moments and solves of nothing."""
        least = {"facts": 1, "steps": 1, "prompts": 1, "solve_width": 16}
        for name, number in least.items():
            self.check_least(name, number)
        super().check()
        if self.markdown is not None:
            check_files(self.markdown.parent, [self.markdown.name])

    def cases(self, shape: Shape) -> tuple[Case, ...]:
        """The rows that were asked for. CommandError lists the labels."""
        made = make_edit_cases(
            shape,
            facts=self.value("facts"),
            timed_facts=self.value("baseline_cells"),
            steps=self.value("steps"),
            prompts=self.value("prompts"),
            width=self.value("solve_width"),
            seed=self.seed,
        )
        return chosen_cases(made, self.value("rows"))

    def write_markdown(self, text: str) -> None:
        """Writes the Markdown, if it was asked for, and says so."""
        if self.markdown is not None:
            with new_files(self.markdown.parent, [self.markdown.name]) as work:
                (work / self.markdown.name).write_text(text)
            print("written:", self.markdown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `BenchEdit`."""
    add_options(parser, BenchEdit)


def run(options: argparse.Namespace) -> int:
    """Makes the model in a temporary folder, measures row after row, prints each and the table, writes the files."""
    settings = read(BenchEdit, options)
    settings.check()
    shape = settings.chosen_shape()
    cases = settings.cases(shape)
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with settings.model(shape, {}) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_edit(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*edit_table(rows), sep="\n")
    settings.write({**facts, "seed": settings.seed, "rows": [row.record() for row in rows]})
    settings.write_markdown(edit_markdown(rows, facts))
    return 0


def _measured(settings: BenchEdit, recipe: Recipe, cases: Sequence[Case]) -> Iterator[EditRow]:
    """The rows, each as soon as it is known."""
    if not settings.runs_on_cuda:
        yield from (in_new_process(measure_edit_anew, recipe, case) for case in cases)
        return
    subject = open_subject(recipe) if any(case.needs_model for case in cases) else None
    device = torch.device(settings.device)
    yield from (case.measure(subject if case.needs_model else device) for case in cases)
