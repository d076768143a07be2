"""One door to every data file: which format it has, and its records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path

from ..errors import DataError
from ..facts import EditRecord, Question
from ..jsonl import read_lines
from .cckeb import read_cckeb
from .counterfact import read_counterfact
from .gqa_flow import read_gqa_flow
from .mmedit import read_mmedit
from .mmke import read_mmke
from .okvqa import read_okvqa
from .rows import DataSource, Outcome, Row, csv_rows, json_rows, read_text, wrapped
from .vlkeb import read_vlkeb
from .vqa_constraints import read_vqa_constraints
from .zsre import read_zsre

LINES = "lines"
_FREEBASE = re.compile(r"(^|[/\\])m\.\w+[/\\]")
"""The folder of an entity's pictures in VLKEB, such as m.0xyz."""
_LOOKED_AT = 100
"""Number of rows by which a format is told: the first may lack a key."""
_SPECIFIC = ("vqa-constraints", "gqa-flow", "cckeb", "mmke", "vlkeb", "mmedit", "counterfact", "zsre", "okvqa")
"""Formats of JSON, those first whose rows have the keys of others too."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One form of data files."""

    title: str
    """What it is, for people."""
    read: Callable[[DataSource], Iterator[tuple[int, Outcome]]]


def _read_lines(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    return read_lines(source.path, images=source.images)


FORMATS: Mapping[str, Format] = {
    LINES: Format(title="multrace's own: one JSON object per line", read=_read_lines),
    "vqa-constraints": Format(title="VQA-Constraints, a CSV file (arXiv 2406.04236)", read=read_vqa_constraints),
    "mmedit": Format(title="E-VQA and E-IC of MMEdit (arXiv 2310.08475)", read=read_mmedit),
    "vlkeb": Format(title="VLKEB: main, one-hop, multi-hop (arXiv 2403.07350)", read=read_vlkeb),
    "mmke": Format(title="MMKE-Bench: entity, visual, user (arXiv 2502.19870)", read=read_mmke),
    "cckeb": Format(title="CCKEB: visual and textual edits together (MemEIC)", read=read_cckeb),
    "counterfact": Format(title="CounterFact in ROME's or EasyEdit's form (arXiv 2202.05262)", read=read_counterfact),
    "zsre": Format(title="zsRE in MEND's form (arXiv 2110.11309)", read=read_zsre),
    "okvqa": Format(title="OK-VQA: a pool of questions, or questions with annotations", read=read_okvqa),
    "gqa-flow": Format(title="GQA subsets with boxes, a CSV file or a folder (arXiv 2411.18620)", read=read_gqa_flow),
}
"""The formats by the names that commands take."""


def read_data(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    images: str | PathLike[str] | None = None,
    answers: str | PathLike[str] | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Return the records of a data file one by one, each with the number of its row or line.

    No picture is opened; a row that cannot be read yields its `DataError`, and the others go on.

    Args:
        path: The file, or a folder of GQA's CSV files.
        format: One of FORMATS; None to tell it by the content.
        images: Folder of the pictures that the rows name; None for the file's own folder.
        answers: File or folder of OK-VQA answers for the questions of VQA-Constraints.

    Returns:
        (row number from 1, or line number; a `Question`, an `EditRecord`, or the `DataError` of the row).

    Raises:
        DataError: The file cannot be read, is empty, or has an unknown format.

    Example:
        >>> from multrace.data import read_data
        >>> with open("facts.jsonl", "w") as file:
        ...     _ = file.write('{"id": "1", "question": "Who won?", "target": "Ada"}')
        >>> list(read_data("facts.jsonl"))
        [(1, EditRecord('Who won?' -> 'Ada', no picture))]
    """
    source = DataSource(
        path=Path(path),
        images=None if images is None else Path(images),
        answers=None if answers is None else Path(answers),
    )
    name = format or detect_format(source.path)
    if name not in FORMATS:
        raise DataError(f"no format {name!r}; use one of {', '.join(FORMATS)}")
    outcomes = FORMATS[name].read(source)
    first = list(islice(outcomes, 1))
    if not first:
        raise DataError(f"{str(source.path)!r} has no records; it is empty, so pass a file with records")
    yield from first
    yield from outcomes


def read_records(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    images: str | PathLike[str] | None = None,
    answers: str | PathLike[str] | None = None,
    problems: list[str] | None = None,
) -> tuple[Question | EditRecord, ...]:
    """Return all records of a data file.

    Args:
        path: The file, or a folder of GQA's CSV files.
        format: One of FORMATS; None (default) to detect it from the content.
        images: The folder that the paths of pictures start from; None (default) for the folder of the file.
        answers: A file or folder of OK-VQA, with the answers to the questions of VQA-Constraints; None (default) for
            none.
        problems: A list to which the errors of unreadable rows are appended; None (default) to raise the first error.

    Returns:
        The records, in the order of the rows.

    Raises:
        DataError: The file or, without `problems`, a row cannot be read, or no row can.

    Example:
        >>> from multrace.data import read_records
        >>> with open("facts.jsonl", "w") as file:
        ...     _ = file.write('{"id": "1", "question": "Who won?"}')
        >>> read_records("facts.jsonl")
        (Question('Who won?', no picture),)
    """
    records, wrong = [], []
    for number, outcome in read_data(path, format=format, images=images, answers=answers):
        if not isinstance(outcome, DataError):
            records.append(outcome)
        elif problems is None:
            raise DataError(f"{str(path)!r}, row {number}: {outcome}") from outcome
        else:
            wrong.append(f"row {number}: {outcome}")
    if not records:
        raise DataError(f"no row of {str(path)!r} can be read; {wrong[0]}")
    if problems is not None:
        problems.extend(wrong)
    return tuple(records)


def detect_format(path: str | PathLike[str]) -> str:
    """Return which of FORMATS a file has, by its columns or by the keys of its first objects.

    Raises `DataError` if the file cannot be read, or if its columns or keys are not those of a known format.
    """
    path = Path(path)
    if path.is_dir():
        return "gqa-flow"
    if path.suffix.lower() == ".csv":
        header = next((cells for _, cells in csv_rows(path)), [])
        return "vqa-constraints" if isinstance(header, list) and "main_entity" in map(str.strip, header) else "gqa-flow"
    try:
        text = read_text(path).lstrip()
    except DataError:
        if _starts_with_object(path):  # one line that is not UTF-8 costs only itself
            return LINES
        raise
    if not text:
        raise DataError(f"{str(path)!r} has no records; it is empty, so pass a file with records")
    is_array = text[:1] == "["
    if not is_array and '"questions"' in text[:100_000] and '"target"' not in text[:100_000]:
        return "okvqa"
    first = [row for _, row in islice(json_rows(DataSource(path=path)), _LOOKED_AT)]
    rows = [row for row in first if not isinstance(row, DataError)]
    broken = [row for row in first if isinstance(row, DataError)]
    names = [name for row in rows if (name := _format_of(row)) is not None]
    is_wrapped = not is_array and wrapped(text) is not None
    if not is_array and not is_wrapped and 2 * len(names) < len(rows):
        return LINES
    if not names and is_wrapped:
        raise DataError(f"{str(path)!r} is one JSON object over several lines or around others; write one per line")
    if not names and is_array:
        if broken and not rows:
            raise broken[0]
        keys = ", ".join(map(repr, rows[0] if rows else ())) or "nothing"
        raise DataError(
            f"{str(path)!r} is a JSON array of objects with {keys[:200]}, which no known format has; pass the format "
            f"({', '.join(FORMATS)}) or write one object per line ({LINES})"
        )
    return min(names, key=_SPECIFIC.index, default=LINES)


def _starts_with_object(path: Path) -> bool:
    """Whether the file is there and begins like one with a JSON object per line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _format_of(row: Row) -> str | None:
    """The public format whose objects have such keys; None if there is none."""
    keys = row.keys()
    if {"question", "main_entity", "image_url"} <= keys:
        return "vqa-constraints"
    if {"img_id", "image_w"} <= keys:
        return "gqa-flow"
    if "textual_edit" in keys:
        return "cckeb"
    if keys & {"knowledge_type", "m_rel", "m_rel_1"}:
        return "mmke"
    if "requested_rewrite" in keys or {"prompt", "target_new"} <= keys:
        return "counterfact"
    if {"src", "alt", "image"} <= keys:
        is_vlkeb = "port_new" in keys or _FREEBASE.search(str(row["image"])) is not None
        return "vlkeb" if is_vlkeb else "mmedit"
    if {"src", "alt"} <= keys:
        return "zsre"
    answers = row.get("answer") or row.get("answers")
    if {"question", "question_id"} <= keys and keys & {"image", "image_id"} and isinstance(answers, list):
        return "okvqa"
    return None
