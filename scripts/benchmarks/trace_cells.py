"""The cells that the tracing benchmark times, and the three ways to score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...tracing.engine.cells import CellScores, Engine, Measure, Runs, StateCell
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.rows import window_layers
from ...tracing.engine.sweep import sweep
from ..errors import CommandError
from .models import Shape, Subject

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


def naive_scores(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    runs: Runs,
    cells: Sequence[StateCell],
    measure: Measure,
    *,
    states: Mapping[Site, Tensor],
) -> Tensor:
    """(cell, metric, sample) float64 on the CPU: what `plain_scores` gives, at the field's price.

    Kinds are hidden, mlp and attention, nothing is severed. states: the base run's hidden states (`base_states`),
    which only direct effects need.
    """
    samples = runs.base.shape[0]
    inputs = {name: value.expand(samples + 1, *value.shape[1:]) for name, value in prompt.inputs.items()}
    scores = []
    for cell in cells:
        edits = _edits(vlm, runs, cell, states)
        corrupt = {Site("hidden", 0): lambda embeddings: torch.cat([embeddings[:1], runs.base.to(embeddings)])}
        with torch.no_grad(), patch(vlm, corrupt, inputs=True), patch(vlm, edits):
            logits = vlm.logits(inputs)
        scores.append(measure(logits[1:, list(runs.scored)]).double().cpu().T)
    return torch.stack(scores)


def base_states(vlm: VisionLanguageModel, runs: Runs) -> dict[Site, Tensor]:
    """Per layer the hidden states of the base run (sample, token, hidden)."""
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites) as states:
        vlm.forward(inputs_embeds=runs.base)
    return {site: states[site] for site in sites}


def _edits(
    vlm: VisionLanguageModel, runs: Runs, cell: StateCell, states: Mapping[Site, Tensor]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """What each hook does: clean states at the cell's positions, base states at the frozen ones of a direct effect."""
    restored = {Site(cell.kind, layer): list(cell.positions) for layer in range(cell.first, cell.last + 1)}
    edits = {site: _writing(None, positions) for site, positions in restored.items()}
    if cell.is_direct:
        frozen = [position for position in runs.frozen if position not in cell.positions]
        for layer in range(vlm.layers):
            site = Site("hidden", layer)
            freeze, restore = _writing(states[site], frozen), edits.get(site)
            edits[site] = freeze if restore is None else _both(freeze, restore)
    return edits


def _writing(states: Tensor | None, positions: list[int]) -> Callable[[Tensor], Tensor]:
    """A hook that writes states (sample, token, hidden) into the corrupted rows; None: those of the clean row."""

    def write(output: Tensor) -> Tensor:
        written = output.clone()
        written[1:, positions] = output[:1, positions] if states is None else states[:, positions]
        return written

    return write


def _both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda output: second(first(output))


def run_sweep(
    subject: Subject,
    runs: Runs,
    cells: Sequence[StateCell],
    *,
    recorded: Callable[[Tensor, Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Our way, without the check of its own that a trace ends with. recorded: is called once both runs are."""
    settings = Engine(checks=0)
    return sweep(subject.vlm, runs, cells, subject.measure, settings=settings, accept=recorded, bar=bar)


def run_strong(subject: Subject, runs: Runs, cells: Sequence[StateCell], bar: tqdm | None = None) -> Tensor:
    """(cell, metric, sample): the stronger of the usual ways."""
    return plain_scores(subject.vlm, runs, cells, subject.measure, bar=bar)


def run_naive(subject: Subject, runs: Runs, cells: Sequence[StateCell], states: Mapping[Site, Tensor]) -> Tensor:
    """(cell, metric, sample): the usual way as scripts have it; states: `frozen_states`."""
    return naive_scores(subject.vlm, subject.prompt, runs, cells, subject.measure, states=states)


def frozen_states(subject: Subject, runs: Runs, cells: Sequence[StateCell]) -> dict[Site, Tensor]:
    """The base run's hidden states, if any of the cells is a direct effect; else nothing."""
    return base_states(subject.vlm, runs) if any(cell.is_direct for cell in cells) else {}
