"""Attention knockout of named flows: groups as the study draws them, windows, heads, whole answers, what is refused."""

from dataclasses import replace

import pytest
import torch
from multrace import Box, Engine, ModelError, TraceError
from multrace.data import World, world_questions
from multrace.models.replay import Cut
from multrace.tracing import average
from multrace.tracing.engine import EdgeCell, Runs, plain_scores
from multrace.tracing.knockout import PAPER_FLOWS, AttentionKnockout, Flow, Groups, attention_knockout, parse_flow

QUESTION = "Is the animal in this photo a cat or a puppy?"
WORDS = {"object": "the animal in this photo", "true_option": "cat", "false_option": "puppy"}
QUIET = {"progress": False}


@pytest.fixture
def prompt(random_llava, photo):
    return random_llava.prompt(photo, QUESTION, constraint=WORDS)


def groups_of(vlm, prompt, **settings) -> Groups:
    return Groups(vlm=vlm, prompt=prompt, predicting=prompt.groups["last"], **settings)


# ---- groups ----


def test_groups_are_the_studys(random_llava, prompt):
    groups = groups_of(random_llava, prompt, boxes=(Box(0, 0, 20, 20),))
    found = {name: set(groups.positions(name)) for name in ("question", "image", "system", "template", "last")}
    assert found["question"] == set(prompt.groups["question_only"])
    assert found["template"] and min(found["template"]) > max(found["question"])
    assert max(found["template"]) < prompt.groups["last"][0]
    assert max(found["system"]) < min(found["image"])
    options = groups.positions("options")
    assert set(options) == set(groups.positions("true option")) | set(groups.positions("false option"))
    assert "".join(prompt.tokens[place] for place in groups.positions("true option")).strip() == "cat"
    assert set(groups.positions("question without options")) == found["question"] - set(options)
    inside, outside = (set(groups.positions(name)) for name in ("object", "other patches"))
    assert inside and outside and inside | outside == found["image"] and not inside & outside
    assert groups.positions("object") != groups_of(random_llava, prompt, boxes=(Box(20, 20, 48, 48),)).positions(
        "object"
    )
    assert groups.positions(3) == (3,)
    assert groups.positions([5, 3]) == (3, 5)


def test_separators_are_what_stands_between_picture_and_question(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, template="{image}\n{question}\nAnswer:")
    found = groups_of(random_llava, prompt).positions("separators")
    assert set(found) == set(prompt.groups["question"]) - set(prompt.groups["question_only"])
    assert found and max(found) < min(prompt.groups["question_only"])


@pytest.mark.parametrize(
    ("text", "flow"),
    [("image -> last", Flow(source="image", target="last")), ("5->-1", Flow(source=5, target=-1))],
)
def test_flows_are_read(text, flow):
    assert parse_flow(text) == flow


@pytest.mark.parametrize("text", ["image", "image ->", "-> last", ""])
def test_half_a_flow_is_refused(text):
    with pytest.raises(TraceError, match='write "source -> target"'):
        parse_flow(text)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ("picture -> last", "no token group 'picture' in this prompt; groups with tokens: image, question"),
        ("object -> last", "needs boxes="),
        ("true option -> last", "no token group 'true option'"),
        ("answer -> last", "no tokens in the group 'answer'"),
        ("900 -> last", "no position 900; this prompt has"),
    ],
)
def test_groups_that_are_not_there_are_refused(tiny_vlm, photo, flow, message):
    prompt = tiny_vlm.prompt(photo, QUESTION)
    with pytest.raises((TraceError, ModelError), match=message):
        attention_knockout(tiny_vlm, prompt, flows=[flow], **QUIET)


def test_a_box_outside_the_picture_shows_the_valid_range(random_llava, prompt):
    with pytest.raises(TraceError, match="leaves the picture of 48 x 48 pixels; pass 0 <= left < right <= 48"):
        attention_knockout(random_llava, prompt, boxes=[Box(0, 0, 90, 10)], **QUIET)


def test_the_answers_own_tokens_are_no_group_of_a_flow(random_llava, prompt):
    with pytest.raises(TraceError, match="reaches beyond the prompt's last token"):
        attention_knockout(random_llava, prompt.with_answer("cat"), flows=["answer -> last"], **QUIET)


# ---- what is measured ----


def by_hand(vlm, prompt, source, target, layers, heads=()) -> float:
    entering = vlm.embed(prompt)
    run = Runs.of_one(entering, scored=(entering.length - 1,))
    cut = Cut(sources=frozenset(source), targets=frozenset(target), heads=heads)
    cell = EdgeCell(cut=cut, first=layers[0], last=layers[-1])
    token = int(vlm.logits(prompt)[0, entering.length - 1].argmax())
    return float(plain_scores(vlm, run, [cell], lambda logits: logits[:, -1].double().softmax(-1)[:, token, None]))


def test_each_cell_is_what_it_says(exact_llava, photo):
    prompt = exact_llava.prompt(photo, QUESTION, constraint=WORDS)
    flow = attention_knockout(exact_llava, prompt, windows=(1, 3), **QUIET)
    assert flow.flows[:4] == PAPER_FLOWS
    assert flow.spans.tolist()[0] == [[layer, layer] for layer in range(4)]
    assert flow.spans.tolist()[1] == [[0, 1], [0, 2], [1, 3], [2, 3]]
    groups = prompt.groups
    for name, source, target in (
        ("image -> last", groups["image"], groups["last"]),
        ("true option -> last", groups["constraint:true_option"], groups["last"]),
        ("image -> question", groups["image"], groups["question_only"]),
    ):
        for number, window in enumerate(flow.windows):
            for layer in (0, 2):
                first, last = flow.spans[number, layer].tolist()
                expected = by_hand(exact_llava, prompt, source, target, (first, last))
                found = flow.probabilities[0, flow.flows.index(name), number, layer]
                assert float(found) == pytest.approx(expected, abs=1e-12), (name, window, layer)
    change = flow.change()
    assert torch.equal(change, (flow.probabilities[0] / flow.clean[0] - 1) * 100)
    assert float(change.abs().max()) > 1.0
    assert flow.free[flow.flows.index("image -> question"), 0].tolist() == [False, False, False, True]


def test_heads_are_cut_alone_or_together(exact_llava, photo):
    prompt = exact_llava.prompt(photo, QUESTION)
    settings = {"flows": ["image -> last"], "windows": (1,), **QUIET}
    every, each, two = (
        attention_knockout(exact_llava, prompt, heads=heads, **settings) for heads in (None, "each", (1, 3))
    )
    assert each.flows == tuple(f"image -> last, head {head}" for head in range(exact_llava.heads))
    assert each.flow_heads == ((0,), (1,), (2,), (3,))
    assert two.flow_heads == ((1, 3),)
    image, last = prompt.groups["image"], prompt.groups["last"]
    for head in range(exact_llava.heads):
        expected = by_hand(exact_llava, prompt, image, last, (1,), (head,))
        assert float(each.probabilities[0, head, 0, 1]) == pytest.approx(expected, abs=1e-12)
    assert float(two.probabilities[0, 0, 0, 1]) == pytest.approx(
        by_hand(exact_llava, prompt, image, last, (1,), (1, 3)), abs=1e-12
    )
    assert not torch.allclose(two.probabilities, every.probabilities, atol=1e-7)


def test_a_whole_answer_is_scored_from_every_position_that_predicts_it(exact_llava, photo):
    prompt = exact_llava.prompt(photo, QUESTION)
    answer = "a small white cat"
    settings = {"flows": ["question -> last", "last -> last"], "windows": (4,), "answer": answer, **QUIET}
    flow = attention_knockout(exact_llava, prompt, whole_answer=True, **settings)
    first = attention_knockout(exact_llava, prompt, **settings)
    count = len(prompt.with_answer(answer).answer_ids)
    assert count > 2
    assert flow.scores == ("first token", "answer")
    assert flow.flow_targets[0] == tuple(range(prompt.length - 1, prompt.length - 1 + count))
    assert float(flow.clean[1]) == pytest.approx(exact_llava.score(photo, QUESTION, answer).probability, rel=1e-9)
    assert flow.clean[0] == pytest.approx(float(first.clean[0]), rel=1e-12)
    # what happens at later positions cannot reach the first token
    assert torch.allclose(flow.probabilities[0, 0], first.probabilities[0, 0], atol=1e-12, rtol=0)
    assert not torch.allclose(flow.change("answer")[0], flow.change("first token")[0], atol=1e-3)


def test_an_answer_can_be_given_and_is_compared_with_the_right_one(tiny_vlm):
    world = World()
    fact = world.facts[0]
    record = world.question(fact).with_image(world.picture(world.entities[fact.entity], 4).image)
    prompt = tiny_vlm.prompt(record.image, record.text)
    settings = {"flows": ["image -> question"], "windows": (3,), **QUIET}
    right = attention_knockout(tiny_vlm, prompt, gold=record.answer.upper(), **settings)
    wrong = attention_knockout(tiny_vlm, prompt, gold="something else", **settings)
    unknown = attention_knockout(tiny_vlm, prompt, **settings)
    assert (right.is_right, wrong.is_right, unknown.is_right) == (True, False, None)
    assert right.generated == wrong.generated == record.answer
    mean = average([right, wrong])
    assert mean.count == 1
    assert [(each.gold, each.generated) for each in mean.filtered] == [("something else", record.answer)]
    assert float(right.change()[0, 0, 1]) < -30 < float(right.change()[0, 0, 6])


def test_both_engines_say_the_same_and_the_fast_one_checks_itself(random_llava, prompt):
    fast = attention_knockout(random_llava, prompt, **QUIET)
    slow = attention_knockout(random_llava, prompt, engine=Engine(name="plain"), **QUIET)
    assert torch.allclose(fast.probabilities, slow.probabilities, atol=2e-6, rtol=0)
    assert (fast.engine.engine, slow.engine.engine) == ("replay", "plain")
    assert fast.engine.checked_cells == 2
    assert fast.engine.largest_difference < 2e-6
    assert fast.engine.free_cells == int(fast.free.sum()) > 0
    assert fast.engine.token_layers < slow.engine.token_layers / 3


def test_it_is_saved_and_opened_again(random_llava, prompt, tmp_path):
    flow = attention_knockout(random_llava, prompt, heads=(0,), gold="cat", **QUIET)
    again = AttentionKnockout.load(flow.save(tmp_path / "flow.safetensors"))
    assert torch.equal(again.probabilities, flow.probabilities)
    tensors = ("probabilities", "clean", "free", "spans")
    plain = dict.fromkeys(tensors)
    assert vars(replace(again, **plain)) == vars(replace(flow, **plain))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": (0,)}, "no window of 0 layers: the decoder has 4; pass some of 1 to 4"),
        ({"windows": (5,)}, "no window of 5 layers"),
        ({"heads": "all"}, "no heads 'all'; pass 'each', numbers from 0 to 3"),
        ({"heads": (4,)}, r"no heads \[4\]; this model has heads 0 to 3"),
        ({"heads": ()}, r"no heads \[\]"),
        ({"flows": []}, "no flows to cut"),
        ({"flows": ["0 -> 0"]}, "some token would see nothing at all"),
    ],
)
def test_what_does_not_fit_is_refused(random_llava, prompt, settings, message):
    with pytest.raises(TraceError, match=message):
        attention_knockout(random_llava, prompt, **settings, **QUIET)


def test_a_prompt_without_a_picture_needs_flows(random_llama):
    prompt = random_llama.prompt(None, "Who founded Foo?")
    with pytest.raises(TraceError, match="no picture; pass flows="):
        attention_knockout(random_llama, prompt, **QUIET)
    flow = (
        attention_knockout(random_llama, prompt, flows=["question -> last"], windows=(1,), **QUIET)
        if (prompt.groups["last"][0] not in prompt.groups["question_only"])
        else attention_knockout(random_llama, prompt, flows=["0 -> last"], windows=(1,), **QUIET)
    )
    assert float(flow.change().abs().max()) > 0


@pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_the_tool_sees_how_the_embedded_model_was_made_to_work(tiny_vlm, count):
    """Image to question in the first layers, the constraint to the last token later, image to last never."""
    flows = ["image -> question", "constraint -> last", "image -> last", "question -> last", "object -> question"]
    found = [
        attention_knockout(
            tiny_vlm, tiny_vlm.prompt_for(question), flows=flows, windows=(1, 4),
            boxes=[Box(*box) for box in question.boxes], gold=question.answer, engine=Engine(checks=0), **QUIET,
        )
        for question in world_questions(count, seed=3)
    ]  # fmt: skip
    mean = average(found)
    into_question, from_constraint, direct, asked, from_object = (mean.curve(flow, 4) for flow in flows)
    assert float(into_question[:3].max()) < -50
    assert float(into_question[4:].abs().max()) < 5
    assert float(from_constraint[:2].abs().max()) < 5
    assert float(from_constraint[5]) < -15
    assert float(direct.abs().max()) < 3
    assert float(asked[0]) < -60 and float(asked[5]) < -15  # the wording first, the picture's part later
    assert float(from_object[1]) < 0.7 * float(into_question[1])  # most of what the picture brings
    assert mean.centre("image -> question", 4).interval[1] < mean.centre("constraint -> last", 4).interval[0]
    # one late layer alone is made up for by its neighbours
    assert float(mean.curve("constraint -> last", 1).abs().max()) < 5
