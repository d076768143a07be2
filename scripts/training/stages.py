"""The two training stages of the embedded model.

Stage 1: the vision tower alone learns what is where in a picture, before any question is asked; otherwise the joint
training would spend most of its time on learning to see. The patches that an entity covers are averaged, and linear
heads predict its parts, its place and its identity from the average.

Stage 2: the whole model learns to answer, with the picture routed through the constraint tokens of the question. In a
routed row only the constraint tokens see the picture, and only in the first layers; open rows have no such mask. The
training starts with routed rows alone, which fix the route of information that large models show (picture ->
constraint tokens -> last token -> answer); the open rows that are mixed in afterwards keep the model usable without any
mask, and the route remains. A linear reader on the last constraint token, which is dropped after training, is asked for
the identity of the entity once the picture has been read; it gives questions by name and questions by picture one
meeting point, from which they share what is known about the entity.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from ...data.world import KINDS, PLACES, Entity, Fact, Scene, World, draw_one, draw_two, relation
from .model import IGNORED, PATCH, ROUTED_LAYERS, SIZE, VISION_HIDDEN, Batch, Block, Packer

_GRID = SIZE // PATCH
_DRAWN_PER_STEP = 32
_REUSED = 3


def pixels(pictures: list[Scene]) -> Tensor:
    """Return (picture, 3, SIZE, SIZE) float32: the values that the processor gives for pictures of this size."""
    stacked = np.stack([np.asarray(picture.image) for picture in pictures])
    return (torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def sample_entities(world: World, rng: random.Random) -> tuple[Entity, ...]:
    """Return one taught entity (70 %), two of one kind (15 %) or two of different kinds (15 %)."""
    first, chance = rng.choice(world.taught), rng.random()
    if chance < 0.7:
        return (first,)
    second = rng.choice(
        [other for other in world.taught if other is not first and (other.kind == first.kind) == (chance < 0.85)]
    )
    return (first, second)


def draw(entities: tuple[Entity, ...], rng: random.Random) -> Scene:
    """Return a new training picture of one or two entities."""
    if len(entities) == 1:
        return draw_one(entities[0].figure, rng)
    return draw_two(entities[0].figure, entities[1].figure, rng)


def learning_rate(step: int, steps: int, peak: float, *, warm_up: int, flat: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then a flat part, then a cosine down to 2 % of the peak.

    Args:
        step: The step, from 0.
        steps: The number of steps.
        peak: The largest learning rate.
        warm_up: The number of steps of the warm-up.
        flat: The share of the steps after which the cosine starts, 0 to 1.
    """
    share = step / steps
    decay = 1.0 if share < flat else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - flat) / (1 - flat)))
    return peak * min(1.0, (step + 1) / warm_up) * decay


class TowerHeads(nn.Module):
    """Linear readers of the parts, the place and the identity of an entity from the mean of its patches."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.values: Mapping[tuple[str, int], list[str]] = {
            (kind, part): sorted({entity.glyph[part] for entity in world.entities if entity.kind == kind})
            for kind, part in {(entity.kind, part) for entity in world.entities for part in range(len(entity.glyph))}
        }
        self.slots = sorted(self.values)
        self.norm = nn.LayerNorm(VISION_HIDDEN)
        self.parts = nn.ModuleList([nn.Linear(VISION_HIDDEN, len(self.values[slot])) for slot in self.slots])
        self.place = nn.Linear(VISION_HIDDEN, len(PLACES))
        self.identity = nn.Linear(VISION_HIDDEN, len(world.entities))

    def loss(self, features: Tensor, entities: list[Entity], places: list[str]) -> Tensor:
        """Return the sum of the cross-entropies of parts (a quarter of their sum), place and identity."""
        features = self.norm(features)
        total = functional.cross_entropy(self.identity(features), torch.tensor([entity.index for entity in entities]))
        total = total + functional.cross_entropy(
            self.place(features), torch.tensor([PLACES.index(name) for name in places])
        )
        for head, (kind, part) in zip(self.parts, self.slots, strict=True):
            rows = [row for row, entity in enumerate(entities) if entity.kind == kind]
            if rows:
                wanted = torch.tensor([self.values[kind, part].index(entities[row].glyph[part]) for row in rows])
                total = total + functional.cross_entropy(head(features[rows]), wanted) / 4
        return total

    def hits(self, features: Tensor, entities: list[Entity]) -> float:
        """Return the share of entities that are recognised."""
        wanted = torch.tensor([entity.index for entity in entities])
        return (self.identity(self.norm(features)).argmax(-1) == wanted).float().mean().item()


def _covered(box: tuple[float, float, float, float]) -> Tensor:
    """Return (patch,) weights that average the patches whose centres lie in the box."""
    centres = (torch.arange(_GRID) + 0.5) / _GRID
    left, top, right, bottom = box
    inside = ((centres > top) & (centres < bottom))[:, None] & ((centres > left) & (centres < right))[None, :]
    return inside.flatten().float() / inside.sum()


def entity_features(tower: nn.Module, pictures: list[Scene]) -> Tensor:
    """Return (entity, VISION_HIDDEN): the mean state of the patches of every entity of every picture, in order."""
    states = tower(pixel_values=pixels(pictures)).last_hidden_state[:, 1:]
    rows = [row for row, picture in enumerate(pictures) for _ in picture.boxes]
    weights = torch.stack([_covered(box) for picture in pictures for box in picture.boxes])
    return torch.einsum("ep,eph->eh", weights, states[rows])


def _stream(world: World, rng: random.Random) -> Iterator[list[tuple[tuple[Entity, ...], Scene]]]:
    """Yield batches of new pictures, each of which occurs in three batches in a row and never again.

    So drawing takes a third of the time that it would take otherwise.
    """
    recent: deque[list[tuple[tuple[Entity, ...], Scene]]] = deque(maxlen=_REUSED)
    while True:
        chosen = [sample_entities(world, rng) for _ in range(_DRAWN_PER_STEP)]
        recent.append([(entities, draw(entities, rng)) for entities in chosen])
        yield [pair for drawn in recent for pair in drawn]


def train_tower(tower: nn.Module, world: World, *, steps: int, seed: int, peak: float = 2e-3) -> float:
    """Train the tower in place; return the share of entities recognised on held-out pictures of one entity."""
    heads = TowerHeads(world)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    stream = _stream(world, random.Random(f"tower {seed}"))
    tower.train()
    progress = tqdm(range(steps), desc="stage 1: vision tower", mininterval=5)
    for step in progress:
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warm_up=100, flat=0.4)
        entities = [entity for pair, _ in batch for entity in pair]
        places = [place for _, picture in batch for place in picture.places]
        loss = heads.loss(entity_features(tower, [picture for _, picture in batch]), entities, places)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    tower.eval()
    with torch.no_grad():
        pictures = [world.picture(entity, 0) for entity in world.taught]
        return heads.hits(entity_features(tower, pictures), list(world.taught))


READ_LAYER = ROUTED_LAYERS - 1
"""The layer whose output the reader of identities reads."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the joint training, with a learning-rate schedule of its own."""

    steps: int
    routed: float
    """The share of routed rows, 0 to 1."""
    peak: float
    """Peak learning rate."""
    rows: int = 12
    reader_weight: float = 0.3
    warm_up: int = 80
    flat: float = 0.3


class Examples:
    """Endless new rows: a new picture with questions about it, and questions by name with and without it."""

    def __init__(self, world: World, packer: Packer, seed: int) -> None:
        self.world, self.packer, self.rng = world, packer, random.Random(f"joint {seed}")

    def row(self) -> tuple[Scene, list[Block]]:
        """Return a new picture and its blocks.

        They ask for four facts in the picture, a name, an attribute of a single entity, two facts by name with the
        picture, and three without it.
        """
        rng = self.rng
        entities = sample_entities(self.world, rng)
        picture = draw(entities, rng)
        blocks = [self._shown(entity, entities, picture) for entity in entities for _ in range(4 // len(entities))]
        blocks.append(self._name(rng.choice(entities), entities))
        if len(entities) == 1:
            blocks.append(self._attribute(entities[0], picture))
        blocks += [self._by_name(has_image=True) for _ in range(2)]
        blocks += [self._by_name(has_image=False) for _ in range(3)]
        return picture, blocks

    def _side(self, entity: Entity, entities: Sequence[Entity]) -> str | None:
        """Return the side to name if the picture shows two entities of a kind, else None."""
        if sum(other.kind == entity.kind for other in entities) == 1:
            return None
        return "left" if entity is entities[0] else "right"

    def _template(self, fact: Fact) -> int:
        return self.rng.randrange(len(relation(fact.key[0]).templates) - 1)  # the last template is held out

    def _phrase(self, entity: Entity) -> int:
        return self.rng.randrange(len(KINDS[entity.kind].phrases))

    def _shown(self, entity: Entity, entities: Sequence[Entity], picture: Scene) -> Block:
        fact = self.rng.choice(self.world.facts_of(entity))
        record = self.world.question(
            fact, template=self._template(fact), phrase=self._phrase(entity), side=self._side(entity, entities)
        )
        return self.packer.block(record, entity=entity.index)

    def _name(self, entity: Entity, entities: Sequence[Entity]) -> Block:
        record = self.world.name_question(
            entity, template=self.rng.randrange(2), phrase=self._phrase(entity), side=self._side(entity, entities)
        )
        return self.packer.block(record, entity=entity.index)

    def _attribute(self, entity: Entity, picture: Scene) -> Block:
        attribute = self.rng.choice(list(KINDS[entity.kind].attributes))
        return self.packer.block(
            self.world.attribute_question(entity, attribute, picture, template=self.rng.randrange(2))
        )

    def _by_name(self, has_image: bool) -> Block:
        fact = self.rng.choice(self.world.facts)
        record = self.world.question_by_name(fact, template=self._template(fact))
        return self.packer.block(record, entity=fact.entity, has_image=has_image, is_visual=False)

    def batch(self, rows: int, routed: float) -> tuple[Tensor, Batch]:
        """Return the pixels and the packed rows, each of which is routed with this probability."""
        drawn = [self.row() for _ in range(rows)]
        batch = self.packer.collate([blocks for _, blocks in drawn], [self.rng.random() < routed for _ in drawn])
        return pixels([picture for picture, _ in drawn]), batch


@contextmanager
def late_mask(model: LlavaForConditionalGeneration, mask: Tensor) -> Iterator[None]:
    """Give the decoder layers from ROUTED_LAYERS on this mask inside the block, in place of that of the call."""

    def swap(_: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        return arguments, {**keywords, "attention_mask": mask}

    layers = model.model.language_model.layers[ROUTED_LAYERS:]
    handles = [layer.register_forward_pre_hook(swap, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: LlavaForConditionalGeneration, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (label, vocab) at labelled tokens, and states (mention, hidden) for the reader of identities."""
    read: list[Tensor] = []
    layer = model.model.language_model.layers[READ_LAYER]
    handle = layer.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    try:
        with late_mask(model, batch.late_mask):
            states = model.model(
                input_ids=batch.ids,
                pixel_values=images,
                attention_mask=batch.early_mask,
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
    finally:
        handle.remove()
    mentions = read[0][batch.entity_rows[:, 0], batch.entity_rows[:, 1]]
    return model.lm_head(states[batch.labels != IGNORED]), mentions


def exact_matches(logits: Tensor, batch: Batch) -> Tensor:
    """Return (block,) bool: whether each token of the answer is the most probable one after the true tokens."""
    labelled = batch.labels != IGNORED
    wrong = batch.owner[labelled][logits.argmax(-1) != batch.labels[labelled]]
    right = torch.ones(int(batch.owner.max()) + 1, dtype=torch.bool)
    right[wrong] = False
    return right


@torch.no_grad()
def held_out_accuracy(
    model: LlavaForConditionalGeneration,
    world: World,
    packer: Packer,
    *,
    number: int,
    routed: bool = False,
) -> float:
    """Return the share of taught facts that the model answers correctly, teacher-forced, to watch the training.

    Args:
        model: The model.
        world: The world that it learns.
        packer: The packer of the training.
        number: The number of the held-out rendering of each entity.
        routed: Whether the rows are routed (default False).
    """
    right: list[Tensor] = []
    for start in range(0, len(world.taught), 12):
        entities = world.taught[start : start + 12]
        rows = [
            [packer.block(world.question(fact), entity=entity.index) for fact in world.facts_of(entity)]
            for entity in entities
        ]
        batch = packer.collate(rows, [routed] * len(rows))
        logits, _ = forward(model, pixels([world.picture(entity, number) for entity in entities]), batch)
        right.append(exact_matches(logits, batch))
    return torch.cat(right).float().mean().item()


def train_joint(
    model: LlavaForConditionalGeneration,
    world: World,
    packer: Packer,
    phase: Phase,
    *,
    seed: int,
    reader: nn.Linear,
    label: str,
    watch: Callable[[int, float], None] | None = None,
    every: int = 500,
) -> None:
    """Train the model and the reader of identities in place for one phase.

    Args:
        model: The model.
        world: The world that it learns.
        packer: The packer of questions.
        phase: The number of steps and their settings.
        seed: The random seed of pictures and questions.
        reader: The reader of identities.
        label: The label of the progress bar.
        watch: Called as `watch(step, loss)`; None (default) for nothing.
        every: The number of steps between two calls of `watch` (default 500).
    """
    tower = list(model.model.vision_tower.parameters())
    in_tower = {id(parameter) for parameter in tower}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_tower] + list(reader.parameters())
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim >= 2], "weight_decay": 0.05, "scale": 1.0},
        {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": tower, "weight_decay": 0.05, "scale": 0.3},  # the tower has already learned to see
    ]
    optimizer = torch.optim.AdamW(groups, lr=phase.peak, betas=(0.9, 0.98))
    examples = Examples(world, packer, seed)
    model.train()
    recent = 0.0
    progress = tqdm(range(phase.steps), desc=label, mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            rate = learning_rate(step, phase.steps, phase.peak, warm_up=phase.warm_up, flat=phase.flat)
            group["lr"] = rate * group["scale"]
        images, batch = examples.batch(phase.rows, phase.routed)
        logits, mentions = forward(model, images, batch)
        loss = functional.cross_entropy(logits, batch.labels[batch.labels != IGNORED])
        total = loss + phase.reader_weight * functional.cross_entropy(reader(mentions), batch.entities)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([*rest, *tower], 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{recent:.3f}", total=f"{total.item():.3f}")
        if watch and (step + 1) % every == 0:
            model.eval()
            watch(step + 1, recent)
            model.train()
    model.eval()
