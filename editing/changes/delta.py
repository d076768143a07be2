"""A made edit: low-rank factors per weight that know their model; applied to the weights or added beside them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...artefacts import files, plain_fields
from ...data import parse_json
from ...data.facts import counted, shortened
from ...models import ModelError, VisionLanguageModel, capture, patch
from ..requests import EditError
from .weight_change import (
    MOSTLY,
    NO_OWNER,
    PARTS,
    AppliedDelta,
    Rounding,
    WeightChange,
    check_fingerprints,
    held,
    write_all,
)

FORMAT = "multrace delta 2"
_EDITED = "edited"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Delta:
    """An edit, held outside the model: low-rank factors for each weight that it changes.

    A delta holds the hash of each weight before the edit, and is applied to no other weights unless you ask for it.
    Raises `EditError` if its parts do not fit together.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who won?")
        >>> request = mt.EditRequest(question=prompt, target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=25).edit(vlm, [request], progress=False)
        >>> with delta.applied(vlm):
        ...     vlm.answers([prompt])
        ['Pruro']
    """

    changes: Mapping[str, WeightChange]
    """The change of each weight, by parameter name; an expert's slice has its number there, as in "down_proj[5]"."""
    fingerprints: Mapping[str, str]
    """Hash of each touched weight before the edit."""
    model: str
    """Name or path of the model that was edited."""
    revision: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """The editor and its hyper-parameters, as text."""
    requests: tuple[Mapping[str, str | float], ...] = ()
    """For each request: what was asked and what became of it, as text, and numbers of the value search."""

    def __post_init__(self) -> None:
        if not self.changes or set(self.changes) != set(self.fingerprints):
            raise EditError(
                f"a delta needs one fingerprint per changed weight; found {[*self.changes]} and {[*self.fingerprints]}"
            )
        for name, change in self.changes.items():
            if not all(NO_OWNER <= owner < len(self.requests) for owner in change.owners.tolist()):
                raise EditError(
                    f"the keys of {name} belong to requests {sorted(set(change.owners.tolist()))}, but the delta has "
                    f"{len(self.requests)} requests; count owners from 0, with {NO_OWNER} for none"
                )

    def __repr__(self) -> str:
        rank = sum(change.rank for change in self.changes.values())
        first, *others = (*self.changes, "")
        weights = first if len(others) == 1 else f"{first} and {len(others) - 1} more"
        editor = self.settings.get("editor", "hand")
        line = f"Delta of {shortened(self.model)} by {editor}: {weights}, {counted(rank, 'key')}"
        return f"{line}\n{requests_line(self.requests)}"

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(left, right) per parameter name: float32, (hidden, rank) and (rank, mlp), oriented as in y = W k."""
        return {name: (change.left, change.right) for name, change in self.changes.items()}

    def apply(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> AppliedDelta:
        """Change the weights of the model in place, and return a handle whose `undo()` takes that back bit by bit.

        The sum is taken in float64 and rounded once, by runs of rows: one copy of each touched weight, kept for undo,
        is all the memory that grows with the weight. Deltas of the same weight stack and are undone in reverse order;
        on different weights the order is free. on_other_weights: add the change to weights that are not those that were
        edited, too.

        Raises:
            EditError: The model lacks a weight, a weight overflows, or a weight is not the one that was edited (another
                model, or an edit is applied already). The weights are then as they were.
        """
        handle = AppliedDelta(vlm)
        with vlm.lock:
            self._put_in(handle, on_other_weights=on_other_weights)
        return handle

    def applied(
        self, vlm: VisionLanguageModel, *, on_other_weights: bool = False
    ) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Whatever else was written to the same weights inside the block is taken back with it. Raises as `apply`.
        """
        return held(vlm, partial(self._put_in, on_other_weights=on_other_weights))

    def write(self, vlm: VisionLanguageModel) -> None:
        """Add the change to the model's weights, whatever they are; the caller holds the way back.

        Raises `EditError` if it does not fit the model, or if a weight overflows, with part of it written.
        """
        self.check_fits(vlm)
        write_all(vlm, [self.changes])

    def _put_in(self, handle: AppliedDelta, *, on_other_weights: bool) -> None:
        self.check_fits(handle.vlm)
        if not on_other_weights:
            check_fingerprints(handle.vlm, self.fingerprints, self.model)
        handle.put_in(self.changes, lambda: self.write(handle.vlm))

    def retained(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> dict[str, Tensor]:
        """Return the share of the requested change that applying would achieve, (key,) float32 per parameter.

        1 is all, 0 is none; measured along the requested direction after rounding to the model's dtype, so it shows
        what the ridge and a low precision take away. 1 where nothing was requested. The model is left as it is; call
        it while the delta is not applied. EditError as in apply, but an overflow is not looked for.
        """
        with vlm.lock:
            self.check_fits(vlm)
            if not on_other_weights:
                check_fingerprints(vlm, self.fingerprints, self.model)
            return {
                name: each.retained(vlm.weight(name), transposed=vlm.is_transposed(name))
                for name, each in self.changes.items()
            }

    def rounding(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> dict[str, Rounding]:
        """Return what is lost of each weight's change when it is applied to this model in the dtype of its weights.

        Next to nothing in float32; in half precision, entries below half a step of the weight are lost. The model is
        left as it is. Raises `EditError` as `apply`.
        """
        with vlm.lock:
            self.check_fits(vlm)
            if not on_other_weights:
                check_fingerprints(vlm, self.fingerprints, self.model)
            return {
                name: each.rounding(vlm.weight(name), transposed=vlm.is_transposed(name))
                for name, each in self.changes.items()
            }

    def report(self, shares: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return one line per request on what became of it, from the shares that `retained` (or a runtime edit) gives.

        A share below nine tenths is pointed out. A delta whose keys belong to no request has one line per weight.
        """
        if not self.requests:
            return tuple(f"{name}: {_share(share.min().item())}" for name, share in shares.items() if share.numel())
        lines = []
        for index, (request, share) in enumerate(zip(self.requests, self.shares(shares), strict=True)):
            asked = f"{index}: {request.get('question', '')!r} -> {request.get('target', '')!r}"
            lines.append(f"{asked}: {request.get('status', 'no keys of its own') if share is None else _share(share)}")
        return tuple(lines)

    def shares(self, retained: Mapping[str, Tensor]) -> tuple[float | None, ...]:
        """Return the share that is retained of each request over all its keys; None for a request without keys.

        Keys count by the size of what they ask for, since a key that asks for next to nothing (where an answer ends
        anyway) says little. retained: the shares per key, as `retained` gives them.
        """
        found: list[float | None] = []
        for index in range(len(self.requests)):
            met = asked = 0.0
            for name, change in self.changes.items():
                own = change.owners == index
                squared = change.residuals[own].double().square().sum(-1)
                met += float((retained[name][own].double() * squared).sum())
                asked += float(squared.sum())
            found.append(met / asked if asked else None)
        return tuple(found)

    def owned(self, index: int) -> dict[str, Tensor]:
        """Return the keys that serve this request, (rank,) boolean per parameter name.

        Raises `EditError` for an index out of range, or for an edited request of which no key is known.
        """
        if not 0 <= index < len(self.requests):
            raise EditError(
                f"no request {index} in this edit of '{self.model}': it has {len(self.requests)} requests, "
                "counted from 0"
            )
        own = {name: change.owners == index for name, change in self.changes.items()}
        if self.requests[index].get("status", _EDITED) == _EDITED and not any(rows.any() for rows in own.values()):
            raise EditError(
                f"this edit of '{self.model}' does not say which of its factors belong to request {index}; "
                "make it again with an editor that does"
            )
        return own

    def without(self, *indices: int, resolve: bool = False) -> Self:
        """Return the delta without these requests, counted from 0; the later ones move up.

        Their own factors are taken out, and the others stay as they were solved. resolve: solve the others again, as if
        these requests had never been made. Raises `EditError` as `owned`, and for `resolve` with a change of several
        weights, since what a deeper layer has to add depends on what a lower one does.
        """
        gone = {index: self.owned(index) for index in indices}
        if resolve:
            self.check_solvable()
        numbers = torch.full((len(self.requests) + 1,), NO_OWNER)  # the last entry is for rows without an owner
        left = [index for index in range(len(self.requests)) if index not in gone]
        numbers[left] = torch.arange(len(left))
        changes = {}
        for name, change in self.changes.items():
            kept = torch.ones(change.rank, dtype=torch.bool)
            for own in gone.values():
                kept &= ~own[name]
            rest = change.resolved(kept, change.residuals[kept]) if resolve else change.only(kept)
            changes[name] = replace(rest, owners=numbers[rest.owners])
        return replace(self, changes=changes, requests=tuple(self.requests[index] for index in left))

    def check_solvable(self) -> None:
        """Raise `EditError` if the delta changes several weights, so that no part of it can be solved again."""
        if len(self.changes) > 1:
            raise EditError(
                f"this edit of '{self.model}' changes {len(self.changes)} weights, and the keys of one depend on the "
                "change of another; solving anew needs the model: edit again from the requests that are left"
            )

    def check_fits(self, vlm: VisionLanguageModel) -> None:
        """Raise `EditError` unless the model has weights of these names and shapes."""
        for name, change in self.changes.items():
            try:
                weight = vlm.weight(name)
            except ModelError as error:
                raise EditError(f"an edit of '{self.model}' does not fit '{vlm.name}': {error}") from error
            wanted = change.shape[::-1] if vlm.is_transposed(name) else change.shape
            if tuple(weight.shape) != wanted or not weight.is_floating_point():
                raise EditError(
                    f"an edit of '{self.model}' changes {name} of shape {wanted}; in '{vlm.name}' it is "
                    f"{tuple(weight.shape)} in {weight.dtype}; load the model that was edited"
                )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, and return its path. Raises `EditError` if that fails."""
        text = {"format": FORMAT} | {key: json.dumps(value) for key, value in self.words().items()}
        return files.write_tensors(path, self.tensors(), text, error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the delta in a file that `save` wrote. Raises `EditError` if the file is missing or damaged."""
        tensors, text = files.read_tensors(path, error=EditError)
        if text.get("format") != FORMAT:
            raise EditError(
                f"'{path}' is no saved edit: its header says {text.get('format')!r}, not {FORMAT!r}; "
                "pass a file that Delta.save wrote"
            )
        with damage_named(path):
            return cls.assembled(tensors, {key: parse_json(value) for key, value in text.items() if key != "format"})

    @property
    def digest(self) -> str:
        """A SHA-256 (hex) of everything that the delta holds."""
        tensors = self.tensors()
        words = json.dumps([self.words(), [*tensors]], sort_keys=True)
        return files.digest(words, *tensors.values())

    def words(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON takes it."""
        parts = {"fingerprints": dict(self.fingerprints), "settings": dict(self.settings)}
        return parts | {
            "model": self.model,
            "revision": self.revision,
            "requests": [dict(each) for each in self.requests],
        }

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor under prefix + PART:PARAMETER."""
        return {
            f"{prefix}{part}:{name}": getattr(change, part) for name, change in self.changes.items() for part in PARTS
        }

    @classmethod
    def assembled(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any], prefix: str = "") -> Self:
        """The delta that `tensors` and `words` spell; KeyError, TypeError or EditError where something is missing."""
        parts = {name: {part: tensors[f"{prefix}{part}:{name}"] for part in PARTS} for name in words["fingerprints"]}
        changes = {name: WeightChange(**each) for name, each in parts.items()}
        plain = plain_fields(cls, words, ("fingerprints", "settings", "model", "revision", "requests"))
        return cls(changes=changes, **plain)


def requests_line(requests: Sequence[Mapping[str, str | float]]) -> str:
    """Return one line on the requests of a change: how many, the first of them, and how many were not edited."""
    if not requests:
        return "no requests"
    first = (
        f"{shortened(str(requests[0].get('question', '')), 40)} -> {shortened(str(requests[0].get('target', '')), 30)}"
    )
    other = sum(request.get("status", _EDITED) != _EDITED for request in requests)
    return f"{counted(len(requests), 'request')}: {first}{', ...' if len(requests) > 1 else ''}" + (
        f"; {other} not edited" if other else ""
    )


def compose(*deltas: Delta) -> Delta:
    """Return one delta that does what these do one after the other; their requests follow each other in this order.

    A delta whose fingerprint of a weight differs from that of the first one was made with the earlier ones in place:
    what it asked for is restated for the weights of the first one. The sum is rounded once when it is applied, not once
    per delta. Raises `EditError` for no deltas, or for edits of different models.
    """
    below: list[Sequence[int]] = []
    for index, delta in enumerate(deltas):
        first = {name: digest for each in reversed(deltas[:index]) for name, digest in each.fingerprints.items()}
        made_after = any(first.get(name, digest) != digest for name, digest in delta.fingerprints.items())
        below.append(range(index) if made_after else ())
    return joined(deltas, below)


def joined(deltas: Sequence[Delta], below: Sequence[Sequence[int]]) -> Delta:
    """As `compose`. below: for each delta, the indices of the earlier ones that were in place when it was made."""
    if not deltas:
        raise EditError("no deltas to compose; pass at least one")
    _check_one_model(deltas)
    rows: dict[str, list[WeightChange]] = {}
    requests: list[Mapping[str, str]] = []
    for delta, earlier in zip(deltas, below, strict=True):
        for name, change in delta.changes.items():
            owners = torch.where(change.owners == NO_OWNER, change.owners, change.owners + len(requests))
            residuals = change.residuals.double()
            asked = residuals.any(dim=-1, keepdim=True)  # where the output was to stay, it is to stay
            for other in (deltas[index].changes[name] for index in earlier if name in deltas[index].changes):
                residuals = residuals + asked * other.moved(change.keys)
            rows.setdefault(name, []).append(replace(change, owners=owners, residuals=residuals.float()))
        requests += delta.requests
    settings = [dict(each.settings) for each in deltas]
    alike = all(each == settings[0] for each in settings)
    before = {name: digest for each in reversed(deltas) for name, digest in each.fingerprints.items()}
    return Delta(
        changes={name: WeightChange.stacked(changes) for name, changes in rows.items()},
        fingerprints={name: before[name] for name in rows},  # in the order in which a file gives the changes back
        model=deltas[0].model,
        revision=deltas[0].revision,
        settings=settings[0] if alike else {"editor": "composed", "parts": json.dumps(settings)},
        requests=tuple(requests),
    )


def _check_one_model(deltas: Sequence[Delta]) -> None:
    """EditError if the hashes of the weights show that two deltas were made on different models.

    A path says nothing: one model may be opened from two folders. Of a weight that several deltas change, the first may
    have been changed by the time of the second, so that its hash is another one; then the name of the model, or the
    hash of another weight, has to say that it is the same.
    """
    base: dict[str, str] = {}
    for delta in deltas:
        shared = [name for name in delta.fingerprints if name in base]
        is_same = (delta.model, delta.revision) == (deltas[0].model, deltas[0].revision)
        if shared and not is_same and all(delta.fingerprints[name] != base[name] for name in shared):
            raise EditError(
                f"cannot compose edits of different models: '{deltas[0].model}' and '{delta.model}' have other weights "
                f"in {shared[0]}; compose edits of one model"
            )
        base = {**delta.fingerprints, **base}


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """A block in which whatever is missing or wrong in a file's parts becomes one EditError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EditError(f"the edit in '{path}' is damaged ({error}); make the edit again and save it anew") from error


def _share(share: float) -> str:
    note = "" if share >= MOSTLY else "; a runtime edit, a higher precision or a smaller ridge brings the rest"
    return f"{share:.1%} retained{note}"


@dataclass(frozen=True, kw_only=True, eq=False)
class RuntimeEdit:
    """A delta that forward hooks add to what its weights compute; no weight is touched.

    bfloat16 has 8 significant bits, so that a weight takes up no change below a few thousandths of itself. Here the
    low-rank term is computed in float32 from what the weight reads, and the sum is rounded once, as an output. It costs
    two thin products per call. It can be used wherever a change is expected, like a `Delta`.
    """

    delta: Delta

    @contextmanager
    def applied(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> Iterator[VisionLanguageModel]:
        """Yield the model with the change beside its weights; on exit the hooks are removed.

        Raises `EditError` as `Delta.applied`, except that nothing can overflow.
        """
        paths = {name.removesuffix(".weight"): change for name, change in self.delta.changes.items()}
        with vlm.lock:
            self.delta.check_fits(vlm)
            if not on_other_weights:
                check_fingerprints(vlm, self.delta.fingerprints, self.delta.model)
        with capture(vlm, paths, inputs=True) as read:
            terms = {path: _adding(vlm, path, change, read) for path, change in paths.items()}
            with patch(vlm, terms):
                yield vlm

    @torch.no_grad()
    def retained(self, vlm: VisionLanguageModel, *, on_other_weights: bool = False) -> dict[str, Tensor]:
        """Return the share of the requested change of outputs that this achieves, as `Delta.retained` for weights.

        It is measured on what the edited modules put out for the keys, with keys and outputs in the dtype of the model.
        """
        outputs = {name: vlm.module(name.removesuffix(".weight")) for name in self.delta.changes}
        inputs = {name: change.keys.to(vlm.weight(name)) for name, change in self.delta.changes.items()}
        with vlm.running():
            before = {name: module(inputs[name]).double() for name, module in outputs.items()}
        with self.applied(vlm, on_other_weights=on_other_weights):
            after = {name: module(inputs[name]).double() for name, module in outputs.items()}
        return {name: change.share(after[name] - before[name]) for name, change in self.delta.changes.items()}


def _adding(
    vlm: VisionLanguageModel, path: str, change: WeightChange, read: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function that adds left @ right of the module's last input to its output."""
    device = vlm.compute_device(path)
    wide = torch.promote_types(vlm.dtype, torch.float32)
    left, right = (factor.to(device, wide) for factor in (change.left, change.right))

    def add(output: Tensor) -> Tensor:
        return (output.to(wide) + read[path].to(device, wide) @ right.T @ left.T).to(output.dtype)

    return add
