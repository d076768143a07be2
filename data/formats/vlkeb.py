"""Reader of VLKEB (arXiv 2403.07350): the fields of MMEdit, and portability questions in two shapes under one key.

The main file has no portability questions. The one-hop file has `port_new` with `port_q` and `port_a`, the multi-hop
files have `port_new` with `port_type` ("1-hop" to "4-hop") and "Q&A".
"""

from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..facts import PORTABILITY, Probe
from .mmedit import visual_edit
from .rows import DataSource, Outcome, Row, answered, each_row, json_rows, objects_of, probes_of, rest_of, text_of


def read_vlkeb(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of a main, one-hop or multi-hop file, and a `DataError` for each unreadable row."""
    return each_row(
        json_rows(source),
        lambda number, row: [visual_edit(source, row, str(number), "port_new", more=portability(source, row))],
    )


def portability(source: DataSource, row: Row) -> tuple[Probe, ...]:
    """Return the portability probes of a row: questions about the edited picture that need the new fact."""
    image = source.picture(text_of(row, "image"))
    probes = []
    for entry in objects_of(row, "port_new"):
        if "Q&A" in entry:
            probes.append(hop(entry, image))
        else:
            extra = rest_of(entry, "port_q", "port_a")
            probes.append(answered(PORTABILITY, entry, "port_q", ("port_a",), image=image, extra=extra, hops=1))
    return probes_of(*probes)


def hop(entry: Row, image: Path, needs: tuple[str, ...] = ()) -> Probe | None:
    """Return the portability probe of an entry with "Q&A"; None if its question or answer is missing."""
    pair = question_and_answer(entry)
    extra = rest_of(pair, "Question", "Answer")
    return answered(
        PORTABILITY, pair, "Question", ("Answer",), image=image, extra=extra, hops=hops_of(entry), needs=needs
    )


def question_and_answer(entry: Row) -> Row:
    """Return the question and answer of a portability entry. Raises `DataError` if it has none."""
    pair = entry.get("Q&A")
    if not isinstance(pair, dict):
        raise DataError(f"'Q&A' is of type {type(pair).__name__}; it should be an object with Question and Answer")
    return pair


def hops_of(entry: Row) -> int | None:
    """Return the number of hops of "2-hop"; None for other types of portability."""
    number, _, unit = str(entry.get("port_type", "")).partition("-")
    return int(number) if unit == "hop" and number.isdecimal() and int(number) else None
