"""The inhabitants of the synthetic world: names, looks and facts, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .drawing import Figure
from .glyphs import COLOURS, FACES, HATS, MARKS, OUTLINES, PATTERNS, SKINS, Glyph
from .questions import RELATIONS

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
