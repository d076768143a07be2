"""The change of one weight as low-rank factors, and how changes get into a model's weights and out of them again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from ...models import VisionLanguageModel
from ..errors import EditError

PARTS = ("left", "right", "keys", "residuals", "weights", "owners")
NO_OWNER = -1
_WIDE = (torch.float32, torch.float64)
_MATRICES = PARTS[:4]
_CHUNK = 2**20  # entries of a weight that are widened at a time: 8 MiB in float64, whatever the size of the weight
_UNSOLVED = 1e-2  # share of the residuals by which stored factors may miss their own equations


def _none_given() -> Tensor:
    return torch.empty(0)


class Change(Protocol):
    """Anything that can be put into a model for the length of a block, and is taken out again bit by bit.

    A change that works in the prompt rather than in the weights also has a method prompt_transform(prompt) -> Prompt. A
    change that knows what became of each request has `requests`, mappings with a "status".
    """

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """A block in which the model has the change."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightChange:
    """The change of one weight W in y = W k: column i of left and row i of right are there for key i.

    EditError if shapes or dtypes disagree.
    """

    left: Tensor
    """(hidden, rank) float32"""
    right: Tensor
    """(rank, mlp) float32; left @ right is added to W, transposed where the model stores W transposed (Conv1D)."""
    keys: Tensor
    """(rank, mlp) float32, the inputs at which the output is to change, or to stay."""
    residuals: Tensor
    """(rank, hidden) float32, the change of the output that was asked for at each key; 0 where it is to stay."""
    weights: Tensor = field(default_factory=_none_given)
    """(rank,) float32, the weight of each key in the least-squares problem, inf where it is met exactly (default)."""
    owners: Tensor = field(default_factory=_none_given)
    """(rank,) int64, the index in Delta.requests of the request that a key serves; -1 (default) for none."""

    def __post_init__(self) -> None:
        rank = self.left.shape[-1]
        if not self.weights.numel():
            object.__setattr__(self, "weights", torch.full((rank,), torch.inf))
        if not self.owners.numel():
            object.__setattr__(self, "owners", torch.full((rank,), NO_OWNER))
        shapes = {name: tuple(getattr(self, name).shape) for name in PARTS}
        matrices = [getattr(self, name) for name in _MATRICES]
        if any(tensor.ndim != 2 or tensor.dtype != torch.float32 for tensor in matrices):
            raise EditError(f"a weight change holds four float32 matrices; found {shapes}; see WeightChange")
        hidden, mlp = self.shape
        wanted = dict(
            zip(PARTS, [(hidden, rank), (rank, mlp), (rank, mlp), (rank, hidden), (rank,), (rank,)], strict=True)
        )
        if shapes != wanted:
            raise EditError(f"the parts of a weight change do not fit together: {shapes}; see WeightChange")
        if not all(torch.isfinite(matrix).all() for matrix in matrices):
            raise EditError(
                "the factors of a weight change hold numbers that are not finite; make the edit again, with a smaller "
                "learning_rate or a clamp if they were not damaged on the way"
            )
        if self.weights.dtype != torch.float32 or self.owners.dtype != torch.int64:
            raise EditError(
                f"a weight change has float32 weights and int64 owners; found {self.weights.dtype} and "
                f"{self.owners.dtype}; see WeightChange"
            )

    def __repr__(self) -> str:
        hidden, width = self.shape
        return f"WeightChange({hidden} x {width}, rank {self.rank})"

    @property
    def shape(self) -> tuple[int, int]:
        """(hidden, mlp) of the weight in y = W k."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of keys."""
        return self.right.shape[0]

    def moved(self, keys: Tensor) -> Tensor:
        """(n, hidden) float64, what the change adds to the output at keys (n, mlp)."""
        return keys.double() @ self.right.double().T @ self.left.double().T

    def rows(self, weight: Tensor, *, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows of the stored weight and what they become, in its dtype and on its device.

        The sum is taken in float64 and rounded once. Only so many rows are widened at a time that the extra memory
        does not grow with the weight; each run is computed from the weight as it then is, so a caller may write it
        back at once.
        """
        across, along = (self.right.T, self.left.T) if transposed else (self.left, self.right)
        across, along = (factor.to(weight.device, torch.float64) for factor in (across, along))
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            run = slice(start, start + step)
            yield run, torch.addmm(weight.detach()[run].double(), across[run], along).to(weight.dtype)

    def retained(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """(rank,) float32 on the CPU, the share of each residual that rounding and the ridge leave; 1 where it is 0."""
        keys = self.keys.to(weight.device, torch.float64)
        moved = keys.new_zeros(self.rank, self.shape[0])
        for run, changed in self.rows(weight, transposed=transposed):
            step = changed.double() - weight.detach()[run].double()
            if transposed:
                moved += keys[:, run] @ step
            else:
                moved[:, run] = keys @ step.T
        return self.share(moved)

    def share(self, moved: Tensor) -> Tensor:
        """(rank,) float32 on the CPU, how much of its residual each output moved (rank, hidden) by; 1 where it is 0."""
        residuals = self.residuals.double()
        wanted = residuals.square().sum(-1)
        share = (moved.cpu().double() * residuals).sum(-1) / wanted
        return torch.where(wanted > 0, share, torch.ones_like(share)).float()

    def only(self, kept: Tensor) -> Self:
        """The change with these rows only, (rank,) boolean; the factors of the others are taken out and that is all."""
        rest = {name: getattr(self, name)[kept] for name in PARTS if name != "left"}
        return replace(self, left=self.left[:, kept], **rest)

    def resolved(self, kept: Tensor, residuals: Tensor) -> Self:
        """The change that meets new residuals (kept rows, hidden) at the kept rows alone: (rank,) boolean.

        The solver's X in (K right^T + diag(1/weights)) X = R, left = X^T, needs nothing but what is stored: a row of
        right is its key (or direction) through the solver's cost, whatever other keys there are. Solved in float64.
        EditError if the stored factors do not solve these equations themselves.
        """
        gram = self.keys.double() @ self.right.double().T + torch.diag(1 / self.weights.double())
        missed = gram @ self.left.double().T - self.residuals.double()
        if missed.norm() > _UNSOLVED * self.residuals.double().norm():
            raise EditError(
                "the factors of this edit do not solve its own equations, so that they cannot be solved anew without "
                "some of them; take the request out without solving anew, or edit again from the requests left"
            )
        found, failed = torch.linalg.solve_ex(gram[kept][:, kept], residuals.double())
        if failed or not torch.isfinite(found).all():
            raise EditError("the keys that are left cannot be told apart; edit again from the requests left")
        rest = replace(self.only(kept), left=found.T.float().contiguous(), residuals=residuals.float())
        return rest

    @classmethod
    def stacked(cls, changes: Sequence[Self]) -> Self:
        """The sum of changes of one weight: their rows one after the other."""
        rows = {name: torch.cat([getattr(change, name) for change in changes]) for name in PARTS if name != "left"}
        return cls(left=torch.cat([change.left for change in changes], dim=1), **rows)


class AppliedDelta:
    """A change that is in a model's weights, and the way back: it holds a copy of every touched weight."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self.fingerprints: Mapping[str, str] = {}
        self._saved: dict[str, Tensor] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Also copies these weights, unless they are kept already; restore puts them back as they are now."""
        for name in names:
            if name not in self._saved:
                self._saved[name] = self.vlm.weight(name).detach().clone()

    def undo(self) -> None:
        """Puts the touched weights back, bit-equal to before. EditError if already undone, or if one was changed since.

        A later change of the same weight has to be undone first; silently dropping it, or keeping half of it, would
        be worse.
        """
        if not self._saved:
            raise EditError(f"this edit of '{self.vlm.name}' is already undone; apply it again for a new handle")
        with self.vlm.lock:
            found = self.vlm.fingerprint(list(self._saved))
            changed = [name for name in self._saved if found[name] != self.fingerprints[name]]
            if changed:
                raise EditError(
                    f"cannot undo this edit of '{self.vlm.name}': {', '.join(changed)} was changed after it; "
                    "undo the later change first (last in, first out)"
                )
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the touched weights back whatever was written to them since; does nothing once undone."""
        with self.vlm.lock:
            for name, value in self._saved.items():
                self.vlm.weight(name).copy_(value)
            self._saved = {}


@torch.no_grad()
def put_in(vlm: VisionLanguageModel, steps: Sequence[Mapping[str, WeightChange]]) -> AppliedDelta:
    """A handle on changes by parameter name, just written to the model in this order.

    The way back is one copy of each touched weight, however many steps there are. The changes must
    fit. EditError if a weight leaves the finite numbers of its dtype; the weights are then as they were.
    """
    names = {name: None for changes in steps for name in changes}
    handle = AppliedDelta(vlm)
    with vlm.lock:
        try:
            handle.keep(names)
            for changes in steps:
                for name, change in changes.items():
                    write(vlm, name, change)
            handle.fingerprints = vlm.fingerprint(names)
        except BaseException:
            handle.restore()
            raise
    return handle


@torch.no_grad()
def write(vlm: VisionLanguageModel, name: str, change: WeightChange) -> None:
    """Adds the change to the model's weight in place. EditError if it overflows, with part of it written."""
    weight = vlm.weight(name)
    for run, rows in change.rows(weight, transposed=vlm.stores_transposed):
        if not torch.isfinite(rows).all():
            advice = "edit with a clamp" if weight.dtype in _WIDE else "load the model in float32, or edit with a clamp"
            raise EditError(f"the edited {name} overflows {weight.dtype}; {advice}")
        weight[run] = rows


def check_fingerprints(vlm: VisionLanguageModel, wanted: Mapping[str, str], model: str) -> None:
    """EditError unless the weights of these names are bit by bit the ones that were edited."""
    found = vlm.fingerprint(wanted)
    for name, digest in wanted.items():
        if found[name] != digest:
            raise EditError(
                f"this edit was made on '{model}', where {name} has hash {digest[:12]}; in '{vlm.name}' "
                f"({vlm.dtype}) it has {found[name][:12]}: another model or precision, or an edit is applied; "
                "go back to the weights that were edited, or pass on_other_weights=True to add the change to these"
            )
