"""What a change of one weight costs: a ridge, old keys, directions that it may not touch, and keys of earlier edits.

M = lambda I + mu C is factorised once; D Q^T = 0 for the protected directions, the rows of Q. See `problem.py`.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ..changes import Delta, HistoryEntry
from ..requests import EDITED, NOT_GENERATED, EditError, edited_questions

_TINY = torch.finfo(torch.float64).tiny
_EPSILON = torch.finfo(torch.float64).eps
_REFINED = 1e-12  # the residual, relative to the key, at which a refined solution is as good as a float64 one
_SPANNED = 1e-12  # share of the largest eigenvalue of a Gram matrix above which a direction belongs to its keys
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
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise EditError(
                f"keys {tuple(keys.shape)} do not fit a weight of width {self.width}; pass (n, {self.width})"
            )
        whole = self._inverse(keys.double())
        return whole, whole if self.protected is None else self._projected(whole)

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
        spanned = vectors[:, values > _SPANNED * values[-1]].T
        if self.protected is not None:
            own = self.protected.to(spanned)
            _, sizes, rest = torch.linalg.svd(_without(_without(spanned, own), own), full_matrices=False)
            spanned = torch.cat([own, rest[sizes > _SPANNED**0.5]])
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

    def _projected(self, whole: Tensor) -> Tensor:
        directions = cast(Tensor, self.protected).to(whole.device)
        if self.moment is not None:
            along, factor = (part.to(whole.device) for part in self._protection)
            whole = whole - torch.cholesky_solve(directions @ whole.T, factor).T @ along
        return _without(_without(whole, directions), directions)  # twice is exact to rounding

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
        found, residual, before = torch.zeros_like(keys), keys, float("inf")
        for _ in range(_ROUNDS):
            # Rows of length one, so that float32 neither overflows nor underflows however small the residual is.
            scaled = residual * scales
            lengths = scaled.norm(dim=-1, keepdim=True).clamp(min=_TINY)
            step = torch.cholesky_solve((scaled / lengths).float().T, factor).T.double()
            found = found + step * lengths * scales
            residual = keys - self.ridge * found - self.moment_weight * (found @ moment.double())
            # What float64 itself leaves behind, after the stopping rule of LAPACK's dsposv.
            rounding = self.width**0.5 * _EPSILON * size * found.norm(dim=-1)
            allowed = torch.maximum(_REFINED * keys.norm(dim=-1), rounding)
            left = (residual.norm(dim=-1) / allowed.clamp(min=_TINY)).max().item()
            if left <= 1:
                return found
            if not left < before / 2:
                return None
            before = left
        return None


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
        _check_square(moment, width)
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


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """Return the directions to protect: eigenvectors of a moment with at least this eigenvalue, (direction, width).

    A change that does not touch them leaves the outputs at nearly all old keys as they are. What is left for edits are
    the other width - direction dimensions. Source: AlphaEdit (arXiv 2410.02355), with a threshold of 2e-2.

    Args:
        moment: (width, width), symmetric.
        threshold: Smallest eigenvalue of a protected direction, above 0, in units of a squared key entry; it has to be
            chosen for each model.

    Raises:
        EditError: No direction is left for edits.
    """
    _check_square(moment, len(moment))
    if not (threshold > 0 and threshold < float("inf")):
        raise EditError(f"threshold={threshold} is not a finite number above 0; pass for example threshold=0.02")
    values, vectors = torch.linalg.eigh(moment.double())
    kept = int((values < threshold).sum())
    if not kept:
        raise EditError(
            f"all {len(moment)} directions have a second moment of at least {threshold:g} (the smallest is "
            f"{values[0].item():.3g}), so nothing is left to edit in; pass a threshold between that and "
            f"{values[-1].item():.3g}"
        )
    return vectors[:, kept:].T.contiguous()


def _without(rows: Tensor, directions: Tensor) -> Tensor:
    return rows - (rows @ directions.T) @ directions


def _check_square(moment: Tensor, width: int) -> None:
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


_KEY = 32  # digits of a question's key
FACTS = "facts"
"""The entry of a request's text that holds the keys of its questions."""


class EarlierKeys:
    """The keys of the edits that are in a model, as one running Gram matrix K^T K for each weight.

    Where the outputs of earlier edits are to stay, their keys count only through this matrix (`Cost.holding`), so that
    an edit costs the same however many came before it. A matrix is made when it is first needed, and then follows.

    A fact that is edited again gets its new target: the keys of its earlier edits are subtracted from the matrix, since
    they would hold the outputs at the old target just where the new one is wanted. The earlier change stays in the
    weights, and the new one is measured from there. Two requests are of one fact if they share a question, with its
    picture, that is to get the target.
    """

    def __init__(self) -> None:
        self._grams: dict[str, Tensor] = {}
        """(width, width) float64 by parameter name, on the device of the weight."""
        self._entries: dict[str, HistoryEntry] = {}
        self._replaced: dict[str, set[int]] = {}
        """Requests of each edit whose facts were edited again, or that were taken out of the history."""
        self._facts: dict[str, set[tuple[str, int]]] = {}
        """Key of a question -> the edits and requests that gave it its target."""

    def follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        """Add an edit that is now in the model, in place of earlier edits of the same facts.

        delta: the edit itself, if it need not be read from its file.
        """
        edited = {index: facts for index, facts in _edited_facts(entry).items() if index not in entry.gone}
        self._replace({fact for facts in edited.values() for fact in facts})
        self._entries[entry.name], self._replaced[entry.name] = entry, set(entry.gone)
        for index, facts in edited.items():
            for fact in facts:
                self._facts.setdefault(fact, set()).add((entry.name, index))
        for weight in self._grams.keys() & entry.fingerprints.keys():
            self._grams[weight] += self._of_entry(entry.name, weight, like=self._grams[weight], delta=delta)

    def gram(self, weight: Tensor, name: str, facts: Set[str]) -> Tensor | None:
        """Return the matrix of a weight without the keys of these facts, which are edited again; None for no keys."""
        touching = [entry.name for entry in self._entries.values() if name in entry.fingerprints]
        if not touching:
            return None
        if name not in self._grams:
            width = self._entries[touching[0]].delta.changes[name].shape[1]
            self._grams[name] = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
            for entry in touching:
                self._grams[name] += self._of_entry(entry, name, like=self._grams[name])
        gram = self._grams[name]
        for entry, requests in self._places(facts).items():
            if name in self._entries[entry].fingerprints:
                own = _gram(self._entries[entry].delta, name, lambda owner, own=requests: owner in own)
                gram = _without_keys(gram, own.to(gram))
        return gram if gram.any() else None

    def _of_entry(self, entry: str, name: str, *, like: Tensor, delta: Delta | None = None) -> Tensor:
        replaced = self._replaced[entry]
        delta = self._entries[entry].delta if delta is None else delta
        return _gram(delta, name, lambda owner: owner not in replaced).to(like)

    def _places(self, facts: Set[str]) -> dict[str, set[int]]:
        """The edits and their requests that gave these facts the targets that they have."""
        places: dict[str, set[int]] = {}
        for fact in facts:
            for entry, request in self._facts.get(fact, ()):
                places.setdefault(entry, set()).add(request)
        return {entry: requests - self._replaced[entry] for entry, requests in places.items()}

    def _replace(self, facts: Set[str]) -> None:
        for entry, requests in self._places(facts).items():
            for name in self._grams.keys() & self._entries[entry].fingerprints.keys():
                own = _gram(self._entries[entry].delta, name, lambda owner, own=requests: owner in own)
                self._grams[name] = _without_keys(self._grams[name], own.to(self._grams[name]))
            self._replaced[entry] |= requests
        for fact in facts:
            self._facts.pop(fact, None)


def _without_keys(gram: Tensor, own: Tensor) -> Tensor:
    """Return a Gram matrix without some of its keys: exactly zero, and no rounding, if they are all of its keys.

    What rounding leaves would span arbitrary directions, in which an infinite weight lets nothing be changed.
    """
    rest = gram - own
    return torch.zeros_like(gram) if rest.trace() <= _SPANNED * gram.trace() else rest


def facts_of(request: EditRequest) -> tuple[str, ...]:
    """Return short keys of the questions that are to get the target."""
    return tuple(dict.fromkeys(question.key[:_KEY] for question in edited_questions(request)))


def _edited_facts(entry: HistoryEntry) -> dict[int, list[str]]:
    """The keys of the questions of each request that was edited."""
    return {
        index: str(request.get(FACTS, "")).split()
        for index, request in enumerate(entry.requests)
        if request.get("status", EDITED) in (EDITED, NOT_GENERATED)
    }


def _gram(delta: Delta, name: str, is_counted: Callable[[int], bool]) -> Tensor:
    """K^T K (width, width) float64 of the keys in a delta whose requests count."""
    change = delta.changes[name]
    keys = change.keys[[is_counted(owner) for owner in change.owners.tolist()]].double()
    return keys.T @ keys
