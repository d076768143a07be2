"""The search for values: running the upper layers again is the whole model to float64, and runs no layer too many.

The oracle is the plain way: every prompt by itself, whole, through `VisionLanguageModel.forward`, with the change added
at absolute positions by `models.patch`, and Adam on one goal at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import multrace as mt
import pytest
import torch
from model_fixtures import draw_photo
from multrace import VisionLanguageModel
from multrace.data import World, world_records
from multrace.editing import EditError
from multrace.editing.values import (
    Goal,
    Place,
    RequestValues,
    TargetBatch,
    ValueResult,
    ValueSettings,
    key_positions,
    search,
    search_values,
    target_batch,
)
from multrace.models import Family, Prompt, Site, load, patch
from multrace.models.replay import PaddedBatch, UpperLayers
from random_models import make_tokenizer, save, text_sizes
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

SPAN = "the thing in this picture"
QUESTION = f"What is {SPAN}?"
OTHER = f"Please tell me now, what do people call {SPAN}?"
LAYER = 2
FEW = ValueSettings(steps=3, learning_rate=0.2, weight_decay=0.05, ending="stop")
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def prompt_for(vlm: VisionLanguageModel, question: str = QUESTION, seed: int = 1) -> Prompt:
    return vlm.prompt(draw_photo(seed) if vlm.has_vision else None, question, constraint=SPAN)


def goals_of(vlm: VisionLanguageModel) -> list[Goal]:
    """Three facts that differ in the number of contexts, tokens of the target and essence prompts."""
    several = (prompt_for(vlm), prompt_for(vlm, OTHER, 2), prompt_for(vlm, OTHER, 3))
    essence = (prompt_for(vlm, f"Who is {SPAN}?", 4), prompt_for(vlm, f"Which city, of all, made {SPAN}?", 5))
    return [
        Goal(prompts=tuple(each.with_answer("red green tennis") for each in several), essence=essence),
        Goal(prompts=(prompt_for(vlm, f"Where is {SPAN} at night?", 6).with_answer("Rome"),)),
        Goal(prompts=(prompt_for(vlm, f"Is {SPAN} a brown fox?", 7).with_answer("no golf"),), essence=essence[:1]),
    ]


def places_of(vlm: VisionLanguageModel, layer: int = LAYER) -> dict[str, Place]:
    return {
        "mlp": vlm.down_projection(layer),
        "attention": vlm.attention_projection(layer),
        "hidden": Site("hidden", layer),
    }


def searched(
    vlm: VisionLanguageModel,
    goals: Sequence[Goal],
    settings: ValueSettings,
    *,
    token: str = "last",
    kind: str = "mlp",
    checkpoint: Path | None = None,
) -> list[ValueResult]:
    projection = (vlm.attention_projection if kind == "attention" else vlm.down_projection)(LAYER)
    where = {"projection": projection, "place": places_of(vlm)[kind], "layer": LAYER, "token": token}
    return search_values(vlm, goals, settings=settings, checkpoint=checkpoint, **where)


def plain_logits(
    vlm: VisionLanguageModel, prompt: Prompt, place: Place, positions: Sequence[int], change: Tensor
) -> Tensor:
    """(token, vocab) of one whole prompt, with the change at these of its positions."""

    def add(output: Tensor) -> Tensor:
        return output.index_add(1, torch.tensor(positions), change[None, : len(positions)])

    with patch(vlm, {place: add}):
        return vlm.forward(vlm.embeddings(prompt))[0]


def plain_losses(
    vlm: VisionLanguageModel, goal: Goal, place: Place, token: str, change: Tensor, settings: ValueSettings
) -> tuple[Tensor, Tensor]:
    """(mean negative log-probability, KL of the essence) of one goal, prompt by prompt."""
    ends = {"end": settings.stops, "every": settings.answer_keys}
    nll, apart = [], []
    for prompt in goal.prompts:
        ids = [*prompt.answer_ids, *([vlm.tokenizer.eos_token_id] if settings.stops else goal.ending)]
        logits = plain_logits(vlm, prompt, place, key_positions(prompt, token, **ends), change)
        first = prompt.positions("last")[0]
        losses = -logits[first : first + len(ids)].log_softmax(-1)[torch.arange(len(ids)), ids]
        if not settings.stops and goal.ending:
            losses = torch.cat([losses[:-1], (losses[-1:] - math.log(2)).relu()])
        nll.append(losses.mean())
    for prompt in goal.essence:
        positions = key_positions(prompt, token)[:1]
        now, was = (
            plain_logits(vlm, prompt, place, positions, each)[-1].log_softmax(-1)
            for each in (change, torch.zeros_like(change))
        )
        apart.append((now.exp() * (now - was)).sum())
    return torch.stack(nll).mean(), torch.stack(apart).mean() if apart else torch.zeros(())


def plain_search(
    vlm: VisionLanguageModel, goal: Goal, settings: ValueSettings, *, token: str = "last", kind: str = "mlp"
) -> tuple[Tensor, list[float]]:
    """(change, losses) of the best step, one goal at a time, written down straight."""
    place = places_of(vlm)[kind]
    before = outputs_at(vlm, goal, place, token, settings)
    change = torch.zeros_like(before, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.learning_rate)
    losses, changes = [], []
    for step in range(settings.steps + 1):
        nll, apart = plain_losses(vlm, goal, place, token, change, settings)
        loss = nll + settings.essence_weight * apart
        losses.append(loss.item())
        changes.append(change.detach().clone())
        if step == settings.steps or loss <= settings.stop_loss:
            break
        squared = (change**2).sum()
        # The root has no gradient at zero, where the search takes none.
        size = squared if settings.squared_decay else (squared.sqrt() if squared > 0 else 0.0)
        optimiser.zero_grad()
        (loss + settings.weight_decay * size / (before**2).sum()).backward()
        optimiser.step()
        if settings.clamp is not None:
            with torch.no_grad():
                for row, output in zip(change, before, strict=True):
                    row.mul_(min(1.0, settings.clamp * output.norm().item() / row.norm().item()))
    return changes[losses.index(min(losses))], losses


def outputs_at(vlm: VisionLanguageModel, goal: Goal, place: Place, token: str, settings: ValueSettings) -> Tensor:
    """(key, hidden), what the place writes at the keys of a goal: mean over its prompts."""
    ends = {"end": settings.stops, "every": settings.answer_keys}
    found = []
    for prompt in goal.prompts:
        positions = list(key_positions(prompt, token, **ends))
        seen = []
        with torch.no_grad(), patch(vlm, {place: lambda output, seen=seen: seen.append(output) or output}):
            vlm.forward(vlm.embeddings(prompt))
        found.append(seen[0][0, positions])
    return torch.stack(found).mean(0)


def inputs_of(vlm: VisionLanguageModel, batch: TargetBatch) -> PaddedBatch:
    return PaddedBatch.after_prefix(vlm, batch.entering, batch.start)


def recorded(vlm: VisionLanguageModel, batch: TargetBatch, layer: int = LAYER) -> UpperLayers:
    upper, logits = UpperLayers.record(vlm, inputs_of(vlm, batch), batch.label_columns, first=layer)
    return upper.checked(logits, batch.label_mask)


def assert_same(one: ValueResult, other: ValueResult) -> None:
    for part in ("change", "keys", "plain_keys", "before"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), **TIGHT)
    assert one.losses == pytest.approx(other.losses, rel=1e-9)
    assert one.probability == pytest.approx(other.probability, rel=1e-6)


@pytest.mark.parametrize("token", ["last", "constraint_last"])
@pytest.mark.parametrize("kind", ["mlp", "attention", "hidden"])
def test_gradients_through_the_upper_layers_are_those_of_the_plain_path(exact_vlm, token, kind):
    vlm, goals, place = exact_vlm, goals_of(exact_vlm), places_of(exact_vlm)[kind]
    batch = target_batch(vlm, goals, token)
    upper = recorded(vlm, batch)
    assert upper.is_partial
    count = batch.key_mask.shape[1]
    generator = torch.Generator().manual_seed(0)
    change = 0.3 * torch.randn(len(goals), count, vlm.hidden, generator=generator, dtype=torch.float64)
    change.requires_grad_(True)
    rows = torch.arange(len(batch.goals))[:, None]

    def add(output: Tensor) -> Tensor:
        return output.index_put((rows, batch.key_columns), change[batch.goals] * batch.key_mask[..., None], True)

    with patch(vlm, {place: add}):
        found = upper.logits().log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    own = [(batch.goals == goal) & ~batch.essence for goal in range(len(goals))]
    losses = [-found[mine][:, batch.label_mask[mine][0]].mean() for mine in own]
    plain = [plain_losses(vlm, goal, place, token, row, FEW)[0] for goal, row in zip(goals, change, strict=True)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(plain), **TIGHT)
    (gradient,), (wanted,) = (torch.autograd.grad(sum(each), [change]) for each in (losses, plain))
    torch.testing.assert_close(gradient, wanted, **TIGHT)
    assert (gradient.abs().amax((1, 2)) > 1e-5).all()


SETTINGS = {
    "as they are": (FEW, "last", "mlp"),
    "one key of the constraint": (FEW, "constraint_last", "mlp"),
    "output of attention": (FEW, "last", "attention"),
    "whole layer": (FEW, "last", "hidden"),
    "clamp": (replace(FEW, clamp=0.1), "last", "mlp"),
    "decay as published": (replace(FEW, squared_decay=False, weight_decay=0.5), "last", "mlp"),
    "strong decay": (replace(FEW, weight_decay=50.0), "last", "mlp"),
    "strong essence": (replace(FEW, essence_weight=5.0), "last", "mlp"),
    "without the end of the answer": (replace(FEW, ending="none"), "last", "mlp"),
    "without keys of the answer": (replace(FEW, answer_keys=False), "last", "mlp"),
    "stops early": (replace(FEW, stop_loss=5.0, steps=8), "last", "mlp"),
}


@pytest.mark.parametrize(("settings", "token", "kind"), SETTINGS.values(), ids=SETTINGS)
def test_the_search_goes_the_way_of_the_plain_path(exact_llava, settings, token, kind):
    goals = goals_of(exact_llava)[:2]
    results = searched(exact_llava, goals, settings, token=token, kind=kind)
    for goal, result in zip(goals, results, strict=True):
        change, losses = plain_search(exact_llava, goal, settings, token=token, kind=kind)
        assert result.losses == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(result.change, change, rtol=1e-7, atol=1e-9)
        assert result.loss < result.losses[0]


def test_an_ending_is_a_part_of_the_value_without_a_key(exact_llava):
    settings = replace(FEW, ending="own")
    for goal in goals_of(exact_llava)[:2]:
        ended = replace(goal, ending=(7,))
        (result,), (bare,) = searched(exact_llava, [ended], settings), searched(exact_llava, [goal], settings)
        change, losses = plain_search(exact_llava, ended, settings)
        assert result.losses == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(result.change, change, rtol=1e-7, atol=1e-9)
        assert result.losses[0] != bare.losses[0] and result.keys.equal(bare.keys)


def test_every_setting_of_the_table_matters(exact_llava):
    goals, found = goals_of(exact_llava)[:2], set()
    for settings, token, kind in SETTINGS.values():
        results = searched(exact_llava, goals, settings, token=token, kind=kind)
        found.add(tuple(each.losses for each in results))
    assert len(found) == len(SETTINGS)


@pytest.mark.parametrize("token", ["last", "constraint_last"])
def test_goals_do_not_touch_each_other(exact_vlm, token):
    goals = goals_of(exact_vlm)
    together = searched(exact_vlm, goals, FEW, token=token)
    backwards = searched(exact_vlm, goals[::-1], FEW, token=token)[::-1]
    for goal, result, other in zip(goals, together, backwards, strict=True):
        (alone,) = searched(exact_vlm, [goal], FEW, token=token)
        assert_same(result, alone)
        assert_same(result, other)
    in_turn = searched(exact_vlm, goals, replace(FEW, rows_at_once=1), token=token)
    for result, other in zip(together, in_turn, strict=True):
        assert_same(result, other)


def test_an_interrupted_search_goes_on_with_the_batches_that_are_there(exact_vlm, tmp_path, monkeypatch):
    goals, settings = goals_of(exact_vlm), replace(FEW, rows_at_once=1)
    undisturbed = searched(exact_vlm, goals, settings)
    runs, run = [], search._BatchSearch.run
    limit = 2

    def counting(batch: search._BatchSearch, *arguments) -> list[ValueResult]:
        runs.append(batch)
        if len(runs) > limit:
            raise KeyboardInterrupt
        return run(batch, *arguments)

    monkeypatch.setattr(search._BatchSearch, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        searched(exact_vlm, goals, settings, checkpoint=tmp_path / "values")
    limit = 1000
    damaged, kept = (tmp_path / f"values-{number}.safetensors" for number in (0, 1))
    damaged.write_bytes(kept.read_bytes()[:-1])
    runs.clear()
    again = searched(exact_vlm, goals, settings, checkpoint=tmp_path / "values")
    assert len(runs) == len(goals) - 1 > 1
    for one, other in zip(undisturbed, again, strict=True):
        assert torch.equal(one.change, other.change) and one.losses == other.losses and one.keys.equal(other.keys)
    weight = exact_vlm.weight(exact_vlm.down_projection(exact_vlm.layers - 1).name)
    kept = weight.detach().clone()
    for changed in ("nothing", "settings", "a weight elsewhere", "the weight is back"):
        runs.clear()
        with torch.no_grad():
            weight.copy_(kept * 1.5 if changed == "a weight elsewhere" else kept)
        own = replace(settings, steps=1) if changed == "settings" else settings
        searched(exact_vlm, goals, own, checkpoint=tmp_path / "values")
        assert len(runs) == (0 if changed == "nothing" else len(goals)), changed


def test_goals_that_are_done_leave_the_batch_and_the_others_as_they_were(exact_llava):
    first, *others = goals_of(exact_llava)
    goals, settings = [*others, replace(first, prompts=first.prompts[:1], essence=())], replace(FEW, steps=12)
    free = [each.losses for each in searched(exact_llava, goals, settings)]
    bounds = sorted(loss for losses in free for loss in losses)
    apart = next(bound for bound in bounds if len({_first_below(bound, losses) for losses in free}) == len(free))
    sizes = []
    last = exact_llava.addresses.layers[-1]
    handle = last.register_forward_pre_hook(lambda _layer, arguments: sizes.append(len(arguments[0])))
    together = searched(exact_llava, goals, replace(settings, stop_loss=apart))
    handle.remove()
    contexts = len(goals[0].prompts)  # each of them is run by itself at the end
    assert sizes[-1 - contexts] == sizes[0] / 2
    assert sizes[-contexts:] == [1] * contexts
    for goal, result, losses in zip(goals, together, free, strict=True):
        assert result.steps == _first_below(apart, losses)
        assert result.losses == pytest.approx(losses[: result.steps + 1], rel=1e-9)
        (alone,) = searched(exact_llava, [goal], replace(settings, stop_loss=apart))
        assert_same(result, alone)


def _first_below(bound: float, losses: Sequence[float]) -> int:
    return next((step for step, loss in enumerate(losses) if loss <= bound), len(losses) - 1)


def test_some_rows_run_again_as_all_of_them_do(exact_vlm):
    batch = target_batch(exact_vlm, goals_of(exact_vlm), "last")
    upper = recorded(exact_vlm, batch)
    with torch.no_grad():
        whole = upper.logits()
        rows = torch.tensor([1, 3, 6])
        torch.testing.assert_close(upper.rows(rows).logits(), whole[rows], **TIGHT)
        assert torch.equal(upper.logits(), whole)  # nor did the cache grow, or lose rows


def layer_calls(vlm: VisionLanguageModel, run: Callable[[], object]) -> tuple[list[int], set[int]]:
    """How often each layer ran, and how many tokens it read, in runs after the first (that of the prefix)."""
    calls, tokens = Counter(), set()

    def note(index: int) -> Callable:
        def count(_module: object, arguments: tuple, keywords: dict) -> None:
            calls[index] += 1
            if calls[index] > 1:
                tokens.add((arguments[0] if arguments else keywords["hidden_states"]).shape[1])

        return count

    handles = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True)
        for index, layer in enumerate(vlm.addresses.layers)
    ]
    run()
    for handle in handles:
        handle.remove()
    return [calls[index] for index in range(vlm.layers)], tokens


def test_only_layers_and_tokens_from_the_edited_ones_on_run(random_vlm):
    goals = goals_of(random_vlm)[1:2]
    counted, tokens = layer_calls(random_vlm, lambda: searched(random_vlm, goals, replace(FEW, steps=5)))
    # The prefix, one run of the rest, one check of the upper layers; then a run before each step and one at the end.
    # Then each context once more, whole, by itself.
    contexts = goals[0].prompts
    assert counted == [2 + len(contexts)] * LAYER + [3 + 6 + len(contexts)] * (random_vlm.layers - LAYER)
    labels = len(contexts[0].answer_ids) + 1
    assert tokens == {labels, *(prompt.length for prompt in contexts)}
    assert contexts[0].length > 3 * labels


def test_a_search_in_another_run_than_the_models_is_refused(random_vlm):
    """A layer that moves whole prompts alone stands for positions or masks that a search loses."""
    goals = goals_of(random_vlm)[1:2]
    labels = len(goals[0].prompts[0].answer_ids) + 1

    def shift(_layer: object, _arguments: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        slope = torch.linspace(-9, 9, states.shape[-1])
        moved = states + slope * (states.shape[1] > 2 * labels)  # whole prompts only: a search runs the last tokens
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    assert searched(random_vlm, goals, FEW)
    handle = random_vlm.decoder_layers[-1].register_forward_hook(shift)
    with pytest.raises(EditError, match="the search does not run what the model runs"):
        searched(random_vlm, goals, FEW)
    handle.remove()


@pytest.fixture(scope="module")
def scaled_head(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """A model that divides its logits after the head."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, residual_multiplier=0.7, **text_sizes(tokenizer)))
    family = Family(name="granite", model_types=("granite",), text_types=("granite",))
    folder: Path = save(model, tokenizer, tmp_path_factory.mktemp("granite"))
    return load(folder, families=(family,), verify=False)


def test_a_model_that_scales_its_logits_is_read_as_it_reads_itself(scaled_head):
    vlm, goals = scaled_head, goals_of(scaled_head)
    assert recorded(vlm, target_batch(vlm, goals, "last")).is_partial
    for goal, result in zip(goals, searched(vlm, goals, FEW), strict=True):
        _, losses = plain_search(vlm, goal, FEW)
        assert result.losses == pytest.approx(losses, rel=1e-4)


def test_a_model_that_changes_states_between_its_layers_is_run_whole(exact_llava):
    vlm, goals = exact_llava, goals_of(exact_llava)
    batch = target_batch(vlm, goals, "last")
    assert recorded(vlm, batch).is_partial

    def shift(_layer: object, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if arguments:
            return (arguments[0] + 0.1, *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": keywords["hidden_states"] + 0.1}

    handle = vlm.decoder_layers[-1].register_forward_pre_hook(shift, with_kwargs=True)
    assert not recorded(vlm, batch).is_partial  # as `Replay.record` refuses such a model, by the same witness
    for goal, result in zip(goals[:2], searched(vlm, goals, FEW), strict=False):
        _, losses = plain_search(vlm, goal, FEW)
        assert result.losses == pytest.approx(losses, rel=1e-9)
    handle.remove()


def test_recording_the_upper_layers_is_bit_equal_to_the_whole_model(random_vlm):
    batch = target_batch(random_vlm, goals_of(random_vlm), "last")
    upper, logits = UpperLayers.record(random_vlm, inputs_of(random_vlm, batch), batch.label_columns, first=LAYER)
    with torch.no_grad():
        assert torch.equal(upper.logits(), logits)
        assert torch.equal(inputs_of(random_vlm, batch).logits(random_vlm, batch.label_columns), logits)
        moved = replace(upper, entering=upper.entering.flip(-1))
        assert not torch.equal(moved.logits(), logits)
    assert upper.checked(logits, batch.label_mask).is_partial
    assert not moved.checked(logits, batch.label_mask).is_partial


def test_the_essence_term_holds_the_prompt_that_it_names(random_llava):
    vlm, place = random_llava, places_of(random_llava)["mlp"]
    (goal, *_) = goals_of(vlm)
    divergence = {}
    for weight in (0.0, 3.0):
        settings = replace(FEW, steps=25, essence_weight=weight)
        (result,) = searched(vlm, [goal], settings)
        with torch.no_grad():
            nll, apart = plain_losses(vlm, goal, place, "last", result.change, settings)
        divergence[weight] = apart.item()
        assert result.loss == pytest.approx((nll + weight * apart).item(), rel=1e-3)
    assert divergence[3.0] < 0.25 * divergence[0.0]


def test_the_clamp_bounds_each_key_by_its_own_output(random_llava):
    for clamp, binds in ((0.02, True), (100.0, False)):
        for result in searched(random_llava, goals_of(random_llava), replace(FEW, clamp=clamp)):
            ratio = result.change.norm(dim=-1) / result.before.norm(dim=-1)
            assert (ratio <= clamp * (1 + 1e-5)).all()
            assert bool((ratio > 0.99 * clamp).all()) is binds


def test_a_goal_that_leaves_the_finite_numbers_fails_alone(exact_llava):
    vlm, goals = exact_llava, goals_of(exact_llava)
    alone = [searched(vlm, [goal], FEW)[0] for goal in goals]
    words = vlm.model.get_input_embeddings().weight
    token = vlm.tokenizer(" night", add_special_tokens=False).input_ids[-1]
    inside = [any(token in prompt.inputs["input_ids"] for prompt in goal.prompts + goal.essence) for goal in goals]
    assert inside == [False, True, False]
    saved = words[token].clone()
    with torch.no_grad():
        words[token] = math.inf
        together = searched(vlm, goals, FEW)
        words[token] = saved
    assert "left the finite numbers at step 0; lower learning_rate" in together[1].failure
    assert together[1].change.isfinite().all()
    for index in (0, 2):
        assert not together[index].failure
        assert_same(together[index], alone[index])


def test_a_goal_that_is_done_is_not_spoilt_by_one_that_fails_later(random_llama):
    goals = goals_of(random_llama)
    first = [each.losses[0] for each in searched(random_llama, goals, replace(FEW, steps=0))]
    settings = replace(FEW, learning_rate=math.inf, stop_loss=sorted(first)[1])
    for result, loss in zip(searched(random_llama, goals, settings), first, strict=True):
        is_last = loss == max(first)
        assert bool(result.failure) is is_last
        assert not result.change.any()
        assert result.loss == pytest.approx(loss, rel=1e-6)


def test_values_of_a_search_of_its_own_give_the_same_edit(tiny_vlm, tmp_path):
    world = World()
    records = world_records(world, world.edit_cases("outdated", "choose")[:3])
    editor = mt.MultEdit(layer=5, steps=4)
    plain = editor.edit(tiny_vlm, records, progress=False)
    values = editor.search(tiny_vlm, records, progress=False)
    loaded = [RequestValues.load(each.save(tmp_path / f"{n}.safetensors")) for n, each in enumerate(values)]
    assert editor.edit(tiny_vlm, records, values=loaded, progress=False).digest == plain.digest
    other = [*values[1:], values[0]]
    assert editor.edit(tiny_vlm, records, values=other, progress=False).digest != plain.digest
    with pytest.raises(mt.editing.EditError, match="2 values for 3 requests; pass one for each request"):
        editor.edit(tiny_vlm, records, values=values[:2], progress=False)
    done = RequestValues(status="nothing to do")
    delta = editor.edit(tiny_vlm, records, values=[done, done, values[2]], progress=False)
    assert [each["status"] for each in delta.requests[:2]] == ["nothing to do"] * 2
    assert set(next(iter(delta.changes.values())).owners.tolist()) == {2}


def test_later_edits_of_a_session_look_their_outputs_up_again(tiny_vlm):
    """A value is an output that is wanted: what an earlier edit already does towards it is not asked for twice."""
    question = mt.Question(text="Who won?")
    request, editor = mt.EditRequest(question=question, target="Pruro"), mt.MultEdit(layer=5)
    values = editor.search(tiny_vlm, [request], progress=False)
    with editor.start(tiny_vlm) as session:
        first, second = (session.edit([request], values=values) for _ in range(2))
    norms = [next(iter(each.changes.values())).residuals.norm() for each in (first, second)]
    assert norms[1] < 0.2 * norms[0]
