"""Leave attention edges out of a replay, row by row: keys of a cut group form a part that those rows skip."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .attention import Job, Segment
from .recording import Index, Masks, Source, Span, index_of, neighbours, simplified

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
        return self.hidden[torch.tensor(list(rows), device=self.hidden.device)], (
            None if len(seeing) == len(rows) else seeing
        )


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
            hidden=hidden.to(self.device),
            concerned=tuple(hidden.flatten(1).any(1).tolist()),
            blind=tuple(hidden.flatten(1).all(1).tolist()),
        )

    def _own_visible(self, layer: int, queries: tuple[int, ...], part: _Part) -> tuple[Tensor | None, bool]:
        """Return (visible, causal): which of a part's keys, computed in the same call, the queries see."""
        key = queries, part.positions, id(self.masks.layers[layer])
        if key not in self._cache:
            indices = (torch.tensor(positions, device=self.device) for positions in (queries, part.positions))
            seen = self.masks.block(layer, *indices)
            is_causal = queries == part.positions and torch.equal(seen, torch.ones_like(seen).tril())
            self._cache[key] = (None, True) if is_causal else (simplified(seen), False)
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
    def index(self) -> Index:
        """The positions as an index into all of them."""
        return index_of(self.span.positions, self.span.device)

    def job(self, layer: int, read: Sequence[int] | None = None) -> Job:
        """Return how a call of the layer attends, with only the positions in `read` as queries if they are given."""
        return self.span.job(layer, read, self.entries)


def _runs(positions: Sequence[int]) -> list[tuple[int, ...]]:
    """Return ascending positions as runs without gaps, with all short runs merged into one."""
    runs = neighbours(positions)
    short = sorted(place for run in runs if len(run) <= _SHORT for place in run)
    return [*(run for run in runs if len(run) > _SHORT), *([tuple(short)] if short else [])]
