"""The splits of the flags world: which facts a model knows, about which it errs, and which it never heard of.

They come from what the model itself answers: to the question about held-out rendering 0 of the flag, and to the same
question by name. `python -m multrace.scripts.studies.flags_splits` asks it and writes splits.csv.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...errors import DataError
from ...jsonl import write_text
from .countries import FOLDER

KNOWN, WRONG, LONG_TAIL = "known", "wrong", "long_tail"
SPLITS: Mapping[str, str] = {
    KNOWN: "right by picture, and by name where the question can be asked by name: to keep and to trace",
    WRONG: "a definite but wrong answer by picture: a real error, to fix",
    LONG_TAIL: "wrong both ways, about a territory or without a definite answer by name: facts never learned",
}
"""Name of a split -> what it holds. Facts that fit none are in none, such as those right by picture alone."""
CHOOSING, REPORTING = "choosing", "reporting"
HALVES = (CHOOSING, REPORTING)
"""The halves of each split: settings are chosen on one and results are reported on the other."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer is right, and whether it names something of the kind asked for."""

    true: bool
    definite: bool


@dataclass(frozen=True, kw_only=True)
class SplitRow:
    """A fact in a split, with what the model answered: a row of splits.csv."""

    id: str
    """The id of the fact."""
    country: str
    """The code of its country."""
    relation: str
    """The name of its relation."""
    split: str
    """One of SPLITS."""
    half: str
    """One of HALVES."""
    answer: str
    """The model's answer to the question about held-out rendering 0."""
    by_name: str
    """The model's answer to the question by name; empty if it cannot be asked so."""
    truth: str
    """The true answer."""


def split_for(by_picture: Verdict, by_name: Verdict | None, *, territory: bool) -> str | None:
    """Return the split of a fact, or None if it fits none.

    Args:
        by_picture: The verdict on the answer about the picture.
        by_name: The verdict on the answer by name; None if the question cannot be asked so.
        territory: Whether the country is no member of the United Nations.

    Example:
        >>> from multrace.data.worlds.flags.splits import Verdict, split_for
        >>> right, evasive = Verdict(true=True, definite=True), Verdict(true=False, definite=False)
        >>> split_for(right, right, territory=False), split_for(evasive, evasive, territory=False)
        ('known', 'long_tail')
    """
    if by_picture.true:
        return KNOWN if by_name is None or by_name.true else None
    if by_name is not None and not by_name.true and (territory or not by_name.definite):
        return LONG_TAIL
    return WRONG if by_picture.definite else None


def halves_of(groups: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the half of each id, so that each group (split, relation) is cut in the middle.

    Within a group, ids alternate in the order of their SHA-256; every second group begins with the other half.
    """
    halves: dict[str, str] = {}
    for number, group in enumerate(sorted(set(groups.values()))):
        members = sorted(
            (id for id, own in groups.items() if own == group), key=lambda id: hashlib.sha256(id.encode()).digest()
        )
        halves |= {id: HALVES[(place + number) % 2] for place, id in enumerate(members)}
    return halves


def write_splits(rows: Iterable[SplitRow], path: Path = FOLDER / "splits.csv") -> Path:
    """Write the rows as a CSV file that `read_splits` reads to equal rows, all of it or nothing; return its path."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(SplitRow)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    return write_text(path, [text.getvalue()])


def read_splits(path: Path = FOLDER / "splits.csv") -> tuple[SplitRow, ...]:
    """Return the rows of splits.csv, or of another file that `write_splits` wrote.

    Raises:
        DataError: The file cannot be read, lacks a column, or names an unknown split or half.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(
            f"cannot read the splits {str(path)!r}: {error.strerror or error}; pass a file that write_splits wrote, or "
            "none for the splits of the shipped model"
        ) from error
    names = [field.name for field in fields(SplitRow)]
    rows = []
    for number, row in enumerate(table, 2):
        if missing := [name for name in names if row.get(name) is None]:
            raise DataError(f"line {number} of {str(path)!r} lacks {missing[0]!r}; its columns are {', '.join(names)}")
        if row["split"] not in SPLITS or row["half"] not in HALVES:
            raise DataError(
                f"line {number} of {str(path)!r} has split {row['split']!r} and half {row['half']!r}; splits are "
                f"{', '.join(SPLITS)}, halves {', '.join(HALVES)}"
            )
        rows.append(SplitRow(**{name: row[name] for name in names}))
    return tuple(rows)


def split_rows(rows: Sequence[SplitRow], split: str, half: str | None = None) -> tuple[SplitRow, ...]:
    """Return the rows of a split, of one half or (None, the default) of both. Raises `DataError` for other names."""
    if split not in SPLITS or half not in (None, *HALVES):
        raise DataError(
            f"no split {split!r} with half {half!r}; splits are {', '.join(SPLITS)}, halves {', '.join(HALVES)}"
        )
    return tuple(row for row in rows if row.split == split and half in (None, row.half))
