"""Attention knockout the plain way: one forward pass per cell, with a dense mask in each layer of its window."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ...models.replay.cuts import Cut
from ...models.replay.observe import masking
from .cells import Measure
from .edges import EdgeCell, EdgeRun


def plain_edges(
    vlm: VisionLanguageModel,
    run: EdgeRun,
    cells: Sequence[EdgeCell],
    measure: Measure,
    *,
    copies: int = 1,
    bar: tqdm | None = None,
) -> Tensor:
    """(cell, metric) float64 on the CPU: each cell by a whole pass of the decoder, logits only where they are scored.

    copies: equal rows per pass, of which the first is scored; another number shows how much rounding depends on it.
    """
    scores = []
    embeddings = run.embeddings.expand(copies, -1, -1).contiguous()
    for cell in cells:
        mask = hidden_edges(cell.cut, run.length, vlm.heads)
        with torch.no_grad(), masking(vlm, dict.fromkeys(range(cell.first, cell.last + 1), mask)):
            logits = vlm.forward(inputs_embeds=embeddings, positions=run.scored, **run.keywords)
        scores.append(measure(logits[:1])[0].double().cpu())
        if bar is not None:
            bar.update()
    return torch.stack(scores)


def hidden_edges(cut: Cut, length: int, heads: int) -> Tensor:
    """Booleans (head or 1, query, key): the edges that are cut."""
    sources, targets = (
        torch.zeros(length, dtype=torch.bool).index_fill(0, torch.tensor(sorted(each), dtype=torch.long), True)
        for each in (cut.sources, cut.targets)
    )
    edges = targets[:, None] & sources[None, :]
    if not cut.heads:
        return edges[None]
    chosen = torch.zeros(heads, 1, 1, dtype=torch.bool).index_fill(0, torch.tensor(cut.heads), True)
    return chosen & edges
