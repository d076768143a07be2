"""Reader of MMKE-Bench (arXiv 2502.19870): free-text knowledge of entities, visual meanings and users' own things.

Besides the fields of MMEdit there are questions on the edited knowledge: `rel_1` and `rel_2` (or `rel`) without a
picture, `m_rel_1` and `m_rel_2` (or `m_rel`) with the edited picture, which are asked about the second picture too.
The answers are spelled `rel_ans_1` or `rel_1_ans`.
"""

from collections.abc import Iterator

from ..facts import RELATED_PICTURE, RELATED_TEXT, EditRecord, Probe
from .mmedit import visual_edit
from .rows import DataSource, Outcome, Row, answered, each_row, json_rows, objects_of
from .vlkeb import hop

_RELATED = ("rel", "rel_1", "rel_2")
_KNOWN = ("port_new", "one_hop_img", "image_rephrase_question")


def read_mmke(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of one of the JSON files, and a `DataError` for each unreadable row."""
    return each_row(json_rows(source), lambda number, row: [_record(source, row, str(number))])


def _record(source: DataSource, row: Row, id: str) -> EditRecord:
    keys = [key for name in _RELATED for key in (name, *_answer_keys(name), f"m_{name}", *_answer_keys(f"m_{name}"))]
    return visual_edit(source, row, id, *keys, *_KNOWN, more=(*_related(source, row), *_portability(source, row)))


def _related(source: DataSource, row: Row) -> Iterator[Probe]:
    shown = (source.pictures(row, key) for key in ("image", "image_rephrase"))
    pictures = [picture for picture in shown if picture is not None]
    for name in _RELATED:
        yield from answered(RELATED_TEXT, row, name, _answer_keys(name))
        for picture in pictures:
            yield from answered(RELATED_PICTURE, row, f"m_{name}", _answer_keys(f"m_{name}"), image=picture)


def _portability(source: DataSource, row: Row) -> Iterator[Probe]:
    image = source.pictures(row, "one_hop_img") or source.pictures(row, "image")
    return (probe for entry in objects_of(row, "port_new") for probe in hop(entry, image))


def _answer_keys(name: str) -> tuple[str, ...]:
    """Both spellings of the key of an answer, such as rel_ans_1 and rel_1_ans."""
    stem, _, number = name.rpartition("_")
    return (f"{name}_ans", f"{stem}_ans_{number}") if number.isdecimal() else (f"{name}_ans",)
