"""The doctor of data files: every row is read, its pictures, spans, targets, answers and neighbours are looked at.

Each finding names its row, its kind, how severe it is, and what a fix does about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import DataError, quoted
from .facts import (
    OTHER_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    UNRELATED,
    EditRecord,
    Probe,
    Question,
    Words,
    counted,
    questions_of,
    shortened,
    with_questions,
)
from .formats.okvqa import answers_by_question, join_key
from .formats.reading import LINES, detect_format, read_data
from .formats.rows import DataSource, Row, json_rows, pictures_in, same_name, unanswered
from .jsonl import pictures_of, write_lines
from .pictures import PictureFacts, inspect_picture
from .spans import find_spans, noun_after, verb_within

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
"""An error keeps a row, or a question of it, from being used; a warning says that a number may mislead."""
_LONGEST_QUESTION, _LONGEST_ANSWER = 2000, 1000  # characters
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:image|img|video|pad|unk|bos|eos|mask)>|<(?:start|end)_of_(?:turn|image)>"
    r"|<(?:image|patch)_soft_token>|\[/?(?:INST|IMG|IMG_BREAK|IMG_END|PAD|CLS|SEP|MASK)\]",
    re.IGNORECASE,
)
"""Texts that tokenizers of common models read as one special token."""
_STRAY = " \t,;:"
"""Marks that end no name: a span that ends with one was cut out with it."""
_MARKS = _STRAY + ".!?\"'\u201c\u201d\u2018\u2019"
"""Marks that are tried without, if the question does not say the span with them."""
_CUT_OFF = frozenset(
    "a an the this that these those of in on at by for with from to and or is are was kind type".split()
)
"""Last words of a span that is likely to have been cut off."""
_DROP_ROW, _DROP_ENTRY, _SPANS = "the row is left out", "the question is left out", "the span is cleaned"


@dataclass(frozen=True, kw_only=True)
class FindingKind:
    """What can be found about a row."""

    severity: str
    """One of SEVERITIES."""
    title: str
    fix: str = ""
    """What a fix does; empty if a person has to decide."""


FINDINGS: Mapping[str, FindingKind] = {
    "unreadable_row": FindingKind(severity=ERROR, title="the row cannot be read", fix=_DROP_ROW),
    "picture_missing": FindingKind(severity=ERROR, title="no picture at the path", fix=_DROP_ENTRY),
    "picture_unusable": FindingKind(severity=ERROR, title="a picture cannot be used", fix=_DROP_ENTRY),
    "span_absent": FindingKind(severity=ERROR, title="a span is not in the question"),
    "span_repeated": FindingKind(severity=ERROR, title="a span is in the question more than once"),
    "special_token": FindingKind(severity=ERROR, title="a text holds a special token"),
    "contradiction": FindingKind(severity=ERROR, title="another row gives the same question another target"),
    "needs_unknown": FindingKind(severity=ERROR, title="a probe needs a record that is not there"),
    "keeps_the_edit": FindingKind(
        severity=ERROR, title="a question whose answer should stay is the edited one", fix=_DROP_ENTRY
    ),
    "unanswered": FindingKind(severity=WARNING, title="a question, its answer or its picture is missing"),
    "target_is_old": FindingKind(severity=WARNING, title="the target is the present answer"),
    "rephrase_is_source": FindingKind(severity=WARNING, title="a rephrase is the question itself", fix=_DROP_ENTRY),
    "answer_not_annotated": FindingKind(severity=WARNING, title="an answer is none of the annotators'"),
    "answer_is_pictured": FindingKind(severity=WARNING, title="the answer is the name of the pictured thing"),
    "other_answer": FindingKind(severity=WARNING, title="another row gives the same question another answer"),
    "duplicate": FindingKind(severity=WARNING, title="the row repeats another one", fix=_DROP_ROW),
    "box_outside": FindingKind(severity=WARNING, title="a box leaves the picture", fix="the box is cut to the picture"),
    "span_cut_off": FindingKind(severity=WARNING, title="a span seems to be cut off"),
    "span_too_long": FindingKind(severity=WARNING, title="a span seems to hold a verb of the question"),
    "text_long": FindingKind(severity=WARNING, title="a text is very long"),
    "picture_of_several": FindingKind(severity=WARNING, title="the row names a folder with several pictures"),
    "span_spelling": FindingKind(
        severity=NOTE, title="a span is not spelt as in the question, or ends with a mark", fix=_SPANS
    ),
    "span_unfinished": FindingKind(severity=NOTE, title="a constraint seems to end before its noun"),
    "not_annotators_choice": FindingKind(severity=NOTE, title="an answer is not the one of most annotators"),
    "no_question_mark": FindingKind(severity=NOTE, title="a question about a picture does not end with a mark"),
    "picture_turned": FindingKind(severity=NOTE, title="a picture is turned by its EXIF data"),
    "picture_transparent": FindingKind(severity=NOTE, title="a picture is transparent; it is shown on white"),
    "picture_sixteen_bit": FindingKind(severity=NOTE, title="a picture has 16 bits; it is scaled to 8"),
    "picture_animated": FindingKind(severity=NOTE, title="a picture has several frames; the first one is shown"),
    "picture_cmyk": FindingKind(severity=NOTE, title="a picture is made for print (CMYK); its colours may shift"),
}
"""Kinds of findings by name, the severe ones first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found about one row."""

    row: int
    """Number of the row or line, from 1."""
    kind: str
    """One of FINDINGS."""
    message: str
    place: tuple[str, int] | None = None
    """List and index of the question of an edit that it is about; None for the record's own."""
    id: str = ""
    """Id of the record."""
    fix: str = ""
    """What a fix does about it; empty if a person has to decide."""

    @property
    def severity(self) -> str:
        """How severe it is, one of SEVERITIES."""
        return FINDINGS[self.kind].severity

    def __str__(self) -> str:
        place = "" if self.place is None else f", {self.place[0]} {self.place[1] + 1}"
        return f"row {self.row}{place}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the doctor found in a file."""

    path: str
    format: str
    rows: int
    """Number of records and unreadable rows."""
    findings: tuple[Finding, ...] = field(repr=False)
    written: int | None = None
    """Number of records in the cleaned file, which is not written if none is left; None if none was asked for."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind of finding -> how many, in the order of FINDINGS."""
        numbers = Counter(finding.kind for finding in self.findings)
        return {kind: numbers[kind] for kind in FINDINGS if kind in numbers}

    @property
    def remaining_errors(self) -> tuple[Finding, ...]:
        """The errors; of a cleaned file, those that it still has."""
        errors = (finding for finding in self.findings if finding.severity == ERROR)
        return tuple(finding for finding in errors if not self.written or not finding.fix)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        own = {"path": self.path, "format": self.format, "rows": self.rows, "written": self.written}
        findings = [asdict(finding) | {"severity": finding.severity} for finding in self.findings]
        return own | {"counts": dict(self.counts), "findings": findings}

    def __str__(self) -> str:
        return f"{self.path} ({self.format}): {counted(self.rows, 'row')}, {counted(len(self.findings), 'finding')}"


def check_data(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    images: str | PathLike[str] | None = None,
    answers: str | PathLike[str] | None = None,
    pictures: bool = True,
    fix: str | PathLike[str] | None = None,
) -> CheckReport:
    """Return what is wrong, doubtful or notable in a data file, row by row, and write a cleaned file if asked to.

    Args:
        path: the file, of any format that `read_data` reads.
        format: one of FORMATS. Default None: told by the content.
        images: the folder of the pictures. Default: the file's own folder.
        answers: a file or folder of OK-VQA; its annotators' answers are compared with those of questions about the same
            pictures. Default None: only with the answers that the file itself has.
        pictures: read the header of each picture. Default True.
        fix: a file of our own lines to write: without unreadable rows, duplicates, questions whose pictures cannot
            be used, and rephrases that repeat the question; with cleaned spans and boxes. Default None: nothing is
            written.

    Returns:
        The findings in the order of the rows.

    Raises:
        DataError: if the file as a whole cannot be read, or the cleaned file cannot be written.

    Example:
        >>> from multrace.data import Question, check_data, read_records, write_lines
        >>> path = write_lines("cars.jsonl", [Question(text="Is the car red?", constraint="the car,")])
        >>> report = check_data(path, fix="clean.jsonl")
        >>> print(report.findings[0])
        row 1: 'the car,' is 'the car' in the question 'Is the car red?'
        >>> read_records("clean.jsonl")[0].constraint
        'the car'
    """
    doctor = _Doctor(pictures=pictures, answers={} if answers is None else answers_by_question(Path(answers)))
    rows = 0
    cleaned: list[Question | EditRecord] = []
    name = format or detect_format(path)
    for row, outcome in read_data(path, format=name, images=images, answers=answers):
        rows += 1
        if isinstance(outcome, DataError):
            message = str(outcome).removeprefix(f"line {row} of {str(path)!r}: ").removeprefix(f"{path}, line {row}: ")
            doctor.add(row, "unreadable_row", message)
            continue
        record = doctor.examine(row, outcome)
        if fix is not None and record is not None:
            cleaned.append(record)
    if name not in (LINES, "okvqa") and Path(path).suffix.lower() != ".csv" and Path(path).is_file():
        doctor.pairs(json_rows(DataSource(path=Path(path))))
    doctor.finish()
    if fix is not None and cleaned:
        write_lines(fix, doctor.with_present_needs(cleaned))
    return CheckReport(
        path=str(path),
        format=name,
        rows=rows,
        findings=tuple(doctor.findings),
        written=None if fix is None else len(cleaned),
    )


class _Doctor:
    """Looks at one record after the other, and remembers what it needs for comparisons between rows."""

    def __init__(self, *, pictures: bool, answers: Mapping[tuple[str, str], tuple[str, ...]]) -> None:
        self.findings: list[Finding] = []
        self.looks_at_pictures = pictures
        self.answers = answers
        self.pictures: dict[Path, PictureFacts] = {}
        self.seen: dict[tuple[Any, ...], tuple[int, str, str]] = {}
        """Question and pictures -> (row, target or answer, id)."""
        self.repeated: dict[str, str] = {}
        """Id of a record that repeats an earlier one -> id of the earlier one."""
        self.ids: set[str] = set()
        self.needs: list[tuple[int, str, tuple[str, int], str]] = []
        self._row, self._id = 0, ""
        self._noted: set[Path] = set()
        """Pictures about which something was noted in the present row."""

    def add(
        self, row: int, kind: str, message: str, place: tuple[str, int] | None = None, fix: str | None = None
    ) -> None:
        """Note a finding; `fix` if what a fix does is not what it does about this kind elsewhere."""
        fix = FINDINGS[kind].fix if fix is None else fix
        self.findings.append(Finding(row=row, kind=kind, message=message, place=place, id=self._id, fix=fix))

    def examine(self, row: int, record: Question | EditRecord) -> Question | EditRecord | None:
        """Note the findings of a record, and return it cleaned; None if it is to be left out."""
        start = len(self.findings)
        self._row, self._id = row, record.id
        self._noted = set()
        self.ids.add(record.id)
        cleaned: dict[tuple[str, int] | None, Question] = {}
        for place, question in questions_of(record):
            cleaned[place] = self._question(place, question)
        if isinstance(record, EditRecord):
            self._edit(record)
        else:
            self._annotated(None, record, record.answer)
            self._pictured(record)
            if record.image is not None and not record.text.endswith(("?", "\uff1f")):
                self.add(row, "no_question_mark", f"{shortened(record.text)} does not end with a question mark")
        self._compare(record)
        self._id = ""
        found = self.findings[start:]
        if any(finding.fix == _DROP_ROW for finding in found):
            return None
        dropped = {finding.place for finding in found if finding.fix == _DROP_ENTRY}
        return with_questions(record, {place: each for place, each in cleaned.items() if place not in dropped})

    def pairs(self, rows: Iterable[tuple[int, Row | DataError]]) -> None:
        """Note the questions without an answer in the rows of a public file, which their reader leaves out."""
        for number, row in rows:
            if isinstance(row, DataError):
                continue
            with suppress(DataError):  # such a row is unreadable, which has been noted
                for message in unanswered(row):
                    self.add(number, "unanswered", message)

    def finish(self) -> None:
        """Note what only the whole file shows."""
        for row, id, place, needed in self.needs:
            if needed not in self.ids:
                self._id = id
                self.add(row, "needs_unknown", f"no record has the id {needed!r}", place)
        self.findings.sort(key=lambda finding: finding.row)

    def with_present_needs(self, records: Iterable[Question | EditRecord]) -> Iterator[Question | EditRecord]:
        """Yield the cleaned records with probes that need no record that was left out.

        Where that record repeated an earlier one, the probe needs the earlier one; other such probes are left out.
        """
        records = list(records)
        left = self.ids - {record.id for record in records}
        for record in records:
            if not isinstance(record, EditRecord) or left.isdisjoint(
                id for probe in record.probes for id in probe.needs
            ):
                yield record
                continue
            probes = (
                replace(probe, needs=tuple(self.repeated.get(id, id) if id in left else id for id in probe.needs))
                for probe in record.probes
            )
            yield replace(record, probes=tuple(probe for probe in probes if left.isdisjoint(probe.needs)))

    # ---- one question ----

    def _question(self, place: tuple[str, int] | None, question: Question) -> Question:
        self._texts(place, {"question": question.text, "answer": question.answer, "foil": question.foil})
        question = self._spans(place, question)
        self._noun(place, question)
        if not self.looks_at_pictures:
            return question
        sizes = [self._picture(place, image) for image in question.images if isinstance(image, Path)]
        for image in pictures_of(question.corrupt):
            self._picture(place, image)
        self._several(place, question)
        return self._boxes(place, question, sizes[0] if len(sizes) == 1 else None)

    def _texts(self, place: tuple[str, int] | None, texts: Mapping[str, str | None]) -> None:
        for name, text in texts.items():
            if text is None:
                continue
            longest = _LONGEST_QUESTION if name == "question" else _LONGEST_ANSWER
            if len(text) > longest:
                self.add(self._row, "text_long", f"the {name} has {len(text)} characters", place)
            if special := _SPECIAL.search(text):
                message = f"the {name} {shortened(text)} holds {special[0]!r}, which models read as one special token"
                self.add(self._row, "special_token", message, place)

    def _spans(self, place: tuple[str, int] | None, question: Question) -> Question:
        words = {name: self._span(place, question, words) for name, words in question.words.items()}
        if words == question.words:
            return question
        return replace(
            question,
            constraint=None if question.constraint is None else words["constraint"],
            spans={name: words[name] for name in question.spans},
        )

    def _span(self, place: tuple[str, int] | None, question: Question, words: Words) -> Words:
        """Note what is wrong with a span, and return it as the question spells it."""
        text = question.text
        said = words if isinstance(words, str) else words[0]
        problem = None
        for spelling in dict.fromkeys((said.strip(_STRAY), said.strip(_MARKS))):
            try:
                spans = find_spans(text, spelling if isinstance(words, str) else (spelling, words[1]))
            except DataError as error:
                problem = problem or error
                continue
            start, end = spans[0]
            spelt = text[start:end]
            if spelt != said:
                self.add(self._row, "span_spelling", f"{said!r} is {spelt!r} in the question {shortened(text)}", place)
            if question.images and (verb := verb_within(spelt)):
                message = f"the span {said!r} holds the verb {verb!r} of the question; should it end before it?"
                self.add(self._row, "span_too_long", message, place)
            elif len(said.split()) > 1 and said.split()[-1].casefold() in _CUT_OFF:
                message = f"the span {said!r} ends with {said.split()[-1]!r}; is it whole?"
                self.add(self._row, "span_cut_off", message, place)
            return spelt if isinstance(words, str) else (spelt, words[1])
        is_said = str(problem).startswith("the question ")  # which says it several times
        self.add(self._row, "span_repeated" if is_said else "span_absent", str(problem), place)
        return words

    def _noun(self, place: tuple[str, int] | None, question: Question) -> None:
        """Note a constraint of a question about a picture after which the noun seems to come."""
        if question.constraint is None or not question.images:
            return
        with suppress(DataError):  # a constraint that is not there has been noted
            start, end = find_spans(question.text, question.constraint)[0]
            if noun := noun_after(question.text, end):
                span = question.text[start:end]
                message = f"the constraint {span!r} goes on with {noun!r} in {shortened(question.text)}; is it whole?"
                self.add(self._row, "span_unfinished", message, place)

    # ---- pictures ----

    def _picture(self, place: tuple[str, int] | None, path: Path) -> tuple[int, int] | None:
        """Note what is wrong with a picture, and return its width and height if they are known.

        What a row's picture is like is noted once for the row, although its rephrases show the picture too. A picture
        that only probes show and that cannot be used is noted for each of them, since each is left out by itself.
        """
        facts = self.pictures.get(path)
        if facts is None:
            facts = self.pictures[path] = inspect_picture(path)
        is_noted = path in self._noted
        if facts.problem is not None:
            if is_noted:
                return None
            self._noted |= {path} if place is None else set()
            kind = "picture_missing" if facts.problem.startswith("no picture at") else "picture_unusable"
            self.add(self._row, kind, facts.problem, place, _DROP_ROW if place is None else _DROP_ENTRY)
            return None
        self._noted.add(path)
        notes = {
            "turned": facts.turned,
            "transparent": facts.transparent,
            "sixteen_bit": facts.sixteen_bit,
            "animated": facts.frames > 1,
            "cmyk": facts.mode == "CMYK",
        }
        for name, is_so in notes.items():
            if is_so and not is_noted:
                self.add(self._row, f"picture_{name}", f"{str(path)!r} ({facts.format}, {facts.mode})", place)
        return facts.size

    def _several(self, place: tuple[str, int] | None, question: Question) -> None:
        """Note a picture that was taken from a folder of candidates."""
        named = question.extra.get("image_url")
        if not isinstance(named, str) or not isinstance(question.image, Path):
            return
        folder = question.image.parent
        if same_name(folder.name, Path(named).name) and len(candidates := pictures_in(folder)) > 1:
            taken = f"{question.image.name!r}, the first one, is taken"
            self.add(self._row, "picture_of_several", f"{str(folder)!r} has {len(candidates)} pictures; {taken}", place)

    def _boxes(self, place: tuple[str, int] | None, question: Question, size: tuple[int, int] | None) -> Question:
        if size is None or not question.boxes:
            return question
        width, height = size
        boxes = []
        for box in question.boxes:
            left, top, right, bottom = box
            if right <= width and bottom <= height:
                boxes.append(box)
                continue
            self.add(self._row, "box_outside", f"the box {list(box)} leaves the picture of {width} x {height}", place)
            if left < width and top < height:
                boxes.append((left, top, min(right, width), min(bottom, height)))
        return replace(question, boxes=tuple(boxes))

    # ---- edits and answers ----

    def _edit(self, record: EditRecord) -> None:
        self._texts(None, {"target": record.target})
        pred = record.extra.get("pred")
        present = {"present answer": [record.old], "answer called 'pred'": pred if isinstance(pred, list) else [pred]}
        for name, texts in present.items():
            plain = {_plain(text.replace("_", " ")) for text in texts if isinstance(text, str)}
            if _plain(record.target) in plain:
                self.add(self._row, "target_is_old", f"the target {shortened(record.target)} is the {name}")
        for index, question in enumerate(record.preserve_prompts):
            self._stays(record, ("preserve_prompts", index), question)
        for index, probe in enumerate(record.probes):
            self._probe(record, ("probes", index), probe)

    def _probe(self, record: EditRecord, place: tuple[str, int], probe: Probe) -> None:
        self._texts(place, {"answer": probe.answer})
        is_rephrase = probe.kind in (REPHRASE, REPHRASE_OTHER_PICTURE)
        if is_rephrase and _plain(probe.question.text) == _plain(record.question.text):
            fix = _DROP_ENTRY if probe.kind == REPHRASE else ""
            message = f"the {probe.kind} probe repeats the question {shortened(record.question.text)}"
            self.add(self._row, "rephrase_is_source", message, place, fix)
        elif probe.kind == OTHER_PICTURE and _is_same(probe.question, record.question):
            message = f"the {probe.kind} probe shows the picture of the edit with its question"
            self.add(self._row, "rephrase_is_source", message, place)
        if probe.stays:
            self._stays(record, place, probe.question)
        if probe.stays or probe.kind == UNRELATED:
            self._annotated(place, probe.question, probe.answer)
        self.needs += [(self._row, record.id, place, needed) for needed in probe.needs]

    def _stays(self, record: EditRecord, place: tuple[str, int], question: Question) -> None:
        """Note a question whose answer should stay although it is the edited question with its picture."""
        if _is_same(question, record.question):
            message = f"the answer to {shortened(question.text)} should stay, but the edit changes it"
            self.add(self._row, "keeps_the_edit", message, place)

    def _annotated(self, place: tuple[str, int] | None, question: Question, answer: str | None) -> None:
        """Compare an answer with those of the annotators."""
        known = question.answers
        if not known and len(question.images) == 1 and isinstance(question.image, Path):
            known = self.answers.get(join_key(question.text, str(question.image)), ())
        if answer is None or not known:
            return
        numbers = Counter(map(_plain, known))
        if _plain(answer) not in numbers:
            said = ", ".join(map(repr, dict.fromkeys(known)))
            message = f"the answer {shortened(answer)} to {shortened(question.text)} is none of {said[:200]}"
            self.add(self._row, "answer_not_annotated", message, place)
        elif numbers[_plain(answer)] < max(numbers.values()):
            most, count = numbers.most_common(1)[0]
            message = f"{numbers[_plain(answer)]} of {len(known)} said {shortened(answer)}, {count} said {most!r}"
            self.add(self._row, "not_annotators_choice", message, place)

    def _pictured(self, record: Question) -> None:
        """Note an answer that is also the name of the folder of the pictures of the question."""
        named = record.extra.get("image_url")
        if record.answer and isinstance(named, str) and same_name(named.split("A photo of ")[-1], record.answer):
            message = f"the answer {shortened(record.answer)} names the pictured thing; is it the answer?"
            self.add(self._row, "answer_is_pictured", message)

    def _compare(self, record: Question | EditRecord) -> None:
        """Compare the record with the earlier rows."""
        is_edit = isinstance(record, EditRecord)
        question = record.question if is_edit else record
        said = (record.target if is_edit else record.answer) or ""
        pictures = tuple(str(image) if isinstance(image, Path) else id(image) for image in question.images)
        key = (is_edit, _plain(question.text), pictures, "" if is_edit else repr(question.words))
        row, before, earlier = self.seen.setdefault(key, (self._row, said, record.id))
        if row == self._row:
            return
        if _plain(before) == _plain(said):
            self.repeated[record.id] = earlier
            self.add(self._row, "duplicate", f"row {row} asks the same question with the same answer")
        else:
            kind, noun = ("contradiction", "target") if is_edit else ("other_answer", "answer")
            text = shortened(question.text)
            self.add(self._row, kind, f"the {noun} of {text} is {quoted(said)} here and {quoted(before)} in row {row}")


def _is_same(one: Question, other: Question) -> bool:
    """Return whether two questions have the same words and pictures."""
    return _plain(one.text) == _plain(other.text) and one.images == other.images


def _plain(text: str) -> str:
    """Return the words of a text in lower case, without marks and articles, for comparisons."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or text.strip()
