"""The plan of a sweep: which cells cost nothing, which positions the others change, and which of them run together.

Pure bookkeeping over positions and layers; nothing here computes a state.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...models.replay.recording import Masks
from .cells import Cell


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one cell changes in the base run."""

    computed: tuple[int, ...]
    """Positions whose states must be computed anew, ascending."""
    merged: tuple[int, ...]
    """Positions that follow the source run from the cell's first layer on."""
    live: tuple[int, ...]
    """Positions at which states are put in that differ between the runs."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One cell's way through the layers."""

    cell: int
    """Its number among all cells."""
    join: int
    """The layer after which it starts."""
    leader: int | None
    """The lane of its chunk whose states it copies there; None: the base run's, with its own first layer put in."""
    live: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lanes that run together: they change the same positions and leave the same ones to the same runs."""

    computed: tuple[int, ...]
    merged: tuple[int, ...]
    lanes: tuple[Lane, ...]
    """In the order in which they join."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a sweep answers its cells."""

    chunks: tuple[Chunk, ...]
    free: dict[int, tuple[int, ...]]
    """Cells that need no computation: the scored positions that take the source run's logits; others the base's."""


def effect_of(cell: Cell, *, masks: Masks, changed: Collection[int], frozen: Collection[int] = ()) -> Effect:
    """Which positions a cell changes, where `changed` are those at which the two runs can differ at all."""
    live = tuple(sorted(set(cell.positions) & set(changed)))
    reached = set(masks.reach(live, cell.first + 1))
    if cell.is_direct:
        reached -= set(frozen) - set(live)
    merged: set[int] = set()
    if cell.kind == "hidden" and cell.severed is None and not cell.is_direct:
        merged = _merged(live, masks, changed, cell.first + 1)
    return Effect(computed=tuple(sorted(reached - merged)), merged=tuple(sorted(merged)), live=live)


def make_plan(
    cells: Sequence[Cell],
    *,
    masks: Masks,
    changed: Collection[int],
    scored: Collection[int],
    frozen: Collection[int] = (),
    lane_tokens: int,
) -> Plan:
    """The plan for these cells; a chunk holds at most `lane_tokens` computed positions over its lanes, or one lane."""
    free: dict[int, tuple[int, ...]] = {}
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, tuple[int, ...]]]] = {}
    for number, effect in enumerate(_effects(cells, masks, changed, frozen)):
        if not set(effect.computed) & set(scored):
            free[number] = tuple(position for position in scored if position in effect.merged)
        else:
            groups.setdefault((effect.computed, effect.merged), []).append((number, effect.live))
    chunks = [
        Chunk(computed=computed, merged=merged, lanes=lanes)
        for (computed, merged), members in groups.items()
        for lanes in _chunks(members, cells, max(1, lane_tokens // len(computed)))
    ]
    return Plan(chunks=tuple(chunks), free=free)


def touched(
    cells: Sequence[Cell], *, masks: Masks, changed: Collection[int], frozen: Collection[int] = ()
) -> tuple[int, ...]:
    """Positions whose states some cell computes or lends, ascending: all that need be kept of the two runs."""
    found: set[int] = set()
    for effect in {id(each): each for each in _effects(cells, masks, changed, frozen)}.values():
        found.update(effect.computed, effect.live)
    return tuple(sorted(found))


def _effects(cells: Sequence[Cell], masks: Masks, changed: Collection[int], frozen: Collection[int]) -> list[Effect]:
    """Each cell's effect; cells that differ in nothing that matters for it share one."""
    known: dict[tuple, Effect] = {}
    effects = []
    for cell in cells:
        key = (cell.positions, cell.first, cell.kind == "hidden", cell.severed, cell.is_direct)
        if key not in known:
            known[key] = effect_of(cell, masks=masks, changed=changed, frozen=frozen)
        effects.append(known[key])
    return effects


def single(cell: int) -> Chunk:
    """A chunk for one cell that is answered on its own, by whatever way."""
    return Chunk(computed=(), merged=(), lanes=(Lane(cell=cell, join=0, leader=None, live=()),))


def halved(chunk: Chunk, cells: Sequence[Cell]) -> tuple[Chunk, ...]:
    """The chunk in two parts, or as it is if it has one lane."""
    if len(chunk.lanes) == 1:
        return (chunk,)
    members = [(lane.cell, lane.live) for lane in chunk.lanes]
    parts = _chunks(members, cells, (len(members) + 1) // 2)
    return tuple(Chunk(computed=chunk.computed, merged=chunk.merged, lanes=lanes) for lanes in parts)


def _merged(live: Collection[int], masks: Masks, changed: Collection[int], first: int) -> set[int]:
    """Live positions that see, from layer `first` on, no changed position that is not live too and merged itself."""
    merged = set(live)
    while merged:
        spoilt = set(masks.reach(set(changed) - merged, first)) & merged
        if not spoilt:
            break
        merged -= spoilt
    return merged


def _chunks(members: Sequence[tuple[int, tuple[int, ...]]], cells: Sequence[Cell], size: int) -> list[tuple[Lane, ...]]:
    """Members (cell number, live positions) as chunks of at most `size` lanes; a family stays together if it fits.

    A family are cells that put in the same states up to the end of the shortest window: the widest window's lane
    leads, and the others leave it where their own window ends.
    """
    families: dict[tuple, list[tuple[int, tuple[int, ...]]]] = {}
    for number, live in members:
        cell = cells[number]
        families.setdefault((cell.first, cell.kind, cell.head or 0, live, cell.positions), []).append((number, live))
    parts = [
        family[start : start + size]
        for _, family in sorted(families.items(), key=lambda item: item[0])
        for start in range(0, len(family), size)
    ]
    chunks: list[list[list[tuple[int, tuple[int, ...]]]]] = []
    for part in parts:
        if not chunks or sum(map(len, chunks[-1])) + len(part) > size:
            chunks.append([])
        chunks[-1].append(part)
    return [_lanes(chunk, cells) for chunk in chunks]


def _lanes(families: Sequence[Sequence[tuple[int, tuple[int, ...]]]], cells: Sequence[Cell]) -> tuple[Lane, ...]:
    """The lanes of some families, in the order in which they join."""
    waiting: list[tuple[int, int, int | None, tuple[int, ...]]] = []  # join, cell, the leader's cell, live positions
    for family in families:
        leader = max((number for number, _ in family), key=lambda number: cells[number].last)
        for number, live in family:
            cell = cells[number]
            leads = number == leader or cell.last == cell.first
            waiting.append((cell.first if leads else cell.last, number, None if leads else leader, live))
    waiting.sort(key=lambda lane: (lane[0], lane[2] is not None, lane[1]))
    slots = {number: slot for slot, (_, number, _, _) in enumerate(waiting)}
    return tuple(
        Lane(cell=number, join=join, leader=None if leader is None else slots[leader], live=live)
        for join, number, leader, live in waiting
    )
