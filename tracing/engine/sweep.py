"""The exact fast sweep: each cell computes only the layers and positions that it can change.

A cell starts at the output of its first layer, which the base run already holds but for the positions that are put in;
keys and values of all positions that it cannot change come from the two recorded runs, shared by all cells.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ...models.replay.recording import places
from ...models.replay.replay import Replay, Work, replaying
from ..errors import TraceError
from .cells import Cell, Measure, Runs
from .checkpoint import Checkpoint
from .plan import Chunk, Lane, halved, make_plan
from .recorded import Recorded, record
from .settings import Engine, is_out_of_memory
from .starts import Starts, site
from .writes import Writes


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """What a sweep found, and what it cost."""

    scores: Tensor
    """(cell, metric, sample) float64 on the CPU."""
    base: Tensor
    """(metric, sample): scores of the base run."""
    source: Tensor
    """(metric, sample): scores of the source run."""
    free: Tensor
    """(cell,) booleans: answered without computing anything."""
    recording: Work
    """What recording the two runs has cost; all maps of a trace share it."""
    work: Work
    """What the cells have cost beyond that."""
    halvings: int
    """How often a batch was halved because memory ran out."""


def sweep(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    settings: Engine | None = None,
    accept: Callable[[Tensor, Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> Swept:
    """The scores of every cell, equal to `plain_scores` but for rounding.

    accept: is shown the scores (metric, sample) of base and source before any cell is computed, and may raise.
    Finished cells are kept in the settings' checkpoint, which is read first and written on the way, also when
    interrupted. ReplayError for a model whose layers cannot be replayed; TraceError if memory runs out for one cell.
    """
    settings = settings or Engine()
    with torch.no_grad(), replaying(vlm) as replay:
        try:
            recorded = record(replay, runs, cells)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TraceError(
                f"memory ran out while recording the two runs ({runs.length} tokens, {runs.samples} samples); trace "
                "with fewer samples, or on a device with more memory"
            ) from error
        swept = _Sweep(replay, runs, cells, measure, settings, recorded)
        base, source = (swept.score(each.logits) for each in (recorded.base, recorded.source))
        if accept is not None:
            accept(base, source)
        return swept.run(base, source, Checkpoint(settings.checkpoint), bar)


class _Sweep:
    """One sweep on its way."""

    def __init__(
        self,
        replay: Replay,
        runs: Runs,
        cells: Sequence[Cell],
        measure: Measure,
        settings: Engine,
        recorded: Recorded,
    ) -> None:
        self.replay, self.runs, self.cells, self.measure, self.settings = replay, runs, cells, measure, settings
        self.recorded, self.vlm, self.halvings = recorded, replay.vlm, 0
        self.starts = Starts(replay, runs, cells, recorded, settings)

    def run(self, base: Tensor, source: Tensor, checkpoint: Checkpoint, bar: tqdm | None) -> Swept:
        """Plans, answers what is free, and then chunk after chunk."""
        plan = make_plan(
            self.cells,
            masks=self.replay.masks,
            changed=self.recorded.changed,
            scored=self.runs.scored,
            frozen=self.runs.frozen,
            lane_tokens=self.settings.lane_tokens(self.vlm, self.runs.samples),
        )
        recording, self.replay.work = self.replay.work, Work()
        scores = torch.full((len(self.cells), *base.shape), torch.nan, dtype=torch.float64)
        free = torch.zeros(len(self.cells), dtype=torch.bool)
        for number, merged in plan.free.items():
            scores[number] = self.score(self._spliced(None, merged, ())) if merged else base
            free[number] = True
        self.starts.share(plan)
        checkpoint.open(self.cells, plan.chunks, torch.stack([base, source]))
        if bar is not None:
            bar.update(len(plan.free))
        with checkpoint.writing(scores):
            for number, chunk in enumerate(plan.chunks):
                if not checkpoint.restore(number, chunk, scores):
                    self._answer(chunk, scores, self.settings.call_tokens(self.vlm))
                    checkpoint.finish(number)
                if bar is not None:
                    bar.update(len(chunk.lanes))
        return Swept(
            scores=scores,
            base=base,
            source=source,
            free=free,
            recording=recording,
            work=self.replay.work,
            halvings=self.halvings,
        )

    def _answer(self, chunk: Chunk, scores: Tensor, tokens: int) -> None:
        """Answers a chunk; where memory runs out, its halves with half as many tokens per call."""
        try:
            self._run(chunk, scores, tokens)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            parts = halved(chunk, self.cells)
            if len(parts) == 1 and tokens <= len(chunk.computed):
                raise TraceError(
                    f"memory ran out for a single cell ({len(chunk.computed)} tokens, {self.runs.samples} samples); "
                    "trace with fewer samples, or on a device with more memory"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halvings += 1
        for part in parts:
            self._answer(part, scores, max(1, tokens // 2))

    def _run(self, chunk: Chunk, scores: Tensor, tokens: int) -> None:
        """Takes all lanes of a chunk through the layers, each from the layer after which it joins."""
        samples, length, end = self.runs.samples, len(chunk.computed), self.vlm.layers - 1
        span = self.recorded.span(self.replay, chunk.computed, chunk.merged)
        read = tuple(place for place in self.runs.scored if place in set(chunk.computed))
        states = self.recorded.base.states[0].new_empty(samples, len(chunk.lanes), length, self.vlm.hidden)
        step, count = max(1, tokens // (samples * length)), 0
        for layer in range(chunk.lanes[0].join, end + 1):
            for start in range(0, count, step):
                lanes = chunk.lanes[start : min(count, start + step)]
                rows = rearrange(states[:, start : start + len(lanes)], "s c t d -> (s c) t d")
                with self._putting(layer, lanes, read if layer == end else chunk.computed):
                    if layer == end:
                        self._finish(chunk, lanes, self.replay.last_layer(rows, span, read), read, scores)
                    else:
                        output = self.replay.layer(layer, rows, span)
                        states[:, start : start + len(lanes)] = rearrange(output, "(s c) t d -> s c t d", s=samples)
            joining = [lane for lane in chunk.lanes[count:] if lane.join == layer]
            self._join(layer, chunk, joining, states[:, count : count + len(joining)], states)
            if layer == end:
                self._finish_joined(chunk, joining, states[:, count:], read, scores)
            count += len(joining)

    def _join(self, layer: int, chunk: Chunk, lanes: Sequence[Lane], target: Tensor, states: Tensor) -> None:
        """Fills in the states (sample, lane, position, hidden) with which lanes start: this layer's output."""
        starting = [slot for slot, lane in enumerate(lanes) if lane.leader is None]
        if starting:
            base = self.recorded.base
            target[:, starting] = base.at(base.states[layer + 1], chunk.computed).unsqueeze(1)
        for put, values in self.starts.fill(chunk, {slot: lanes[slot] for slot in starting}):
            for slot, (here, there) in put.items():
                target[:, slot, here] = values[:, there]
        for slot, lane in enumerate(lanes):
            if lane.leader is not None:
                target[:, slot] = states[:, lane.leader]

    def _putting(self, layer: int, lanes: Sequence[Lane], here: tuple[int, ...]) -> AbstractContextManager[None]:
        """A block in which the layer's modules write what these lanes put in and freeze at the positions computed."""
        writes = Writes(samples=self.runs.samples, here=here)
        for row, lane in enumerate(lanes):
            cell = self.cells[lane.cell]
            if cell.first < layer <= cell.last:
                writes.add(*site(self.vlm, cell.kind, layer, cell.head), row, lane.live, self.recorded.source)
            elif cell.severed and layer > cell.last:
                writes.add(*site(self.vlm, cell.severed, layer, None), row, lane.live, self.recorded.base)
        return writes.placed(self.vlm)

    def _finish(
        self, chunk: Chunk, lanes: Sequence[Lane], states: Tensor, read: tuple[int, ...], scores: Tensor
    ) -> None:
        """Scores lanes whose last states (row, read position, hidden) are known."""
        step = self.settings.read_rows(self.vlm, len(self.runs.scored))
        owners = torch.arange(len(states), device=states.device) // len(lanes)
        parts = []
        for start in range(0, len(states), step):
            logits = self.replay.read(states[start : start + step])
            spliced = self._spliced((read, logits), chunk.merged, owners[start : start + step])
            parts.append(self.measure(spliced).double().cpu())
        scores[[lane.cell for lane in lanes]] = rearrange(torch.cat(parts), "(s c) m -> c m s", c=len(lanes))

    def _finish_joined(
        self, chunk: Chunk, lanes: Sequence[Lane], states: Tensor, read: tuple[int, ...], scores: Tensor
    ) -> None:
        """Scores lanes that join after the last layer, (sample, lane, position, hidden) holding their result."""
        slots = [slot for slot, lane in enumerate(lanes) if lane.leader is None]
        if slots:
            last = states[:, slots][:, :, places(chunk.computed, read, states.device)]
            rows = rearrange(last, "s c t d -> (s c) t d")
            self._finish(chunk, [lanes[slot] for slot in slots], rows, read, scores)
        for lane in lanes:
            if lane.leader is not None:
                scores[lane.cell] = scores[chunk.lanes[lane.leader].cell]

    def _spliced(
        self, computed: tuple[tuple[int, ...], Tensor] | None, merged: Sequence[int], owners: Tensor | Sequence[int]
    ) -> Tensor:
        """(row, scored position, vocab): computed logits, the source run's where merged, the base run's elsewhere."""
        scored = self.runs.scored
        if computed is not None and len(computed[0]) == len(scored):
            return computed[1]
        base, source = (
            each.logits.expand(self.runs.samples, -1, -1) for each in (self.recorded.base, self.recorded.source)
        )
        logits = base.clone() if computed is None else base[owners]
        lent = [index for index, place in enumerate(scored) if place in set(merged)]
        if lent:
            logits[:, lent] = source[:, lent] if computed is None else source[owners][:, lent]
        if computed is not None:
            logits[:, [scored.index(place) for place in computed[0]]] = computed[1]
        return logits

    def score(self, logits: Tensor) -> Tensor:
        """(metric, sample) float64 on the CPU."""
        return self.measure(logits.expand(self.runs.samples, -1, -1)).double().T.cpu()
