"""Attention knockout with a plain mask: cutting nothing changes nothing, cutting the image leaves no trace of it."""

import pytest
from multrace import ModelError
from multrace.tracing import knockout_probability

QUESTION = "Who founded the company in this photo?"


def test_cutting_nothing_gives_the_clean_probability(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    clean = random_llava.logits(prompt)[0, -1].double().softmax(-1)
    for answer_id in (None, 7):
        expected = float(clean.max() if answer_id is None else clean[answer_id])
        no_source = knockout_probability(random_llava, prompt, (), "all", answer_id=answer_id)
        no_target = knockout_probability(random_llava, prompt, "all", (), answer_id=answer_id)
        assert no_source == no_target == pytest.approx(expected, abs=1e-6)


def test_cutting_what_the_causal_mask_cuts_anyway_changes_nothing(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    untouched = knockout_probability(random_llava, prompt, (), ())
    assert knockout_probability(random_llava, prompt, "last", "question") == untouched
    assert knockout_probability(random_llava, prompt, "question", "last") != untouched


def test_a_token_always_sees_itself(random_llava, photo, other_photo):
    prompt = random_llava.prompt(photo, QUESTION)
    untouched = knockout_probability(random_llava, prompt, (), (), answer_id=7)
    assert knockout_probability(random_llava, prompt, "last", "last", answer_id=7) == untouched
    alone = {
        knockout_probability(random_llava, random_llava.prompt(image, QUESTION), "all", "all", answer_id=7)
        for image in (photo, other_photo)
    }
    assert len(alone) == 1  # the last token sees nothing but itself, and that is enough for an answer
    assert 0 < alone.pop() < 1


def test_with_the_image_cut_from_everything_any_image_gives_the_same(random_llava, photo, other_photo):
    here, there = (random_llava.prompt(image, QUESTION) for image in (photo, other_photo))

    def both(sources: str | tuple[int, ...], targets: str) -> tuple[float, float]:
        return tuple(
            knockout_probability(random_llava, prompt, sources, targets, answer_id=7) for prompt in (here, there)
        )

    assert len(set(both("image", "all"))) == 1
    assert len(set(both((), "all"))) == 2  # uncut, the picture matters
    assert len(set(both("image", "last"))) == 2  # and it still reaches the last token through the question


def test_answer_positions_play_no_part(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    expected = knockout_probability(random_llava, prompt, "image", "last", answer_id=7)
    answered = prompt.with_answer("Ada Example")
    assert knockout_probability(random_llava, answered, "image", "last", answer_id=7) == expected
    assert knockout_probability(random_llava, answered, "answer", "all", answer_id=7) != expected


def test_unknown_groups_are_refused(random_llava, photo):
    with pytest.raises(ModelError, match="no token group 'picture'; this prompt has image"):
        knockout_probability(random_llava, random_llava.prompt(photo, QUESTION), "picture", "last")
