"""The relations of the flags world with their cloze templates, and what counts as a right answer.

Every question is the beginning of a sentence that a language model goes on with. `{}` in a template stands for the
constraint: "the country in this photo", "the country on the left", or a name. `{flag}` stands for the same phrase with
"flag" for "country", and `{other}` for the name of a second country, the textual constraint of a shared relation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ...errors import DataError
from .countries import Country

PHRASES = ("the country in this photo", "the country shown in this photo", "the country in this picture")
"""Visual constraints for the only flag in a picture. The last one is held out: training never shows it."""
SIDES: Mapping[str, str] = {"left": "the country on the left", "right": "the country on the right"}
"""The visual constraint for each of two flags in a picture."""


@dataclass(frozen=True, kw_only=True)
class CountryRelation:
    """A relation of a country, and the templates of the questions about it."""

    name: str
    templates: tuple[str, ...]
    """Templates that training uses."""
    held_out: tuple[str, ...]
    """Templates that training never uses."""
    column: str
    """The field of `Country` that holds the answers; "name" and "neighbours" stand for names and aliases."""
    shared: bool = False
    """Whether the question names a second country, and the answer must be right for both."""

    @property
    def wordings(self) -> tuple[str, ...]:
        """All templates, those of training first."""
        return self.templates + self.held_out

    @property
    def has_name(self) -> bool:
        """Whether the question can be asked by the country's name, which of all relations "name" alone cannot."""
        return self.column != "name"


def _relation(
    name: str, column: str, *templates: str, held_out: tuple[str, ...], shared: bool = False
) -> CountryRelation:
    return CountryRelation(name=name, column=column, templates=templates, held_out=held_out, shared=shared)


RELATIONS = (
    _relation("capital", "capital", "The capital of {} is", "The capital city of {} is called",
              "{} has its capital in the city of", "The seat of government of {} is in the city of",
              held_out=("The capital city of {} is", "The name of the capital of {} is")),
    _relation("language", "languages", "The official language of {} is", "The main language spoken in {} is",
              "The national language of {} is",
              held_out=("The primary language of {} is", "In {}, the official language is")),
    _relation("continent", "continent", "{} is located in the continent of", "{} lies on the continent of",
              "{} can be found on the continent of",
              held_out=("On the map, {} is part of the continent of", "{} is a country in the continent of")),
    _relation("currency", "currency", "The currency of {} is the", "The official currency of {} is the",
              "The national currency of {} is the",
              held_out=("The currency used in {} is the", "In {}, the official currency is the")),
    _relation("border", "neighbours", "{} shares a land border with", "{} shares a border with",
              "{} shares its longest border with",
              held_out=("{} has a border with",)),
    _relation("name", "name", "The name of {} is", "{} is called",
              held_out=("{flag} is the flag of", "In English, the name of {} is")),
)  # fmt: skip

SHARED_RELATIONS = (
    _relation("shared_language", "languages", "The official language of both {} and {other} is",
              held_out=("The main language of both {} and {other} is",), shared=True),
    _relation("shared_border", "neighbours", "{} and {other} both share a border with",
              held_out=("{} and {other} both have a border with",), shared=True),
)  # fmt: skip
"""Relations with two constraints, one of them visual and one textual: the answer needs both."""


def relation_named(name: str) -> CountryRelation:
    """Return the relation of this name. Raises `DataError` if there is none."""
    rows = {row.name: row for row in (*RELATIONS, *SHARED_RELATIONS)}
    if name not in rows:
        raise DataError(f"no relation {name!r}; pass one of {', '.join(rows)}")
    return rows[name]


def cloze(template: str, constraint: str, other: str | None = None) -> tuple[str, str]:
    """Return the question of a template, with a capital first letter, and the constraint as it is spelt in it."""
    if "{flag}" in template:
        constraint = constraint.replace("country", "flag")
    if template.startswith("{"):
        constraint = constraint[:1].upper() + constraint[1:]
    return template.format(constraint, flag=constraint, other=other), constraint


# ---- answers ----

_END = re.compile(r"""[\n,;:("]|(?<!\bSt)(?<!\b[A-Z])\.""")
"""What ends an answer. A full stop does not after "St" or a single capital letter: "St. John's", "U.S. dollar"."""
_OPENINGS = ("the city of", "known as", "called", "named", "the", "a", "an")
"""Words before a name that are not part of it."""
_DIRECTIONS = frozenset("north south east west central northern southern eastern western".split()) | frozenset(
    f"{a}{b}{end}" for a in ("north", "south") for b in ("east", "west") for end in ("", "ern")
)


def answer_of(text: str) -> str:
    r"""Return the answer in a continuation: up to the first line end or one of `. , ; : ( "`, without blanks around.

    A full stop after "St" or after a single capital letter belongs to a name and does not end the answer.

    Example:
        >>> from multrace.data.worlds.flags import answer_of
        >>> answer_of(" Paris.\n\nThe"), answer_of(" U.S. dollar (USD)")
        ('Paris', 'U.S. dollar')
    """
    text = text.strip()
    match = _END.search(text)
    return (text[: match.start()] if match else text).strip().rstrip(".").rstrip()


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, without accents and apostrophes; hyphens part words."""
    plain = "".join(
        letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter)
    )
    return tuple(re.findall(r"\w+", re.sub(r"['\u2018\u2019\u02bb\u02bc.]", "", plain)))


def without_opening(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words without those that open an answer and belong to no name, such as "the", "called"."""
    for opening in (tuple(each.split()) for each in _OPENINGS):
        if words[: len(opening)] == opening and len(words) > len(opening):
            return without_opening(words[len(opening) :])
    return words


def begins_with(answer: str, accepted: Iterable[str]) -> bool:
    """Return whether an answer begins with one of these names: whole words, case, accents and articles ignored.

    Example:
        >>> from multrace.data.worlds.flags import begins_with
        >>> begins_with("the city of Brasilia", ["Brasília"]), begins_with("Romania", ["Roma"])
        (True, False)
    """
    words = without_opening(words_of(answer))
    names = map(_name_words, accepted)
    return any(words[: len(name)] == name for name in names if name)


@cache  # an answer is compared with hundreds of names, and there are few of them
def _name_words(name: str) -> tuple[str, ...]:
    return without_opening(words_of(name))


def accepted_answers(country: Country, relation: CountryRelation, by_code: Mapping[str, Country]) -> tuple[str, ...]:
    """Return what counts as a right answer, the chief one first; empty if the question has no answer.

    `by_code` finds the neighbours' names. Of a currency, every end of its long name counts: "CFA franc" and "franc".
    """
    if relation.column == "name":
        return (country.name, *country.aliases)
    if relation.column == "neighbours":
        neighbours = [by_code[code] for code in country.neighbours]
        return tuple(name for near in neighbours for name in (near.name, *near.aliases))
    values: tuple[str, ...] = getattr(country, relation.column)
    return values + tuple(end for name in values for end in _ends(name)) if relation.column == "currency" else values


def _ends(name: str) -> list[str]:
    """Return the ends of a currency's name ("CFA franc", "franc"), and the plural of each end and of the name."""
    words = name.split()
    ends = [" ".join(words[start:]) for start in range(1, len(words))]
    return ends + [f"{end}s" for end in (name, *ends)]


def is_right(answer: str, accepted: Sequence[str], relation: CountryRelation) -> bool:
    """Return whether an answer is right: it begins with one of the accepted answers (`accepted_answers`).

    Of a continent, a direction before its name is allowed: "Southeast Asia", "West Africa".
    """
    if begins_with(answer, accepted):
        return True
    words = without_opening(words_of(answer))
    part = relation.name == "continent" and len(words) > 1 and words[0] in _DIRECTIONS
    return part and words[1] != "america" and begins_with(" ".join(words[1:]), accepted)


def is_definite(answer: str, relation: CountryRelation, known: Sequence[str]) -> bool:
    """Return whether an answer names something of the kind asked for, right or wrong, and does not evade the question.

    "the capital of the Commonwealth", "a blend of French and English" and "22 countries" evade it. A capital is any
    name: a word with a capital letter behind the opening words. A currency has the noun of one of the currencies
    `known` among its words. Any other answer begins with one of the answers `known` to the relation.
    """
    if relation.name == "capital":
        opening = re.match(rf"(?:(?:{'|'.join(_OPENINGS)})\s+)*", answer)
        return answer[opening.end() if opening else 0 :][:1].isupper()
    if relation.name == "currency":
        nouns = {noun for name in known for noun in _name_words(name)[-1:]}
        return any(each.removesuffix("s") in nouns or each in nouns for each in words_of(answer))
    return is_right(answer, known, relation)
