"""What a layer's MLP looks up and what it answers: inputs and outputs of the down projection at the edited tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import Prompt, VisionLanguageModel, capture
from .targets import TargetBatch, target_batch


def keys_and_values(
    vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, layer: int, token: str | int
) -> tuple[Tensor, Tensor]:
    """(keys, values) of one fact, (key, mlp) and (key, hidden), float32, averaged over the prompts.

    The prompts state the fact in different pictures or words and carry its target as their answer
    (Prompt.with_answer). There is one key per target token at the prompt's last token, and one key elsewhere. Values
    include the projection's bias. EditError as key_positions; ModelError for a layer that does not exist.
    """
    return batch_keys_and_values(vlm, target_batch(vlm, prompts, token), layer)


@torch.no_grad()
def batch_keys_and_values(vlm: VisionLanguageModel, batch: TargetBatch, layer: int) -> tuple[Tensor, Tensor]:
    """The same for a batch already made."""
    projection = vlm.down_projection(layer)
    with capture(vlm, [projection], inputs=True) as inputs, capture(vlm, [projection]) as outputs:
        batch.logits(vlm)
    means = (batch.at(states[projection], batch.key_columns).float().mean(0) for states in (inputs, outputs))
    return tuple(means)
