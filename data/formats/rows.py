"""What the readers share: rows of JSON and CSV files, texts of a row, and paths of pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import DataError
from ..facts import PORTABILITY, UNRELATED_TEXT, EditRecord, Probe, Question
from ..jsonl import ADDRESS, parse_json

Row = Mapping[str, Any]
Outcome = Question | EditRecord | DataError
"""What became of a row: what it says, or why it cannot be read."""
_UNDECODED = re.compile("[\ud800-\udfff]")  # what "surrogateescape" makes of bytes that are not UTF-8
_GAP = re.compile(r"[ \t\r\n]*")
"""What may stand between the values of a JSON array."""
_ASKED = re.compile(r"loc|locality_prompt|(m_)?rel(_\d)?")
"""Keys of questions whose answers have keys like them, such as "rel_1" with "rel_ans_1" or "rel_1_ans"."""
_QUESTIONS = ("loc", "m_loc_q", "locality_prompt", "rel", "rel_1", "rel_2", "m_rel", "m_rel_1", "m_rel_2")
"""Keys of questions that are looked for even if a row has no more than the answer."""
_PACKED = {b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file"}
"""First bytes of files that hold data files."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A file that is read, and where the pictures that it names lie."""

    path: Path
    images: Path | None = None
    """Folder of the pictures; None: the file's own folder."""
    answers: Path | None = None
    """File or folder of answers that are joined to questions without one."""

    def picture(self, name: str) -> Path:
        """Return the path of a picture that a row names.

        Where no file has exactly this name, these are looked for: the name in another Unicode normal form, with its
        suffix in the other case, with %20 and the like decoded, without a slash at its beginning, or without its first
        folder if that is the name of the folder of pictures. Of a folder of candidate pictures the first one by name is
        taken. A picture that is missing keeps its path, so that it is noticed where it is asked for; so does the
        address of a picture on the web.
        """
        if ADDRESS.match(name.strip()):
            return Path(name.strip())
        own = self.path if self.path.is_dir() else self.path.parent
        folder = own if self.images is None else self.images
        path = folder / name.strip().removeprefix("./")
        if not os.path.exists(path) and "\\" in name:  # written on Windows
            path = folder / name.strip().replace("\\", "/").removeprefix("./")
        if not os.path.exists(path):
            path = next((each for each in _other_spellings(folder, path) if os.path.exists(each)), path)
        candidates = pictures_in(path) if os.path.isdir(path) else []
        return candidates[0] if candidates else path

    def pictures(self, row: Row, name: str) -> Path | tuple[Path, ...] | None:
        """Return the picture that a row names under this key, all of a list of several, or None if there is none."""
        paths = tuple(map(self.picture, texts_of(row, name)))
        return paths if len(paths) > 1 else paths[0] if paths else None


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures that lie in a folder, sorted by name."""
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in _PICTURES)


def same_name(one: str, other: str) -> bool:
    """Return whether two names are the same but for their Unicode normal form, as archives change it."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def json_rows(source: DataSource) -> Iterator[tuple[int, Row | DataError]]:
    """Return each object of a JSON array with its number from 1, or of JSON lines with the number of the line.

    One object whose only list, or whose only values, are objects counts as an array of these; its keys are their ids.
    """
    text = read_text(source.path)
    content = _entries(text, source.path) if text.lstrip()[:1] == "[" else wrapped(text)
    if content is not None:
        yield from ((number, _object(row, number, source.path)) for number, row in enumerate(content, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, _object(parsed(line, source.path, f", line {number}"), number, source.path)
            except DataError as error:
                yield number, error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str] | DataError]]:
    """Return the cells of each row of a CSV file, or what is wrong with them, and the line where the row starts."""
    text = _bytes(path).decode("utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, DataError(f"this is not CSV: {error}; compare the row with the published file")
            continue
        if wrong := next((cell for cell in cells if _UNDECODED.search(cell)), None):
            text = wrong.encode("ascii", "backslashreplace").decode()[:80]
            yield line, DataError(f"{text!r} is not UTF-8; save the file as UTF-8")
        elif cells:
            yield line, cells


def parsed(text: str, path: Path, place: str = "") -> Any:
    """Return the value of a JSON text. Raises `DataError` that names the file and the place in it."""
    try:
        return parse_json(text, nan=True)
    except DataError as error:
        raise DataError(f"{str(path)!r}{place}: {error}") from error


def read_text(path: Path) -> str:
    """Return the text of a file. Raises `DataError` if it cannot be read or is not UTF-8."""
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def each_row(
    rows: Iterable[tuple[int, Row | DataError]], read: Callable[[int, Row], Sequence[Question | EditRecord]]
) -> Iterator[tuple[int, Outcome]]:
    """Return what `read` makes of each row, with ids that are unique in the file; a bad row costs only itself."""
    known: dict[str, int] = {}
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            records = read(number, row)
        except DataError as error:
            yield number, error
            continue
        for record in records:
            known[record.id] = known.get(record.id, 0) + 1
            count = known[record.id]
            yield number, record if count == 1 else replace(record, id=f"{record.id}~{count}")


def text_of(row: Row, *names: str) -> str:
    """Return the text under the first of these keys that the row has. Raises `DataError` if there is none."""
    if (text := text_or_none(row, *names)) is None:
        keys = ", ".join(repr(name) for name, value in row.items() if value not in (None, "", [])) or "nothing"
        raise DataError(f"no {' or '.join(map(repr, names))} (found {keys[:200]}); fill it in or drop the row")
    return text


def text_or_none(row: Row, *names: str) -> str | None:
    """Return the text under the first of these keys that the row has; None if all are absent, null or empty."""
    texts = texts_of(row, *names)
    return texts[0] if texts else None


def texts_of(row: Row, *names: str) -> tuple[str, ...]:
    """Return the text, or the list of texts, under the first of these keys that the row has, without empty ones."""
    value = next((row[name] for name in names if row.get(name) not in (None, "", [])), ())
    values = _flat(value if isinstance(value, list | tuple) else [value])
    texts = [str(each) if type(each) in (int, float) else each for each in values if each is not None]
    if wrong := [each for each in texts if not isinstance(each, str)]:
        kind = type(wrong[0]).__name__
        raise DataError(f"{' or '.join(map(repr, names))} is of type {kind}; it should be a text or a list of texts")
    return tuple(text.strip() for text in texts if text.strip())


def lists_of(row: Row, *names: str) -> dict[str, list[Any]]:
    """Return the lists of several values under these keys, for the `extra` of a record that uses the first value."""
    return {name: value for name in names if isinstance(value := row.get(name), list) and len(value) > 1}


def objects_of(row: Row, name: str) -> tuple[Row, ...]:
    """Return the objects in the list under this key, or the only one without a list; none if the key is absent."""
    value = row.get(name) or []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(f"{name!r} is no object and no list of objects; compare the row with the published file")
    return tuple(value)


def object_of(row: Row, name: str) -> Row | None:
    """Return the object under this key, which may be in a list of one; None if there is none."""
    objects = objects_of(row, name)
    if len(objects) > 1:
        raise DataError(f"{name!r} has {len(objects)} objects; it should be one, so write a row for each")
    return objects[0] if objects else None


def rest_of(row: Row, *names: str) -> dict[str, Any]:
    """Return what the row says besides these keys, for the `extra` of a record."""
    return {name: value for name, value in row.items() if name not in names and value not in (None, "")}


def paired(row: Row, question: str, answer: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each question under a key with its answers under another key.

    Lists of the same length belong together entry by entry. Of one question a list holds all answers that count as
    right. Several questions whose answers are of another number have none.
    """
    questions, answers = texts_of(row, question), texts_of(row, answer)
    asked, said = row.get(question), row.get(answer)
    if isinstance(asked, list) and isinstance(said, list) and len(asked) == len(said) > 1:
        entries = ({question: one, answer: other} for one, other in zip(asked, said, strict=True))
        yield from ((text, texts_of(each, answer)) for each in entries for text in texts_of(each, question))
    elif len(questions) == 1:
        yield questions[0], answers
    elif len(questions) == len(answers):
        yield from ((text, (answer,)) for text, answer in zip(questions, answers, strict=True))
    else:
        yield from ((text, ()) for text in questions)


def probe_with(kind: str, text: str, answers: tuple[str, ...], image: Any = None) -> Probe:
    """Return a probe that expects the first of the answers, all of which count as right; none if there is none."""
    question = Question(text=text, image=image, answers=answers[1:] and answers)
    return Probe(kind=kind, question=question, answer=answers[0] if answers else None)


def unrelated_texts(row: Row) -> tuple[Probe, ...]:
    """Return the probes of the unrelated questions without a picture under "loc", with their answers in "loc_ans"."""
    return tuple(
        probe_with(UNRELATED_TEXT, without_prefix(text), answers) for text, answers in paired(row, "loc", "loc_ans")
    )


def without_prefix(question: str) -> str:
    """Return a question without the prefix that marks questions of Natural Questions for a T5 model."""
    return question.strip().removeprefix("nq question:").strip()


def occurrences(question: str, words: str) -> list[str]:
    """Return every place where the question says these words, as it writes them: whole words, any case, any blanks."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    return re.findall(rf"(?<!\w){pattern}(?!\w)", question, re.IGNORECASE) if pattern else []


def answered(kind: str, row: Row, question: str, answers: tuple[str, ...], **parts: Any) -> tuple[Probe, ...]:
    """Return the probe of the question and the answer under these keys, or one for each of a list of questions.

    `image` and `extra` among the parts are those of the question, the others those of the probe. A row whose
    question or answer is missing keeps its other probes; the doctor (`multrace data check`) reports it.
    """
    answer = next((name for name in answers if texts_of(row, name)), answers[0])
    own = {name: parts.pop(name) for name in ("image", "extra") if name in parts}
    return tuple(
        replace(probe, question=replace(probe.question, **own), **parts)
        for probe in (probe_with(kind, text, said) for text, said in paired(row, question, answer) if said)
    )


def new_question(row: Row) -> tuple[Probe, ...]:
    """Return the portability probes of EasyEdit's key "portability" with "New Question" and "New Answer"."""
    pair = row.get("portability")
    if not isinstance(pair, dict):
        return ()
    return answered(
        PORTABILITY, pair, "New Question", ("New Answer",), extra=rest_of(pair, "New Question", "New Answer")
    )


def unanswered(row: Row) -> Iterator[str]:
    """Yield what is missing of each question of a row that has no answer or no picture, and of answers without one.

    Readers leave out such questions, or ask them without an answer; what else the row says stays.
    """
    for key in dict.fromkeys((*row, *_QUESTIONS)):
        if names := _answer_keys(key):
            yield from _unpaired(row, key, *names)
    for question, picture in (("m_loc_q", "m_loc"), ("image_rephrase_question", "image_rephrase")):
        if text_or_none(row, question) is not None and text_or_none(row, picture) is None:
            yield f"{question!r} has a question whose picture, {picture!r}, is missing"
    if text_or_none(row, "m_loc") is not None and text_or_none(row, "m_loc_q") is None:
        yield "'m_loc' has a picture without a question, 'm_loc_q'"
    for entry in objects_of(row, "port_new"):
        pairs = objects_of(entry, "Q&A") if "Q&A" in entry else (entry,)
        question, answer = ("Question", "Answer") if "Q&A" in entry else ("port_q", "port_a")
        if any(not texts_of(pair, question) and not texts_of(pair, answer) for pair in pairs or ({},)):
            yield "'port_new' has an entry without a question"
        for pair in pairs:
            yield from (text.replace(repr(question), "'port_new'", 1) for text in _unpaired(pair, question, answer))
    if textual := object_of(row, "textual_edit"):
        yield from unanswered(textual)


def _unpaired(row: Row, question: str, *answers: str) -> Iterator[str]:
    """Yield what is missing if the questions and the answers under these keys do not belong together."""
    answer = next((name for name in answers if texts_of(row, name)), answers[0])
    asked, said = texts_of(row, question), texts_of(row, answer)
    if bool(asked) != bool(said):
        yield f"{question!r} has a question without an answer, or the reverse"
    elif any(not texts for _, texts in paired(row, question, answer)):
        yield f"{question!r} has {len(asked)} questions and {answer!r} {len(said)} answers"


def _answer_keys(key: str) -> tuple[str, ...]:
    """The keys under which the answer to the question under this key stands; none if it is no key of a question."""
    if key == "m_loc_q":
        return ("m_loc_a",)
    if key == "locality_prompt":
        return ("locality_ground_truth",)
    if not _ASKED.fullmatch(key):
        return ()
    return (f"{key}_ans", key.replace("rel_", "rel_ans_")) if "rel_" in key else (f"{key}_ans",)


def _bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise DataError(f"{str(path)!r} is not a regular file; pass a data file, or save its content as one")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; pass a data file") from error
    for start, kind in _PACKED.items():
        if content.startswith(start):
            raise DataError(f"{str(path)!r} is {kind}; unpack it, and pass the JSON or CSV file")
    return content


def wrapped(text: str) -> list[Any] | None:
    """Return the objects inside a text that is one JSON object, or the object if it is written over several lines."""
    try:
        content = parse_json(text, nan=True)
    except DataError:
        return None
    if not isinstance(content, dict) or not content:
        return None
    lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(content) == len(lists) == 1:
        return lists[0]
    if all(isinstance(value, dict) and value for value in content.values()):
        return [{"id": name, **value} for name, value in content.items()]
    return [content] if "\n" in text.strip() else None


def _without_nan(value: Any) -> Any:
    """Return a JSON value with null in place of NaN, which tables write for cells that are empty."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entries(text: str, path: Path) -> list[Any]:
    """Return the values of a JSON array, with a `DataError` in place of each one that breaks a rule of `parse_json`.

    Raises `DataError` if the text is not JSON: what follows the mistake cannot be told apart then.
    """
    try:
        return parsed(text, path)
    except DataError as error:
        return [_entry(part, number, path) for number, part in enumerate(_parts(text, error), start=1)]


def _entry(text: str, number: int, path: Path) -> Any:
    try:
        return parsed(text, path, f", entry {number}")
    except DataError as error:
        return error


def _parts(text: str, error: DataError) -> Iterator[str]:
    """Yield the text of each value of a JSON array. Raises the error if the text is not JSON."""
    decoder = json.JSONDecoder(parse_int=str)  # as text, because Python refuses numbers of more than 4300 digits
    start = text.index("[") + 1
    try:
        while True:
            start = _after_blanks(text, start)
            end = decoder.raw_decode(text, start)[1]
            yield text[start:end]
            mark = _after_blanks(text, end)
            if text[mark : mark + 1] != ",":
                break
            start = mark + 1
    except (json.JSONDecodeError, RecursionError) as cause:
        raise error from cause
    if text[mark:].strip() != "]":
        raise error


def _after_blanks(text: str, start: int) -> int:
    match = _GAP.match(text, start)
    return start if match is None else match.end()


def _object(row: Any, number: int, path: Path) -> Row | DataError:
    if isinstance(row, DataError):
        return row
    if isinstance(row, dict):
        return _without_nan(row)
    return DataError(f"entry {number} of {str(path)!r} is of type {type(row).__name__}, not an object; drop it")


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _other_spellings(folder: Path, path: Path) -> Iterator[Path]:
    relative = path.relative_to(folder if path.is_relative_to(folder) else path.anchor)
    places = [relative]
    if relative.parts[:1] == (folder.resolve().name,) and relative.parts[1:]:
        places.append(Path(*relative.parts[1:]))
    places += [Path(plain) for place in places if (plain := unquote(str(place))) != str(place) and "\0" not in plain]
    for place in places:
        for suffix in dict.fromkeys((place.suffix, place.suffix.lower(), place.suffix.upper())):
            name = str(place.with_suffix(suffix) if place.suffix else place)
            yield from (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
