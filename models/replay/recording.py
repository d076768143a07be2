"""Recorded runs, the positions that a replay computes, the sources of all other keys, and attention visibility."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ReplayError
from ..families.addresses import Projection, Site
from .attention import Job, Segment

Index = slice | Tensor

_RUNS_APART = 4
"""At most this many runs of neighbouring positions are attended to as slices; more are copied together instead."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A run of the decoder: keys and values at its positions, states and outputs at those that were kept."""

    positions: tuple[int, ...]
    """Positions that keys and values are stored for, ascending."""
    keys: tuple[Tensor, ...]
    """Per layer (row, key-value head, position, size)."""
    values: tuple[Tensor, ...]
    """Per layer (row, key-value head, position, size)."""
    kept: tuple[int, ...]
    """Positions that states and outputs are stored for, ascending."""
    states: tuple[Tensor, ...]
    """Per layer (row, kept position, hidden): its input; the last entry is the output of the last layer."""
    outputs: Mapping[Site | Projection, Tensor]
    """(row, kept position, width): outputs of recorded sites and inputs of recorded projections."""
    read: tuple[int, ...]
    """Positions whose logits are stored."""
    logits: Tensor
    """(row, read position, vocab)"""

    def at(self, stored: Tensor, positions: Sequence[int]) -> Tensor:
        """Return states or outputs of this recording at some of the kept positions, (row, position, width)."""
        return stored[:, places(self.kept, positions, stored.device)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """The attention masks of all layers."""

    length: int
    layers: tuple[Tensor | None, ...]
    """Per layer booleans (query, key), True where seen; None for plain causal attention."""

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], length: int) -> "Masks":
        """Return the masks that a model gave to its attention function, one per layer.

        Raises `ReplayError` for one that differs between rows or heads, or that adds anything to scores.
        """
        unique = {id(mask): None if mask is None else _boolean(mask, length) for mask in masks}
        return cls(length=length, layers=tuple(unique[id(mask)] for mask in masks))

    def reach(self, positions: Collection[int], first: int = 0) -> tuple[int, ...]:
        """Return the positions, ascending, whose states can change from layer `first` on if states at these change.

        A position is reached if it sees a reached one in any of those layers.
        """
        if not positions:
            return ()
        if all(mask is None for mask in self.layers[first:]):
            return tuple(range(min(positions), self.length)) if first < len(self.layers) else tuple(sorted(positions))
        reached = torch.zeros(self.length, dtype=torch.bool).index_fill(0, torch.tensor(sorted(positions)), True)
        for mask in self.layers[first:]:
            sees = torch.ones(self.length, self.length, dtype=torch.bool).tril() if mask is None else mask.cpu()
            reached = reached | (sees & reached).any(1)
        return tuple(reached.nonzero().flatten().tolist())

    def block(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Return booleans (query, key) for some queries and keys of a layer."""
        mask = self.layers[layer]
        if mask is None:
            return queries[:, None] >= keys[None, :]
        return mask[queries[:, None], keys[None, :]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Positions whose keys and values come from a recording."""

    run: Recording
    positions: tuple[int, ...]


class Queries(Protocol):
    """The positions that a call computes and how they attend: a `Span`, or one whose rows lack some edges."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that the call computes, ascending."""

    @property
    def index(self) -> Index:
        """The positions as an index into all of them."""

    def job(self, layer: int, read: Sequence[int] | None = None) -> Job:
        """Return how a call of the layer attends, with only the positions in `read` as queries if they are given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """The positions that a replay computes and the recordings that hold the others."""

    positions: tuple[int, ...]
    sources: tuple[Source, ...]
    masks: Masks
    device: torch.device
    _cache: dict[int, tuple[list[tuple[Source, Index, Tensor | None]], tuple[Tensor | None, bool]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def index(self) -> Index:
        """The positions as an index into all of them."""
        return index_of(self.positions, self.device)

    def segments(self, layer: int) -> list[Segment]:
        """Return the sources' keys and values at a layer, and what the computed positions see of them."""
        segments = []
        for source, where, seen in self._layout(layer)[0]:
            keys, values = source.run.keys[layer][:, :, where], source.run.values[layer][:, :, where]
            segments.append(Segment(keys=keys, values=values, visible=seen))
        return segments

    def own(self, layer: int) -> tuple[Tensor | None, bool]:
        """Return (visible, causal): how the computed positions see each other at a layer."""
        return self._layout(layer)[1]

    def seen_from(self, layer: int, chosen: Sequence[int]) -> tuple[list[Segment], tuple[Tensor | None, bool]]:
        """Return segments and own visibility for only some of the computed positions as queries."""
        part = Span(positions=tuple(chosen), sources=self.sources, masks=self.masks, device=self.device)
        queries, keys = (torch.tensor(positions, device=self.device) for positions in (part.positions, self.positions))
        return part.segments(layer), (simplified(self.masks.block(layer, queries, keys)), False)

    def job(self, layer: int, read: Sequence[int] | None = None) -> Job:
        """Return how a call of the layer attends, with only the positions in `read` as queries if they are given."""
        segments, own = (self.segments(layer), self.own(layer)) if read is None else self.seen_from(layer, read)
        visible, is_causal = own

        def owned(keys: Tensor, values: Tensor) -> tuple[Segment]:
            return (Segment(keys=keys, values=values, visible=visible, causal=is_causal),)

        return Job(segments=segments, own=owned)

    def _layout(self, layer: int) -> tuple[list[tuple[Source, Index, Tensor | None]], tuple[Tensor | None, bool]]:
        key = id(self.masks.layers[layer])
        if key not in self._cache:
            queries = torch.tensor(self.positions, device=self.device)
            own = self.masks.block(layer, queries, queries)
            is_causal = torch.equal(own, torch.ones_like(own).tril())
            parts = [part for source in self.sources if (part := self._part(layer, queries, source)) is not None]
            self._cache[key] = parts, (None if is_causal else simplified(own), is_causal)
        return self._cache[key]

    def _part(self, layer: int, queries: Tensor, source: Source) -> tuple[Source, Index, Tensor | None] | None:
        """Return the source, the places in its recording that any query sees, and the visibility; None for none."""
        if not source.positions:
            return None
        keys = torch.tensor(source.positions, device=self.device)
        seen = self.masks.block(layer, queries, keys)
        used = seen.any(0).nonzero().flatten().tolist()
        if not used:
            return None
        seen_positions = source.positions[used[0] : used[-1] + 1]  # no query sees keys behind a sliding window
        where = places(source.run.positions, seen_positions, self.device)
        return source, where, simplified(seen[:, used[0] : used[-1] + 1])


def index_of(numbers: Sequence[int], device: torch.device) -> Index:
    """Return an index for ascending numbers: a slice, which copies nothing, if they are neighbours."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(list(numbers), dtype=torch.long, device=device)


def places(within: Sequence[int], wanted: Sequence[int], device: torch.device) -> Index:
    """Return the places of the requested positions among others, as an index; all are ascending."""
    number = {position: index for index, position in enumerate(within)}
    return index_of([number[position] for position in wanted], device)


def neighbours(positions: Sequence[int]) -> list[tuple[int, ...]]:
    """Return ascending positions as runs without gaps, or as one run if there are too many to attend to singly."""
    if not positions:
        return []
    starts = [index for index, place in enumerate(positions) if not index or positions[index - 1] != place - 1]
    if len(starts) > _RUNS_APART:
        return [tuple(positions)]
    return [tuple(positions[start:stop]) for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True)]


def simplified(seen: Tensor) -> Tensor | None:
    """Return booleans (query, key) as None if all are True, as (query,) if all keys are alike, else unchanged."""
    if bool(seen.all()):
        return None
    if torch.equal(seen, seen[:, :1].expand_as(seen)):
        return seen[:, 0]
    return seen


def _boolean(mask: Tensor, length: int) -> Tensor:
    """Return one mask (query, key) for all rows and heads, from booleans or from zeros and large negative numbers."""
    if mask.ndim != 4 or mask.shape[-2:] != (length, length):
        raise ReplayError(f"the model masks attention with a tensor of shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if bool(((mask != 0) & ~hidden).any()):
            raise ReplayError("the model adds a bias to its attention scores")
        mask = ~hidden
    if not torch.equal(mask, mask[:1, :1].expand_as(mask)):
        raise ReplayError("the model masks attention differently for rows or heads")
    if not bool(mask[0, 0].any(-1).all()):  # the output there depends on the kernel
        raise ReplayError("the model lets a token attend to nothing at all")
    return mask[0, 0]
