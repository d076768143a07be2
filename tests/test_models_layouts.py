"""Which positions a change reaches, where the keys of all others come from, and who sees them."""

import pytest
import torch
from multrace import ModelError
from multrace.models import ReplayError
from multrace.models.replay import Masks, Recording, Source, Span, index_of, neighbours, places
from multrace.models.replay.recording import _RUNS_APART
from torch import Tensor

LENGTH = 12
CPU = torch.device("cpu")


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def window(size: int = 3) -> Tensor:
    return causal() & ~causal().tril(-size)


def block(start: int = 4, stop: int = 8) -> Tensor:
    mask = causal()
    mask[start:stop, start:stop] = True
    return mask


def prefix(length: int = 6) -> Tensor:
    return block(0, length)


def masks_of(*layers: Tensor | None) -> Masks:
    return Masks(length=LENGTH, layers=layers)


def closure(layers: list[Tensor | None], positions: set[int], first: int) -> tuple[int, ...]:
    """The same position by position."""
    reached = set(positions)
    for mask in layers[first:]:
        sees = causal() if mask is None else mask
        reached |= {query for query in range(LENGTH) if any(sees[query, key] for key in reached)}
    return tuple(sorted(reached))


REACHES = [  # name, layers, positions, first layer, what is reached
    ("nothing", [None, None], (), 0, ()),
    ("causal", [None, None], (3,), 0, range(3, 12)),
    ("causal, several", [None, None], (9, 5), 0, range(5, 12)),
    ("causal, last layer", [None, None], (3,), 1, range(3, 12)),
    ("causal, after the last layer", [None, None], (9, 5), 2, (5, 9)),
    ("window, two layers", [window(), window()], (3,), 0, range(3, 8)),
    ("window, one layer", [window(), window()], (3,), 1, range(3, 6)),
    ("window, after the last layer", [window(), window()], (3,), 2, (3,)),
    ("window, two positions", [window(2)], (0, 7), 0, (0, 1, 7, 8)),
    ("block, from inside", [block()], (6,), 0, range(4, 12)),
    ("block, from before", [block()], (2,), 0, range(2, 12)),
    ("block, from after", [block()], (8,), 0, range(8, 12)),
    ("prefix-LM", [prefix()], (5,), 0, range(12)),
    ("prefix-LM, after the prefix", [prefix()], (6,), 0, range(6, 12)),
    ("all see all", [torch.ones(12, 12, dtype=torch.bool)], (11,), 0, range(12)),
    ("window, then full", [window(2), None], (3,), 0, range(3, 12)),
    ("full, then window", [None, window(2)], (3,), 1, (3, 4)),
    ("block, then window", [block(), window(2)], (7,), 0, range(4, 12)),
    ("window into a block", [window(2), block()], (3,), 0, range(3, 12)),
    ("past the block in the layer that has it", [block(4, 6), window(2)], (7,), 0, range(7, 12)),
    ("windows, a full layer, windows", [window(2), window(2), None, window(2)], (8,), 3, (8, 9)),
]


@pytest.mark.parametrize(("layers", "positions", "first", "reached"), [each[1:] for each in REACHES],
                         ids=[each[0] for each in REACHES])  # fmt: skip
def test_what_a_change_reaches(layers, positions, first, reached):
    assert masks_of(*layers).reach(positions, first) == tuple(reached)
    assert closure(layers, set(positions), first) == tuple(reached)


def test_what_a_change_reaches_under_any_masks():
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(60):
        drawn = torch.rand(3, LENGTH, LENGTH, generator=generator) < 0.12
        layers = [None if torch.rand((), generator=generator) < 0.2 else mask.fill_diagonal_(True) for mask in drawn]
        start, first = (int(torch.randint(0, high, (), generator=generator)) for high in (LENGTH, 4))
        found = masks_of(*layers).reach({start}, first)
        assert found == closure(layers, {start}, first)
        sizes.add(len(found))
    assert len(sizes) > 6


def additive(mask: Tensor, hidden: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~mask, hidden)


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf])
def test_masks_are_read_as_booleans(hidden):
    found = [None, window()[None, None], additive(block(), hidden), additive(prefix()).expand(3, 2, -1, -1)]
    masks = Masks.of(found, LENGTH)
    assert masks.length == LENGTH
    assert masks.layers[0] is None
    for mask, expected in zip(masks.layers[1:], (window(), block(), prefix()), strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected)


def test_layers_that_share_a_mask_go_on_sharing_it():
    shared, alike = window()[None, None], window()[None, None]
    masks = Masks.of([shared, shared, alike], LENGTH)
    assert masks.layers[0] is masks.layers[1]
    assert masks.layers[0] is not masks.layers[2]


def dead() -> Tensor:
    mask = causal()
    mask[5] = False
    return mask[None, None]


REFUSED = [
    ("a small bias", additive(causal()) - 0.1, "adds a bias"),
    ("a bias by distance", additive(causal(), -3.0), "adds a bias"),
    ("other rows", torch.stack([window(), causal()])[:, None], "differently for rows or heads"),
    ("other heads", torch.stack([window(), causal()])[None], "differently for rows or heads"),
    ("other additive rows", torch.cat([additive(window()), additive(causal())]), "differently for rows or heads"),
    ("a cache", torch.ones(1, 1, LENGTH, LENGTH + 1, dtype=torch.bool), r"shape \(1, 1, 12, 13\)"),
    ("no matrix", torch.ones(1, LENGTH, dtype=torch.bool), r"shape \(1, 12\)"),
    ("a token that sees nothing", dead(), "attend to nothing at all"),
]


@pytest.mark.parametrize(("mask", "text"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_is_no_plain_mask_is_refused(mask, text):
    with pytest.raises(ReplayError, match=text) as caught:
        Masks.of([None, mask], LENGTH)
    assert isinstance(caught.value, ModelError)


def recording(positions: tuple[int, ...], rows: int = 1, layers: int = 2) -> Recording:
    """Keys say where they come from: layer, row, head, position."""
    axes = torch.meshgrid(torch.arange(rows), torch.arange(2), torch.tensor(positions), indexing="ij")
    where = torch.stack(axes, -1).double()
    keys = tuple(torch.cat([torch.full((*where.shape[:3], 1), layer).double(), where], -1) for layer in range(layers))
    states = torch.arange(len(positions)).double()[None, :, None].expand(rows, -1, 3)
    return Recording(
        positions=positions, keys=keys, values=tuple(-each for each in keys), kept=positions,
        states=(states,) * (layers + 1), outputs={}, read=(), logits=torch.zeros(rows, 0, 5),
    )  # fmt: skip


def span_of(positions: tuple[int, ...], sources: list[Source], *layers: Tensor | None) -> Span:
    return Span(positions=positions, sources=tuple(sources), masks=masks_of(*(layers or (None, None))), device=CPU)


def seen_by(span: Span, layer: int) -> list[set[tuple[int, int]]]:
    """For each query the (source, position) pairs that segments show it; a source is known by its number of rows."""
    seen: list[set[tuple[int, int]]] = [set() for _ in span.positions]
    for segment in span.segments(layer):
        assert torch.equal(segment.values, -segment.keys)
        assert (segment.keys[..., 0] == layer).all()
        held = segment.keys[0, 0, :, 3].long().tolist()
        visible = torch.ones(len(seen), len(held), dtype=torch.bool)
        if segment.visible is not None:
            visible = segment.visible if segment.visible.ndim == 2 else segment.visible[:, None].expand_as(visible)
        for query, row in enumerate(visible):
            found = {(len(segment.keys), place) for place, shown in zip(held, row.tolist(), strict=True) if shown}
            assert not found & seen[query]
            seen[query] |= found
    return seen


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "mask", [None, causal(), window(), block(), prefix(), prefix(9)],
    ids=["none", "causal", "window", "block", "prefix", "long prefix"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("computed", "apart"), [((8, 9, 10, 11), (5, 6)), ((4, 9, 11), (3, 6, 7)), ((0, 1), (7,)), ((6,), ())]
)
def test_every_position_is_seen_once_and_only_where_the_mask_allows(computed, apart, mask, layer):
    whole, part = recording(tuple(range(LENGTH))), recording(tuple(sorted({*apart, 2})), rows=3)
    rest = tuple(place for place in range(LENGTH) if place not in {*computed, *apart})
    span = span_of(computed, [Source(run=whole, positions=rest), Source(run=part, positions=apart)], mask, mask)
    sees = causal() if mask is None else mask
    for query, seen in zip(computed, seen_by(span, layer), strict=True):
        assert seen == {(3 if key in apart else 1, key) for key in {*rest, *apart} if sees[query, key]}
    visible, is_causal = span.own(layer)
    own = sees[list(computed)][:, list(computed)]
    if is_causal:
        assert visible is None
        assert torch.equal(own, torch.ones_like(own).tril())
    else:
        shown = torch.ones_like(own) if visible is None else visible if visible.ndim == 2 else visible[:, None]
        assert torch.equal(shown.expand_as(own), own)


def test_masks_of_each_layer_hold_in_that_layer():
    run = recording(tuple(range(LENGTH)))
    span = span_of((8, 9), [Source(run=run, positions=tuple(range(8)))], window(), None)
    assert [len(seen) for seen in seen_by(span, 0)] == [2, 1]
    assert [len(seen) for seen in seen_by(span, 1)] == [8, 8]


def test_what_no_query_sees_is_not_attended_to():
    run = recording(tuple(range(LENGTH)))
    early, late = Source(run=run, positions=tuple(range(8))), Source(run=run, positions=(10, 11))
    (segment,) = span_of((8, 9), [early, late], window(), window()).segments(0)
    assert segment.keys[0, 0, :, 3].tolist() == [6, 7]
    assert len(span_of((8, 9), [early, late], block(6, 11), None).segments(0)) == 2  # here they are seen
    assert span_of((0, 1), [Source(run=run, positions=()), late]).segments(0) == []


def test_neighbours_are_slices_that_share_memory_and_others_are_copied():
    run = recording(tuple(range(LENGTH)), rows=2)
    (close,) = span_of((8,), [Source(run=run, positions=(2, 3, 4))]).segments(0)
    assert close.keys.untyped_storage().data_ptr() == run.keys[0].untyped_storage().data_ptr()
    (apart,) = span_of((8,), [Source(run=run, positions=(2, 4))]).segments(0)
    assert apart.keys.untyped_storage().data_ptr() != run.keys[0].untyped_storage().data_ptr()
    assert apart.keys[0, 0, :, 3].tolist() == [2, 4]


def test_only_some_queries_look_at_the_same_keys():
    run = recording(tuple(range(LENGTH)))
    sources = [Source(run=run, positions=tuple(range(5))), Source(run=run, positions=(8,))]
    span = span_of((5, 6, 7, 9, 10), sources, window(4), window(4))
    segments, (visible, is_causal) = span.seen_from(0, (9,))
    assert [each.keys[0, 0, :, 3].tolist() for each in segments] == [[8]]
    assert not is_causal
    assert visible.tolist() == [[False, True, True, True, False]]
    everything = span.seen_from(0, span.positions)
    assert torch.equal(everything[1][0], window(4)[[5, 6, 7, 9, 10]][:, [5, 6, 7, 9, 10]])


def test_queries_among_keys_as_a_block_of_the_mask():
    queries, keys = torch.tensor([3, 9]), torch.tensor([2, 4, 9])
    assert masks_of(None).block(0, queries, keys).tolist() == [[True, False, False], [True, True, True]]
    assert masks_of(window()).block(0, queries, keys).tolist() == [[True, False, False], [False, False, True]]


def test_indices_are_slices_where_numbers_are_neighbours():
    assert index_of((3, 4, 5), CPU) == slice(3, 6)
    assert index_of((7,), CPU) == slice(7, 8)
    assert index_of((3, 5), CPU).tolist() == [3, 5]
    assert index_of((), CPU).tolist() == []
    numbers = torch.arange(10)
    for wanted in ((), (0,), (2, 3), (2, 9)):
        assert numbers[index_of(wanted, CPU)].tolist() == list(wanted)


def test_places_among_other_positions():
    assert places((2, 4, 5, 9), (4, 5), CPU) == slice(1, 3)
    assert places((2, 4, 5, 9), (2, 9), CPU).tolist() == [0, 3]
    with pytest.raises(KeyError):
        places((2, 4), (3,), CPU)


def test_stored_states_are_found_by_position():
    run = recording((2, 5, 6, 9))
    assert run.at(run.states[0], (5, 9))[0, :, 0].tolist() == [1, 3]
    assert run.at(run.states[0], (5, 6)).shape == (1, 2, 3)


def test_runs_of_neighbours_and_too_many_of_them():
    assert neighbours(()) == []
    assert neighbours((3,)) == [(3,)]
    assert neighbours((1, 2, 3, 6, 8, 9)) == [(1, 2, 3), (6,), (8, 9)]
    few, many = (tuple(range(0, 2 * count, 2)) for count in (_RUNS_APART, _RUNS_APART + 1))
    assert neighbours(few) == [(place,) for place in few]
    assert neighbours(many) == [many]
