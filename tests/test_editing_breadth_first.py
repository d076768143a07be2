"""Training in breadth-first order: mini-batches, held-out prompts and early stopping, against plain loops."""

import copy
from dataclasses import replace

import multrace
import pytest
import torch
from multrace import EditRequest
from multrace.data import World, tiny_vlm_path
from multrace.editing import BreadthFirst, EditError, FineTune, Lora
from multrace.editing.baselines import change_file, save_change, stored_change
from multrace.editing.baselines.answer_batches import AnswerBatches
from multrace.editing.baselines.trained_changes import TrainedChange
from multrace.editing.baselines.training import train
from multrace.editing.requests import edited_questions
from multrace.models import VisionLanguageModel
from torch.func import functional_call
from torch.nn.functional import cross_entropy

ORDER = BreadthFirst(epochs=14, mini_batch=4, held_out=0.25)
TUNE = FineTune.breadth_first(layer=5, order=ORDER)


def lora() -> Lora:
    pytest.importorskip("peft")
    return Lora.breadth_first(order=ORDER)


def requests_of(vlm: VisionLanguageModel, count: int) -> list[EditRequest]:
    """Requests with three prompts each: a picture, another picture, and the question by name without one."""
    world, requests = World(), []
    for case in world.edit_cases("outdated", "choose")[:count]:
        record, entity = world.question(case.fact), world.entities[case.fact.entity]
        first, second = (vlm.prompt(world.picture(entity, number).image, record.text) for number in (0, 1))
        by_name = vlm.prompt(None, world.question_by_name(case.fact).text)
        requests.append(EditRequest(question=first, target=case.target, contexts=(second,), rewrite_prompts=(by_name,)))
    return requests


def right(vlm: VisionLanguageModel, requests: list[EditRequest]) -> list[bool]:
    """Whether free generation gives the target, for each prompt of each request."""
    asked = [(question, request.target) for request in requests for question in edited_questions(request)]
    answers = vlm.answers([vlm.prompt_for(question) for question, _ in asked])
    return [answer == target for answer, (_, target) in zip(answers, asked, strict=True)]


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.named_parameters()])


def equal(one: TrainedChange, other: TrainedChange) -> bool:
    assert one.fingerprints == other.fingerprints
    return all(torch.equal(one.difference(name), other.difference(name)) for name in one.fingerprints)


@pytest.mark.parametrize("make", [lambda: TUNE, lora], ids=["fine-tuning", "lora"])
def test_facts_are_learned_with_the_prompts_that_are_held_out_and_undone_bit_by_bit(tiny_vlm, make):
    editor, requests, before = make(), requests_of(tiny_vlm, 3), bits(tiny_vlm)
    random = torch.get_rng_state()
    change = editor.edit(tiny_vlm, requests)
    assert torch.equal(torch.get_rng_state(), random)
    assert bits(tiny_vlm) == before
    with change.applied(tiny_vlm):
        assert all(right(tiny_vlm, requests))
    assert bits(tiny_vlm) == before
    assert 2 < change.steps <= 14 * 2
    assert len(change.held_out_losses) == len(change.losses)
    untouched = replace(editor, order=replace(ORDER, epochs=0)).edit(tiny_vlm, requests)
    assert (untouched.steps, len(untouched.losses)) == (0, 1)
    with untouched.applied(tiny_vlm):
        assert not any(right(tiny_vlm, requests))


def test_the_steps_are_those_of_a_plain_loop_over_shuffled_prompts_in_float64():
    vlm = multrace.load(tiny_vlm_path(), dtype="float64", verify=False)
    requests, name = requests_of(vlm, 2), vlm.down_projection(-1).name
    order = BreadthFirst(epochs=2, mini_batch=4, held_out=0.0, seed=3)
    editor = FineTune(layer=-1, stop_loss=0, learning_rate=5e-3, order=order)
    change = torch.zeros_like(vlm.weight(name), requires_grad=True)

    def forward(**inputs: torch.Tensor) -> object:
        return functional_call(vlm.model, {name: vlm.weight(name).detach() + change}, kwargs=inputs)

    with vlm.gradients():
        training = train(forward, AnswerBatches(vlm, requests, batch_size=3), [change], settings=editor)
    moved = vlm.weight(name).detach() + change.detach()
    weight, losses = plain_loop(vlm, name, requests, seed=3)
    torch.testing.assert_close(moved, weight, rtol=0, atol=1e-9)
    assert training.steps == 4
    assert training.losses[:-1] == pytest.approx(losses, rel=1e-9)
    assert (moved - plain_loop(vlm, name, requests, seed=4)[0]).abs().max() > 1e-4


def plain_loop(
    vlm: VisionLanguageModel, name: str, requests: list[EditRequest], *, seed: int
) -> tuple[torch.Tensor, list[float]]:
    """The weight after two epochs in mini-batches of 4 and 2, prompt by prompt, and the mean loss of each epoch."""
    model = copy.deepcopy(vlm.model)
    weight = dict(model.named_parameters())[name].requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=5e-3)
    asked = [(question, request.target) for request in requests for question in edited_questions(request)]
    generator, means = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        shuffled, losses = torch.randperm(len(asked), generator=generator).tolist(), []
        for rows in (shuffled[:4], shuffled[4:]):
            optimiser.zero_grad()
            for row in rows:
                prompt = vlm.prompt_for(asked[row][0])
                answered = prompt.with_answer(asked[row][1])
                labels = torch.tensor([*answered.answer_ids, *vlm.end_ids[:1]])
                loss = cross_entropy(model(**answered.inputs).logits[0, prompt.length - 1 :], labels)
                (loss / len(rows)).backward()
                losses.append(loss.item())
            optimiser.step()
        means.append(sum(losses) / len(losses))
    return weight.detach(), means


def contradiction(vlm: VisionLanguageModel) -> list[EditRequest]:
    """Two facts, the first with a picture of the second as its context: what the second learns, the first unlearns."""
    one, two = requests_of(vlm, 2)
    return [
        replace(one, contexts=two.contexts, rewrite_prompts=()),
        replace(two, contexts=(), rewrite_prompts=()),
    ]


def test_training_stops_early_with_the_weights_of_the_best_epoch(tiny_vlm):
    order = BreadthFirst(epochs=12, mini_batch=1, held_out=0.34, patience=2)
    editor, requests = FineTune.breadth_first(layer=5, order=order), contradiction(tiny_vlm)
    change = editor.edit(tiny_vlm, requests)
    found = change.held_out_losses
    best = found.index(min(found))
    assert 0 < best and len(found) - 1 == best + 2 < order.epochs
    assert change.steps == 2 * (best + 2)

    def trained(epochs: int, patience: int) -> TrainedChange:
        return replace(editor, order=replace(order, epochs=epochs, patience=patience)).edit(tiny_vlm, requests)

    to_the_best = trained(best, 2)  # its epochs all improve, so it does not stop early
    assert to_the_best.held_out_losses == found[: best + 1]
    assert equal(change, to_the_best)
    assert change.losses[-1] == to_the_best.losses[-1]
    later = trained(best + 2, 12)  # trained on to the same epoch without running out of patience: the best is kept
    assert later.steps == change.steps and equal(change, later)
    unwatched = replace(editor, order=replace(order, epochs=best + 2, held_out=0.0)).edit(tiny_vlm, requests)
    assert not equal(change, unwatched) and unwatched.held_out_losses == ()


def test_a_held_out_loss_that_falls_stops_nothing(tiny_vlm):
    order = BreadthFirst(epochs=4, mini_batch=4, held_out=0.34, patience=1)
    change = FineTune.breadth_first(layer=5, order=order).edit(tiny_vlm, requests_of(tiny_vlm, 2))
    assert len(change.held_out_losses) == 5
    assert [*change.held_out_losses] == sorted(change.held_out_losses, reverse=True)
    assert change.steps == 4


def test_the_seed_decides_the_change(tiny_vlm):
    requests, order = requests_of(tiny_vlm, 2), BreadthFirst(epochs=1, mini_batch=2, held_out=0.0)
    first, again, other = (
        FineTune.breadth_first(layer=6, order=replace(order, seed=seed)).edit(tiny_vlm, requests) for seed in (0, 0, 1)
    )
    assert equal(first, again) and not equal(first, other)
    assert "seed=1" in other.settings["order"]


def test_mini_batches_that_are_known_take_no_step_and_an_epoch_without_steps_is_the_last(tiny_vlm):
    requests = requests_of(tiny_vlm, 2)
    editor = FineTune.breadth_first(layer=6, order=BreadthFirst(epochs=3, mini_batch=2, held_out=0.0))
    idle = replace(editor, stop_loss=100.0).edit(tiny_vlm, requests)
    assert (idle.steps, len(idle.losses)) == (0, 1)
    assert not any(difference.any() for difference in idle.differences.values())
    own = [replace(each, contexts=(), rewrite_prompts=()) for each in requests]
    alone = replace(editor, order=BreadthFirst(epochs=1, mini_batch=1), stop_loss=0.0)
    starts = [alone.edit(tiny_vlm, [each]).losses[0] for each in own]
    between = sum(starts) / 2
    some = replace(alone, stop_loss=between, learning_rate=1e-6).edit(tiny_vlm, own)
    assert some.steps == 1  # the one that is above; the step is too small to move the other


def test_several_layers_are_trained_together_and_no_other(tiny_vlm):
    before, requests = bits(tiny_vlm), requests_of(tiny_vlm, 1)
    change = FineTune.breadth_first(layers=(5, -2), order=BreadthFirst(epochs=2)).edit(tiny_vlm, requests)
    names = {tiny_vlm.down_projection(layer).name for layer in (5, 6)}
    assert {*change.differences} == names
    with change.applied(tiny_vlm):
        after = bits(tiny_vlm)
    assert {name for name, value in after.items() if value != before[name]} == names
    assert bits(tiny_vlm) == before
    with pytest.raises(EditError, match=r"cannot fine-tune layers \[5, 9\]: .*no layer 9"):
        FineTune(layers=(5, 9)).edit(tiny_vlm, requests)


def test_a_change_of_several_layers_is_stored_whole(tiny_vlm, tmp_path):
    order = BreadthFirst(epochs=1, held_out=0.34)
    change = FineTune.breadth_first(layers=(5, 6), order=order).edit(tiny_vlm, requests_of(tiny_vlm, 1))
    save_change(change, tmp_path / change_file(change))
    found = stored_change(tmp_path)
    assert equal(change, found)
    assert (found.steps, found.held_out_losses) == (1, change.held_out_losses) and len(found.held_out_losses) == 2
    assert "1 step\n" in repr(found)


def test_own_questions_are_never_held_out(tiny_vlm):
    owners = torch.tensor([0] * 4 + [1] + [2] * 5 + [3] * 2)
    own = {0, 4, 5, 10}
    for share, count in ((0.0, 0), (0.04, 0), (0.05, 1), (0.25, 3), (0.6, 7), (0.9, 8)):
        trained, held_out = BreadthFirst(held_out=share).split(owners)
        assert own <= {*trained.tolist()} and len(held_out) == count
        assert sorted([*trained.tolist(), *held_out.tolist()]) == [*range(12)]
    one, two = (BreadthFirst(held_out=0.25, seed=seed).split(owners)[1].tolist() for seed in (0, 1))
    assert one != two
    alone = AnswerBatches(
        tiny_vlm, [replace(each, contexts=(), rewrite_prompts=()) for each in requests_of(tiny_vlm, 3)], batch_size=2
    )
    assert len(BreadthFirst(held_out=0.9).split(alone.owners)[1]) == 0


def test_an_epoch_visits_every_prompt_once_in_an_order_of_its_own():
    rows = torch.tensor([0, 2, 3, 5, 7, 8, 9])
    order = BreadthFirst(epochs=3, mini_batch=3)
    epochs = [*order.mini_batches(rows)]
    assert [[len(each) for each in epoch] for epoch in epochs] == [[3, 3, 1]] * 3
    visits = [torch.cat([*epoch]).tolist() for epoch in epochs]
    assert all(sorted(visit) == rows.tolist() for visit in visits)
    assert len({tuple(visit) for visit in visits}) == 3
    assert order.steps(rows) == 9


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: BreadthFirst(epochs=-1), "BreadthFirst got epochs=-1; pass epochs of at least 0"),
        (lambda: BreadthFirst(mini_batch=0), "mini_batch of at least 1"),
        (lambda: BreadthFirst(held_out=1.0), "held_out from 0 to below 1"),
        (lambda: BreadthFirst(patience=0), "patience of at least 1"),
        (lambda: FineTune(), "FineTune got layer=None; pass layer or layers, one of the two"),
        (lambda: FineTune(layer=1, layers=(2,)), "layer or layers, one of the two"),
        (lambda: FineTune(layers=()), "layers of at least one layer, or None"),
        (lambda: Lora(steps=3, order=BreadthFirst()), "pass steps without an order, or the epochs of the order"),
    ],
)
def test_a_bad_setting_is_named(make, complaint):
    with pytest.raises(EditError) as error:
        make()
    assert complaint in str(error.value)


def test_locft_has_the_published_constants():
    editor = FineTune.locft()
    assert (editor.layer, editor.learning_rate, editor.stop_loss, editor.end_of_answer) == (22, 5e-4, 1e-2, True)
    assert editor.order == BreadthFirst(epochs=25, mini_batch=100, held_out=0.0)
