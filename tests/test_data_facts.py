"""Facts as plain values: what a field cannot hold is refused with the field, the value and what to pass."""

from pathlib import Path

import numpy as np
import pytest
from multrace.data import DataError, EditRecord, EditRequest, Probe, Question

QUESTION = Question(text="Who won?")
REFUSALS = {
    "text": (Question, {"text": 3}, "Question.text cannot be 3, of type int; pass a text"),
    "no text": (Question, {"text": None}, "Question.text cannot be None, of type NoneType; pass a text"),
    "id": (Question, {"text": "a", "id": 5}, "Question.id cannot be 5, of type int; pass a text"),
    "image": (Question, {"text": "a", "image": 5}, "Question.image cannot be 5, of type int; pass a path, a PIL image"),
    "images": (Question, {"text": "a", "image": ["a.jpg", b"x"]}, "Question.image cannot be b'x', of type bytes"),
    "answer": (Question, {"text": "a", "answer": 3}, "Question.answer cannot be 3, of type int; pass a text or None"),
    "answers": (Question, {"text": "a", "answers": "red"}, "Question.answers cannot be 'red', of type str; pass a tup"),
    "an answer": (Question, {"text": "a", "answers": ["red", 3]}, "Question.answers cannot be 3, of type int"),
    "constraint": (
        Question,
        {"text": "a", "constraint": 5},
        "Question.constraint cannot be 5, of type int; pass the w",
    ),
    "span": (
        Question,
        {"text": "a", "spans": {"object": []}},
        "Question.object cannot be [], of type list; pass the w",
    ),
    "spans": (
        Question,
        {"text": "a", "spans": ["a"]},
        "Question.spans cannot be ['a'], of type list; pass a dictionary",
    ),
    "boxes": (
        Question,
        {"text": "a", "boxes": 5},
        "Question.boxes cannot be 5, of type int; pass a tuple, also for one",
    ),
    "box": (Question, {"text": "a", "boxes": [(1, 2, 3)]}, "Question.boxes cannot be (1, 2, 3), of type tuple; pass b"),
    "fraction": (
        Question,
        {"text": "a", "boxes": [(0, 0, 1.5, 2)]},
        "Question.boxes cannot be (0, 0, 1.5, 2), of type",
    ),
    "contexts": (
        EditRequest,
        {"question": QUESTION, "target": "b", "contexts": QUESTION},
        "EditRequest.contexts cannot be Question('Who won?', no picture), of type Question; pass a tuple, also for one",
    ),
    "request": (EditRequest, {"question": "Who won?", "target": "b"}, "a question is of type str; pass a Question, or"),
    "target": (EditRequest, {"question": QUESTION, "target": 5}, "the target of the edit of 'Who won?' is 5; pass the"),
    "old": (EditRecord, {"question": QUESTION, "target": "b", "old": 5}, "EditRecord.old cannot be 5, of type int"),
    "extra": (EditRecord, {"question": QUESTION, "target": "b", "extra": {1: 2}}, "EditRecord.extra cannot be {1: 2}"),
    "probes": (EditRecord, {"question": QUESTION, "target": "b", "probes": [QUESTION]}, "; pass a tuple of Probe(kind"),
    "hops": (
        Probe,
        {"kind": "rephrase", "question": QUESTION, "hops": "2"},
        "the hops of a rephrase probe are '2'; give",
    ),
    "needs": (
        Probe,
        {"kind": "rephrase", "question": QUESTION, "needs": "2"},
        "Probe.needs cannot be '2', of type str",
    ),
    "kind": (Probe, {"kind": 5, "question": QUESTION}, "no kind of probe 5; use one of: rephrase (other wordings)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_value_of_another_type_is_refused(name):
    kind, values, message = REFUSALS[name]
    with pytest.raises(DataError) as caught:
        kind(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_means_the_same_is_kept_as_one_type():
    question = Question(text="a", image=["a.jpg", Path("b.jpg")], boxes=np.array([[0, 1, 2, 3]]), answers=["x ", "y"])
    assert question == Question(
        text=" a", image=(Path("a.jpg"), Path("b.jpg")), boxes=((0, 1, 2, 3),), answers=("x", "y")
    )
    assert Question(text="a", image="a.jpg").image == Path("a.jpg")
    assert all(type(number) is int for number in question.boxes[0])
    record = EditRecord(question=QUESTION, target="b", probes=[Probe(kind="rephrase", question=QUESTION)])
    assert isinstance(record.probes, tuple)
