"""Recorded runs, the positions that a replay computes, the sources of all other keys, and the visibility of keys.

Attention edges can be left out row by row: the keys of a cut group form a part that those rows skip.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ReplayError
from ..families import Projection, Site
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
    """Per layer (row, key-value head, position, size); of a layer with a running state (row, 1, position, hidden), the
    inputs of the module that mixes positions."""
    values: tuple[Tensor, ...]
    """Per layer (row, key-value head, position, size of values)."""
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
    """Per layer booleans (query, key) on the CPU, True where seen; None for plain causal attention."""

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], length: int) -> "Masks":
        """Return the masks that a model gave to its attention function, one per layer.

        Raises `ReplayError` for one that differs between rows or heads, or that adds anything to scores.
        """
        unique = {id(mask): None if mask is None else _noncausal(mask, length) for mask in masks}
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
            sees = torch.ones(self.length, self.length, dtype=torch.bool).tril() if mask is None else mask
            reached = reached | (sees & reached).any(1)
        return tuple(reached.nonzero().flatten().tolist())

    def has_edges(self, layer: int) -> bool:
        """Return whether tokens see each other at a layer, and not only themselves."""
        mask = self.layers[layer]
        return mask is None or not torch.equal(mask, torch.eye(self.length, dtype=torch.bool))

    def block(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Return booleans (query, key) for some queries and keys of a layer, all on the CPU.

        What is seen is decided there, since an accelerator would have to be waited for.
        """
        mask = self.layers[layer]
        return queries[:, None] >= keys[None, :] if mask is None else mask[queries[:, None], keys[None, :]]


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
    def sources(self) -> tuple[Source, ...]:
        """The recordings that hold all other positions."""

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
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def index(self) -> Index:
        """The positions as an index into all of them."""
        return index_of(self.positions, self.device)

    def segments(self, layer: int) -> list[Segment]:
        """Return the sources' keys and values at a layer, and what the computed positions see of them."""
        segments = []
        for source, where, seen in self._layout(layer)[0]:
            keys, values = source.run.keys[layer], source.run.values[layer]
            index = where if isinstance(where, slice) else where.to(keys.device)
            keys, values = keys[:, :, index], values[:, :, index]
            segments.append(Segment(keys=keys, values=values, visible=seen))
        return segments

    def own(self, layer: int) -> tuple[Tensor | None, bool]:
        """Return (visible, causal): how the computed positions see each other at a layer."""
        return self._layout(layer)[1]

    def seen_from(self, layer: int, chosen: Sequence[int]) -> tuple[list[Segment], tuple[Tensor | None, bool]]:
        """Return segments and own visibility for only some of the computed positions as queries."""
        chosen = tuple(chosen)
        if chosen not in self._cache:
            self._cache[chosen] = Span(positions=chosen, sources=self.sources, masks=self.masks, device=self.device)
        part, key = self._cache[chosen], (chosen, id(self.masks.layers[layer]))
        if key not in self._cache:
            seen = self.masks.block(layer, torch.tensor(chosen), torch.tensor(self.positions))
            self._cache[key] = simplified(seen, self.device)
        return part.segments(layer), (self._cache[key], False)

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
            queries = torch.tensor(self.positions)
            own = self.masks.block(layer, queries, queries)
            is_causal = torch.equal(own, torch.ones_like(own).tril())
            parts = [part for source in self.sources if (part := self._part(layer, queries, source)) is not None]
            visible = None if is_causal else simplified(own, self.device)
            self._cache[key] = parts, (visible, is_causal)
        return self._cache[key]

    def _part(self, layer: int, queries: Tensor, source: Source) -> tuple[Source, Index, Tensor | None] | None:
        """Return the source, the places in its recording that any query sees, and the visibility; None for none."""
        if not source.positions:
            return None
        seen = self.masks.block(layer, queries, torch.tensor(source.positions))
        used = seen.any(0).nonzero().flatten().tolist()
        if not used:
            return None
        seen_positions = source.positions[used[0] : used[-1] + 1]  # no query sees keys behind a sliding window
        where = places(source.run.positions, seen_positions, self.device)
        return source, where, simplified(seen[:, used[0] : used[-1] + 1], self.device)


def index_of(numbers: Sequence[int], device: torch.device) -> Index:
    """Return an index for ascending numbers: a slice, which copies nothing, if they are neighbours."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return on_device(torch.tensor(list(numbers), dtype=torch.long), device)


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for what the device still computes."""
    return value.to(device, non_blocking=device.type == "cuda")


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


def simplified(seen: Tensor, device: torch.device) -> Tensor | None:
    """Return booleans (query, key) of the CPU on a device: None if all are True, (query,) if all keys are alike."""
    if bool(seen.all()):
        return None
    is_alike = torch.equal(seen, seen[:, :1].expand_as(seen))
    return on_device(seen[:, 0] if is_alike else seen, device)


def _noncausal(mask: Tensor, length: int) -> Tensor | None:
    """Return one mask (query, key) for all rows and heads, on the CPU, or None if it is plainly causal."""
    seen = boolean(mask, length, length).cpu()
    return None if torch.equal(seen, torch.ones_like(seen).tril()) else seen


def boolean(mask: Tensor, queries: int, keys: int) -> Tensor:
    """Return one mask (query, key) for all rows and heads, from booleans or from zeros and large negative numbers.

    Raises `ReplayError` for one of another shape, or one that differs between rows or heads or adds anything to scores.
    """
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
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


_SHORT = 128
"""Runs of at most this many keys are copied together: that costs less than attending to each run separately."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Attention edges that are left out: no target attends to any source."""

    sources: frozenset[int]
    targets: frozenset[int]
    heads: tuple[int, ...] = ()
    """Query heads that lack the edges; empty for all heads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Positions that are sources of the same cuts."""

    positions: tuple[int, ...]
    hidden: Tensor
    """Booleans (cut + 1, head or 1, query), True where the query sees none of them; entry 0: rows without a cut."""
    concerned: tuple[bool, ...]
    """Per entry, True if some query sees none of them in some head."""
    blind: tuple[bool, ...]
    """Per entry, True if no query sees any of them in any head."""

    def seen_by(self, rows: Sequence[int]) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """Return `hidden` and `rows` of a segment, for rows with these entries."""
        if not any(self.concerned[row] for row in rows):
            return None, None
        seeing = tuple(number for number, row in enumerate(rows) if not self.blind[row])
        picked = on_device(torch.tensor(list(rows)), self.hidden.device)
        return self.hidden[picked], None if len(seeing) == len(rows) else seeing


@dataclass(frozen=True, kw_only=True, eq=False)
class CutSpan:
    """Positions that a replay computes for several rows, each of which lacks the edges of at most one cut."""

    positions: tuple[int, ...]
    sources: tuple[Source, ...]
    """Recordings that hold the keys of all other positions."""
    masks: Masks
    cuts: tuple[Cut, ...]
    heads: int
    """Number of query heads of the model."""
    device: torch.device
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def rows(self, cuts: Sequence[Cut | None]) -> "CutRows":
        """Return the span for a call with these cuts, one per row; None for a row without one."""
        if "numbers" not in self._cache:
            self._cache["numbers"] = {None: 0} | {cut: number for number, cut in enumerate(self.cuts, 1)}
        return CutRows(span=self, entries=tuple(map(self._cache["numbers"].__getitem__, cuts)))

    @cached_property
    def index(self) -> Index:
        """The positions as an index into all of them."""
        return index_of(self.positions, self.device)

    def job(self, layer: int, read: Sequence[int] | None, entries: Sequence[int]) -> Job:
        """Return how a call attends, given one entry per row: 0 for no cut, or the number of its cut from 1."""
        queries = self.positions if read is None else tuple(read)
        parts, owned = self._parted(queries)
        segments = []
        for part, span in parts:
            hidden, rows = part.seen_by(entries)
            if rows != ():
                segments += [replace(segment, hidden=hidden, rows=rows) for segment in span.segments(layer)]

        def own(keys: Tensor, values: Tensor) -> list[Segment]:
            segments = []
            for part, where in owned:
                hidden, rows = part.seen_by(entries)
                if rows != ():
                    visible, causal = self._own_visible(layer, queries, part)
                    mine = {"keys": keys, "values": values}
                    mine = mine if where is None else {name: value[:, :, where] for name, value in mine.items()}
                    segments.append(Segment(**mine, visible=visible, causal=causal, hidden=hidden, rows=rows))
            return segments

        return Job(segments=segments, own=own)

    def _parted(self, queries: tuple[int, ...]) -> tuple[list[tuple[_Part, Span]], list[tuple[_Part, Index | None]]]:
        """Return parts of other positions with spans over their recordings, and of computed ones with their places."""
        if queries not in self._cache:
            others = []
            for source in self.sources:
                for group in self._groups(source.positions):
                    for run in _runs(group):
                        sources = (Source(run=source.run, positions=run),)
                        span = Span(positions=queries, sources=sources, masks=self.masks, device=self.device)
                        others.append((self._part(run, queries), span))
            groups = self._groups(self.positions)
            place = {position: number for number, position in enumerate(self.positions)}
            own = [
                (
                    self._part(group, queries),
                    None if len(groups) == 1 else index_of([place[position] for position in group], self.device),
                )
                for group in groups
            ]
            self._cache[queries] = others, own
        return self._cache[queries]

    def _groups(self, positions: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the positions, grouped by the cuts that they are sources of."""
        groups: dict[tuple[bool, ...], list[int]] = {}
        for position in positions:
            groups.setdefault(tuple(position in cut.sources for cut in self.cuts), []).append(position)
        return [tuple(group) for group in groups.values()]

    def _part(self, positions: tuple[int, ...], queries: tuple[int, ...]) -> _Part:
        heads = self.heads if any(cut.heads for cut in self.cuts) else 1
        hidden = torch.zeros(len(self.cuts) + 1, heads, len(queries), dtype=torch.bool)
        for number, cut in enumerate(self.cuts, 1):
            if positions and positions[0] in cut.sources:
                is_target = torch.tensor([query in cut.targets for query in queries])
                hidden[number, list(cut.heads) or slice(None)] = is_target
        return _Part(
            positions=positions,
            hidden=on_device(hidden, self.device),
            concerned=tuple(hidden.flatten(1).any(1).tolist()),
            blind=tuple(hidden.flatten(1).all(1).tolist()),
        )

    def _own_visible(self, layer: int, queries: tuple[int, ...], part: _Part) -> tuple[Tensor | None, bool]:
        """Return (visible, causal): which of a part's keys, computed in the same call, the queries see."""
        key = queries, part.positions, id(self.masks.layers[layer])
        if key not in self._cache:
            seen = self.masks.block(layer, *(torch.tensor(positions) for positions in (queries, part.positions)))
            is_causal = queries == part.positions and torch.equal(seen, torch.ones_like(seen).tril())
            self._cache[key] = (None, True) if is_causal else (simplified(seen, self.device), False)
        return self._cache[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class CutRows:
    """A `CutSpan` for the rows of one call."""

    span: CutSpan
    entries: tuple[int, ...]
    """Per row 0, or the number of its cut from 1."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that the call computes, ascending."""
        return self.span.positions

    @property
    def sources(self) -> tuple[Source, ...]:
        """The recordings that hold all other positions."""
        return self.span.sources

    @property
    def index(self) -> Index:
        """The positions as an index into all of them."""
        return self.span.index

    def job(self, layer: int, read: Sequence[int] | None = None) -> Job:
        """Return how a call of the layer attends, with only the positions in `read` as queries if they are given."""
        return self.span.job(layer, read, self.entries)


def _runs(positions: Sequence[int]) -> list[tuple[int, ...]]:
    """Return ascending positions as runs without gaps, with all short runs merged into one."""
    runs = neighbours(positions)
    short = sorted(place for run in runs if len(run) <= _SHORT for place in run)
    return [*(run for run in runs if len(run) > _SHORT), *([tuple(short)] if short else [])]
