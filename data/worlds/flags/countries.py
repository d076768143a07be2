"""The countries and territories whose flags are shipped, and what is known about them: facts.csv and the folder png.

Sources, licences and what was changed: SOURCES.md beside this file.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from ...errors import DataError

FOLDER = Path(__file__).resolve().parent
"""The folder of facts.csv, png and splits.csv."""
_SEPARATOR = ";"


@dataclass(frozen=True, kw_only=True)
class Country:
    """A country or territory with a flag, and its facts. The first of several answers is the chief one."""

    code: str
    """ISO 3166-1 alpha-2 in lower case, "xk" for Kosovo, or ISO 3166-2 for parts of the United Kingdom ("gb-sct")."""
    name: str
    """The name as an English sentence has it behind "The capital of", such as "the Netherlands"."""
    aliases: tuple[str, ...]
    """Other names by which an answer may call it, such as "Holland"."""
    is_country: bool
    """Whether it is a member of the United Nations (193 are)."""
    same_flag_as: str | None
    """The code of the country whose flag it flies, or whose flag looks the same; None if its flag is its own."""
    capital: tuple[str, ...]
    """The capital, then its other spellings and other seats of government; empty if there is none."""
    continent: tuple[str, ...]
    """The continent, then others it belongs to, and parts of continents that are named like one."""
    currency: tuple[str, ...]
    """The currency's long name, such as "Swiss franc", then its other names and other currencies in use."""
    languages: tuple[str, ...]
    """Official and widely spoken languages, each with its other names."""
    neighbours: tuple[str, ...]
    """Codes of the countries with which it shares a land border."""

    @property
    def short_name(self) -> str:
        """The name without its article, such as "Netherlands"."""
        return self.name.removeprefix("the ")

    @property
    def has_own_flag(self) -> bool:
        """Whether its flag tells it from all others; questions about pictures are asked about these only."""
        return self.same_flag_as is None


def read_countries(path: Path = FOLDER / "facts.csv") -> tuple[Country, ...]:
    """Return the countries and territories of a table such as facts.csv, ordered by code.

    Raises:
        DataError: The table cannot be read, or lacks a column.

    Example:
        >>> from multrace.data.worlds.flags import read_countries
        >>> countries = read_countries()
        >>> len(countries), sum(country.is_country for country in countries)
        (254, 193)
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; install multrace again") from error
    if not rows or (missing := {field.name for field in fields(Country)} - rows[0].keys()):
        lack = f"the columns {', '.join(sorted(missing))}" if rows else "rows"
        raise DataError(f"{str(path)!r} lacks {lack}; pass a table with the columns of facts.csv")
    return tuple(_country(row) for row in rows)


def _country(row: dict[str, str]) -> Country:
    lists = ("aliases", "capital", "continent", "currency", "languages", "neighbours")
    return Country(
        code=row["code"],
        name=row["name"],
        is_country=row["is_country"] == "yes",
        same_flag_as=row["same_flag_as"] or None,
        **{name: tuple(filter(None, row[name].split(_SEPARATOR))) for name in lists},
    )


def flag_of(code: str) -> Image.Image:
    """Return the flag of the country with this code: RGBA, 100 pixels wide, transparent outside the cloth (Nepal).

    Raises `DataError` if there is no such code.
    """
    path = FOLDER / "png" / f"{code}.png"
    if not path.is_file():
        raise DataError(f"no flag of {code!r}; pass a code of facts.csv, such as 'fr' or 'gb-sct'")
    with Image.open(path) as image:
        return image.convert("RGBA")
