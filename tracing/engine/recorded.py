"""The two runs of a sweep, recorded: one whole, the other only where it differs."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...models import Site
from ...models.families.addresses import Projection
from ...models.replay.recording import Recording, Source, Span, neighbours
from ...models.replay.replay import Replay
from .cells import Cell, Runs
from .plan import touched


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What all cells of a sweep share."""

    full: Recording
    """The run that holds keys and values of all positions: the base or the source."""
    base: Recording
    source: Recording
    changed: tuple[int, ...]
    """Positions at which the two runs can differ, ascending."""

    def span(self, replay: Replay, computed: tuple[int, ...], merged: Sequence[int]) -> Span:
        """Positions to compute, with the runs that hold the keys of all others: the source's for merged ones."""
        by_run = {self.source: set(merged)}
        by_run[self.base] = set(self.changed) - set(computed) - set(merged)
        rest = set(self.full.positions) - set(computed).union(*by_run.values())
        by_run[self.full] = by_run.get(self.full, set()) | rest
        sources = [Source(run=run, positions=part) for run, held in by_run.items() for part in neighbours(sorted(held))]
        return replay.span(computed, sources)


def record(replay: Replay, runs: Runs, cells: Sequence[Cell], *, keep_all: bool = False) -> Recorded:
    """Both runs, with the outputs that these cells put in or freeze; the one with fewer rows is recorded whole.

    States and outputs of the other are kept where some cell needs them, or wherever they can differ.
    """
    first, second = sorted((runs.base, runs.source), key=len)
    entering, other_entering = (replay.entering(each, **runs.keywords) for each in (first, second))
    differs = (entering != other_entering).any(-1).any(0).nonzero().flatten().tolist()
    sites, projections = _needed(replay, cells)
    settings = {"read": runs.scored, "sites": sites, "projections": projections, **runs.keywords}
    # Which positions can differ depends on masks that only a run shows; with causal ones, those from the first on.
    kept = tuple(range(min(differs, default=runs.length), runs.length))
    full = replay.record(first, kept=kept, **settings)
    changed = replay.masks.reach(differs)
    if not set(changed) <= set(kept):
        full = replay.record(first, kept=changed, **settings)
    other = full
    if changed:
        needed = touched(cells, masks=replay.masks, changed=changed, frozen=runs.frozen)
        other = replay.record_after(
            full,
            other_entering[:, list(changed)],
            changed,
            kept=changed if keep_all else needed,
            sites=sites,
            projections=projections,
        )
    base, source = (full, other) if first is runs.base else (other, full)
    return Recorded(full=full, base=base, source=source, changed=changed)


def _needed(replay: Replay, cells: Sequence[Cell]) -> tuple[list[Site], list[Projection]]:
    """The sites whose outputs, and the projections whose inputs, some cell puts in or freezes."""
    vlm = replay.vlm
    spans: dict[str, set[int]] = {}
    for cell in cells:
        spans.setdefault(cell.kind, set()).update(range(cell.first, cell.last + 1))
        if cell.severed:
            spans.setdefault(cell.severed, set()).update(range(cell.last + 1, vlm.layers))
    projections = [vlm.attention_projection(layer) for layer in sorted(spans.pop("head", ()))]
    spans.pop("hidden", None)  # states that enter layers are always kept
    return [Site(kind, layer) for kind, layers in spans.items() for layer in sorted(layers)], projections
