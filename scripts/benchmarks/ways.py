"""The three ways to trace some cells of a subject: the sweep, one forward pass per cell, one model call per cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from ...models import Site
from ...tracing.engine.cells import CellScores, Engine, Runs, StateCell
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.sweep import sweep
from .naive import base_states, naive_scores
from .subjects import Subject


def run_sweep(
    subject: Subject,
    runs: Runs,
    cells: Sequence[StateCell],
    *,
    recorded: Callable[[Tensor, Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Our way, without the check of its own that a trace ends with. recorded: is called once both runs are."""
    settings = Engine(checks=0)
    return sweep(subject.vlm, runs, cells, subject.measure, settings=settings, accept=recorded, bar=bar)


def run_strong(subject: Subject, runs: Runs, cells: Sequence[StateCell], bar: tqdm | None = None) -> Tensor:
    """(cell, metric, sample): the stronger of the usual ways."""
    return plain_scores(subject.vlm, runs, cells, subject.measure, bar=bar)


def run_naive(subject: Subject, runs: Runs, cells: Sequence[StateCell], states: Mapping[Site, Tensor]) -> Tensor:
    """(cell, metric, sample): the usual way as scripts have it; states: `frozen_states`."""
    return naive_scores(subject.vlm, subject.prompt, runs, cells, subject.measure, states=states)


def frozen_states(subject: Subject, runs: Runs, cells: Sequence[StateCell]) -> dict[Site, Tensor]:
    """The base run's hidden states, if any of the cells is a direct effect; else nothing."""
    return base_states(subject.vlm, runs) if any(cell.is_direct for cell in cells) else {}
