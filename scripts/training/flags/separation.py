"""Changes that take in what pictures bring, and hardly anything of texts.

What a change B A takes in of inputs that texts have too alters texts. So a filter S is put before A: the best linear
estimate of what a picture brings to an input, S = P (P + w T)^-1 (Wiener), where P are the second moments of inputs
under pictures, T those in texts without, and w says how much texts count. B A S has the rank of B A. A penalty on what
is altered in texts pulls one step after another back; the filter lets no step go there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .keeping import SOURCES
from .student import Student

_OPEN = 0.02
"""The share of a picture's second moments that is spread over all directions, so that unused ones stay open."""


@contextmanager
def recorded_moments(student: Student, groups: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect LAYER.MAP -> the second moments (inputs, inputs) of what the changed maps take in.

    The dictionary is filled when the student runs in the block, once; a map that is changed no more has none.

    Args:
        student: The student.
        groups: Masks (row, token) of tokens. Each group counts as much as every other, however many tokens it has.
    """
    recorded: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for number, name, change in student.changes():
            if name in SOURCES.values():
                hook = partial(_record, recorded, f"{number}.{name}", groups)
                hooks.callback(change.register_forward_pre_hook(hook).remove)
        yield recorded


def _record(
    recorded: dict[str, Tensor], name: str, groups: Sequence[Tensor], module: nn.Module, inputs: tuple[Tensor]
) -> None:
    every = [inputs[0][mask] for mask in groups]
    recorded[name] = torch.stack([states.T @ states / len(states) for states in every]).mean(0)


def separations(pictures: Mapping[str, Tensor], texts: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return LAYER.MAP -> the filter (inputs, inputs), which is multiplied from the right.

    Args:
        pictures: The second moments of inputs under pictures, by LAYER.MAP.
        texts: Those in texts, of the same maps and more.
        weight: How much texts count, over 0.
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
