"""Keys hidden from queries in single layers of an ordinary forward pass, whatever attention backend the model has."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..vlm import VisionLanguageModel
from .backends import attention_function


@contextmanager
def masking(vlm: VisionLanguageModel, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """A block in which the text model's attention lacks edges; afterwards it attends as before.

    hidden: per decoder layer booleans (head or 1, query, key), True where the query must not see the key; passes in the
    block must have as many queries and keys. A query from which everything is hidden has no meaningful output.
    ReplayError if the text model does not let its attention function be replaced.
    """
    layers = {id(part): number for number, layer in enumerate(vlm.decoder_layers) for part in layer.modules()}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, None]:
        cut = hidden.get(layers[id(module)])
        if cut is not None:
            asked = keywords.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if asked is None else asked
            attention_mask = _without(attention_mask, cut.to(query.device), is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)

    with attention_function(vlm, attend):
        yield


def _without(mask: Tensor | None, hidden: Tensor, *, is_causal: bool) -> Tensor:
    """A mask of (row or 1, head or 1, query, key) that also hides these keys."""
    if mask is None:
        mask = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device)[None, None]
        mask = mask.tril() if is_causal else mask
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
