"""What a knockout cuts: attention edges in a window of layers; and which cells cost nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...models.replay.cuts import Cut
from ...models.replay.recording import Masks
from ..errors import TraceError


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeRun:
    """The run in which edges are cut."""

    embeddings: Tensor
    """(1, token, hidden)"""
    scored: tuple[int, ...]
    """Positions whose logits are scored, ascending."""
    keywords: Mapping[str, Tensor] = field(default_factory=dict)
    """attention_mask (1, 1, token, token) and position_ids (1, token), where the model's own are not meant."""

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.embeddings.shape[1]


@dataclass(frozen=True, kw_only=True)
class EdgeCell:
    """Edges that are missing in the layers first to last, both included."""

    cut: Cut
    first: int
    last: int
    is_dropped: bool = False
    """The sources are gone from the first layer on: all that sees them is among the targets, up to the last layer, so
    nothing needs their own states any more."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One cell's way through the layers."""

    cell: EdgeCell
    join: int
    """The layer after which it starts."""
    leader: int | None
    """The lane whose states it copies there, since both lack the same edges so far; None: it starts by itself."""


@dataclass(frozen=True, kw_only=True)
class EdgeChunk:
    """Lanes that run together: their targets, and with them the positions that they change, are the same."""

    targets: tuple[int, ...]
    computed: tuple[int, ...]
    lanes: tuple[Lane, ...]
    """In the order in which they join."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The different cuts of its cells."""
        return tuple(dict.fromkeys(lane.cell.cut for lane in self.lanes))

    def halves(self) -> tuple["EdgeChunk", ...]:
        """The chunk in two parts, or as it is if it has one cell."""
        cells = [lane.cell for lane in self.lanes]
        middle = (len(cells) + 1) // 2
        if len(cells) == 1:
            return (self,)
        return tuple(
            EdgeChunk(targets=self.targets, computed=self.computed, lanes=_lanes(part))
            for part in (cells[:middle], cells[middle:])
        )


def effective_cells(cells: Sequence[EdgeCell], masks: Masks) -> dict[EdgeCell, EdgeCell]:
    """Each cell without the targets and sources that the model keeps apart anyway in all layers of its window.

    TraceError if a target would see nothing at all: attention has no meaning then.
    """
    known: dict[tuple[Cut, frozenset[int]], Cut] = {}
    found = {}
    for cell in dict.fromkeys(cells):
        kinds = {id(masks.layers[layer]): layer for layer in range(cell.first, cell.last + 1)}
        key = cell.cut, frozenset(kinds)
        if key not in known:
            known[key] = _effective(cell.cut, masks, kinds.values())
        found[cell] = replace(cell, cut=known[key])
    return found


def _effective(cut: Cut, masks: Masks, layers: Collection[int]) -> Cut:
    """The cut without edges that are in none of these layers."""
    sources, targets = (torch.tensor(sorted(each), dtype=torch.long) for each in (cut.sources, cut.targets))
    met = torch.zeros(len(targets), len(sources), dtype=torch.bool)
    for layer in layers:
        mask = masks.layers[layer]
        everything = torch.arange(masks.length)
        device = targets.device if mask is None else mask.device
        seen = masks.block(layer, targets.to(device), everything.to(device)).cpu()
        if bool((seen.sum(1) == seen[:, sources].sum(1)).any()):
            raise TraceError(
                "some token would see nothing at all, not even itself, if these edges were cut; leave it out of the "
                "targets, or itself or the first token out of the sources"
            )
        met |= seen[:, sources]
    return Cut(
        sources=frozenset(sources[met.any(0)].tolist()),
        targets=frozenset(targets[met.any(1)].tolist()),
        heads=cut.heads,
    )


def plan_edges(
    cells: Sequence[EdgeCell], *, masks: Masks, scored: Collection[int], lane_tokens: int
) -> tuple[tuple[EdgeChunk, ...], frozenset[EdgeCell]]:
    """Chunks that hold each different cell once, and the cells that change no scored position.

    cells: effective ones. A chunk holds at most `lane_tokens` computed positions over its lanes, or one lane.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[EdgeCell]] = {}
    free = set()
    for cell in dict.fromkeys(cells):
        targets = tuple(sorted(cell.cut.targets))
        reached = set(masks.reach(targets, cell.first + 1)) | set(targets)
        if not reached & set(scored):
            free.add(cell)
            continue
        # the last layer has none after it: there, what can change does not depend on where the window begins
        computed = set(masks.reach(targets, min(cell.first + 1, len(masks.layers) - 1))) | set(targets)
        if cell.is_dropped:
            computed -= cell.cut.sources
        groups.setdefault((targets, tuple(sorted(computed))), []).append(cell)
    chunks = []
    for (targets, computed), members in groups.items():
        members.sort(key=lambda cell: (cell.first, _order(cell), -cell.last))
        size = max(1, lane_tokens // len(computed))
        parts = [members[start : start + size] for start in range(0, len(members), size)]
        chunks += [EdgeChunk(targets=targets, computed=computed, lanes=_lanes(part)) for part in parts]
    return tuple(chunks), frozenset(free)


def _order(cell: EdgeCell) -> tuple:
    return tuple(sorted(cell.cut.sources)), cell.cut.heads


def _lanes(cells: Sequence[EdgeCell]) -> tuple[Lane, ...]:
    """Lanes in the order in which they join; of cells that begin alike, the widest leads and the others leave it."""
    leaders: dict[tuple[Cut, int], EdgeCell] = {}
    for cell in cells:
        key = cell.cut, cell.first
        leaders[key] = max(leaders.get(key, cell), cell, key=lambda each: each.last)
    waiting = [(cell, leaders[cell.cut, cell.first]) for cell in cells]
    order = sorted(
        waiting, key=lambda pair: (pair[0].first if pair[0] is pair[1] else pair[0].last, pair[0] is not pair[1])
    )
    slots = {cell: slot for slot, (cell, _) in enumerate(order)}
    return tuple(
        Lane(cell=cell, join=cell.first, leader=None)
        if cell is leader
        else Lane(cell=cell, join=cell.last, leader=slots[leader])
        for cell, leader in order
    )
