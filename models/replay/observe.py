"""Forward passes with a replaced attention function, which reads attention (`attending`) or cuts it (`masking`).

`attending` computes the softmax of its queries itself, so that gradients go through the weights that it hands out.
Attention that is not a plain softmax over scaled products raises `ReplayError`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import ModelError, ReplayError
from ..guards import uninterrupted
from ..vlm import VisionLanguageModel
from .witness import Witness


@contextmanager
def attention_function(vlm: VisionLanguageModel, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Replace the text model's attention function inside the block; restore it on exit, also after errors.

    Other threads wait until the block ends.

    Args:
        vlm: The model.
        attend: Called as transformers calls its own functions (module, query, key, value, mask, scaling=...,
            dropout=..., ...), with boolean masks or None; returns (row, query, head, size) and weights or None.

    Raises:
        ReplayError: If the text model does not let its attention function be replaced.
    """
    decoder = vlm.decoder
    config: Any = decoder.config
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ReplayError(f"{type(decoder).__name__} does not let its attention function be replaced")
    name = f"multrace_{id(attend)}"
    with vlm.running():
        before = config._attn_implementation

        def put_back() -> None:
            config._attn_implementation = before
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)

        try:
            AttentionInterface.register(name, attend)
            AttentionMaskInterface.register(name, sdpa_mask)  # transformers makes no masks without such an entry
            config._attn_implementation = name
            yield
        finally:
            uninterrupted(put_back)


@contextmanager
def masking(vlm: VisionLanguageModel, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """Hide keys from queries in single layers of the text model until the block ends.

    The text model attends through transformers' sdpa function meanwhile, whatever its own is. Other threads wait until
    the block ends.

    Args:
        vlm: The model.
        hidden: From a decoder layer to booleans (head or 1, query, key), True where the query must not see the key.
            Passes in the block need as many queries and keys. A query from which everything is hidden has no
            meaningful output.

    Raises:
        ReplayError: If the text model does not let its attention function be replaced.

    Source: attention knockout, arXiv 2304.14767, section 4.1.

    Example:
        >>> import multrace as mt
        >>> import torch
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> clean = vlm.logits(prompt)
        >>> hidden = torch.zeros(1, prompt.length, prompt.length, dtype=torch.bool)
        >>> hidden[:, -1, 0] = True  # the last token must not see the first
        >>> with masking(vlm, {4: hidden}):
        ...     masked = vlm.logits(prompt)
        >>> bool((masked != clean)[0, -1].any()), bool((masked != clean)[0, :-1].any())
        (True, False)
    """
    layers = {id(part): number for number, layer in enumerate(vlm.decoder_layers) for part in layer.modules()}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, None]:
        cut = hidden.get(layers[id(module)])
        if cut is not None:
            setting = keywords.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if setting is None else setting
            attention_mask = _masked(attention_mask, cut.to(query.device), is_causal=bool(is_causal))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)

    with attention_function(vlm, attend):
        yield


def _masked(mask: Tensor | None, hidden: Tensor, *, is_causal: bool) -> Tensor:
    """Return the mask (row or 1, head or 1, query, key) that hides these keys as well."""
    if mask is None:
        mask = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device)[None, None]
        mask = mask.tril() if is_causal else mask
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """The attention weights and values of one decoder layer at some queries."""

    weights: Tensor
    """(row, head, query, key), float32 or wider: each query's weights, which sum to one. With gradients enabled the
    layer's output depends on this very tensor."""
    values: Tensor
    """(row, key-value head, key, size): the values that are averaged, in the model's dtype. Head h reads key-value head
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
        ReplayError: From the pass, for attention that is not a softmax over scaled products (capped scores, sinks,
            position biases), for cached keys, and for queries that see nothing (padding).

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
        if number != len(self.attentions):
            raise ReplayError(f"decoder layer {number} attends out of turn")
        if dropout:
            raise ReplayError(f"decoder layer {number} drops attention weights at random; put the model in eval mode")
        where = self._places(query.shape[2], key)
        weights = _weights(query[:, :, where], key, _hidden(mask, where, key), scaling)
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()
        self.attentions.append(Attention(weights=weights, values=value))
        rows = _weighed(weights, value)
        if len(where) == query.shape[2]:
            return rows[:, where.argsort()], None
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
        return output.index_copy(1, where, rows), None

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


def _weights(query: Tensor, key: Tensor, hidden: Tensor, scaling: float | None) -> Tensor:
    """Return the softmax of the scaled products, (row, head, query, key), float32 or wider."""
    wide = _wide(query.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = rearrange(query.to(wide), "b (k g) q d -> b k g q d", k=key.shape[1])
    scores = grouped @ rearrange(key.to(wide), "b k n d -> b k 1 d n") * scale
    return (rearrange(scores, "b k g q n -> b (k g) q n") + hidden).softmax(-1)


def _weighed(weights: Tensor, value: Tensor) -> Tensor:
    """Return the weighted sum of the values for each query, (row, query, head, size), in the dtype of the values."""
    grouped = rearrange(weights, "b (k g) q n -> b k g q n", k=value.shape[1])
    weighed = grouped @ rearrange(value.to(weights.dtype), "b k n d -> b k 1 n d")
    return rearrange(weighed, "b k g q d -> b q (k g) d").to(value.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
