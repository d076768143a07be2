"""Reader of zsRE in MEND's form (arXiv 2110.11309): textual questions about a subject, with an unrelated question."""

from collections.abc import Iterator

from ..facts import REPHRASE, EditRecord, Probe, Question
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    lists_of,
    new_question,
    occurrences,
    rest_of,
    text_of,
    text_or_none,
    texts_of,
    unrelated_texts,
)

_KNOWN = ("subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans", "portability")


def read_zsre(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of a file, and a `DataError` for each unreadable row. `pred` and `cond` stay in `extra`."""
    return each_row(json_rows(source), lambda number, row: [_record(row, str(number))])


def _record(row: Row, id: str) -> EditRecord:
    text, subject, truths = text_of(row, "src"), text_or_none(row, "subject"), texts_of(row, "answers")
    rephrases = (Question(text=each, constraint=_constraint(each, subject)) for each in texts_of(row, "rephrase"))
    return EditRecord(
        id=id,
        question=Question(
            text=text,
            id=id,
            constraint=_constraint(text, subject),
            answer=truths[0] if truths else None,
            answers=truths[1:] and truths,
        ),
        target=text_of(row, "alt"),
        old=truths[0] if truths else None,
        probes=(
            *(Probe(kind=REPHRASE, question=rephrase) for rephrase in rephrases),
            *unrelated_texts(row),
            *new_question(row),
        ),
        extra=rest_of(row, *_KNOWN)
        | ({} if subject is None else {"subject": subject})
        | lists_of(row, "src", "alt", "subject"),
    )


def _constraint(text: str, subject: str | None) -> str | None:
    """The subject where the question says it once."""
    return subject if subject is not None and len(occurrences(text, subject)) == 1 else None
