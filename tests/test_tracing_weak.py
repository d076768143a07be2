"""Corruptions too weak to trace are reported with their numbers, and noise without a scale finds its own."""

import re
from dataclasses import replace

import pytest
import torch
from multrace.data import World
from multrace.tracing import BlankImage, ImageNoise, SwapImage, TextNoise, TraceError
from multrace.tracing.corruptions import LADDER
from multrace.tracing.engine import METRICS, Engine
from multrace.tracing.engine.cells import WeakCorruption
from small_traces import ENGINES, ask, trace
from torch import Tensor


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    return ENGINES[request.param]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_a_corruption_that_does_not_lower_the_answer_is_reported_instead_of_traced(
    random_llava, photo, direction, metric, engine
):
    prompt, settings = ask(random_llava, photo), {"direction": direction, "metrics": metric, "engine": engine}
    weak = TextNoise(samples=2, scale=1e-4)
    with pytest.raises(WeakCorruption, match=re.escape(weak.corrupt(random_llava, prompt).description)) as caught:
        trace(random_llava, prompt, weak, even_if_weak=False, **settings)
    clean, corrupted = map(float, re.findall(r"([\d.e-]+) (?:clean|corrupted)", str(caught.value)))
    with torch.no_grad():
        logits = random_llava.logits(prompt)[0, -1].double()
    best, second = logits.topk(2).values
    expected = {"probability": logits.softmax(-1).max(), "log_probability": logits.log_softmax(-1).max()}
    assert clean == pytest.approx(float((expected | {"logit_difference": best - second})[metric]), rel=1e-2)
    assert corrupted == pytest.approx(clean, rel=1e-2)
    assert isinstance(caught.value, TraceError) and "even_if_weak=True (--even-if-weak)" in str(caught.value)
    own = random_llava.decode([int(logits.argmax())]).strip()
    named = (
        f"the logit difference of {own!r} and" if metric == "logit_difference" else f"({own!r}, the model's own answer)"
    )
    assert named in str(caught.value)
    anyway = trace(random_llava, prompt, weak, **settings)
    assert anyway.total_effect != 0
    strong = trace(random_llava, prompt, BlankImage(), even_if_weak=False, **settings)
    assert strong.corrupted_scores.numel() == 1


def test_nothing_is_computed_or_written_for_a_weak_corruption(random_llava, photo, tmp_path):
    seen = []

    def counting(logits: Tensor) -> Tensor:
        seen.append(len(logits))
        return logits[:, -1, 0]

    settings = {"metrics": counting, "engine": replace(ENGINES["replay"], checkpoint=tmp_path / "cells")}
    with pytest.raises(WeakCorruption):
        trace(random_llava, ask(random_llava, photo), SwapImage(photo), even_if_weak=False, **settings)
    assert len(seen) == 2  # both runs
    assert not list(tmp_path.iterdir())


def test_scoring_another_answer_than_the_models_is_said_and_its_logit_difference_can_be_traced(tiny_vlm):
    world = World()
    fact = world.facts[0]
    entity, question = world.entities[fact.entity], world.question(fact)
    other = next(peer for peer in world.of_kind(entity.kind) if peer.facts[fact.key] != entity.facts[fact.key])
    pictures = [world.picture(each, 1).image for each in (entity, other)]
    prompt = tiny_vlm.prompt(pictures[0], question.text, constraint=question.constraint)
    own, wrong = tiny_vlm.answers([prompt])[0], other.facts[fact.key]
    assert own != wrong
    settings = {"answer": wrong, "whole_answer": True, "even_if_weak": False}
    swap = SwapImage(pictures[1])  # which makes the model give just this answer
    with pytest.raises(WeakCorruption, match="does not lower the answer's probability") as caught:
        trace(tiny_vlm, prompt, swap, **settings)
    message = str(caught.value)
    assert f"does not lower the answer's probability ({wrong!r}): " in message
    assert f"the model answers {own!r}, and you score {wrong!r}" in message
    assert f"answer={own!r}, foil={wrong!r} and metrics='logit_difference' (--answer, --foil, --metrics)" in message
    advised = settings | {"answer": own, "foil": wrong, "metrics": "logit_difference"}
    found = trace(tiny_vlm, prompt, swap, **advised)
    assert found.clean > 1 and found.total_effect > 1
    with pytest.raises(WeakCorruption, match=re.escape(f"the logit difference of {own!r} and {wrong!r}")):
        trace(tiny_vlm, prompt, SwapImage(pictures[0]), **advised)


def test_a_first_token_that_spells_nothing_is_said(tiny_vlm):
    """The embedded tokenizer begins "Apple" with a bare blank, as it begins most names that it never learned."""
    prompt = tiny_vlm.prompt(None, "Apple A5 was created by", constraint="Apple A5")
    assert tiny_vlm.decode([prompt.with_answer("Apple").answer_ids[0]]).isspace()
    settings = {"answer": "Apple", "even_if_weak": False, "positions": ("constraint", "last")}
    with pytest.raises(WeakCorruption) as caught:
        trace(tiny_vlm, prompt, TextNoise(scale=3.0), **settings)
    message = str(caught.value)
    assert "the first token of the answer that you score spells nothing (it is '\u0120'), as that of many" in message
    assert "score all its tokens with whole_answer=True (--whole-answer), or trace it anyway" in message


@pytest.mark.parametrize("noise", [TextNoise, ImageNoise])
def test_noise_without_a_scale_is_calibrated_to_halve_the_answer(random_llava, photo, noise, engine):
    prompt = ask(random_llava, photo)
    found = trace(random_llava, prompt, noise(scale=None, samples=3), engine=engine)
    assert found.scale in LADDER
    assert "calibrated" in found.corruption
    fixed = trace(random_llava, prompt, noise(scale=found.scale, samples=3), engine=engine)
    assert torch.equal(found.samples["mlp"], fixed.samples["mlp"])
    assert found.deviation == fixed.deviation
    weaker = LADDER[: LADDER.index(found.scale)]
    drops = [trace(random_llava, prompt, noise(scale=scale, samples=3), positions="last") for scale in weaker]
    if "no scale tried" not in found.corruption:
        assert float(found.corrupted.mean()) <= found.clean / 2
        assert all(float(each.corrupted.mean()) > each.clean / 2 for each in drops)


def test_a_scale_is_calibrated_for_the_answer_that_is_given(random_llava, photo):
    prompt, scales = ask(random_llava, photo), {}
    for answer in ("red", "green", "blue", "Ada Example", "tennis", "Oslo"):
        found = trace(random_llava, prompt, TextNoise(scale=None, samples=2), answer=answer, positions="last")
        scales[answer] = found.scale
        if "no scale tried" not in found.corruption:
            assert float(found.corrupted.mean()) <= found.clean / 2
    assert len(set(scales.values())) > 1
