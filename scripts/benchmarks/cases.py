"""The maps that are timed: text tokens, groups, blocks and single patches, each with its corruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ...tracing.engine.cells import StateCell
from ...tracing.engine.rows import window_layers
from ..errors import CommandError
from .shapes import Shape

WIDE = 10
"""The window that ROME's figures use."""
_BLOCKS = 9
_PATCHES = 12
_EVERY = 4
"""Maps over single image tokens and blocks take every fourth layer, from 1: the others would only take longer."""

_Rows = Sequence[tuple[int, ...]]


class Labelled(Protocol):
    """A row of some table."""

    @property
    def label(self) -> str:
        """What the table calls it."""


_Row = TypeVar("_Row", bound=Labelled)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    label: str
    corruption: str
    """Which part is destroyed: "text" or "image"."""
    cells: tuple[StateCell, ...]


def make_cases(shape: Shape) -> tuple[Case, ...]:
    """Every row of the table for a prompt and a decoder of this shape."""
    return (*_text_cases(shape), *_image_cases(shape))


def chosen_cases(cases: Sequence[_Row], words: Sequence[str]) -> tuple[_Row, ...]:
    """The cases whose label holds one of the words; all without words. CommandError lists the labels."""
    found = tuple(case for case in cases if not words or any(word in case.label for word in words))
    if not found:
        labels = "; ".join(case.label for case in cases)
        raise CommandError(f"no row of the table holds {' or '.join(map(repr, words))}; the rows are: {labels}")
    return found


def _text_cases(shape: Shape) -> Iterator[Case]:
    rows = [(position,) for position in range(shape.tokens) if position not in shape.image_positions]
    for kind, window in (("hidden", 1), ("mlp", 1), ("attention", 1), ("mlp", WIDE), ("attention", WIDE)):
        cells = _cells(rows, kind, window, range(shape.layers), shape.layers)
        yield Case(label=f"text tokens, {kind}, window {window}", corruption="text", cells=cells)


def _image_cases(shape: Shape) -> Iterator[Case]:
    layers, image = shape.layers, tuple(shape.image_positions)
    question = tuple(range(image[-1] + 1, shape.tokens))
    last = question[-1:]
    every, some = range(layers), range(1, layers, _EVERY)
    tokens, patches = [(position,) for position in question], [(position,) for position in image]
    size = -(-len(image) // _BLOCKS)
    blocks = [image[start : start + size] for start in range(0, len(image), size)]
    spread = patches[:: max(1, len(patches) // _PATCHES)][:_PATCHES]
    kinds = (("hidden", 1), ("mlp", 1))
    wider = (*kinds, ("attention", 1), ("mlp", WIDE), ("attention", WIDE))
    maps = {
        "question tokens under image corruption, hidden and mlp, window 1": [
            _cells(tokens, kind, window, every, layers) for kind, window in kinds
        ],
        "last token under image corruption, every kind, windows 1 and 10": [
            _cells([last], kind, window, every, layers) for kind, window in wider
        ],
        "all image tokens as one group, hidden, window 1": [_cells([image], "hidden", 1, every, layers)],
        "the question as one group, hidden and mlp, window 1": [
            _cells([question], kind, window, every, layers) for kind, window in kinds
        ],
        f"image blocks of {size} tokens, hidden, window 1": [_cells(blocks, "hidden", 1, some, layers)],
        f"single patches, mlp, window {WIDE}": [_cells(spread, "mlp", WIDE, some, layers)],
        "every single patch, direct effect, hidden, window 1": [
            _cells(patches, "hidden", 1, some, layers, is_direct=True)
        ],
    }
    for label, parts in maps.items():
        yield Case(label=label, corruption="image", cells=tuple(cell for part in parts for cell in part))


def _cells(
    rows: _Rows, kind: str, window: int, centres: range, layers: int, *, is_direct: bool = False
) -> tuple[StateCell, ...]:
    """One cell per row and window centre."""
    windows = [window_layers(centre, window, layers) for centre in centres]
    return tuple(
        StateCell(kind=kind, first=span[0], last=span[-1], positions=positions, is_direct=is_direct)
        for positions in rows
        for span in windows
    )
