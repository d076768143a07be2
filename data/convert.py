"""Data files in other forms: our own lines, and the public forms of edits as far as they can say what a record says.

What a form has no place for is counted, and records that it cannot hold at all are named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import DataError
from .facts import (
    OTHER_PICTURE,
    OTHER_SUBJECT,
    PORTABILITY,
    REPHRASE,
    UNRELATED,
    UNRELATED_TEXT,
    EditRecord,
    Probe,
    Question,
    counted,
    shortened,
)
from .formats.reading import LINES, read_data
from .jsonl import relative_path, write_lines, write_text
from .spans import find_spans

_NATURAL = "nq question: "
"""What MMEdit's and MEND's files write before an unrelated question."""


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What became of the records of a file that was written in another form."""

    path: Path
    """The file that was written."""
    written: int
    """Number of records in it."""
    skipped: tuple[tuple[int, str], ...] = field(repr=False)
    """(row, reason) of each record that could not be read or that the form cannot hold."""
    lost: Mapping[str, int]
    """What the form has no place for -> how many records had it."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {counted(self.written, 'record')} written, {len(self.skipped)} left out"]
        lines += [f"  row {row}: {reason}" for row, reason in self.skipped]
        return "\n".join(
            lines + [f"  lost: {what} ({counted(number, 'record')})" for what, number in self.lost.items()]
        )


def convert_data(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: str = LINES,
    format: str | None = None,
    images: str | PathLike[str] | None = None,
    answers: str | PathLike[str] | None = None,
) -> ConvertReport:
    """Write the records of a data file in another form, the whole file or nothing.

    Args:
        path: the file to read, of any format that `read_data` reads.
        out: the file to write. Pictures inside its folder are named relative to it, others by their absolute paths.
        to: "lines" (our own, nothing is lost), "mmedit" (E-VQA and EasyEdit's multimodal form; with portability
            questions VLKEB's), "counterfact" (ROME's form) or "zsre" (MEND's form). Default "lines".
        format: format of the file that is read, one of FORMATS. Default None: told by the content.
        images: folder of the pictures of the file that is read. Default: its own folder.
        answers: file or folder of OK-VQA answers for questions without any. Default None.

    Returns:
        How many records were written, which were left out and why, and what the form has no place for.

    Raises:
        DataError: if the file cannot be read or written, if there is no such form, or if it can hold no record.

    Example:
        >>> from multrace.data import EditRecord, Question, convert_data, write_lines
        >>> question = Question(text="Ada was born in", constraint="Ada")
        >>> path = write_lines("own.jsonl", [EditRecord(question=question, target="Oslo", old="Lima", group="g")])
        >>> report = convert_data(path, "counterfact.json", to="counterfact")
        >>> report.written, report.lost
        (1, {'group': 1})
    """
    out = Path(out)
    if to not in FORMS:
        raise DataError(f"no form {to!r} that can be written; use one of {', '.join(FORMS)}")
    skipped: list[tuple[int, str]] = []
    lost: Counter[str] = Counter()
    rows: list[Any] = []
    for row, record in read_data(path, format=format, images=images, answers=answers):
        try:
            if isinstance(record, DataError):
                raise record
            if to == LINES:
                rows.append(record)
            else:
                form = _Form(record, out.parent)
                rows.append(_WRITERS[to](form))
                lost.update(form.lost())
        except DataError as error:
            skipped.append((row, str(error)))
    if not rows:
        raise DataError(f"no record of {str(path)!r} can be written as {to}; row {skipped[0][0]}: {skipped[0][1]}")
    if to == LINES:
        write_lines(out, rows)
    else:
        write_text(out, _array(rows))
    return ConvertReport(path=out, written=len(rows), skipped=tuple(skipped), lost=dict(sorted(lost.items())))


class _Form:
    """A record of which a form takes what it has a place for; the rest is lost."""

    def __init__(self, record: Question | EditRecord, folder: Path) -> None:
        if not isinstance(record, EditRecord):
            raise DataError(f"the question {shortened(record.text)} has no target; only lines can hold it")
        self.record, self.question = record, record.question
        self.folder = folder
        self.probes = list(record.probes)
        self.taken = {"target", "id"}
        """Names of what the form has taken, as `lost` names them."""

    def probe(self, kind: str, *, pictures: int, text: str | None = None) -> Probe | None:
        """Take and return the first probe of a kind with so many pictures, of the record's question if it is given."""
        for probe in self.probes:
            question = probe.question
            if probe.kind == kind and len(question.images) == pictures and text in (None, question.text):
                self.probes.remove(probe)
                return probe
        return None

    def every(self, kind: str) -> list[Probe]:
        """Take and return all probes of a kind without pictures."""
        return [probe for probe in iter(lambda: self.probe(kind, pictures=0), None) if probe is not None]

    def picture(self, question: Question) -> str:
        """Return the path of the only picture of a question."""
        if len(question.images) != 1:
            raise DataError(f"{shortened(question.text)} has {len(question.images)} pictures; the form holds one")
        return relative_path(question.images[0], self.folder)

    def need_no_picture(self) -> None:
        """Raise `DataError` if the record shows a picture."""
        if self.question.images:
            raise DataError(f"{shortened(self.question.text)} is about a picture; the form holds texts only")

    def lost(self) -> set[str]:
        """Return what is left, by name."""
        record, question = self.record, self.question
        values = {
            "old": record.old,
            "contexts": record.contexts,
            "rewrite_prompts": record.rewrite_prompts,
            "preserve_prompts": record.preserve_prompts,
            "essence": record.essence,
            "group": record.group,
            "extra": record.extra,
            "question's extra": question.extra,
        }
        values |= {name: getattr(question, name) for name in _QUESTION_PARTS}
        rest = {name for name, value in values.items() if value and name not in self.taken}
        return rest | {f"probes: {probe.kind}" for probe in self.probes}


_QUESTION_PARTS = ("constraint", "spans", "replacement", "answer", "answers", "foil", "boxes", "corrupt", "template")


def _mmedit(form: _Form) -> dict[str, Any]:
    record, question = form.record, form.question
    row = {"src": question.text, "rephrase": question.text, "alt": record.target, "image": form.picture(question)}
    pred = record.extra.get("pred")
    row["pred"] = record.old or (pred if isinstance(pred, str) else "")
    form.taken |= {"old"} | ({"extra"} if record.extra.keys() <= {"pred"} else set())
    if rephrase := form.probe(REPHRASE, pictures=1):
        row["rephrase"] = rephrase.question.text
    if other := form.probe(OTHER_PICTURE, pictures=1, text=question.text):
        row["image_rephrase"] = form.picture(other.question)
    if text := form.probe(UNRELATED_TEXT, pictures=0):
        row |= {"loc": _NATURAL + text.question.text, "loc_ans": text.answer or ""}
    if unrelated := form.probe(UNRELATED, pictures=1):
        row |= {"m_loc": form.picture(unrelated.question), "m_loc_q": unrelated.question.text}
        row["m_loc_a"] = unrelated.answer or ""
    hops = []
    while hop := form.probe(PORTABILITY, pictures=1):
        pair = {"Question": hop.question.text, "Answer": hop.answer}
        hops.append({"port_type": f"{hop.hops or 1}-hop", "Q&A": pair})
    return row | ({"port_new": hops} if hops else {})


def _counterfact(form: _Form) -> dict[str, Any]:
    form.need_no_picture()
    record, question = form.record, form.question
    if question.constraint is None:
        raise DataError(f"{shortened(question.text)} has no constraint; the form needs the subject")
    ((start, end), *more) = find_spans(question.text, question.constraint)
    if more or "{" in question.text[:start] + question.text[end:]:
        raise DataError(f"{shortened(question.text)} says its subject more than once; the form has one slot")
    old = record.old or question.answer
    if old is None:
        raise DataError(f"{shortened(question.text)} has no present answer; the form needs the true object")
    form.taken |= {"constraint", "old", *(("answer",) if question.answer in (None, old) else ())}
    return {
        "case_id": record.id,
        "requested_rewrite": {
            "prompt": f"{question.text[:start]}{{}}{question.text[end:]}",
            "subject": question.text[start:end],
            "target_new": {"str": record.target},
            "target_true": {"str": old},
        },
        "paraphrase_prompts": [probe.question.text for probe in form.every(REPHRASE)],
        "neighborhood_prompts": [probe.question.text for probe in form.every(OTHER_SUBJECT)],
    }


def _zsre(form: _Form) -> dict[str, Any]:
    form.need_no_picture()
    record, question = form.record, form.question
    truths = question.answers or tuple(answer for answer in (record.old or question.answer,) if answer)
    row = {"src": question.text, "alt": record.target, "answers": list(truths), "rephrase": question.text}
    form.taken |= {"old", "answer", "answers"}
    if isinstance(question.constraint, str):
        row["subject"] = question.constraint
        form.taken |= {"constraint"}
    if rephrase := form.probe(REPHRASE, pictures=0):
        row["rephrase"] = rephrase.question.text
    if text := form.probe(UNRELATED_TEXT, pictures=0):
        row |= {"loc": _NATURAL + text.question.text, "loc_ans": text.answer or ""}
    return row


_WRITERS: Mapping[str, Callable[[_Form], dict[str, Any]]] = {
    "mmedit": _mmedit,
    "counterfact": _counterfact,
    "zsre": _zsre,
}
"""Form -> what makes one object of it."""
FORMS = (LINES, *_WRITERS)
"""The forms that can be written."""


def _array(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield the text of a JSON array, one object a line."""
    start = "[\n"
    for row in rows:
        yield start + json.dumps(row, ensure_ascii=False)
        start = ",\n"
    yield "\n]\n"
