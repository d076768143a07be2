"""The wording of the synthetic world: relations, question templates and the phrases that point at something in the
picture.

In every list of templates the last one is held out: training never shows it. {x} is the visual constraint (or a name),
{c} the textual constraint of a two-constraint relation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
