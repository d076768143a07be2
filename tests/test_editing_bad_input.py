"""Bad input to editing: each gets an error that says what to do, and the model stays as it was."""

import math
from types import SimpleNamespace

import pytest
from multrace.data import DataError, EditRequest
from multrace.editing import EditError, MultEdit
from multrace.editing.solve import EMMET, MEMIT, ROME, AlphaEdit
from multrace.models import Prompt, VisionLanguageModel

QUESTION = "What is the thing in this picture?"
TARGET = "red"


def prompt_for(vlm: VisionLanguageModel) -> Prompt:
    return vlm.prompt(None, QUESTION)


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


BAD_SETTINGS = {
    "no layer": ({}, "pass one of them"),
    "layer and where": ({"layer": 1, "where": SimpleNamespace(layer=1, token="last")}, "pass one of them"),
    "negative ridge": ({"layer": 1, "ridge": -1.0}, "at least 0"),
    "negative ridge fraction": ({"layer": 1, "ridge_fraction": -1.0}, "at least 0"),
    "no learning rate": ({"layer": 1, "learning_rate": 0.0}, "learning_rate above 0"),
    "negative steps": ({"layer": 1, "steps": -1}, "steps of at least 0"),
    "clamp of zero": ({"layer": 1, "clamp": 0.0}, "clamp above 0, or None"),
    "negative weight decay": ({"layer": 1, "weight_decay": -1.0}, "weight_decay of at least 0"),
    "negative essence": ({"layer": 1, "essence_weight": -1.0}, "essence_weight of at least 0"),
    "no rows at once": ({"layer": 1, "rows_at_once": 0}, "rows_at_once of at least 1"),
    "spread of zero": ({"layer": 1, "spread": 0}, "spread of at least 1"),
    "no such projection": ({"layer": 1, "projection": "query"}, "'mlp' or 'attention'"),
    "weight of zero": ({"layer": 1, "weight": 0.0}, "weight=0.0; pass a number above 0"),
    "weight not a number": ({"layer": 1, "preserve_weight": math.nan}, "preserve_weight=nan; pass a number above 0"),
    "null threshold of zero": ({"layer": 1, "null_threshold": 0.0}, "null_threshold=0.0; pass a number above 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(EditError, match=message):
        MultEdit(**settings)


@pytest.mark.parametrize("target", ["", "  \n", None])
def test_an_empty_target_is_an_error_that_shows_the_question(random_llama, target):
    with pytest.raises(DataError, match="What is the thing.*pass the new answer"):
        EditRequest(question=prompt_for(random_llama), target=target)


BAD_EDITS = {
    "layer out of range": (MultEdit(layer=40), "cannot edit layer 40: no layer 40 .*layers"),
    "token group absent": (MultEdit(layer=0, token="constraint:nothing"), "cannot edit at token 'constraint:nothing'"),
    "spread over layers that are not there": (MultEdit(layer=1, spread=3), "3 layers up to layer 1 do not exist"),
    "no second moment for ROME": (ROME(layer=1), "ROME weighs old keys .* none is given; leave moments out"),
    "no second moment for MEMIT": (MEMIT(layer=3), "MEMIT weighs old keys .* none is given; leave moments out"),
    "no second moment for EMMET": (EMMET(layer=1), "EMMET weighs old keys .* none is given; leave moments out"),
    "no second moment for AlphaEdit": (
        AlphaEdit(layer=3),
        "AlphaEdit weighs old keys .* none is given; leave moments out",
    ),
}


@pytest.mark.parametrize(("editor", "message"), BAD_EDITS.values(), ids=BAD_EDITS)
def test_edits_that_cannot_be_made_are_errors_and_change_nothing(random_llava_llama, editor, message):
    prompt, weights = prompt_for(random_llava_llama), bits(random_llava_llama)
    with pytest.raises(EditError, match=message):
        editor.edit(random_llava_llama, [EditRequest(question=prompt, target=TARGET)], moments=False)
    assert bits(random_llava_llama) == weights


def test_no_requests_are_an_error(random_llama):
    with pytest.raises(EditError, match="pass at least one EditRequest"):
        MultEdit(layer=1).edit(random_llama, [])


def test_contexts_whose_targets_have_other_numbers_of_tokens_are_an_error(random_llava_llama):
    vlm = random_llava_llama
    spaced = vlm.prompt(None, QUESTION, template="{question} ")
    target = next(
        word for word in ("photo", "company", "Ada") if _tokens(spaced, word) != _tokens(prompt_for(vlm), word)
    )
    request = EditRequest(question=prompt_for(vlm), target=target, contexts=(spaced,))
    with pytest.raises(EditError, match="contexts of 'What is the thing.*disagree on the number of target tokens"):
        MultEdit(layer=1).edit(vlm, [request])


def _tokens(prompt: Prompt, answer: str) -> int:
    return len(prompt.with_answer(answer).answer_ids)


def test_a_search_of_which_every_request_leaves_the_finite_numbers_is_an_error(random_llama):
    prompt, weights = prompt_for(random_llama), bits(random_llama)
    with pytest.raises(EditError, match="no request could be edited; .*left the finite numbers at step 1; lower"):
        MultEdit(layer=1, learning_rate=math.inf).edit(random_llama, [EditRequest(question=prompt, target=TARGET)])
    assert bits(random_llama) == weights


def test_requests_that_contradict_each_other_are_named(random_llava_llama):
    vlm, weights = random_llava_llama, bits(random_llava_llama)
    one = EditRequest(question=prompt_for(vlm), target=TARGET, id="the first")
    other = EditRequest(question=prompt_for(vlm), target="green", id="the second")
    with pytest.raises(EditError, match="'the first' and 'the second' have the same key .*'red' and 'green'; drop one"):
        MultEdit(layer=1).edit(vlm, [one, other])
    by_the_way = EditRequest(
        question=vlm.prompt(None, "Who won?"), target="green", rewrite_prompts=(one.question,), id="the third"
    )
    with pytest.raises(EditError, match="'the first' and 'the third'"):
        MultEdit(layer=1).edit(vlm, [one, by_the_way])
    assert bits(vlm) == weights
    assert MultEdit(layer=1, steps=1).edit(vlm, [one, one]).requests[1]["status"] == "not generated"  # they agree


def test_a_blank_behind_a_target_contradicts_nothing(random_llava_llama):
    one, other = (EditRequest(question=prompt_for(random_llava_llama), target=text) for text in ("red", " red\n"))
    delta = MultEdit(layer=1, steps=1).edit(random_llava_llama, [one, other])
    assert [(row["status"], row["target"]) for row in delta.requests] == 2 * [("not generated", "red")]


def test_a_session_without_the_moments_that_it_needs_is_refused(random_llama):
    with pytest.raises(EditError, match="AlphaEdit weighs old keys.*none is given"):
        AlphaEdit(layer=3).start(random_llama, moments=False)
    assert AlphaEdit(layer=3, null_threshold=None).start(random_llama).history.names == ()
