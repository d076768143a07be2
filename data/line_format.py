"""The keys of our own lines: what each may hold, as the schema prints it and as an error advises it.

The descriptions of the fields serve both. pydantic checks each line against them; it is imported with the first line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal

from .errors import DataError
from .facts import PROBE_KINDS

LISTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")
"""Keys of an edit that hold lists of questions, besides its probes."""


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
