"""The synthetic world of factual visual questions: its entities and facts, the facts to edit, and the edit records and
questions that are made of it; and the folder of the embedded model, which was trained on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..facts import (
    BY_NAME,
    NO_PICTURE,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    UNRELATED,
    EditRecord,
    Probe,
    Question,
)
from .drawing import Scene, draw_one, draw_two
from .entities import KINDS, Entity, FactKey, populate, relation, word

TAUGHT_PER_KIND = 40
LONG_TAIL_PER_KIND = 8
OUTDATED = 320
_HELD_OUT = "held-out"
_NEIGHBOURS: Mapping[str, str] = {
    "renderings": OTHER_PICTURE,
    "paraphrases": REPHRASE,
    "paraphrased_renderings": REPHRASE_OTHER_PICTURE,
    "other_entities": SAME_QUESTION_OTHER_PICTURE,
    "other_relations": OTHER_QUESTION_SAME_PICTURE,
    "two_constraint": OTHER_QUESTION_SAME_PICTURE,
}
"""Key of `World.neighbours` -> the kind of its probes."""
_BY_NAME_TEMPLATES = (1, 4)  # an edit may be given template 0; training never shows the last one
_EXTRA_PICTURES = 1000  # pictures that an edit may be given are numbered from here, those of probes from 0
_OTHER_PICTURE = 2000  # of another entity, for a corruption: no edit and no probe shows it
_QUESTION_PICTURES = 10  # pictures of `world_questions` are numbered from here


def tiny_vlm_path() -> Path:
    """Return the folder of the embedded vision-language model, an ordinary Hugging Face directory."""
    return Path(__file__).resolve().parents[1] / "tiny_vlm"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact: the index of its entity, its relation with the textual constraint or None, and the answer."""

    entity: int
    key: FactKey
    answer: str

    @property
    def id(self) -> str:
        """A short name that never changes, such as "17-chief-2000"."""
        return "-".join(str(part) for part in (self.entity, *self.key) if part is not None).replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """A fact to edit: the model knows `fact.answer` if the fact is outdated, and nothing if it is of the long tail."""

    fact: Fact
    target: str
    """The answer that the model should give after the edit."""


class World:
    """The entities, their pictures, the questions about them and the facts to edit, all made from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.entities = populate(seed, TAUGHT_PER_KIND, LONG_TAIL_PER_KIND)
        self.taught = tuple(entity for entity in self.entities if entity.taught)
        self.long_tail = tuple(entity for entity in self.entities if not entity.taught)
        self.facts = tuple(fact for entity in self.taught for fact in self.facts_of(entity))

    def facts_of(self, entity: Entity) -> tuple[Fact, ...]:
        """Return every fact of an entity."""
        return tuple(Fact(entity=entity.index, key=key, answer=answer) for key, answer in entity.facts.items())

    def of_kind(self, kind: str, taught: bool = True) -> tuple[Entity, ...]:
        """Return the taught (or the long-tail) entities of a kind: "company", "country" or "person"."""
        return tuple(entity for entity in self.entities if entity.kind == kind and entity.taught == taught)

    # Pictures -------------------------------------------------------------------------------------------------------

    def picture(self, entity: Entity, number: int) -> Scene:
        """Return rendering `number` of an entity: held out from training, and the same at every call."""
        return draw_one(entity.figure, random.Random(f"{_HELD_OUT} {self.seed} {entity.index} {number}"))

    def picture_of_two(self, left: Entity, right: Entity, number: int) -> Scene:
        """Return rendering `number` of two entities side by side: held out from training, the same at every call."""
        rng = random.Random(f"{_HELD_OUT} {self.seed} {left.index} {right.index} {number}")
        return draw_two(left.figure, right.figure, rng)

    # Questions ------------------------------------------------------------------------------------------------------

    def question(self, fact: Fact, *, template: int = 0, phrase: int = 0, side: str | None = None) -> Question:
        """Return the question that asks for a fact about the entity in a picture; the picture is not part of it.

        Args:
            fact: The fact to ask for.
            template: The index of the template of the relation, 0 to 4 (default 0); training never shows 4.
            phrase: The index of the phrase for the only entity of its kind in the picture, 0 to 2 (default 0).
            side: "left" or "right" for a picture of two entities of the kind; None (default) for one.

        Returns:
            The question, with its answer, its constraint and a replacement of the constraint.

        Raises:
            IndexError: There is no such template or phrase.
            KeyError: `side` is neither "left" nor "right".

        Example:
            >>> from multrace.data import World
            >>> world = World()
            >>> question = world.question(world.facts[0], template=4)
            >>> question.text, question.constraint
            ('Who started the company in this photo?', 'the company in this photo')
        """
        entity = self.entities[fact.entity]
        kind = KINDS[entity.kind]
        return self._record(fact, template, kind.sides[side] if side else kind.phrases[phrase])

    def pictured_question(self, fact: Fact, number: int) -> Question:
        """Return the question that asks for a fact about held-out rendering `number` of its entity, with its box."""
        picture = self.picture(self.entities[fact.entity], number)
        return replace(self.question(fact), image=picture.image, boxes=picture.pixel_boxes)

    def question_by_name(self, fact: Fact, *, template: int = 0) -> Question:
        """Return the question that asks for a fact by the name of its entity, for a prompt without its picture."""
        return self._record(fact, template, self.entities[fact.entity].name)

    def name_question(self, entity: Entity, *, template: int = 0, phrase: int = 0, side: str | None = None) -> Question:
        """Return the question for the name of the entity in a picture; the picture is not part of it.

        Args:
            entity: The entity.
            template: The index of the template, 0 or 1 (default 0).
            phrase: The index of the phrase for the only entity of its kind in the picture, 0 to 2 (default 0).
            side: "left" or "right" for a picture of two entities of the kind; None (default) for one.

        Returns:
            The question, with its answer, its constraint and a replacement of the constraint.

        Raises:
            IndexError: There is no such template or phrase.
            KeyError: `side` is neither "left" nor "right".

        Example:
            >>> from multrace.data import World
            >>> world = World()
            >>> world.name_question(world.entities[0], side="left").text
            'What is the name of the company on the left?'
        """
        kind = KINDS[entity.kind]
        text, span = word(kind.name_templates[template], kind.sides[side] if side else kind.phrases[phrase])
        replacement = self._peers(entity, template)[0].name
        return Question(
            id=f"{entity.index}-name", text=text, answer=entity.name, constraint=span, replacement=replacement
        )

    def attribute_question(self, entity: Entity, attribute: str, picture: Scene, *, template: int = 0) -> Question:
        """Return the question about the look of the only entity in a picture, which is not part of the question.

        Args:
            entity: The entity.
            attribute: "colour", "shape" or "place".
            picture: The picture, which tells the place.
            template: The index of the template, 0 or 1 (default 0).

        Returns:
            The question, with its answer, its constraint and a replacement of the constraint.

        Raises:
            IndexError: There is no such template.
            KeyError: There is no such attribute.

        Example:
            >>> from multrace.data import World
            >>> world = World()
            >>> entity = world.entities[0]
            >>> question = world.attribute_question(entity, "colour", world.picture(entity, 0))
            >>> question.text, question.answer == entity.attributes["colour"]
            ('What colour is the emblem?', True)
        """
        templates, span = KINDS[entity.kind].attributes[attribute]
        text, span = word(templates[template], span)
        answer = picture.places[0] if attribute == "place" else entity.attributes[attribute]
        replacement = next(kind.attributes[attribute][1] for name, kind in KINDS.items() if name != entity.kind)
        return Question(
            id=f"{entity.index}-{attribute}", text=text, answer=answer, constraint=span, replacement=replacement
        )

    def _record(self, fact: Fact, template: int, constraint: str) -> Question:
        entity, (name, text_constraint) = self.entities[fact.entity], fact.key
        text, span = word(relation(name).templates[template], constraint, text_constraint)
        peers = self._peers(entity, template)
        replacement = next(peer.name for peer in peers if peer.facts[fact.key] != fact.answer)
        return Question(
            id=fact.id,
            text=text,
            answer=fact.answer,
            constraint=span,
            spans={} if text_constraint is None else {"text": text_constraint},
            replacement=replacement,
        )

    def _peers(self, entity: Entity, start: int) -> list[Entity]:
        """Return the other taught entities of the kind, in an order that depends on the entity and on the start."""
        peers = [peer for peer in self.of_kind(entity.kind) if peer.index != entity.index]
        shift = (entity.index * 7 + start) % len(peers)
        return peers[shift:] + peers[:shift]

    # Edit splits ----------------------------------------------------------------------------------------------------

    def edit_cases(self, split: str, part: str, seed: int = 0) -> tuple[EditCase, ...]:
        """Return facts to edit, in an order that `seed` shuffles.

        split: "outdated" for facts that the model learned with an answer that is no longer right; the target is the
        new answer. "long_tail" for facts of entities that training never showed. part: "choose" to choose settings on,
        "report" to report results on; the two share no outdated fact and no long-tail entity.

        Raises `DataError` for other names.
        """
        if split not in ("outdated", "long_tail") or part not in ("choose", "report"):
            raise DataError(
                f"no edit cases of split {split!r} and part {part!r}; pass 'outdated' or 'long_tail' as the split, and "
                "'choose' or 'report' as the part"
            )
        cases = list(self._outdated() if split == "outdated" else self._long_tail())
        half = cases[::2] if part == "choose" else cases[1::2]
        chosen = [case for group in half for case in group]
        random.Random(f"{part} {seed}").shuffle(chosen)
        return tuple(chosen)

    def _outdated(self) -> list[list[EditCase]]:
        rng = random.Random(f"outdated {self.seed}")
        facts = rng.sample(self.facts, OUTDATED)
        return [[EditCase(fact=fact, target=self._other_answer(fact, rng))] for fact in facts]

    def _other_answer(self, fact: Fact, rng: random.Random) -> str:
        """Return an answer that another taught entity has for the relation."""
        answers = {other.answer for other in self.facts if other.key[0] == fact.key[0]} - {fact.answer}
        return rng.choice(sorted(answers))

    def _long_tail(self) -> list[list[EditCase]]:
        return [
            [EditCase(fact=fact, target=fact.answer) for fact in self.facts_of(entity)] for entity in self.long_tail
        ]

    def neighbours(
        self, case: EditCase, *, count: int = 8, first_picture: int = 0
    ) -> Mapping[str, tuple[Question, ...]]:
        """Return the questions whose answers must change with an edit, and those whose answers must stay.

        Each has a held-out picture. The answers to these become the target: "renderings" (other pictures of the
        entity), "paraphrases" (other templates and phrases), "paraphrased_renderings" (both). The answers to these stay
        as training taught them: "other_entities" (the same question about pictures of others), "other_relations" (other
        questions about the entity, with one constraint), "two_constraint" (those with two). The last two are empty for
        a long-tail entity, of which training taught nothing.

        count: the maximum number of questions of each of the first four kinds. first_picture: the number of the edited
        picture, which the others follow.
        """
        fact, entity = case.fact, self.entities[case.fact.entity]
        rng = random.Random(f"neighbours {self.seed} {fact.id}")
        pictures = [self.picture(entity, first_picture + number).image for number in range(count + 1)]
        question = self.question(fact).with_answer(case.target)
        wordings = [
            self.question(fact, template=template, phrase=phrase).with_answer(case.target)
            for template in range(len(relation(fact.key[0]).templates))
            for phrase in range(len(KINDS[entity.kind].phrases))
            if (template, phrase) != (0, 0)
        ]
        wordings = rng.sample(wordings, min(count, len(wordings)))
        others = rng.sample([peer for peer in self.of_kind(entity.kind) if peer.index != entity.index], count)
        other_facts = [other for other in self.facts_of(entity) if other.key != fact.key and entity.taught]
        return {
            "renderings": tuple(question.with_image(image) for image in pictures[1:]),
            "paraphrases": tuple(record.with_image(pictures[0]) for record in wordings),
            "paraphrased_renderings": tuple(
                record.with_image(image) for record, image in zip(wordings, pictures[1:], strict=False)
            ),
            "other_entities": tuple(self._same_question(fact, peer, first_picture) for peer in others),
            "other_relations": self._asked([other for other in other_facts if other.key[1] is None], pictures[0]),
            "two_constraint": self._asked([other for other in other_facts if other.key[1] is not None], pictures[0]),
        }

    def _same_question(self, fact: Fact, peer: Entity, number: int) -> Question:
        other = Fact(entity=peer.index, key=fact.key, answer=peer.facts[fact.key])
        return self.pictured_question(other, number)

    def _asked(self, facts: Sequence[Fact], image: Image.Image | Path | None) -> tuple[Question, ...]:
        return tuple(self.question(fact).with_image(image) for fact in facts)


# ---- records and questions made of the world ----


@dataclass(frozen=True, kw_only=True)
class WorldRequests:
    """The number of probes, and what a request gets besides its question, none of which is among the probes."""

    count: int = 8
    """Maximum number of probes of each kind."""
    contexts: int = 0
    """Number of other pictures of the entity, about which the request asks the same question."""
    by_name: bool = False
    """Whether the question by the name of the entity, without a picture, must get the target too."""
    keep: int = 0
    """Number of other entities for which the answer to the same question has to stay."""


def world_records(
    world: World, cases: Sequence[EditCase], *, requests: WorldRequests | None = None
) -> tuple[EditRecord, ...]:
    """Return an edit record for each case, with probes from `World.neighbours`, by name, and about other entities.

    There are no portability probes: no question of this world is about the answer to another one, so that nothing
    follows from a fact. requests: the number of probes, and what each request gets besides its question; None for the
    defaults.

    Example:
        >>> from multrace.data import World, world_records
        >>> world = World()
        >>> world_records(world, world.edit_cases("outdated", "report")[:1])
        (EditRecord('Who was the chief of the company in this photo in 2000?' -> 'Pruro Raner', 49 probes),)
    """
    settings = requests or WorldRequests()
    return tuple(_record(world, case, settings) for case in cases)


def world_questions(count: int, *, seed: int = 0) -> tuple[Question, ...]:
    """Return `count` questions about facts of the world, each with a held-out picture and the box of the entity.

    The facts are those with one constraint, in an order that the seed shuffles; each of them is asked for once before
    any is asked for again, about another picture. Raises `DataError` if the count is less than 1.
    """
    if count < 1:
        raise DataError(f"{count} questions of the world: ask at least one")
    world = World()
    facts = [fact for fact in world.facts if fact.key[1] is None]
    questions = []
    for number in range(count):
        lap, place = divmod(number, len(facts))
        if place == 0:
            order = random.Random(f"flow {seed} {lap}").sample(facts, len(facts))
        question = world.pictured_question(order[place], _QUESTION_PICTURES + lap)
        questions.append(replace(question, id=f"{question.id}-{_QUESTION_PICTURES + lap}"))
    return tuple(questions)


def untouched_facts(world: World, cases: Sequence[EditCase], number: int | None = None) -> tuple[Question, ...]:
    """Return questions, with pictures and answers, about taught facts that no case changes, in a shuffled order.

    number: the maximum number of questions; None for all. The order depends on the seed of the world only.
    """
    edited = {case.fact.id for case in cases}
    facts = [fact for fact in world.facts if fact.id not in edited]
    random.Random(f"general ability {world.seed}").shuffle(facts)
    return tuple(world.pictured_question(fact, 0) for fact in facts[:number])


def another_picture(world: World, case: EditCase) -> Image.Image:
    """Return a picture of another entity of the kind, for a corruption; no edit and no probe shows it."""
    kind = world.entities[case.fact.entity].kind
    others = [entity for entity in world.of_kind(kind) if entity.index != case.fact.entity]
    return world.picture(others[case.fact.entity % len(others)], _OTHER_PICTURE).image


def _record(world: World, case: EditCase, settings: WorldRequests) -> EditRecord:
    fact = case.fact
    neighbours = world.neighbours(case, count=settings.count)
    edited = world.pictured_question(fact, 0)
    numbers = range(_EXTRA_PICTURES, _EXTRA_PICTURES + settings.contexts)
    return EditRecord(
        id=fact.id,
        question=edited,
        target=case.target,
        contexts=tuple(world.pictured_question(fact, number) for number in numbers),
        rewrite_prompts=(world.question_by_name(fact),) if settings.by_name else (),
        preserve_prompts=tuple(_kept(world, fact, neighbours["other_entities"], settings.keep)),
        probes=(
            *(
                Probe(kind=kind, question=question, answer=question.answer)
                for name, kind in _NEIGHBOURS.items()
                for question in neighbours[name]
            ),
            *(
                Probe(kind=BY_NAME, question=world.question_by_name(fact, template=template))
                for template in _BY_NAME_TEMPLATES
            ),
            Probe(kind=NO_PICTURE, question=edited.with_image(None).with_answer(None)),
            *(Probe(kind=UNRELATED, question=question) for question in _unrelated(world, fact, settings.count)),
        ),
    )


def _kept(world: World, fact: Fact, probed: Sequence[Question], number: int) -> Iterator[Question]:
    """Return the same question about entities that no probe is about."""
    kind, taken = world.entities[fact.entity].kind, {question.id for question in probed}
    peers = [
        Fact(entity=peer.index, key=fact.key, answer=peer.facts[fact.key])
        for peer in world.of_kind(kind)
        if peer.index != fact.entity
    ]
    free = [peer for peer in peers if peer.id not in taken]
    random.Random(f"keep {world.seed} {fact.id}").shuffle(free)
    return (world.pictured_question(peer, _EXTRA_PICTURES) for peer in free[:number])


def _unrelated(world: World, fact: Fact, number: int) -> Iterator[Question]:
    """Return questions about entities of other kinds, each with its picture."""
    kind = world.entities[fact.entity].kind
    others = [other for other in world.facts if world.entities[other.entity].kind != kind]
    chosen = random.Random(f"unrelated {world.seed} {fact.id}").sample(others, number)
    return (world.pictured_question(other, 0) for other in chosen)
