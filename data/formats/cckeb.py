"""Reader of CCKEB (MemEIC): each row has a visual edit, a textual edit about its answer, and questions that need both.

A row becomes two records of one group: the visual one, whose compositional probes (`port_type` "comp") need the textual
one too, and the textual one, whose id ends in "-text".
"""

from collections.abc import Iterator
from dataclasses import replace

from ..facts import REPHRASE, EditRecord, Probe, Question
from .mmedit import visual_edit
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    lists_of,
    object_of,
    objects_of,
    rest_of,
    text_of,
    texts_of,
    unrelated_texts,
)
from .vlkeb import hop

_TEXTUAL = ("src", "alt", "rephrase", "loc", "loc_ans")


def read_cckeb(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of a file, two for each row, and a `DataError` for each unreadable row."""
    return each_row(json_rows(source), lambda number, row: _records(source, row, str(number)))


def _records(source: DataSource, row: Row, id: str) -> list[EditRecord]:
    textual = object_of(row, "textual_edit")
    partner = () if textual is None else (f"{id}-text",)
    probes = _portability(source, row, partner)
    visual = replace(visual_edit(source, row, id, "port_new", "textual_edit", more=probes), group=id)
    return [visual] if textual is None else [visual, _textual(textual, f"{id}-text", group=id)]


def _portability(source: DataSource, row: Row, partner: tuple[str, ...]) -> tuple[Probe, ...]:
    image = source.pictures(row, "image")
    return tuple(
        probe
        for entry in objects_of(row, "port_new")
        for probe in hop(entry, image, needs=partner if entry.get("port_type") == "comp" else ())
    )


def _textual(row: Row, id: str, *, group: str) -> EditRecord:
    targets = texts_of(row, "alt")
    rephrases = (Probe(kind=REPHRASE, question=Question(text=text)) for text in texts_of(row, "rephrase"))
    return EditRecord(
        id=id,
        question=Question(text=text_of(row, "src"), id=id, answers=targets),
        target=text_of(row, "alt"),
        probes=(*rephrases, *unrelated_texts(row)),
        group=group,
        extra=rest_of(row, *_TEXTUAL) | lists_of(row, "src"),
    )
