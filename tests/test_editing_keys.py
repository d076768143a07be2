"""Keys and the batch behind them: what plain hooks see in a whole model call, whatever the padding and the prefix."""

import pytest
import torch
from multrace import EditRequest
from multrace.editing import EditError
from multrace.editing.values import (
    Goal,
    TargetBatch,
    ValueSettings,
    goals_of,
    key_positions,
    keys_and_values,
    lookups,
    search_values,
    target_batch,
)
from multrace.models import Prompt, VisionLanguageModel
from multrace.models.replay import PaddedBatch
from PIL import Image
from torch import Tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SPAN = "the thing in this picture"
QUESTION = f"What is {SPAN}?"
OTHER = f"Please tell me now, what do people call {SPAN}?"
TARGET = "one two three"


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


def prompt_for(vlm: VisionLanguageModel, question: str = QUESTION, colour: str = "red") -> Prompt:
    image = Image.linear_gradient("L").convert("RGB") if colour == "grey" else Image.new("RGB", (48, 48), colour)
    return vlm.prompt(image if vlm.has_vision else None, question, constraint=SPAN)


def batch_of(vlm: VisionLanguageModel, *prompts: Prompt, token: str | int = "last", end: bool = True) -> TargetBatch:
    """One fact in several contexts."""
    return target_batch(vlm, [Goal(prompts=prompts)], token, end=end)


def losses(vlm: VisionLanguageModel, batch: TargetBatch) -> Tensor:
    """(row, label), negative log-probability in nats."""
    with torch.no_grad():
        inputs = PaddedBatch.after_prefix(vlm, batch.entering, batch.start)
        return -inputs.logits(vlm, batch.label_columns).log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]


def seen_by_plain_hooks(vlm: VisionLanguageModel, prompt: Prompt, layer: int) -> tuple[Tensor, Tensor]:
    """Input and output of the down projection, (token, mlp) and (token, hidden), in one unaided call of the model."""
    seen = {}

    def note(_module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(key=arguments[0][0], value=output[0])

    handle = vlm.down_projection(layer).module.register_forward_hook(note)
    with torch.no_grad():
        vlm.model(**prompt.inputs)
    handle.remove()
    return seen["key"], seen["value"]


@pytest.mark.parametrize("token", ["last", "constraint_last", "question", 0, -2])
@pytest.mark.parametrize("layer", [0, -1])
def test_keys_and_values_are_what_plain_hooks_see(vlm, token, layer):
    prompt = prompt_for(vlm).with_answer(TARGET)
    positions = list(key_positions(prompt, token))
    keys, values = keys_and_values(vlm, [prompt], layer=layer, token=token)
    plain_keys, plain_values = seen_by_plain_hooks(vlm, prompt, layer)
    torch.testing.assert_close(keys, plain_keys[positions], **CLOSE)
    torch.testing.assert_close(values, plain_values[positions], **CLOSE)
    elsewhere = [position - 1 for position in positions] if positions[0] else [1]
    assert not torch.allclose(keys, plain_keys[elsewhere], **CLOSE)


@pytest.mark.parametrize("token", ["last", "constraint_last"])
def test_contexts_of_different_length_do_not_disturb_each_other(vlm, token):
    prompts = [
        prompt_for(vlm, *asked).with_answer(TARGET) for asked in ((QUESTION, "red"), (OTHER, "grey"), (OTHER, "blue"))
    ]
    assert len({prompt.length for prompt in prompts}) > 1
    alone = [keys_and_values(vlm, [prompt], layer=1, token=token) for prompt in prompts]
    together = keys_and_values(vlm, prompts, layer=1, token=token)
    for got, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(each).mean(0), **CLOSE)
        assert not torch.allclose(got, each[0], **CLOSE)


def test_losses_are_those_of_the_whole_model(vlm):
    prompts = [prompt_for(vlm, QUESTION).with_answer(TARGET), prompt_for(vlm, OTHER, "blue").with_answer(TARGET)]
    batch = batch_of(vlm, *prompts, token="constraint_last", end=False)
    found = losses(vlm, batch)
    assert torch.equal(found, losses(vlm, batch))  # the stored prefix did not grow
    with torch.no_grad():
        for row, prompt in zip(found, prompts, strict=True):
            logits = vlm.logits(prompt)[0, prompt.positions("last")[0] : -1].log_softmax(-1)
            wanted = -logits[torch.arange(len(prompt.answer_ids)), list(prompt.answer_ids)]
            torch.testing.assert_close(row, wanted, **CLOSE)


def test_the_end_of_the_answer_is_one_more_label(vlm):
    prompt = prompt_for(vlm).with_answer(TARGET)
    with_end, without = (batch_of(vlm, prompt, end=end) for end in (True, False))
    assert without.labels[0].tolist() == list(prompt.answer_ids)
    assert with_end.labels[0].tolist() == [*prompt.answer_ids, vlm.tokenizer.eos_token_id]
    with torch.no_grad():
        end = -vlm.logits(prompt)[0, -1].log_softmax(-1)[vlm.tokenizer.eos_token_id]
    torch.testing.assert_close(losses(vlm, with_end)[0], torch.cat([losses(vlm, without)[0], end[None]]), **CLOSE)


@pytest.mark.parametrize("token", ["last", "constraint_last"])
def test_the_found_change_works_as_promised_when_a_plain_hook_adds_it(vlm, token):
    request = EditRequest(question=prompt_for(vlm), target=TARGET)
    projection = vlm.down_projection(1)
    asked = {"token": token, "layer": 1, "projection": projection, "place": projection}
    settings = ValueSettings(steps=15, ending="none")
    (result,) = search_values(vlm, [goals_of(request)[0].made(vlm)], settings=settings, **asked)
    prompt = vlm.prompt_for(request.question).with_answer(request.target)
    positions = list(key_positions(prompt, token, end=False))

    def add(_module: torch.nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[0, positions] += result.change
        return output

    def probability() -> float:
        with torch.no_grad():
            logits = vlm.logits(prompt)[0, prompt.positions("last")[0] : -1].log_softmax(-1)
        return logits[torch.arange(len(prompt.answer_ids)), list(prompt.answer_ids)].sum().exp().item()

    before = probability()
    handle = vlm.down_projection(1).module.register_forward_hook(add)
    during = probability()
    handle.remove()
    assert during == pytest.approx(result.probability, rel=1e-3)
    assert during > before
    assert result.loss < result.losses[0]
    assert torch.equal(result.values, result.before + result.change)


def test_one_key_per_label_at_the_last_token_and_one_elsewhere(vlm):
    prompt = prompt_for(vlm).with_answer(TARGET)
    last, count = prompt.positions("last")[0], len(prompt.answer_ids)
    assert count > 1
    for token in ("last", -1, last, "all"):
        assert key_positions(prompt, token) == tuple(range(last, last + count + 1))
        assert key_positions(prompt, token, end=False) == tuple(range(last, last + count))
        assert key_positions(prompt, token, every=False) == (last,)
    assert (
        key_positions(prompt, "constraint")
        == key_positions(prompt, "constraint_last")
        == prompt.positions("constraint_last")
    )
    assert key_positions(prompt, -2) == (last - 1,)


def test_a_token_that_the_prompt_lacks_is_an_error_that_lists_what_there_is(random_llava_llama):
    vlm = random_llava_llama
    without = vlm.prompt(None, QUESTION).with_answer(TARGET)
    for token in ("constraint_last", "image", "answer", "nonsense", 10_000, -10_000, without.positions("last")[0] + 1):
        with pytest.raises(EditError, match=r"cannot edit at token .*What is the thing.*last"):
            key_positions(without, token)


def test_contexts_that_disagree_about_the_last_token_are_an_error(random_llava_llama):
    vlm = random_llava_llama
    prompts = [vlm.prompt(None, question).with_answer(TARGET) for question in (QUESTION, OTHER)]
    at_the_end_of_one = prompts[0].positions("last")[0]
    with pytest.raises(EditError, match="contexts of 'What is .*disagree.*pass them as `rewrite_prompts`"):
        batch_of(vlm, *prompts, token=at_the_end_of_one)
    apart = [Goal(prompts=(prompt,)) for prompt in prompts]
    assert target_batch(vlm, apart, at_the_end_of_one).key_mask.sum(-1).tolist() == [len(prompts[0].answer_ids) + 1, 1]


def test_keys_of_many_goals_do_not_depend_on_their_company(vlm):
    short, long = prompt_for(vlm).with_answer("one"), prompt_for(vlm, OTHER, "blue").with_answer(TARGET)
    other = prompt_for(vlm, OTHER, "grey").with_answer("one")
    goals = [Goal(prompts=(short,)), Goal(prompts=(long,)), Goal(prompts=(short, other), essence=(long,))]
    projection = vlm.down_projection(2)
    together = lookups(vlm, goals, "last", [(projection, projection)])[projection]
    apart = lookups(vlm, goals, "last", [(projection, projection)], rows_at_once=1)[projection]
    for goal, one, many in zip(goals, apart, together, strict=True):
        plain = [seen_by_plain_hooks(vlm, prompt, 2) for prompt in goal.prompts]
        positions = [list(key_positions(prompt, "last")) for prompt in goal.prompts]
        keys, values = (
            torch.stack([each[part][at] for each, at in zip(plain, positions, strict=True)]) for part in (0, 1)
        )
        for found in (one, many):
            torch.testing.assert_close(found.keys, keys.mean(0), **CLOSE)
            torch.testing.assert_close(found.plain_keys, keys[0], **CLOSE)
            torch.testing.assert_close(found.before, values.mean(0), **CLOSE)
    assert not torch.allclose(together[2].keys, together[2].plain_keys, **CLOSE)
