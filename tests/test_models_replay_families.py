"""Families that are in no row of ours: the fast sweep equals one forward pass per cell, in true float64, on each."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from exact_models import (
    CHANGED,
    FROZEN,
    LENGTH,
    close,
    largest_difference,
    lift_casts,
    lift_every_cast,
    make_runs,
    measure,
    mixed_cells,
)
from multrace import VisionLanguageModel, load
from multrace.models import ReplayError, Site, patch
from multrace.models.families import Family
from multrace.models.replay import Cut, PaddedBatch, UpperLayers, attending, replaying, running
from multrace.models.replay.observe import LayerCall, layers_without_attention
from multrace.tracing import TraceError
from multrace.tracing.engine import EdgeCell, Engine, Runs, StateCell, plain_scores
from multrace.tracing.engine.measure import measure as measured, sweep
from multrace.tracing.engine.scoring import Scoring
from other_families import MODELS, RUNNING, make, text
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

some_cells = pytest.mark.parametrize("cells", [20, pytest.param(45, marks=pytest.mark.slow)])
"""How many cells are compared: each of them is a forward pass of the plain way."""


def check(vlm: VisionLanguageModel, cells: int, share: float = 0.4, **keywords: Tensor) -> None:
    """Sweep and plain way agree on a mixture of cells, in both directions; so much of them moves a score."""
    every = mixed_cells(vlm)
    for restores in (True, False):
        some = random.Random(int(restores)).sample(every, min(cells, len(every)))
        difference, moved = largest_difference(vlm, make_runs(vlm, restores=restores, **keywords), some)
        assert difference <= 1e-12
        assert moved > share


@some_cells
@pytest.mark.parametrize("name", MODELS)
def test_a_family_without_a_row_is_swept_exactly(name, cells, monkeypatch):
    check(make(name, monkeypatch), cells)


@some_cells
@pytest.mark.parametrize("name", [*RUNNING][:3])
def test_layers_with_a_running_state_go_on_from_it(name, cells, monkeypatch):
    lift_every_cast(monkeypatch)
    vlm = make(name, monkeypatch)
    every = [cell for cell in mixed_cells(vlm) if cell.kind != "head"]
    for restores in (True, False):
        some = random.Random(int(restores)).sample(every, cells)
        difference, moved = largest_difference(vlm, make_runs(vlm, restores=restores), some)
        assert difference <= 1e-12
        assert moved > 0.4
    runs = Runs.of_one(make_runs(vlm).source, scored=(LENGTH - 2, LENGTH - 1))
    edges = [EdgeCell(cut=cut, first=first, last=min(first + 1, 3)) for cut in CUTS for first in range(vlm.layers)]
    found, slow = sweep(vlm, runs, edges, measure), plain_scores(vlm, runs, edges, measure)
    assert float((found.scores - slow).abs().max()) <= 1e-12
    with pytest.raises(ReplayError, match="its heads are not attention heads"):
        sweep(vlm, make_runs(vlm), mixed_cells(vlm), measure)
    with (
        pytest.raises(ReplayError, match="keeps a running state, so it has no attention weights"),
        attending(vlm, [-1]),
    ):
        vlm.forward(runs.base)


@pytest.mark.parametrize("name", [*RUNNING][:3])
def test_heads_are_swept_in_the_layers_that_have_them(name, monkeypatch):
    lift_every_cast(monkeypatch)
    vlm = make(name, monkeypatch)
    headed = [layer for layer in range(vlm.layers) if layer not in layers_without_attention(vlm)]
    cells = [
        StateCell(kind="head", first=first, last=last, head=head, positions=positions)
        for positions in ((2,), (LENGTH - 1,), CHANGED)
        for head in range(vlm.heads)
        for first in headed
        for last in headed[headed.index(first) :]
    ]
    for restores in (True, False):
        difference, moved = largest_difference(vlm, make_runs(vlm, restores=restores), cells)
        assert difference <= 1e-12
        assert moved > 0.3


@pytest.mark.parametrize("name", [*RUNNING][:3])
def test_a_batch_is_the_same_run_each_time_though_states_are_written_into(name, monkeypatch):
    lift_every_cast(monkeypatch)
    vlm, start = make(name, monkeypatch), 5
    entering, columns = make_runs(vlm).base, torch.arange(LENGTH - start).expand(2, -1)
    with torch.no_grad():
        expected = vlm.forward(entering)[:, start:]
        batch = PaddedBatch.after_prefix(vlm, entering, start)
        assert all(close(batch.logits(vlm, columns), expected) for _ in range(3))
        assert close(batch.rows(torch.tensor([1])).logits(vlm, columns[1:]), expected[1:])
    upper, logits = UpperLayers.record(vlm, batch, columns, first=1)
    upper = upper.checked(logits, torch.ones_like(columns, dtype=torch.bool))
    assert upper.is_partial

    def slope(run: Callable[[], Tensor], place: int) -> Tensor:
        added = torch.zeros(vlm.hidden, dtype=torch.float64, requires_grad=True)
        put = torch.zeros(1, place + 1, 1, dtype=torch.float64)
        put[0, place] = 1

        def write(output: Tensor) -> Tensor:
            return output + nn.functional.pad(put, (0, 0, 0, output.shape[1] - place - 1)) * added

        with patch(vlm, {Site("mlp", 1): write}):
            return torch.autograd.grad(run()[:, -1, 7].sum(), added)[0]

    whole = slope(lambda: vlm.forward(entering), start + 3)
    for _ in range(2):
        assert close(slope(upper.logits, 3), whole)
        assert close(slope(lambda: batch.logits(vlm, columns), 3), whole)
    assert float(whole.abs().max()) > 1e-6


def test_only_edges_of_attention_are_cut_and_no_token_is_dropped_from_a_state(monkeypatch):
    lift_every_cast(monkeypatch)
    vlm = make("Qwen3.5, linear attention", monkeypatch)
    runs, scoring = Runs.of_one(make_runs(vlm).source, scored=(LENGTH - 1,)), Scoring.of_answer([5], whole=False)
    cell = EdgeCell(cut=CUTS[0], first=2, last=3)
    with pytest.warns(UserWarning, match="only 3 have attention edges to cut; the others keep a running state"):
        scores = measured(vlm, runs, [cell, replace(cell, last=2)], scoring, engine=Engine())
    assert abs(float(scores.scores[0, 0, 0] - scores.base[0, 0])) > 1e-7
    assert close(scores.scores[1], scores.base)
    with pytest.raises(TraceError, match="cannot be dropped from .*: decoder layer 0 keeps a running state"):
        measured(vlm, runs, [replace(cell, is_dropped=True)], scoring, engine=Engine())


def test_rows_of_positions_on_several_axes_are_not_the_axes():
    places, turns = torch.arange(3 * 3 * 5).view(3, 3, 5), torch.arange(3 * 5 * 4).view(3, 5, 4)
    call = LayerCall(keywords={"position_ids": places, "position_embeddings": (turns, turns), "other": places})
    part = call.rows(torch.tensor([0, 2]), 3).keywords
    assert torch.equal(part["position_ids"], places[:, [0, 2]]) and torch.equal(part["other"], places[[0, 2]])
    assert all(torch.equal(each, turns[[0, 2]]) for each in part["position_embeddings"])


def test_without_the_state_the_result_is_wrong(monkeypatch):
    vlm = make("Qwen3.5, linear attention", monkeypatch)
    monkeypatch.setattr(running, "_copied", lambda cache, _repeats: DynamicCache(config=vlm.config))
    with pytest.raises(ReplayError, match="layer 0 gives other states when it runs at some positions only"):
        sweep(vlm, make_runs(vlm), [cell for cell in mixed_cells(vlm) if cell.kind == "mlp"], measure)


def test_a_state_that_cannot_go_on_is_refused(monkeypatch):
    vlm = make("Jamba, a state that takes one token at a time", monkeypatch)
    runs, cells = make_runs(vlm), [cell for cell in mixed_cells(vlm) if cell.kind == "mlp"][:9]
    with pytest.raises(ReplayError, match="layer 0 gives other states when it runs at some positions only"):
        sweep(vlm, runs, cells, measure)
    assert plain_scores(vlm, runs, cells, measure).isfinite().all()


CUTS = [
    Cut(sources=frozenset({3, 4, 5}), targets=frozenset({LENGTH - 1})),
    Cut(sources=frozenset({2, 7}), targets=frozenset({6, 7, 8, LENGTH - 2}), heads=(1, 3)),
]


ROWS = {"mistral": Family(name="mistral", model_types=("mistral",), text_types=("mistral",)),
        "qwen2": Family(name="qwen2", model_types=("qwen2",), text_types=("qwen2",))}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "build"),
    [("mistral", text("Mistral", sliding_window=5, vocab_size=400)), ("qwen2", text("Qwen2", vocab_size=400))],
    ids=["Mistral", "Qwen2"],
)
@some_cells
def test_a_row_that_the_caller_adds_is_enough(row, build, cells, llama_path: Path, tmp_path: Path, monkeypatch):
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_path).save_pretrained(tmp_path)
    vlm = load(tmp_path, dtype="float64", families=(ROWS[row],))
    lift_casts(vlm.model, monkeypatch)
    check(vlm, cells)


@pytest.mark.parametrize(
    ("name", "sliding"),
    [
        ("Mistral, a window shorter than the prompt", {0, 1, 2, 3}),
        ("Qwen2, windows in the later layers", {2, 3}),
        ("Gemma3, sliding and full layers", {0, 1, 3, 4}),
        ("Llama 4, chunks and full layers", {0, 1, 3}),
        ("GPT-2", set()),
    ],
)
@torch.no_grad()
def test_windows_are_captured_layer_by_layer(name, sliding, monkeypatch):
    vlm = make(name, monkeypatch)
    with replaying(vlm) as replay:
        replay.record(make_runs(vlm).source, kept=(), read=(LENGTH - 1,))
        masks = replay.masks
    seen = [LENGTH if mask is None else int(mask[-1].sum()) for mask in masks.layers]
    assert {layer for layer, count in enumerate(seen) if count < LENGTH} == sliding
    reached = [len(masks.reach({2}, first)) for first in range(len(seen) + 1)]
    assert reached == sorted(reached, reverse=True)
    assert (reached[len(seen) - 1] < LENGTH - 2) == (len(seen) - 1 in sliding)


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def with_block(positions: tuple[int, ...]) -> Tensor:
    mask = causal()
    mask[torch.tensor(positions)[:, None], torch.tensor(positions)] = True
    return mask[None, None]


def with_gaps() -> Tensor:
    """Some queries see only some earlier keys, themselves among them."""
    drawn = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    return ((drawn | torch.eye(LENGTH, dtype=torch.bool)) & causal())[None, None]


MASKS = {
    "causal": causal()[None, None],
    "a bidirectional block": with_block(FROZEN),
    "a block wider than the change": with_block((0, 1, *CHANGED, 8)),
    "prefix-LM": with_block(tuple(range(10))),
    "with gaps": with_gaps(),
}


@some_cells
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["Qwen2, biases", "GPT-2"])
def test_any_mask_that_a_caller_gives_is_kept(name, mask, cells, monkeypatch):
    check(make(name, monkeypatch), cells, attention_mask=MASKS[mask])


@torch.no_grad()
def test_the_masks_make_a_difference(monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    logits = [vlm.forward(make_runs(vlm).source, attention_mask=mask) for mask in MASKS.values()]
    assert all((each - logits[0])[:, -1].abs().max() > 1e-3 for each in logits[1:])


@some_cells
def test_positions_that_a_caller_gives_are_kept(cells, monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    places = torch.arange(LENGTH)[None] + torch.arange(LENGTH)[None].ge(5) * 7
    check(vlm, cells, position_ids=places)
    given = make_runs(vlm).source
    assert not torch.allclose(vlm.forward(given), vlm.forward(given, position_ids=places))


@pytest.mark.parametrize("cells", [45, pytest.param(256, marks=pytest.mark.slow)])
def test_models_with_accelerates_hooks_are_swept_exactly(cells, monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    for layer in vlm.addresses.layers:
        add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))
    check(vlm, cells)
