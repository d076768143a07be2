"""The exact fast way to cut attention edges: a cell computes only positions that can change, from its first layer on.

In a window's first layer only the targets differ from the clean run; from then on whatever sees them. Keys of all other
positions come from the clean run, which is recorded once and shared by all cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ...models.replay.cuts import Cut, CutSpan
from ...models.replay.recording import Recording, Source, places
from ...models.replay.replay import Replay, Work, replaying
from ..errors import TraceError
from .cells import Measure
from .edges import EdgeCell, EdgeChunk, EdgeRun, Lane, effective_cells, plan_edges
from .settings import Engine, is_out_of_memory


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeScores:
    """What a sweep over edges found, and what it cost."""

    scores: Tensor
    """(cell, metric) float64 on the CPU."""
    clean: Tensor
    """(metric,): scores with nothing cut."""
    free: Tensor
    """(cell,) booleans: answered without computing anything, since nothing that is cut can act."""
    recording: Work
    """What recording the clean run has cost."""
    work: Work
    """What the cells have cost beyond that."""
    halvings: int
    """How often a batch was halved because memory ran out."""


def edge_sweep(
    vlm: VisionLanguageModel,
    run: EdgeRun,
    cells: Sequence[EdgeCell],
    measure: Measure,
    *,
    settings: Engine | None = None,
    recorded: Callable[[Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> EdgeScores:
    """The scores of every cell, equal to `plain_edges` but for rounding.

    recorded: is called with the clean scores once the clean run is recorded. ReplayError for a model whose layers
    cannot be replayed; TraceError for a token that would see nothing, and if memory runs out for one cell.
    """
    with torch.no_grad(), replaying(vlm) as replay:
        first = min((place for cell in cells for place in cell.cut.targets), default=run.length)
        kept = range(first, run.length)
        clean = replay.record(run.embeddings, kept=kept, read=run.scored, **run.keywords)
        if any(mask is not None for mask in replay.masks.layers):  # then earlier positions may see the targets, too
            clean = replay.record(run.embeddings, kept=range(run.length), read=run.scored, **run.keywords)
        recording, replay.work = replay.work, Work()
        sweep = _EdgeSweep(replay, run, measure, settings or Engine(), clean)
        if recorded is not None:
            recorded(sweep.clean)
        scores, free = sweep.answer(cells, bar)
        return EdgeScores(
            scores=scores,
            clean=sweep.clean,
            free=free,
            recording=recording,
            work=replay.work,
            halvings=sweep.halvings,
        )


class _EdgeSweep:
    """One sweep on its way."""

    def __init__(self, replay: Replay, run: EdgeRun, measure: Measure, settings: Engine, base: Recording) -> None:
        self.replay, self.run, self.measure, self.settings, self.base = replay, run, measure, settings, base
        self.vlm, self.halvings = replay.vlm, 0
        self.clean = measure(base.logits)[0].double().cpu()
        self._found: dict[EdgeCell, Tensor] = {}
        self._spans: dict[tuple[tuple[int, ...], tuple[Cut, ...]], CutSpan] = {}

    def answer(self, cells: Sequence[EdgeCell], bar: tqdm | None) -> tuple[Tensor, Tensor]:
        """Scores (cell, metric) and which cells were free."""
        known = effective_cells(cells, self.replay.masks)
        lane_tokens = self.settings.lane_tokens(self.vlm, 1)
        chunks, free = plan_edges(
            list(known.values()), masks=self.replay.masks, scored=self.run.scored, lane_tokens=lane_tokens
        )
        self._found = dict.fromkeys(free, self.clean)
        waiting = {cell: sum(known[each] == cell for each in cells) for cell in set(known.values())} if bar else {}
        if bar is not None:
            bar.update(sum(waiting[cell] for cell in free))
        for chunk in chunks:
            self._answer(chunk, self.settings.call_tokens(self.vlm))
            if bar is not None:
                bar.update(sum(waiting[lane.cell] for lane in chunk.lanes))
        scores = torch.stack([self._found[known[cell]] for cell in cells])
        return scores, torch.tensor([known[cell] in free for cell in cells])

    def _answer(self, chunk: EdgeChunk, tokens: int) -> None:
        """Answers a chunk; where memory runs out, its halves with half as many tokens per call."""
        try:
            self._run(chunk, tokens)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            parts = chunk.halves()
            if len(parts) == 1 and tokens <= len(chunk.computed):
                raise TraceError(
                    f"memory ran out for a single cell ({len(chunk.computed)} tokens); use a device with more memory"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halvings += 1
        for part in parts:
            self._answer(part, max(1, tokens // 2))

    def _run(self, chunk: EdgeChunk, tokens: int) -> None:
        """Takes all lanes of a chunk through the layers, each from its window's first layer on."""
        span, end = self._span(chunk.computed, chunk.cuts), self.vlm.layers - 1
        read = tuple(place for place in self.run.scored if place in set(chunk.computed))
        states = self.base.states[0].new_empty(len(chunk.lanes), len(chunk.computed), self.vlm.hidden)
        step, count = max(1, tokens // len(chunk.computed)), 0
        here = places(chunk.computed, read, states.device)
        enters = chunk.targets == chunk.computed  # then a lane's first layer is a layer like any other
        for layer in range(chunk.lanes[0].join, end + 1):
            joining = [lane for lane in chunk.lanes[count:] if lane.join == layer]
            starting = [count + number for number, lane in enumerate(joining) if lane.leader is None]
            if enters and starting:
                states[starting] = self.base.at(self.base.states[layer], chunk.computed)
            active = count + len(starting) if enters else count
            for start in range(0, active, step):
                part = slice(start, min(active, start + step))
                rows = span.rows([_cut_at(lane, layer) for lane in chunk.lanes[part]])
                if layer == end:
                    states[part, here] = self.replay.last_layer(states[part], rows, read)
                else:
                    states[part] = self.replay.layer(layer, states[part], rows)
            if starting and not enters:
                self._start(layer, chunk, starting, states)
            for number, lane in enumerate(joining):
                if lane.leader is not None:
                    states[count + number] = states[lane.leader]
            count += len(joining)
        self._finish(chunk, states[:, here], read)

    def _start(self, layer: int, chunk: EdgeChunk, slots: Sequence[int], states: Tensor) -> None:
        """Fills in the states (lane, position, hidden) with which lanes start: the layer's output, run at the targets."""
        targets = chunk.targets
        if layer == self.vlm.layers - 1:  # nothing follows but the scored positions' logits
            targets = tuple(place for place in targets if place in set(self.run.scored))
        states[slots] = self.base.at(self.base.states[layer + 1], chunk.computed)
        rows = self._span(targets, chunk.cuts).rows([chunk.lanes[slot].cell.cut for slot in slots])
        entering = self.base.at(self.base.states[layer], targets).expand(len(slots), -1, -1)
        where = torch.tensor([chunk.computed.index(place) for place in targets], device=states.device)
        into = torch.tensor(slots, device=states.device)[:, None]
        states[into, where] = self.replay.layer(layer, entering.contiguous(), rows)

    def _span(self, computed: tuple[int, ...], cuts: tuple[Cut, ...]) -> CutSpan:
        """The positions to compute, all others being the clean run's."""
        if (computed, cuts) not in self._spans:
            rest = tuple(sorted(set(self.base.positions) - set(computed)))
            self._spans[computed, cuts] = CutSpan(
                positions=computed,
                sources=(Source(run=self.base, positions=rest),),
                masks=self.replay.masks,
                cuts=cuts,
                heads=self.vlm.heads,
                device=self.vlm.device,
            )
        return self._spans[computed, cuts]

    def _finish(self, chunk: EdgeChunk, states: Tensor, read: tuple[int, ...]) -> None:
        """Scores lanes whose last states (lane, read position, hidden) are known."""
        step = self.settings.read_rows(self.vlm, len(self.run.scored))
        where = [self.run.scored.index(place) for place in read]
        for start in range(0, len(states), step):
            logits = self.base.logits.expand(len(states[start : start + step]), -1, -1).clone()
            logits[:, where] = self.replay.read(states[start : start + step])
            scores = self.measure(logits).double().cpu()
            self._found |= {
                lane.cell: score for lane, score in zip(chunk.lanes[start : start + step], scores, strict=True)
            }


def _cut_at(lane: Lane, layer: int) -> Cut | None:
    """The lane's cut where the layer belongs to its window."""
    return lane.cell.cut if layer <= lane.cell.last else None
