"""The change of one weight as low-rank factors, and how changes get into a model's weights and out of them again.

`AppliedDelta` is the way back: it holds copies. `held` puts something in for the length of a block, and an
`EditSession` keeps one edit after the other in effect until it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import Prompt, VisionLanguageModel
from ...models.guards import uninterrupted
from ...models.placement import OpenedWeight
from ..requests import EditError, listed_requests, with_answers_seen

logger = logging.getLogger("multrace")
PARTS = ("left", "right", "keys", "residuals", "weights", "owners")
NO_OWNER = -1
MOSTLY = 0.9
"""A change of which less is retained is pointed out."""
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
        """Return a block in which the model has the change."""


Made = TypeVar("Made", bound=Change, covariant=True)
"""The kind of change that a session makes."""


@runtime_checkable
class WritesWeights(Protocol):
    """A change of weights that a session can keep in the model beside others."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hash of each weight that it touches, before the change."""

    def write(self, vlm: VisionLanguageModel) -> None:
        """Add the change to the model's weights; the caller holds the way back."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What is left of a change when the changed weight is rounded to the dtype that it is stored in."""

    dtype: str
    """The dtype of the weight, such as "bfloat16"."""
    lost: float
    """Frobenius norm of what rounding takes from the change, relative to that of the change."""
    survives: float
    """Share of what the change adds to the outputs at its keys that the rounded change adds; 1 for a change of none."""

    @property
    def is_lossy(self) -> bool:
        """Whether so much is lost that the edit may not work."""
        return self.survives < MOSTLY

    def __str__(self) -> str:
        return (
            f"rounding to {self.dtype} takes {self.lost:.2%} of the norm of the change and leaves {self.survives:.1%} "
            "of what it adds at its keys"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightChange:
    """The change of one weight W in y = W k; column i of `left` and row i of `right` belong to key i.

    Raises `EditError` if shapes or dtypes disagree.
    """

    left: Tensor
    """(hidden, rank) float32."""
    right: Tensor
    """(rank, mlp) float32; left @ right is added to W, transposed where the model stores W transposed (Conv1D)."""
    keys: Tensor
    """(rank, mlp) float32, the inputs at which the output is to change or to stay."""
    residuals: Tensor
    """(rank, hidden) float32, the change of the output that was asked for at each key; 0 if it is to stay."""
    weights: Tensor = field(default_factory=_none_given)
    """(rank,) float32, the weight of each key in the least-squares problem; inf (default) is met exactly."""
    owners: Tensor = field(default_factory=_none_given)
    """(rank,) int64, the index in `Delta.requests` of the request that a key serves; -1 (default) for none."""

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
        if not (self.weights > 0).all():
            raise EditError(f"the weights of keys are above 0, with inf for exact; found {self.weights.min().item()}")

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
        """Return what the change adds to the output at keys (n, mlp), (n, hidden) float64."""
        return keys.double() @ self.right.double().T @ self.left.double().T

    def rows(self, weight: Tensor, *, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of rows of the stored weight with their new values, in its dtype and on its device.

        The sum is taken in float64 and rounded once. Few rows are widened at a time, so that the extra memory does not
        grow with the weight. Each run is computed from the weight as it is at that moment, so that a caller may write
        the run back at once.
        """
        for run, change in self._runs(weight, transposed=transposed):
            yield run, (weight.detach()[run].double() + change).to(weight.dtype)

    def _runs(self, weight: Tensor, *, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of rows of the stored weight with what is added to them, float64."""
        across, along = (self.right.T, self.left.T) if transposed else (self.left, self.right)
        across, along = (factor.to(weight.device, torch.float64) for factor in (across, along))
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            run = slice(start, start + step)
            yield run, across[run] @ along

    def rounding(self, weight: Tensor, *, transposed: bool) -> Rounding:
        """Return what is lost when this change is added to the stored weight and the sum is rounded to its dtype."""
        lost = whole = 0.0
        keys = self.keys.to(weight.device, torch.float64)
        moved = {part: keys.new_zeros(self.rank, self.shape[0]) for part in ("rounded", "exact")}
        for run, change in self._runs(weight, transposed=transposed):
            before = weight.detach()[run].double()
            step = (before + change).to(weight.dtype).double() - before
            lost += float((step - change).square().sum())
            whole += float(change.square().sum())
            for part, added in (("rounded", step), ("exact", change)):
                if transposed:
                    moved[part] += keys[:, run] @ added
                else:
                    moved[part][:, run] = keys @ added.T
        met, wanted = float((moved["rounded"] * moved["exact"]).sum()), float(moved["exact"].square().sum())
        return Rounding(
            dtype=str(weight.dtype).removeprefix("torch."),
            lost=(lost / whole) ** 0.5 if whole else 0.0,
            survives=met / wanted if wanted else 1.0,
        )

    def retained(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """Return the share of each residual that rounding and the ridge leave, (rank,) float32 on the CPU; 1 for 0."""
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
        """Return the share of its residual by which each output moved, (rank,) float32 on the CPU; 1 for 0.

        moved: the change of each output, (rank, hidden).
        """
        residuals = self.residuals.double()
        wanted = residuals.square().sum(-1)
        share = (moved.cpu().double() * residuals).sum(-1) / wanted
        return torch.where(wanted > 0, share, torch.ones_like(share)).float()

    def only(self, kept: Tensor) -> Self:
        """Return the change with these rows only, (rank,) boolean; their factors stay as they are."""
        rest = {name: getattr(self, name)[kept] for name in PARTS if name != "left"}
        return replace(self, left=self.left[:, kept], **rest)

    def resolved(self, kept: Tensor, residuals: Tensor) -> Self:
        """Return the change that meets new residuals (kept rows, hidden) at the kept rows alone, (rank,) boolean.

        The X of the solver in (K right^T + diag(1/weights)) X = R, left = X^T, needs only what is stored, since
        a row of `right` is its key (or direction) divided by the cost, whatever other keys there are. It is
        solved in float64. Raises `EditError` if the stored factors do not solve these equations themselves.
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
        """Return the sum of changes of one weight: their rows one after the other."""
        rows = {name: torch.cat([getattr(change, name) for change in changes]) for name in PARTS if name != "left"}
        return cls(left=torch.cat([change.left for change in changes], dim=1), **rows)


class AppliedDelta:
    """A change that is in a model's weights, and the way back: it holds a copy of every touched weight.

    A touched weight that is offloaded or quantised is an ordinary one in memory until the change is undone; then the
    very weight that was there is back.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self.fingerprints: Mapping[str, str] = {}
        """Hash of each touched weight with the change in it."""
        self._saved: dict[str, Tensor | OpenedWeight] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Also copy or open these weights, unless that is done already; `restore` puts them back as they are now."""
        for name in names:
            if name not in self._saved:
                opened = self.vlm.open_weight(name)
                self._saved[name] = self.vlm.weight(name).detach().clone() if opened is None else opened

    @torch.no_grad()
    def put_in(self, names: Iterable[str], write: Callable[[], None]) -> None:
        """Copy these weights, call `write`, which changes them, and note what became of them.

        If `write` fails, or is interrupted, every touched weight is as it was before the handle touched it.
        """
        names = tuple(names)
        with self.vlm.lock:
            try:
                self.keep(names)
                write()
                self.fingerprints = {**self.fingerprints, **self.vlm.fingerprint(names)}
            except BaseException:
                uninterrupted(self.restore)
                raise

    def undo(self) -> None:
        """Put the touched weights back, bit-equal to before.

        A later change of the same weight has to be undone first; to drop it silently, or to keep half of it, would be
        worse. Raises `EditError` if the change is already undone, or if a weight was changed since.
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
            uninterrupted(self.restore)

    def restore(self) -> None:
        """Put the touched weights back, whatever was written to them since; do nothing once they are back."""
        with self.vlm.lock:
            overwrite(self.vlm, {name: saved for name, saved in self._saved.items() if isinstance(saved, Tensor)})
            for saved in self._saved.values():
                if isinstance(saved, OpenedWeight):
                    saved.close()
            self._saved = {}

    @contextmanager
    def taken_out(self) -> Iterator[VisionLanguageModel]:
        """Yield the model with the touched weights as they were; on any exit they are bit-equal to before the block.

        Raises `EditError` if one of them is offloaded or quantised, because it cannot be put back for a while.
        """
        own = {name: saved for name, saved in self._saved.items() if isinstance(saved, Tensor)}
        if len(own) < len(self._saved):
            opened = next(name for name in self._saved if name not in own)
            raise EditError(
                f"{opened} of '{self.vlm.name}' is offloaded or quantised, and the unedited model is needed between "
                "edits; make own_moments(vlm, layers=...) before the first edit, and pass them as moments="
            )
        with held(self.vlm, lambda handle: handle.put_in(own, lambda: overwrite(self.vlm, own))):
            yield self.vlm

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the weights that are copied or opened."""
        return tuple(self._saved)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightState:
    """Some weights of a model in one state, which can be put into it again for the length of a block."""

    weights: Mapping[str, Tensor]
    """Copies by parameter name, in the dtype and on the device of the weights."""

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with these weights; on any exit every one of them is bit-equal to before."""
        return held(vlm, lambda handle: handle.put_in(self.weights, lambda: overwrite(vlm, self.weights)))


@contextmanager
def held(vlm: VisionLanguageModel, put_in: Callable[[AppliedDelta], None]) -> Iterator[VisionLanguageModel]:
    """Yield the model with what `put_in` puts into it; on any exit every touched weight is bit-equal to before.

    Other threads wait for the block to end. An interrupt does not leave the model half restored.
    """
    with vlm.lock:
        handle = AppliedDelta(vlm)
        try:
            put_in(handle)
            yield vlm
        finally:
            uninterrupted(handle.restore)


@torch.no_grad()
def overwrite(vlm: VisionLanguageModel, values: Mapping[str, Tensor]) -> None:
    """Write these values into the weights of these names."""
    for name, value in values.items():
        vlm.weight(name).copy_(value)


def write_all(vlm: VisionLanguageModel, steps: Iterable[Mapping[str, WeightChange]]) -> None:
    """Add changes by parameter name to the model's weights, in this order. Raises `EditError` as `write`."""
    for changes in steps:
        for name, change in changes.items():
            write(vlm, name, change)


@torch.no_grad()
def write(vlm: VisionLanguageModel, name: str, change: WeightChange) -> None:
    """Add the change to the model's weight in place. Raises `EditError` if it overflows, with part of it written.

    Warns in one line if the dtype of the weight takes up little of the change, which half precision can do.
    """
    weight = vlm.weight(name)
    if weight.dtype not in _WIDE and (rounding := change.rounding(weight, transposed=vlm.is_transposed(name))).is_lossy:
        logger.warning(
            "%s: %s; RuntimeEdit(delta=...) keeps the whole of it beside the weights, as an adapter does, and so does "
            "a model loaded in float32",
            *(name, rounding),
        )
    for run, rows in change.rows(weight, transposed=vlm.is_transposed(name)):
        if not torch.isfinite(rows).all():
            advice = "edit with a clamp" if weight.dtype in _WIDE else "load the model in float32, or edit with a clamp"
            raise EditError(f"the edited {name} overflows {weight.dtype}; {advice}")
        weight[run] = rows


def check_fingerprints(vlm: VisionLanguageModel, wanted: Mapping[str, str], model: str) -> None:
    """Raise `EditError` unless the weights of these names are bit by bit those that were edited."""
    found = vlm.fingerprint(wanted)
    for name, digest in wanted.items():
        if found[name] != digest:
            raise EditError(
                f"this edit was made on '{model}', where {name} has hash {digest[:12]}; in '{vlm.name}' "
                f"({vlm.dtype}) it has {found[name][:12]}: another model, precision or "
                "quantisation, or an edit is applied; "
                "go back to the weights that were edited, or pass on_other_weights=True to add the change to these"
            )


class EditSession(Generic[Made]):
    """Edits of one model, made one on top of the other, which stay in effect until the session ends.

    `editor.start(vlm)` gives one, and `with` begins and ends it: inside the block the model has every edit that the
    session has made, other threads wait for it, and on any exit each touched weight is bit-equal to before. One copy is
    held of each touched weight, however many edits there are.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> first, second = (vlm.prompt(None, text) for text in ("Who won?", "Who lost?"))
        >>> with mt.MultEdit(layer=5, steps=40).start(vlm) as session:
        ...     _ = session.edit([mt.EditRequest(question=first, target="Pruro")])
        ...     _ = session.edit([mt.EditRequest(question=second, target="Draivo")])
        ...     vlm.answers([first, second])
        ['Pruro', 'Draivo']
    """

    def __init__(self, vlm: VisionLanguageModel, make: Callable[[tuple[EditRequest, ...], bool], Made]) -> None:
        """Prepare a session. `make` turns requests into a change, and is told whether to show progress bars."""
        self.vlm, self._make = vlm, make
        self._handle: AppliedDelta | None = None
        self._prints: dict[str, tuple[str, Tensor, int | None]] = {}
        """Of each weight that this session wrote, the hash, the weight, and torch's count of changes of it."""

    def __enter__(self) -> Self:
        if self._handle is not None:
            raise EditError(f"this session of '{self.vlm.name}' is open already; start another one after its end")
        self.vlm.lock.__enter__()
        self._handle = AppliedDelta(self.vlm)
        try:
            self._begin(self._handle)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @property
    def prompt_transform(self) -> Callable[[Prompt], Prompt] | None:
        """How the edited model has to be asked; None for edits that are in its weights."""
        return None

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the weights that the session has changed."""
        return self._open_handle().touched

    def propose(self, requests: Sequence[EditRequest], *, progress: bool = False) -> Made:
        """Return the change that would make these edits in the model as it is now, and leave the model unchanged.

        Args:
            requests: The facts to write.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, or no edit can be made.
        """
        requests = listed_requests(requests)
        return with_answers_seen(self.vlm, self._make(requests, progress), requests)

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> Made:
        """Return the change that makes these edits; it is in effect until the session ends.

        Args:
            requests: The facts to write.
            name: Name of the edit in the session's history; by default its number.
            progress: Show progress bars.

        Raises:
            EditError: As `propose`; the session is not inside a `with`; or a weight overflows. The model is then as it
                was before this edit.
        """
        handle = self._open_handle()
        change = self.propose(requests, progress=progress)
        self._put_in(handle, cast(WritesWeights, change))  # a session of changes in the prompt has an `edit` of its own
        return change

    def adopt(self, requests: Sequence[EditRequest], change: Any) -> None:
        """Put a change into the model that an earlier session made of these requests, in the order of that session.

        The session then goes on with the same bits as the earlier one. Raises `EditError` as `edit`.
        """
        self._put_in(self._open_handle(), change)

    def state(self) -> WeightState:
        """Return copies of the weights that the session has changed, as they are now."""
        return WeightState(weights={name: self.vlm.weight(name).detach().clone() for name in self.touched})

    @property
    def is_changed(self) -> bool:
        """Whether the model has edits of this session at the moment."""
        return self._handle is not None and bool(self._handle.touched)

    def fingerprint(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hash of each weight; one that only this session has written is not read again."""
        return {name: self._known(name) or self.vlm.fingerprint([name])[name] for name in names}

    def _known(self, name: str) -> str | None:
        digest, weight, version = self._prints.get(name, (None, None, None))
        return digest if weight is self.vlm.weight(name) and version == _version(weight) is not None else None

    def _begin(self, handle: AppliedDelta) -> None:
        """What is put into the model when the session begins."""

    def _put_in(self, handle: AppliedDelta, change: WritesWeights) -> AppliedDelta:
        """Write the change, and return the way back to the state before it."""
        names = tuple(change.fingerprints)
        handle.keep(names)
        own = AppliedDelta(self.vlm)
        own.put_in(names, lambda: change.write(self.vlm))
        try:
            for name, digest in own.fingerprints.items():
                weight = self.vlm.weight(name)
                self._prints[name] = (digest, weight, _version(weight))
        except BaseException:  # an interrupt
            uninterrupted(own.restore)
            raise
        return own

    def _open_handle(self) -> AppliedDelta:
        if self._handle is None:
            raise EditError(
                "this session has not begun, or has ended; use it in a block: with editor.start(vlm) as session: ..."
            )
        return self._handle

    def _end(self) -> None:
        try:
            uninterrupted(self._open_handle().restore)
        finally:
            self._handle = None
            self._prints = {}
            self.vlm.lock.__exit__(None, None, None)


def _version(weight: Tensor) -> int | None:
    """Torch's count of changes in place; None where it does not count them."""
    return None if weight.is_inference() else weight._version
