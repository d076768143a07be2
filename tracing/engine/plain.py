"""The plain engine: one forward pass of the whole decoder for each cell, with hooks or masks.

It is slow and simple on purpose: it is the reference of the tests, and the fallback for models that cannot be replayed.
The vision tower runs once; everything after it starts from the merged embeddings.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Site, VisionLanguageModel, capture, patch
from ...models.families.addresses import Key
from ...models.replay.cuts import Cut
from ...models.replay.observe import masking
from .cells import Cell, EdgeCell, Measure, Runs, StateCell, all_edges

_Write = Callable[[Tensor], Tensor]


def plain_scores(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], measure: Measure, *, bar: tqdm | None = None
) -> Tensor:
    """Return the scores (cell, metric, sample), float64 on the CPU, of the base run with each cell's change."""
    scores = []
    for _, found in each_plain(vlm, runs, cells, measure):
        scores.append(found)
        if bar is not None:
            bar.update()
    return torch.stack(scores)


def each_plain(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], measure: Measure, *, known: Collection[int] = ()
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the scores (metric, sample) of each cell in turn, except for those that are known.

    For state cells, every layer's outputs of the kinds that they name, (sample, token, width) each, are held in memory.
    Raises `ReplayError` if edges are to be cut in a model whose attention cannot be masked.
    """
    changing = _masked(vlm, runs) if all_edges(cells) else _put_in(vlm, runs, cells)
    base = runs.base.expand(runs.samples, -1, -1).contiguous()
    for number, cell in enumerate(cells):
        if number not in known:
            with changing(cell):
                found = run_scores(vlm, base, runs, measure)
            yield number, found


def run_scores(vlm: VisionLanguageModel, embeddings: Tensor, runs: Runs, measure: Measure) -> Tensor:
    """Return (metric, sample) float64 on the CPU: the scores of unchanged embeddings (sample, token, hidden)."""
    with torch.no_grad():
        logits = vlm.forward(inputs_embeds=embeddings, positions=runs.scored, **runs.keywords)
        return measure(logits).double().T.cpu()


# ---- edge cells ----


def _masked(vlm: VisionLanguageModel, runs: Runs) -> Callable[[EdgeCell], AbstractContextManager]:
    """Return a function that gives the context in which a cell's edges are masked."""

    def changing(cell: EdgeCell) -> AbstractContextManager:
        mask = hidden_edges(cell.cut, runs.length, vlm.heads)
        return masking(vlm, dict.fromkeys(range(cell.first, cell.last + 1), mask))

    return changing


def hidden_edges(cut: Cut, length: int, heads: int) -> Tensor:
    """Return booleans (head or 1, query, key) that are True for the edges that are cut."""
    sources, targets = (
        torch.zeros(length, dtype=torch.bool).index_fill(0, torch.tensor(sorted(each), dtype=torch.long), True)
        for each in (cut.sources, cut.targets)
    )
    edges = targets[:, None] & sources[None, :]
    if not cut.heads:
        return edges[None]
    chosen = torch.zeros(heads, 1, 1, dtype=torch.bool).index_fill(0, torch.tensor(cut.heads), True)
    return chosen & edges


# ---- state cells ----


def _put_in(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell]
) -> Callable[[StateCell], AbstractContextManager]:
    """Return a function that gives the context in which a cell's source states are patched in and others are frozen."""
    base, source = (each.expand(runs.samples, -1, -1).contiguous() for each in (runs.base, runs.source))
    keys = {kind: _keys(vlm, kind) for kind in {cell.kind for cell in cells}}
    lent = _states(vlm, source, keys, runs)
    frozen_keys = {cell.severed: _keys(vlm, cell.severed) for cell in cells if cell.severed}
    if any(cell.is_direct for cell in cells):
        frozen_keys["hidden"] = _keys(vlm, "hidden")
    own = _states(vlm, base, frozen_keys, runs)

    def changing(cell: StateCell) -> AbstractContextManager:
        put, frozen = _writes(vlm, cell, runs, (keys[cell.kind], lent), (frozen_keys, own))
        stack = ExitStack()
        stack.enter_context(patch(vlm, _in_turn(put), inputs=cell.kind == "head"))
        stack.enter_context(patch(vlm, _in_turn(frozen)))
        return stack

    return changing


def _keys(vlm: VisionLanguageModel, kind: str) -> list[Key]:
    """Return each layer's module whose output, or for heads whose input, a kind of cell reads and writes."""
    if kind == "head":
        return [vlm.attention_projection(layer) for layer in range(vlm.layers)]
    return [Site(kind, layer) for layer in range(vlm.layers)]


def _states(
    vlm: VisionLanguageModel, embeddings: Tensor, keys: Mapping[str, list[Key]], runs: Runs
) -> dict[Key, Tensor]:
    """Return these modules' outputs (for heads their inputs) in the run on these embeddings, (sample, token, width).

    The run has as many equal samples as the other run: matrix products of another size round differently, and
    patching in a state that the corruption never touched would no longer have exactly no effect.
    """
    outputs = [key for kind, each in keys.items() if kind != "head" for key in each]
    if not keys:
        return {}
    with (
        torch.no_grad(),
        capture(vlm, outputs, clone=True) as written,
        capture(vlm, keys.get("head", []), inputs=True, clone=True) as read,
    ):
        vlm.forward(inputs_embeds=embeddings, positions=runs.scored, **runs.keywords)
    return {**written, **read}


def _writes(
    vlm: VisionLanguageModel,
    cell: StateCell,
    runs: Runs,
    lent: tuple[list[Key], dict[Key, Tensor]],
    own: tuple[Mapping[str, list[Key]], dict[Key, Tensor]],
) -> tuple[dict[Key, list[_Write]], dict[Key, list[_Write]]]:
    """Return the writes that patch in the cell's states and those that freeze other states."""
    put: dict[Key, list[_Write]] = {}
    frozen: dict[Key, list[_Write]] = {}
    columns = slice(None)
    if cell.kind == "head":
        size = vlm.attention_projection(cell.first).width // vlm.heads
        columns = slice(cell.head * size, (cell.head + 1) * size)
    for key in lent[0][cell.first : cell.last + 1]:
        put.setdefault(key, []).append(_write(lent[1][key], list(cell.positions), columns))
    if cell.severed:
        for key in own[0][cell.severed][cell.last + 1 :]:
            frozen.setdefault(key, []).append(_write(own[1][key], list(cell.positions), slice(None)))
    others = sorted(set(runs.frozen) - set(cell.positions)) if cell.is_direct else []
    for key in own[0]["hidden"] if others else []:
        frozen.setdefault(key, []).append(_write(own[1][key], others, slice(None)))
    return put, frozen


def _write(values: Tensor, positions: list[int], columns: slice) -> _Write:
    """Return a patch that writes values (sample, token, width) at some positions and leaves the others."""

    def write(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, positions, columns] = values[:, positions, columns]
        return changed

    return write


def _in_turn(writes: Mapping[Key, Sequence[_Write]]) -> dict[Key, _Write]:
    """Return one patch for each module, which applies all of the module's writes."""

    def all_of(functions: Sequence[_Write]) -> _Write:
        def write(output: Tensor) -> Tensor:
            for function in functions:
                output = function(output)
            return output

        return write

    return {key: all_of(functions) for key, functions in writes.items()}
