"""Causal tracing on random weights: what restoring must and must not do, what is scored, what is refused."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from multrace import ModelError, Prompt, Site, VisionLanguageModel
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
from multrace.tracing.causal import window_layers
from multrace.tracing.corruption import embed
from multrace.tracing.plain import answer_probabilities, clean_states, restored_probability
from PIL import Image

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
GROUPS = ("image", "question", "constraint", "constraint_last", "last")


def ask(vlm: VisionLanguageModel, image: Image.Image | None, answer: str | None = None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT, answer=answer)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    return causal_trace(vlm, prompt, corruption=corruption, progress=False, **settings)


# Theorems. The clean and the corrupted run have the same shape, so every equality below is exact in any precision.


@pytest.mark.parametrize("corruption", [TextNoise(samples=3), ReplaceText(replacement="Paris city")], ids=str)
def test_restoring_every_hidden_state_at_any_layer_gives_the_clean_score(random_vlm, photo, corruption):
    found = trace(random_vlm, ask(random_vlm, photo), corruption, sites="hidden", positions=["all"])
    assert found.scores["hidden"].tolist() == [[found.clean] * random_vlm.layers]
    assert abs(found.total_effect) > 1e-6  # otherwise there was nothing to restore


@pytest.mark.parametrize("samples", [1, 4])
def test_restoring_nothing_gives_the_corrupted_score(random_vlm, photo, samples):
    prompt = ask(random_vlm, photo)
    corrupted = TextNoise(samples=samples).corrupt(random_vlm, prompt).embeddings
    expected = answer_probabilities(random_vlm, corrupted, 5)
    states = clean_states(random_vlm, embed(random_vlm, prompt).expand_as(corrupted).contiguous(), "hidden")
    assert torch.equal(restored_probability(random_vlm, corrupted, {}, (), answer=5), expected)
    assert torch.equal(restored_probability(random_vlm, corrupted, states, (), answer=5), expected)
    assert not torch.equal(restored_probability(random_vlm, corrupted, states, (-1,), answer=5), expected)


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attention"])
def test_patching_with_the_corrupted_states_has_no_effect(random_vlm, photo, kind):
    corrupted = TextNoise(samples=2).corrupt(random_vlm, ask(random_vlm, photo)).embeddings
    states = clean_states(random_vlm, corrupted, kind)
    everywhere = range(corrupted.shape[1])
    expected = answer_probabilities(random_vlm, corrupted, 5)
    assert torch.equal(restored_probability(random_vlm, corrupted, states, everywhere, answer=5), expected)


def test_the_last_layer_acts_through_the_last_token_only(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    rows = [0, prompt.groups["question"][0], "constraint", "constraint_last", prompt.length - 2, "last"]
    found = trace(random_vlm, prompt, TextNoise(samples=3), window=1, positions=rows)
    for kind in found.kinds:
        effects = found.indirect_effect(kind)[:, -1]
        assert torch.equal(effects[:-1], torch.zeros(len(found.rows) - 1, dtype=torch.float64))
        assert effects[-1] != 0
    assert float(found.scores["hidden"][-1, -1]) == found.clean


@pytest.mark.parametrize("corruption", [TextNoise(samples=4), ReplaceText(replacement="Paris city")], ids=str)
def test_positions_before_the_corrupted_text_have_no_effect_at_all(random_llava, photo, corruption):
    prompt = ask(random_llava, photo)
    first = prompt.groups["constraint"][0]
    found = trace(random_llava, prompt, corruption, positions=["image", 0, first - 1, first, "last"])
    for kind in found.kinds:
        effects = found.indirect_effect(kind)
        assert not effects[:3].any()
        assert effects[3].any() and effects[4].any()


@pytest.mark.parametrize("noise", [False, True])
def test_a_corrupted_image_is_felt_at_image_question_and_last_token(random_llava, photo, other_photo, noise):
    corruption = ImageNoise(samples=3) if noise else SwapImage(other_photo)
    found = trace(random_llava, ask(random_llava, photo), corruption, positions=GROUPS, window=1)
    for kind in found.kinds:
        effects = found.indirect_effect(kind)
        assert (effects.abs().amax(1) > 1e-6).all()
        assert not effects[0, -1]  # nothing above the last layer reads the image tokens


def test_swapping_the_image_for_itself_or_words_for_the_same_words_has_no_effect(random_llava, photo):
    prompt = ask(random_llava, photo)
    for corruption in (SwapImage(photo), ReplaceText(replacement=CONSTRAINT)):
        found = trace(random_llava, prompt, corruption, positions=("question", "last"))
        assert found.total_effect == 0
        assert not any(found.indirect_effect(kind).any() for kind in found.kinds)


# Windows.


def test_windows_follow_romes_convention():
    for window in range(1, 9):
        for center in range(8):
            expected = range(max(0, center - window // 2), min(8, center + math.ceil(window / 2)))
            assert window_layers(center, window, 8) == expected
            assert center in expected


def test_a_window_that_covers_one_layer_is_that_layer(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    single, double = (
        trace(random_llava, prompt, SwapImage(other_photo), window=window, positions=GROUPS) for window in (1, 2)
    )
    assert double.spans["mlp"].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert double.spans["hidden"].tolist() == single.spans["mlp"].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert torch.equal(single.scores["hidden"], double.scores["hidden"])
    for kind in ("mlp", "attention"):
        assert torch.equal(single.scores[kind][:, 0], double.scores[kind][:, 0])
        assert not torch.equal(single.scores[kind][:, 1], double.scores[kind][:, 1])


# What is scored, and where.


def test_the_scored_token_is_the_models_own_or_the_answers_first(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    own = trace(random_llava, prompt, SwapImage(other_photo), sites="mlp", positions="last")
    with torch.no_grad():
        probabilities = random_llava.logits(prompt)[0, -1].double().softmax(-1)
    assert own.answer_ids[0] == int(probabilities.argmax())
    assert own.clean == pytest.approx(float(probabilities.max()), abs=1e-6)
    for answer in ("tennis", "Ada Example", "the year 1999"):
        given = trace(random_llava, prompt, SwapImage(other_photo), sites="mlp", positions="last", answer=answer)
        assert given.answer_ids[0] == prompt.with_answer(answer).answer_ids[0] != own.answer_ids[0]
        assert given.clean == pytest.approx(float(probabilities[given.answer_ids[0]]), abs=1e-6)


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
    causal_trace(random_llava, prompt, corruption=SwapImage(other_photo), positions="last", progress=False)
    assert capsys.readouterr().err == ""
    causal_trace(random_llava, prompt, corruption=SwapImage(other_photo), positions="last")
    assert "tracing: 100%" in capsys.readouterr().err


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


def test_no_hook_stays_after_an_error_inside_a_cell(random_llava, photo, hooks):
    before = hooks()
    embeddings = embed(random_llava, ask(random_llava, photo))
    with pytest.raises(IndexError):
        restored_probability(random_llava, embeddings, {Site("mlp", 1): embeddings}, (999,), answer=1)
    assert hooks() == before
