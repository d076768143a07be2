"""The least-squares problem of one weight, and how its rows are gathered: edited keys first, then preserved ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import EditError
from .keys import Lookup
from .requests import EditRequest

_SAME = 1e-3  # of a key's length: keys closer than this are one key as far as any edit is concerned


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What the change of one weight is to achieve, one row a key.

    EditError if shapes disagree, a number is not finite, or a weight is not above 0.
    """

    keys: Tensor
    """K (n, width), any float dtype: inputs of the weight."""
    residuals: Tensor
    """R (n, hidden): the wanted change of the output at each key; zero preserves it."""
    weights: Tensor
    """w (n,), above 0; inf is exact."""
    directions: Tensor | None = None
    """(n, width), the keys that D is made of, where they are not those that it is measured at. ROME's two keys: the
    mean over templates here, the key of the plain prompt in `keys`. D is then X^T directions N, and least no more."""
    names: tuple[str, ...]
    """(n,) whose row it is, for messages; a name may stand for several rows."""

    def __post_init__(self) -> None:
        tensors = {"keys": self.keys, "residuals": self.residuals, "weights": self.weights}
        if self.directions is not None:
            tensors["directions"] = self.directions
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count = len(self.names)
        matrices = all(len(shapes[name]) == 2 for name in shapes if name != "weights")
        if not count:
            raise EditError("no constraints to solve for; pass at least one edit, as a row of keys and of residuals")
        if not matrices or any(shape[:1] != (count,) for shape in shapes.values()):
            raise EditError(
                f"the parts of {count} constraints do not fit together: {shapes}; pass keys (n, width), residuals "
                "(n, hidden), weights (n,) and one name a row"
            )
        if len(shapes["weights"]) != 1 or shapes.get("directions", shapes["keys"]) != shapes["keys"]:
            raise EditError(f"weights must be (n,) and directions shaped like the keys; found {shapes}")
        for name in tensors.keys() - {"weights"}:
            _check_finite(name, tensors[name])
        if not (self.weights > 0).all():
            raise EditError(f"weights must be above 0, with inf for exact; found {self.weights.tolist()}")


@dataclass(eq=False)
class Rows:
    """The rows of one layer's problem while they are gathered; the keys of the edit come first."""

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

    def problem(self) -> Problem:
        """All rows together."""
        return Problem(
            keys=torch.cat(self.keys),
            residuals=torch.cat(self.residuals),
            weights=torch.tensor(self.weights, dtype=torch.float64),
            directions=None if self.directions is None else torch.cat(self.directions),
            names=tuple(self.names),
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


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise EditError(
            f"the {name} hold numbers that are not finite; lower the learning rate, or load a half-precision model in "
            "float32"
        )
