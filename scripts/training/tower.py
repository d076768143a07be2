"""Stage 1: the vision tower alone learns what stands where, before any question is asked.

Without it the joint training spends most of its time on seeing. The patches that an entity covers are averaged, and
linear heads on the average predict its parts, its place and who it is.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from tqdm import tqdm

from ...data.world import PLACES, Entity, Scene, World, draw_one, draw_two
from .build import PATCH, SIZE, VISION_HIDDEN

_GRID = SIZE // PATCH
_DRAWN_PER_STEP = 32
_REUSED = 3


def pixels(pictures: list[Scene]) -> Tensor:
    """(picture, 3, SIZE, SIZE) float32, the values the processor gives for pictures of this size."""
    stacked = np.stack([np.asarray(picture.image) for picture in pictures])
    return (torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def sample_entities(world: World, rng: random.Random) -> tuple[Entity, ...]:
    """One taught entity (70 %), two of one kind (15 %) or two of different kinds (15 %)."""
    first, chance = rng.choice(world.taught), rng.random()
    if chance < 0.7:
        return (first,)
    second = rng.choice(
        [other for other in world.taught if other is not first and (other.kind == first.kind) == (chance < 0.85)]
    )
    return (first, second)


def draw(entities: tuple[Entity, ...], rng: random.Random) -> Scene:
    """A fresh training picture of one or two entities."""
    if len(entities) == 1:
        return draw_one(entities[0].figure, rng)
    return draw_two(entities[0].figure, entities[1].figure, rng)


def learning_rate(step: int, steps: int, peak: float, *, warm_up: int, flat: float) -> float:
    """Linear warm-up, flat until the share `flat` of the steps, then a cosine down to 2 % of the peak."""
    share = step / steps
    decay = 1.0 if share < flat else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - flat) / (1 - flat)))
    return peak * min(1.0, (step + 1) / warm_up) * decay


class TowerHeads(nn.Module):
    """Linear readers of an entity's parts, place and identity from the mean of its patches."""

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
        """Sum of the cross-entropies of parts (mean over an entity's four or five), place and identity."""
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
        """Share of entities recognised."""
        wanted = torch.tensor([entity.index for entity in entities])
        return (self.identity(self.norm(features)).argmax(-1) == wanted).float().mean().item()


def _covered(box: tuple[float, float, float, float]) -> Tensor:
    """(patch,) weights that average the patches whose centre lies in the box."""
    centres = (torch.arange(_GRID) + 0.5) / _GRID
    left, top, right, bottom = box
    inside = ((centres > top) & (centres < bottom))[:, None] & ((centres > left) & (centres < right))[None, :]
    return inside.flatten().float() / inside.sum()


def entity_features(tower: nn.Module, pictures: list[Scene]) -> Tensor:
    """(entity, VISION_HIDDEN): mean patch state of every entity of every picture, in order."""
    states = tower(pixel_values=pixels(pictures)).last_hidden_state[:, 1:]
    rows = [row for row, picture in enumerate(pictures) for _ in picture.boxes]
    weights = torch.stack([_covered(box) for picture in pictures for box in picture.boxes])
    return torch.einsum("ep,eph->eh", weights, states[rows])


def _stream(world: World, rng: random.Random) -> Iterator[list[tuple[tuple[Entity, ...], Scene]]]:
    """Batches of fresh pictures, each picture used in three of them: drawing takes a third of the time, nothing repeats
    late.
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
