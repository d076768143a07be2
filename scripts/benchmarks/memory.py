"""Rows with the peak memory of all three ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .cases import Case
from .peaks import in_new_process, peak_mb
from .subjects import Recipe, open_subject
from .timing import TimingRow, measure_row
from .ways import frozen_states, run_naive, run_strong


class Measurements:
    """EvaluationSettings rows, each in a process of its own, in which the sweep runs first.

    The two usual ways need the same memory for every cell of a sort, so they are asked once, in a process each.
    """

    def __init__(self, recipe: Recipe, timed_cells: int) -> None:
        self._recipe, self._timed_cells = recipe, timed_cells
        self._known: dict[tuple, float] = {}

    def row(self, case: Case) -> TimingRow:
        """One row of the table. The stronger way's peak is that of one cell of each kind, since it holds the states
        of all kinds; the naive way's that of one cell.
        """
        row = in_new_process(measure_anew, self._recipe, case, self._timed_cells)
        kinds = tuple({cell.kind: cell for cell in case.cells}.values())
        sort = (case.corruption, case.cells[0].is_direct)
        return replace(
            row,
            peak_mb_strong=self._asked(("strong", *sort, len(kinds)), strong_peak, replace(case, cells=kinds)),
            peak_mb_naive=self._asked(("naive", *sort), naive_peak, replace(case, cells=kinds[:1])),
        )

    def _asked(self, key: tuple, work: Callable[[Recipe, Case], float], case: Case) -> float:
        if key not in self._known:
            self._known[key] = in_new_process(work, self._recipe, case)
        return self._known[key]


def measure_anew(recipe: Recipe, case: Case, timed_cells: int) -> TimingRow:
    """The row, measured from opening the model on, with the sweep's peak."""
    return measure_row(open_subject(recipe), case, timed_cells=timed_cells)


def strong_peak(recipe: Recipe, case: Case) -> float:
    """MiB that the stronger way takes, from opening the model on."""
    subject = open_subject(recipe)
    run_strong(subject, subject.runs(case.corruption), case.cells)
    return peak_mb(subject.vlm.device)


def naive_peak(recipe: Recipe, case: Case) -> float:
    """MiB that the naive way takes, from opening the model on."""
    subject = open_subject(recipe)
    runs = subject.runs(case.corruption)
    run_naive(subject, runs, case.cells, frozen_states(subject, runs, case.cells))
    return peak_mb(subject.vlm.device)
