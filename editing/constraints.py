"""The rows of one layer's problem: keys of the edit first, then keys that stay, which are eliminated again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .changes import WeightChange
from .errors import EditError
from .keys import Lookup
from .requests import EditRequest
from .solve import Constraints, Solution

_SAME = 1e-3  # of a key's length: keys closer than this are one key as far as any edit is concerned


@dataclass(eq=False)
class Rows:
    """Constraints of one layer while they are gathered; the keys of the edit come first."""

    keys: list[Tensor]
    directions: list[Tensor] | None
    residuals: list[Tensor]
    weights: list[float]
    names: list[str]
    mean_square: float

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        found: Sequence[Lookup],
        residuals: Sequence[Tensor],
        *,
        weight: float,
        two_keys: bool,
    ) -> Rows:
        """The keys of an edit, one name and one tensor of residuals (key, hidden) for each lookup."""
        means = [each.keys for each in found]
        return cls(
            keys=[each.plain_keys for each in found] if two_keys else list(means),
            directions=list(means) if two_keys else None,
            residuals=list(residuals),
            weights=[weight for keys in means for _ in keys],
            names=[name for name, keys in zip(names, means, strict=True) for _ in keys],
            mean_square=torch.cat(means).double().square().sum(-1).mean().item(),
        )

    def add(self, preserved: Sequence[tuple[str, Tensor]], weight: float) -> None:
        """More keys, whose outputs stay."""
        for name, keys in preserved:
            keys = keys.to(self.keys[0])
            self.keys.append(keys)
            self.residuals.append(keys.new_zeros(len(keys), self.residuals[0].shape[1]))
            self.weights += [weight] * len(keys)
            self.names += [name] * len(keys)
            if self.directions is not None:
                self.directions.append(keys)

    def constraints(self) -> Constraints:
        """All rows together."""
        return Constraints(
            keys=torch.cat(self.keys),
            residuals=torch.cat(self.residuals),
            weights=torch.tensor(self.weights, dtype=torch.float64),
            directions=None if self.directions is None else torch.cat(self.directions),
            names=tuple(self.names),
        )


def reduced(solution: Solution, constraints: Constraints, count: int, owners: Sequence[int]) -> WeightChange:
    """The change with the first `count` rows alone: those whose outputs stay are eliminated from its equations.

    With G = K right^T and rows 1 (edited) and 2 (kept, residual 0), X2 = -(G22 + 1/w2)^-1 G21 X1, so that the same
    change is X1^T (right1 - G21^T (G22 + 1/w2)^-T right2): the file holds a row per edited key and not one per kept
    key, and taking an edit out or solving some of them anew leaves what was kept in force.
    """
    right = solution.right[:count]
    if count < len(solution.right):
        kept, keys = solution.right[count:], constraints.keys[count:].double()
        gram = keys @ kept.T + torch.diag(1 / solution.weights[count:])
        right = right - torch.linalg.lstsq(gram, keys @ right.T).solution.T @ kept
    parts = {"left": solution.left[:, :count], "right": right, "keys": constraints.keys[:count]}
    parts |= {"residuals": constraints.residuals[:count], "weights": solution.weights[:count]}
    return WeightChange(
        **{part: tensor.float().cpu().contiguous() for part, tensor in parts.items()}, owners=torch.tensor(owners)
    )


def check_contradictions(keys: Sequence[Tensor], requests: Sequence[EditRequest]) -> None:
    """EditError if two requests want different answers at the same key."""
    stacked = torch.stack(list(keys)).double()
    distances = torch.cdist(stacked, stacked) / stacked.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    for first, second in (distances < _SAME).nonzero().tolist():
        one, other = requests[first], requests[second]
        if first < second and one.target != other.target:
            raise EditError(
                f"two requests contradict each other: {one.label!r} and {other.label!r} have the same key at this "
                f"layer and token but the targets {one.target!r} and {other.target!r}; drop one of them, or edit where "
                "their keys differ (a later layer, another token)"
            )
