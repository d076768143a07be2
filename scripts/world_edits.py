"""Edits of the built-in world as records to evaluate: requests with everything that is asked about each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..data import VQARecord, World
from ..data.world import EditCase, Fact
from ..editing.evaluation import (
    BY_NAME,
    NO_PICTURE,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    UNRELATED,
    Probe,
    Record,
)
from ..editing.requests import EditRequest
from ..models import Prompt, VisionLanguageModel

_NEIGHBOURS: Mapping[str, str] = {
    "renderings": OTHER_PICTURE,
    "paraphrases": REPHRASE,
    "paraphrased_renderings": REPHRASE_OTHER_PICTURE,
    "other_entities": SAME_QUESTION_OTHER_PICTURE,
    "other_relations": OTHER_QUESTION_SAME_PICTURE,
    "two_constraint": OTHER_QUESTION_SAME_PICTURE,
}
"""Neighbours of the world -> the kind of probe they are."""
_BY_NAME_TEMPLATES = (1, 4)  # the edit may be told the question in template 0; training never showed the last one
_EXTRA_PICTURES = 1000  # pictures that the edit may see are numbered from here, those of probes from 0
_OTHER_PICTURE = 2000  # of another entity, for the corruption: neither an edit nor a probe shows it


@dataclass(frozen=True, kw_only=True)
class WorldRequests:
    """What a request gets besides its question; none of it is among the probes."""

    count: int = 8
    """Number of probes of each kind."""
    contexts: int = 0
    """Number of other pictures of the entity with the same question."""
    by_name: bool = False
    """Whether the question by the entity's name, without a picture, must get the target too."""
    keep: int = 0
    """Number of other entities whose answers to the same question have to stay."""


def world_records(
    vlm: VisionLanguageModel, world: World, cases: Sequence[EditCase], *, requests: WorldRequests | None = None
) -> tuple[Record, ...]:
    """Return one record per case, with `World.neighbours` as probes, and others by name and unrelated.

    There are no portability probes: no answer of this world is itself asked about, so nothing follows from a fact.
    """
    settings = requests or WorldRequests()
    return tuple(_record(vlm, world, case, settings) for case in cases)


def untouched_facts(
    vlm: VisionLanguageModel, world: World, cases: Sequence[EditCase], number: int | None = None
) -> tuple[tuple[Prompt, str], ...]:
    """Return at most `number` (prompt, answer) of trained facts that no case changes, in a fixed shuffled order."""
    edited = {case.fact.id for case in cases}
    facts = [fact for fact in world.facts if fact.id not in edited]
    random.Random(f"general ability {world.seed}").shuffle(facts)
    return tuple((_prompt(vlm, _pictured(world, fact, 0)), fact.answer) for fact in facts[:number])


def another_picture(world: World, case: EditCase) -> Image.Image:
    """Return a picture of another entity of the same kind, for a corruption; no edit and no probe uses it."""
    kind = world.entities[case.fact.entity].kind
    others = [each for each in world.of_kind(kind) if each.index != case.fact.entity]
    return world.picture(others[case.fact.entity % len(others)], _OTHER_PICTURE).image


def _record(vlm: VisionLanguageModel, world: World, case: EditCase, settings: WorldRequests) -> Record:
    neighbours = world.neighbours(case, count=settings.count)
    edited = _pictured(world, case.fact, 0)
    probes = [
        Probe(kind=kind, prompt=_prompt(vlm, record), answer=record.answer)
        for name, kind in _NEIGHBOURS.items()
        for record in neighbours[name]
    ]
    probes += [
        Probe(kind=BY_NAME, prompt=_prompt(vlm, world.question_by_name(case.fact, template=template)))
        for template in _BY_NAME_TEMPLATES
    ]
    probes.append(Probe(kind=NO_PICTURE, prompt=_prompt(vlm, edited.with_image(None))))
    probes += [
        Probe(kind=UNRELATED, prompt=_prompt(vlm, record), answer=record.answer)
        for record in _unrelated(world, case.fact, settings.count)
    ]
    return Record(
        request=_request(vlm, world, case, settings, neighbours["other_entities"]), probes=probes, name=case.fact.id
    )


def _request(
    vlm: VisionLanguageModel, world: World, case: EditCase, settings: WorldRequests, probed: Sequence[VQARecord]
) -> EditRequest:
    fact = case.fact
    numbers = range(_EXTRA_PICTURES, _EXTRA_PICTURES + settings.contexts)
    return EditRequest(
        prompt=_prompt(vlm, _pictured(world, fact, 0)),
        target=case.target,
        contexts=tuple(_prompt(vlm, _pictured(world, fact, number)) for number in numbers),
        rewrite_prompts=(_prompt(vlm, world.question_by_name(fact)),) if settings.by_name else (),
        preserve_prompts=tuple(_prompt(vlm, record) for record in _kept(world, fact, probed, settings.keep)),
        name=fact.id,
    )


def _kept(world: World, fact: Fact, probed: Sequence[VQARecord], number: int) -> Iterator[VQARecord]:
    """The same question about entities that no probe is about."""
    kind, taken = world.entities[fact.entity].kind, {record.id for record in probed}
    peers = [
        Fact(entity=peer.index, key=fact.key, answer=peer.facts[fact.key])
        for peer in world.of_kind(kind)
        if peer.index != fact.entity
    ]
    free = [peer for peer in peers if peer.id not in taken]
    random.Random(f"keep {world.seed} {fact.id}").shuffle(free)
    return (_pictured(world, peer, _EXTRA_PICTURES) for peer in free[:number])


def _unrelated(world: World, fact: Fact, number: int) -> Iterator[VQARecord]:
    """Other relations of entities of other kinds, each with its picture."""
    kind = world.entities[fact.entity].kind
    others = [other for other in world.facts if world.entities[other.entity].kind != kind]
    chosen = random.Random(f"unrelated {world.seed} {fact.id}").sample(others, number)
    return (_pictured(world, other, 0) for other in chosen)


def _pictured(world: World, fact: Fact, number: int) -> VQARecord:
    return world.question(fact).with_image(world.picture(world.entities[fact.entity], number).image)


def _prompt(vlm: VisionLanguageModel, record: VQARecord) -> Prompt:
    return vlm.prompt(record.image, record.question, constraint=record.constraint)
