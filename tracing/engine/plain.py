"""The plain way to trace: one forward pass of the whole decoder for each cell, with hooks that put states in.

Slow and obvious on purpose: the oracle of the tests, and the way for models that cannot be replayed. The vision tower
runs once; everything after it starts from the merged embeddings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...models.families.addresses import Key
from .cells import Cell, Measure, Runs

_Write = Callable[[Tensor], Tensor]


class PlainProgress(Protocol):
    """What is kept of the cells that are finished."""

    def known(self, number: int) -> Tensor | None:
        """(metric, sample): the scores of a cell that was finished earlier."""

    def add(self, number: int, scores: Tensor) -> None:
        """Takes a cell's scores (metric, sample)."""


def plain_scores(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    progress: PlainProgress | None = None,
    bar: tqdm | None = None,
) -> Tensor:
    """(cell, metric, sample) float64 on the CPU: scores of the base run with each cell's states of the source put in.

    progress: knows cells that were finished earlier, and is shown each new one. Memory holds every layer's outputs of
    the kinds that the cells name, (sample, token, width) each.
    """
    base, source = (each.expand(runs.samples, -1, -1).contiguous() for each in (runs.base, runs.source))
    keys = {kind: _keys(vlm, kind) for kind in {cell.kind for cell in cells}}
    lent = _states(vlm, source, keys, runs)
    frozen_keys = {cell.severed: _keys(vlm, cell.severed) for cell in cells if cell.severed}
    if any(cell.is_direct for cell in cells):
        frozen_keys["hidden"] = _keys(vlm, "hidden")
    own = _states(vlm, base, frozen_keys, runs)
    scores = []
    for number, cell in enumerate(cells):
        found = progress.known(number) if progress is not None else None
        if found is None:
            functions = _writes(vlm, cell, runs, (keys[cell.kind], lent), (frozen_keys, own))
            with patch(vlm, {key: _in_turn(each) for key, each in functions[0].items()}, inputs=cell.kind == "head"):
                with patch(vlm, {key: _in_turn(each) for key, each in functions[1].items()}):
                    found = run_scores(vlm, base, runs, measure)
            if progress is not None:
                progress.add(number, found)
        scores.append(found)
        if bar is not None:
            bar.update()
    return torch.stack(scores)


def run_scores(vlm: VisionLanguageModel, embeddings: Tensor, runs: Runs, measure: Measure) -> Tensor:
    """(metric, sample) float64 on the CPU: the scores of embeddings (sample, token, hidden), nothing put in."""
    with torch.no_grad():
        logits = vlm.forward(inputs_embeds=embeddings, positions=runs.scored, **runs.keywords)
        return measure(logits).T.cpu()


def _keys(vlm: VisionLanguageModel, kind: str) -> list[Key]:
    """The module of each layer that a kind of cell reads and writes; for heads, whose input that is."""
    if kind == "head":
        return [vlm.attention_projection(layer) for layer in range(vlm.layers)]
    return [Site(kind, layer) for layer in range(vlm.layers)]


def _states(
    vlm: VisionLanguageModel, embeddings: Tensor, keys: Mapping[str, list[Key]], runs: Runs
) -> dict[Key, Tensor]:
    """What all these modules write (heads: read) in the run on these embeddings, (sample, token, width) each.

    As many equal samples as the other run has: matrix products of another size round otherwise, and putting in a
    state that the corruption never touched would no longer be exactly without effect.
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
    cell: Cell,
    runs: Runs,
    lent: tuple[list[Key], dict[Key, Tensor]],
    own: tuple[Mapping[str, list[Key]], dict[Key, Tensor]],
) -> tuple[dict[Key, list[_Write]], dict[Key, list[_Write]]]:
    """What the cell writes where it puts states in, and what is frozen beside that."""
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
    """A patch that puts in values (sample, token, width) at some positions and leaves the others."""

    def write(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, positions, columns] = values[:, positions, columns]
        return changed

    return write


def _in_turn(functions: Sequence[_Write]) -> _Write:
    def write(output: Tensor) -> Tensor:
        for function in functions:
            output = function(output)
        return output

    return write


def knockout_probability(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    sources: str | int | Iterable[int],
    targets: str | int | Iterable[int],
    *,
    answer_id: int | None = None,
) -> float:
    """The answer's probability when no target token may attend to a source token, in any layer.

    sources, targets: group names or positions; a token always sees itself, so overlapping groups are fine.
    answer_id: the scored token; None for the one that the untouched model finds likeliest. Compare with no sources.
    Attention knockout as in arXiv 2411.18620, over all layers at once.
    """
    embeddings = vlm.embed(prompt)
    if answer_id is None:
        answer_id = int(vlm.next_token_probabilities(embeddings).argmax())
    length = embeddings.shape[1]
    sources = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, sources, length), True)
    targets = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, targets, length), True)
    cut = targets[:, None] & sources[None, :] & ~torch.eye(length, dtype=torch.bool)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ~cut
    probabilities = vlm.next_token_probabilities(embeddings, attention_mask=mask[None, None].to(vlm.device))
    return float(probabilities[0, answer_id])


def _indices(prompt: Prompt, group: str | int | Iterable[int], length: int) -> Tensor:
    """Positions of the group among the prompt's first `length`; those of an answer after it play no part."""
    group = group if isinstance(group, (str, int)) else tuple(group)
    return torch.tensor([position for position in prompt.positions(group) if position < length], dtype=torch.long)
