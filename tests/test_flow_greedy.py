"""Free answers with image tokens dropped: guess and verify gives what decoding token by token gives."""

from collections.abc import Sequence

import pytest
import torch
from dropped_tokens import QUESTION, gone, masked_logits, pruned
from multrace import VisionLanguageModel
from multrace.data import World
from multrace.models import Prompt
from multrace.tracing.pruning import Ids, Limits, verified
from torch import Tensor


def stepwise(vlm: VisionLanguageModel, prompt: Prompt, dropped: Sequence[int], first: int, limit: int) -> str:
    """The greedy answer, one masked pass of the whole sequence for each token."""
    entering, ids = vlm.embed(prompt), []
    words = vlm.model.get_input_embeddings()
    while len(ids) < limit and not (ids and ids[-1] == vlm.model.generation_config.eos_token_id):
        ids.append(int(masked_logits(vlm, entering, dropped, first, 1).argmax()))
        embeddings = torch.cat([entering.embeddings, words(torch.tensor([ids[-1:]]))], 1).detach()
        entering = entering.with_embeddings(embeddings)
    return vlm.decode(ids).strip()


def test_free_answers_are_those_of_decoding_step_by_step(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    found = pruned(random_llava, prompt, keep=(0, 3), max_new_tokens=4)
    for (row, layer), dropped in gone(found).items():
        assert found.answers[row][layer] == stepwise(random_llava, prompt, dropped, layer, 4)
    assert len({answer for row in found.answers for answer in row}) > 2


def test_free_answers_that_end_are_those_of_decoding_step_by_step(tiny_vlm):
    world, seen = World(), set()
    for fact in world.facts[100:102]:
        prompt = tiny_vlm.prompt(world.picture(world.entities[fact.entity], 4).image, world.question(fact).text)
        found = pruned(tiny_vlm, prompt, keep=(0, 8), layers=(0, 4), max_new_tokens=6)
        for (row, column), dropped in gone(found).items():
            assert found.answers[row][column] == stepwise(tiny_vlm, prompt, dropped, found.layers[column], 6)
        seen |= {found.answers[0][0] == found.baseline_answer, found.answers[0][-1] == found.baseline_answer}
        assert found.baseline_answer == tiny_vlm.answers([prompt], max_new_tokens=6)[0]
    assert seen == {True, False}


def test_a_wrong_guess_changes_nothing(tiny_vlm):
    world = World()
    fact = world.facts[7]
    prompt = tiny_vlm.prompt(world.picture(world.entities[fact.entity], 4).image, world.question(fact).text)
    right, wrong = (pruned(tiny_vlm, prompt, layers=(0, 4), generated=guess) for guess in (None, "red and blue"))
    assert (right.answers, right.baseline_answer, right.answer) == (wrong.answers, wrong.baseline_answer, wrong.answer)
    assert torch.allclose(right.probabilities, wrong.probabilities)


LIMITS = Limits(ends=(2, 3), tokens=4)


def decoding(answers: Sequence[Ids], guess: Ids, limits: Limits = LIMITS) -> tuple[list[Ids], int]:
    """What guess and verify makes of cells that say these ids, and how often it asks."""
    calls = []

    def likeliest(ids: Ids, start: int, numbers: Sequence[int]) -> Tensor:
        calls.append(numbers)
        said = []
        for number in numbers:
            assert answers[number][:start] == ids[:start]  # groups have said the same
            follows = ids == answers[number][: len(ids)]
            said.append(
                [
                    answers[number][place]
                    if place < len(answers[number]) and ids[:place] == answers[number][:place]
                    else 9
                    for place in range(start, len(ids))
                ]
            )
            assert not follows or said[-1] == list(ids[start:])
        return torch.tensor(said)

    return verified(likeliest, len(answers), guess, limits), len(calls)


@pytest.mark.parametrize(
    ("answers", "guess", "calls"),
    [
        ([(7, 8, 2), (7, 8, 2)], (7, 8, 2), 1),  # all as guessed
        ([(7, 8, 3), (7, 8, 2)], (7, 8, 2), 1),  # any end is an end
        ([(7, 8, 2), (2,), (7, 2)], (7, 8, 2), 1),  # ended earlier
        ([(5, 2), (7, 8, 2)], (7, 8, 2), 2),  # goes on with another token
        ([(5, 6, 4, 7), (5, 6, 4, 7), (7, 8, 2)], (7, 8, 2), 4),  # equal ones together, up to the limit
        ([(7, 8, 9, 9)], (7, 8, 9, 9), 1),  # no room for an end
        ([(7, 8, 2)], (2,), 3),  # an empty guess
    ],
)
def test_cells_follow_the_guess_and_then_each_other(answers, guess, calls):
    assert decoding(answers, guess) == (answers, calls)


def test_a_model_without_an_end_of_sequence_speaks_up_to_the_limit():
    endless = Limits(ends=(), tokens=3)
    for guess in ((), (7,), (7, 8, 4)):
        assert decoding([(7, 8, 4), (7, 2, 2)], endless.ended(guess), endless)[0] == [(7, 8, 4), (7, 2, 2)]


def test_limits_know_where_answers_end(random_llava):
    limits = Limits.of(random_llava, 3)
    end = random_llava.model.generation_config.eos_token_id
    assert limits == Limits(ends=(end,), tokens=3)
    assert limits.ended((5, 6)) == (5, 6, end) and limits.ended((5, 6, 7, 8)) == (5, 6, 7)
    assert LIMITS.without_end((5, 3)) == (5,) and LIMITS.without_end((5, 6)) == (5, 6) and not LIMITS.is_over(())
