"""Reader of CounterFact (arXiv 2202.05262) in ROME's form and in EasyEdit's, and of EasyEdit's files of the same shape.

The prompts are beginnings of sentences about a subject, without a picture. The subject is the constraint; where the
prompt repeats it, the occurrence in the prompt's slot is meant. The true object is the present answer.
"""

from collections.abc import Iterator

from ..errors import DataError, quoted
from ..facts import OTHER_SUBJECT, PORTABILITY, REPHRASE, EditRecord, Probe, Question, Words
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    lists_of,
    new_question,
    object_of,
    occurrences,
    paired,
    probe_with,
    rest_of,
    text_of,
    text_or_none,
    texts_of,
)

_EASYEDIT = (
    *("case_id", "prompt", "src", "subject", "target_new", "alt", "ground_truth", "rephrase_prompt", "rephrase"),
    *("locality_prompt", "locality_ground_truth", "portability", "locality"),
)
_ROME = ("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "portability")


def read_counterfact(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of a file, and a `DataError` for each unreadable row."""
    return each_row(
        json_rows(source),
        lambda number, row: [(_rome if "requested_rewrite" in row else easyedit)(row, str(number))],
    )


def _rome(row: Row, number: str) -> EditRecord:
    rewrite = object_of(row, "requested_rewrite") or {}
    prompt, subject = text_of(rewrite, "prompt"), text_of(rewrite, "subject")
    if prompt.count("{}") != 1:
        raise DataError(
            f"the prompt {quoted(prompt)} has {prompt.count('{}')} slots; it should have {{}} for the subject"
        )
    before = prompt.split("{}")[0]
    text = prompt.replace("{}", subject)
    true, new = (_object(rewrite, name) for name in ("target_true", "target_new"))
    if new is None:
        raise DataError("'target_new' has no text, neither itself nor under 'str'; fill it in or drop the row")
    id = text_or_none(row, "case_id") or number
    neighbours = texts_of(row, "neighborhood_prompts")
    return EditRecord(
        id=id,
        question=Question(text=text, id=id, constraint=_subject(text, subject, before), answer=true),
        target=new,
        old=true,
        probes=(
            *(_about(REPHRASE, text, subject) for text in texts_of(row, "paraphrase_prompts")),
            *(Probe(kind=OTHER_SUBJECT, question=Question(text=text), answer=true) for text in neighbours),
            *new_question(row),
        ),
        extra=rest_of(row, *_ROME) | rest_of(rewrite, "prompt", "subject", "target_new", "target_true"),
    )


def easyedit(row: Row, number: str) -> EditRecord:
    """Return the edit of one object in EasyEdit's form for textual edits."""
    text, subject = text_of(row, "prompt", "src"), text_or_none(row, "subject")
    truths = texts_of(row, "ground_truth")
    id = text_or_none(row, "case_id") or number
    return EditRecord(
        id=id,
        question=Question(
            text=text,
            id=id,
            constraint=None if subject is None else _subject(text, subject),
            answer=truths[0] if truths else None,
            answers=truths[1:] and truths,
        ),
        target=text_of(row, "target_new", "alt"),
        old=truths[0] if truths else None,
        probes=(
            *(_about(REPHRASE, wording, subject) for wording in texts_of(row, "rephrase_prompt", "rephrase")),
            *(
                probe_with(OTHER_SUBJECT, other, answers)
                for other, answers in paired(row, "locality_prompt", "locality_ground_truth")
            ),
            *_nested(row, "portability", PORTABILITY),
            *_nested(row, "locality", OTHER_SUBJECT),
        ),
        extra=rest_of(row, *_EASYEDIT) | lists_of(row, "prompt", "src", "subject", "target_new", "alt"),
    )


def _nested(row: Row, name: str, kind: str) -> Iterator[Probe]:
    """Probes of {"Reasoning": [{"prompt", "ground_truth"}]}, {"neighborhood": {"prompt", "ground_truth"}} or
    {"New Question", "New Answer"}.
    """
    groups = row.get(name) or {}
    if not isinstance(groups, dict):
        raise DataError(f"{name!r} is of type {type(groups).__name__}; it should be an object of lists")
    if name == "portability" and "New Question" in groups:
        yield from new_question(row)
        return
    for entries in groups.values():
        for entry in entries if isinstance(entries, list) else [entries or {}]:
            if not isinstance(entry, dict):
                raise DataError(f"an entry of {name!r} is of type {type(entry).__name__}; it should be an object")
            for text, answers in paired(entry, "prompt", "ground_truth"):
                yield probe_with(kind, text, answers)


def _about(kind: str, text: str, subject: str | None) -> Probe:
    """A probe about the same subject, which is the constraint where the question says it."""
    is_said = subject is not None and occurrences(text, subject)
    return Probe(kind=kind, question=Question(text=text, constraint=_subject(text, subject) if is_said else None))


def _subject(text: str, subject: str, before: str = "") -> Words:
    """The subject, with the number of its occurrence where the question repeats it."""
    if len(occurrences(text, subject)) < 2:
        return subject
    return subject, len(occurrences(before, subject))


def _object(rewrite: Row, name: str) -> str | None:
    """The object of the fact under this key, a text or an object with "str"; None if there is none."""
    if isinstance(rewrite.get(name), str):
        return text_or_none(rewrite, name)
    return text_or_none(object_of(rewrite, name) or {}, "str")
