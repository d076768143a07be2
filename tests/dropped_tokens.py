"""Image tokens dropped the slow way: one masked pass per cell, from results of pruning."""

from collections.abc import Sequence

import torch
from multrace import VisionLanguageModel
from multrace.models import Prompt
from multrace.models.frame import DecoderInput
from multrace.models.replay import Cut
from multrace.tracing import Engine, ImagePruning, prune_image_tokens
from multrace.tracing.engine import EdgeCell, Runs, plain_scores
from torch import Tensor

QUESTION = "Who founded the company in this photo?"
FAST = Engine(checks=0)


def pruned(vlm: VisionLanguageModel, prompt: Prompt, **settings: object) -> ImagePruning:
    return prune_image_tokens(vlm, prompt, **{"engine": FAST, "progress": False, "max_new_tokens": 5, **settings})


def gone(found: ImagePruning) -> dict[tuple[int, int], list[int]]:
    """By place among keeps and layers, the positions that are dropped."""
    places = torch.tensor(found.image_positions)
    return {
        (row, column): places[~found.kept[row, column]].tolist()
        for row in range(len(found.keep))
        for column in range(len(found.layers))
    }


def masked_logits(
    vlm: VisionLanguageModel, entering: DecoderInput, dropped: Sequence[int], first: int, count: int
) -> Tensor:
    """(token, vocab): the last logits of a masked pass in which these tokens are hidden from all but themselves."""
    length = entering.length
    rest = frozenset(range(length)) - set(dropped)
    cell = EdgeCell(cut=Cut(sources=frozenset(dropped), targets=rest), first=first, last=vlm.layers - 1)
    run = Runs.of_one(entering, scored=range(length - count, length))
    return plain_scores(vlm, run, [cell], lambda logits: logits.flatten(1))[0].reshape(count, -1)
