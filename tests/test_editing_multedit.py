"""MultEdit end to end: it makes models say the target, only then, as its theorem promises, and it survives saving."""

import logging
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from multrace import EditRequest
from multrace.editing import Delta, MultEdit
from multrace.editing.values import ValueResult, ValueSettings, goals_of, keys_and_values, search_values
from multrace.models import Prompt, VisionLanguageModel, load
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

SPAN = "the thing in this picture"
QUESTION = f"What is {SPAN}?"
OTHER = f"Please tell me now, what do people call {SPAN}?"
EDIT = MultEdit(layer=1, ending="none", steps=60, stop_loss=0.05)


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (48, 48), colour)


def prompt_for(vlm: VisionLanguageModel, question: str = QUESTION, colour: str = "red") -> Prompt:
    return vlm.prompt(picture(colour) if vlm.has_vision else None, question, constraint=SPAN)


def target_of(prompt: Prompt, count: int, skip: int = 0) -> str:
    """Words of one token each, `count` of them, that the tokenizer knows."""
    tokenizer = prompt.frontend.tokenizer
    words = (tokenizer.decode([token]).strip() for token in range(len(tokenizer) - 1, 0, -1))
    single = (word for word in words if word.isalpha() and len(prompt.with_answer(word).answer_ids) == 1)
    target = " ".join(islice(single, skip, skip + count))
    assert len(prompt.with_answer(target).answer_ids) == count
    return target


def said(vlm: VisionLanguageModel, prompt: Prompt, target: str) -> bool:
    """Whether free greedy generation of as many tokens gives the target."""
    count = len(prompt.with_answer(target).answer_ids)
    return vlm.answers([prompt], max_new_tokens=count) == [target]


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def searched(
    vlm: VisionLanguageModel, request: EditRequest, settings: ValueSettings, *, layer: int = 1, token: str = "last"
) -> ValueResult:
    projection = vlm.down_projection(layer)
    asked = {"projection": projection, "place": projection, "layer": layer, "token": token, "settings": settings}
    (result,) = search_values(vlm, [goals_of(request)[0].made(vlm)], **asked)
    return result


def output_at_last(vlm: VisionLanguageModel, prompt: Prompt, layer: int) -> Tensor:
    """Output of the down projection at the prompt's last token in an unaided call, (hidden,)."""
    seen = []
    handle = vlm.down_projection(layer).module.register_forward_hook(lambda _m, _i, output: seen.append(output[0, -1]))
    with torch.no_grad():
        vlm.logits(prompt)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("count", [1, 3])
def test_the_edited_model_says_the_target_and_the_others_do_not(vlm, count):
    prompt, weights = prompt_for(vlm), bits(vlm)
    target = target_of(prompt, count)
    delta = EDIT.edit(vlm, [EditRequest(question=prompt, target=target)])
    assert bits(vlm) == weights
    assert not said(vlm, prompt, target)
    with delta.applied(vlm):
        assert said(vlm, prompt, target)
    assert not said(vlm, prompt, target)
    ((left, right),) = delta.factors.values()
    assert left.shape == (vlm.hidden, count) and right.shape == (count, vlm.mlp)


def test_one_key_cannot_spell_several_tokens_but_one_per_token_can(random_llava_llama):
    vlm = random_llava_llama
    prompt = prompt_for(vlm)
    target = target_of(prompt, 3)
    whole = EDIT.edit(vlm, [EditRequest(question=prompt, target=target)])
    first_only = EDIT.edit(vlm, [EditRequest(question=prompt, target=target.split()[0])])
    for delta, holds in ((whole, True), (first_only, False)):
        with delta.applied(vlm):
            assert said(vlm, prompt, target.split()[0])
            assert said(vlm, prompt, target) is holds


def test_all_contexts_are_met_at_once(vlm):
    contexts = (prompt_for(vlm, OTHER, "blue"), prompt_for(vlm, QUESTION, "green"))
    prompt = prompt_for(vlm)
    target = target_of(prompt, 2)
    delta = EDIT.edit(vlm, [EditRequest(question=prompt, target=target, contexts=contexts)])
    with delta.applied(vlm):
        assert [said(vlm, each, target) for each in (prompt, *contexts)] == [True] * 3
    assert [said(vlm, each, target) for each in (prompt, *contexts)] == [False] * 3
    assert delta.requests[0]["contexts"] == "2"


def test_several_requests_are_met_by_one_solve(random_llava_llama):
    vlm = random_llava_llama
    prompts = [prompt_for(vlm), prompt_for(vlm, OTHER, "blue"), vlm.prompt(None, "Where do people go now?")]
    targets = [target_of(prompts[0], 1), target_of(prompts[0], 2, skip=3), target_of(prompts[0], 1, skip=7)]
    requests = [EditRequest(question=prompt, target=target) for prompt, target in zip(prompts, targets, strict=True)]
    delta = MultEdit(layer=-1, ending="none", ridge_fraction=1e-3).edit(vlm, requests)
    ((left, right),) = delta.factors.values()
    assert left.shape[1] == right.shape[0] == 4
    assert [request["target"] for request in delta.requests] == targets
    with delta.applied(vlm):
        assert [said(vlm, prompt, target) for prompt, target in zip(prompts, targets, strict=True)] == [True] * 3


@pytest.mark.parametrize("ridge_fraction", [0.0, 0.05, 1.0])
def test_the_output_at_the_key_moves_by_the_promised_share(vlm, ridge_fraction):
    prompt = prompt_for(vlm)
    request = EditRequest(question=prompt, target=target_of(prompt, 1))
    editor = MultEdit(layer=1, ending="none", ridge_fraction=ridge_fraction, steps=5)
    delta = editor.edit(vlm, [request])
    wanted = searched(vlm, request, editor).change[0]
    before = output_at_last(vlm, prompt, 1)
    with delta.applied(vlm):
        moved = output_at_last(vlm, prompt, 1) - before
    share = 1 / (1 + ridge_fraction)  # |k|^2 / (lambda + |k|^2)
    torch.testing.assert_close(moved, share * wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        delta.retained(vlm)[vlm.down_projection(1).name], torch.tensor([share]), rtol=1e-3, atol=0
    )


def test_an_absolute_ridge_replaces_the_relative_one(random_llava_llama):
    vlm = random_llava_llama
    prompt = prompt_for(vlm)
    request = EditRequest(question=prompt, target=target_of(prompt, 1))
    keys, _ = keys_and_values(vlm, goals_of(request)[0].made(vlm).prompts, layer=1, token="last")
    norm = keys.square().sum(-1).mean().item()
    absolute = MultEdit(layer=1, ridge=0.3 * norm, steps=3, ending="stop").edit(vlm, [request])
    relative = MultEdit(layer=1, ridge_fraction=0.3, steps=3, ending="stop").edit(vlm, [request])
    for one, other in zip(*(next(iter(each.factors.values())) for each in (absolute, relative)), strict=True):
        torch.testing.assert_close(one, other)
    assert absolute.settings["ridge"] != relative.settings["ridge"]


def test_no_steps_change_no_bit(vlm):
    prompt, weights = prompt_for(vlm), bits(vlm)
    request = EditRequest(question=prompt, target=target_of(prompt, 2))
    with MultEdit(layer=1, steps=0).edit(vlm, [request]).applied(vlm):
        assert bits(vlm) == weights
    with MultEdit(layer=1, steps=1).edit(vlm, [request]).applied(vlm):
        assert bits(vlm) != weights


def test_a_saved_model_gives_the_same_logits_in_plain_transformers(vlm, tmp_path):
    prompt, weights = prompt_for(vlm), bits(vlm)
    target = target_of(prompt, 2)
    handle = EDIT.edit(vlm, [EditRequest(question=prompt, target=target)]).apply(vlm)
    vlm.save_pretrained(tmp_path / "edited")
    with torch.no_grad():
        edited = vlm.model(**prompt.inputs).logits
    handle.undo()
    assert bits(vlm) == weights
    auto = AutoModelForImageTextToText if vlm.has_vision else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path / "edited", dtype=vlm.dtype).eval()
    with torch.no_grad():
        assert torch.equal(plain(**prompt.inputs).logits, edited)
        assert not torch.equal(vlm.model(**prompt.inputs).logits, edited)
        length = prompt.inputs["input_ids"].shape[1]
        said_plainly = plain.generate(**prompt.inputs, do_sample=False, max_new_tokens=2)[0, length:]
    assert vlm.decode(said_plainly).strip() == target


def test_a_model_in_half_precision_is_edited_too(random_llava_llama):
    vlm = load(random_llava_llama.name, dtype="bfloat16", verify=False)
    prompt, weights = prompt_for(vlm), bits(vlm)
    target = target_of(prompt, 1)
    delta = EDIT.edit(vlm, [EditRequest(question=prompt, target=target)])
    assert not said(vlm, prompt, target)
    with delta.applied(vlm):
        assert said(vlm, prompt, target)
    assert bits(vlm) == weights
    assert delta.retained(vlm)[vlm.down_projection(1).name].item() == pytest.approx(
        1 / (1 + EDIT.ridge_fraction), abs=0.05
    )


def test_a_saved_delta_edits_a_fresh_start(random_llava_llama, tmp_path):
    vlm = random_llava_llama
    prompt = prompt_for(vlm)
    target = target_of(prompt, 1)
    EDIT.edit(vlm, [EditRequest(question=prompt, target=target)]).save(tmp_path / "edit.safetensors")
    delta = Delta.load(tmp_path / "edit.safetensors")
    assert (delta.settings["editor"], delta.settings["layer"], delta.settings["token"]) == ("MultEdit", "1", "last")
    assert delta.requests[0]["question"] == QUESTION and float(delta.requests[0]["loss"]) > 0
    with delta.applied(vlm):
        assert said(vlm, prompt, target)


def test_where_is_a_layer_and_a_token_chosen_elsewhere(random_llava_llama):
    vlm = random_llava_llama
    prompt = prompt_for(vlm)
    requests = [EditRequest(question=prompt, target=target_of(prompt, 1))]
    where = SimpleNamespace(layer=0, token="constraint_last")
    chosen, plain = (MultEdit(steps=3, **place).edit(vlm, requests) for place in ({"where": where}, vars(where)))
    assert chosen.settings == plain.settings
    assert list(chosen.factors) == [vlm.down_projection(0).name]
    for one, other in zip(*(next(iter(each.factors.values())) for each in (chosen, plain)), strict=True):
        assert torch.equal(one, other)


def test_the_published_constants_hold_the_change_to_almost_nothing(random_llava_llama):
    vlm = random_llava_llama
    request = EditRequest(question=prompt_for(vlm), target=target_of(prompt_for(vlm), 1))
    assert MultEdit.paper().layer == 2
    ratios = {}
    for clamp in (1e-4, 0.75, None):
        editor = MultEdit.paper(layer=1, clamp=clamp)
        assert (editor.ridge, editor.steps, editor.learning_rate, editor.token) == (0.01, 10, 0.1, "constraint_last")
        found = searched(vlm, request, editor, token="constraint_last")
        ratios[clamp] = (found.change.norm() / found.before.norm()).item()
        assert len(found.losses) == 11
    assert ratios[1e-4] == pytest.approx(1e-4, rel=1e-3)
    assert 1e-4 < ratios[0.75] <= 0.75 * (1 + 1e-5)
    assert ratios[None] > ratios[0.75] or ratios[None] == pytest.approx(ratios[0.75])


def test_editing_works_without_gradients_around_it_and_leaves_none(random_llava_llama):
    vlm = random_llava_llama
    prompt = prompt_for(vlm)
    requests = [EditRequest(question=prompt, target=target_of(prompt, 1))]
    hooks = {module: (*module._forward_hooks, *module._forward_pre_hooks) for module in vlm.model.modules()}
    outside = next(iter(EDIT.edit(vlm, requests).factors.values()))
    with torch.no_grad():
        inside = next(iter(EDIT.edit(vlm, requests).factors.values()))
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vlm.model.parameters())
    assert {module: (*module._forward_hooks, *module._forward_pre_hooks) for module in vlm.model.modules()} == hooks


def test_progress_is_shown_unless_it_is_turned_off(random_llama, capfd):
    prompt = prompt_for(random_llama)
    request = EditRequest(question=prompt, target=target_of(prompt, 1))
    editor = MultEdit(layer=1, steps=2)
    editor.edit(random_llama, [request], progress=False)
    assert capfd.readouterr().err == ""
    editor.edit(random_llama, [request])
    assert "values at layer 1" in capfd.readouterr().err


def test_a_search_that_stopped_short_is_logged(random_llama, caplog):
    prompt = prompt_for(random_llama)
    request = EditRequest(question=prompt, target=target_of(prompt, 1))
    with caplog.at_level(logging.WARNING, logger="multrace"):
        MultEdit(layer=1, stop_loss=100.0).edit(random_llama, [request])
        assert not caplog.records
        MultEdit(layer=1, steps=1).edit(random_llama, [request])
    assert "more steps, another layer or another token" in caplog.text


def test_a_search_that_stopped_short_of_its_goal_but_found_the_target_is_not(tiny_vlm, photo, caplog):
    prompt = tiny_vlm.prompt(photo, "What is the capital of the country in this photo?")
    request = EditRequest(question=prompt, target="red")
    with caplog.at_level(logging.WARNING, logger="multrace"):
        delta = MultEdit(layer=5, steps=60, stop_loss=1e-9).edit(tiny_vlm, [request])
    assert float(delta.requests[0]["loss"]) > 1e-9
    assert float(delta.requests[0]["probability"]) > 0.5
    assert not caplog.records


def test_a_warning_about_an_edit_and_what_the_model_then_says_agree(tiny_vlm, photo, caplog):
    """Long targets have a small probability as a whole, though each of their tokens is the most probable one."""
    prompt = tiny_vlm.prompt(photo, "What is the capital of the country in this photo?")
    outcomes = set()
    for steps in (1, 16, 60):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="multrace"):
            editor = MultEdit(layer=5, steps=steps, ridge_fraction=0.0, weight=float("inf"))
            delta = editor.edit(tiny_vlm, [EditRequest(question=prompt, target="Draivo Stanez Pruro")], progress=False)
        with delta.applied(tiny_vlm):
            says_target = tiny_vlm.answers([prompt]) == ["Draivo Stanez Pruro"]
        assert says_target == ("does not say" not in caplog.text)
        outcomes.add(says_target)
    assert outcomes == {True, False}
