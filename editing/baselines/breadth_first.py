"""The breadth-first order of a training: epochs over shuffled mini-batches, and prompts that are held out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..requests import EditError


@dataclass(frozen=True, kw_only=True)
class BreadthFirst:
    """Epochs over mini-batches of the prompts of all requests, with early stopping (LocFT-BF, arXiv 2509.22072).

    Each epoch visits every prompt once, in a new random order, and takes a step of Adam for each mini-batch whose loss
    is above the `stop_loss` of the editor; an epoch whose mean loss is not above it is the last. That is the published
    rule. Facts do not follow from one another, so a fact that is left out of the training is never learned, and its
    loss does not tell when to stop. Held out are therefore other prompts of trained facts, that is contexts and rewrite
    prompts, and never the own question of a request. After each epoch their loss tells whether what was learned still
    carries over to other pictures and wordings; the training ends `patience` epochs after it was lowest, with the
    weights of that epoch. Where nothing can be held out, the last weights stay. Raises `EditError` for a setting that
    is out of range.

    Example:
        >>> import torch
        >>> from multrace.editing import BreadthFirst
        >>> owners = torch.tensor([0, 0, 1, 1, 2])  # two prompts of request 0, two of request 1, one of request 2
        >>> trained, held_out = BreadthFirst(held_out=0.4).split(owners)
        >>> trained.tolist(), held_out.tolist()
        ([0, 2, 4], [1, 3])
    """

    epochs: int = 60
    """Largest number of passes over the prompts, in place of `steps`; 0 changes nothing."""
    mini_batch: int = 64
    """Number of prompts whose mean gradient makes one step; the last mini-batch of an epoch may have fewer."""
    held_out: float = 0.1
    """Share of all prompts that is held out, rounded to a whole number of prompts; from 0, for none, to below 1."""
    patience: int = 3
    """Number of epochs without a new lowest loss of the held-out prompts after which the training ends, at least 1."""
    seed: int = 0
    """Random seed of the held-out prompts and of the order of the others; no global generator is used."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "epochs of at least 0": self.epochs >= 0,
                "mini_batch of at least 1": self.mini_batch >= 1,
                "held_out from 0 to below 1": 0 <= self.held_out < 1,
                "patience of at least 1": self.patience >= 1,
            },
        )

    def split(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the prompts to train on and of those that are held out, in order.

        owners: (prompt,) int64, for each prompt the index of its request, in ascending order; the first prompt of each
        request is its own question.
        """
        is_other = torch.zeros(len(owners), dtype=torch.bool)
        is_other[1:] = owners[1:] == owners[:-1]
        others = is_other.nonzero().flatten()
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.seed))
        held_out = others[drawn[: round(self.held_out * len(owners))]].sort().values
        is_trained = torch.ones(len(owners), dtype=torch.bool)
        is_trained[held_out] = False
        return is_trained.nonzero().flatten(), held_out

    def mini_batches(self, rows: Tensor) -> Iterator[Sequence[Tensor]]:
        """Yield, for each epoch, the mini-batches of these rows, shuffled anew."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield rows[torch.randperm(len(rows), generator=generator)].split(self.mini_batch)

    def steps(self, rows: Tensor) -> int:
        """Return the largest number of steps over these rows."""
        return self.epochs * math.ceil(len(rows) / self.mini_batch)


def check_ranges(settings: object, ranges: Mapping[str, bool]) -> None:
    """Raise `EditError` for the first setting that is out of range. ranges: what is wanted, name first -> whether it
    holds."""
    for wanted, holds in ranges.items():
        if not holds:
            name = wanted.split()[0]
            raise EditError(f"{type(settings).__name__} got {name}={getattr(settings, name)!r}; pass {wanted}")
