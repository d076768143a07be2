"""The norm anchor: wanted outputs of one size, so that a long stream of edits does not make outputs grow.

Each edit adds its change to what the weight gives at the key, and the next search starts from there, so that wanted
outputs grow with the number of edits, and the weight with them. The anchor a is the mean norm of the wanted outputs of
some pilot edits; from then on a wanted output v of the module becomes v a / |v|, and one of more than 2 a fails.
Source: NAS, arXiv 2602.02543.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .settings import ClosedFormSettings

_DROPPED = 0.05  # share of the largest norms of a pilot that are left out of its mean
_LARGEST = 2.0  # times the anchor: a larger wanted output fails
NORM, ANCHOR, PLACE = "value_norm", "norm_anchor", "norm_place"
"""Entries of a request's text: mean norm of its wanted outputs, the anchor that they were scaled to, and the weight."""


def anchor_norm(norms: Sequence[float]) -> float:
    """Return the mean of the norms without the largest 5 %.

    Example:
        >>> anchor_norm([1.0] * 19 + [100.0])
        1.0
    """
    ordered = sorted(norms)
    left = ordered[: len(ordered) - int(_DROPPED * len(ordered))]
    return sum(left) / len(left)


def anchored(outputs: Tensor, anchor: float) -> Tensor:
    """Return wanted outputs (key, hidden) of a module at the norm of the anchor; one of zero stays."""
    norms = outputs.norm(dim=-1, keepdim=True)
    return outputs * torch.where(norms > 0, anchor / norms, 1.0)


def too_large(outputs: Tensor, anchor: float) -> str:
    """Return why wanted outputs (key, hidden) are too large for an anchor; nothing if they are not."""
    largest = outputs.norm(dim=-1).max().item()
    if largest <= _LARGEST * anchor:
        return ""
    return (
        f"the wanted output has a norm of {largest:.4g}, more than {_LARGEST:g} times the norm anchor of {anchor:.4g}; "
        "lower clamp, or edit without norm_anchor"
    )


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
            if ANCHOR in report:
                self._anchors[str(report[PLACE])] = float(report[ANCHOR])
            elif NORM in report:
                self._norms.setdefault(str(report[PLACE]), []).append(float(report[NORM]))

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
