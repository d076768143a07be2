"""The synthetic factual-VQA world: who lives in it, what is asked about them, and which facts are to be edited."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..records import VQARecord
from .drawing import Scene, draw_one, draw_two
from .entities import Entity, FactKey, populate
from .questions import KINDS, relation, word

TAUGHT_PER_KIND = 40
LONG_TAIL_PER_KIND = 8
OUTDATED = 320
_HELD_OUT = "held-out"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact: the entity's number, the relation with its textual constraint or None, and the answer."""

    entity: int
    key: FactKey
    answer: str

    @property
    def id(self) -> str:
        """A short stable name such as "17-chief-2000"."""
        return "-".join(str(part) for part in (self.entity, *self.key) if part is not None).replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """A fact to be changed: for outdated facts the model knows `fact.answer`, for long-tail facts it knows nothing."""

    fact: Fact
    target: str
    """The answer the model should give after the edit."""


class World:
    """Entities, pictures, questions and edit splits, all functions of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.entities = populate(seed, TAUGHT_PER_KIND, LONG_TAIL_PER_KIND)
        self.taught = tuple(entity for entity in self.entities if entity.taught)
        self.long_tail = tuple(entity for entity in self.entities if not entity.taught)
        self.facts = tuple(fact for entity in self.taught for fact in self.facts_of(entity))

    def facts_of(self, entity: Entity) -> tuple[Fact, ...]:
        """Every fact of one entity."""
        return tuple(Fact(entity=entity.index, key=key, answer=answer) for key, answer in entity.facts.items())

    def of_kind(self, kind: str, taught: bool = True) -> tuple[Entity, ...]:
        """The taught (or long-tail) entities of a kind: "company", "country" or "person"."""
        return tuple(entity for entity in self.entities if entity.kind == kind and entity.taught == taught)

    # Pictures -------------------------------------------------------------------------------------------------------

    def picture(self, entity: Entity, number: int) -> Scene:
        """Held-out rendering `number` of an entity: never shown in training, the same at every call."""
        return draw_one(entity.figure, random.Random(f"{_HELD_OUT} {self.seed} {entity.index} {number}"))

    def picture_of_two(self, left: Entity, right: Entity, number: int) -> Scene:
        """Held-out rendering `number` of two entities side by side."""
        rng = random.Random(f"{_HELD_OUT} {self.seed} {left.index} {right.index} {number}")
        return draw_two(left.figure, right.figure, rng)

    # Questions ------------------------------------------------------------------------------------------------------

    def question(self, fact: Fact, *, template: int = 0, phrase: int = 0, side: str | None = None) -> VQARecord:
        """The fact asked about the entity in the picture; with `side` ("left" or "right"), of a picture of two of a
        kind.
        """
        entity = self.entities[fact.entity]
        kind = KINDS[entity.kind]
        return self._record(fact, template, kind.sides[side] if side else kind.phrases[phrase])

    def question_by_name(self, fact: Fact, *, template: int = 0) -> VQARecord:
        """The fact asked by the entity's name: for a text-only prompt, or in front of another entity's picture."""
        return self._record(fact, template, self.entities[fact.entity].name)

    def name_question(
        self, entity: Entity, *, template: int = 0, phrase: int = 0, side: str | None = None
    ) -> VQARecord:
        """The question for the name of the entity in the picture."""
        kind = KINDS[entity.kind]
        text, span = word(kind.name_templates[template], kind.sides[side] if side else kind.phrases[phrase])
        replacement = self._peers(entity, template)[0].name
        return VQARecord(
            id=f"{entity.index}-name", question=text, answer=entity.name, constraint=span, replacement=replacement
        )

    def attribute_question(self, entity: Entity, attribute: str, picture: Scene, *, template: int = 0) -> VQARecord:
        """A question about the look of the only entity in the picture: its "colour", "shape" or "place"."""
        templates, span = KINDS[entity.kind].attributes[attribute]
        text, span = word(templates[template], span)
        answer = picture.places[0] if attribute == "place" else entity.attributes[attribute]
        replacement = next(kind.attributes[attribute][1] for name, kind in KINDS.items() if name != entity.kind)
        return VQARecord(
            id=f"{entity.index}-{attribute}", question=text, answer=answer, constraint=span, replacement=replacement
        )

    def _record(self, fact: Fact, template: int, constraint: str) -> VQARecord:
        entity, (name, text_constraint) = self.entities[fact.entity], fact.key
        text, span = word(relation(name).templates[template], constraint, text_constraint)
        peers = self._peers(entity, template)
        replacement = next(peer.name for peer in peers if peer.facts[fact.key] != fact.answer)
        return VQARecord(
            id=fact.id,
            question=text,
            answer=fact.answer,
            constraint=span,
            text_constraint=text_constraint,
            replacement=replacement,
        )

    def _peers(self, entity: Entity, start: int) -> list[Entity]:
        """The other taught entities of the kind, beginning at another one for every entity and every start."""
        peers = [peer for peer in self.of_kind(entity.kind) if peer.index != entity.index]
        shift = (entity.index * 7 + start) % len(peers)
        return peers[shift:] + peers[:shift]

    # Edit splits ----------------------------------------------------------------------------------------------------

    def edit_cases(self, split: str, part: str, seed: int = 0) -> tuple[EditCase, ...]:
        """The facts to edit, in the order that `seed` shuffles them into.

        split "outdated": the model learned last year's answer, the target is this year's. split "long_tail": facts of
        entities that training never showed. part "choose" is for choosing settings, "report" for reporting results;
        no entity of a long-tail part, and no fact of an outdated one, is in both. DataError for other names.
        """
        if split not in ("outdated", "long_tail") or part not in ("choose", "report"):
            raise DataError(
                f"no edit cases {split!r}/{part!r}: splits are 'outdated', 'long_tail', parts 'choose', 'report'"
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
        """An answer that another taught entity has for the relation."""
        answers = {other.answer for other in self.facts if other.key[0] == fact.key[0]} - {fact.answer}
        return rng.choice(sorted(answers))

    def _long_tail(self) -> list[list[EditCase]]:
        return [
            [EditCase(fact=fact, target=fact.answer) for fact in self.facts_of(entity)] for entity in self.long_tail
        ]

    def neighbours(
        self, case: EditCase, *, count: int = 8, first_picture: int = 0
    ) -> Mapping[str, tuple[VQARecord, ...]]:
        """Questions that must move with an edit and questions that must not, each with a held-out picture.

        Must move (their answer is the target): "renderings" (other pictures), "paraphrases" (other templates and
        phrases), "paraphrased_renderings". Must not (their answer is what training taught): "other_entities" (same
        question, other pictures), "other_relations" (same entity, one-constraint), "two_constraint" (same entity, the
        two-constraint questions other than the edited one). Pictures are numbered from `first_picture`; picture
        `first_picture` is the edited one. Long-tail entities have no facts that training taught, so their last two are
        empty.
        """
        fact, entity = case.fact, self.entities[case.fact.entity]
        rng = random.Random(f"neighbours {self.seed} {fact.id}")
        pictures = [self.picture(entity, first_picture + number).image for number in range(count + 1)]
        asked = self.question(fact).with_answer(case.target)
        wordings = [
            self.question(fact, template=template, phrase=phrase).with_answer(case.target)
            for template in range(len(relation(fact.key[0]).templates))
            for phrase in range(len(KINDS[entity.kind].phrases))
            if (template, phrase) != (0, 0)
        ]
        wordings = rng.sample(wordings, min(count, len(wordings)))
        others = rng.sample([peer for peer in self.of_kind(entity.kind) if peer.index != entity.index], count)
        kept = [other for other in self.facts_of(entity) if other.key != fact.key and entity.taught]
        return {
            "renderings": tuple(asked.with_image(image) for image in pictures[1:]),
            "paraphrases": tuple(record.with_image(pictures[0]) for record in wordings),
            "paraphrased_renderings": tuple(
                record.with_image(image) for record, image in zip(wordings, pictures[1:], strict=False)
            ),
            "other_entities": tuple(self._same_question(fact, peer, first_picture) for peer in others),
            "other_relations": self._asked([other for other in kept if other.key[1] is None], pictures[0]),
            "two_constraint": self._asked([other for other in kept if other.key[1] is not None], pictures[0]),
        }

    def _same_question(self, fact: Fact, peer: Entity, number: int) -> VQARecord:
        other = Fact(entity=peer.index, key=fact.key, answer=peer.facts[fact.key])
        return self.question(other).with_image(self.picture(peer, number).image)

    def _asked(self, facts: Sequence[Fact], image: Image.Image | Path | None) -> tuple[VQARecord, ...]:
        return tuple(self.question(fact).with_image(image) for fact in facts)
