"""What a change of one weight costs: a ridge, old keys, and directions that it may not touch.

M = lambda I + mu C is factorised once; D Q^T = 0 for the protected directions, the rows of Q. See `problem.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ..requests import EditError

_TINY = torch.finfo(torch.float64).tiny
_EPSILON = torch.finfo(torch.float64).eps
_REFINED = 1e-12  # the residual, relative to the key, at which a refined solution is as good as a float64 one
SPANNED = 1e-12  # share of the largest eigenvalue of a Gram matrix above which a direction belongs to its keys
_ROUNDS = 40  # refinement gains at least a factor of two a round or stops, so this many rounds always suffice


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """The cost tr(D M D^T) of a change D of one weight, and the directions that D may not touch; see `build_cost`."""

    width: int
    """Length of a key."""
    ridge: float
    """lambda, at least 0, in units of a squared key norm. With 0 and no moment, the least change that fits is taken."""
    moment: Tensor | None
    """C (width, width), symmetric and positive semi-definite, in any float dtype; None for none."""
    moment_weight: float
    """mu, at least 0: the number of old keys that the moment stands for."""
    protected: Tensor | None
    """Q (direction, width) float64 with orthonormal rows; None for none."""
    refined: bool
    """Whether M is factorised in float32 and solutions are refined to float64."""

    @property
    def is_free(self) -> bool:
        """Whether a change costs nothing, so that the smallest of the changes that fit best is taken."""
        return self.ridge == 0 and self.moment is None

    def divided(self, keys: Tensor) -> Tensor:
        """Return K N (n, width), float64 on the device of the keys: K M^-1 with the protected directions taken out.

        The factorisation of M is reused by every call. Raises `EditError` if the keys are not (n, width).
        """
        return self.parts(keys)[1]

    def parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return (K M^-1, K N): before and after the protected directions are taken out; otherwise as `divided`."""
        self.check_keys(keys)
        whole = self._inverse(keys.double())
        return whole, whole if self.protected is None else self.projected(whole)

    def check_keys(self, keys: Tensor) -> None:
        """Raise `EditError` unless these are keys (n, width) of the weight."""
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise EditError(
                f"keys {tuple(keys.shape)} do not fit a weight of width {self.width}; pass (n, {self.width})"
            )

    def inverse(self) -> Tensor:
        """Return M^-1 (width, width), float64, of a cost with a moment."""
        return torch.cholesky_inverse(self._factor)

    def holding(self, gram: Tensor, weight: float) -> "Cost":
        """Return the cost of a change that also has to leave the outputs at other keys as they are.

        A key k whose output is to stay is a row with residual zero and weight w in the least-squares problem, and adds
        w D k k^T D^T to what is minimised. All of them together add their Gram matrix to M, whatever their number:
        M = lambda I + mu C + w K^T K gives the same change as the rows do. An infinite weight, or any weight in a free
        cost, protects the directions that the keys span.

        Args:
            gram: K^T K (width, width), float64, of the keys K (key, width).
            weight: w, above 0; inf for exact.

        Raises:
            EditError: The keys and the protected directions leave no direction to edit in.
        """
        if self.is_free or weight == float("inf"):
            return replace(self, protected=self._protected_with(gram))
        moment = gram * weight
        if self.moment is not None:
            moment = moment + self.moment.to(moment) * self.moment_weight
        return replace(self, moment=moment, moment_weight=1.0)

    def _protected_with(self, gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        spanned = vectors[:, values > SPANNED * values[-1]].T
        if self.protected is not None:
            own = self.protected.to(spanned)
            _, sizes, rest = torch.linalg.svd(without_directions(spanned, own), full_matrices=False)
            spanned = torch.cat([own, rest[sizes > SPANNED**0.5]])
        if len(spanned) >= self.width:
            raise EditError(
                f"the keys of earlier edits leave none of {self.width} directions to edit in; pass a finite "
                "earlier_weight with a ridge, or edit another layer"
            )
        return spanned

    def _inverse(self, keys: Tensor) -> Tensor:
        if self.moment is None:
            return keys / self.ridge if self.ridge else keys
        wide = keys.to(self.moment.device)
        refined = self._refine(wide) if self.refined else None
        found = torch.cholesky_solve(wide.T, self._factor).T if refined is None else refined
        return found.to(keys.device)

    def projected(self, whole: Tensor) -> Tensor:
        """Return K N of K M^-1 (n, width): with the protected directions taken out."""
        directions = cast(Tensor, self.protected).to(whole.device)
        if self.moment is not None:
            along, factor = (part.to(whole.device) for part in self._protection)
            whole = whole - torch.cholesky_solve(directions @ whole.T, factor).T @ along
        return without_directions(whole, directions)

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor of M in float64."""
        weighted = cast(Tensor, self.moment).double() * self.moment_weight
        weighted.diagonal().add_(self.ridge)
        factor, failed = torch.linalg.cholesky_ex(weighted)
        if failed:
            raise EditError(
                f"the second moment of width {self.width} with ridge={self.ridge:g} is not positive definite; "
                "take it from more tokens than its width, or pass a ridge above 0"
            )
        return factor

    @cached_property
    def _rough_factor(self) -> tuple[Tensor, Tensor, float] | None:
        """(factor, scales, |M|): S M S = L L^T in float32, with unit diagonal; None where float32 cannot do it."""
        moment = cast(Tensor, self.moment)
        diagonal = moment.diagonal().double() * self.moment_weight + self.ridge
        if not (diagonal > 0).all():
            return None
        scales = diagonal.rsqrt()
        # The square root on both sides keeps the product of weight and scales within the range of float32.
        sides = (scales * self.moment_weight**0.5).float()
        scaled = moment.float() * sides * sides[:, None]
        scaled.diagonal().fill_(1)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        size = torch.linalg.matrix_norm(moment).item() * self.moment_weight + self.ridge
        return None if failed else (factor, scales, size)

    @cached_property
    def _protection(self) -> tuple[Tensor, Tensor]:
        """(Q M^-1, the Cholesky factor of Q M^-1 Q^T)."""
        protected, moment = cast(Tensor, self.protected), cast(Tensor, self.moment)
        along = self._inverse(protected.to(moment.device))
        small = along @ protected.to(along.device).T
        return along, torch.linalg.cholesky((small + small.T) / 2)

    def _refine(self, keys: Tensor) -> Tensor | None:
        """K M^-1 from the float32 factor and float64 residuals; None if that does not get to float64."""
        if self._rough_factor is None:
            return None
        factor, scales, size = self._rough_factor
        moment = cast(Tensor, self.moment)

        def step(residual: Tensor) -> Tensor:
            # Rows of length one, so that float32 neither overflows nor underflows however small the residual is.
            scaled = residual * scales
            lengths = scaled.norm(dim=-1, keepdim=True).clamp(min=_TINY)
            return torch.cholesky_solve((scaled / lengths).float().T, factor).T.double() * lengths * scales

        def product(found: Tensor) -> Tensor:
            return self.ridge * found + self.moment_weight * (found @ moment.double())

        found = refined_solution(keys, step, product, size=size)
        return None if found is None else found[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedCost:
    """The cost of a change of several weights that are one map of stacked keys, each weight with a cost of its own."""

    blocks: tuple[tuple[slice, Cost], ...]
    """The columns of each weight, and its cost; a change leaves the columns of no block as they are."""

    @property
    def is_free(self) -> bool:
        """Whether a change costs nothing, as `Cost.is_free`."""
        return all(cost.is_free for _, cost in self.blocks)

    def parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return (K M^-1, K N) of stacked keys (n, width), as `Cost.parts`; zero in the columns of no block."""
        whole, projected = torch.zeros_like(keys, dtype=torch.float64), torch.zeros_like(keys, dtype=torch.float64)
        for columns, cost in self.blocks:
            whole[:, columns], projected[:, columns] = cost.parts(keys[:, columns])
        return whole, projected


def build_cost(
    width: int,
    *,
    ridge: float,
    moment: Tensor | None = None,
    moment_weight: float = 0.0,
    protected: Tensor | None = None,
    refined: bool = False,
) -> Cost:
    """Return the cost M = ridge I + moment_weight C, with M factorised once.

    M is factorised in float64 on the device of the moment, which takes about 2 width^2 numbers beside the moment while
    it is made and width^2 afterwards.

    Args:
        width: Length of a key.
        ridge: lambda, at least 0, in units of a squared key norm.
        moment: C (width, width), the mean of k k^T over old keys; None for none.
        moment_weight: mu, at least 0: the number of old keys that the moment stands for.
        protected: Q (direction, width) with orthonormal rows, such as `null_space` gives; None for none.
        refined: For devices with slow float64: factorise M in float32, and refine solutions with float64 residuals
            until these are below 1e-12 of the key or at the rounding of float64. If M is too badly conditioned for
            that, it is factorised in float64 after all.

    Raises:
        EditError: Shapes disagree, a number is out of range, the moment is not symmetric, the rows of Q are not
            orthonormal, or M is not positive definite.

    Example:
        >>> import torch
        >>> from multrace.editing.solve import build_cost
        >>> build_cost(2, ridge=4.0).divided(torch.eye(2))
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]], dtype=torch.float64)
    """
    for name, value in (("ridge", ridge), ("moment_weight", moment_weight)):
        if not (value >= 0 and value < float("inf")):
            raise EditError(f"{name}={value} is not a finite number of at least 0; pass for example {name}=0.01")
    if moment is not None:
        check_square(moment, width)
    if protected is not None:
        protected = protected.double()
        _check_protected(protected, width)
    if moment_weight == 0:
        moment = None
    elif moment is None:
        raise EditError(f"moment_weight={moment_weight:g} weighs a second moment, and none is given; pass moment=")
    made = Cost(
        width=width,
        ridge=float(ridge),
        moment=moment,
        moment_weight=float(moment_weight),
        protected=protected if protected is not None and len(protected) else None,
        refined=refined,
    )
    if moment is not None and not (refined and made._rough_factor is not None):
        _ = made._factor  # now, so that a moment that cannot be factorised is refused here
    return made


def refined_solution(
    keys: Tensor, step: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor], *, size: float
) -> tuple[Tensor, float] | None:
    """Return X (n, width) with X M = K to float64, and what the rough solver alone misses, as a share of a key.

    None if the rough solver does not get there.

    Args:
        keys: K (n, width), float64.
        step: The rough solver: what it adds for a residual (n, width).
        product: X -> X M.
        size: A norm of M.
    """
    found, residual, before, lengths = torch.zeros_like(keys), keys, float("inf"), keys.norm(dim=-1)
    missed = 0.0
    for number in range(_ROUNDS):
        found = found + step(residual)
        residual = keys - product(found)
        if not number:
            missed = (residual.norm(dim=-1) / lengths.clamp(min=_TINY)).max().item()
        # What float64 itself leaves behind, after the stopping rule of LAPACK's dsposv.
        rounding = keys.shape[1] ** 0.5 * _EPSILON * size * found.norm(dim=-1)
        allowed = torch.maximum(_REFINED * lengths, rounding)
        left = (residual.norm(dim=-1) / allowed.clamp(min=_TINY)).max().item()
        if left <= 1:
            return found, missed
        if not left < before / 2:
            return None
        before = left
    return None


def without_directions(rows: Tensor, directions: Tensor) -> Tensor:
    """Return rows (n, width) without what lies in orthonormal directions, to rounding."""
    rest = rows - (rows @ directions.T) @ directions
    return rest - (rest @ directions.T) @ directions  # once leaves the rounding of what was taken out


def check_square(moment: Tensor, width: int) -> None:
    """Raise `EditError` unless a second moment is (width, width), finite and symmetric."""
    if moment.shape != (width, width):
        raise EditError(f"a second moment of width {width} is ({width}, {width}); found {tuple(moment.shape)}")
    sums = moment.sum(0, dtype=torch.float64), moment.sum(1, dtype=torch.float64)
    if not all(torch.isfinite(total).all() for total in sums):
        raise EditError("the second moment holds numbers that are not finite; collect it anew, in float32 or float64")
    # Row and column sums tell a mistaken matrix without a second one of its size.
    if (sums[0] - sums[1]).abs().max() > 1e-4 * torch.linalg.matrix_norm(moment) * width**0.5:
        raise EditError("the second moment is not symmetric; pass the mean of k k^T over tokens")


def _check_protected(protected: Tensor, width: int) -> None:
    if protected.ndim != 2 or protected.shape[1] != width or len(protected) >= width:
        raise EditError(
            f"protected directions must be (direction, {width}) with fewer than {width} of them; "
            f"found {tuple(protected.shape)}"
        )
    # One random combination of orthonormal rows keeps its coordinates; that of others does not.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(protected), generator=generator, dtype=torch.float64).to(protected.device)
    if not ((drawn @ protected) @ protected.T - drawn).norm() <= 1e-6 * drawn.norm():
        raise EditError("the protected directions are not orthonormal; pass those of null_space, or the Q^T of a QR")
