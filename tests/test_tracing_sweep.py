"""The fast sweep against one forward pass per cell, in true float64: every kind of cell, on every family."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.models.frame import DecoderInput
from multrace.tracing.engine import Engine, Runs, StateCell, plain_scores, run_scores
from multrace.tracing.engine.measure import sweep
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

QUESTION, CONSTRAINT, ANSWER = "Who founded the company in this photo?", "the company in this photo", "Ada Example"
FAMILIES = ("llava_llama", "llava_phi", "llama", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a prompt with all but the last token of an answer after it."""

    vlm: VisionLanguageModel
    prompt: Prompt

    @property
    def embeddings(self) -> Tensor:
        return self.vlm.embeddings(self.prompt)[:, :-1]

    @property
    def scored(self) -> tuple[int, ...]:
        return tuple(range(self.prompt.groups["last"][0], self.prompt.length - 1))

    def corrupted(self, group: str, samples: int) -> Tensor:
        """Noise on a group of tokens."""
        embeddings, positions = self.embeddings.repeat(samples, 1, 1), list(self.prompt.groups[group])
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(samples, len(positions), self.vlm.hidden, generator=generator, dtype=torch.float64)
        embeddings[:, positions] += 3 * embeddings.std() * noise.to(embeddings)
        return embeddings

    def runs(self, group: str, samples: int, *, restores: bool = True, length: int | None = None) -> Runs:
        clean, corrupted = self.embeddings[:, :length], self.corrupted(group, samples)[:, :length]
        pair = [DecoderInput(embeddings=each) for each in (corrupted, clean)]
        pair = pair if restores else pair[::-1]
        scored = self.scored if length is None else (length - 1,)
        return Runs(base=pair[0], source=pair[1], scored=scored, frozen=self.prompt.groups["image"])

    def measure(self, logits: Tensor) -> Tensor:
        """The answer's log probability, and a difference of logits at the first and the last scored position."""
        ids = self.prompt.answer_ids[: logits.shape[1]]
        chosen = logits.double().log_softmax(-1)[:, range(len(ids)), list(ids)]
        return torch.stack([chosen.sum(-1), (logits[:, 0, 5] - logits[:, -1, 7]).double()], dim=-1)


def true_norm(self: LlamaRMSNorm, states: Tensor) -> Tensor:
    """Llama's norm without its cast to float32, which would round small differences away."""
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def make_case(vlm: VisionLanguageModel, photo: object) -> Case:
    image = photo if vlm.has_vision else None
    return Case(vlm=vlm, prompt=vlm.prompt(image, QUESTION, constraint=CONSTRAINT, answer=ANSWER))


@pytest.fixture(params=FAMILIES)
def exact(request: pytest.FixtureRequest, load_double: Callable, photo, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Each family, really computing in float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", true_norm)
    return make_case(load_double(request.getfixturevalue(f"{request.param}_path")), photo)


@pytest.fixture
def exact_llava(llava_llama_path, load_double: Callable, photo, monkeypatch: pytest.MonkeyPatch) -> Case:
    """LLaVA-Llama, with grouped-query heads, really computing in float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", true_norm)
    return make_case(load_double(llava_llama_path), photo)


def rows_of(case: Case) -> list[tuple[int, ...]]:
    """Single tokens, groups, and a set that is no group, among all positions of the prompt."""
    groups, last = case.prompt.groups, case.prompt.groups["last"][0]
    rows = [(0,), (groups["constraint"][0],), (groups["constraint"][-1],), (last - 1,), (last,)]
    rows += [groups["constraint"], groups["question"], tuple(range(last + 1))]
    if groups["image"]:
        image = groups["image"]
        rows += [image[:1], image[5:6], image[-1:], image, image[4:8], (image[3], image[9], groups["constraint"][1])]
    return rows


def every_cell(case: Case, widest: int = 3) -> Iterator[StateCell]:
    """Every kind, window, variant and row."""
    for positions in rows_of(case):
        for first in range(case.vlm.layers):
            for last in range(first, min(case.vlm.layers, first + widest)):
                span = {"first": first, "last": last, "positions": positions}
                for kind in ("hidden", "mlp", "attention"):
                    for severed in (None, "mlp", "attention"):
                        for is_direct in (False, True):
                            yield StateCell(kind=kind, severed=severed, is_direct=is_direct, **span)
                for head in (0, case.vlm.heads - 1):
                    yield StateCell(kind="head", head=head, **span)


def some_cells(case: Case, count: int, seed: int = 0) -> list[StateCell]:
    cells = list(every_cell(case))
    return random.Random(seed).sample(cells, count)


def every_sweep() -> Iterator:
    """Family, group and direction. Half of them are quick: each family, each pair of a group and a direction."""
    for number, family in enumerate(FAMILIES):
        for group in ("constraint", "image") if family.startswith("llava") else ("constraint",):
            for restores in (True, False):
                is_quick = (number + (group == "image") + restores) % 2
                marks = () if is_quick else pytest.mark.slow
                yield pytest.param(
                    family, group, restores, marks=marks, id=f"{family}-{group}-{'restore' if restores else 'corrupt'}"
                )


@pytest.mark.parametrize(("exact", "group", "restores"), [*every_sweep()], indirect=["exact"])
def test_the_sweep_equals_the_plain_way(exact, group, restores):
    runs = exact.runs(group, samples=3 if group == "constraint" else 2, restores=restores)
    cells = some_cells(exact, 200)
    found = sweep(exact.vlm, runs, cells, exact.measure)
    slow = plain_scores(exact.vlm, runs, cells, exact.measure)
    assert found.scores.shape == (200, 2, runs.samples)
    assert torch.allclose(found.scores, slow, rtol=0, atol=1e-12)
    changes = (slow - found.base).abs().amax((1, 2))
    assert (changes > 1e-7).float().mean() > 0.4  # most cells do something, so agreeing about them means something
    assert 0 < int(found.free.sum()) < 200


def test_every_sort_of_cell_at_every_row_and_in_every_span_of_one_model(exact_llava):
    runs = exact_llava.runs("image", samples=2)
    # Each span of a row has 20 sorts of cells, each row 7 spans. As 3 divides neither, every third cell still pairs
    # each sort with each span and each row, and each span with each row.
    cells = list(every_cell(exact_llava, widest=2))[::3]
    sorts = [(cell.kind, cell.head, cell.severed, cell.is_direct) for cell in cells]
    spans = [(cell.first, cell.last) for cell in cells]
    rows = [cell.positions for cell in cells]
    for one, other, pairs in ((sorts, spans, 20 * 7), (sorts, rows, 20 * 14), (spans, rows, 7 * 14)):
        assert len({*zip(one, other, strict=True)}) == pairs
    found = sweep(exact_llava.vlm, runs, cells, exact_llava.measure)
    slow = plain_scores(exact_llava.vlm, runs, cells, exact_llava.measure)
    assert torch.allclose(found.scores, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [1, 2048])
@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_how_cells_are_batched_changes_nothing(exact_llava, memory, tokens):
    runs, cells = exact_llava.runs("constraint", samples=3), some_cells(exact_llava, 150, seed=1)
    found = sweep(
        exact_llava.vlm, runs, cells, exact_llava.measure, settings=Engine(memory=memory, tokens_per_call=tokens)
    )
    expected = sweep(exact_llava.vlm, runs, cells, exact_llava.measure)
    assert torch.allclose(found.scores, expected.scores, rtol=0, atol=1e-12)
    assert found.work.token_layers == expected.work.token_layers


def test_the_order_of_cells_and_cells_asked_twice_change_nothing(exact_llava):
    runs, cells = exact_llava.runs("image", samples=2), some_cells(exact_llava, 60, seed=2)
    once = sweep(exact_llava.vlm, runs, cells, exact_llava.measure).scores
    twice = sweep(exact_llava.vlm, runs, [*cells[::-1], *cells], exact_llava.measure).scores
    assert torch.allclose(twice[:60].flip(0), once, rtol=0, atol=1e-12)
    assert torch.allclose(twice[60:], once, rtol=0, atol=1e-12)


def test_in_float32_the_sweep_is_as_near_to_the_plain_way_as_that_is_to_itself(random_llava, photo):
    case = make_case(random_llava, photo)
    runs, cells = case.runs("constraint", samples=4, length=case.scored[0] + 1), some_cells(case, 120, seed=3)
    slow = plain_scores(case.vlm, runs, cells, case.measure)[:, 0].exp()
    one = Runs(base=runs.base.of_rows([0]), source=runs.source, scored=runs.scored, frozen=runs.frozen)
    noise = (plain_scores(case.vlm, one, cells, case.measure)[:, 0].exp() - slow[..., :1]).abs().max()
    found = sweep(case.vlm, runs, cells, case.measure).scores[:, 0].exp()
    assert (found - slow).abs().max() <= max(2e-5, 5 * float(noise))


# Theorems.


def test_putting_in_everything_gives_the_source_run_and_nothing_the_base_run(exact):
    runs = exact.runs("constraint", samples=3)
    everywhere, nowhere = tuple(range(runs.length)), ()
    last = exact.vlm.layers - 1
    cells = [StateCell(kind="hidden", first=layer, last=layer, positions=everywhere) for layer in range(last + 1)]
    cells += [StateCell(kind=kind, first=0, last=last, positions=nowhere) for kind in ("hidden", "mlp", "attention")]
    found = sweep(exact.vlm, runs, cells, exact.measure)
    clean = run_scores(exact.vlm, runs.source.for_rows(3), runs, exact.measure)
    corrupted = run_scores(exact.vlm, runs.base, runs, exact.measure)
    assert torch.allclose(found.scores[: last + 1], clean.expand(last + 1, -1, -1), rtol=0, atol=1e-12)
    assert torch.allclose(found.scores[last + 1 :], corrupted.expand(3, -1, -1), rtol=0, atol=1e-12)
    assert not torch.allclose(clean, corrupted, rtol=0, atol=1e-4)
    assert bool(found.free.all())


def test_each_head_is_a_part_of_the_attention_of_its_own(exact_llava):
    runs, vlm = exact_llava.runs("constraint", samples=2), exact_llava.vlm
    positions = exact_llava.prompt.groups["last"]
    whole = sweep(vlm, runs, [StateCell(kind="attention", first=3, last=3, positions=positions)], exact_llava.measure)
    heads = [StateCell(kind="head", head=head, first=3, last=3, positions=positions) for head in range(vlm.heads)]
    alone = sweep(vlm, runs, heads, exact_llava.measure).scores
    # The last layer acts through the residual stream only, so single heads do not add up; none alone is the whole.
    assert ((alone - whole.scores).abs().amax((1, 2)) > 1e-6).all()
    assert len({round(float(each), 12) for each in alone[:, 0, 0]}) == vlm.heads


def test_words_behind_the_picture_cannot_change_what_the_picture_is(exact_llava):
    runs = exact_llava.runs("constraint", samples=2)
    image = exact_llava.prompt.groups["image"]
    cells = [StateCell(kind="mlp", first=layer, last=layer, positions=image) for layer in range(exact_llava.vlm.layers)]
    found = sweep(exact_llava.vlm, runs, cells, exact_llava.measure)
    assert bool(found.free.all())
    assert found.work.token_layers == 0
    slow = plain_scores(exact_llava.vlm, runs, cells, exact_llava.measure)
    base = run_scores(exact_llava.vlm, runs.base, runs, exact_llava.measure)
    assert torch.equal(slow, base.expand_as(slow))


# What it costs.


def test_the_cost_of_text_cells_is_what_the_law_says(exact_llava):
    runs = exact_llava.runs("constraint", samples=2, length=exact_llava.scored[0] + 1)
    first, layers = exact_llava.prompt.groups["constraint"][0], exact_llava.vlm.layers
    tokens = range(first, runs.length)
    cells = [
        StateCell(kind="hidden", first=layer, last=layer, positions=(position,))
        for position in tokens
        for layer in range(layers)
    ]
    found = sweep(exact_llava.vlm, runs, cells, exact_llava.measure)
    # A cell at the output of layer l computes each later layer for the positions from its own on, and the last layer
    # for the answer's alone; the first corrupted token follows the clean run for good, so it need not be computed.
    expected = sum(
        (runs.length - position - (position == first)) * max(0, layers - 2 - layer) + (layer < layers - 1)
        for position in tokens
        for layer in range(layers)
    )
    assert found.work.token_layers == 2 * expected
    assert int(found.free.sum()) == len(tokens)  # the last layer's


def test_windows_that_begin_alike_share_their_beginning(exact_llava):
    runs, positions = exact_llava.runs("constraint", samples=2), exact_llava.prompt.groups["constraint"][1:2]
    cells = [StateCell(kind="mlp", first=0, last=last, positions=positions) for last in range(exact_llava.vlm.layers)]
    together = sweep(exact_llava.vlm, runs, cells, exact_llava.measure)
    apart = [sweep(exact_llava.vlm, runs, [cell], exact_llava.measure) for cell in cells]
    assert together.work.token_layers < sum(each.work.token_layers for each in apart)
    scores = torch.cat([each.scores for each in apart])
    assert torch.allclose(together.scores, scores, rtol=0, atol=1e-12)
    different = {round(float(each), 12) for each in scores[:, 0, 0]}
    assert len(different) == len(cells) - 1  # at a token that is not scored, the last layer adds nothing


def test_runs_that_do_not_differ_cost_nothing(exact_llava):
    runs = exact_llava.runs("constraint", samples=1)
    same = Runs(base=runs.source, source=runs.source, scored=runs.scored)
    found = sweep(exact_llava.vlm, same, some_cells(exact_llava, 20), exact_llava.measure)
    assert found.work.token_layers == 0
    assert torch.equal(found.scores, found.base.expand_as(found.scores))
