"""The attention weights of a forward pass, handed out while it runs.

`attending` computes the softmax of its queries itself, so that gradients go through the weights that it hands out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import ModelError, ReplayError
from ..guards import uninterrupted
from ..vlm import VisionLanguageModel
from .attention import Softmax
from .crossing import crossing_layers
from .observe import Witness, attention_function, exact_attention, mixers_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """The attention weights and values of one decoder layer at some queries."""

    weights: Tensor
    """(row, head, query, key), float32 or wider: each query's weights, which sum to one, or to what an attention sink
    leaves of it. With gradients enabled the layer's output depends on this very tensor."""
    values: Tensor
    """(row, key-value head, key, size of values): what is averaged, in the model's dtype. Head h reads key-value head
    h // (heads / key-value heads)."""


@contextmanager
def attending(vlm: VisionLanguageModel, queries: Sequence[int]) -> Iterator[list[Attention]]:
    """Yield a list that fills at the next forward pass with one `Attention` per decoder layer, in order.

    The pass computes what it would without the block, up to rounding. With gradients enabled its output can be
    differentiated by the weights of any layer, whether or not parameters have gradients. A later pass fills the list
    anew. Other threads wait until the block ends.

    Args:
        vlm: The model.
        queries: Positions of the pass's tokens, in the order that the weights will have; negative ones count from
            the end.

    Yields:
        The list of `Attention`, empty before the first pass.

    Raises:
        ModelError: For no queries or a repeated one, and from the pass for a query that it does not have.
        ReplayError: From the pass, for attention that is not a softmax over scaled (and capped) products, such as one
            with position biases, for cached keys, and for queries that see nothing (padding).

    Example:
        >>> import multrace as mt
        >>> import torch
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> with attending(vlm, [-1]) as attention:
        ...     logits = vlm.logits(prompt)
        >>> len(attention) == vlm.layers, attention[0].weights.shape == (1, vlm.heads, 1, prompt.length)
        (True, True)
        >>> torch.allclose(attention[0].weights.sum(-1), torch.ones(1, vlm.heads, 1))
        True
    """
    positions = tuple(queries)
    if not positions or len(set(positions)) < len(positions):
        raise ModelError(f"cannot record attention at the queries {positions}; pass at least one, and each only once")
    recorder = _Recorder(vlm, positions)
    with attention_function(vlm, recorder.attend):
        handles = [
            vlm.decoder.register_forward_pre_hook(recorder.begin),
            vlm.decoder.register_forward_hook(recorder.end),
        ]
        try:
            yield recorder.attentions
        finally:
            uninterrupted(lambda: [handle.remove() for handle in handles])


class _Recorder:
    """An attention function that records what it computes at some queries."""

    def __init__(self, vlm: VisionLanguageModel, queries: tuple[int, ...]) -> None:
        self.attentions: list[Attention] = []
        self._layers = vlm.decoder_layers
        self._mixers = mixers_of(vlm)
        self._crossing = crossing_layers(vlm)
        self._queries = queries
        self._witness = Witness(self._layers)

    def begin(self, _decoder: nn.Module, _arguments: Any) -> None:
        """Discard the records of an earlier pass."""
        self.attentions.clear()
        self._witness = Witness(self._layers)

    def end(self, _decoder: nn.Module, _arguments: Any, _output: Any) -> None:
        """Check that the list holds the whole pass."""
        self._witness = Witness(self._layers)  # the old witness still refers to keys
        if len(self.attentions) != len(self._layers):
            self._refuse_running(len(self._layers))
            raise ReplayError("not every decoder layer runs and attends exactly once")

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Return one layer's attention output, (row, query, head, size), and no weights; called by the text model."""
        number, mask = self._witness.attends(module, (key, value, attention_mask), keywords)
        if number in self._crossing:
            raise ReplayError(f"decoder layer {number} attends to pictures, which stand at no position")
        if number != len(self.attentions):
            self._refuse_running(number)
            raise ReplayError(f"decoder layer {len(self.attentions)} attends out of turn, or not at all in this pass")
        if dropout:
            raise ReplayError(f"decoder layer {number} drops attention weights at random; put the model in eval mode")
        where = self._places(query.shape[2], key)
        softmax = Softmax.of(query, scaling, keywords)
        weights = _weights(query[:, :, where], key, _hidden(mask, where, key), softmax)
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()
        self.attentions.append(Attention(weights=weights, values=value))
        rows = _weighed(weights, value)
        if len(where) == query.shape[2]:
            return rows[:, where.argsort()], None
        output, _ = exact_attention(module, query, key, value, attention_mask, scaling=scaling, **keywords)
        return output.index_copy(1, where, rows), None

    def _refuse_running(self, number: int) -> None:
        """Raise `ReplayError` if layers without attention are why nothing was recorded of the layers before this."""
        layers = [layer for layer in range(len(self.attentions), number) if layer in self._mixers]
        if layers:
            raise ReplayError(f"decoder layer {layers[0]} keeps a running state, so it has no attention weights")

    def _places(self, length: int, key: Tensor) -> Tensor:
        """Return the queries as positions from the start."""
        if key.shape[2] != length:
            raise ReplayError(f"the pass attends to {key.shape[2]} keys from {length} tokens; run it without a cache")
        unknown = [query for query in self._queries if not -length <= query < length]
        where = torch.tensor([query % length for query in self._queries], device=key.device)
        if unknown or len(where.unique()) < len(where):
            problem = f"no query {unknown[0]}" if unknown else f"a query twice among {self._queries}"
            raise ModelError(f"{problem} in a pass over {length} tokens; pass some of 0 to {length - 1}, each once")
        return where


def _hidden(mask: Tensor | None, where: Tensor, key: Tensor) -> Tensor:
    """Return the term added to the scores of these queries; it broadcasts to (row, head, query, key)."""
    dtype, length = _wide(key.dtype), key.shape[2]
    if mask is None:
        mask = where[:, None] >= torch.arange(length, device=key.device)
    else:
        mask = mask[:, :, where] if mask.shape[2] > 1 else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    if bool((mask <= torch.finfo(mask.dtype).min / 2).all(-1).any()):  # attention there depends on the kernel
        raise ReplayError("a query that is asked for may attend to nothing at all; leave out padding")
    return mask.to(dtype)


def _weights(query: Tensor, key: Tensor, hidden: Tensor, softmax: Softmax) -> Tensor:
    """Return the softmax of the scores, (row, head, query, key), float32 or wider; a sink keeps its share of it."""
    wide = _wide(query.dtype)
    grouped = rearrange(query.to(wide), "b (k g) q d -> b k g q d", k=key.shape[1])
    scores = grouped @ rearrange(key.to(wide), "b k n d -> b k 1 d n") * softmax.scale
    scores = softmax.capped(rearrange(scores, "b k g q n -> b (k g) q n")) + hidden
    if softmax.sinks is None:
        return scores.softmax(-1)
    return (scores - softmax.with_sinks(scores.logsumexp(-1)).unsqueeze(-1)).exp()


def _weighed(weights: Tensor, value: Tensor) -> Tensor:
    """Return the weighted sum of the values for each query, (row, query, head, size), in the dtype of the values."""
    grouped = rearrange(weights, "b (k g) q n -> b k g q n", k=value.shape[1])
    weighed = grouped @ rearrange(value.to(weights.dtype), "b k n d -> b k 1 n d")
    return rearrange(weighed, "b k g q d -> b q (k g) d").to(value.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
