"""Recorded runs, the states or missing edges that lanes of a sweep meet on their way, and the file of those done."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from ...artefacts.results import load_fields, save_fields
from ...models import Site, VisionLanguageModel, patch
from ...models.families import Kind, Projection
from ...models.frame import Frame
from ...models.replay.observe import layers_without_attention
from ...models.replay.recording import Cut, CutSpan, Queries, Recording, Source, Span, neighbours, on_device, places
from ...models.replay.replay import Own, Replay
from .cells import Cell, Chunk, EdgeCell, Engine, Lane, Plan, Runs, StateCell, TraceError

_LAYOUT = "multrace sweep 2"
_SECONDS_BETWEEN_WRITES = 5.0
Target = Site | Projection
_Start = tuple[int, str, int | None]
"""A first layer, the kind of cell and the head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """The recorded runs that all cells of a sweep share."""

    full: Recording
    """The run that holds keys and values of all positions: the base or the source."""
    base: Recording
    source: Recording
    changed: tuple[int, ...]
    """Positions at which the two runs can differ, ascending."""
    alike_from: int = 0
    """The first layer after which both runs give the layers the same beside their states (DeepStack, Gemma 4, pictures
    that layers attend to)."""

    def span(self, replay: Replay, computed: tuple[int, ...], merged: Sequence[int]) -> Span:
        """Return the positions to compute, with the runs that hold all other keys (the source run for merged ones)."""
        by_run = {self.source: set(merged)}
        by_run[self.base] = set(self.changed) - set(computed) - set(merged)
        rest = set(self.full.positions) - set(computed).union(*by_run.values())
        by_run[self.full] = by_run.get(self.full, set()) | rest
        sources = [Source(run=run, positions=part) for run, held in by_run.items() for part in neighbours(sorted(held))]
        return replay.span(computed, sources)

    def own(self, replay: Replay, computed: tuple[int, ...], samples: int, lanes: int) -> Own:
        """Return what lending layers make of the base run: (sample, lane, head, position, size), by layer.

        It holds for a lane until the lane runs the layer itself.
        """
        own: Own = {}
        for layer, pair in replay.own_of(self.base, computed).items():
            keys, values = (part[:, None].expand(samples, lanes, *part.shape[1:]).clone() for part in pair)
            own[layer] = keys, values
        return own


def positions_differing(first: Tensor, second: Tensor) -> list[int]:
    """Return the positions at which states (row, token, hidden) differ in any row."""
    return (first != second).any(-1).any(0).nonzero().flatten().tolist()


def differing_in_layers(first: Frame, second: Frame, *, layers: int) -> dict[int, list[int]]:
    """Return the positions at which the frames give a layer something different, for each layer where there are any."""
    differing: dict[int, list[int]] = {}
    for number in range(layers):
        given = zip(first.entering_layer(number), second.entering_layer(number), strict=True)
        if positions := sorted({place for one, other in given for place in positions_differing(one, other)}):
            differing[number] = positions
    return differing


def needed_outputs(replay: Replay, cells: Sequence[StateCell]) -> tuple[list[Site], list[Projection]]:
    """Return the sites whose outputs, and the projections whose inputs, some cell patches in or freezes."""
    vlm = replay.vlm
    spans: dict[str, set[int]] = {}
    for cell in cells:
        spans.setdefault(cell.kind, set()).update(range(cell.first, cell.last + 1))
        if cell.severed:
            spans.setdefault(cell.severed, set()).update(range(cell.last + 1, vlm.layers))
    ends = {layer for cell in cells if cell.kind == "head" for layer in (cell.first, cell.last)}
    inside = spans.pop("head", set()).difference(layers_without_attention(vlm))
    projections = [vlm.attention_projection(layer) for layer in sorted(ends | inside)]
    spans.pop("hidden", None)  # the input states of layers are always kept
    return [Site(cast(Kind, kind), layer) for kind, layers in spans.items() for layer in sorted(layers)], projections


class States:
    """State cells in a sweep: the states in which their lanes start, and the states patched into later layers."""

    def __init__(
        self, replay: Replay, runs: Runs, cells: Sequence[StateCell], recorded: Recorded, settings: Engine
    ) -> None:
        self._replay, self._vlm, self._cells, self._settings = replay, replay.vlm, cells, settings
        self._samples, self._recorded = runs.samples, recorded
        self._headless = frozenset(layers_without_attention(replay.vlm))
        self._shared: dict[_Start, tuple[int, ...]] = {}
        self._kept: dict[_Start, Tensor] = {}
        self._span: tuple[tuple, Span] | None = None

    def prepare(self, plan: Plan) -> None:
        """Decide whether each first layer is computed once for the whole sweep, or once for each chunk."""
        starts: dict[_Start, set[int]] = {}
        for chunk in plan.chunks:
            for lane in chunk.lanes:
                if lane.leader is None and self._cells[lane.cell].kind != "hidden":
                    starts.setdefault(self._start(lane), set()).update(_put(lane, chunk))
        if self._settings.may_share(self._vlm, self._samples * sum(map(len, starts.values()))):
            self._shared = {start: tuple(sorted(each)) for start, each in starts.items()}

    @contextmanager
    def acting(self, layer: int, chunk: Chunk, lanes: Sequence[Lane], here: tuple[int, ...]) -> Iterator[Queries]:
        """Yield the span to compute, in a context in which the modules write the patched-in and frozen states."""
        writes = Writes(samples=self._samples, here=here)
        for row, lane in enumerate(lanes):
            cell = self._cells[lane.cell]
            if layer in self._replay.skipped:
                continue
            if cell.first < layer <= cell.last:
                if cell.kind == "head" and layer in self._headless:
                    continue
                writes.add(*_site(self._vlm, cell.kind, layer, cell.head), row, lane.live, self._recorded.source)
            elif cell.severed and layer > cell.last:
                writes.add(*_site(self._vlm, cell.severed, layer, None), row, lane.live, self._recorded.base)
        with writes.placed(self._vlm):
            yield self._span_of(chunk)

    def start(self, layer: int, chunk: Chunk, slots: Sequence[int], states: Tensor) -> None:
        """Fill in the states with which the lanes in these slots start, in states (sample, lane, position, hidden)."""
        members: dict[_Start, dict[int, list[int]]] = {}
        for slot in slots:
            lane = chunk.lanes[slot]
            if put := _put(lane, chunk):
                members.setdefault(self._start(lane), {})[slot] = put
        for start, each in members.items():
            positions = self._shared.get(start) or tuple(sorted({place for put in each.values() for place in put}))
            values = self._values(start, positions)
            for slot, put in each.items():
                here, there = (places(within, put, values.device) for within in (chunk.computed, positions))
                states[:, slot, here] = values[:, there]

    def scored_together(self, chunk: Chunk, active: int, step: int) -> list[list[int]]:
        """Return the slots whose logits are computed together: those of one last-layer call, and those starting after.

        Lanes that copy the last states of another lane get its scores.
        """
        parts = [list(range(start, min(active, start + step))) for start in range(0, active, step)]
        late = [slot for slot in range(active, len(chunk.lanes)) if chunk.lanes[slot].leader is None]
        return [*parts, late] if late else parts

    def _span_of(self, chunk: Chunk) -> Span:
        key = chunk.computed, chunk.merged
        if self._span is None or self._span[0] != key:
            self._span = key, self._recorded.span(self._replay, chunk.computed, chunk.merged)
        return self._span[1]

    def _values(self, start: _Start, positions: tuple[int, ...]) -> Tensor:
        """Return (sample or 1, position, hidden): a layer's output at some positions, all of which are patched.

        A state patched in at one position does not affect this layer's output at another, so the result is valid for
        every cell that starts here, whichever of these positions it patches.
        """
        layer, kind, head = start
        base, source = self._recorded.base, self._recorded.source
        if kind == "hidden":
            return source.at(source.states[layer + 1], positions)
        if start in self._kept:
            return self._kept[start]
        step, outputs = max(1, self._settings.call_tokens(self._vlm) // self._samples), []
        for first in range(0, len(positions), step):
            block = positions[first : first + step]
            writes = Writes(samples=self._samples, here=block)
            writes.add(*_site(self._vlm, kind, layer, head), 0, block, source)
            states = base.at(base.states[layer], block).expand(self._samples, -1, -1)
            with writes.placed(self._vlm):
                span, own = self._recorded.span(self._replay, block, ()), self._replay.own_of(base, block)
                outputs.append(self._replay.layer(layer, states, span, own))
        values = torch.cat(outputs, dim=1)
        if start in self._shared:
            self._kept[start] = values
        return values

    def _start(self, lane: Lane) -> _Start:
        cell = self._cells[lane.cell]
        return cell.first, cell.kind, cell.head


def _put(lane: Lane, chunk: Chunk) -> list[int]:
    """Return the positions at which a lane's states are patched in rather than taken from the source run."""
    merged = set(chunk.merged)
    return [place for place in lane.live if place not in merged]


def _site(vlm: VisionLanguageModel, kind: str, layer: int, head: int | None) -> tuple[Target, slice]:
    """Return the module in which a kind of cell writes in a layer, and the columns that it writes."""
    if kind != "head":
        return Site(cast(Kind, kind), layer), slice(None)
    projection = vlm.attention_projection(layer)
    size = projection.width // vlm.heads
    return projection, slice(head * size, (head + 1) * size)


@dataclass(kw_only=True, eq=False)
class Writes:
    """The values written into the modules of one layer during a call on rows in sample-major order."""

    samples: int
    here: tuple[int, ...]
    """Positions that the call computes, ascending."""
    _entries: dict[tuple[Target, int, int], list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, target: Target, columns: slice, lane: int, positions: Sequence[int], run: Recording) -> None:
        """Add the run's values of the target at these positions, as far as they are computed here, to one lane."""
        here = set(self.here)
        positions = [place for place in positions if place in here]
        if not positions:
            return
        if isinstance(target, Site) and target.kind == "hidden":
            stored = run.states[target.layer + 1]
        else:
            stored = run.outputs[target]
        values = run.at(stored, positions)[..., columns]
        start, stop, _ = columns.indices(stored.shape[-1])
        where = on_device(torch.tensor(_numbers(self.here, positions)), stored.device)
        self._entries.setdefault((target, start, stop), []).append((lane, where, values))

    @contextmanager
    def placed(self, vlm: VisionLanguageModel) -> Iterator[None]:
        """Return a context in which the values are written: to the outputs of sites and the inputs of projections."""
        outputs: dict[Target, list[tuple[int, int]]] = {}
        inputs: dict[Target, list[tuple[int, int]]] = {}
        for target, start, stop in self._entries:
            (outputs if isinstance(target, Site) else inputs).setdefault(target, []).append((start, stop))
        with patch(vlm, {target: self._function(target, each) for target, each in outputs.items()}):
            with patch(vlm, {target: self._function(target, each) for target, each in inputs.items()}, inputs=True):
                yield

    def _function(self, target: Target, columns: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
        gathered = []
        for start, stop in columns:
            entries = self._entries[target, start, stop]
            lanes = torch.cat([torch.full_like(where, lane) for lane, where, _ in entries])
            where = torch.cat([where for _, where, _ in entries])
            values = torch.cat([values.expand(self.samples, -1, -1) for _, _, values in entries], dim=1)
            gathered.append((slice(start, stop), lanes, where, values))

        def write(output: Tensor) -> Tensor:
            changed = rearrange(output, "(s c) t w -> s c t w", s=self.samples).clone()
            for part, lanes, where, values in gathered:
                changed[:, lanes.to(output.device), where.to(output.device), part] = values.to(output.device)
            return rearrange(changed, "s c t w -> (s c) t w")

        return write


def _numbers(within: Sequence[int], positions: Sequence[int]) -> list[int]:
    number = {place: index for index, place in enumerate(within)}
    return [number[place] for place in positions]


# ---- edge cells ----


class Edges:
    """Edge cells in a sweep: the states in which their lanes start, and the edges missing in their windows.

    In a window's first layer only the targets differ from the recorded run; in later layers, every position that sees
    them.
    """

    def __init__(self, replay: Replay, runs: Runs, cells: Sequence[EdgeCell], recorded: Recorded) -> None:
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
        where = on_device(torch.tensor([chunk.computed.index(place) for place in targets]), states.device)
        into = on_device(torch.tensor(slots), states.device)[:, None]
        own = self._replay.own_of(self._base, targets)
        mine = {
            number: (keys.expand(len(slots), -1, -1, -1), values.expand(len(slots), -1, -1, -1))
            for number, (keys, values) in own.items()
        }
        states[0, into, where] = self._replay.layer(layer, entering.contiguous(), rows, mine)

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


# ---- what is already computed ----


@dataclass(frozen=True, kw_only=True, eq=False)
class _Finished:
    """The contents of a checkpoint."""

    identity: str
    """Digest of the cells, batches and runs of a sweep."""
    finished: Tensor
    """(chunk,) uint8: 1 where all cells of the chunk have their scores."""
    scores: Tensor
    """(cell, metric, sample) float64."""


class Checkpoint:
    """The file with the finished cells of one sweep; without a path, nothing is kept."""

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._identity = ""
        self._scores: Tensor | None = None
        self._finished = torch.zeros(0, dtype=torch.bool)
        self._earlier: Tensor | None = None
        self._written = time.monotonic()

    def open(self, cells: Sequence[Cell], chunks: Sequence[Chunk], runs: Tensor) -> None:
        """Read the finished cells of an earlier sweep with the same cells, batches and runs (compared by their scores).

        Raises `TraceError` if the file belongs to another sweep, and `ArtefactError` if it is damaged.
        """
        lanes = [(chunk.computed, chunk.merged, [lane.cell for lane in chunk.lanes]) for chunk in chunks]
        text = repr(([cell.identity for cell in cells], lanes)).encode() + runs.double().contiguous().numpy().tobytes()
        self._identity = hashlib.sha256(text).hexdigest()
        self._finished = torch.zeros(len(chunks), dtype=torch.bool)
        if self._path is None or not self._path.exists():
            return
        earlier = load_fields(self._path, _LAYOUT, _Finished)
        if earlier.identity != self._identity:
            raise TraceError(
                f"{str(self._path)!r} holds cells of another trace (another prompt, model, corruption, kind of cell or "
                "memory setting); trace with the same settings to go on, or name another file"
            )
        self._finished, self._earlier = earlier.finished.bool(), earlier.scores

    @contextmanager
    def writing(self, scores: Tensor) -> Iterator[None]:
        """Return a context for filling in scores (cell, metric, sample); it saves finished ones even if interrupted."""
        self._scores = scores
        try:
            yield
        finally:
            self._write()

    def restore(self, number: int, chunk: Chunk, scores: Tensor) -> bool:
        """Return whether the chunk was finished earlier, and fill in its scores if so."""
        if not self._finished[number] or self._earlier is None:
            return False
        cells = [lane.cell for lane in chunk.lanes]
        scores[cells] = self._earlier[cells]
        return True

    def finish(self, number: int) -> None:
        """Mark a chunk as finished, and write the file from time to time."""
        self._finished[number] = True
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if self._path is None or self._scores is None:
            return
        finished = _Finished(identity=self._identity, finished=self._finished.to(torch.uint8), scores=self._scores)
        save_fields(self._path, _LAYOUT, finished)
        self._written = time.monotonic()
