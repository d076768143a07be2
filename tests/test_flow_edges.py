"""Cut attention edges: the fast sweep equals one masked pass per cell in true float64, and that equals eager masks."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from exact_models import FROZEN, LENGTH, make_runs
from multrace import TraceError, VisionLanguageModel
from multrace.models import Site
from multrace.models.replay import Cut, replaying
from multrace.tracing import Engine, knockout_probability
from multrace.tracing.engine import Chunk, EdgeCell, Runs, hidden_edges, lanes, measure as sweeps, plain_scores
from multrace.tracing.engine.measure import sweep
from other_families import MODELS, make
from torch import Tensor

QUESTION = "Who founded the company in this photo?"
IMAGE, ASKED, LAST = FROZEN, (8, 9, 10, 11), (LENGTH - 1,)
SCORED = (LENGTH - 2, LENGTH - 1)


def cut(sources: Sequence[int], targets: Sequence[int], *heads: int) -> Cut:
    return Cut(sources=frozenset(sources), targets=frozenset(targets), heads=heads)


CUTS = {
    "image to question": cut(IMAGE, ASKED),
    "image to last": cut(IMAGE, LAST),
    "image to last, one head": cut(IMAGE, LAST, 2),
    "image to question, two heads": cut(IMAGE, ASKED, 0, 3),
    "a part of the image to question": cut(IMAGE[1:3], ASKED),
    "question to both scored": cut(ASKED, SCORED),
    "last to itself": cut(LAST, LAST),
    "within the question": cut(ASKED[:3], ASKED[1:]),
    "scattered": cut((2, 5, 9), (4, 7, 10, 12)),
    "later to earlier": cut(LAST, ASKED),
    "nothing": cut((), ASKED),
    "to nothing": cut(IMAGE, ()),
}


def make_cells(vlm: VisionLanguageModel) -> list[EdgeCell]:
    windows = [(first, last) for first in range(vlm.layers) for last in range(first, vlm.layers)]
    return [EdgeCell(cut=each, first=first, last=last) for each in CUTS.values() for first, last in windows]


def make_run(vlm: VisionLanguageModel, **keywords: Tensor) -> Runs:
    return Runs.of_one(make_runs(vlm, **keywords).source, scored=SCORED)


def measure(logits: Tensor) -> Tensor:
    probability = logits.double().softmax(-1)[:, -1, 7]
    return torch.stack([probability, (logits[:, 0, 5] - logits[:, 0, 9]).double()], dim=-1)


def distance(vlm: VisionLanguageModel, cells: Sequence[EdgeCell], **keywords: Tensor) -> tuple[float, float]:
    """How far sweep and plain way are apart at most, and the share of cells that move a score."""
    run = make_run(vlm, **keywords)
    found, slow = sweep(vlm, run, cells, measure), plain_scores(vlm, run, cells, measure)
    moved = (slow - found.base).abs().amax((1, 2)) > 1e-7
    assert not bool(moved[found.free].any())
    return float((found.scores - slow).abs().max()), float(moved.double().mean())


def sample(vlm: VisionLanguageModel, count: int = 60) -> list[EdgeCell]:
    every = make_cells(vlm)
    return random.Random(0).sample(every, min(count, len(every)))


def test_the_sweep_is_exact_on_every_cell(exact_vlm):
    difference, moved = distance(exact_vlm, make_cells(exact_vlm))
    assert difference <= 1e-12
    assert moved > 0.5


@pytest.mark.parametrize("count", [20, pytest.param(45, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_sweep_is_exact_on_families_without_a_row(name, count, monkeypatch):
    vlm = make(name, monkeypatch)
    difference, moved = distance(vlm, sample(vlm, count))
    assert difference <= 1e-12
    assert moved > 0.3


def with_block() -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[2:7, 2:7] = True
    return mask[None, None]


def prefix() -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:10, :10] = True
    return mask[None, None]


@pytest.mark.parametrize("mask", [with_block, prefix], ids=["a bidirectional block", "prefix-LM"])
def test_other_masks_are_kept(exact_llava, mask):
    backwards = [EdgeCell(cut=cut((5, 6), (2, 3)), first=first, last=first + 1) for first in range(3)]
    assert distance(exact_llava, [*sample(exact_llava), *backwards], attention_mask=mask())[0] <= 1e-12
    assert distance(exact_llava, backwards, attention_mask=mask())[1] == 1.0
    assert distance(exact_llava, backwards)[1] == 0.0  # causal attention has no such edges


def test_a_change_reaches_through_several_layers(exact_llava):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[2:5, 2:5] = mask[4:8, 4:8] = True  # 7 is seen by 4 to 6, and 4 by 2 and 3 in the layer after
    cells = [EdgeCell(cut=cut((5,), (7,)), first=first, last=first) for first in range(exact_llava.layers)]
    difference, moved = distance(exact_llava, cells, attention_mask=mask[None, None])
    assert difference <= 1e-12
    assert moved >= 0.5


def test_equal_cells_have_equal_scores(exact_llava):
    cells = [EdgeCell(cut=CUTS["image to last"], first=1, last=2)] * 3
    found = sweep(exact_llava, make_run(exact_llava), cells, measure)
    assert torch.equal(found.scores, found.scores[:1].expand(3, -1, -1))
    assert not torch.equal(found.scores[0], found.base)


# ---- oracles from outside ----


def eager(vlm: VisionLanguageModel, run: Runs, cell: EdgeCell) -> Tensor:
    """(metric,): the model's own eager attention, given another additive mask in the window's layers by hand."""
    later = torch.ones(run.length, run.length, dtype=torch.bool).triu(1)
    hidden = hidden_edges(cell.cut, run.length, vlm.heads) | later
    mask = torch.zeros(1, *hidden.shape, dtype=vlm.dtype).masked_fill_(hidden, torch.finfo(vlm.dtype).min)
    decoder = vlm.addresses.decoder
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    with ExitStack() as stack:
        stack.callback(setattr, decoder.config, "_attn_implementation", before)
        for layer in range(cell.first, cell.last + 1):
            attention = vlm.module(Site("attention", layer))
            hook = attention.register_forward_pre_hook(
                lambda _module, given, words: (given, {**words, "attention_mask": mask}), with_kwargs=True
            )
            stack.callback(hook.remove)
        return measure(vlm.forward(run.base, positions=run.scored))[0]


@torch.no_grad()
def test_the_plain_way_is_what_eager_attention_does_with_the_mask(exact_vlm):
    run, cells = make_run(exact_vlm), sample(exact_vlm, 25)
    found = plain_scores(exact_vlm, run, cells, measure)[..., 0]
    expected = torch.stack([eager(exact_vlm, run, cell) for cell in cells])
    assert (found - expected).abs().max() <= 1e-6  # eager attention takes its softmax in float32
    assert (found - measure(exact_vlm.forward(run.base, positions=run.scored))).abs().max() > 1e-3


def test_a_cut_in_all_layers_equals_masking_in_the_plain_model(exact_llava, photo):
    prompt = exact_llava.prompt(photo, QUESTION)
    run = Runs.of_one(exact_llava.embed(prompt), scored=prompt.groups["last"])

    def probability(source: str, target: str) -> float:
        cell = EdgeCell(cut=cut(prompt.groups[source], prompt.groups[target]), first=0, last=exact_llava.layers - 1)
        return float(sweep(exact_llava, run, [cell], lambda logits: logits[:, -1].softmax(-1)[:, 7:8]).scores)

    for source, target in (("image", "last"), ("image", "question"), ("question", "last")):
        masked = knockout_probability(exact_llava, prompt, source, target, answer_id=7)
        assert probability(source, target) == pytest.approx(masked, abs=1e-13)
        assert masked != pytest.approx(knockout_probability(exact_llava, prompt, (), (), answer_id=7), abs=1e-6)


def test_cutting_nothing_changes_nothing_bit_for_bit(random_vlm):
    run = make_run(random_vlm)
    with torch.no_grad():
        clean = measure(random_vlm.forward(run.base, positions=run.scored))[0]
    nothing = [EdgeCell(cut=CUTS[name], first=1, last=2) for name in ("nothing", "to nothing", "later to earlier")]
    found = sweep(random_vlm, run, nothing, measure)
    assert all(torch.equal(each[:, 0], clean) for each in found.scores)
    assert found.free.all()
    assert found.work.token_layers == 0
    something = sweep(random_vlm, run, [EdgeCell(cut=CUTS["image to last"], first=1, last=2)], measure)
    assert not torch.equal(something.scores[0, :, 0], clean)


# ---- what it costs ----


def test_a_cell_computes_only_what_can_change(random_llava):
    layers = random_llava.layers
    run = replace(make_run(random_llava), scored=LAST)

    def tokens(which: Cut, *windows: tuple[int, int]) -> int:
        cells = [EdgeCell(cut=which, first=first, last=last) for first, last in windows]
        return sweep(random_llava, run, cells, lambda logits: logits[:, -1, 7:8]).work.token_layers

    last, asked = cut(IMAGE, LAST), cut(IMAGE, ASKED)
    assert [tokens(last, (first, layers - 1)) for first in range(layers)] == [layers - first for first in range(layers)]
    # the targets in the first layer, all after them in those between, the scored one in the last
    after = LENGTH - ASKED[0]
    assert tokens(asked, (1, 1)) == len(ASKED) + (layers - 3) * after + 1
    assert tokens(asked, (0, 0), (0, 1), (0, 0)) == tokens(asked, (0, 0)) + (layers - 2) * after + 1  # shares the start
    assert tokens(asked, (layers - 1, layers - 1)) == 0  # the answer no longer hears them


def test_dropped_tokens_are_not_computed_any_more(exact_llava):
    run, end = replace(make_run(exact_llava), scored=LAST), exact_llava.layers - 1
    gone = IMAGE[::2]
    kept = [place for place in range(LENGTH) if place not in gone]
    cells = [EdgeCell(cut=cut(gone, kept), first=layer, last=end) for layer in range(end + 1)]
    whole = sweep(exact_llava, run, cells, measure_last)
    found = sweep(exact_llava, run, [replace(cell, is_dropped=True) for cell in cells], measure_last)
    assert (found.scores - plain_scores(exact_llava, run, cells, measure_last)).abs().max() <= 1e-12
    assert (found.scores - found.base).abs().min() > 1e-7
    assert found.work.token_layers < whole.work.token_layers
    after = LENGTH - 1 - IMAGE[0] - 1  # all after the first one but the other one
    alone = sweep(exact_llava, run, [replace(cells[0], is_dropped=True)], measure_last)
    assert alone.work.token_layers == end * after + 1


def measure_last(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)[:, -1, 7:8]


def test_work_in_small_pieces_gives_the_same(exact_llava):
    run, cells = make_run(exact_llava), sample(exact_llava)
    whole = sweep(exact_llava, run, cells, measure).scores
    for settings in (Engine(tokens_per_call=1), Engine(memory=1, tokens_per_call=7)):
        assert (sweep(exact_llava, run, cells, measure, settings=settings).scores - whole).abs().max() <= 1e-12


def test_where_memory_runs_out_batches_are_halved(exact_llava, monkeypatch):
    run, cells = make_run(exact_llava), sample(exact_llava)
    expected = sweep(exact_llava, run, cells, measure)
    whole = sweeps._Sweep._run

    def limited(self: sweeps._Sweep, chunk: Chunk, scores: Tensor, tokens: int) -> None:
        if len(chunk.lanes) > 3:
            raise torch.OutOfMemoryError("no room")
        whole(self, chunk, scores, tokens)

    monkeypatch.setattr(sweeps._Sweep, "_run", limited)
    found = sweep(exact_llava, run, cells, measure)
    assert found.report.halvings > 0 == expected.report.halvings
    assert (found.scores - expected.scores).abs().max() <= 1e-12


def test_memory_that_runs_out_for_one_cell_is_an_error(random_llava, monkeypatch):
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sweeps._Sweep, "_run", never)
    with pytest.raises(TraceError, match="memory ran out for a single cell"):
        sweep(random_llava, make_run(random_llava), sample(random_llava, 5), measure)


# ---- what is noticed ----


def test_a_token_that_would_see_nothing_is_refused(random_llava):
    first = EdgeCell(cut=cut((0,), (0, 3)), first=0, last=0)
    with pytest.raises(TraceError, match="some token would see nothing at all"):
        sweep(random_llava, make_run(random_llava), [first], measure)


def heads_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    span = lanes.CutSpan.rows
    monkeypatch.setattr(
        lanes.CutSpan,
        "rows",
        lambda self, cuts: span(
            replace(self, cuts=tuple(replace(each, heads=()) for each in self.cuts), _cache={}),
            [None if each is None else replace(each, heads=()) for each in cuts],
        ),
    )


def window_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_cut_at", lambda lane, cell, layer: lane.cut)


def window_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_cut_at", lambda lane, cell, layer: lane.cut if layer == cell.first else None)


def own_keys_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lanes.CutSpan.job

    def job(self, layer, read, entries):
        found, uncut = whole(self, layer, read, entries), whole(self, layer, read, [0] * len(entries))
        found.own = uncut.own
        return found

    monkeypatch.setattr(lanes.CutSpan, "job", job)


@pytest.mark.parametrize("mutation", [heads_ignored, window_never_ends, window_ends_at_once, own_keys_never_hidden])
def test_a_broken_sweep_is_noticed(exact_llava, monkeypatch, mutation):
    mutation(monkeypatch)
    assert distance(exact_llava, make_cells(exact_llava)[::3])[0] > 1e-6


def test_the_model_attends_as_before_afterwards(random_llava):
    before = random_llava.addresses.decoder.config._attn_implementation
    with pytest.raises(ZeroDivisionError), replaying(random_llava):
        raise ZeroDivisionError
    plain_scores(random_llava, make_run(random_llava), sample(random_llava, 1), measure)
    assert random_llava.addresses.decoder.config._attn_implementation == before
