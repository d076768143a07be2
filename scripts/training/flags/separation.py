"""Filters that let changes take in what pictures bring, and hardly anything that texts have too.

A change B A alters texts by what it takes in of inputs that texts have too. So a filter S is put before A: the linear
map that comes nearest to passing inputs x under pictures and stopping those in texts, the minimum of E|S x - x|^2 under
pictures plus w E|S x|^2 in texts (a Wiener filter). It is S = P (P + w T)^-1 with the second moments P under pictures
and T in texts. B A S has the rank of B A. A penalty on what is altered in texts (`keeping`) pulls every step back; a
filter keeps steps from going there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .keeping import SOURCES
from .student import Student

_OPEN = 0.02
"""The share of a picture's second moments that is spread over all directions, so that unused ones stay open."""


def separations(pictures: Mapping[str, Tensor], texts: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return LAYER.MAP -> the filter (inputs, inputs), which is multiplied from the right.

    Args:
        pictures: The second moments of inputs under pictures, by LAYER.MAP.
        texts: Those in texts, of the same maps and more.
        weight: How much texts count, above 0.
    """
    filters = {}
    for name, own in pictures.items():
        open_everywhere = torch.eye(len(own)) * own.trace() / len(own)
        brought = (1 - _OPEN) * own + _OPEN * open_everywhere
        filters[name] = torch.linalg.solve(brought + weight * texts[name], brought).T
    return filters


def separate(student: Student, filters: Mapping[str, Tensor]) -> None:
    """Put the filters before the changes of the student."""
    for number, name, change in student.changes():
        change.separation = filters[f"{number}.{SOURCES[name]}"]


def fold(student: Student) -> None:
    """Take the filters into the changes of the student: what it computes stays the same, and nothing is filtered."""
    for _, _, change in student.changes():
        change.fold()
