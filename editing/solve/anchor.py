"""The norm anchor: wanted outputs of one size, so that a long stream of edits does not make outputs grow.

Each edit adds its change to what the weight gives at the key, and the next search starts from there, so that wanted
outputs grow with the number of edits, and the weight with them. The anchor a is the mean norm of the wanted outputs of
some pilot edits; from then on a wanted output v of the module becomes v a / |v|, and one of more than 2 a fails.
Source: NAS, arXiv 2602.02543, which has one key for each edit. Where each answer position has a key of its own, the
first one takes that part. Later ones have smaller outputs, down to that of the end of the answer, which hardly changes:
to scale them up would break what the search found, so that they are only scaled down, where they exceed the anchor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..values import ValueResult
from .settings import ClosedFormSettings

_DROPPED = 0.05  # share of the largest norms of a pilot that are left out of its mean
_LARGEST = 2.0  # times the anchor: a larger wanted output fails
_NORM, _ANCHOR, _PLACE = "value_norm", "norm_anchor", "norm_place"  # entries of the report of a request


def anchor_norm(norms: Sequence[float]) -> float:
    """Return the mean of the norms without the largest 5 %.

    Example:
        >>> anchor_norm([1.0] * 19 + [100.0])
        1.0
    """
    ordered = sorted(norms)
    left = ordered[: len(ordered) - int(_DROPPED * len(ordered))]
    return sum(left) / len(left)


def norms_by_request(outputs: Sequence[Tensor], owners: Sequence[int]) -> dict[int, float]:
    """Return the norm of the wanted output at the first key of each request, the mean over its goals.

    Args:
        outputs: The wanted outputs (key, hidden) of each goal.
        owners: The request of each goal.
    """
    norms: dict[int, list[float]] = {}
    for owner, wanted in zip(owners, outputs, strict=True):
        norms.setdefault(owner, []).append(wanted[0].norm().item())
    return {owner: sum(own) / len(own) for owner, own in norms.items()}


def too_large(outputs: Sequence[Tensor], owners: Sequence[int], anchor: float) -> dict[int, str]:
    """Return the requests one of whose wanted outputs (key, hidden) is too large for an anchor, and why."""
    reasons: dict[int, str] = {}
    for owner, wanted in zip(owners, outputs, strict=True):
        largest = wanted.norm(dim=-1).max().item()
        if not largest <= _LARGEST * anchor:
            reasons[owner] = (
                f"a wanted output has a norm of {largest:.4g}, more than {_LARGEST:g} times the norm anchor of "
                f"{anchor:.4g}; lower clamp, or edit without norm_anchor"
            )
    return reasons


def anchored_result(result: ValueResult, wanted: Tensor, anchor: float) -> ValueResult:
    """Return the result of a search with its first wanted output at the norm of the anchor, and no later one above it.

    wanted: what the module is to put out (key, hidden); an output of zero stays.
    """
    norms = wanted.norm(dim=-1, keepdim=True)
    factors = torch.where(norms > 0, anchor / norms, 1.0)
    factors[1:].clamp_(max=1.0)
    scaled = wanted * factors
    return replace(result, change=result.change + (scaled - wanted))


def anchor_report(name: str, norm: float, anchor: float | None) -> dict[str, str | float]:
    """Return what the report of a request says of its wanted outputs, from which `NormAnchors.follow` goes on.

    Args:
        name: Name of the weight whose outputs they are.
        norm: Their norm as the search found them.
        anchor: The norm that they were scaled to; None if they were not.
    """
    own: dict[str, str | float] = {_PLACE: name, _NORM: norm}
    return own if anchor is None else own | {_ANCHOR: anchor}


class NormAnchors:
    """The anchor of each layer in a session, and the norms of its pilot edits until there is one.

    What is known is read off the reports of the edits, so that a session that begins with a history goes on with the
    anchor that the history was made with.
    """

    def __init__(self) -> None:
        self._norms: dict[str, list[float]] = {}
        """By name of the layer's weight."""
        self._anchors: dict[str, float] = {}

    def follow(self, reports: Sequence[Mapping[str, str | float]]) -> None:
        """Take note of the requests of an edit that is now in the model."""
        for report in reports:
            if _ANCHOR in report:
                self._anchors[str(report[_PLACE])] = float(report[_ANCHOR])
            elif _NORM in report:
                self._norms.setdefault(str(report[_PLACE]), []).append(float(report[_NORM]))

    def set(self, name: str, norms: Sequence[float]) -> float:
        """Make the mean of these norms the anchor of a layer, and return it."""
        self._anchors[name] = anchor_norm(norms)
        return self._anchors[name]

    def of(self, settings: ClosedFormSettings, name: str) -> float | None:
        """Return the anchor for an edit of a layer; None if there is none, or as long as pilot edits are missing."""
        if not isinstance(settings.norm_anchor, str):
            return settings.norm_anchor
        norms = self._norms.get(name, [])
        if name not in self._anchors and len(norms) >= settings.norm_pilot:
            self.set(name, norms)
        return self._anchors.get(name)
