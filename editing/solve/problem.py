"""The algebra of closed-form edits: one least-squares problem, of which every editor is a setting.

The change D of a weight W in y = W k is

    argmin_D  sum_i w_i |D k_i - r_i|^2 + tr(D M D^T),   M = lambda I + mu C,   subject to D Q^T = 0

with keys k_i (the rows of K), residuals r_i (wanted minus current output, the rows of R), weights w_i of which an
infinite one makes D k_i = r_i exact, a ridge lambda, a second moment C of weight mu, and protected directions, the rows
of Q. A key to be preserved is a row whose residual is zero. The optimum is computed in its thin form,

    (K N K^T + diag(1 / w)) X = R,   D = X^T K N,   N = M^-1 - M^-1 Q^T (Q M^-1 Q^T)^-1 Q M^-1

an n x n system after one factorisation of M, and none of M where C is absent: then nothing here is width x width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import Projection
from ..changes import WeightChange
from ..requests import EditError
from ..values import Lookup
from .cost import Cost, StackedCost

_LEAST = 1e-3  # share of a squared key that counts as left, however close the kept keys are
_SAME = 1e-3  # of a key's length: keys closer than this are one key as far as any edit is concerned


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What the change of one weight is to achieve, with one row for each key.

    Raises `EditError` if shapes disagree, a number is not finite, or a weight is not above 0.
    """

    keys: Tensor
    """K (n, width), in any float dtype: inputs of the weight."""
    residuals: Tensor
    """R (n, hidden): the wanted change of the output at each key; zero keeps the output."""
    weights: Tensor
    """w (n,), above 0: the weight of each row; inf is met exactly."""
    directions: Tensor | None = None
    """(n, width), the keys that D is made of, if they are not those at which it is measured: ROME has the mean key over
    templates here and the key of the plain prompt in `keys`. D is then X^T directions N, which is not the least one."""
    names: tuple[str, ...]
    """The name of each row for messages, n of them; several rows may have one name."""

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
    """The rows of one layer's problem while they are collected; the keys of the edit come first."""

    keys: list[Tensor]
    directions: list[Tensor] | None
    residuals: list[Tensor]
    weights: list[float]
    names: list[str]
    edited: int
    """Number of rows of the edit."""

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
        """Return the rows of an edit, from one name and one tensor of residuals (key, hidden) for each lookup."""
        means = [each.keys for each in found]
        return cls(
            keys=[each.plain_keys for each in found] if two_keys else list(means),
            directions=list(means) if two_keys else None,
            residuals=list(residuals),
            weights=[weight for keys in means for _ in keys],
            names=[name for name, keys in zip(names, means, strict=True) for _ in keys],
            edited=sum(map(len, means)),
        )

    def add(self, preserved: Sequence[tuple[str, Tensor]], weight: float) -> None:
        """Add keys whose outputs are to stay; that of a key of zero, which an expert does not read, stays anyway."""
        for name, keys in preserved:
            keys = keys.to(self.keys[0])
            keys = keys[keys.any(-1)]
            self.keys.append(keys)
            self.residuals.append(keys.new_zeros(len(keys), self.residuals[0].shape[1]))
            self.weights += [weight] * len(keys)
            self.names += [name] * len(keys)
            if self.directions is not None:
                self.directions.append(keys)

    def ridge(self, fraction: float) -> float:
        """Return a share of the mean squared norm of what the other rows leave of the edit's keys.

        A kept key of weight w leaves of a key k what a ridge regression of k on the kept keys does not explain, with
        the ridge fraction |k|^2 / w; an infinite weight leaves what is orthogonal to it. At least a thousandth counts.
        """
        own = torch.cat(self.directions or self.keys).double()[: self.edited]
        whole = own.square().sum(-1).mean().item()
        kept, weights = torch.cat(self.keys).double()[self.edited :], self.weights[self.edited :]
        if not len(kept):
            return fraction * whole
        prices = fraction * whole / torch.tensor(weights, dtype=torch.float64, device=kept.device)
        gram = kept @ kept.T
        gram.diagonal().add_(prices + _EPSILON * len(kept) * gram.diagonal().max())
        shadow = own @ kept.T
        explained = (shadow * torch.linalg.solve(gram, shadow.T).T).sum(-1).mean().item()
        return fraction * max(whole - explained, _LEAST * whole)

    @property
    def own(self) -> Rows:
        """The rows of the edit alone."""
        count, taken = 0, 0
        while count < self.edited:
            count, taken = count + len(self.keys[taken]), taken + 1
        directions = None if self.directions is None else self.directions[:taken]
        lists = {"keys": self.keys[:taken], "residuals": self.residuals[:taken], "directions": directions}
        return replace(self, **lists, weights=self.weights[:count], names=self.names[:count])

    def with_weights(self, weights: Sequence[float]) -> Rows:
        """Return these rows with other weights of those behind the edit's own."""
        return replace(self, weights=[*self.weights[: self.edited], *weights])

    def problem(self) -> Problem:
        """Return the problem of all rows."""
        return Problem(
            keys=torch.cat(self.keys),
            residuals=torch.cat(self.residuals),
            weights=torch.tensor(self.weights, dtype=torch.float64),
            directions=None if self.directions is None else torch.cat(self.directions),
            names=tuple(self.names),
        )


def contradictions(keys: Sequence[Tensor], targets: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of keys (width,) that are the same but have different targets, each pair in both orders."""
    stacked = torch.stack(list(keys)).double()
    distances = torch.cdist(stacked, stacked) / stacked.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    pairs = (distances < _SAME).nonzero().tolist()
    return [(first, second) for first, second in pairs if targets[first] != targets[second]]


def check_contradictions(keys: Sequence[Tensor], requests: Sequence[EditRequest]) -> None:
    """Raise `EditError` if two requests want different answers at the same key."""
    for first, second in contradictions(keys, [request.target for request in requests])[:1]:
        one, other = requests[first], requests[second]
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


_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A change of one weight, as factors: left @ right (hidden, width) is added to W in y = W k."""

    left: Tensor
    """(hidden, n) float64"""
    right: Tensor
    """(n, width) float64"""
    weights: Tensor
    """(n,) float64, the weights that were used: finite for an exact row that was relaxed, inf if the cost is free."""
    relaxed: tuple[str, ...]
    """Names of the exact rows that could not be told apart and were met as far as they agree, each once."""
    condition: float
    """Condition number (1-norm) of the n x n system that was solved, with keys of length one; at least 1."""


def solve(
    cost: Cost | StackedCost, problem: Problem, *, fallback_weight: float = 1e3, separation: float = 1e-2
) -> Solution:
    """Return the change of least cost that meets the problem, in factors of rank at most n.

    It is computed in float64 on the device of the keys. Exact rows are met exactly unless some cannot be told apart: a
    key whose distance to the span of the other exact keys and the protected directions is below `separation` times its
    length (both in M^-1, so that this is a sine and scales do not matter) is named in `Solution.relaxed`, and so are
    those it is close to. They get the finite weight fallback_weight / (k M^-1 k): a row that is alone would meet
    fallback_weight / (1 + fallback_weight) of what was asked, and two that contradict each other meet in the middle,
    with a change of at most sqrt(fallback_weight) times the size of an ordinary one. For this, a relaxed row with a
    direction of its own is made of its key instead. In a free cost (no ridge, no moment) all weights act as infinite
    ones, since nothing speaks against meeting them.

    Args:
        cost: What a change costs, and which directions it may not touch.
        problem: The rows to meet.
        fallback_weight: Weight of relaxed rows, finite and above 0.
        separation: Sine below which two exact rows count as one, between 0 and 1.

    Raises:
        EditError: The keys do not fit the cost, a parameter is out of range, or the system has no solution in float64.

    Source: MultEdit (arXiv 2406.04236) is a ridge and weights of one; MEMIT (2210.07229, eq. 14) a moment and
    weights of one; ROME (2202.05262, eq. 2) and EMMET a moment and exact rows, the former with directions;
    AlphaEdit (2410.02355) a ridge, weights of one and protected directions.
    """
    if not (0 < fallback_weight < float("inf") and 0 < separation < 1):
        raise EditError(
            f"fallback_weight={fallback_weight} must be finite and above 0, separation={separation} between 0 and 1"
        )
    keys = problem.keys.double()
    residuals, weights = problem.residuals.to(keys), problem.weights.to(keys)
    weights = torch.full_like(weights, float("inf")) if cost.is_free else weights.clone()
    directions = None if problem.directions is None else problem.directions.to(keys)
    system, heights, widths, right = _system(cost, keys, directions)
    close = _close(system, 1 / (weights * heights * widths), two_keys=directions is not None, separation=separation)
    if directions is not None and close.any():
        system, heights, widths, right = _system(cost, keys, torch.where(close[:, None], keys, directions))
    weights[close] = fallback_weight / (heights * widths)[close]
    system.diagonal().add_(1 / (weights * heights * widths))
    unknown = _solved(system, residuals / heights[:, None], two_keys=directions is not None) / widths[:, None]
    return Solution(
        left=unknown.T,
        right=right,
        weights=weights,
        relaxed=_names(problem.names, close),
        condition=torch.linalg.cond(system, 1).item(),
    )


def reduced(solution: Solution, problem: Problem, count: int, owners: Sequence[int]) -> WeightChange:
    """Return the change with the first `count` rows alone; those whose outputs stay are eliminated from its equations.

    With G = K right^T and rows 1 (edited) and 2 (kept, residual 0), X2 = -(G22 + 1/w2)^-1 G21 X1, so that the same
    change is X1^T (right1 - G21^T (G22 + 1/w2)^-T right2): the file holds a row per edited key and not one per kept
    key, and taking an edit out or solving some of them anew leaves what was kept in force.
    """
    right = solution.right[:count]
    if count < len(solution.right):
        kept, keys = solution.right[count:], problem.keys[count:].double()
        gram = keys @ kept.T + torch.diag(1 / solution.weights[count:])
        right = right - torch.linalg.lstsq(gram, keys @ right.T).solution.T @ kept
    parts = {"left": solution.left[:, :count], "right": right, "keys": problem.keys[:count]}
    parts |= {"residuals": problem.residuals[:count], "weights": solution.weights[:count]}
    return WeightChange(
        **{part: tensor.float().cpu().contiguous() for part, tensor in parts.items()}, owners=torch.tensor(owners)
    )


def changes_by_weight(projection: Projection, change: WeightChange) -> dict[str, WeightChange]:
    """Return the change of each weight of a projection by name, with the keys that the weight reads.

    Several experts share what is asked for at a key: each is asked for what it adds, and for as much of what the ridge
    leaves undone as its part of the key's squared length.
    """
    if len(projection.slices) == 1:
        return {projection.name: change}
    undone = change.residuals.double() - change.moved(change.keys)
    squared = change.keys.double().square()
    changes: dict[str, WeightChange] = {}
    for name, columns in projection.slices.items():
        reads = change.right[:, columns].any(-1)
        if not reads.any() and (change.rank or changes):
            continue
        own = change.only(reads)
        own = replace(own, right=own.right[:, columns].contiguous(), keys=own.keys[:, columns].contiguous())
        share = squared[reads][:, columns].sum(-1, keepdim=True) / squared[reads].sum(-1, keepdim=True)
        changes[name] = replace(own, residuals=(own.moved(own.keys) + share * undone[reads]).float())
    return changes


def unrouted(projection: Projection, lookups: Iterable[tuple[int, Lookup]]) -> dict[int, str]:
    """Return the requests some of whose edited tokens do not go to the one expert that is edited, and which do not.

    lookups: the request of each goal, and what was looked up for the goal.
    """
    reasons: dict[int, str] = {}
    for owner, lookup in lookups:
        if zeros := (~lookup.keys.any(-1)).nonzero().flatten().tolist():
            reasons[owner] = (
                f"of the {len(lookup.keys)} edited tokens, number {', '.join(str(each + 1) for each in zeros)} is "
                f"not routed to {projection}; pass expert='routed', or an expert of all these tokens "
                "(vlm.routing shows them)"
            )
    return reasons


def _system(cost: Cost | StackedCost, keys: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K N Dir^T (n, n) for keys and directions of length one, the lengths (n,) of both, and Dir N (n, width)."""
    whole, right = cost.parts(keys if directions is None else directions)
    if directions is None:
        lengths = _sizes(keys, whole)
        system = keys @ right.T / lengths[:, None] / lengths
        return (system + system.T) / 2, lengths, lengths, right
    heights, widths = _sizes(keys, cost.parts(keys)[0]), _sizes(directions, whole)
    return keys @ right.T / heights[:, None] / widths, heights, widths, right


def _sizes(keys: Tensor, whole: Tensor) -> Tensor:
    """(n,) lengths of the keys in M^-1, with 1 for a key of zero."""
    sizes = (keys * whole).sum(-1).clamp(min=0).sqrt()
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _close(system: Tensor, prices: Tensor, *, two_keys: bool, separation: float) -> Tensor:
    """(n,) bool: the constraints that are exact and whose keys lie within `separation` of the span of the others.

    For a Gram matrix G of unit keys, 1 / (G^-1)_ii is the squared sine of the angle between key i and the span of the
    others. Where keys and directions differ G is not symmetric, and 1 / |column i of G^-1|, the distance of row i to
    the span of the other rows, takes that place.
    """
    squared = separation**2
    # Far below what is told apart, far above rounding: it makes the inverse finite without changing the verdict.
    jitter = max(1e-5 * squared, 10 * len(system) * _EPSILON)
    exact = (prices <= jitter).nonzero().squeeze(-1)
    block = system[exact][:, exact]
    if two_keys:
        left, values, right = torch.linalg.svd(block)
        inverse = (right.mT / values.clamp(min=jitter)) @ left.mT
        distances = 1 / inverse.norm(dim=0)
    else:
        values, vectors = torch.linalg.eigh(block)
        distances = 1 / (vectors.square() / values.clamp(min=jitter)).sum(-1)
    close = torch.zeros(len(system), dtype=torch.bool, device=system.device)
    close[exact] = distances < squared
    return close


def _solved(system: Tensor, wanted: Tensor, *, two_keys: bool) -> Tensor:
    if two_keys:
        found, failed = torch.linalg.solve_ex(system, wanted)
    else:
        factor, failed = torch.linalg.cholesky_ex(system)
        found = torch.cholesky_solve(wanted, factor)
    if failed or not torch.isfinite(found).all():
        raise EditError(
            f"the system of {len(system)} constraints has no solution in float64; pass a larger ridge, or edit fewer "
            "facts at once"
        )
    return found


def _names(names: Iterable[str], chosen: Tensor) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen))
