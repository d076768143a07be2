"""Reader of VLKEB (arXiv 2403.07350): the fields of MMEdit, and portability questions in two shapes under one key.

The main file has no portability questions. The one-hop file has `port_new` with `port_q` and `port_a`, the multi-hop
files have `port_new` with `port_type` ("1-hop" to "4-hop") and "Q&A".
"""

from collections.abc import Iterator
from typing import Any

from ..facts import PORTABILITY, Probe
from .mmedit import visual_edit
from .rows import DataSource, Outcome, Row, answered, each_row, json_rows, objects_of, rest_of


def read_vlkeb(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of a main, one-hop or multi-hop file, and a `DataError` for each unreadable row."""
    return each_row(
        json_rows(source),
        lambda number, row: [visual_edit(source, row, str(number), "port_new", more=portability(source, row))],
    )


def portability(source: DataSource, row: Row) -> tuple[Probe, ...]:
    """Return the portability probes of a row: questions about the edited picture that need the new fact."""
    image = source.pictures(row, "image")
    probes: list[Probe] = []
    for entry in objects_of(row, "port_new"):
        if "Q&A" in entry:
            probes.extend(hop(entry, image))
        else:
            extra = rest_of(entry, "port_q", "port_a")
            probes.extend(answered(PORTABILITY, entry, "port_q", ("port_a",), image=image, extra=extra, hops=1))
    return tuple(probes)


def hop(entry: Row, image: Any, needs: tuple[str, ...] = ()) -> tuple[Probe, ...]:
    """Return the portability probes of an entry with "Q&A", which is one pair or a list; incomplete pairs have none."""
    hops = hops_of(entry)
    parts = {"image": image, "hops": hops, "needs": needs}
    known = ("Q&A", "port_type") if hops or needs else ("Q&A",)
    return tuple(
        probe
        for pair in objects_of(entry, "Q&A")
        for probe in answered(
            PORTABILITY,
            pair,
            "Question",
            ("Answer",),
            extra=rest_of(pair, "Question", "Answer") | rest_of(entry, *known),
            **parts,
        )
    )


def hops_of(entry: Row) -> int | None:
    """Return the number of hops of "2-hop"; None for other types of portability."""
    number, _, unit = str(entry.get("port_type", "")).partition("-")
    return int(number) if unit == "hop" and number.isdecimal() and int(number) else None
