"""What every stage of the training has: what it trains, the loss of a step, and the course of its learning rate.

Seeing: the tower alone tells the flags apart. Without it, the joint training would spend its time on learning to see.

Reading: image tokens spell a name, and no picture is there yet. In the first layers, the states at the constraint's
tokens behind them become those that the original has at the tokens of the country's name in the same sentence, aligned
at their last tokens. Above these layers the original goes on by itself. A squared error alone is small before countries
can be told apart, since a few dimensions carry most of the variance, so every dimension is standardised over countries,
and the right country must also be the nearest.

Answering: the distributions of the answer's tokens behind such tokens become those of the original that is told the
name. Answers by name, and texts that the original wrote itself, are taught beside them, so that they stay as they are.
The first layers go on reading meanwhile: in every step their error counts too, and in some steps nothing else does.
What the changes of attention alter without a picture counts in every step (`keeping`). In routed steps the picture
reaches the answer through the constraint alone, and its tokens need not run above the first layers.

Spelling: the tower and the projector write such tokens under pictures.

Joining: the whole answers under pictures.

The random numbers of a step depend on the seed, the stage and the step alone, so a training that goes on from a
checkpoint takes the same steps as one that was never cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .pictures import Pool
from .recipe import Stage
from .student import Student

_Settings = TypeVar("_Settings", bound=Stage)
_MOMENTUM = (0.95, 0.85)
"""AdamW's first coefficient at the lowest and at the highest learning rate."""


def one_cycle(step: int, steps: int, stage: Stage) -> tuple[float, float]:
    """Return the learning rate of a step, as a share of its peak, and AdamW's first coefficient (Smith, 1cycle).

    Both follow half a cosine up and half a cosine down again; the coefficient is lowest where the rate is highest.
    """
    top = max(1.0, stage.warm_up * steps - 1)
    if step < top:
        low, share = stage.start, step / top
    else:
        low, share = stage.start * 1e-4, 1 - (step - top) / max(1.0, steps - 1 - top)
    height = (1 - math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
    return low + (1 - low) * height, _MOMENTUM[0] + (_MOMENTUM[1] - _MOMENTUM[0]) * height


class StageTraining(ABC, Generic[_Settings]):
    """One stage: what it trains, and the loss of a step."""

    name: str

    def __init__(self, settings: _Settings, student: Student, pool: Pool) -> None:
        self.settings, self.student, self.pool = settings, student, pool

    @abstractmethod
    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters that are trained by name, one group for each of the stage's peak learning rates."""

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a step, and numbers to show. All that is random comes from `rng`."""

    def begin(self) -> None:
        """Prepare the parameters at the first step of the stage."""


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a generator of torch that depends on nothing but `rng`."""
    return torch.Generator().manual_seed(int(rng.integers(2**63)))


def named_parameters(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by their names behind a path."""
    return {f"{path}.{name}": value for name, value in module.named_parameters()}
