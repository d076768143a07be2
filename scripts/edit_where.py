"""The place that `multrace edit` changes: what --where spells, or what traces find."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artefacts.folders import ArtefactError
from ..tracing import AverageTrace, CausalTrace, EditSite, TraceError
from .errors import CommandError

_PLACE = re.compile(r"(?P<first>-?\d+)(?:-(?P<last>\d+))?(?::(?P<token>.+))?")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The (last) layer and the token to edit, and why."""

    layer: int
    token: str | int
    reason: str
    spread: int | None = None
    """How many layers share the change, if --where says so."""

    def __str__(self) -> str:
        first = self.layer if self.spread is None else self.layer - self.spread + 1
        layers = f"layer {self.layer}" if first == self.layer else f"layers {first} to {self.layer}"
        return f"{layers}, token {self.token!r}: {self.reason}"


def parse_place(where: str) -> Place:
    """Return the place that LAYER, LAYER:TOKEN, FIRST-LAST or FIRST-LAST:TOKEN spells; the default token is the last.

    CommandError for anything else.
    """
    found = _PLACE.fullmatch(where)
    first, last = (int(found[name]) if found and found[name] else None for name in ("first", "last"))
    if first is None or (last is not None and not 0 <= first <= last):
        raise CommandError(
            f"no place {where!r}; write --where trace, --where 4, --where 4:constraint_last or --where 3-5:last"
        )
    token = found["token"] or "last"
    return Place(
        layer=first if last is None else last,
        token=int(token) if _NUMBER.fullmatch(token) else token,
        spread=None if last is None else last - first + 1,
        reason="as asked",
    )


def place_of(site: EditSite) -> Place:
    """Return the place that a trace chose."""
    return Place(layer=site.layer, token=site.token, reason=site.reason)


def load_traces(paths: Sequence[Path]) -> tuple[CausalTrace, ...] | AverageTrace:
    """Return the traces in these files, one for each request, or an average for all of them.

    TraceError if a file is missing, damaged or no trace; CommandError for an average beside other files.
    """
    found = [_load(path) for path in paths]
    averages = [trace for trace in found if isinstance(trace, AverageTrace)]
    traces = [trace for trace in found if isinstance(trace, CausalTrace)]
    if averages and len(found) > 1:
        raise CommandError("--trace takes one trace for each request, or one average for all of them, not both")
    return averages[0] if averages else tuple(traces)


def _load(path: Path) -> CausalTrace | AverageTrace:
    try:
        return CausalTrace.load(path)
    except (TraceError, ArtefactError) as error:
        try:
            return AverageTrace.load(path)
        except (TraceError, ArtefactError):
            raise error from None
