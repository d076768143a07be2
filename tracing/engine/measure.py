"""Scores of cells by the selected engine: the fast sweep if the model allows it, else plain forward passes."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import ReplayError, VisionLanguageModel
from ..errors import TraceError
from .cells import Cell, CellScores, Engine, EngineReport, Measure, Runs
from .plain import Shown, each_plain, is_before_decoder, plain_scores, run_scores, with_pictures
from .plan import single
from .scoring import Scoring
from .sweep import Checkpoint, sweep

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Differences in probability that rounding alone can explain; in half precision they are a thousand times larger."""
_PACKAGE = __name__.partition(".")[0]

Accept = Callable[[Tensor, Tensor], None]
"""A check of the scores (metric, sample) of base and source before any cell is computed; it may raise."""


def measure(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    scoring: Scoring,
    *,
    engine: Engine,
    accept: Accept | None = None,
    pictures: Shown | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of all cells in all metrics, and the cost of computing them.

    Args:
        vlm: The model.
        runs: The runs of the prompt, without an answer.
        cells: State cells or edge cells.
        scoring: Metrics and tokens. A foil of several tokens takes a second pass over all cells.
        engine: The engine and its settings.
        accept: A function that is called first, with the scores (metric, sample) of base and source.
        pictures: Model inputs of both runs, for cells before the decoder.
        bar: Progress bar that counts cells, once for each sequence of tokens.

    Raises:
        TraceError: The model cannot be replayed and `engine.name` is "replay"; its attention cannot be cut; memory
            runs out; or a score is not finite. With other engine settings, a model that cannot be replayed gets one
            warning instead.
    """
    before = [is_before_decoder(cell) for cell in cells]
    others = [cell for cell, is_before in zip(cells, before, strict=True) if not is_before]
    parts: list[CellScores] = []

    def look(base: Tensor, source: Tensor) -> None:
        columns = [[base, source], *(_both(vlm, runs.along(vlm, ids), score) for ids, score in scoring.branches[1:])]
        if accept is not None:
            accept(*(scoring.joined(each) for each in zip(*columns, strict=True)))

    for number, (ids, score) in enumerate(scoring.branches):
        settings = replace(engine, checkpoint=_branch_file(engine.checkpoint, number))
        if parts and parts[0].report.engine == "plain":  # a warning has already given the reason
            settings = replace(settings, name="plain")
        along = runs.along(vlm, ids)
        judge = look if accept is not None and not parts else None
        part = measure_once(vlm, along, others, score, engine=settings, accept=judge, bar=bar)
        if any(before):
            assert pictures is not None, "cells before the decoder need the model inputs of both runs"
            part = with_pictures(vlm, pictures, along, cells, score, measured=part, bar=bar)
        parts.append(part)
    scores, base, source = (
        scoring.joined([getattr(part, name) for part in parts]) for name in ("scores", "base", "source")
    )
    report = _joint_report([part.report for part in parts])
    return CellScores(scores=scores, base=base, source=source, free=parts[0].free, report=report)


def measure_once(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    score: Measure,
    *,
    engine: Engine,
    accept: Accept | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of one function on one sequence of tokens, by the selected engine.

    A few cells of a sweep are computed a second time by plain forward passes. The arguments are those of `measure`.
    """
    reason = "asked for" if cells else "the vision tower cannot be replayed"
    if cells and engine.name != "plain":
        try:
            result = sweep(vlm, runs, cells, score, settings=engine, accept=accept, bar=bar)
            return replace(result, report=replace(result.report, **_checked(vlm, runs, cells, score, (engine, result))))
        except ReplayError as error:
            _both(vlm, runs, score)  # logits that are not finite raise their own error
            if engine.name == "replay":
                raise TraceError(f"{vlm.name!r} cannot be replayed: {error}; pass Engine(name='auto')") from error
            reason = str(error)
            _warn(f"tracing one forward pass per cell, which is slow: {reason}")
    return _measure_plain(vlm, runs, cells, score, (engine, reason), accept, bar)


def _measure_plain(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    score: Measure,
    settings: tuple[Engine, str],
    accept: Accept | None,
    bar: tqdm | None,
) -> CellScores:
    """Return the scores by one forward pass per cell; settings: the engine, and why the fast one is not used."""
    engine, reason = settings
    base, source = _both(vlm, runs, score)
    if accept is not None:
        accept(base, source)
    chunks = [single(number) for number in range(len(cells))]
    checkpoint = Checkpoint(engine.checkpoint if cells else None)
    checkpoint.open(cells, chunks, torch.stack([base, source]))
    scores = torch.full((len(cells), *base.shape), torch.nan, dtype=torch.float64)
    with checkpoint.writing(scores):
        known = {number for number, chunk in enumerate(chunks) if checkpoint.restore(number, chunk, scores)}
        if bar is not None:
            bar.update(len(known))
        try:
            for number, values in each_plain(vlm, runs, cells, score, known=known):
                scores[number] = values
                checkpoint.finish(number)
                if bar is not None:
                    bar.update()
        except ReplayError as error:
            raise TraceError(f"the attention of {vlm.name!r} cannot be cut: {error}") from error
    tokens = len(cells) * runs.samples * runs.length * vlm.layers
    report = EngineReport(engine="plain", reason=reason, cells=len(cells), token_layers=tokens)
    free = torch.zeros(len(cells), dtype=torch.bool)
    return CellScores(scores=scores, base=base, source=source, free=free, report=report)


def _both(vlm: VisionLanguageModel, runs: Runs, score: Measure) -> list[Tensor]:
    """Return the scores (metric, sample) of base and source."""
    base = run_scores(vlm, runs.base.expand(runs.samples, -1, -1).contiguous(), runs, score)
    if runs.source is runs.base:
        return [base, base]
    return [base, run_scores(vlm, runs.source.expand(runs.samples, -1, -1).contiguous(), runs, score)]


# ---- the check of the fast engine ----


def _checked(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], score: Measure, done: tuple[Engine, CellScores]
) -> dict[str, Any]:
    """Return how far a few sweep scores are from plain ones, and how far plain ones vary with the batch size.

    Warns once if they are further apart than rounding can explain.
    """
    engine, result = done
    computed = (~result.free).nonzero().flatten()
    order = torch.randperm(len(computed), generator=torch.Generator().manual_seed(0))
    chosen = computed[order[: engine.checks]].tolist()
    if not chosen:
        return {}
    again = [cells[number] for number in chosen]
    plain, other = (plain_scores(vlm, each, again, score) for each in (runs, _in_another_batch(runs)))
    difference, noise = (
        _largest_difference(result.scores[chosen], plain),
        _largest_difference(plain[..., :1], other[..., :1]),
    )
    size = float(plain[:, 0].nan_to_num(0.0, 0.0, 0.0).abs().max())
    if difference > max(_TOLERANCE.get(vlm.dtype, 3e-2), 5 * noise) * max(1.0, size):
        _warn(
            f"the fast engine differs by {difference:.1e} from plain forward passes on {len(chosen)} checked cells, "
            f"which differ by {noise:.1e} among themselves; trace again with Engine(name='plain') and report this model"
        )
    return {"checked_cells": len(chosen), "largest_difference": difference, "plain_noise": noise}


def _in_another_batch(runs: Runs) -> Runs:
    """Return the same runs with another number of samples, of which the first is unchanged."""
    if runs.samples == 1:
        return replace(runs, base=runs.base[:1].expand(2, -1, -1))
    return replace(runs, base=runs.base[:1], source=runs.source[:1])


def _largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference in the first and in the last metric, which is a probability in every trace.

    Where both scores are equally infinite or both are NaN, they do not differ.
    """
    first, second = first[:, [0, -1]], second[:, [0, -1]]
    alike = (first == second) | (first.isnan() & second.isnan())
    return float((first - second).abs().nan_to_num(torch.inf, torch.inf).masked_fill(alike, 0.0).max())


def _warn(message: str) -> None:
    """Warn at the line outside this package from which the call came."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


# ---- several sequences of tokens ----


def _branch_file(checkpoint: str | PathLike[str] | None, branch: int) -> Path | None:
    """Return the checkpoint path of one of several token sequences."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return path.with_name(f"{path.name}.{branch}") if branch else path


def _joint_report(reports: Sequence[EngineReport]) -> EngineReport:
    """Return one report for all sequences, with the sums of the counts and the largest differences."""
    first = reports[0]
    counts: dict[str, Any] = {
        name: sum(getattr(each, name) or 0 for each in reports)
        for name in ("cells", "free_cells", "token_layers", "halvings", "checked_cells")
    }
    worst: dict[str, Any] = {
        name: max((value for each in reports if (value := getattr(each, name)) is not None), default=None)
        for name in ("largest_difference", "plain_noise")
    }
    return replace(first, **counts, **worst)
