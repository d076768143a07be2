"""The plan of a sweep: which cells cost nothing, which positions the others change, and which of them run together.

Pure bookkeeping over positions and layers; nothing here computes a state.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...models.replay.cuts import Cut
from ...models.replay.recording import Masks
from ..errors import TraceError
from .cells import Cell, EdgeCell, StateCell, all_edges


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one cell changes in the base run."""

    computed: tuple[int, ...]
    """Positions whose states must be computed anew, ascending."""
    merged: tuple[int, ...] = ()
    """Positions that follow the source run from the cell's first layer on."""
    live: tuple[int, ...] = ()
    """Positions at which states are put in that differ between the runs."""
    cut: Cut | None = None
    """The edges of an edge cell that the model has at all."""
    reached: tuple[int, ...] = ()
    """Positions whose last state can differ from both runs, ascending."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One cell's way through the layers."""

    cell: int
    """Its number among all cells."""
    join: int
    """The layer after which it starts, -1 for what enters the first one."""
    leader: int | None
    """The lane of its chunk whose states it copies there, since both are the same so far; None: it starts by itself."""
    live: tuple[int, ...] = ()
    """Positions at which a state cell puts states in."""
    cut: Cut | None = None
    """Edges that an edge cell lacks."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lanes that run together: they change the same positions and leave the same ones to the same runs."""

    computed: tuple[int, ...]
    merged: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    """Positions that lack edges, the same for all lanes; empty for state cells."""
    lanes: tuple[Lane, ...]
    """In the order in which they join."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The different cuts of its lanes."""
        return tuple(dict.fromkeys(lane.cut for lane in self.lanes if lane.cut is not None))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The way in which a sweep answers its cells."""

    chunks: tuple[Chunk, ...]
    free: dict[int, tuple[int, ...]]
    """Cells that need no computation: the scored positions that take the source run's logits; others the base's."""
    copies: dict[int, int] = field(default_factory=dict)
    """Edge cells that lack the same edges as an earlier one, whose scores they share."""


class _Member(NamedTuple):
    """A cell of a chunk, by its number, and what it does there."""

    cell: int
    live: tuple[int, ...]
    cut: Cut | None


_Group = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Positions computed, merged and cut off, which the lanes of a chunk have in common."""


def make_plan(
    cells: Sequence[Cell],
    *,
    masks: Masks,
    changed: Collection[int],
    scored: Collection[int],
    frozen: Collection[int] = (),
    lane_tokens: int,
) -> Plan:
    """The plan for these cells; a chunk holds at most `lane_tokens` computed positions over its lanes, or one lane.

    changed: positions at which the two runs can differ at all. Raises `TraceError` if an edge cell leaves a token that
    would see nothing.
    """
    if all_edges(cells):
        effects, copies = _edge_effects(cells, masks)
    else:
        effects, copies = dict(enumerate(_state_effects(cells, masks, changed, frozen))), {}
    free: dict[int, tuple[int, ...]] = {}
    groups: dict[_Group, list[_Member]] = {}
    for number, effect in effects.items():
        if not set(effect.reached) & set(scored):
            free[number] = tuple(position for position in scored if position in effect.merged)
        else:
            targets = () if effect.cut is None else tuple(sorted(effect.cut.targets))
            member = _Member(cell=number, live=effect.live, cut=effect.cut)
            groups.setdefault((effect.computed, effect.merged, targets), []).append(member)
    chunks = [
        chunk
        for group, members in groups.items()
        for chunk in _chunks(group, members, cells, max(1, lane_tokens // len(group[0])))
    ]
    free |= {number: free[other] for number, other in copies.items() if other in free}
    copies = {number: other for number, other in copies.items() if other not in free}
    return Plan(chunks=tuple(chunks), free=free, copies=copies)


def single(cell: int) -> Chunk:
    """A chunk for one cell that is answered on its own, by whatever way."""
    return Chunk(computed=(), lanes=(Lane(cell=cell, join=0, leader=None),))


def halved(chunk: Chunk, cells: Sequence[Cell]) -> tuple[Chunk, ...]:
    """The chunk in two parts, or as it is if it has one lane."""
    if len(chunk.lanes) == 1:
        return (chunk,)
    members = [_Member(cell=lane.cell, live=lane.live, cut=lane.cut) for lane in chunk.lanes]
    return tuple(_chunks((chunk.computed, chunk.merged, chunk.targets), members, cells, (len(members) + 1) // 2))


# ---- what a cell changes ----


def effect_of(cell: StateCell, *, masks: Masks, changed: Collection[int], frozen: Collection[int] = ()) -> Effect:
    """The positions that a state cell changes, where `changed` are those at which the two runs can differ at all."""
    live = tuple(sorted(set(cell.positions) & set(changed)))
    reached = set(masks.reach(live, cell.first + 1))
    if cell.is_direct:
        reached -= set(frozen) - set(live)
    merged: set[int] = set()
    if cell.kind == "hidden" and cell.severed is None and not cell.is_direct:
        merged = _merged(live, masks, changed, cell.first + 1)
    computed = tuple(sorted(reached - merged))
    return Effect(computed=computed, merged=tuple(sorted(merged)), live=live, reached=computed)


def touched(
    cells: Sequence[StateCell], *, masks: Masks, changed: Collection[int], frozen: Collection[int] = ()
) -> tuple[int, ...]:
    """Positions whose states some cell computes or lends, ascending: all that need be kept of the two runs."""
    found: set[int] = set()
    for effect in {id(each): each for each in _state_effects(cells, masks, changed, frozen)}.values():
        found.update(effect.computed, effect.live)
    return tuple(sorted(found))


def _state_effects(
    cells: Sequence[StateCell], masks: Masks, changed: Collection[int], frozen: Collection[int]
) -> list[Effect]:
    """Each cell's effect; cells that differ in nothing that matters for it share one."""
    known: dict[tuple, Effect] = {}
    effects = []
    for cell in cells:
        key = (cell.positions, cell.first, cell.kind == "hidden", cell.severed, cell.is_direct)
        if key not in known:
            known[key] = effect_of(cell, masks=masks, changed=changed, frozen=frozen)
        effects.append(known[key])
    return effects


def _merged(live: Collection[int], masks: Masks, changed: Collection[int], first: int) -> set[int]:
    """Live positions that see, from layer `first` on, no changed position that is not live too and merged itself."""
    merged = set(live)
    while merged:
        spoilt = set(masks.reach(set(changed) - merged, first)) & merged
        if not spoilt:
            break
        merged -= spoilt
    return merged


def _edge_effects(cells: Sequence[EdgeCell], masks: Masks) -> tuple[dict[int, Effect], dict[int, int]]:
    """Effects by number of all edge cells that differ, and for each other one the number of the cell it equals.

    Targets and sources that the model keeps apart anyway, in all layers of a cell's window, play no part.
    """
    known: dict[tuple[Cut, frozenset[int]], Cut] = {}
    numbers: dict[tuple, int] = {}
    effects, copies = {}, {}
    for number, cell in enumerate(cells):
        kinds = {id(masks.layers[layer]): layer for layer in range(cell.first, cell.last + 1)}
        key = cell.cut, frozenset(kinds)
        if key not in known:
            known[key] = _effective(cell.cut, masks, kinds.values())
        same = numbers.setdefault((known[key], cell.first, cell.last, cell.is_dropped), number)
        if same == number:
            effects[number] = _edge_effect(cell, known[key], masks)
        else:
            copies[number] = same
    return effects, copies


def _edge_effect(cell: EdgeCell, cut: Cut, masks: Masks) -> Effect:
    """What changes if the edges of this cut are missing in the cell's layers."""
    reached = set(masks.reach(cut.targets, cell.first + 1)) | cut.targets
    # The last layer has none after it: what can change there does not depend on where the window begins.
    computed = set(masks.reach(cut.targets, min(cell.first + 1, len(masks.layers) - 1))) | cut.targets
    if cell.is_dropped:
        computed -= cut.sources
    return Effect(computed=tuple(sorted(computed)), cut=cut, reached=tuple(sorted(reached)))


def _effective(cut: Cut, masks: Masks, layers: Collection[int]) -> Cut:
    """The cut without edges that are in none of these layers. Raises `TraceError` if a target would see nothing."""
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


# ---- which cells run together ----


def _chunks(group: _Group, members: Sequence[_Member], cells: Sequence[Cell], size: int) -> list[Chunk]:
    """Members of a group as chunks of at most `size` lanes.

    State cells of one family stay together if they fit; edge cells are cut into pieces in their order.
    """
    members = sorted(members, key=lambda member: _order(member, cells))
    families: dict[tuple, list[_Member]] = {}
    for member in members:
        families.setdefault(_family(member, cells) if member.cut is None else (), []).append(member)
    pieces = [
        family[start : start + size]
        for _, family in sorted(families.items(), key=lambda item: item[0])
        for start in range(0, len(family), size)
    ]
    parts: list[list[_Member]] = []
    for piece in pieces:
        if not parts or len(parts[-1]) + len(piece) > size:
            parts.append([])
        parts[-1] += piece
    computed, merged, targets = group
    # Where all that a cut changes is its targets, its first layer runs as any other: a lane starts with what enters it.
    starts = {member.cell: cells[member.cell].first - (targets == computed) for member in members}
    return [
        Chunk(computed=computed, merged=merged, targets=targets, lanes=_lanes(part, cells, starts)) for part in parts
    ]


def _family(member: _Member, cells: Sequence[Cell]) -> tuple:
    """What cells have in common that do the same up to the end of the shortest of their windows."""
    cell = cells[member.cell]
    if isinstance(cell, EdgeCell):
        return member.cut, cell.first
    return cell.first, cell.kind, cell.head or 0, member.live, cell.positions


def _order(member: _Member, cells: Sequence[Cell]) -> tuple:
    """The order of lanes that join at the same layer."""
    cell = cells[member.cell]
    if isinstance(cell, EdgeCell) and member.cut is not None:
        return cell.first, tuple(sorted(member.cut.sources)), member.cut.heads, -cell.last
    return (member.cell,)


def _lanes(members: Sequence[_Member], cells: Sequence[Cell], starts: Mapping[int, int]) -> tuple[Lane, ...]:
    """The lanes of these members in the order in which they join.

    Of a family the widest window leads, and the others leave it where their own window ends. A state cell of a single
    layer has nothing to gain from that, since starts are shared anyway.
    """
    leaders: dict[tuple, int] = {}
    for member in members:
        key = _family(member, cells)
        leaders[key] = max(leaders.get(key, member.cell), member.cell, key=lambda number: cells[number].last)
    waiting = []
    for rank, member in enumerate(sorted(members, key=lambda member: _order(member, cells))):
        cell, leader = cells[member.cell], leaders[_family(member, cells)]
        leads = member.cell == leader or (isinstance(cell, StateCell) and cell.first == cell.last)
        waiting.append((cell.first if leads else cell.last, not leads, rank, member, leader))
    waiting.sort(key=lambda lane: lane[:3])
    slots = {member.cell: slot for slot, (*_, member, _) in enumerate(waiting)}
    return tuple(
        Lane(cell=member.cell, join=last, leader=slots[leader], live=member.live, cut=member.cut)
        if follows
        else Lane(cell=member.cell, join=starts[member.cell], leader=None, live=member.live, cut=member.cut)
        for last, follows, _, member, leader in waiting
    )
