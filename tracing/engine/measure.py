"""Who answers the cells of a trace: the fast sweep where the model allows it, else one forward pass per cell."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import ReplayError, VisionLanguageModel
from ..errors import TraceError
from .cells import Cell, Measure, Runs
from .checkpoint import Checkpoint
from .plain import plain_scores, run_scores
from .plan import single
from .report import EngineReport
from .settings import Engine
from .sweep import sweep

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Differences in probability that rounding explains at any rate; half precision rounds a thousand times more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Scores of the cells and of both runs."""

    scores: Tensor
    """(cell, metric, sample) float64 on the CPU."""
    base: Tensor
    """(metric, sample): scores of the run that is changed."""
    source: Tensor
    """(metric, sample): scores of the run that lends its states."""
    report: EngineReport


def measure_cells(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    engine: Engine,
    accept: Callable[[Tensor, Tensor], None],
    bar: tqdm | None = None,
) -> Measured:
    """The cells' scores by the engine that was asked for, checked if it is the fast one.

    accept: is shown the scores of base and source (metric, sample) before any cell is computed, and may raise. A model
    that cannot be replayed gets one warning and the plain way, or a TraceError if engine.name is "replay".
    """
    reason = "asked for" if engine.name == "plain" else None
    if reason is None:
        try:
            return _swept(vlm, runs, cells, measure, engine, accept, bar)
        except ReplayError as error:
            if engine.name == "replay":
                raise TraceError(f"{vlm.name!r} cannot be replayed: {error}; pass Engine(name='auto')") from error
            reason = str(error)
            warnings.warn(f"tracing one forward pass per cell, which is slow: {reason}", stacklevel=5)
    base, source = (
        run_scores(vlm, each.expand(runs.samples, -1, -1).contiguous(), runs, measure)
        for each in (runs.base, runs.source)
    )
    accept(base, source)
    checkpoint = Checkpoint(engine.checkpoint)
    checkpoint.open(cells, [single(number) for number in range(len(cells))], torch.stack([base, source]))
    scores = torch.full((len(cells), *base.shape), torch.nan, dtype=torch.float64)
    with checkpoint.writing(scores):
        scores = plain_scores(vlm, runs, cells, measure, progress=_Finished(checkpoint, scores), bar=bar)
    tokens = len(cells) * runs.samples * runs.length * vlm.layers
    report = EngineReport(engine="plain", reason=reason, cells=len(cells), token_layers=tokens)
    return Measured(scores=scores, base=base, source=source, report=report)


@dataclass(frozen=True)
class _Finished:
    """Cells of the plain way in a checkpoint, each a batch of its own."""

    checkpoint: Checkpoint
    scores: Tensor

    def known(self, number: int) -> Tensor | None:
        """(metric, sample): what an earlier run has found for this cell."""
        return self.scores[number] if self.checkpoint.restore(number, single(number), self.scores) else None

    def add(self, number: int, scores: Tensor) -> None:
        """Keeps a cell's scores (metric, sample)."""
        self.scores[number] = scores
        self.checkpoint.finish(number)


def _swept(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    engine: Engine,
    accept: Callable[[Tensor, Tensor], None],
    bar: tqdm | None,
) -> Measured:
    """By the fast sweep, with some cells computed again the plain way."""
    found = sweep(vlm, runs, cells, measure, settings=engine, accept=accept, bar=bar)
    report = EngineReport(
        engine="replay",
        cells=len(cells),
        free_cells=int(found.free.sum()),
        token_layers=found.recording.token_layers + found.work.token_layers,
        halvings=found.halvings,
    )
    computed = (~found.free).nonzero().flatten()
    if engine.checks and len(computed):
        order = torch.randperm(len(computed), generator=torch.Generator().manual_seed(0))
        chosen = computed[order[: engine.checks]].tolist()
        report = replace(report, **_checked(vlm, runs, [cells[each] for each in chosen], measure, found.scores[chosen]))
    return Measured(scores=found.scores, base=found.base, source=found.source, report=report)


def _checked(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], measure: Measure, scores: Tensor
) -> dict[str, int | float]:
    """How far the sweep's scores are from the plain way's, and the plain way's from its own in another batch.

    One warning if they are further apart than rounding explains.
    """
    plain = plain_scores(vlm, runs, cells, measure)
    again = replace(runs, base=runs.base[:1].expand(2, -1, -1)) if runs.samples == 1 else _first_sample(runs)
    other = plain_scores(vlm, again, cells, measure)
    difference, noise = _furthest(scores, plain), _furthest(plain[..., :1], other[..., :1])
    size = plain[:, 0].nan_to_num(0.0, 0.0, 0.0).abs().max()
    checked = {"checked_cells": len(cells), "largest_difference": difference, "plain_noise": noise}
    warn_if_far(checked, vlm.dtype, size=float(size), stacklevel=8)
    return checked


def warn_if_far(checked: Mapping[str, int | float], dtype: torch.dtype, *, size: float, stacklevel: int) -> None:
    """One warning if the engines are further apart than rounding explains, for scores as large as `size`."""
    difference, noise = checked["largest_difference"], checked["plain_noise"]
    if difference > max(_TOLERANCE.get(dtype, 3e-2), 5 * noise) * max(1.0, size):
        warnings.warn(
            f"the fast engine is {difference:.1e} away from the plain way on {checked['checked_cells']} checked cells, "
            f"whose own noise is {noise:.1e}; trace again with Engine(name='plain') and report this model",
            stacklevel=stacklevel,
        )


def _furthest(first: Tensor, second: Tensor) -> float:
    """Largest difference in the main metric; one without bounds, or that is no number, is none where both have it."""
    first, second = first[:, 0], second[:, 0]
    alike = (first == second) | (first.isnan() & second.isnan())
    return float((first - second).abs().nan_to_num(torch.inf, torch.inf).masked_fill(alike, 0.0).max())


def _first_sample(runs: Runs) -> Runs:
    return replace(runs, base=runs.base[:1], source=runs.source[:1])


def branch_file(checkpoint: Path | None, branch: int) -> Path | None:
    """The checkpoint of one of several token sequences."""
    return checkpoint if checkpoint is None or not branch else checkpoint.with_name(f"{checkpoint.name}.{branch}")
