"""Layers that attend to pictures, which stand at no position of the prompt (Llama 3.2 Vision).

Such a layer works position by position: each token reads the states of the pictures, and no token reads another. The
keys and values of the pictures are kept once for each run, and are shown to the positions that a replay computes. For
the account of positions, the layer has keys of size zero, of which each position sees its own alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..frame import ATTENDED, Frame
from ..vlm import VisionLanguageModel
from .attention import Job, Segment
from .recording import boolean, simplified

Attended = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values of one layer, (row, key-value head, key, size), and the mask of its attention."""


def crossing_layers(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """Return the layers whose attention reads the states of pictures in place of those of tokens; none in most models.

    Their attention modules take these states under the name that the text stack has for them.
    """
    if not vlm.family.attended:
        return ()
    modules = {layer: vlm.attention_module(layer) for layer in range(vlm.layers)}
    return tuple(layer for layer, module in modules.items() if ATTENDED in signature(module.forward).parameters)


def without_edges(states: Tensor) -> Attended:
    """Return keys, values and mask of a layer in which no token reads another, for states (row, token, hidden)."""
    nothing = states.new_empty(len(states), 1, states.shape[1], 0)
    return nothing, nothing, torch.eye(states.shape[1], dtype=torch.bool)[None, None]


class Crossing:
    """What the layers that attend to pictures read, in each run of one prompt."""

    def __init__(self, attended: Mapping[int, Attended], frame: Frame, length: int) -> None:
        """Keep what these layers attended to in a recorded run with this frame and number of tokens.

        Raises `ReplayError` if rows or heads see different states of pictures.
        """
        seen: dict[Any, Tensor | None] = {id(mask): None for _, _, mask in attended.values()}
        for keys, _, mask in attended.values():
            if mask is not None and seen[id(mask)] is None:
                seen[id(mask)] = boolean(mask, length, keys.shape[2]).cpu()
        self._seen = {number: seen[id(mask)] for number, (_, _, mask) in attended.items()}
        rows = 1 if frame.pictures is None else len(frame.pictures)  # one row serves all that have the same pictures
        self._runs = {
            frame: {
                number: (keys[:: len(keys) // rows], values[:: len(keys) // rows])
                for number, (keys, values, _) in attended.items()
            }
        }
        self._shown: dict[Any, tuple[slice, Tensor | None]] = {}

    def __contains__(self, number: int) -> bool:
        """Return whether the layer attended to pictures."""
        return number in self._seen

    def missing(self, frame: Frame) -> tuple[int, ...]:
        """Return the layers whose keys and values in the run of this frame are not known yet."""
        return () if frame in self._runs else tuple(self._seen)

    def keep(self, frame: Frame, computed: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Keep the layers' keys and values in the run of this frame."""
        self._runs[frame] = dict(computed)

    def show(self, number: int, frame: Frame, job: Job, positions: Sequence[int]) -> None:
        """Let a call of the layer at these positions attend to the pictures of a run, and to nothing else."""
        keys, values = self._runs[frame][number]
        part, visible = self._visible(number, tuple(positions), keys)
        job.segments = [Segment(keys=keys[:, :, part], values=values[:, :, part], visible=visible)]
        job.own = lambda _keys, _values: ()

    def _visible(self, number: int, positions: tuple[int, ...], keys: Tensor) -> tuple[slice, Tensor | None]:
        """Return the part of the states that any of the positions sees, and what they see of it."""
        seen = self._seen[number]
        if seen is None:
            return slice(None), None
        key = id(seen), positions
        if key not in self._shown:
            here = seen[list(positions)]
            used = here.any(0).nonzero().flatten().tolist()
            part = slice(used[0], used[-1] + 1)  # the tiles that a picture does not fill come last
            self._shown[key] = part, simplified(here[:, part], keys.device)
        return self._shown[key]
