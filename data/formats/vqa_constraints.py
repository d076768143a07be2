"""Reader of VQA-Constraints (arXiv 2406.04236): three CSV files of questions with the span of their visual constraint.

Published spans are cut out with trailing commas, and some end too early. The reader strips blanks and punctuation from
their ends; what the file says stays in `extra`. A cell of two lines names two constraints: the first is the record's,
the second is the span "constraint2". The files have no answers: a film's director is taken for one, those of OK-VQA are
joined from its own files (`answers`). In two of the files `image_url` names a folder of candidate pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import DataError
from ..facts import Question
from .okvqa import answers_by_question, join_key
from .rows import DataSource, Outcome, Row, csv_rows, each_row, json_rows, rest_of, text_of, text_or_none

_NEEDED = ("question", "main_entity", "image_url")


def read_vqa_constraints(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the questions of a file with their line numbers, and a `DataError` for each unreadable row."""
    answers = {} if source.answers is None else answers_by_question(source.answers)

    def read(number: int, row: Row) -> list[Question]:
        question = _question(source, row, number)
        joined = answers.get(join_key(question.text, text_of(row, "image_url")), ())
        if not joined:
            return [question]
        return [replace(question, answer=max(joined, key=joined.count), answers=joined)]

    return each_row(_rows(source), read)


def _rows(source: DataSource) -> Iterator[tuple[int, Row | DataError]]:
    if source.path.suffix.lower() != ".csv":
        yield from json_rows(source)
        return
    lines = csv_rows(source.path)
    _, header = next(lines, (1, []))
    if isinstance(header, DataError):
        raise header
    header = [name.strip() for name in header]
    if missing := [name for name in _NEEDED if name not in header]:
        raise DataError(
            f"no column {', '.join(map(repr, missing))} in the header of {str(source.path)!r} "
            f"(found {', '.join(header)[:200]!r}); pass a file as published"
        )
    for line, cells in lines:
        if isinstance(cells, DataError):
            yield line, cells
        elif len(cells) != len(header):
            yield line, DataError(f"{len(cells)} cells instead of {len(header)}; is a comma or quotation mark missing?")
        else:
            yield line, {name: "" if cell == "nan" else cell for name, cell in zip(header, cells, strict=True)}


def _question(source: DataSource, row: Row, number: int) -> Question:
    lines = (text_or_none(row, "main_entity") or "").splitlines()
    first, *others = [span for line in lines if (span := line.strip(' \t,.;:!?"'))] or [None]
    director = text_or_none(row, "director")
    return Question(
        id=text_or_none(row, "") or str(number),
        text=text_of(row, "question"),
        image=source.picture(text_of(row, "image_url")),
        constraint=first,
        spans={f"constraint{number}": span for number, span in enumerate(others, start=2) if span is not None},
        answer=director,
        extra=rest_of(row, "", "question", "director"),
    )
