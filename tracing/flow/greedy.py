"""Greedy answers with attention edges cut, by guessing and verifying: all tokens of a right guess cost one sweep."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ..engine import Engine
from ..scoring import with_tokens
from .edge_measuring import measure_edges
from .edges import EdgeCell, EdgeRun

Cells = Callable[[int], Sequence[EdgeCell]]
"""The cells, always in the same order, for a run of so many tokens: what is cut holds for an answer's tokens, too."""


def greedy_ids(
    vlm: VisionLanguageModel,
    embeddings: Tensor,
    cells: Cells,
    *,
    guess: Sequence[int] = (),
    max_new_tokens: int = 16,
    engine: Engine | None = None,
    bar: tqdm | None = None,
) -> list[tuple[int, ...]]:
    """Per cell the tokens that the model says after a prompt with the cell's edges cut, each the likeliest one.

    embeddings (1, token, hidden) of the prompt. An answer ends with an end-of-sequence token, which is part of it, or
    after max_new_tokens. guess: a likely answer, without end-of-sequence, along which all cells go first; where a cell
    says something else it goes on with those that have said the same so far. A wrong guess costs time only.
    """
    ends = end_ids(vlm)
    known = {_ended(guess, ends, max_new_tokens)}
    waiting: dict[tuple[int, ...], list[int]] = {(): list(range(len(cells(embeddings.shape[1]))))}
    found: dict[int, tuple[int, ...]] = {}
    engine = replace(engine or Engine(), checks=0)  # token numbers have no distance
    while waiting:
        said = min(waiting, key=len)
        numbers = waiting.pop(said)
        line = _following(said, known)
        if bar is not None and said:
            bar.total += len(numbers)
        likeliest = _likeliest(vlm, embeddings, (said, line), [cells, numbers], engine, bar)
        follow = _sorted_by_what_they_say(line, len(said), likeliest.tolist(), (ends, max_new_tokens))
        for number, (answer, is_over) in zip(numbers, follow, strict=True):
            if is_over:
                found[number] = answer
                known.add(answer)
            else:
                waiting.setdefault(answer, []).append(number)
    return [found[number] for number in range(len(found))]
