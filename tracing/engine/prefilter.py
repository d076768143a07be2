"""Estimates for all cells of a trace, exact scores for the best of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import ReplayError, VisionLanguageModel
from ..errors import TraceError
from .attribution import estimated_changes, rank_agreement
from .cells import KINDS, Cell
from .experiment import Experiment, Found
from .grid import Grid
from .settings import Engine


@dataclass(frozen=True, kw_only=True, eq=False)
class Filtered:
    """A trace of which only some cells are exact."""

    found: Found
    """Scores of all cells, estimates among them."""
    estimated: dict[str, Tensor]
    """Per kind (row, column) booleans: the score is an estimate. Empty where all are exact."""
    agreement: dict[str, float]
    """Per kind with at least two exact cells: rank agreement of their estimates and exact effects."""


def measure_best(
    experiment: Experiment,
    vlm: VisionLanguageModel,
    grid: Grid,
    count: int | None,
    *,
    engine: Engine,
    accept: Callable[[float, float], None] | None = None,
    bar: tqdm | None = None,
) -> Filtered:
    """All cells' scores: exact for the `count` of them with the largest estimated effects, or for all if None.

    TraceError for cells that cannot be estimated (direct effects, severed modules, what comes before the decoder).
    """
    cells = grid.cells
    if count is None or count >= len(cells):
        found = experiment.measure(vlm, cells, engine=engine, accept=accept, bar=bar)
        return Filtered(found=found, estimated={}, agreement={})
    _check(cells, count)
    try:
        changes = _changes(experiment, vlm, cells)
    except ReplayError as error:
        raise TraceError(f"{vlm.name!r} cannot be replayed, so nothing can be estimated: {error}") from error
    chosen = changes[:, 0].mean(-1).abs().argsort(descending=True, stable=True)[:count].sort().values
    if bar is not None:
        bar.total = count * len(experiment.scoring.branches)
    found = experiment.measure(vlm, [cells[each] for each in chosen.tolist()], engine=engine, accept=accept, bar=bar)
    base = found.corrupted if experiment.restores else found.clean
    scores = base + changes
    scores[chosen] = found.scores
    is_estimate = torch.ones(len(cells), dtype=torch.bool).index_fill(0, chosen, False)
    return Filtered(
        found=replace(found, scores=scores),
        estimated={kind: each[..., 0] for kind, each in grid.maps(is_estimate.unsqueeze(-1)).items()},
        agreement=_agreement(grid, changes[:, 0].mean(-1), (scores - base)[:, 0].mean(-1), ~is_estimate),
    )


def _changes(experiment: Experiment, vlm: VisionLanguageModel, cells: Sequence[Cell]) -> Tensor:
    """(cell, metric, sample): estimated effects of all metrics."""
    parts = [
        estimated_changes(vlm, experiment.runs(vlm, ids), cells, measure)
        for ids, measure in experiment.scoring.branches
    ]
    return experiment.scoring.joined(parts)


def _agreement(grid: Grid, estimates: Tensor, exact: Tensor, is_exact: Tensor) -> dict[str, float]:
    maps = [grid.maps(each.unsqueeze(-1)) for each in (estimates, exact, is_exact)]
    agreement = {}
    for kind in grid.spans:
        first, second, known = (each[kind].flatten() for each in maps)
        if int(known.sum()) > 1:
            agreement[kind] = rank_agreement(first[known], second[known])
    return agreement


def _check(cells: Sequence[Cell], count: int) -> None:
    if count < 1:
        raise TraceError(f"exact_cells={count}: pass at least 1, or None for all")
    for cell in cells:
        if cell.is_direct or cell.severed or cell.kind not in (*KINDS, "head"):
            what = "direct effects" if cell.is_direct else "severed modules" if cell.severed else f"{cell.kind!r} cells"
            raise TraceError(f"{what} cannot be estimated by one backward pass; leave out exact_cells")
