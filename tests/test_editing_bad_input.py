"""Bad input to editing: each gets an error that says what to do, and the model stays as it was."""

import math
from types import SimpleNamespace

import pytest
from multrace.editing import EditError, EditRequest, MultEdit
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
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(EditError, match=message):
        MultEdit(**settings)


@pytest.mark.parametrize("target", ["", "  \n", None])
def test_an_empty_target_is_an_error_that_shows_the_question(random_llama, target):
    with pytest.raises(EditError, match="What is the thing.*pass the new answer"):
        EditRequest(prompt=prompt_for(random_llama), target=target)


BAD_EDITS = {
    "layer out of range": (MultEdit(layer=40), "cannot edit layer 40: no layer 40 .*layers"),
    "token group absent": (MultEdit(layer=0, token="constraint:nothing"), "cannot edit at token 'constraint:nothing'"),
    "keys of zero ridge twice": (MultEdit(layer=0, ridge_fraction=0.0, steps=0), "linearly dependent"),
}


@pytest.mark.parametrize(("editor", "message"), BAD_EDITS.values(), ids=BAD_EDITS)
def test_edits_that_cannot_be_made_are_errors_and_change_nothing(random_llava_llama, editor, message):
    prompt, weights = prompt_for(random_llava_llama), bits(random_llava_llama)
    request = EditRequest(prompt=prompt, target=TARGET)
    with pytest.raises(EditError, match=message):
        editor.edit(random_llava_llama, [request, request])
    assert bits(random_llava_llama) == weights


def test_no_requests_are_an_error(random_llama):
    with pytest.raises(EditError, match="pass at least one EditRequest"):
        MultEdit(layer=1).edit(random_llama, [])


def test_a_search_that_leaves_the_finite_numbers_is_an_error(random_llama):
    prompt = prompt_for(random_llama)
    with pytest.raises(EditError, match="left the finite numbers"):
        MultEdit(layer=1, learning_rate=math.inf).edit(random_llama, [EditRequest(prompt=prompt, target=TARGET)])
