"""Image tokens that are dropped from one decoder layer on: ranking of the tokens, and removal of attention edges."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import ReplayError, VisionLanguageModel
from ...models.replay.cuts import Cut
from ...models.replay.observe import attending
from ..engine.cells import EdgeCell
from ..errors import TraceError


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Tokens to which no other token attends from a layer on."""

    tokens: frozenset[int]
    """Positions of the tokens; empty for the run without changes."""
    first: int
    """The first layer without the tokens, which are also absent from all later layers."""

    def cell(self, length: int, layers: int) -> EdgeCell:
        """Return the edges that are missing in a run of this length and a decoder with this number of layers."""
        rest = frozenset(range(length)) - self.tokens
        return EdgeCell(cut=Cut(sources=self.tokens, targets=rest), first=self.first, last=layers - 1, is_dropped=True)


def drop_others(image: Sequence[int], kept: Tensor, first: int) -> Drop:
    """Return the `Drop`, from this layer on, of all image positions except those in `kept` (image token,) booleans."""
    tokens = frozenset(place for place, stays in zip(image, kept.tolist(), strict=True) if not stays)
    return Drop(tokens=tokens, first=first if tokens else 0)


def kept_tokens(
    vlm: VisionLanguageModel,
    embeddings: Tensor,
    image: Sequence[int],
    *,
    keep: Sequence[int | str],
    layers: Sequence[int],
) -> Tensor:
    """Return the tokens that stay, booleans (keep, layer, image token), if the top-ranked ones stay from each layer on.

    The embeddings (1, token, hidden) end with the prompt's last token, whose attention ranks the others; "all" keeps
    every token. Raises `TraceError` if tokens have to be ranked and this model's attention cannot be read.
    """
    counts = [len(image) if number == "all" else min(int(number), len(image)) for number in keep]
    kept = torch.zeros(len(counts), len(layers), len(image), dtype=torch.bool)
    ranks = None
    for row, count in enumerate(counts):
        if count in (0, len(image)):
            kept[row] = count > 0
            continue
        ranks = image_ranks(vlm, embeddings, image) if ranks is None else ranks
        kept[row] = ranks[list(layers)] < count
    return kept


def image_ranks(vlm: VisionLanguageModel, embeddings: Tensor, image: Sequence[int]) -> Tensor:
    """Return the rank (layer, image token) int64 of each image token for each first pruned layer, 0 for the best.

    Tokens are ranked by the last token's attention to them, mean over heads, in the layer before, which still has all
    tokens; for layer 0, in layer 0 itself. Ties go to the earlier token. The ranking is that of FastV (arXiv
    2403.06764) as released.
    """
    try:
        with torch.no_grad(), attending(vlm, (embeddings.shape[1] - 1,)) as seen:
            vlm.forward(inputs_embeds=embeddings, positions=[embeddings.shape[1] - 1])
    except ReplayError as error:
        raise TraceError(
            f"image tokens of {vlm.name!r} cannot be ranked by attention: {error}; pass keep=(0,), which needs no order"
        ) from error
    attended = torch.stack([each.weights[0, :, 0].mean(0)[list(image)] for each in seen]).cpu()
    order = attended.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(len(image)).expand_as(order))
    return torch.cat([ranks[:1], ranks[:-1]])
