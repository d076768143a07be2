"""A made edit: low-rank factors per weight that know their model; applied, undone, saved and loaded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..models import ModelError, VisionLanguageModel
from .errors import EditError
from .files import read_tensors, write_tensors

FORMAT = "multrace delta 1"
PARTS = ("left", "right", "keys", "residuals")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightChange:
    """The change of one weight W in y = W k, and what it was made to achieve. EditError if shapes disagree."""

    left: Tensor
    """(hidden, rank)"""
    right: Tensor
    """(rank, mlp); left @ right is added to W, transposed where the model stores W transposed (GPT-2's Conv1D)."""
    keys: Tensor
    """(key, mlp), the inputs at which the output is to change."""
    residuals: Tensor
    """(key, hidden), the change of the output that was asked for at each key."""

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in PARTS}
        shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        if any(tensor.ndim != 2 or tensor.dtype != torch.float32 for tensor in parts.values()):
            raise EditError(f"a weight change holds four float32 matrices; found {shapes}; see WeightChange")
        (hidden, rank), (rank_too, mlp) = shapes["left"], shapes["right"]
        count = shapes["keys"][0]
        if rank != rank_too or shapes["keys"] != (count, mlp) or shapes["residuals"] != (count, hidden):
            raise EditError(f"the parts of a weight change do not fit together: {shapes}; see WeightChange")

    @property
    def shape(self) -> tuple[int, int]:
        """(hidden, mlp) of the weight in y = W k."""
        return self.left.shape[0], self.right.shape[1]

    def added_to(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """A changed copy in the weight's own dtype, layout and device; the sum is taken in float32 and rounded once."""
        update = self.left.to(weight.device) @ self.right.to(weight.device)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return (wide + (update.T if transposed else update)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """An edit of a model, held outside the model.

    It names the weights it changes and how those looked when the edit was made; it is applied to nothing else unless
    asked to.
    """

    changes: Mapping[str, WeightChange]
    """One change per parameter name."""
    fingerprints: Mapping[str, str]
    """Hash of each touched weight before the edit."""
    model: str
    """Name or path of the model that was edited."""
    revision: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """The editor and its hyper-parameters, as text."""
    requests: tuple[Mapping[str, str], ...] = ()
    """What was asked and how far the value search came, as text, one mapping per request."""

    def __post_init__(self) -> None:
        if not self.changes or set(self.changes) != set(self.fingerprints):
            raise EditError(
                f"a delta needs one fingerprint per changed weight; found {[*self.changes]} and {[*self.fingerprints]}"
            )

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(left, right) per parameter name: float32, (hidden, rank) and (rank, mlp), oriented as in y = W k."""
        return {name: (change.left, change.right) for name, change in self.changes.items()}

    def apply(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> "AppliedDelta":
        """A handle whose undo() takes the change back bit by bit; the model's weights are changed in place until then.

        Deltas on the same weight stack, and are undone in reverse order; on different weights the order is free.
        EditError if the model lacks a weight, or if a weight is not the one that was edited (another model, or an
        edit already applied to it): on_other_weights=True adds the change all the same. Nothing is changed when an
        error is raised.
        """
        edited = self._edited(vlm, on_other_weights=on_other_weights)
        saved = {name: vlm.weight(name).detach().clone() for name in edited}
        handle = AppliedDelta(vlm, saved)
        try:
            _write(vlm, edited)
            handle.fingerprints = vlm.fingerprint(list(edited))
        except BaseException:
            handle.restore()
            raise
        return handle

    @contextmanager
    def applied(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> Iterator[VisionLanguageModel]:
        """The model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Whatever else was written to the same weights inside the block is taken back with it. Errors as in apply.
        """
        handle = self.apply(vlm, on_other_weights=on_other_weights)
        try:
            yield vlm
        finally:
            handle.restore()

    def realised(self, vlm: VisionLanguageModel) -> dict[str, Tensor]:
        """The share of the requested output change that applying would achieve: per parameter name, (key,) float32.

        1 is all, 0 is none; measured along the requested direction after rounding to the model's dtype, so it shows
        what the ridge and a low precision take away. 1 where nothing was requested. The model is left as it is; call
        it while the delta is not applied. EditError as in apply.
        """
        edited = self._edited(vlm, on_other_weights=False)
        shares = {}
        for name, after in edited.items():
            change, before = self.changes[name], vlm.weight(name).detach()
            moved = after.float() - before.float()
            moved = (moved.T if vlm.family.transposed else moved).cpu()
            wanted = change.residuals.square().sum(-1)
            share = ((change.keys @ moved.T) * change.residuals).sum(-1) / wanted
            shares[name] = torch.where(wanted > 0, share, torch.ones_like(share))
        return shares

    def save(self, path: str | Path) -> Path:
        """The path of the safetensors file written (whole or not at all). EditError where it cannot be written."""
        tensors = {f"{part}:{name}": getattr(change, part) for name, change in self.changes.items() for part in PARTS}
        text = {"format": FORMAT, "model": self.model, "revision": self.revision or ""}
        text |= {key: json.dumps(getattr(self, key)) for key in ("fingerprints", "settings", "requests")}
        return write_tensors(path, tensors, text)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The delta in a file that save wrote, bit-equal. EditError if the file is missing or damaged."""
        tensors, text = read_tensors(path)
        if text.get("format") != FORMAT:
            raise EditError(
                f"'{path}' is no saved edit: its header says {text.get('format')!r}, not {FORMAT!r}; "
                "pass a file that Delta.save wrote"
            )
        try:
            prints, settings, requests = (json.loads(text[key]) for key in ("fingerprints", "settings", "requests"))
            changes = {name: WeightChange(**{part: tensors[f"{part}:{name}"] for part in PARTS}) for name in prints}
            origin = {"model": text["model"], "revision": text["revision"] or None}
            return cls(changes=changes, fingerprints=prints, settings=settings, requests=tuple(requests), **origin)
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(
                f"the edit in '{path}' is damaged ({error}); make the edit again and save it anew"
            ) from error

    def _edited(self, vlm: VisionLanguageModel, *, on_other_weights: bool) -> dict[str, Tensor]:
        """The touched weights as they would be with this change, computed without touching the model."""
        try:
            weights = {name: vlm.weight(name) for name in self.changes}
        except ModelError as error:
            raise EditError(f"an edit of '{self.model}' does not fit '{vlm.name}': {error}") from error
        edited = {}
        for name, change in self.changes.items():
            weight, wanted = weights[name], change.shape[::-1] if vlm.family.transposed else change.shape
            if tuple(weight.shape) != wanted or not weight.is_floating_point():
                raise EditError(
                    f"an edit of '{self.model}' changes {name} of shape {wanted}; in '{vlm.name}' it is "
                    f"{tuple(weight.shape)} in {weight.dtype}; load the model that was edited"
                )
        if not on_other_weights:
            self._check_fingerprints(vlm)
        for name, change in self.changes.items():
            edited[name] = change.added_to(weights[name], transposed=vlm.family.transposed)
            if not torch.isfinite(edited[name]).all():
                raise EditError(
                    f"the edited {name} overflows {weights[name].dtype}; load in float32 or edit with a clamp"
                )
        return edited

    def _check_fingerprints(self, vlm: VisionLanguageModel) -> None:
        found = vlm.fingerprint(list(self.fingerprints))
        for name, wanted in self.fingerprints.items():
            if found[name] != wanted:
                raise EditError(
                    f"this edit was made on '{self.model}', where {name} has hash {wanted[:12]}; in '{vlm.name}' "
                    f"({vlm.dtype}) it has {found[name][:12]}: another model or precision, or an edit is applied; "
                    "go back to the weights that were edited, or pass on_other_weights=True to add the change to these"
                )


class AppliedDelta:
    """A change that is in a model's weights, and the way back: it holds a copy of every touched weight."""

    def __init__(self, vlm: VisionLanguageModel, saved: Mapping[str, Tensor]) -> None:
        self.vlm = vlm
        self.fingerprints: Mapping[str, str] = {}
        self._saved = dict(saved)

    def undo(self) -> None:
        """Puts the touched weights back, bit-equal to before. EditError if already undone, or if one was changed since.

        A later change of the same weight has to be undone first; silently dropping it, or keeping half of it, would
        be worse.
        """
        if not self._saved:
            raise EditError(f"this edit of '{self.vlm.name}' is already undone; apply it again for a new handle")
        found = self.vlm.fingerprint(list(self._saved))
        changed = [name for name in self._saved if found[name] != self.fingerprints[name]]
        if changed:
            raise EditError(
                f"cannot undo this edit of '{self.vlm.name}': {', '.join(changed)} was changed after it; "
                "undo the later change first (last in, first out)"
            )
        self.restore()

    def restore(self) -> None:
        """Puts the touched weights back whatever was written to them since; does nothing once undone."""
        _write(self.vlm, self._saved)
        self._saved = {}


@torch.no_grad()
def _write(vlm: VisionLanguageModel, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        vlm.weight(name).copy_(value)
