"""The flags world: pictures of flags, and cloze questions about the countries to which they belong.

Unlike in the synthetic world, the facts are real: a pretrained language model knows some of them and errs about others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from ...errors import DataError
from ...facts import Question
from .countries import Country, flag_of, read_countries
from .questions import (
    PHRASES,
    RELATIONS,
    SHARED_RELATIONS,
    SIDES,
    CountryRelation,
    accepted_answers,
    cloze,
    is_definite,
    is_right,
)
from .rendering import Rendering, render, render_two
from .splits import SPLITS, SplitRow, Verdict, halves_of, read_splits, split_for, split_rows

_HELD_OUT = "held out"
_PARTNERS = 2


def generator_of(*key: str | int) -> np.random.Generator:
    """Return a generator of random numbers whose state is a hash of the key: the same on every machine and run.

    Held-out renderings have keys that begin with "held out". Training must use others, such as ("train", 17).

    Example:
        >>> from multrace.data.worlds.flags import generator_of
        >>> int(generator_of("train", 17).integers(1000)), int(generator_of("train", 17).integers(1000))
        (473, 473)
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@dataclass(frozen=True, kw_only=True)
class CountryFact:
    """A fact about a country, or about two countries if its relation is a shared one."""

    country: Country
    relation: CountryRelation
    other: Country | None = None
    """The second country of a shared relation ("the official language of both ... and France"), else None."""

    @property
    def id(self) -> str:
        """A short name that never changes, such as "fr-capital" or "ch-shared_language-it"."""
        return "-".join([self.country.code, self.relation.name, *([self.other.code] if self.other else [])])


class FlagWorld:
    """The countries, their flags, pictures of them, and the questions about them.

    Example:
        >>> from multrace.data.worlds.flags import FlagWorld
        >>> world = FlagWorld()
        >>> world.question(world.fact("fr-capital"))
        Question('The capital of the country in this photo is' -> 'Paris', no picture)
    """

    def __init__(self) -> None:
        self.countries = read_countries()
        self.relations = RELATIONS
        self._by_code = {country.code: country for country in self.countries}
        self._answers = {
            (country.code, row.column): accepted_answers(country, row, self._by_code)
            for country in self.countries
            for row in self.relations
        }

    def country(self, code: str) -> Country:
        """Return the country with this code. Raises `DataError` if there is none."""
        if code not in self._by_code:
            raise DataError(f"no country {code!r}; pass a code of facts.csv, such as 'fr' or 'gb-sct'")
        return self._by_code[code]

    @cached_property
    def pictured(self) -> tuple[Country, ...]:
        """The countries with a flag of their own; only about these are questions about pictures asked."""
        return tuple(country for country in self.countries if country.has_own_flag)

    # Facts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def facts(self) -> tuple[CountryFact, ...]:
        """The facts of countries with a flag of their own: every relation that has an answer, then shared ones."""
        return tuple(fact for fact in self._by_id.values() if fact.country.has_own_flag)

    def fact(self, id: str) -> CountryFact:
        """Return the fact with this id, such as "fr-capital". Raises `DataError` if there is none."""
        if id not in self._by_id:
            raise DataError(f"no fact {id!r}; pass the code of a country and a relation, such as 'fr-capital'")
        return self._by_id[id]

    @cached_property
    def _by_id(self) -> dict[str, CountryFact]:
        single = (CountryFact(country=country, relation=row) for country in self.countries for row in self.relations)
        shared = (fact for country in self.pictured for row in SHARED_RELATIONS for fact in self._shared(country, row))
        return {fact.id: fact for facts in (single, shared) for fact in facts if self.answers(fact)}

    def _shared(self, country: Country, relation: CountryRelation) -> Iterator[CountryFact]:
        """Yield facts about the country and another one that share some answers, but not all."""
        column = relation.column
        own = self._sets[country.code, column]
        order = generator_of("partners", country.code, relation.name).permutation(len(self._members))
        found = 0
        for peer in (self._members[place] for place in order):
            other = self._sets[peer.code, column]
            if own & other and own != other and peer.code not in (country.code, *country.neighbours):
                yield CountryFact(country=country, relation=relation, other=peer)
                found += 1
            if found == _PARTNERS:
                return

    @cached_property
    def _members(self) -> tuple[Country, ...]:
        """The members of the United Nations with a flag of their own: those that a question may name."""
        return tuple(country for country in self.pictured if country.is_country)

    @cached_property
    def _sets(self) -> dict[tuple[str, str], frozenset[str]]:
        return {key: frozenset(answers) for key, answers in self._answers.items()}

    def _values(self, country: Country, relation: CountryRelation) -> tuple[str, ...]:
        return self._answers[country.code, relation.column]

    def answers(self, fact: CountryFact) -> tuple[str, ...]:
        """Return what counts as a right answer, the chief one first; empty if the question has none."""
        values = self._values(fact.country, fact.relation)
        if fact.other is None:
            return values
        others = self._sets[fact.other.code, fact.relation.column]
        return tuple(value for value in values if value in others)

    def is_true(self, answer: str, fact: CountryFact) -> bool:
        """Return whether an answer is right: it begins with one of the right answers (see SOURCES.md for the rules).

        Example:
            >>> from multrace.data.worlds.flags import FlagWorld
            >>> world = FlagWorld()
            >>> [world.is_true(answer, world.fact("ua-capital")) for answer in ("Kiev", "the city of Kyiv", "Lviv")]
            [True, True, False]
        """
        return is_right(answer, self.answers(fact), fact.relation)

    def is_definite(self, answer: str, fact: CountryFact) -> bool:
        """Return whether an answer, right or wrong, names something of the kind asked for instead of evading."""
        return is_definite(answer, fact.relation, self._known_answers[fact.relation.column])

    @cached_property
    def _known_answers(self) -> dict[str, tuple[str, ...]]:
        """The right answers about all countries, by column."""
        values: dict[str, dict[str, None]] = {row.column: {} for row in self.relations}
        for (_, column), answers in self._answers.items():
            values[column] |= dict.fromkeys(answers)
        return {column: tuple(each) for column, each in values.items()}

    # Splits ---------------------------------------------------------------------------------------------------------

    @cached_property
    def splits(self) -> tuple[SplitRow, ...]:
        """The splits of the shipped model. Raises `DataError` if there are none."""
        return read_splits()

    def split_facts(self, split: str, half: str | None = None) -> tuple[CountryFact, ...]:
        """Return the facts of a split: "known", "wrong" or "long_tail".

        half: "choosing" or "reporting"; None (default) for both. Raises `DataError` for other names, or without splits.
        """
        return tuple(self.fact(row.id) for row in split_rows(self.splits, split, half))

    def splits_from(self, answers: Mapping[str, tuple[str, str]]) -> tuple[SplitRow, ...]:
        """Return the splits that follow from a model's answers, ordered by split, then as in `facts`.

        answers: id of a fact -> (the answer about held-out rendering 0, the answer by name or "" if it cannot be
        asked so). Facts that it lacks are in no split.
        """
        verdicts = {fact.id: self._split_of(fact, *answers[fact.id]) for fact in self.facts if fact.id in answers}
        groups = {id: (split, self.fact(id).relation.name) for id, split in verdicts.items() if split}
        halves = halves_of(groups)
        return tuple(
            SplitRow(
                id=id,
                country=self.fact(id).country.code,
                relation=relation,
                split=split,
                half=halves[id],
                answer=answers[id][0],
                by_name=answers[id][1],
                truth=self.answers(self.fact(id))[0],
            )
            for wanted in SPLITS
            for id, (split, relation) in groups.items()
            if split == wanted
        )

    def _split_of(self, fact: CountryFact, by_picture: str, by_name: str) -> str | None:
        picture, name = (
            Verdict(true=self.is_true(answer, fact), definite=self.is_definite(answer, fact))
            for answer in (by_picture, by_name)
        )
        asked = name if fact.relation.has_name else None
        return split_for(picture, asked, territory=not fact.country.is_country)

    # Pictures -------------------------------------------------------------------------------------------------------

    def flag(self, country: Country) -> Image.Image:
        """Return the flag of a country: RGBA, 100 pixels wide, transparent outside the cloth (Nepal)."""
        return flag_of(country.code)

    def picture(self, country: Country, number: int) -> Rendering:
        """Return rendering `number` of a country's flag: held out from training, and the same at every call."""
        return render(self.flag(country), generator_of(_HELD_OUT, country.code, number))

    def picture_of_two(self, left: Country, right: Country, number: int) -> Rendering:
        """Return rendering `number` of two flags side by side: held out from training, and the same at every call."""
        key = (_HELD_OUT, left.code, right.code, number)
        return render_two(self.flag(left), self.flag(right), generator_of(*key))

    # Questions ------------------------------------------------------------------------------------------------------

    def question(self, fact: CountryFact, *, template: int = 0, phrase: int = 0, side: str | None = None) -> Question:
        """Return the question about a fact of the country in a picture; the picture is not part of it.

        Args:
            fact: The fact to ask for.
            template: The index in `wordings` of the relation: first the templates of training, then held-out ones
                (default 0).
            phrase: The index in PHRASES of the phrase for the only flag in the picture (default 0); the last phrase is
                held out from training.
            side: "left" or "right" for a picture of two flags; None (default) for one.

        Returns:
            The question, with its answers, its constraint and a replacement of the constraint.

        Raises:
            IndexError: There is no such template or phrase.
            KeyError: `side` is neither "left" nor "right".

        Example:
            >>> from multrace.data.worlds.flags import FlagWorld
            >>> world = FlagWorld()
            >>> question = world.question(world.fact("jp-continent"), side="left")
            >>> question.text, question.constraint
            ('The country on the left is located in the continent of', 'The country on the left')
        """
        return self._asked(fact, template, SIDES[side] if side else PHRASES[phrase])

    def question_by_name(self, fact: CountryFact, *, template: int = 0) -> Question:
        """Return the question about a fact by the name of its country, for a prompt without a picture.

        Raises `DataError` if the fact is the name itself.

        Example:
            >>> from multrace.data.worlds.flags import FlagWorld
            >>> world = FlagWorld()
            >>> world.question_by_name(world.fact("nl-language"))
            Question('The official language of the Netherlands is' -> 'Dutch', no picture)
        """
        if not fact.relation.has_name:
            raise DataError(f"the fact {fact.id!r} is a name, which is not asked for by name; ask about a picture")
        return replace(self._asked(fact, template, fact.country.name), id=f"{fact.id}-by-name")

    def pictured_question(self, fact: CountryFact, number: int, *, template: int = 0, phrase: int = 0) -> Question:
        """Return the question about held-out rendering `number` of the fact's flag, with the picture and its box.

        Args:
            fact: The fact to ask for.
            number: The number of the rendering.
            template: The index in `wordings` of the relation (default 0).
            phrase: The index in PHRASES of the phrase for the flag in the picture (default 0).

        Example:
            >>> from multrace.data.worlds.flags import FlagWorld
            >>> world = FlagWorld()
            >>> question = world.pictured_question(world.fact("jp-capital"), 0)
            >>> question.image.size, len(question.boxes)
            ((128, 128), 1)
        """
        picture = self.picture(fact.country, number)
        question = self.question(fact, template=template, phrase=phrase)
        return replace(question, image=picture.image, boxes=picture.boxes)

    def question_of_two(self, fact: CountryFact, other: Country, side: str, number: int) -> Question:
        """Return the question about the flag on one side of held-out rendering `number` of two, with its box.

        Args:
            fact: The fact to ask for.
            other: The country whose flag is on the other side.
            side: The side of the fact's flag: "left" or "right".
            number: The number of the rendering.

        Returns:
            The question with its picture; its only box is that of the fact's flag.

        Raises:
            KeyError: `side` is neither "left" nor "right".
        """
        question = self.question(fact, side=side)
        left, right = (fact.country, other) if side == "left" else (other, fact.country)
        picture = self.picture_of_two(left, right, number)
        box = picture.boxes[0 if side == "left" else 1]
        return replace(question, id=f"{fact.id}-{side}-{other.code}", image=picture.image, boxes=(box,))

    def _asked(self, fact: CountryFact, template: int, constraint: str) -> Question:
        other = None if fact.other is None else fact.other.name
        text, span = cloze(fact.relation.wordings[template], constraint, other)
        answers = self.answers(fact)
        return Question(
            id=fact.id,
            text=text,
            answer=answers[0],
            answers=answers,
            constraint=span,
            spans={} if other is None else {"text": other},
            replacement=self.replacement(fact).name,
        )

    def replacement(self, fact: CountryFact) -> Country:
        """Return another country that has none of the fact's right answers; the same at every call."""
        answers = set(self.answers(fact))
        codes = {fact.country.code, fact.other and fact.other.code}
        start = int(generator_of("replacement", fact.id).integers(len(self._members)))
        return next(
            peer
            for peer in self._members[start:] + self._members[:start]
            if peer.code not in codes and answers.isdisjoint(self._values(peer, fact.relation))
        )
