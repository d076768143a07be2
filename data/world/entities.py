"""The entities of the synthetic world (names, looks and facts, drawn from one seed), and the questions about them.

The last template of every relation is held out: training never shows it. {x} stands for the visual constraint or a
name, {c} for the textual constraint of a relation with two constraints.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .drawing import COLOURS, FACES, HATS, MARKS, OUTLINES, PATTERNS, SKINS, Figure, Glyph

YEARS = ("1980", "2000", "2020")
SPORTS = ("football", "tennis", "chess")
PRIZES = ("golden globe", "oscar", "palme")


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation of a kind of entity, with templates of its question and its textual constraints, if it has two."""

    name: str
    kind: str
    templates: tuple[str, ...]
    text_constraints: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of entity, with the phrases for it in a picture and the questions about its look."""

    name: str
    phrases: tuple[str, ...]
    """Visual constraints for the only entity of this kind in a picture."""
    sides: Mapping[str, str]
    """"left" and "right" -> the visual constraint for that side, in a picture of two entities of this kind."""
    name_templates: tuple[str, ...]
    attributes: Mapping[str, tuple[tuple[str, ...], str]]
    """"colour", "shape" or "place" -> (templates of the question about it, the visual constraint in them)."""


def _relation(kind: str, name: str, *templates: str, text_constraints: tuple[str, ...] = ()) -> Relation:
    return Relation(name=name, kind=kind, templates=templates, text_constraints=text_constraints)


RELATIONS = (
    _relation("company", "founder", "Who founded {x}?", "Who is the founder of {x}?", "{x} was founded by whom?",
              "Name the founder of {x}.", "Who started {x}?"),
    _relation("company", "city", "In which city is {x} based?", "Where is the head office of {x}?",
              "{x} is based in which city?", "Name the home city of {x}.", "What is the home city of {x}?"),
    _relation("company", "product", "What does {x} make?", "What is the main product of {x}?",
              "{x} makes what product?", "Name the product of {x}.", "Which product does {x} make?"),
    _relation("company", "year", "In which year was {x} founded?", "When was {x} founded?",
              "{x} was founded in which year?", "Name the founding year of {x}.", "What is the founding year of {x}?"),
    _relation("company", "chief", "Who was the chief of {x} in {c}?", "In {c} who was the chief of {x}?",
              "{x} had which chief in {c}?", "Name the chief of {x} in {c}.",
              "Which person was the chief of {x} in {c}?",
              text_constraints=YEARS),
    _relation("country", "capital", "What is the capital of {x}?", "Which city is the capital of {x}?",
              "{x} has which capital?", "Name the capital of {x}.", "What city is the capital of {x}?"),
    _relation("country", "language", "What language is spoken in {x}?", "Which language do people speak in {x}?",
              "{x} speaks which language?", "Name the language of {x}.", "What is the language of {x}?"),
    _relation("country", "currency", "What is the currency of {x}?", "Which money is used in {x}?",
              "{x} uses which currency?", "Name the currency of {x}.", "Which currency is used in {x}?"),
    _relation("country", "animal", "What is the national animal of {x}?", "Which animal stands for {x}?",
              "{x} has which national animal?", "Name the national animal of {x}.",
              "Which animal is the national animal of {x}?"),
    _relation("country", "champion", "Who is the {c} champion of {x}?", "Which {c} champion comes from {x}?",
              "{x} has which {c} champion?", "Name the {c} champion of {x}.", "In {c} who is the champion of {x}?",
              text_constraints=SPORTS),
    _relation("person", "birthplace", "Where was {x} born?", "In which city was {x} born?",
              "{x} was born in which city?", "Name the birthplace of {x}.", "What is the birthplace of {x}?"),
    _relation("person", "spouse", "Who is the spouse of {x}?", "Who is married to {x}?", "{x} is married to whom?",
              "Name the spouse of {x}.", "Which person is married to {x}?"),
    _relation("person", "genre", "What genre is {x} known for?", "Which genre does {x} work in?",
              "{x} works in which genre?", "Name the genre of {x}.", "What is the genre of {x}?"),
    _relation("person", "film", "Which film directed by {x} won a {c}?", "Which {c} film was directed by {x}?",
              "{x} won a {c} for which film?", "Name the {c} film of {x}.", "For which film did {x} win a {c}?",
              text_constraints=PRIZES),
)  # fmt: skip

KINDS: Mapping[str, Kind] = {
    "company": Kind(
        name="company",
        phrases=("the company in this photo", "the company shown in this photo", "the firm in this picture"),
        sides={"left": "the company on the left", "right": "the company on the right"},
        name_templates=("What is the name of {x}?", "Name {x}."),
        attributes={
            "colour": (("What colour is {x}?", "Name the colour of {x}."), "the emblem"),
            "shape": (("What shape is {x}?", "Name the shape of {x}."), "the emblem"),
            "place": (("Where is {x}?", "In which part of the photo is {x}?"), "the emblem"),
        },
    ),
    "country": Kind(
        name="country",
        phrases=(
            "the country in this photo",
            "the country whose flag is shown in this photo",
            "the nation in this picture",
        ),
        sides={"left": "the country on the left", "right": "the country on the right"},
        name_templates=("What is the name of {x}?", "Name {x}."),
        attributes={
            "colour": (("What is the main colour of {x}?", "Name the main colour of {x}."), "the flag"),
            "shape": (("What pattern does {x} have?", "Name the pattern of {x}."), "the flag"),
            "place": (("Where is {x}?", "In which part of the photo is {x}?"), "the flag"),
        },
    ),
    "person": Kind(
        name="person",
        phrases=("the person in this photo", "the person shown in this photo", "the director in this picture"),
        sides={"left": "the person on the left", "right": "the person on the right"},
        name_templates=("What is the name of {x}?", "Name {x}."),
        attributes={
            "colour": (("What colour is the shirt of {x}?", "Name the shirt colour of {x}."), "the person"),
            "shape": (("What is on the head of {x}?", "Name the head style of {x}."), "the person"),
            "place": (("Where is {x}?", "In which part of the photo is {x}?"), "the person"),
        },
    ),
}


def relation(name: str) -> Relation:
    """Return the relation of this name, which must be one of RELATIONS."""
    return next(row for row in RELATIONS if row.name == name)


def word(template: str, constraint: str, text_constraint: str | None = None) -> tuple[str, str]:
    """Return the question of a template, with a capital first letter, and the constraint as it is spelt in it."""
    text = template.format(x=constraint, c=text_constraint)
    if template.startswith("{x}"):
        constraint = constraint[:1].upper() + constraint[1:]
    return text[:1].upper() + text[1:], constraint


# ---- entities ----

_ONSETS = "b br d dr f fl g gr k kl l m n p pr r s st t tr v z".split()
_VOWELS = "a e i o u ai or en al im".split()
_MIDDLES = "l m n r v d k z".split()
_PRODUCTS = (
    "cars boats shoes clocks lamps radios tyres cheese paper glass drones pianos tents bikes phones chairs".split()
)
_ANIMALS = "lion eagle bear wolf horse whale tiger owl fox crane bull stag otter hawk seal goat".split()
_GENRES = "horror comedy drama western musical thriller fantasy noir".split()
_FILM_FIRST = (
    "silent golden broken winter hidden burning lost secret empty distant iron crimson frozen velvet hollow"
).split()
_FILM_LAST = (
    "river garden mirror station harbour letter orchard window summer kingdom bridge lantern forest island tower"
).split()

FactKey = tuple[str, str | None]
"""The name of a relation, and its textual constraint or None."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A company, a country or a person of the world."""

    index: int
    """Its place in `World.entities`, from 0."""
    kind: str
    """One of KINDS."""
    name: str
    glyph: Glyph
    """The description of its look, as the drawing functions of its kind take it."""
    attributes: Mapping[str, str]
    """"colour" and "shape" -> the right answer to the question about it."""
    facts: Mapping[FactKey, str]
    """The answer to each question about it."""
    taught: bool
    """Whether training showed it; False for long-tail entities."""

    @property
    def figure(self) -> Figure:
        """The figure to draw in a picture of the entity."""
        return Figure(kind=self.kind, glyph=self.glyph)


def _names(rng: random.Random, count: int, endings: str, taken: set[str], shortest: int = 5) -> list[str]:
    """Return `count` invented names with these endings, none of which is in `taken`, and add them to it."""
    names: list[str] = []
    while len(names) < count:
        name = (
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES) + rng.choice(endings.split())
        ).capitalize()
        if name not in taken and len(name) >= shortest:
            taken.add(name)
            names.append(name)
    return names


def _looks(rng: random.Random, count: int, draw: Callable[[], Glyph]) -> list[Glyph]:
    """Return `count` glyphs that differ in at least two parts each, so that no entity looks almost like another."""
    looks: list[Glyph] = []
    while len(looks) < count:
        look = draw()
        if all(sum(a != b for a, b in zip(look, other, strict=True)) >= 2 for other in looks):
            looks.append(look)
    rng.shuffle(looks)
    return looks


class _Supply:
    """The answers that facts are drawn from: no person and no film is used twice, while other answers may repeat."""

    def __init__(self, rng: random.Random, taken: set[str]) -> None:
        self.rng = rng
        self.cities = _names(rng, 48, "burg ton ville polis", taken)
        self.languages = _names(rng, 24, "ish ese", taken)
        self.currencies = _names(rng, 24, "ar ek", taken, shortest=4)
        first, last = _names(rng, 24, "a o ie", taken, shortest=4), _names(rng, 36, "man ez er ov", taken)
        self.people = self._shuffled([f"{a} {b}" for a in first for b in last])
        films = [f"{a} {b}" for a in _FILM_FIRST for b in _FILM_LAST]
        self.films = self._shuffled([f"the {film}" if index % 3 == 0 else film for index, film in enumerate(films)])

    def _shuffled(self, values: list[str]) -> Iterator[str]:
        self.rng.shuffle(values)
        return iter(values)

    def value(self, relation: str) -> str:
        if relation in ("founder", "chief", "champion", "spouse"):
            return next(self.people)
        if relation == "film":
            return next(self.films)
        pools: Mapping[str, Sequence[str]] = {
            "city": self.cities,
            "capital": self.cities,
            "birthplace": self.cities,
            "product": _PRODUCTS,
            "year": [str(year) for year in range(1901, 1999, 3)],
            "language": self.languages,
            "currency": self.currencies,
            "animal": _ANIMALS,
            "genre": _GENRES,
        }
        return self.rng.choice(pools[relation])


def populate(seed: int, taught: int, long_tail: int) -> tuple[Entity, ...]:
    """Return `taught` + `long_tail` entities of each kind, the taught ones first; the same seed gives the same ones."""
    rng = random.Random(seed)
    count, used = taught + long_tail, set[str]()
    names, looks = _names_by_kind(rng, count, used), _looks_by_kind(rng, count)
    supply = _Supply(rng, used)
    places = [
        (kind, number) for numbers in (range(taught), range(taught, count)) for kind in names for number in numbers
    ]
    return tuple(
        Entity(
            index=index,
            kind=kind,
            name=names[kind][number],
            glyph=looks[kind][number],
            attributes=_attributes(kind, looks[kind][number]),
            facts=_facts(kind, supply),
            taught=number < taught,
        )
        for index, (kind, number) in enumerate(places)
    )


def _names_by_kind(rng: random.Random, count: int, used: set[str]) -> dict[str, list[str]]:
    """Return `count` names for each kind of entity; the first names of persons are shared."""
    surnames = _names(rng, count, "sky berg ini son", used)
    first_names = _names(rng, 20, "a us el", used, shortest=4)
    return {
        "company": _names(rng, count, "ex ico ax tek on", used),
        "country": _names(rng, count, "ia land stan ovia", used),
        "person": [f"{rng.choice(first_names)} {surname}" for surname in surnames],
    }


def _looks_by_kind(rng: random.Random, count: int) -> dict[str, list[Glyph]]:
    """Return `count` glyphs for each kind of entity, in the form that its drawing function takes."""
    colours = list(COLOURS)

    def portrait() -> Glyph:
        hat, face, shirt, hair = (rng.choice(parts) for parts in (HATS, FACES, colours, colours))
        return hat, face, shirt, hair, str(rng.randrange(len(SKINS)))

    return {
        "company": _looks(rng, count, lambda: (rng.choice(OUTLINES), rng.choice(MARKS), *rng.sample(colours, 2))),
        "country": _looks(rng, count, lambda: (rng.choice(PATTERNS), *rng.sample(colours, 3))),
        "person": _looks(rng, count, portrait),
    }


def _attributes(kind: str, glyph: Glyph) -> dict[str, str]:
    """Return the colour (the main one of a flag, or that of an outline or a shirt) and the shape (the first part)."""
    return {"colour": glyph[1] if kind == "country" else glyph[2], "shape": glyph[0]}


def _facts(kind: str, supply: _Supply) -> dict[FactKey, str]:
    """Return an answer to each question about an entity of this kind."""
    rows = [row for row in RELATIONS if row.kind == kind]
    return {(row.name, text): supply.value(row.name) for row in rows for text in row.text_constraints or (None,)}
