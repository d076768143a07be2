"""Attribution patching: one backward pass estimates the effects of all cells, so that only the best are computed.

The estimate is the first-order change, (source state - base state) . gradient, at the run that is changed. It is exact
for small corruptions and at best a ranking for large ones. The estimate of a window is the sum over its layers, so an
effect that passes through a later layer of the same window counts twice. The method is Nanda's attribution patching;
see Kramar et al., arXiv 2403.00745.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...models import Site, VisionLanguageModel, capture
from ...models.families.addresses import Kind, Projection
from ...models.replay.recording import Recording, Source, places
from ...models.replay.replay import Replay, replaying
from ..errors import TraceError
from .cells import KINDS, Measure, Runs, StateCell
from .lanes import Recorded, record

_Key = Site | Projection


def estimated_changes(vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell], measure: Measure) -> Tensor:
    """Return first-order estimates of what each cell adds to the base run's scores: (cell, metric, sample) float64.

    This takes one forward pass and, per metric, one backward pass for each row of the base run, over the positions that
    can differ. Metrics must be differentiable, and cells total effects without severed modules. Raises `ReplayError`
    for a model whose layers cannot be replayed.
    """
    with replaying(vlm) as replay, vlm.gradients(), torch.no_grad():
        recorded = record(replay, runs, cells, keep_all=True)
        metrics = measure(recorded.base.logits).shape[-1]
        estimates = torch.zeros(len(cells), metrics, runs.samples, dtype=torch.float64)
        if not recorded.changed:
            return estimates
        for row in range(len(runs.base)):
            samples = [row] if len(runs.base) > 1 else list(range(runs.samples))
            effects = _effects(replay, runs, recorded, row, measure)
            for number, cell in enumerate(cells):
                estimates[number][:, samples] += _estimate(vlm, cell, effects, recorded.changed)
    return estimates


def _stored(run: Recording, key: _Key) -> Tensor:
    return run.states[key.layer + 1] if isinstance(key, Site) and key.kind == "hidden" else run.outputs[key]


def check_estimable(cells: Sequence[StateCell]) -> None:
    """Raise `TraceError` unless all cells are total effects on states of the decoder without severed modules."""
    for cell in cells:
        if cell.is_direct or cell.severed or cell.kind not in (*KINDS, "head"):
            what = "direct effects" if cell.is_direct else "severed modules" if cell.severed else f"{cell.kind!r} cells"
            raise TraceError(f"{what} cannot be estimated by one backward pass; leave out exact_cells")


def _estimate(
    vlm: VisionLanguageModel, cell: StateCell, effects: dict[_Key, Tensor], changed: tuple[int, ...]
) -> Tensor:
    """Return (metric, sample): the estimate of what a cell adds to the base run's scores."""
    live = sorted(set(cell.positions) & set(changed))
    if not live:
        return torch.zeros(())
    where, total = places(changed, live, torch.device("cpu")), torch.zeros(())
    for layer in range(cell.first, cell.last + 1):
        key = vlm.attention_projection(layer) if cell.kind == "head" else Site(cast(Kind, cell.kind), layer)
        total = total + effects[key][..., cell.head or 0][..., where].sum(-1)
    return total


def _effects(replay: Replay, runs: Runs, recorded: Recorded, row: int, measure: Measure) -> dict[_Key, Tensor]:
    """Return the runs' difference times the gradient, (metric, sample, position, head) float64; a site has one head."""
    base, source = recorded.base, recorded.source
    gradients = _gradients(replay, runs, recorded, row, measure)
    source_rows = slice(row, row + 1) if len(runs.base) > 1 and len(runs.source) > 1 else slice(None)
    effects = {}
    for key, gradient in gradients.items():
        patched, own = (each.at(_stored(each, key), recorded.changed) for each in (source, base))
        difference = (patched[source_rows] - own[row : row + 1]).double()
        heads = 1 if isinstance(key, Site) else replay.vlm.heads
        effects[key] = (gradient.double() * difference).unflatten(-1, (heads, -1)).sum(-1).cpu()
    return effects


def _gradients(replay: Replay, runs: Runs, recorded: Recorded, row: int, measure: Measure) -> dict[_Key, Tensor]:
    """Return the gradients of one base row's scores, per site or projection (metric, 1, position, width)."""
    vlm, changed, base = replay.vlm, recorded.changed, recorded.base
    keys = list(base.outputs)
    sites, projections = ([key for key in keys if isinstance(key, kind)] for kind in (Site, Projection))
    rest = tuple(sorted(set(range(runs.length)) - set(changed)))
    span = replay.span(changed, [Source(run=recorded.full, positions=rest)])
    values: dict[_Key, Tensor] = {}
    with (
        torch.enable_grad(),
        capture(vlm, sites) as written,
        capture(vlm, projections, inputs=True) as read,
    ):
        states = base.at(base.states[0], changed)[row : row + 1].clone().requires_grad_()
        for layer in range(vlm.layers):
            states = replay.layer(layer, states, span)
            values[Site("hidden", layer)] = states
        scored = [place for place in runs.scored if place in set(changed)]
        logits = base.logits[row : row + 1].clone()
        if scored:
            here = [runs.scored.index(place) for place in scored]
            computed = replay.read(states[:, places(changed, scored, states.device)])
            logits = logits.index_copy(1, torch.tensor(here, device=logits.device), computed)
        values |= {**written, **read}
        scores = measure(logits)[0]
        gradients = [
            torch.autograd.grad(score, list(values.values()), retain_graph=True, materialize_grads=True)
            for score in scores
        ]
    return {key: torch.stack(parts) for key, parts in zip(values, zip(*gradients, strict=True), strict=True)}


def rank_agreement(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors, from -1 to 1; NaN where one is constant."""
    from scipy.stats import spearmanr

    if len(first) < 2 or any(len(each.unique()) < 2 for each in (first, second)):
        return float("nan")
    return float(spearmanr(first.double().numpy(), second.double().numpy()).statistic)
