"""Edge cells in a sweep: the run is recorded once, and lanes pass through layers in which edges are missing.

In a window's first layer only the targets differ from the recorded run; in later layers, every position that sees them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...models.replay.cuts import Cut, CutSpan
from ...models.replay.recording import Queries, Source
from ...models.replay.replay import Replay
from .cells import EdgeCell, Runs
from .plan import Chunk, Lane, Plan
from .settings import Engine
from .states import Recorded


def record_once(replay: Replay, runs: Runs, cells: Sequence[EdgeCell]) -> Recorded:
    """Return the recorded run in which edges will be cut, with the states of all positions that may change."""
    settings = {"read": runs.scored, **runs.keywords}
    first = min((place for cell in cells for place in cell.cut.targets), default=runs.length)
    clean = replay.record(runs.base, kept=range(first, runs.length), **settings)
    if any(mask is not None for mask in replay.masks.layers):  # earlier positions may see the targets as well
        clean = replay.record(runs.base, kept=range(runs.length), **settings)
    return Recorded(full=clean, base=clean, source=clean, changed=())


class Edges:
    """Edge cells in a sweep: the states in which their lanes start, and the edges missing in their windows."""

    def __init__(
        self, replay: Replay, runs: Runs, cells: Sequence[EdgeCell], recorded: Recorded, _settings: Engine
    ) -> None:
        self._replay, self._runs, self._cells, self._base = replay, runs, cells, recorded.base
        self._spans: dict[tuple[tuple[int, ...], tuple[Cut, ...]], CutSpan] = {}

    def prepare(self, plan: Plan) -> None:
        """Do nothing, since lanes of edge cells share no starts."""

    @contextmanager
    def acting(self, layer: int, chunk: Chunk, lanes: Sequence[Lane], _here: tuple[int, ...]) -> Iterator[Queries]:
        """Yield the span to compute, in whose rows the edges of these lanes are missing."""
        cuts = [_cut_at(lane, self._cells[lane.cell], layer) for lane in lanes]
        yield self._span(chunk.computed, chunk.cuts).rows(cuts)

    def start(self, layer: int, chunk: Chunk, slots: Sequence[int], states: Tensor) -> None:
        """Run the first layer of the lanes in these slots at their targets, in states (1, lane, position, hidden)."""
        lanes = [chunk.lanes[slot] for slot in slots]
        if layer < self._cells[lanes[0].cell].first:
            return  # these lanes start with the input of their first layer
        targets = chunk.targets
        if layer == self._replay.vlm.layers - 1:  # only the logits of the scored positions follow
            targets = tuple(place for place in targets if place in set(self._runs.scored))
        rows = self._span(targets, chunk.cuts).rows([lane.cut for lane in lanes])
        entering = self._base.at(self._base.states[layer], targets).expand(len(slots), -1, -1)
        where = torch.tensor([chunk.computed.index(place) for place in targets], device=states.device)
        into = torch.tensor(slots, device=states.device)[:, None]
        states[0, into, where] = self._replay.layer(layer, entering.contiguous(), rows)

    def scored_together(self, chunk: Chunk, _active: int, _step: int) -> list[list[int]]:
        """Return the slots whose logits are computed together, which are all of them."""
        return [list(range(len(chunk.lanes)))]

    def _span(self, computed: tuple[int, ...], cuts: tuple[Cut, ...]) -> CutSpan:
        """Return the positions to compute; all others come from the recorded run."""
        if (computed, cuts) not in self._spans:
            rest = tuple(sorted(set(self._base.positions) - set(computed)))
            self._spans[computed, cuts] = CutSpan(
                positions=computed,
                sources=(Source(run=self._base, positions=rest),),
                masks=self._replay.masks,
                cuts=cuts,
                heads=self._replay.vlm.heads,
                device=self._replay.vlm.device,
            )
        return self._spans[computed, cuts]


def _cut_at(lane: Lane, cell: EdgeCell, layer: int) -> Cut | None:
    """Return the lane's cut if the layer belongs to its window, else None."""
    return lane.cut if layer <= cell.last else None
