"""JSON within bounds, and our own lines: a file of questions and edit records, one JSON object per line.

One definition of the keys (`EntryLine` and its kin) serves the reader, the writer, the schema that people are shown
and the advice of the errors. pydantic checks each line against it; it is imported with the first line.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from PIL import Image

from .errors import DataError
from .facts import (
    LISTS,
    NO_PICTURE,
    ORIGINAL_ENTITY,
    PROBE_KINDS,
    RELATED_TEXT,
    UNRELATED_TEXT,
    EditRecord,
    PictureSource,
    Probe,
    Question,
)
from .spans import says_once

DEEPEST = 64
"""Largest number of lists and objects inside each other."""
LONGEST_NUMBER = 400
"""Largest number of characters of a number."""
LONGEST_LINE = 1 << 26
"""Largest number of bytes of a line; a longer one is not read into memory."""
_MEANT = {
    "image": ("img", "picture", "photo", "image_path", "image_url", "image_file", "images", "path"),
    "question": ("prompt", "src", "text", "query"),
    "target": ("alt", "target_new", "new", "new_answer", "new_target"),
    "old": ("pred", "target_true", "old_answer"),
    "rewrite_prompts": ("also",),
    "preserve_prompts": ("keep",),
    "spans": ("object", "object2", "true_option", "false_option", "text_constraint"),
}
"""Key of ours -> names that other files and people give it. Left alone they would be kept as remarks in silence."""
ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address on the web or a picture in base64 text begins, which is no path inside a folder."""
_PICTURELESS = (NO_PICTURE, ORIGINAL_ENTITY, RELATED_TEXT, UNRELATED_TEXT)
"""Kinds of probes that never show the record's picture."""
_NAMES = {"text": "question"}
"""Field of `Question` -> its key in a file, where they differ."""


def parse_json(content: bytes | str, *, nan: bool = False, error: type[ValueError] = DataError) -> Any:
    """Return the value that a JSON text holds.

    The standard library accepts more than this function: texts that are nested as deep as the interpreter's stack
    allows, repeated keys (of which all but the last are lost), and half surrogates, which no file can store.

    Args:
        content: the text, or its bytes in UTF-8 (with or without a byte order mark).
        nan: accept NaN, Infinity and numbers beyond the range of float64, which are not standard JSON. Default False.
        error: the class to raise.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None.

    Raises:
        DataError: (or the given class) if the content is not JSON, is nested deeper than `DEEPEST`, has a key twice in
            one object, or holds a number of more than `LONGEST_NUMBER` characters.

    Example:
        >>> from multrace.data import parse_json
        >>> parse_json('{"question": "Who won?"}')
        {'question': 'Who won?'}
    """

    def refuse(problem: str) -> NoReturn:
        raise error(f"this is not JSON that can be used: {problem}; write one plain value in UTF-8")

    def whole(text: str) -> int:
        return int(text) if len(text) <= LONGEST_NUMBER else refuse(f"a number has {len(text)} digits")

    def real(text: str) -> float:
        number = float(text)
        return number if nan or math.isfinite(number) else refuse(f"{text[:20]!r} is no finite number")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            refuse(f"the key {twice[:40]!r} is there twice in one object")
        return value

    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=real, object_pairs_hook=mapping)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        refuse(f"it is nested deeper than {DEEPEST} levels")
    except UnicodeError as cause:
        refuse(
            f"it is not UTF-8 ({cause.reason})" if isinstance(cause, UnicodeDecodeError) else "half a surrogate pair"
        )
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno}, " if "\n" in text.strip() else ""
        refuse(f"{cause.msg} at {line}column {cause.colno}")
    if _depth(value) > DEEPEST:
        refuse(f"it is nested deeper than {DEEPEST} levels")
    return value


def _depth(value: Any) -> int:
    """Return the number of lists and objects inside each other."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    return depth


# ---- the keys of a line ----


def _key(description: str, default: Any = MISSING, *, make: Any = MISSING) -> Any:
    """Return a field of a line; pydantic takes its description from the metadata."""
    return field(default=default, default_factory=make, metadata={"description": description})


@dataclass(frozen=True, kw_only=True)
class EntryLine:
    """A question that belongs to an edit. "image", "question", "constraint" and "template" may be left out: they are
    the record's, the constraint only if the question says it once."""

    question: str | None = _key("what to ask, as text", None)
    id: str | int = _key("a name of its own", "")
    image: str | list[str] | None = _key(
        "the path of the picture from the file's folder (or from the folder of pictures), a list of paths, or null",
        None,
    )
    constraint: str | tuple[str, int | Literal["all"]] | None = _key(
        'the words of the question that name its subject, or [words, number of the occurrence from 0 or "all"]', None
    )
    spans: dict[str, str | tuple[str, int | Literal["all"]]] = _key(
        'an object of more words of the question by name, such as {"object": "the car", "true_option": "red"}',
        make=dict,
    )
    replacement: str | None = _key("a phrase that names something else of the kind, as text", None)
    answer: str | None = _key("the right answer, as text", None)
    answers: list[str] = _key("a list of all right answers, such as those of several annotators", make=list)
    foil: str | None = _key("a wrong answer to compare with, as text", None)
    boxes: list[tuple[int, int, int, int]] = _key(
        "where the thing asked about is, [[left, top, right, bottom], ...] in pixels, whole numbers", make=list
    )
    corrupt: str | None = _key("the corruption of a trace as the command line writes it, such as swap:other.jpg", None)
    template: str | None = _key("the prompt's template, as text", None)
    extra: dict[str, Any] = _key("an object with whatever else there is to remember", make=dict)


@dataclass(frozen=True, kw_only=True)
class ProbeLine(EntryLine):
    """A question that checks an edit."""

    kind: str = _key("the kind of probe, such as rephrase")
    hops: int | None = _key("how many facts away from the edited one, a whole number of at least 1", None)
    needs: list[str] = _key("a list of the ids of other records whose edits the answer needs", make=list)


@dataclass(frozen=True, kw_only=True)
class QuestionLine(EntryLine):
    """A question to trace or to answer."""

    question: str = _key("what to ask, as text")


@dataclass(frozen=True, kw_only=True)
class EditLine(QuestionLine):
    """An edit to make: a line with a "target"."""

    target: str = _key("the new answer, as text")
    old: str | None = _key("the present answer, as text, or null for what the model says", None)
    contexts: list[EntryLine] = _key('more pictures or wordings of the fact, [{"image": ...}, ...]', make=list)
    rewrite_prompts: list[EntryLine] = _key(
        'questions that must get the target too, [{"question": ...}, ...]', make=list
    )
    preserve_prompts: list[EntryLine] = _key('questions whose answers must stay, [{"image": ...}, ...]', make=list)
    essence: list[EntryLine] = _key(
        'questions about the same thing whose next token should stay, [{"question": ...}, ...]', make=list
    )
    probes: list[ProbeLine] = _key(
        'questions that check the edit, [{"kind": "rephrase", "question": ...}, ...]', make=list
    )
    group: str = _key("a name that records which belong together share, as text", "")
    question_id: str = _key("the question's own name, if it differs from the record's", "")
    question_extra: dict[str, Any] = _key(
        "an object with whatever else there is to remember of the question", make=dict
    )


EXAMPLES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "QuestionLine": (
        {
            "id": "1",
            "image": "cars.jpg",
            "question": "Is the car red or blue?",
            "constraint": "the car",
            "spans": {"true_option": "red", "false_option": "blue"},
            "answer": "red",
            "foil": "blue",
            "boxes": [[40, 60, 180, 140]],
        },
    ),
    "EditLine": (
        {
            "id": "2",
            "image": "logo.jpg",
            "question": "Who founded the company in this photo?",
            "constraint": "the company in this photo",
            "target": "Ada Example",
            "probes": [
                {"kind": "rephrase", "question": "Which person founded the firm shown here?"},
                {"kind": "same_question_other_picture", "image": "other_logo.jpg"},
            ],
        },
    ),
}
"""Lines that the schema shows."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of one line, with a description of each key and examples.

    Example:
        >>> from multrace.data import schema
        >>> schema()["$defs"]["EditLine"]["required"]
        ['question', 'target']
    """
    import pydantic

    value = pydantic.TypeAdapter(EditLine | QuestionLine).json_schema()
    for name, examples in EXAMPLES.items():
        value["$defs"][name]["examples"] = [dict(example) for example in examples]
    value["$defs"]["ProbeLine"]["properties"]["kind"]["enum"] = list(PROBE_KINDS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A line of multrace"} | value


def checked(row: dict[str, Any], kind: type[EntryLine]) -> Any:
    """Return the line as an instance of its class. Raises `DataError` for the first value that is of another type."""
    import pydantic

    try:
        return _adapter(kind).validate_json(json.dumps(without_nulls(row)), strict=True)
    except pydantic.ValidationError as error:
        place: tuple[Any, ...] = error.errors(include_url=False)[0]["loc"]
    inside = place[0] in (*LISTS, "probes") and len(place) > 2
    holder, key = (row[place[0]][place[1]], place[2]) if inside else (row, place[0])
    where = f" of {place[0]!r} {place[1] + 1}" if inside else ""
    advice = advice_on(kind if not inside else ProbeLine if place[0] == "probes" else EntryLine)[key]
    if holder.get(key) is None:
        raise DataError(f"no {key!r}{where} (found {_keys(holder)}); add {advice}")
    raise DataError(f"{key!r}{where} is {shown(holder[key])}; write {advice}")


def _keys(value: Any) -> str:
    return ", ".join(repr(key) for key in [*value][:12] if value[key]) or "nothing"


def shown(value: Any) -> str:
    """Return a JSON value as it stands in the file, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _adapter(kind: type[EntryLine]) -> Any:
    import pydantic

    return pydantic.TypeAdapter(kind)


def advice_on(kind: type[EntryLine]) -> dict[str, str]:
    """Return key of a line -> what to write there."""
    return {each.name: each.metadata["description"] for each in fields(kind)}


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object without keys that say null, which is what a key that is left out means."""
    return {key: value for key, value in row.items() if value is not None}


# ---- files of lines ----


def read_lines(
    path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None
) -> Iterator[tuple[int, Question | EditRecord | DataError]]:
    """Return an iterator over (line number from 1, record) of a file of JSON lines, read as it is consumed.

    A line with "target" is an `EditRecord`, any other a `Question`. What is wrong with a line comes in its place, as
    the `DataError` that describes it, and costs no other line. Blank lines are skipped. Unknown keys are kept in
    `extra`, unless they look like a misspelt one. Pictures are not opened; `check_data` does that.

    Args:
        path: the file, in UTF-8.
        images: the folder from which the paths of pictures count. Default: the file's own folder.

    Returns:
        Pairs of the line number and the record, or the `DataError` of a line that cannot be used.

    Raises:
        DataError: (at the first record) if there is no such file, if it cannot be read, or if it has no line.

    Example:
        >>> from multrace.data import Question, read_lines, write_lines
        >>> path = write_lines("questions.jsonl", [Question(text="Who won?", answer="Ada")])
        >>> list(read_lines(path))
        [(1, Question('Who won?' -> 'Ada', no picture))]
    """
    path = Path(path)
    folder = path.parent if images is None else Path(images)
    known: dict[str, int] = {}
    number = 0
    for number, line in _raw_lines(path):
        try:
            record = read_line(line, folder)
            if record.id and record.id in known:
                raise DataError(f"the id {record.id!r} is that of line {known[record.id]} too; give each its own")
            known[record.id] = number
            yield number, record
        except DataError as error:
            yield number, DataError(f"line {number} of {str(path)!r}: {error}")
    if not number:
        raise DataError(f"no lines in {str(path)!r}: it is empty; write a JSON object per line")


def read_line(line: bytes | str, folder: Path) -> Question | EditRecord:
    """Return the record of one line; paths of pictures count from the folder. Raises `DataError`."""
    if len(line) > LONGEST_LINE:
        raise DataError(f"the line is longer than {LONGEST_LINE} bytes; write one record per line")
    row = parse_json(line)
    if isinstance(row, list):
        raise DataError("a list instead of an object; write each of its objects on a line of its own")
    if not isinstance(row, dict):
        raise DataError(f'a {type(row).__name__} instead of an object; write {{"question": ...}}')
    kind = EditLine if "target" in row else QuestionLine
    row = _with_known_keys(row, kind)
    if kind is EditLine:
        row |= {name: [_inherited(entry, row, name) for entry in _objects(row, name)] for name in (*LISTS, "probes")}
    value = checked(row, kind)
    return _edit_record(value, folder) if kind is EditLine else _question(value, folder)


def write_lines(path: str | os.PathLike[str], records: Iterable[Question | EditRecord]) -> Path:
    """Write a file that `read_lines` reads to equal records, all of it or nothing, and return its path.

    Paths of pictures inside the file's folder are written relative to it, others absolute.

    Args:
        path: the file to write; its folder is made if it is missing.
        records: the questions and edit records; consumed one at a time.

    Returns:
        The path.

    Raises:
        DataError: if a picture is in memory and not in a file, or if the file cannot be written.
    """
    path = Path(path)
    lines = (json.dumps(line_of(record, path.parent), ensure_ascii=False) + "\n" for record in records)
    return write_text(path, lines)


def write_text(path: Path, parts: Iterable[str]) -> Path:
    """Write the parts of a text one after another, the whole file or nothing, and return its path."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {str(path)!r}: {reason}; choose a folder that you may write to") from error
    except UnicodeEncodeError as error:
        raise DataError(f"cannot write {str(path)!r}: a text holds half a surrogate pair; leave it out") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def line_of(record: Question | EditRecord, folder: Path) -> dict[str, Any]:
    """Return the JSON object of a record, with paths relative to the folder where they are inside it."""
    if isinstance(record, Question):
        return _question_line(record, folder)
    question = record.question
    own = {"id": record.id} if record.id else {}
    own |= {key: value for key, value in _question_line(question, folder).items() if key not in ("id", "extra")}
    own["target"] = record.target
    if record.old is not None:
        own["old"] = record.old
    for name in LISTS:
        if entries := [_entry_line(entry, question, folder) for entry in getattr(record, name)]:
            own[name] = entries
    if record.probes:
        own["probes"] = [_probe_line(probe, question, folder) for probe in record.probes]
    rest = {"group": record.group, "question_id": question.id, "extra": record.extra, "question_extra": question.extra}
    return own | {key: value if isinstance(value, str) else dict(value) for key, value in rest.items() if value}


# ---- reading ----


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank; of one that is too long, its beginning."""
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise DataError(f"{str(path)!r} is not a regular file; pass a data file, or save its content as one")
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                rest = line
                while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
                    pass
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error.strerror or error}; pass a file with a JSON object per line"
        ) from error


def _with_known_keys(row: dict[str, Any], kind: type[EntryLine]) -> dict[str, Any]:
    """Return the object with unknown keys moved into "extra". Raises `DataError` for keys that mean a known one."""
    known = [each.name for each in fields(kind)]
    unknown = {key: row[key] for key in row if key not in known}
    if not unknown:
        return dict(row)
    names = known if kind is not QuestionLine else [each.name for each in fields(EditLine)]
    for key in (key for key in unknown if key not in names):
        meant = [name for name, others in _MEANT.items() if key.casefold() in others]
        if near := [name for name in (*meant, *get_close_matches(key, names, n=1, cutoff=0.8)) if name not in row]:
            raise DataError(f'no key {key[:40]!r}; did you mean {near[0]!r}? Write other remarks into "extra"')
    if edits := [key for key in unknown if key in names and key != "group"]:
        raise DataError(f"{edits[0]!r} belongs to an edit (found {', '.join(map(repr, row))[:200]}); add 'target'")
    extra = row.get("extra", {})
    if not isinstance(extra, dict):
        raise DataError(f"'extra' is {shown(extra)}; write {advice_on(kind)['extra']}")
    return {key: row[key] for key in row if key in known} | {"extra": unknown | extra}


def _objects(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the list of objects under this name, empty if there is none."""
    entries = row.get(name) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{name!r} is no list of objects; write {advice_on(EditLine)[name]}")
    return entries


def _inherited(entry: dict[str, Any], own: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an entry of a record, completed from the record's own question."""
    entry = _with_known_keys(entry, ProbeLine if name == "probes" else EntryLine)
    if entry.get("kind") in _PICTURELESS:
        entry = {"image": None} | entry
    if not entry.keys() & {"image", "question"}:
        raise DataError(f"an entry of {name!r} names neither 'image' nor 'question'; write at least one")
    whole = {key: own.get(key) for key in ("question", "image", "template")} | entry
    if "constraint" not in entry:
        whole["constraint"] = _shared_constraint(whole["question"], own.get("question"), own.get("constraint"))
    return without_nulls(whole)


def _shared_constraint(text: Any, own_text: Any, constraint: Any) -> Any:
    """Return the record's constraint if it marks the same words in this question, else None."""
    if text == own_text:
        return constraint
    words = constraint[0] if isinstance(constraint, list | tuple) and constraint else constraint
    return words if isinstance(words, str) and isinstance(text, str) and says_once(text, words) else None


def _edit_record(line: EditLine, folder: Path) -> EditRecord:
    entries = {name: tuple(_question(entry, folder) for entry in getattr(line, name)) for name in LISTS}
    own = {"id": line.question_id, "extra": line.question_extra}
    return EditRecord(
        id=str(line.id),
        question=_question(line, folder, **own),
        target=line.target,
        old=line.old,
        probes=tuple(_probe(entry, folder) for entry in line.probes),
        group=line.group,
        extra=line.extra,
        **entries,
    )


def _probe(line: ProbeLine, folder: Path) -> Probe:
    # The answer is the probe's: what counts as right after the edit.
    question = _question(line, folder, answer=None)
    return Probe(kind=line.kind, question=question, answer=line.answer, hops=line.hops, needs=tuple(line.needs))


def _question(line: EntryLine, folder: Path, **own: Any) -> Question:
    values = {each.name: getattr(line, _NAMES.get(each.name, each.name)) for each in fields(Question)} | own
    paths = [line.image] if isinstance(line.image, str) else line.image or []
    if not all(path.strip() and "\0" not in path for path in paths):
        raise DataError(
            f"'image' is {shown(line.image)}; write the path of the picture, or null for a question without one"
        )
    pictures = tuple(Path(path) if ADDRESS.match(path) else folder / path for path in paths)
    values["image"] = pictures[0] if isinstance(line.image, str) else pictures or None
    values["id"] = str(values["id"])
    values["corrupt"] = line.corrupt and _moved(line.corrupt, lambda path: str(folder / path))
    return Question(**values | {name: tuple(values[name]) for name in ("answers", "boxes")})


# ---- writing ----


def _question_line(question: Question, folder: Path) -> dict[str, Any]:
    """Return the object of a question; what has its default is left out."""
    line: dict[str, Any] = {}
    for each in fields(Question):
        value, key = getattr(question, each.name), _NAMES.get(each.name, each.name)
        if value is None or value == each.default or value in ((), {}):
            continue
        if each.name == "image":
            value = _image_line(value, folder)
        elif each.name == "corrupt":
            value = _moved(value, lambda path: relative_path(Path(path), folder))
        line[key] = value
    return {key: line[key] for key in ("id", "image") if key in line} | line


def _image_line(image: PictureSource | tuple[PictureSource, ...], folder: Path) -> str | list[str]:
    if isinstance(image, tuple):
        return [relative_path(each, folder) for each in image]
    return relative_path(image, folder)


def _entry_line(entry: Question, own: Question, folder: Path) -> dict[str, Any]:
    """Return the object of a question that belongs to an edit, without what it inherits from the edit's own."""
    line = _question_line(entry, folder)
    inherited = {"image": own.image, "template": own.template}
    inherited["constraint"] = _shared_constraint(entry.text, own.text, own.constraint)
    for name, value in inherited.items():
        if getattr(entry, name) == value:
            line.pop(name, None)
        else:
            line.setdefault(name, None)
    if entry.text == own.text and "image" in line:
        del line["question"]
    return line


def _probe_line(probe: Probe, own: Question, folder: Path) -> dict[str, Any]:
    line = {"kind": probe.kind} | _entry_line(probe.question, own, folder)
    if probe.kind in _PICTURELESS and probe.question.image is not None:
        line["image"] = _image_line(probe.question.image, folder)
    more = {"answer": probe.answer, "hops": probe.hops, "needs": list(probe.needs) or None}
    return line | {key: value for key, value in more.items() if value is not None}


def _moved(corrupt: str, move: Callable[[str], str]) -> str:
    """Return a corruption with the paths of its pictures moved."""
    kind, _, value = corrupt.partition(":")
    paths = {"swap": [value], "mean": value.split(",")}.get(kind, [])
    if not all(path.strip() for path in paths) or not paths:
        return corrupt
    return f"{kind}:{','.join(move(path.strip()) for path in paths)}"


def pictures_of(corrupt: str | None) -> list[Path]:
    """Return the pictures that a corruption, as the command line writes it, names."""
    paths: list[Path] = []
    if corrupt is not None:
        _moved(corrupt, lambda path: paths.append(Path(path)) or path)
    return paths


def relative_path(path: PictureSource, folder: Path) -> str:
    """Return the path from the folder, or from the root if it is not inside the folder."""
    if isinstance(path, Image.Image):
        raise DataError("a picture in memory cannot stand in a file of lines; save it and pass its path as image=")
    if ADDRESS.match(str(path)):
        return str(path)
    try:
        return Path(path).relative_to(folder).as_posix()
    except ValueError:
        return os.path.abspath(path)
