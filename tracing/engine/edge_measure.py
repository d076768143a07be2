"""Who answers the cells of a knockout: the fast sweep where the model allows it, else one forward pass per cell."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import ReplayError, VisionLanguageModel
from ..errors import TraceError
from .cells import Measure
from .edge_sweep import EdgeScores, edge_sweep
from .edges import EdgeCell, EdgeRun
from .measure import warn_if_far
from .plain_edges import plain_edges
from .report import EngineReport
from .settings import Engine


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredEdges:
    """Scores of the cells and of the clean run."""

    scores: Tensor
    """(cell, metric) float64 on the CPU."""
    clean: Tensor
    """(metric,)"""
    free: Tensor
    """(cell,) booleans: known without computing."""
    report: EngineReport


def measure_edges(
    vlm: VisionLanguageModel,
    run: EdgeRun,
    cells: Sequence[EdgeCell],
    measure: Measure,
    *,
    engine: Engine,
    bar: tqdm | None = None,
) -> MeasuredEdges:
    """The cells' scores by the engine that was asked for, a few of them computed a second time the plain way.

    A model that cannot be replayed gets one warning and the plain way, or a TraceError if engine.name is "replay".
    """
    reason = "asked for"
    if engine.name != "plain":
        try:
            found = edge_sweep(vlm, run, cells, measure, settings=engine, bar=bar)
            report = _checked(vlm, run, cells, measure, (engine, found))
            return MeasuredEdges(scores=found.scores, clean=found.clean, free=found.free, report=report)
        except ReplayError as error:
            if engine.name == "replay":
                raise TraceError(f"{vlm.name!r} cannot be replayed: {error}; pass Engine(name='auto')") from error
            reason = str(error)
            warnings.warn(f"cutting edges one forward pass per cell, which is slow: {reason}", stacklevel=4)
    try:
        scores = plain_edges(vlm, run, cells, measure, bar=bar)
    except ReplayError as error:
        raise TraceError(f"the attention of {vlm.name!r} cannot be cut: {error}") from error
    with torch.no_grad():
        logits = vlm.forward(inputs_embeds=run.embeddings, positions=run.scored, **run.keywords)
    tokens = len(cells) * run.length * vlm.layers
    return MeasuredEdges(
        scores=scores,
        clean=measure(logits)[0].double().cpu(),
        free=torch.zeros(len(cells), dtype=torch.bool),
        report=EngineReport(engine="plain", reason=reason, cells=len(cells), token_layers=tokens),
    )


def _checked(
    vlm: VisionLanguageModel,
    run: EdgeRun,
    cells: Sequence[EdgeCell],
    measure: Measure,
    done: tuple[Engine, EdgeScores],
) -> EngineReport:
    """What the sweep has cost, and how far a few random cells of it are from the plain way."""
    engine, found = done
    computed = (~found.free).nonzero().flatten().tolist()
    chosen = random.Random(0).sample(computed, min(engine.checks, len(computed)))
    report = EngineReport(
        engine="replay",
        cells=len(cells),
        free_cells=int(found.free.sum()),
        token_layers=found.work.token_layers,
        halvings=found.halvings,
    )
    if not chosen:
        return report
    again = [cells[number] for number in chosen]
    slow, other = (plain_edges(vlm, run, again, measure, copies=copies) for copies in (1, 2))
    difference, noise = (float((each - slow).abs().max()) for each in (found.scores[chosen], other))
    checked = {"checked_cells": len(chosen), "largest_difference": difference, "plain_noise": noise}
    warn_if_far(checked, vlm.dtype, size=1.0, stacklevel=6)
    return replace(report, **checked)
