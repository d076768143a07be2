"""Pictures that enter by cross-attention, at no position (Llama 3.2 Vision): the fast engine equals plain passes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import multrace as mt
import pytest
import torch
from families.battery import WIDE, photo, true_float64
from families.folders import write
from families.table import RECIPES
from multrace.models import ReplayError, VisionLanguageModel
from multrace.models.frame import Frame
from multrace.models.replay import attending, masking, replaying
from multrace.models.replay.crossing import Crossing, crossing_layers
from multrace.tracing import CausalTrace
from multrace.tracing.engine import measure as measuring

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company"
CROSSING = (1, 3)
CLOSE, APART = 1e-10, 1e-7
PLAIN, REPLAY = mt.Engine(name="plain"), mt.Engine(name="replay", checks=0)


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = write(RECIPES["mllama"], tmp_path_factory.mktemp("models") / "mllama")
    return mt.load(folder, dtype="float64", verify=False)


def ask(vlm: VisionLanguageModel, **options) -> mt.Prompt:
    return vlm.prompt(photo(1, **options), QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: mt.Prompt, engine: mt.Engine, **settings) -> CausalTrace:
    usual = {"corruption": mt.SwapImage(photo(2)), "positions": [0, "constraint", "last"], "window": 3}
    return mt.causal_trace(
        vlm, prompt, engine=engine, even_if_weak=True, progress=False, **{**usual, "answer": "Paris", **settings}
    )


def gap(first: CausalTrace, second: CausalTrace) -> float:
    gaps = [(first.samples[kind] - second.samples[kind]).abs() for kind in second.samples]
    assert all(torch.equal(each.isnan(), gaps[0].isnan()) for each in gaps if each.shape == gaps[0].shape)
    return max(float(each.nan_to_num(0.0).max()) for each in gaps)


KINDS = ("picture", "wide picture", "noise")


@pytest.mark.parametrize(
    ("kind", "window", "direction"),
    [
        pytest.param(kind, window, direction, marks=() if (number + (window > 1) + turn) % 3 else pytest.mark.slow)
        for number, kind in enumerate(KINDS)
        for window in (1, 3)
        for turn, direction in enumerate(("restore", "corrupt"))
    ],
)
def test_both_engines_give_the_same_trace(mllama, kind, window, direction):
    size = {"size": WIDE} if kind == "wide picture" else {}  # fills three of four tiles
    corruption = mt.TextNoise(samples=2, scale=3.0) if kind == "noise" else mt.SwapImage(photo(2, **size))
    settings = {"corruption": corruption, "window": window, "direction": direction}
    settings["sites"] = ("hidden", "mlp", "attention", "head 1")
    with true_float64(mllama):
        fast, slow = (trace(mllama, ask(mllama, **size), engine, **settings) for engine in (REPLAY, PLAIN))
    assert fast.kinds == slow.kinds and gap(fast, slow) < CLOSE
    for values in slow.samples.values():
        assert (values - slow.corrupted_scores.mean()).abs().max() > APART
        assert (values[0, :, CROSSING].std(0) > 0).any()
    assert fast.engine.token_layers < slow.engine.token_layers / 3


def test_frozen_modules_metrics_and_a_whole_answer_are_the_same_too(mllama):
    settings = {
        "severed": "mlp",
        "answer": "Paris tennis",
        "whole_answer": True,
        "metrics": ("probability", "log_probability"),
    }
    with true_float64(mllama):
        fast, slow = (trace(mllama, ask(mllama), engine, **settings) for engine in (REPLAY, PLAIN))
    assert gap(fast, slow) < CLOSE


def test_without_a_picture_the_layers_that_do_not_run_are_passed_over(mllama):
    prompt = mllama.prompt(None, QUESTION, constraint=CONSTRAINT)
    settings = {"corruption": mt.TextNoise(samples=2, scale=3.0), "sites": ("hidden", "mlp", "heads"), "severed": None}
    with true_float64(mllama), pytest.warns(UserWarning, match="layers 1, 3 .* did not run"):
        fast, slow = (trace(mllama, prompt, engine, **settings) for engine in (REPLAY, PLAIN))
        assert gap(fast, slow) < CLOSE
        flows = {"flows": ["constraint -> last"], "windows": (1, 3), "progress": False}
        fast, slow = (mt.attention_knockout(mllama, prompt, engine=engine, **flows) for engine in (REPLAY, PLAIN))
    assert (fast.probabilities - slow.probabilities).abs().max() < CLOSE
    assert (slow.probabilities - slow.clean[0]).abs().max() > APART


def test_both_engines_cut_the_same_edges(mllama):
    settings = {"flows": ["constraint -> last", "last -> last"], "windows": (1, 3), "progress": False}
    with true_float64(mllama), pytest.warns(UserWarning, match="only 0, 2, 4, 5 have .* edges.*attend to pictures"):
        fast, slow = (
            mt.attention_knockout(mllama, ask(mllama), engine=engine, **settings) for engine in (REPLAY, PLAIN)
        )
    assert (fast.probabilities - slow.probabilities).abs().max() < CLOSE
    moves = (slow.probabilities[0, 0, 0] - slow.clean[0]).abs()
    assert moves[list(CROSSING)].max() < 1e-15 < APART < moves[[0, 2, 4, 5]].min()
    assert fast.engine.token_layers < slow.engine.token_layers / 9


def test_an_estimate_goes_through_the_pictures_of_its_run(mllama):
    settings = {"corruption": mt.SwapImage(photo(1).point(lambda value: value + 1)), "window": 1, "sites": "mlp"}
    exact, fast = (trace(mllama, ask(mllama), REPLAY, exact_cells=cells, **settings) for cells in (None, 1))
    effect, estimate = (each.indirect_effect("mlp").flatten() for each in (exact, fast))
    assert 0 < (effect - estimate).abs().max() < 0.1 * effect.abs().max()


# What would be wrong.


def takes_the_other_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Crossing.show
    monkeypatch.setattr(Crossing, "show", lambda self, number, _, *rest: own(self, number, [*self._runs][0], *rest))


def sees_empty_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crossing, "_visible", lambda _self, _number, _positions, _keys: (slice(None), None))


def follows_the_source_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    own = measuring.Recorded
    monkeypatch.setattr(measuring, "Recorded", lambda **fields: own(**{**fields, "alike_from": 0}))


def knows_only_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Frame, "seeing_others", lambda _self, _other, length: [length - 1])


MUTATIONS = (takes_the_other_picture, sees_empty_tiles, follows_the_source_too_early, knows_only_words)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_noticed(mllama, monkeypatch, mutation: Callable):
    prompt, settings = ask(mllama, size=WIDE), {"corruption": mt.SwapImage(photo(2, WIDE)), "window": 1}
    slow = trace(mllama, prompt, PLAIN, **settings)
    assert gap(trace(mllama, prompt, REPLAY, **settings), slow) < 1e-7  # norms round to float32
    mutation(monkeypatch)
    if mutation is sees_empty_tiles:
        with pytest.raises(mt.TraceError, match="other states when it runs at some positions only"):
            trace(mllama, prompt, REPLAY, **settings)
    else:
        assert gap(trace(mllama, prompt, REPLAY, **settings), slow) > 1e-6


def test_pictures_that_fill_other_tiles_are_left_to_plain_passes(mllama):
    with pytest.warns(UserWarning, match="more than their embeddings, such as the sizes of their pictures"):
        found = trace(mllama, ask(mllama), mt.Engine(), corruption=mt.SwapImage(photo(2, WIDE)))
    assert found.engine.engine == "plain"


def altered(frame: Frame, name: str, change: Callable) -> Frame:
    changed = {name: change(frame.keywords[name])}
    return replace(
        frame, keywords={key: each for key, each in {**frame.keywords, **changed}.items() if each is not None}
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask: None, "attends to pictures without a mask"),
        (lambda mask: torch.cat([mask, mask.roll(5, -1)]), "rows see different parts"),
        (lambda mask: mask + 0.5, "adds a bias"),
    ],
    ids=["no mask", "rows", "bias"],
)
def test_masks_that_a_replay_would_not_keep_are_refused(mllama, change, reason):
    entering = mllama.embed(ask(mllama, size=WIDE))
    frame = altered(entering.frame, "cross_attention_mask", change)
    entering = replace(entering.for_rows(2) if "rows" in reason else entering, frame=frame)
    with replaying(mllama) as replay, pytest.raises(ReplayError, match=reason):
        replay.record(entering, kept=[entering.length - 1], read=[entering.length - 1])


@torch.no_grad()
def test_states_of_pictures_are_no_tokens_however_many_there_are(mllama):
    states = mllama.embed(ask(mllama)).frame.pictures.shape[1]
    questions = (" ".join(["Who"] * count) for count in range(1, states))
    prompt = next(each for each in map(partial(mllama.prompt, photo(1)), questions) if each.length == states)
    hidden = torch.zeros(1, states, states, dtype=torch.bool)
    hidden[:, -1, :-1] = True
    with masking(mllama, dict.fromkeys(CROSSING, hidden)):
        cut = mllama.logits(prompt)
    with masking(mllama, {2: hidden}):
        assert (mllama.logits(prompt) - cut).abs().max() > APART
    assert (mllama.logits(prompt) - cut).abs().max() < APART
    with attending(mllama, [-1]), pytest.raises(ReplayError, match="layer 1 attends to pictures"):
        mllama.logits(prompt)


def test_only_layers_that_take_the_states_of_pictures_attend_to_them(mllama, random_llava):
    assert crossing_layers(mllama) == CROSSING and crossing_layers(random_llava) == ()
