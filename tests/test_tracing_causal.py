"""Causal tracing on random weights: what restoring must and must not do, by both engines, and what is refused."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.models.replay import Replay
from multrace.tracing import (
    CausalTrace,
    Corruption,
    ImageNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    causal_trace,
)
from multrace.tracing.engine import KINDS, Engine, Runs, StateCell, plain_scores, run_scores, window_layers
from multrace.tracing.engine.measure import sweep
from PIL import Image
from torch import Tensor

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
GROUPS = ("image", "question", "constraint", "constraint_last", "last")


def ask(vlm: VisionLanguageModel, image: Image.Image | None, answer: str | None = None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT, answer=answer)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    """A trace, however weak the corruption is: what is asserted here must hold for any."""
    return causal_trace(vlm, prompt, corruption=corruption, progress=False, **{"even_if_weak": True} | settings)


# Theorems. In the plain way both sides of every equality below are computed alike, so they are equal bit for bit; the
# fast sweep computes them in other batches, so in true float64 they are equal to 1e-12.

ENGINES = {"plain": Engine(name="plain"), "replay": Engine(name="replay", checks=0)}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return request.param


def alike(engine: str, found: Tensor, expected: Tensor | float) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(found)
    return torch.allclose(found, expected, rtol=0, atol={"plain": 0.0, "replay": 1e-12}[engine])


def cell_scores(engine: str, vlm: VisionLanguageModel, runs: Runs, *cells: StateCell) -> Tensor:
    """(cell, sample): the probability of token 5."""

    def measure(logits: Tensor) -> Tensor:
        return logits[:, -1:].double().softmax(-1)[..., 5]

    if engine == "plain":
        return plain_scores(vlm, runs, cells, measure)[:, 0]
    return sweep(vlm, runs, cells, measure, settings=ENGINES[engine]).scores[:, 0]


def noised(vlm: VisionLanguageModel, prompt: Prompt, samples: int) -> tuple[Runs, Tensor]:
    """Clean states for the corrupted run, and (sample,) the probability of token 5 in the latter."""
    clean, last = vlm.embed(prompt), prompt.length - 1
    base = TextNoise(samples=samples).corrupt(vlm, prompt).entering(clean)
    runs = Runs(base=base, source=clean, scored=(last,), frozen=prompt.groups["image"])
    return runs, run_scores(vlm, base, runs, lambda logits: logits[:, -1:].double().softmax(-1)[..., 5])[0]


@pytest.mark.parametrize("corruption", [TextNoise(samples=3), ReplaceText(replacement="Paris city")], ids=str)
def test_restoring_every_hidden_state_at_any_layer_gives_the_clean_score(exact_vlm, photo, corruption, engine):
    settings = {"sites": "hidden", "positions": ["all"], "engine": ENGINES[engine]}
    found = trace(exact_vlm, ask(exact_vlm, photo), corruption, **settings)
    assert alike(engine, found.scores["hidden"], found.clean)
    assert abs(found.total_effect) > 1e-6  # otherwise there was nothing to restore


@pytest.mark.parametrize("samples", [1, 4])
def test_restoring_nothing_gives_the_corrupted_score(exact_vlm, photo, samples, engine):
    runs, expected = noised(exact_vlm, ask(exact_vlm, photo), samples)
    nothing = [StateCell(kind=kind, first=0, last=exact_vlm.layers - 1, positions=()) for kind in KINDS]
    last = StateCell(kind="hidden", first=0, last=0, positions=(runs.length - 1,))
    *found, control = cell_scores(engine, exact_vlm, runs, *nothing, last)
    assert all(alike(engine, each, expected) for each in found)
    assert (control - expected).abs().min() > 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_patching_with_the_corrupted_states_has_no_effect(exact_vlm, photo, kind, engine):
    runs, expected = noised(exact_vlm, ask(exact_vlm, photo), 2)
    everywhere = StateCell(kind=kind, first=0, last=exact_vlm.layers - 1, positions=tuple(range(runs.length)))
    (clean,) = cell_scores(engine, exact_vlm, runs, everywhere)
    (same,) = cell_scores(engine, exact_vlm, replace(runs, source=runs.base), everywhere)
    assert alike(engine, same, expected)
    assert (clean - expected).abs().min() > 1e-9


def test_the_last_layer_acts_through_the_last_token_only(exact_vlm, photo, engine):
    prompt = ask(exact_vlm, photo)
    rows = [0, prompt.groups["question"][0], "constraint", "constraint_last", prompt.length - 2, "last"]
    settings = {"window": 1, "positions": rows, "engine": ENGINES[engine]}
    found = trace(exact_vlm, prompt, TextNoise(samples=3), **settings)
    for kind in found.kinds:
        effects = found.indirect_effect(kind)[:, -1]
        assert torch.equal(effects[:-1], torch.zeros(len(found.rows) - 1, dtype=torch.float64))
        assert abs(effects[-1]) > 1e-9
    assert alike(engine, found.scores["hidden"][-1, -1], found.clean)


@pytest.mark.parametrize("corruption", [TextNoise(samples=4), ReplaceText(replacement="Paris city")], ids=str)
def test_positions_before_the_corrupted_text_have_no_effect_at_all(random_llava, photo, corruption, engine):
    prompt = ask(random_llava, photo)
    first = prompt.groups["constraint"][0]
    rows = ["image", 0, first - 1, first, "last"]
    found = trace(random_llava, prompt, corruption, positions=rows, engine=ENGINES[engine])
    for kind in found.kinds:
        effects = found.indirect_effect(kind)
        assert not effects[:3].any()
        assert effects[3].any() and effects[4].any()


@pytest.mark.parametrize("noise", [False, True])
def test_a_corrupted_image_is_felt_at_image_question_and_last_token(random_llava, photo, other_photo, noise, engine):
    corruption = ImageNoise(samples=3) if noise else SwapImage(other_photo)
    settings = {"positions": GROUPS, "window": 1, "engine": ENGINES[engine]}
    found = trace(random_llava, ask(random_llava, photo), corruption, **settings)
    for kind in found.kinds:
        effects = found.indirect_effect(kind)
        assert (effects.abs().amax(1) > 1e-6).all()
        assert not effects[0, -1]  # nothing above the last layer reads the image tokens


def test_swapping_the_image_for_itself_or_words_for_the_same_words_has_no_effect(random_llava, photo, engine):
    prompt = ask(random_llava, photo)
    for corruption in (SwapImage(photo), ReplaceText(replacement=CONSTRAINT)):
        found = trace(random_llava, prompt, corruption, positions=("question", "last"), engine=ENGINES[engine])
        assert found.total_effect == 0
        assert not any(found.indirect_effect(kind).any() for kind in found.kinds)


# Windows.


def test_windows_follow_romes_convention():
    for window in range(1, 9):
        for center in range(8):
            expected = range(max(0, center - window // 2), min(8, center + math.ceil(window / 2)))
            assert window_layers(center, window, 8) == expected
            assert center in expected


def test_a_window_that_covers_one_layer_is_that_layer(exact_llava, photo, other_photo, engine):
    prompt = ask(exact_llava, photo)
    single, double = (
        trace(exact_llava, prompt, SwapImage(other_photo), window=window, positions=GROUPS, engine=ENGINES[engine])
        for window in (1, 2)
    )
    assert double.spans["mlp"].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert double.spans["hidden"].tolist() == single.spans["mlp"].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert alike(engine, single.scores["hidden"], double.scores["hidden"])
    for kind in ("mlp", "attention"):
        assert alike(engine, single.scores[kind][:, 0], double.scores[kind][:, 0])
        assert not alike(engine, single.scores[kind][:, 1], double.scores[kind][:, 1])


# What is scored, and where.


def test_the_scored_token_is_the_models_own_or_the_answers_first(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    own = trace(random_llava, prompt, SwapImage(other_photo), sites="mlp", positions="last")
    with torch.no_grad():
        probabilities = random_llava.logits(prompt)[0, -1].double().softmax(-1)
    assert own.answer_ids[0] == int(probabilities.argmax())
    assert own.clean == pytest.approx(float(probabilities.max()), abs=1e-6)
    assert own.is_predicted
    for answer in ("tennis", "Ada Example", "the year 1999"):
        given = trace(random_llava, prompt, SwapImage(other_photo), sites="mlp", positions="last", answer=answer)
        assert given.answer_ids[0] == prompt.with_answer(answer).answer_ids[0] != own.answer_ids[0]
        assert given.clean == pytest.approx(float(probabilities[given.answer_ids[0]]), abs=1e-6)
        assert not given.is_predicted


def test_an_answer_after_the_prompt_changes_nothing(random_llava, photo, other_photo):
    without, with_answer = (
        trace(random_llava, ask(random_llava, photo, answer), SwapImage(other_photo), positions=GROUPS)
        for answer in (None, "Ada Example")
    )
    assert without.tokens == with_answer.tokens
    assert without.clean == with_answer.clean
    assert all(torch.equal(without.scores[kind], with_answer.scores[kind]) for kind in without.kinds)


def test_tokens_mode_has_one_row_per_text_token_and_one_for_the_image(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    found = trace(random_llava, prompt, SwapImage(other_photo), sites="hidden")
    covered = [position for positions in found.row_positions for position in positions]
    assert covered == list(range(prompt.length))
    assert found.row_positions[found.rows.index("image")] == prompt.groups["image"]
    assert found.starred == prompt.groups["constraint"]
    assert found.row_tokens[found.rows.index("image")] is None
    assert found.row_tokens[-1] == "last"
    assert found.row_tokens[found.row_positions.index(prompt.groups["constraint_last"])] == "constraint_last"
    single = found.row_positions.index((prompt.groups["constraint"][0],))
    assert found.row_tokens[single] == prompt.groups["constraint"][0]


def test_a_group_of_one_token_is_that_token(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    named = trace(random_llava, prompt, SwapImage(other_photo), positions=["last", "constraint_last"])
    positions = [prompt.groups["last"][0], prompt.groups["constraint_last"][0]]
    numbered = trace(random_llava, prompt, SwapImage(other_photo), positions=positions)
    assert all(torch.equal(named.scores[kind], numbered.scores[kind]) for kind in named.kinds)
    assert named.row_tokens == numbered.row_tokens == ("last", "constraint_last")
    assert named.grouped and not numbered.grouped


def test_text_only_models_are_traced_too(random_llama):
    prompt = random_llama.prompt(None, QUESTION, constraint=CONSTRAINT)
    found = trace(random_llama, prompt, ReplaceText(replacement="Paris city"))
    assert "image" not in found.rows
    assert len(found.rows) == prompt.length


def test_progress_is_shown_only_when_asked(random_llava, photo, other_photo, capsys):
    prompt = ask(random_llava, photo)
    settings = {"corruption": SwapImage(other_photo), "positions": "last", "even_if_weak": True}
    causal_trace(random_llava, prompt, progress=False, **settings)
    assert capsys.readouterr().err == ""
    causal_trace(random_llava, prompt, **settings)
    shown = capsys.readouterr().err
    assert "tracing: 100%" in shown
    assert "12/12" in shown  # three kinds in four layers


# Refusals.


@pytest.fixture
def hooks(random_llava: VisionLanguageModel) -> Iterator[Callable[[], int]]:
    """Counts the hooks on the model."""
    yield lambda: sum(len(module._forward_hooks) for module in random_llava.model.modules())


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("window of none", {"window": 0}, TraceError, "no window of 0 layers: the decoder has 4; pass window=1 to 4"),
        ("window too large", {"window": 5}, TraceError, "no window of 5 layers: the decoder has 4"),
        (
            "unknown kind",
            {"sites": ("mlp", "neuron")},
            TraceError,
            "no kind of site 'neuron'; pass some of hidden, mlp",
        ),
        ("no kind", {"sites": ()}, TraceError, "pass some of hidden, mlp"),
        ("unknown group", {"positions": ["subject"]}, ModelError, "no token group 'subject'; this prompt has image"),
        ("empty group", {"positions": ["answer"]}, TraceError, "positions of the answer are never restored"),
        ("no positions", {"positions": []}, TraceError, 'no positions to restore; pass positions="tokens"'),
        ("position too large", {"positions": [999]}, ModelError, "no position 999"),
        ("empty answer", {"answer": " "}, ModelError, "the answer is empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused(random_llava, photo, other_photo, hooks, name, settings, error, message):
    before = hooks()
    with pytest.raises(error) as caught:
        trace(random_llava, ask(random_llava, photo), SwapImage(other_photo), **settings)
    assert message in str(caught.value), name
    assert hooks() == before


def test_positions_of_a_given_answer_are_refused(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo, answer="Ada Example")
    with pytest.raises(TraceError, match="reaches beyond the prompt's last token"):
        trace(random_llava, prompt, SwapImage(other_photo), positions=[prompt.groups["answer"][0]])


def test_no_hook_stays_after_an_error_inside_a_cell(random_llava, photo, hooks, engine, monkeypatch):
    before, inside = hooks(), []
    runs, _ = noised(random_llava, ask(random_llava, photo), 1)

    def fail(*_: object) -> None:
        inside.append(hooks())
        raise RuntimeError("a cell that fails")

    def measure(logits: Tensor) -> Tensor:
        if hooks() > before:  # not in one of the two runs, but where states are put in
            fail()
        return logits[:, -1, :1].double()

    to_the_end = StateCell(kind="mlp", first=1, last=random_llava.layers - 1, positions=(runs.length - 1,))
    monkeypatch.setattr(Replay, "last_layer", fail)  # which the sweep calls with the states put in
    with pytest.raises(RuntimeError, match="a cell that fails"):
        if engine == "plain":
            plain_scores(random_llava, runs, [to_the_end], measure)
        else:
            sweep(random_llava, runs, [to_the_end], measure)
    assert inside[-1] > before == hooks()
