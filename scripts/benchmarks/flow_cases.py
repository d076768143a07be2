"""The flows that are timed: which edges each row of the table cuts, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...models.replay.cuts import Cut
from ...tracing.engine.cells import EdgeCell
from ...tracing.engine.rows import window_layers
from .shapes import Shape

DROPPED = "image tokens dropped from each layer on, K = 0"
"""The row beside which a truncated prefill is timed."""

_SPEAKING = ("image", "question", "last")


@dataclass(frozen=True, kw_only=True)
class FlowCase:
    """One row of the table."""

    label: str
    cells: tuple[EdgeCell, ...]
    """All different."""
    middle: int | None = None
    """The layer from which on a truncated prefill is run on text alone; None: this row has none."""


def make_flow_cases(shape: Shape, windows: Sequence[int]) -> tuple[FlowCase, ...]:
    """Every row of the table: around each layer a window of each width, the question being the text tokens behind the
    image without the last one.
    """
    image, after = tuple(shape.image_positions), tuple(range(shape.image_positions.stop, shape.tokens))
    question, last = after[:-1], after[-1:]
    paper = {
        "image -> last": _cut(image, last),
        "question -> last": _cut(question, last),
        "image -> question": _cut(image, question),
        "last -> last": _cut(last, last),
    }
    heads = [_cut(image, last, head) for head in range(shape.heads)]
    asked = {
        **{name: [cut] for name, cut in paper.items()},
        "image -> question and last": [_cut(image, after)],
        "image -> last, each head": heads,
        "the three flows to the last token in one call": [paper[f"{name} -> last"] for name in _SPEAKING],
        "the four flows of the paper in one call": list(paper.values()),
    }
    dropped = [
        EdgeCell(cut=_cut(image, after), first=layer, last=shape.layers - 1, is_dropped=True)
        for layer in range(shape.layers)
    ]
    return (
        *(FlowCase(label=label, cells=_cells(cuts, windows, shape.layers)) for label, cuts in asked.items()),
        FlowCase(label=DROPPED, cells=tuple(dropped), middle=shape.layers // 2),
    )


def _cut(sources: Sequence[int], targets: Sequence[int], *heads: int) -> Cut:
    return Cut(sources=frozenset(sources), targets=frozenset(targets), heads=heads)


def _cells(cuts: Sequence[Cut], windows: Sequence[int], layers: int) -> tuple[EdgeCell, ...]:
    """One cell per cut, window and centre; of windows that the decoder's ends make equal, one."""
    spans = [window_layers(centre, window, layers) for window in windows for centre in range(layers)]
    cells = [EdgeCell(cut=cut, first=span[0], last=span[-1]) for cut in cuts for span in spans]
    return tuple(dict.fromkeys(cells))
