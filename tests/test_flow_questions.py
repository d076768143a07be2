"""Questions for multrace flow: lines and their mistakes, the study's files, the embedded world, damaged pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from multrace.data import DataError, read_gqa_flow
from multrace.scripts import CommandError, FlowQuestion, degraded_questions, read_questions, world_questions
from multrace.scripts.main import app
from multrace.tracing import Box
from multrace.tracing.knockout import AverageKnockout
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gqa_flow"
GOOD = {
    "id": "a",
    "image": "a.png",
    "question": "Is this a cat or a puppy?",
    "answer": "cat",
    "true_option": "cat",
    "false_option": "puppy",
    "boxes": [[1, 2, 10, 12]],
}


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    def write(*found: Any) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in found))
        return path

    return write


def test_a_line_says_all_there_is(lines, tmp_path):
    (question, other), problems = read_questions(lines(GOOD, "", {"question": "Who?"}))
    assert problems == ()
    assert question.image == tmp_path / "a.png"
    assert question.spans == {"true_option": "cat", "false_option": "puppy"}
    assert question.boxes == (Box(1, 2, 10, 12),)
    assert (question.id, question.gold, question.foil) == ("a", "cat", "puppy")
    assert (other.id, other.image, other.gold) == ("line_0003", None, None)
    (moved,), _ = read_questions(lines(GOOD), images=tmp_path / "pictures")
    assert moved.image == tmp_path / "pictures" / "a.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: a list instead of an object"),
        ({"question": ""}, "line 2: the question is empty"),
        ({"answer": "x"}, "line 2: no 'question' (found 'answer')"),
        ({"question": "Who?", "anwser": "x"}, "line 2: no key 'anwser'; did you mean 'answer'?"),
        ({"question": "Who?", "answer": 3}, "line 2: 'answer' is of type int"),
        ({"question": "Who?", "boxes": [[1, 2, 3]]}, "line 2: 'boxes' is [[1, 2, 3]]"),
        ({"question": "Who?", "boxes": [[1, 2, 3, True]]}, "line 2: 'boxes' is"),
        ({"question": "Who?", "boxes": 5}, "line 2: 'boxes' is 5"),
        (GOOD, "line 2: the id 'a' has come before"),
    ],
)
def test_a_bad_line_costs_itself(lines, line, message):
    found, (problem,) = read_questions(lines(GOOD, line, {"question": "Who?"}))
    assert [question.id for question in found] == ["a", "line_0003"]
    assert message in problem


def test_nothing_to_ask_is_an_error(lines, tmp_path):
    for text, message in (("", "it is empty"), ("{", "line 1: no JSON")):
        with pytest.raises(CommandError, match=f"no questions in .*; {message}"):
            read_questions(lines(text))
    for name, message in (("absent.jsonl", "cannot read the records"), ("absent.csv", "pass --images with their")):
        with pytest.raises(CommandError, match=message):
            read_questions(tmp_path / name)
    with pytest.raises(CommandError, match="no file or folder"):
        read_questions(tmp_path / "absent.csv", images=tmp_path)


def test_the_world_asks_each_fact_once_before_any_twice():
    questions = world_questions(900)
    first = [question.id.rsplit("-", 1)[0] for question in questions]
    assert len({question.id for question in questions}) == 900
    count = len(set(first))
    assert len(set(first[:count])) == count == 440
    for question in questions[:40]:
        (box,) = question.boxes
        assert 0 <= box.left < box.right <= 64
        assert 0 <= box.top < box.bottom <= 64
        assert question.spans["constraint"].lower() in question.question.lower()
    assert [each.id for each in world_questions(5, seed=1)] != [each.id for each in world_questions(5)]
    with pytest.raises(DataError, match="ask at least one"):
        world_questions(0)


def test_pictures_are_damaged_until_a_third_of_the_answers_is_wrong(tiny_vlm):
    questions = world_questions(18)
    damaged, words = degraded_questions(tiny_vlm, questions, progress=False)
    answers = tiny_vlm.answers([question.prompt(tiny_vlm) for question in damaged])
    wrong = sum(answer != question.gold for answer, question in zip(answers, damaged, strict=True))
    assert 4 <= wrong <= 8
    assert f"{wrong / 18:.0%} of 18 answers are wrong (0% without)" in words
    again, same = degraded_questions(tiny_vlm, questions, progress=False)
    assert same == words
    assert all(one.image.tobytes() == two.image.tobytes() for one, two in zip(damaged, again, strict=True))
    with pytest.raises(CommandError, match="failures are there"):
        degraded_questions(tiny_vlm, damaged, share=0.1, progress=False)


def test_only_pictures_with_a_right_answer_can_be_damaged(tiny_vlm):
    with pytest.raises(CommandError, match="only questions with a picture and a right answer"):
        degraded_questions(tiny_vlm, [FlowQuestion(id="a", question="Who?")])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data/gqa_flow")
def test_the_studys_own_questions_go_through_the_command(tmp_path, capsys):
    """Their pictures are not at hand, so others of the same sizes stand in for them."""
    (file,) = SHARED.glob("*ChooseAttr.csv")
    for number, record in enumerate(read_gqa_flow(file, images=tmp_path)[:3]):
        Image.new("RGB", record.image_size, (90 * number, 50, 200)).save(record.image)
    out = tmp_path / "out"
    asked = ["flow", "--data", str(file), "--images", str(tmp_path), "--limit", "4", "--out", str(out)]
    assert app([*asked, "--all", "--windows", "2", "--checks", "0"]) == 0
    average = AverageKnockout.load(out / "knockout.safetensors")
    assert average.count == 3
    expected = {"image -> question", "object -> question", "other patches -> question", "true option -> last"}
    assert expected <= set(average.flows)
    printed = capsys.readouterr().out
    assert "no picture at" in printed
    report = json.loads((out / "report.json").read_text())
    assert len(report["skipped"]) == 1
