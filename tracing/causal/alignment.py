"""Common rows for traces of different prompts: equal groups, or ROME's groups of single tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TraceError
from .result import CausalTrace


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """A row that several traces share."""

    label: str
    token: str | int | None
    """What an edit calls it, if all traces agree."""
    indices: tuple[tuple[int, ...], ...]
    """Per trace: its own rows that belong here, perhaps none."""


def aligned_rows(traces: Sequence[CausalTrace]) -> tuple[Aligned, ...]:
    """The rows of an average: the traces' own where all are groups, else ROME's groups of tokens.

    TraceError if groups differ, if some traces hold groups only and others tokens, or if a constraint is missing.
    """
    grouped = {trace.grouped for trace in traces}
    if grouped == {True}:
        return _equal_rows(traces)
    if grouped == {True, False}:
        raise TraceError("some of these traces hold groups only, others single tokens; average equal ones only")
    for trace in traces:
        if not trace.starred:
            raise TraceError(
                f"traces over single tokens are averaged by their place after the constraint, and {trace.question!r} "
                "has none; build prompts with constraint=, or trace again with group names, such as "
                'positions=("image", "question", "last")'
            )
    return _token_groups(traces)


def _equal_rows(traces: Sequence[CausalTrace]) -> tuple[Aligned, ...]:
    found = {trace.rows: None for trace in traces}
    if len(found) > 1:
        raise TraceError(
            f"these traces differ in their rows ({' and '.join(map(str, found))}); average equal ones only"
        )
    tokens = list(zip(*(trace.row_tokens for trace in traces), strict=True))
    return tuple(
        Aligned(
            label=label,
            token=tokens[row][0] if len(set(tokens[row])) == 1 else None,
            indices=((row,),) * len(traces),
        )
        for row, label in enumerate(traces[0].rows)
    )


def _token_groups(traces: Sequence[CausalTrace]) -> tuple[Aligned, ...]:
    """Rows that are groups under their names, then the groups of arXiv 2202.05262; those that no trace has are gone."""
    each = [_groups(trace) for trace in traces]
    names = dict.fromkeys(name for groups in each for name in groups)
    tokens = {"last constraint token": "constraint_last", "last token": "last"}
    rows = [
        Aligned(label=name, token=tokens.get(name), indices=tuple(groups.get(name, ()) for groups in each))
        for name in names
    ]
    return tuple(row for row in rows if any(row.indices))


def _groups(trace: CausalTrace) -> dict[str, tuple[int, ...]]:
    """Rows of one trace by the name of their group.

    As in ROME, tokens before the constraint are left out, a constraint of one token is its first and its last, and the
    first subsequent token may be the last one.
    """
    patches = {position for position, *_ in trace.patches}
    single, groups = {}, {}
    for index, (label, positions) in enumerate(zip(trace.rows, trace.row_positions, strict=True)):
        is_token = len(positions) == 1 and positions[0] not in patches and label == trace.tokens[positions[0]]
        if is_token:
            single[positions[0]] = index
        else:
            groups[label] = (index,)
    first, after, last = min(trace.starred), max(trace.starred) + 1, len(trace.tokens) - 1
    places = {
        "first constraint token": [first],
        "middle constraint tokens": range(first + 1, after - 1),
        "last constraint token": [after - 1],
        "first subsequent token": [after],
        "further tokens": range(after + 1, last),
        "last token": [last],
    }
    return groups | {
        name: tuple(single[position] for position in positions if position in single)
        for name, positions in places.items()
    }
