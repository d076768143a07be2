"""Mutation checks: the comparison of sweep and plain way that passes at 1e-12 fails once the engine is broken.

Each named mutation breaks the real code in one way; without it, the same comparison holds.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from exact_models import CHANGED, LENGTH, largest_difference, load_exact, make_runs, measure, mixed_cells
from multrace import VisionLanguageModel
from multrace.models.replay import (
    Index,
    Kernels,
    Masks,
    Segment,
    Softmax,
    Span,
    attention,
    recording as layouts,
    replay as replays,
)
from multrace.tracing.engine import Lane, Runs, StateCell, cells as plans, plain_scores
from torch import Tensor

Mutation = Callable[[pytest.MonkeyPatch], None]
BLOCKS = (1, 2, 3, 4, 5)


def bidirectional() -> Tensor:
    """Causal, but for two blocks of positions that see each other; they share one, and reach beyond the change."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[1:4, 1:4], mask[3:6, 3:6] = True, True
    return mask[None, None]


def reach_as_if_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(self: Masks, positions: Collection[int], first: int = 0) -> tuple[int, ...]:
        return tuple(range(min(positions), self.length)) if positions else ()

    monkeypatch.setattr(Masks, "reach", reach)


def reach_as_if_windowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(self: Masks, positions: Collection[int], first: int = 0) -> tuple[int, ...]:
        near = {place + step for place in positions for step in range(4)}
        return tuple(place for place in sorted(near) if place < self.length)

    monkeypatch.setattr(Masks, "reach", reach)


def reach_one_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Masks.reach

    def reach(self: Masks, positions: Collection[int], first: int = 0) -> tuple[int, ...]:
        return whole(replace(self, layers=self.layers[: first + 1]), positions, first)

    monkeypatch.setattr(Masks, "reach", reach)


def slices_one_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def index(self: Span) -> Index:
        return torch.tensor([max(0, place - 1) for place in self.positions])

    monkeypatch.setattr(Span, "index", property(index))


def keys_one_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands at a place of a recording is looked up one place before it."""
    found = layouts.places

    def places(within: Sequence[int], wanted: Sequence[int], device: torch.device) -> Index:
        numbers = torch.arange(len(within))[found(within, wanted, device)]
        return (numbers - 1).clamp(min=0)

    monkeypatch.setattr(layouts, "places", places)


def joins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plans._lanes

    def lanes(members: Sequence, cells: Sequence[StateCell], starts: Mapping[int, int]) -> tuple[Lane, ...]:
        end = max(cell.last for cell in cells)
        return tuple(replace(lane, join=min(lane.join + 1, end)) for lane in whole(members, cells, starts))

    monkeypatch.setattr(plans, "_lanes", lanes)


def joins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plans._lanes

    def lanes(members: Sequence, cells: Sequence[StateCell], starts: Mapping[int, int]) -> tuple[Lane, ...]:
        return tuple(replace(lane, join=max(lane.join - 1, 0)) for lane in whole(members, cells, starts))

    monkeypatch.setattr(plans, "_lanes", lanes)


def merges_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plans._merged

    def merged(live: Collection[int], masks: Masks, changed: Collection[int], first: int) -> set[int]:
        found = whole(live, masks, changed, first)
        return found | {min(set(changed) - found)} if found and set(changed) - found else found

    monkeypatch.setattr(plans, "_merged", merged)


def merges_all_that_is_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_merged", lambda live, _masks, _changed, _first: set(live))


def averages_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def average(query: Tensor, segments: Sequence[Segment], *, softmax: Softmax, kernels: Kernels) -> Tensor:
        parts = [attention._part(query, segment, softmax, kernels)[0] for segment in segments if segment.keys.shape[2]]
        return torch.stack(parts).mean(0)

    monkeypatch.setattr(replays, "merged_attention", average)


def weighs_parts_by_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    part = attention._part

    def counted(query: Tensor, segment: Segment, softmax: Softmax, kernels: Kernels) -> tuple[Tensor, Tensor]:
        output, total = part(query, segment, softmax, kernels)
        count = torch.tensor(segment.keys.shape[2], dtype=total.dtype).log()
        return output, torch.where(total == -torch.inf, total, count)

    monkeypatch.setattr(attention, "_part", counted)


def dead_rows_sum_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    part = attention._part

    def finite(query: Tensor, segment: Segment, softmax: Softmax, kernels: Kernels) -> tuple[Tensor, Tensor]:
        output, total = part(query, segment, softmax, kernels)
        return output, total.masked_fill(total == -torch.inf, 0.0)

    monkeypatch.setattr(attention, "_part", finite)


CAUSAL, BLOCK = "causal", "bidirectional blocks"
MUTATIONS: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "mask closure: as if causal": (reach_as_if_causal, (BLOCK,)),
    "mask closure: as if windowed": (reach_as_if_windowed, (CAUSAL, BLOCK)),
    "mask closure: one layer only": (reach_one_layer_only, (BLOCK,)),
    "position slicing: rotary positions one early": (slices_one_early, (CAUSAL, BLOCK)),
    "position slicing: recorded keys one early": (keys_one_early, (CAUSAL, BLOCK)),
    "start layer: one late": (joins_late, (CAUSAL, BLOCK)),
    "start layer: one early": (joins_early, (CAUSAL, BLOCK)),
    "merge: one position too many": (merges_one_more, (CAUSAL, BLOCK)),
    "merge: whatever is put in": (merges_all_that_is_put_in, (CAUSAL, BLOCK)),
    "log-sum-exp: plain average": (averages_parts, (CAUSAL, BLOCK)),
    "log-sum-exp: weights by number of keys": (weighs_parts_by_keys, (CAUSAL, BLOCK)),
    "log-sum-exp: dead rows sum to zero": (dead_rows_sum_to_zero, (CAUSAL, BLOCK)),
}


def make_cells(vlm: VisionLanguageModel) -> list[StateCell]:
    """Cells whose ways through the engine differ: merged, scattered, direct, windowed."""
    cells = [cell for cell in mixed_cells(vlm) if cell.positions in ((5,), (2, 3, 4), (3, 6), CHANGED)]
    whole = [StateCell(kind="hidden", first=layer, last=layer, positions=BLOCKS) for layer in range(vlm.layers)]
    return cells + whole


def runs_under(vlm: VisionLanguageModel, mask: str) -> Runs:
    return make_runs(vlm, **({"attention_mask": bidirectional()} if mask == BLOCK else {}))


@pytest.fixture
def llama(llama_path, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    return load_exact(llama_path, monkeypatch)


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    """The scores of the plain way under each mask, once they are computed."""
    return {}


@pytest.fixture
def plainly(llama: VisionLanguageModel, known: dict[str, Tensor]) -> Callable[[str], Tensor]:
    """Gives the scores of the plain way under a mask, of the code as it is when they are first asked for."""

    def scores(mask: str) -> Tensor:
        if mask not in known:
            known[mask] = plain_scores(llama, runs_under(llama, mask), make_cells(llama), measure)
        return known[mask]

    return scores


@pytest.mark.parametrize("mask", [CAUSAL, BLOCK])
def test_unbroken_the_sweep_equals_the_plain_way(llama, mask):
    difference, moved = largest_difference(llama, runs_under(llama, mask), make_cells(llama))
    assert difference <= 1e-12
    assert moved > 0.6


@pytest.mark.parametrize(
    ("mutation", "mask"), [(name, mask) for name, (_, masks) in MUTATIONS.items() for mask in masks]
)
def test_mutation_is_noticed(llama, plainly, monkeypatch, mutation, mask):
    unbroken = plainly(mask)
    MUTATIONS[mutation][0](monkeypatch)
    difference, _ = largest_difference(llama, runs_under(llama, mask), make_cells(llama), unbroken)
    assert 1e-9 < difference < float("inf")


def test_without_a_mask_a_causal_closure_is_right(llama, plainly, monkeypatch):
    unbroken = plainly(CAUSAL)
    reach_as_if_causal(monkeypatch)  # so it is the mask that makes this mutation one
    assert largest_difference(llama, runs_under(llama, CAUSAL), make_cells(llama), unbroken)[0] <= 1e-12
