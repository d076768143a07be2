"""The first stage: the tower alone tells the flags apart, in whole pictures and in the halves of pictures of two."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .pictures import Pool, augmented
from .recipe import TowerStage
from .stage import StageTraining, named_parameters, torch_generator
from .student import Student


class TowerHead(nn.Module):
    """A classifier of flags over the patches of a picture, which it weighs; dropped after the first stage."""

    def __init__(self, width: int, countries: int) -> None:
        super().__init__()
        self.norm, self.weigh, self.classify = nn.LayerNorm(width), nn.Linear(width, 1), nn.Linear(width, countries)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (picture, country) logits of the whole picture, of its left and of its right half."""
        states = self.norm(states)
        side = math.isqrt(states.shape[1])
        grid = states.unflatten(1, (side, side))
        weights = self.weigh(grid)[..., 0]
        parts = (slice(None), slice(None, side // 2), slice(side // 2, None))
        whole, left, right = (self._pooled(grid[:, :, part], weights[:, :, part]) for part in parts)
        return whole, left, right

    def _pooled(self, states: Tensor, weights: Tensor) -> Tensor:
        shares = weights.flatten(1).softmax(-1)[..., None]
        return self.classify((shares * states.flatten(1, 2)).sum(1))


class SeeingTraining(StageTraining[TowerStage]):
    """The tower alone."""

    name = "seeing"

    def __init__(self, settings: TowerStage, student: Student, pool: Pool, *, seed: int) -> None:
        super().__init__(settings, student, pool)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = TowerHead(student.shape.width, pool.singles.shape[1])

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the tower's and the head's parameters."""
        return [named_parameters("model.vision_tower", self.student.tower), named_parameters("head", self.head)]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the cross-entropy of the flag, and of the flags in the halves of pictures of two."""
        settings = self.settings
        batch = self.pool.draw(rng, singles=settings.singles, pairs=settings.pairs)
        states = self.student.see(augmented(batch.pixels, torch_generator(rng)))
        whole, _, _ = self.head(states[: settings.singles])
        _, left, right = self.head(states[settings.singles :])
        alone = torch.tensor([countries[0] for countries in batch.countries[: settings.singles]])
        sides = torch.tensor(batch.countries[settings.singles :])
        halves = functional.cross_entropy(left, sides[:, 0]) + functional.cross_entropy(right, sides[:, 1])
        loss = functional.cross_entropy(whole, alone, label_smoothing=settings.smoothing)
        hits = (whole.argmax(-1) == alone).float().mean()
        beside = (left.argmax(-1) == sides[:, 0]).float().mean()
        return loss + settings.halves * halves / 2, {"flag": hits.item(), "left": beside.item()}
