"""Attribution patching: first-order estimates, right in the limit, and the exact values of the best cells only."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.models.replay import replaying
from multrace.tracing import (
    BlankImage,
    CausalTrace,
    Corruption,
    ImageNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    causal_trace,
)
from multrace.tracing.causal import estimated_changes, rank_agreement
from multrace.tracing.engine import Engine, Runs, StateCell, plain_scores, run_scores
from PIL import Image
from torch import Tensor

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
KINDS = {"hidden": None, "mlp": None, "attention": None, "head": 1}
FAST = Engine(name="replay", checks=0)


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    settings = {"even_if_weak": True, "progress": False, "engine": FAST} | settings
    return causal_trace(vlm, prompt, corruption=corruption, **settings)


def measure(logits: Tensor) -> Tensor:
    """The probability of token 5, the log probability of token 7 and a difference of logits."""
    logs = logits[:, -1].double().log_softmax(-1)
    return torch.stack([logs[:, 5].exp(), logs[:, 7], logs[:, 5] - logs[:, 9]], dim=-1)


def runs_of(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, *, restores: bool = True) -> Runs:
    clean = vlm.embed(prompt)
    pair = corruption.corrupt(vlm, prompt).entering(clean), clean
    base, source = pair if restores else pair[::-1]
    return Runs(base=base, source=source, scored=(prompt.length - 1,), frozen=prompt.groups["image"])


def single_cells(vlm: VisionLanguageModel, prompt: Prompt) -> list[StateCell]:
    """One layer each, at single tokens and groups, of every kind."""
    groups = prompt.groups
    rows = [groups["constraint"][:1], groups["constraint"], groups["question"][-1:], groups["last"]]
    rows += [groups["image"], groups["image"][5:6]] if groups["image"] else []
    return [
        StateCell(kind=kind, head=head, first=layer, last=layer, positions=positions)
        for kind, head in KINDS.items()
        for positions in rows
        for layer in range(vlm.layers)
    ]


# In the limit of small corruptions.


@pytest.mark.parametrize("restores", [True, False], ids=["restore", "corrupt"])
@pytest.mark.parametrize("group", ["constraint", "image or all"])
def test_estimates_are_the_exact_effects_of_a_small_corruption(exact_vlm, photo, group, restores):
    prompt = ask(exact_vlm, photo)
    noise = (
        TextNoise if group == "constraint" else ImageNoise if exact_vlm.has_vision else partial(TextNoise, group="all")
    )
    cells = single_cells(exact_vlm, prompt)[::3]  # of four layers each, so every kind keeps every row and every layer
    errors = {}
    for scale in (1e-3, 1e-4, 3.0):
        runs = runs_of(exact_vlm, prompt, noise(scale=scale, samples=2), restores=restores)
        base = run_scores(exact_vlm, runs.base.for_rows(2), runs, measure)
        exact = plain_scores(exact_vlm, runs, cells, measure) - base
        estimated = estimated_changes(exact_vlm, runs, cells, measure)
        assert estimated.shape == exact.shape == (len(cells), 3, 2)
        errors[scale] = float(((estimated - exact).abs() / exact.abs().amax((0, 2), keepdim=True)).max())
        assert (exact[estimated == 0] == 0).all()
    assert errors[1e-3] < 0.01
    assert errors[1e-4] < errors[1e-3] / 5  # what is left is of the next order
    assert errors[3.0] > 0.05  # far away, an estimate is an estimate


def test_each_effect_is_right_to_a_percent_in_the_limit(exact_llava, photo):
    prompt = ask(exact_llava, photo)
    cells = single_cells(exact_llava, prompt)
    runs = runs_of(exact_llava, prompt, TextNoise(scale=1e-5, samples=1))
    exact = plain_scores(exact_llava, runs, cells, measure) - run_scores(exact_llava, runs.base, runs, measure)
    estimated = estimated_changes(exact_llava, runs, cells, measure)
    moved = exact.abs() > 1e-3 * exact.abs().amax(0)
    for kind in KINDS:
        of_kind = torch.tensor([cell.kind == kind for cell in cells])[:, None, None] & moved
        assert of_kind.sum() > 10
        assert (estimated[of_kind] / exact[of_kind] - 1).abs().max() < 0.01


def test_estimates_are_directional_derivatives(exact_llava, photo):
    """Along the way from the own states to the lent ones, by finite differences of the replayed layers."""
    prompt = ask(exact_llava, photo)
    runs = runs_of(exact_llava, prompt, TextNoise(samples=1))
    positions, step = prompt.groups["constraint"], 1e-5
    for layer in range(exact_llava.layers - 1):
        cell = StateCell(kind="hidden", first=layer, last=layer, positions=positions)
        estimated = estimated_changes(exact_llava, runs, [cell], measure)[0, :, 0]
        differences = []
        for sign in (1, -1):
            moved = nudged(exact_llava, runs, layer, positions, sign * step)
            differences.append(sign * moved / (2 * step))
        assert torch.allclose(sum(differences), estimated, rtol=1e-5, atol=1e-9)
        assert estimated.abs().min() > 1e-6


def nudged(vlm: VisionLanguageModel, runs: Runs, layer: int, positions: tuple[int, ...], share: float) -> Tensor:
    """(metric,): scores when a layer's output goes so far from the base run's states to the source run's."""
    states = []

    def record(_module: object, _arguments: object, output: Tensor) -> None:
        states.append(output)

    def move(_module: object, _arguments: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, list(positions)] += share * (states[0] - states[1])[:, list(positions)]
        return changed

    module = vlm.addresses.layers[layer]
    handle = module.register_forward_hook(record)
    for entering in (runs.source, runs.base):
        run_scores(vlm, entering, runs, measure)
    handle.remove()
    handle = module.register_forward_hook(move)
    scores = run_scores(vlm, runs.base, runs, measure)[:, 0]
    handle.remove()
    return scores


def test_runs_that_do_not_differ_have_no_effects(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    runs = runs_of(random_vlm, prompt, TextNoise(samples=2))
    cells = single_cells(random_vlm, prompt)
    assert not estimated_changes(random_vlm, replace(runs, base=runs.source), cells, measure).any()
    assert estimated_changes(random_vlm, runs, cells, measure).any()


def test_nothing_is_left_behind(random_llava, photo):
    prompt = ask(random_llava, photo)
    runs = runs_of(random_llava, prompt, TextNoise(samples=2))
    before = random_llava.logits(prompt)
    hooks = [len(layer._forward_hooks) for layer in random_llava.addresses.layers]  # transformers leaves some
    estimated_changes(random_llava, runs, single_cells(random_llava, prompt), measure)
    assert all(each.grad is None and not each.requires_grad for each in random_llava.model.parameters())
    assert [len(layer._forward_hooks) for layer in random_llava.addresses.layers] == hooks
    assert torch.equal(random_llava.logits(prompt), before)
    with replaying(random_llava):
        assert torch.is_grad_enabled()


# As a filter in front of the exact sweep.


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_the_best_cells_are_exact_and_the_others_marked(exact_llava, photo, other_photo, direction):
    prompt = ask(exact_llava, photo)
    settings = {"sites": ("hidden", "mlp", "attention", "heads"), "window": 1, "direction": direction}
    settings |= {"positions": ["image", "image_quadrants", "constraint", "question", "last"]}
    settings |= {"metrics": ("log_probability", "probability")}
    full = trace(exact_llava, prompt, SwapImage(other_photo), **settings)
    some = trace(exact_llava, prompt, SwapImage(other_photo), exact_cells=40, **settings)
    assert full.estimated == full.agreement == {}
    assert set(some.estimated) == set(full.kinds)
    assert sum(int((~each).sum()) for each in some.estimated.values()) == 40 == some.engine.cells
    for kind in full.kinds:
        known = ~some.estimated[kind]
        assert known.shape == full.scores[kind].shape
        exact, found = full.samples[kind], some.samples[kind]
        assert torch.allclose(found[:, known], exact[:, known], rtol=0, atol=1e-11)
        assert not torch.allclose(found[:, ~known], exact[:, ~known], rtol=0, atol=1e-6)
    assert all(-1 <= each <= 1 for each in some.agreement.values())
    assert {kind for kind, each in some.estimated.items() if int((~each).sum()) > 1} == set(some.agreement)
    assert some.clean == pytest.approx(full.clean, abs=1e-12)
    assert torch.allclose(some.corrupted, full.corrupted, rtol=0, atol=1e-12)


def test_the_exact_ones_are_those_with_the_largest_estimates(exact_llava, photo):
    prompt = ask(exact_llava, photo)
    settings = {"sites": ("mlp", "hidden"), "window": 1, "positions": "tokens"}
    corruption = TextNoise(samples=3, scale=1e-3)
    full = trace(exact_llava, prompt, corruption, **settings)
    some = trace(exact_llava, prompt, corruption, exact_cells=12, **settings)
    effects = torch.cat([full.indirect_effect(kind).abs().flatten() for kind in full.kinds])
    known = torch.cat([(~some.estimated[kind]).flatten() for kind in full.kinds])
    assert effects[known].min() >= 0.95 * effects[~known].max()
    assert all(each > 0.9 for each in some.agreement.values())  # so near to the clean run, the ranking is right


@pytest.mark.parametrize("corruption", [TextNoise(samples=4), ReplaceText(replacement="Paris city")], ids=str)
def test_for_large_corruptions_the_agreement_is_reported(random_vlm, photo, corruption):
    settings = {"sites": ("hidden", "mlp", "attention", "heads"), "window": 1, "positions": "tokens"}
    found = trace(random_vlm, ask(random_vlm, photo), corruption, exact_cells=60, **settings)
    assert found.agreement
    assert all(-1 <= each <= 1 for each in found.agreement.values())


def test_as_many_exact_cells_as_there_are_make_an_exact_trace(random_llava, photo):
    settings = {"sites": "mlp", "positions": ["constraint", "last"]}
    prompt, corruption = ask(random_llava, photo), TextNoise(samples=2)
    full = trace(random_llava, prompt, corruption, **settings)
    for count in (8, 1000):
        found = trace(random_llava, prompt, corruption, exact_cells=count, **settings)
        assert (found.estimated, found.agreement) == ({}, {})
        assert torch.equal(found.samples["mlp"], full.samples["mlp"])


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_several_tokens_of_an_answer_and_a_foil_are_estimated_too(exact_llava, photo, direction):
    settings = {"answer": "Ada Example", "foil": "Oslo and Kyoto", "whole_answer": True, "sites": ("hidden", "mlp")}
    settings |= {"metrics": ("logit_difference", "log_probability"), "window": 1, "positions": ["constraint", "last"]}
    settings |= {"direction": direction}
    prompt, corruption = ask(exact_llava, photo), TextNoise(samples=2, scale=1e-4)
    full = trace(exact_llava, prompt, corruption, **settings)
    some = trace(exact_llava, prompt, corruption, exact_cells=1, **settings)
    for metric in full.metrics:
        for kind in full.kinds:
            exact, found = full.indirect_effect(kind, metric), some.indirect_effect(kind, metric)
            assert (found - exact).abs().max() < 0.01 * exact.abs().max()


# Refusals.


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("direct", {"effect": "direct"}, "direct effects cannot be estimated by one backward pass"),
        ("severed", {"severed": "mlp"}, "severed modules cannot be estimated"),
        ("vision", {"sites": "vision", "positions": "image"}, "'vision' cells cannot be estimated"),
        ("none", {"exact_cells": 0}, "exact_cells=0: pass at least 1, or None for all"),
        ("blind", {"metrics": lambda logits: (logits[:, 0, 0] > 0).double()}, "no gradient.*leave out exact_cells"),
    ],
)
def test_what_cannot_be_estimated_is_refused(random_llava, photo, name, settings, message):
    settings = {"positions": ["image", "last"], "exact_cells": 1} | settings
    with pytest.raises(TraceError, match=message):
        trace(random_llava, ask(random_llava, photo), BlankImage(), **settings)


def test_a_model_that_cannot_be_replayed_cannot_be_estimated(random_llava, photo, monkeypatch):
    monkeypatch.setattr(random_llava.addresses.decoder, "_supports_attention_backend", False)
    monkeypatch.setattr("multrace.models.replay.observe.asks_for_attention", lambda _layer: False)
    with pytest.raises(TraceError, match="cannot be replayed, so nothing can be estimated"):
        trace(random_llava, ask(random_llava, photo), BlankImage(), positions="last", exact_cells=1, engine=Engine())


# Rank agreement.


def test_rank_agreement_is_spearmans():
    values = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert rank_agreement(values, values.exp()) == pytest.approx(1)
    assert rank_agreement(values, -values) == pytest.approx(-1)
    # By hand: ranks 0 1.5 1.5 3 and 0 1 2 3 have covariance 4.5 and variances 4.5 and 5, up to the same factor.
    tied = rank_agreement(torch.tensor([1.0, 2.0, 2.0, 7.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_agreement(values, torch.ones(4)) != rank_agreement(values, torch.ones(4))  # not a number
