"""The inhabitants of the synthetic world, drawn from one seed (names, looks and facts), and how they are asked about.

In every list of question templates the last one is held out: training never shows it. {x} is the visual constraint (or
a name), {c} the textual constraint of a two-constraint relation.
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
    """One relation of a kind of entity, with templates and, for two-constraint questions, textual constraints."""

    name: str
    kind: str
    templates: tuple[str, ...]
    text_constraints: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of entity: how a picture of it is referred to, and what its look is called."""

    name: str
    phrases: tuple[str, ...]
    """Visual constraints that pick the only entity of this kind in the picture."""
    sides: Mapping[str, str]
    """Visual constraints for a picture with two of the kind: "left" and "right"."""
    name_templates: tuple[str, ...]
    attributes: Mapping[str, tuple[tuple[str, ...], str]]
    """Attribute -> (templates, the visual constraint in them); attributes are colour, shape and place."""


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
    """The relation of that name; StopIteration cannot happen for names of this world's own facts."""
    return next(row for row in RELATIONS if row.name == name)


def word(template: str, constraint: str, text_constraint: str | None = None) -> tuple[str, str]:
    """(question, constraint as it stands in the question): the template filled in and started with a capital letter."""
    text = template.format(x=constraint, c=text_constraint)
    if template.startswith("{x}"):
        constraint = constraint[:1].upper() + constraint[1:]
    return text[:1].upper() + text[1:], constraint


# ---- who there is ----

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
"""(relation, textual constraint or None)."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """One inhabitant: `index` in the world, kind, name, look, attributes and facts; `taught` is False for long-tail
    entities.
    """

    index: int
    kind: str
    name: str
    glyph: Glyph
    attributes: Mapping[str, str]
    facts: Mapping[FactKey, str]
    taught: bool

    @property
    def figure(self) -> Figure:
        """What to draw."""
        return Figure(kind=self.kind, glyph=self.glyph)


def _names(rng: random.Random, count: int, endings: str, taken: set[str], shortest: int = 5) -> list[str]:
    """`count` new invented names with the given endings; `taken` grows by them."""
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
    """`count` glyphs any two of which differ in at least two parts, so that no entity is a shade of another."""
    looks: list[Glyph] = []
    while len(looks) < count:
        look = draw()
        if all(sum(a != b for a, b in zip(look, other, strict=True)) >= 2 for other in looks):
            looks.append(look)
    rng.shuffle(looks)
    return looks


class _Supply:
    """The values that facts are drawn from: people and films are never used twice, the rest may repeat."""

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
    """Entities of three kinds, `taught` + `long_tail` of each; the same seed gives the same world."""
    rng = random.Random(seed)
    used: set[str] = set()
    count = taught + long_tail
    surnames = _names(rng, count, "sky berg ini son", used)
    first_names = _names(rng, 20, "a us el", used, shortest=4)
    names = {
        "company": _names(rng, count, "ex ico ax tek on", used),
        "country": _names(rng, count, "ia land stan ovia", used),
        "person": [f"{rng.choice(first_names)} {surname}" for surname in surnames],
    }
    colours = list(COLOURS)
    looks = {
        "company": _looks(rng, count, lambda: (rng.choice(OUTLINES), rng.choice(MARKS), *rng.sample(colours, 2))),
        "country": _looks(rng, count, lambda: (rng.choice(PATTERNS), *rng.sample(colours, 3))),
        "person": _looks(
            rng,
            count,
            lambda: (
                rng.choice(HATS),
                rng.choice(FACES),
                rng.choice(colours),
                rng.choice(colours),
                str(rng.randrange(len(SKINS))),
            ),
        ),
    }
    supply = _Supply(rng, used)
    entities: list[Entity] = []
    for is_taught, numbers in ((True, range(taught)), (False, range(taught, count))):
        for kind in names:
            for number in numbers:
                glyph = looks[kind][number]
                facts = {
                    (row.name, text): supply.value(row.name)
                    for row in RELATIONS
                    if row.kind == kind
                    for text in row.text_constraints or (None,)
                }
                colour = glyph[1] if kind == "country" else glyph[2]
                entities.append(
                    Entity(
                        index=len(entities),
                        kind=kind,
                        name=names[kind][number],
                        glyph=glyph,
                        facts=facts,
                        attributes={"colour": colour, "shape": glyph[0]},
                        taught=is_taught,
                    )
                )
    return tuple(entities)
