"""Reader of OK-VQA: MMEdit's pool of locality questions, and the standard pair of questions and annotations.

A question has the answers of ten annotators; the most frequent one is the answer, and all count as right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..facts import Question
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    lists_of,
    parsed,
    read_text,
    rest_of,
    text_of,
    text_or_none,
    texts_of,
    without_prefix,
)

_HEAD = 100_000  # characters, within which the standard file names its list of questions
_COCO = re.compile(r"(\d{12})(?:\.\w+)?$")


def read_okvqa(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the questions of a pool, or of a file of questions whose annotations lie beside it.

    A pool of questions without pictures is one object with the lists "questions" and "answers".
    """
    if '"questions"' not in read_text(source.path)[:_HEAD]:
        rows = json_rows(source)
    elif (texts := _texts(source.path)) is not None:
        yield from each_row(texts, lambda number, row: [_question_alone(row, str(number))])
        return
    else:
        rows = _standard(source.path)
    yield from each_row(rows, lambda number, row: [_question(source, row, str(number))])


def answers_by_question(path: Path) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Return the answers of a file, or of a folder's questions and annotations, by (question, picture)."""
    source = DataSource(path=_questions_in(path) if path.is_dir() else path)
    table = {}
    for _, outcome in read_okvqa(source):
        if isinstance(outcome, Question):
            table[join_key(outcome.text, str(outcome.images[0]))] = outcome.answers
    return table


def join_key(question: str, image: str) -> tuple[str, str]:
    """Return what a question of one file and the same question of another file have in common."""
    number = _COCO.search(Path(image).name)
    return " ".join(re.findall(r"\w+", question.casefold())), number.group(1) if number else Path(image).name


def _question(source: DataSource, row: Row, number: str) -> Question:
    answers = _answers(row)
    if not answers:
        raise DataError("no 'answer'; fill it in or drop the row")
    return Question(
        id=text_or_none(row, "question_id") or number,
        text=text_of(row, "question"),
        image=source.pictures(row, "image") or source.picture(_coco_path(row, "val2014")),
        answer=Counter(answers).most_common(1)[0][0],
        answers=answers,
        extra=rest_of(row, "question_id", "question", "image", "answer", "answers") | lists_of(row, "question"),
    )


def _texts(path: Path) -> list[tuple[int, Row | DataError]] | None:
    """Return the rows of a pool without pictures; None if the file is none."""
    content = parsed(read_text(path), path)
    questions, answers = (content.get(name) if isinstance(content, dict) else None for name in ("questions", "answers"))
    if not (isinstance(questions, list) and isinstance(answers, list)) or any(
        isinstance(each, dict) for each in questions
    ):
        return None
    if len(questions) != len(answers):
        raise DataError(f"{str(path)!r} has {len(questions)} questions and {len(answers)} answers; pair them up")
    pairs = zip(questions, answers, strict=True)
    return [(number, {"question": text, "answer": said}) for number, (text, said) in enumerate(pairs, start=1)]


def _question_alone(row: Row, number: str) -> Question:
    answers = _answers(row)
    text = without_prefix(text_of(row, "question"))
    return Question(id=number, text=text, answer=text_of(row, "answer"), answers=answers[1:] and answers)


def _answers(row: Row) -> tuple[str, ...]:
    """Return the annotators' answers, which are texts or objects with a text under "answer"."""
    for name in ("answer", "answers"):
        values = row.get(name)
        if isinstance(values, list) and values and all(isinstance(each, dict) for each in values):
            return texts_of({name: [each.get("answer", "") for each in values]}, name)
    return texts_of(row, "answer", "answers")


def _coco_path(row: Row, folder: str) -> str:
    """Return the path of COCO's picture with the row's `image_id` in the folder of a split."""
    number = _name_of(row, "image_id")
    if not number.isdecimal():
        raise DataError("no 'image' and no 'image_id' that is a number of COCO; fill it in or drop the row")
    return f"{folder}/COCO_{folder}_{number:0>12}.jpg"


def _name_of(row: Row, key: str) -> str:
    """The number under this key as a text, whether the file writes 7, "7" or 7.0."""
    return str(row.get(key)).removesuffix(".0")


def _standard(path: Path) -> Iterator[tuple[int, Row | DataError]]:
    """The rows of a file of questions, joined with the annotations beside it."""
    questions = _list(path, "questions")
    annotations = {_name_of(row, "question_id"): row for row in _list(_annotations_of(path), "annotations")}
    split = re.search(r"(train|val|test)(\d{4})", path.name)
    folder = split.group(0) if split else "val2014"
    for number, row in enumerate(questions, start=1):
        annotation = annotations.get(_name_of(row, "question_id"))
        if annotation is None:
            yield number, DataError(f"question {row.get('question_id')!r} has no annotation; drop it")
            continue
        try:
            image = _coco_path(row, folder)
        except DataError as error:
            yield number, error
            continue
        own = {"question_id": row.get("question_id"), "question": row.get("question")}
        yield number, {**own, "image": image, "answer": annotation.get("answers")}


def _list(path: Path, name: str) -> Sequence[Mapping[str, Any]]:
    content = parsed(read_text(path), path)
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{str(path)!r} has no list {name!r}; pass OK-VQA's file of questions, its annotations beside it"
        )
    return rows


def _annotations_of(path: Path) -> Path:
    beside = [each for each in sorted(path.parent.glob("*annotations*.json")) if _split(each) == _split(path)]
    if not beside:
        raise DataError(f"no annotations beside {str(path)!r}; put OK-VQA's file *annotations*.json into its folder")
    return beside[0]


def _questions_in(folder: Path) -> Path:
    files = sorted(folder.glob("*questions*.json"))
    if not files:
        raise DataError(f"no *questions*.json in {str(folder)!r}; pass OK-VQA's folder, or its file of questions")
    return files[0]


def _split(path: Path) -> str:
    split = re.search(r"(train|val|test)\d{4}", path.name)
    return split.group(0) if split else ""
