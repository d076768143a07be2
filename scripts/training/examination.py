"""The embedded model's examination: free-generation accuracy, and the route of information from the picture to the
answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...data import VQARecord, World
from ...data.world import Entity, Fact
from ...models import Prompt, VisionLanguageModel
from ...tracing import AverageTrace, SwapImage, average, causal_trace, knockout_probability
from ...workflow.sites import POSITIONS


def prompt_of(vlm: VisionLanguageModel, record: VQARecord) -> Prompt:
    """The prompt of a record, its constraints as token groups."""
    return vlm.prompt(record.image, record.question, constraint=record.constraint)


def accuracy(
    vlm: VisionLanguageModel, records: Sequence[VQARecord], *, batch_size: int = 32, label: str | None = None
) -> float:
    """Share of records whose greedy free-generation answer equals the record's answer exactly; a bar if `label` is
    given.
    """
    right = 0
    for start in tqdm(range(0, len(records), batch_size), desc=label, disable=label is None, leave=False):
        batch = records[start : start + batch_size]
        answers = vlm.answers([prompt_of(vlm, record) for record in batch], batch_size=batch_size)
        right += sum(answer == record.answer for answer, record in zip(answers, batch, strict=True))
    return right / len(records)


def question_sets(world: World, number: int = 0) -> Mapping[str, list[VQARecord]]:
    """The examination's questions by name; every picture is held-out rendering `number` (of two entities where it says
    so).
    """
    entities = {entity.index: entity for entity in world.taught}
    pictures = {index: world.picture(entity, number) for index, entity in entities.items()}
    rng = random.Random(f"examination {number}")
    others = {index: rng.choice([other for other in entities if other != index]) for index in entities}
    held_out = -1  # the last template of a relation is never shown in training
    shown = [world.question(fact).with_image(pictures[fact.entity].image) for fact in world.facts]
    pairs = {
        kind: [
            world.question(fact, side=side).with_image(image)
            for entity in world.taught
            for fact, side, image in _beside(world, entity, kind == "same", number, rng)
        ]
        for kind in ("same", "other")
    }

    def looks(attribute: str) -> list[VQARecord]:
        return [
            world.attribute_question(entity, attribute, pictures[index]).with_image(pictures[index].image)
            for index, entity in entities.items()
        ]

    return {
        "taught facts, picture": shown,
        "one constraint": [record for record in shown if record.text_constraint is None],
        "two constraints": [record for record in shown if record.text_constraint is not None],
        "held-out template": [
            world.question(fact, template=held_out).with_image(pictures[fact.entity].image) for fact in world.facts
        ],
        "by name, no picture": [world.question_by_name(fact) for fact in world.facts],
        "by name, another's picture": [
            world.question_by_name(fact).with_image(pictures[others[fact.entity]].image) for fact in world.facts
        ],
        "name": [world.name_question(entity).with_image(pictures[index].image) for index, entity in entities.items()],
        "colour and shape": looks("colour") + looks("shape"),
        "place in the picture": looks("place"),
        "two of a kind, left or right": pairs["same"],
        "two of different kinds": pairs["other"],
        "long-tail facts (never taught)": [
            world.question(fact).with_image(world.picture(entity, number).image)
            for entity in world.long_tail
            for fact in world.facts_of(entity)
        ],
    }


def _beside(
    world: World, entity: Entity, same: bool, number: int, rng: random.Random
) -> Iterator[tuple[Fact, str | None, Image.Image]]:
    """Two facts of the entity, each with its side (None where the kind tells) and a picture with another entity."""
    peers = [other for other in world.taught if other is not entity and (other.kind == entity.kind) == same]
    for fact in rng.sample(world.facts_of(entity), 2):
        other, side = rng.choice(peers), rng.choice(("left", "right"))
        left, right = (entity, other) if side == "left" else (other, entity)
        yield fact, side if same else None, world.picture_of_two(left, right, number).image


@dataclass(frozen=True, kw_only=True)
class Route:
    """How the picture reaches the answer, over many facts."""

    knockouts: Mapping[str, Tensor]
    """Flow such as "image -> last" -> (fact,) share of the answer's probability lost when it is cut in every layer."""
    trace: AverageTrace
    """Rows POSITIONS; corruption: another entity's picture."""


def route(
    vlm: VisionLanguageModel,
    world: World,
    *,
    facts: int = 100,
    number: int = 1,
    sites: Sequence[str] = ("hidden", "mlp", "attention"),
    window: int = 3,
    progress: bool = True,
) -> Route:
    """The route over `facts` one-constraint facts that the model answers rightly, asked about held-out pictures.

    Facts are taken in a fixed shuffled order, and skipped where the answer is wrong or the other entity's answer begins
    alike.
    """
    flows = {
        "image -> last": ("image", "last"),
        "image -> question": ("image", "question"),
        "question -> last": ("question", "last"),
    }
    lost: dict[str, list[float]] = {flow: [] for flow in flows}
    traces = []
    for prompt, other in tqdm(_answered(vlm, world, facts, number), total=facts, desc="route", disable=not progress):
        clean = knockout_probability(vlm, prompt, (), ())
        for flow, (source, target) in flows.items():
            lost[flow].append(1 - knockout_probability(vlm, prompt, source, target) / clean)
        settings = {"sites": sites, "window": window, "positions": POSITIONS, "progress": False}
        # A picture that changes little counts too: leaving such facts out would make the mean look better than it is.
        traces.append(causal_trace(vlm, prompt, corruption=SwapImage(other), even_if_weak=True, **settings))
    return Route(knockouts={flow: torch.tensor(values) for flow, values in lost.items()}, trace=average(traces))


def _answered(vlm: VisionLanguageModel, world: World, count: int, number: int) -> Iterator[tuple[Prompt, Image.Image]]:
    """Prompts of one-constraint facts answered rightly, each with the picture of another entity of the kind."""
    rng = random.Random(f"route {number}")
    facts = rng.sample([fact for fact in world.facts if fact.key[1] is None], len(world.facts) // 2)
    found = 0
    for fact in facts:
        entity = world.entities[fact.entity]
        other = rng.choice(
            [peer for peer in world.of_kind(entity.kind) if peer.facts[fact.key].split()[0] != fact.answer.split()[0]]
        )
        prompt = prompt_of(vlm, world.question(fact).with_image(world.picture(entity, number).image))
        if found < count and vlm.answers([prompt])[0] == fact.answer:
            found += 1
            yield prompt, world.picture(other, number).image
