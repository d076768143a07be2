"""The plan of a sweep, on paper: what a cell changes, what is free, and which cells run together."""

import pytest
import torch
from multrace.models.replay import Masks
from multrace.tracing.engine import Chunk, Plan, StateCell, effect_of, halved, make_plan

LENGTH, LAYERS = 12, 4
CHANGED = range(3, LENGTH)
CAUSAL = Masks(length=LENGTH, layers=(None,) * LAYERS)


def sliding(window: int) -> Masks:
    """Each token sees itself and the ones before it, `window` in all."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(1 - window)
    return Masks(length=LENGTH, layers=(seen,) * LAYERS)


def block(start: int, stop: int) -> Masks:
    """Causal, but tokens of a block see each other both ways."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[start:stop, start:stop] = True
    return Masks(length=LENGTH, layers=(seen,) * LAYERS)


def cell(*positions: int, kind: str = "mlp", first: int = 0, last: int | None = None, **more: object) -> StateCell:
    return StateCell(kind=kind, first=first, last=first if last is None else last, positions=positions, **more)


@pytest.mark.parametrize(
    ("name", "asked", "masks", "computed", "merged"),
    [
        ("one token reaches all after it", cell(7), CAUSAL, range(7, 12), ()),
        ("before the corruption nothing changes", cell(1, 2), CAUSAL, (), ()),
        ("only what differs counts", cell(1, 8), CAUSAL, range(8, 12), ()),
        ("the last layer reaches nobody else", cell(7, first=3), CAUSAL, (7,), ()),
        ("a restored beginning follows the clean run", cell(3, 4, kind="hidden"), CAUSAL, range(5, 12), (3, 4)),
        ("a gap ends it", cell(3, 5, kind="hidden"), CAUSAL, range(4, 12), (3,)),
        ("no beginning, no merging", cell(4, 5, kind="hidden"), CAUSAL, range(4, 12), ()),
        ("MLPs alone do not make a state clean", cell(3, 4), CAUSAL, range(3, 12), ()),
        ("what is severed stays apart", cell(3, kind="hidden", severed="mlp"), CAUSAL, range(3, 12), ()),
        ("everything restored", cell(*range(12), kind="hidden"), CAUSAL, (), tuple(range(3, 12))),
        ("a window slides two tokens per layer", cell(4, first=1), sliding(3), range(4, 9), ()),
        ("a block is reached as a whole", cell(7), block(5, 9), range(5, 12), ()),
        ("a block merges as a whole or not at all", cell(3, 4, 5, kind="hidden"), block(5, 9), range(5, 12), (3, 4)),
        ("a whole block merges", cell(*range(3, 9), kind="hidden"), block(5, 9), range(9, 12), tuple(range(3, 9))),
    ],
)
def test_what_a_cell_changes(name, asked, masks, computed, merged):
    effect = effect_of(asked, masks=masks, changed=CHANGED)
    assert (effect.computed, effect.merged) == (tuple(computed), merged), name
    assert effect.live == tuple(place for place in asked.positions if place in CHANGED)


def test_direct_effects_leave_the_other_frozen_positions_alone():
    effect = effect_of(cell(5, is_direct=True), masks=CAUSAL, changed=CHANGED, frozen=range(3, 9))
    assert effect.computed == (5, 9, 10, 11)


def plan(cells: list[StateCell], lane_tokens: int = 1000, scored: tuple[int, ...] = (11,)) -> Plan:
    return make_plan(cells, masks=CAUSAL, changed=CHANGED, scored=scored, lane_tokens=lane_tokens)


def test_cells_without_effect_are_free_and_all_others_are_planned_once():
    sites = [(layer, kind) for layer in range(4) for kind in ("hidden", "mlp")]
    cells = [cell(position, kind=kind, first=layer) for position in range(12) for layer, kind in sites]
    found = plan(cells)
    planned = [lane.cell for chunk in found.chunks for lane in chunk.lanes]
    assert sorted([*planned, *found.free]) == list(range(len(cells)))
    for number, merged in found.free.items():
        before, late = cells[number].positions[0] < 3, cells[number].first == 3
        assert merged == ((11,) if cells[number].positions == (11,) else ())
        assert before or late
    assert len(found.free) == 3 * 8 + 8 * 2 + 1  # before the corruption; the last layer elsewhere; the answer's state


def test_a_plan_keeps_its_limit_and_lanes_join_in_order():
    cells = [cell(6, first=first, last=last) for first in range(4) for last in range(first, 4)]
    for limit in (1, 12, 30, 1000):
        found = plan(cells, lane_tokens=limit)
        for chunk in found.chunks:
            assert len(chunk.lanes) == 1 or len(chunk.lanes) * len(chunk.computed) <= limit
            assert [lane.join for lane in chunk.lanes] == sorted(lane.join for lane in chunk.lanes)
            check_leaders(chunk, cells)
        planned = [lane.cell for chunk in found.chunks for lane in chunk.lanes]
        assert sorted([*planned, *found.free]) == list(range(len(cells)))


def check_leaders(chunk: Chunk, cells: list[StateCell]) -> None:
    """Who leaves another lane's way shared it so far, and leaves it where its own window ends."""
    for slot, lane in enumerate(chunk.lanes):
        own = cells[lane.cell]
        if lane.leader is None:
            assert lane.join == own.first
        else:
            leader = cells[chunk.lanes[lane.leader].cell]
            assert (lane.leader < slot, lane.join, leader.first) == (True, own.last, own.first)
            assert leader.last >= own.last


def test_windows_that_begin_alike_have_one_leader():
    cells = [cell(6, last=last) for last in range(4)]
    (chunk,) = plan(cells).chunks
    assert [(cells[lane.cell].last, lane.leader is None) for lane in chunk.lanes] == [
        (0, True), (3, True), (1, False), (2, False)
    ]  # fmt: skip
    other = [cell(6, last=1), cell(6, last=2, kind="attention"), cell(7, last=2)]
    assert all(lane.leader is None for chunk in plan(other).chunks for lane in chunk.lanes)


def test_halving_keeps_every_lane():
    cells = [cell(6, first=first, last=last) for first in range(3) for last in range(first, 3)]
    (chunk,) = plan(cells).chunks
    parts = halved(chunk, cells)
    assert len(parts) >= 2
    assert sorted(lane.cell for part in parts for lane in part.lanes) == list(range(len(cells)))
    for part in parts:
        check_leaders(part, cells)
        assert part.computed == chunk.computed
    single = plan([cell(6)]).chunks[0]
    assert halved(single, [cell(6)]) == (single,)


def test_an_answer_of_several_tokens_is_reached_where_its_positions_are():
    found = plan([cell(10, first=3), cell(9, first=3), cell(10, kind="hidden", first=3)], scored=(10, 11))
    assert found.free == {1: (), 2: (10,)}
    assert [chunk.computed for chunk in found.chunks] == [(10,)]
