"""The states with which cells start: a first layer's output, with the source run's states put in."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...models import Site, VisionLanguageModel
from ...models.replay.recording import Index, places
from ...models.replay.replay import Replay
from .cells import Cell, Runs
from .plan import Chunk, Lane, Plan
from .recorded import Recorded
from .settings import Engine
from .writes import Target, Writes

_Start = tuple[int, str, int | None]
"""A first layer, the kind of cell and the head."""


def site(vlm: VisionLanguageModel, kind: str, layer: int, head: int | None) -> tuple[Target, slice]:
    """Where a kind of cell writes in a layer, and which columns there."""
    if kind != "head":
        return Site(kind, layer), slice(None)
    projection = vlm.attention_projection(layer)
    size = projection.width // vlm.heads
    return projection, slice(head * size, (head + 1) * size)


class Starts:
    """Computes each start once for all cells, if memory allows it, else once for each chunk."""

    def __init__(self, replay: Replay, runs: Runs, cells: Sequence[Cell], recorded: Recorded, settings: Engine) -> None:
        self._replay, self._vlm, self._cells, self._settings = replay, replay.vlm, cells, settings
        self._samples, self._recorded = runs.samples, recorded
        self._shared: dict[_Start, tuple[int, ...]] = {}
        self._kept: dict[_Start, Tensor] = {}

    def share(self, plan: Plan) -> None:
        """Decides, for all cells of a plan, whether first layers are kept for the whole sweep."""
        wanted: dict[_Start, set[int]] = {}
        for chunk in plan.chunks:
            for lane in chunk.lanes:
                if lane.leader is None and self._cells[lane.cell].kind != "hidden":
                    wanted.setdefault(self._start(lane), set()).update(_put(lane, chunk))
        if self._settings.may_share(self._vlm, self._samples * sum(map(len, wanted.values()))):
            self._shared = {start: tuple(sorted(each)) for start, each in wanted.items()}

    def fill(self, chunk: Chunk, lanes: Mapping[int, Lane]) -> Iterator[tuple[dict[int, tuple[Index, Index]], Tensor]]:
        """(where, values) for the lanes that start in one layer, by kind of cell.

        values (sample or 1, position, hidden); where: for each lane's slot the places among the chunk's positions that
        are overwritten, and the places of their values.
        """
        members: dict[_Start, dict[int, list[int]]] = {}
        for slot, lane in lanes.items():
            if put := _put(lane, chunk):
                members.setdefault(self._start(lane), {})[slot] = put
        for start, each in members.items():
            wanted = self._shared.get(start) or tuple(sorted({place for put in each.values() for place in put}))
            values = self._values(start, wanted)
            yield (
                {
                    slot: (places(chunk.computed, put, values.device), places(wanted, put, values.device))
                    for slot, put in each.items()
                },
                values,
            )

    def _values(self, start: _Start, wanted: tuple[int, ...]) -> Tensor:
        """(sample or 1, position, hidden): a layer's output at some positions if states are put in at all of them.

        What is put in at one position does not touch this layer's output at another one, so it is right for every
        cell that starts here, whichever of these positions it puts in.
        """
        layer, kind, head = start
        base, source = self._recorded.base, self._recorded.source
        if kind == "hidden":
            return source.at(source.states[layer + 1], wanted)
        if start in self._kept:
            return self._kept[start]
        step, outputs = max(1, self._settings.call_tokens(self._vlm) // self._samples), []
        for first in range(0, len(wanted), step):
            block = wanted[first : first + step]
            writes = Writes(samples=self._samples, here=block)
            writes.add(*site(self._vlm, kind, layer, head), 0, block, source)
            states = base.at(base.states[layer], block).expand(self._samples, -1, -1)
            with writes.placed(self._vlm):
                outputs.append(self._replay.layer(layer, states, self._recorded.span(self._replay, block, ())))
        values = torch.cat(outputs, dim=1)
        if start in self._shared:
            self._kept[start] = values
        return values

    def _start(self, lane: Lane) -> _Start:
        cell = self._cells[lane.cell]
        return cell.first, cell.kind, cell.head


def _put(lane: Lane, chunk: Chunk) -> list[int]:
    """Positions at which a lane's states are put in, rather than left to the source run."""
    merged = set(chunk.merged)
    return [place for place in lane.live if place not in merged]
