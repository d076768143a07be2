"""Which engine answers and what it reports: equal scores, one warning where the fast one cannot, the self-check."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.tracing import (
    Box,
    CausalTrace,
    Corruption,
    ImageNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    causal_trace,
)
from multrace.tracing.engine import CellScores, Engine, Measure, Runs, StateCell, measure as measuring, plain_scores
from multrace.tracing.engine.measure import sweep
from PIL import Image
from torch import Tensor
from tqdm import tqdm

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
PLAIN, REPLAY = Engine(name="plain"), Engine(name="replay")
EVERYTHING = {"sites": ("hidden", "mlp", "attention", "heads"), "window": 3}


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    return causal_trace(vlm, prompt, corruption=corruption, **{"even_if_weak": True, "progress": False} | settings)


@pytest.fixture
def unreplayable(random_llava: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """A model that neither says nor shows that its attention function can be replaced."""
    monkeypatch.setattr(random_llava.addresses.decoder, "_supports_attention_backend", False)
    monkeypatch.setattr("multrace.models.replay.observe.asks_for_attention", lambda _layer: False)
    return random_llava


# Equal scores.


CORRUPTIONS = {"noise": TextNoise(samples=3), "words": ReplaceText(replacement="Paris city")}
FAMILIES = ("llava_llama", "llama", "llava_phi", "gpt2")


@pytest.mark.parametrize(
    ("exact_vlm", "corruption", "direction"),
    [
        pytest.param(
            family,
            CORRUPTIONS[name],
            direction,
            marks=() if (number + turn + (name == "words")) % 2 else pytest.mark.slow,
        )
        for number, family in enumerate(FAMILIES)
        for name in CORRUPTIONS
        for turn, direction in enumerate(("restore", "corrupt"))
    ],
    indirect=["exact_vlm"],
)
def test_in_true_float64_both_engines_give_the_same_trace(exact_vlm, photo, corruption, direction):
    prompt = ask(exact_vlm, photo)
    settings = EVERYTHING | {
        "direction": direction,
        "positions": [0, prompt.groups["constraint"][1], "question", "last"],
    }
    fast, slow = (trace(exact_vlm, prompt, corruption, engine=engine, **settings) for engine in (REPLAY, PLAIN))
    assert fast.kinds == slow.kinds
    assert abs(fast.clean - slow.clean) < 1e-12
    for kind in fast.kinds:
        assert torch.allclose(fast.samples[kind], slow.samples[kind], rtol=0, atol=1e-12)
        assert (slow.indirect_effect(kind).abs() > 1e-6).sum() > 3
    assert fast.engine.largest_difference < 1e-12


@pytest.mark.parametrize("noise", [TextNoise(samples=3), ImageNoise(samples=3)], ids=["text", "image"])
def test_in_float32_they_differ_as_rounding_does(random_llava, photo, noise):
    settings = EVERYTHING | {"positions": ["image", Box(0, 0, 48, 12), "constraint", "last"]}
    fast, slow = (
        trace(random_llava, ask(random_llava, photo), noise, engine=replace(engine, checks=30), **settings)
        for engine in (REPLAY, PLAIN)
    )
    largest = max(2e-5, 5 * fast.engine.plain_noise)
    for kind in fast.kinds:
        assert (fast.samples[kind] - slow.samples[kind]).abs().max() <= largest
    assert 0 < fast.engine.largest_difference <= largest
    assert 0 < fast.engine.plain_noise


# Which one runs.


def test_a_model_that_cannot_be_replayed_is_traced_the_plain_way_with_one_warning(unreplayable, photo, other_photo):
    prompt = ask(unreplayable, photo)
    # A foil of several tokens takes a second sequence of tokens; that is no reason for a second warning.
    settings = {"positions": "last", "metrics": ("logit_difference", "probability"), "whole_answer": True}
    settings |= {"answer": "Ada Example", "foil": "Oslo and Kyoto"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trace(unreplayable, prompt, SwapImage(other_photo), **settings)
    assert [str(each.message) for each in caught] == [
        f"tracing one forward pass per cell, which is slow: {found.engine.reason}"
    ]
    assert found.engine.engine == "plain"
    assert "does not let its attention function be replaced" in found.engine.reason
    asked = trace(unreplayable, prompt, SwapImage(other_photo), engine=PLAIN, **settings)
    assert asked.engine.reason == "asked for"
    assert all(torch.equal(asked.samples[kind], found.samples[kind]) for kind in asked.kinds)


def test_the_warning_points_at_the_line_that_asked_for_the_trace(unreplayable, photo, other_photo):
    with pytest.warns(UserWarning, match="one forward pass per cell") as caught:
        causal_trace(
            unreplayable, ask(unreplayable, photo), corruption=SwapImage(other_photo), positions="last",
            even_if_weak=True, progress=False,
        )  # fmt: skip
    assert caught[0].filename == __file__


def test_who_insists_on_the_fast_engine_is_told_why_not(unreplayable, photo, other_photo):
    message = r"cannot be replayed: .* does not let its attention function be replaced; pass Engine\(name='auto'\)"
    with pytest.raises(TraceError, match=message):
        trace(unreplayable, ask(unreplayable, photo), SwapImage(other_photo), positions="last", engine=REPLAY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fast"}, "no engine 'fast'; pass one of auto, replay, plain"),
        ({"memory": 0}, "memory=0 is too small; pass at least 1"),
        ({"tokens_per_call": 0}, "tokens_per_call=0 is too small; pass at least 1"),
        ({"checks": -1}, "checks=-1 is too small; pass at least 0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(TraceError, match=message):
        Engine(**settings)


# What is reported.


@pytest.mark.parametrize(
    "random_vlm",
    ["llava_llama", "gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llava_phi", "llama"))],
    indirect=True,
)
def test_the_report_counts_cells_free_cells_and_work(random_vlm, photo):
    prompt, layers, samples = ask(random_vlm, photo), random_vlm.layers, 2
    length, first = prompt.length, prompt.groups["constraint"][0]
    settings = {"sites": ("hidden", "mlp"), "window": 1, "positions": list(range(length))}
    fast, slow = (
        trace(random_vlm, prompt, TextNoise(samples=samples), engine=replace(engine, checks=0), **settings)
        for engine in (REPLAY, PLAIN)
    )
    cells, after = 2 * length * layers, length - first
    assert fast.engine.cells == slow.engine.cells == cells
    # Before the noise nothing can be restored; the last layer's output is read at the last token only, and there the
    # clean run has it.
    assert fast.engine.free_cells == 2 * first * layers + 2 * (after - 1) + 1
    assert slow.engine.free_cells == 0
    assert slow.engine.token_layers == cells * samples * length * layers
    recording = length * layers + samples * after * layers
    suffixes = sum(
        samples * (length - place) * (layers - 1 - layer)
        for place in range(first, length)
        for layer in range(layers - 1)
    )
    assert recording < fast.engine.token_layers < recording + 2 * suffixes + samples * after * layers
    assert fast.engine.token_layers < slow.engine.token_layers / 10
    assert (fast.engine.halvings, fast.engine.checked_cells, fast.engine.largest_difference) == (0, 0, None)
    assert (fast.engine.engine, fast.engine.reason) == ("replay", None)


@pytest.mark.parametrize("checks", [1, 5, 10_000])
def test_as_many_cells_are_checked_as_are_asked_for_and_computed(random_llava, photo, checks):
    settings = {"sites": "mlp", "positions": ["constraint", "last"], "engine": replace(REPLAY, checks=checks)}
    found = trace(random_llava, ask(random_llava, photo), TextNoise(samples=2), **settings)
    assert found.engine.checked_cells == min(checks, found.engine.cells - found.engine.free_cells)
    assert 0 <= found.engine.largest_difference < 2e-5
    assert 0 <= found.engine.plain_noise < 2e-5
    assert f"{found.engine.checked_cells} cells recomputed by plain forward passes" in found.engine.summary()


def test_where_all_cells_are_free_nothing_is_checked(random_llava, photo):
    found = trace(random_llava, ask(random_llava, photo), TextNoise(samples=2), positions=["image", 0])
    assert found.engine.cells == found.engine.free_cells == 24
    assert (found.engine.checked_cells, found.engine.largest_difference) == (0, None)


def wrong_by(error: Callable[[Tensor], Tensor]) -> Callable[..., CellScores]:
    """The sweep, with its scores falsified."""

    def falsified(*arguments: object, **settings: object) -> CellScores:
        found = sweep(*arguments, **settings)
        return replace(found, scores=error(found.scores))

    return falsified


@pytest.mark.parametrize(
    "error", [lambda scores: scores + 1e-3, lambda scores: scores.roll(1, 0), lambda scores: scores * torch.nan]
)
def test_a_broken_engine_is_noticed(random_llava, photo, monkeypatch, error):
    settings = {"positions": ["constraint", "last"], "engine": replace(REPLAY, checks=4)}
    prompt, corruption = ask(random_llava, photo), TextNoise(samples=2)
    sound = trace(random_llava, prompt, corruption, **settings)
    monkeypatch.setattr(measuring, "sweep", wrong_by(error))
    with pytest.warns(UserWarning, match=r"from plain forward passes on 4 checked cells.*Engine\(name='plain'\)"):
        broken = trace(random_llava, prompt, corruption, **settings)
    assert sound.engine.largest_difference < 2e-5
    assert not broken.engine.largest_difference < 5e-4
    trace(random_llava, prompt, corruption, **settings | {"engine": replace(REPLAY, checks=0)})  # unchecked, unnoticed


def test_scores_without_bounds_are_no_alarm(random_llava, photo):
    def minus_infinity(logits: Tensor) -> Tensor:
        return torch.full_like(logits[:, 0, 0], -torch.inf)

    settings = {"positions": ["constraint", "last"], "metrics": (minus_infinity, "probability")}
    found = trace(random_llava, ask(random_llava, photo), TextNoise(samples=2), **settings)
    assert found.clean == -torch.inf
    assert found.engine.checked_cells == 2


# Progress.


class Watched(tqdm):
    """Notes where the bar stands after each step."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, file=StringIO(), **settings)
        self.steps: list[int] = []

    def update(self, n: float | None = 1) -> bool | None:
        self.steps.append(n)
        return super().update(n)


@pytest.mark.parametrize("engine", ["plain", "replay"])
def test_progress_counts_cells(random_llava, photo, engine):
    prompt = ask(random_llava, photo)
    clean, last = random_llava.embed(prompt), prompt.length - 1
    base = TextNoise(samples=2).corrupt(random_llava, prompt).entering(clean)
    runs = Runs(base=base, source=clean, scored=(last,))
    cells = [
        StateCell(kind="mlp", first=layer, last=layer, positions=(place,))
        for place in range(last + 1)
        for layer in range(4)
    ]

    def measure(logits: Tensor) -> Tensor:
        return logits[:, 0, :1].double()

    answer: Callable[[VisionLanguageModel, Runs, list[StateCell], Measure], object]
    answer = {"plain": plain_scores, "replay": sweep}[engine]
    with Watched(total=len(cells)) as bar:
        answer(random_llava, runs, cells, measure, bar=bar)
    assert bar.n == len(cells)
    assert len(bar.steps) > 5
    assert all(step > 0 for step in bar.steps)
