"""A file of edits, one JSON object per line: each fact to write, what goes with it, and what is asked about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import EditRecord, Probe, Question
from ..data.errors import DataError
from ..data.facts import KINDS, PORTABILITY, PROBE_KINDS
from ..data.spans import find_span, says_once
from ..editing import EditError
from ..models import ModelError, open_images
from ..models.errors import gist
from .errors import CommandError
from .json_lines import read_lines, read_object, read_texts

_OWN = ("id", "image", "question", "constraint", "target", "old")
_NEEDED = ("id", "image", "question", "target")
_LISTS = {"contexts": "contexts", "also": "rewrite_prompts", "keep": "preserve_prompts", "essence": "essence"}
"""List of a record -> field of `EditRequest`."""
_NESTED = ("image", "question", "constraint")
_PROBE = ("kind", *_NESTED, "answer", "hops")
_ERRORS = (CommandError, DataError, EditError, ModelError, OSError)


@dataclass(frozen=True, kw_only=True)
class Words:
    """A question as it stands in a file."""

    image: Path | None
    question: str
    constraint: str | None

    def check(self) -> None:
        """Raises `ModelError` for a picture that cannot be read, or a constraint that is not in the question."""
        open_images(self.image)
        if self.constraint is not None:
            find_span(self.question, self.constraint)

    def plain(self, answer: str | None = None) -> Question:
        """Return the question as a plain value."""
        return Question(text=self.question, image=self.image, constraint=self.constraint, answer=answer)


@dataclass(frozen=True, kw_only=True)
class ProbeWords:
    """A probe as it stands in a file."""

    kind: str
    words: Words
    answer: str | None
    hops: int | None


@dataclass(frozen=True, kw_only=True)
class EditEntry:
    """One line of the file, as far as it is known without a model."""

    line: int
    name: str
    words: Words
    target: str
    old: str | None
    others: dict[str, tuple[Words, ...]]
    """Contexts, also, keep and essence."""
    probes: tuple[ProbeWords, ...]

    def check(self) -> None:
        """Raises `ModelError` or `EditError` for what no model could use."""
        nested = [words for each in self.others.values() for words in each]
        for words in (self.words, *nested, *(probe.words for probe in self.probes)):
            words.check()
        if not self.target.strip():
            raise EditError("'target' is empty; write the new answer")

    def record(self) -> EditRecord:
        """Return the request and its probes as plain values."""
        others = {_LISTS[name]: tuple(words.plain() for words in each) for name, each in self.others.items()}
        probes = tuple(
            Probe(kind=each.kind, question=each.words.plain(), answer=each.answer, hops=each.hops)
            for each in self.probes
        )
        question = self.words.plain()
        return EditRecord(question=question, target=self.target, old=self.old, probes=probes, id=self.name, **others)


def read_edit_records(path: Path) -> tuple[EditEntry, ...]:
    """Return every line of the file; all are checked, including their pictures. Needs no model.

    CommandError for a file that is missing or empty, and for the first line that is wrong, which says how many others
    are.
    """
    lines = read_lines(path, "edit records")
    entries: list[EditEntry] = []
    problems: list[str] = []
    for number, text in lines:
        try:
            entry = _entry(number, text, path.parent)
            entry.check()
            _check_name(entry, entries)
            entries.append(entry)
        except _ERRORS as error:
            problems.append(f"line {number} of {str(path)!r}: {gist(error)}")
    if problems:
        more = f" ({len(problems) - 1} more of {len(lines)} lines are wrong)" if len(problems) > 1 else ""
        raise CommandError(problems[0] + more)
    return tuple(entries)


def read_general(path: Path) -> tuple[tuple[Words, str], ...]:
    """Return held-out questions and answers: image, question and answer per line. Errors as `read_edit_records`."""
    found = []
    for number, text in read_lines(path, "held-out questions"):
        try:
            row = read_object(text, ("image", "question", "answer"))
            _need(row, ("question", "answer"))
            said = read_texts(row, ("image", "question", "answer"))
            words = Words(image=_path(said, path.parent), question=said["question"], constraint=None)
            words.check()
            found.append((words, said["answer"]))
        except _ERRORS as error:
            raise CommandError(f"line {number} of {str(path)!r}: {gist(error)}") from error
    return tuple(found)


def _entry(line: int, text: bytes, folder: Path) -> EditEntry:
    row = read_object(text, (*_OWN, *_LISTS, "probes"))
    _need(row, _NEEDED)
    row["id"] = str(row["id"]) if isinstance(row["id"], int) else row["id"]
    said = read_texts(row, _OWN)
    own = Words(image=_path(said, folder), question=said["question"], constraint=said.get("constraint"))
    return EditEntry(
        line=line,
        name=said["id"],
        words=own,
        target=said["target"],
        old=said.get("old"),
        others={name: tuple(_nested(each, own, folder, _NESTED) for each in _rows(row, name)) for name in _LISTS},
        probes=tuple(_probe(each, own, folder) for each in _rows(row, "probes")),
    )


def _need(row: dict[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in row or (row[name] is None and name != "image")]
    if missing:
        found = ", ".join(map(repr, row)) or "nothing"
        hint = "; null for a question without a picture" if missing[0] == "image" else ""
        raise CommandError(f"no {missing[0]!r} (found {found}); add {', '.join(map(repr, missing))}{hint}")


def _rows(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The objects in the list of this name, if there is one."""
    rows = row.get(name) or []
    if not isinstance(rows, list) or not all(isinstance(each, dict) for each in rows):
        raise CommandError(f"{name!r} is no list of objects; write [{{...}}, ...]")
    yield from rows


def _nested(row: dict[str, Any], own: Words, folder: Path, known: Sequence[str]) -> Words:
    """The words of an entry, completed from its record's."""
    if unknown := [key for key in row if key not in known]:
        raise CommandError(f"an entry has {unknown[0]!r}; it may have {', '.join(map(repr, known))}")
    if not row.keys() & {"image", "question"}:
        raise CommandError(f"an entry names neither 'image' nor 'question' (found {[*row]}); write at least one")
    said = read_texts({"question": own.question} | row, ("question", "image", "constraint"))
    image = _path(said, folder) if "image" in row else own.image
    constraint = said.get("constraint")
    if constraint is None and own.constraint is not None and says_once(said["question"], own.constraint):
        constraint = own.constraint
    return Words(image=image, question=said["question"], constraint=constraint)


def _probe(row: dict[str, Any], own: Words, folder: Path) -> ProbeWords:
    kind, answer, hops = (row.get(name) for name in ("kind", "answer", "hops"))
    if kind not in PROBE_KINDS:
        kinds = "; ".join(f"{name} ({KINDS[name][1]})" for name in PROBE_KINDS)
        raise CommandError(f"a probe has the kind {kind!r} (found {[*row]}); write one of: {kinds}")
    if answer is not None and not isinstance(answer, str):
        raise CommandError(f"the 'answer' of a {kind} probe is of type {type(answer).__name__}; write a string")
    if hops is not None and (not isinstance(hops, int) or hops < 1):
        raise CommandError(f"the 'hops' of a {kind} probe are {hops!r}; write a whole number of at least 1")
    if kind == PORTABILITY and answer is None:
        raise CommandError(f"a {kind} probe has no 'answer' (found {[*row]}); add what follows from the new fact")
    implied = {"image": None} if kind == "no_picture" else {}
    return ProbeWords(kind=kind, words=_nested(implied | row, own, folder, _PROBE), answer=answer, hops=hops)


def _path(said: dict[str, str], folder: Path) -> Path | None:
    return folder / said["image"] if said.get("image") else None


def _check_name(entry: EditEntry, earlier: Sequence[EditEntry]) -> None:
    for other in earlier:
        if other.name == entry.name:
            raise CommandError(f"the id {entry.name!r} is that of line {other.line} too; give each record its own")
