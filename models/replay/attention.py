"""Attention over keys from several places, merged by log-sum-exp, so that no row needs a copy of shared keys.

The softmax over a union of disjoint key sets is the average of the softmaxes over the sets, weighted by the share of
the exponentials in each set. So a part only has to return its output and its log-sum-exp (as in FlashAttention,
arXiv 2205.14135). Caps on single scores leave this unchanged, and a sink is one more part, whose output is zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import ReplayError

Kernel = Callable[[Tensor, Tensor, Tensor, float, bool, Tensor | None], tuple[Tensor, Tensor]]
"""(query, keys, values, scale, causal, mask) -> output (row, head, query, size) and log-sum-exp (row, head, query)."""

_SCORES_AT_ONCE = 2**25
"""Number of attention scores that the portable kernel holds at a time: 128 MiB in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax:
    """How one layer's attention turns the products of queries and keys into weights."""

    scale: float
    """The factor of the products; the result is a score."""
    cap: float | None = None
    """The bound c of soft-capped scores, c tanh(score / c) (Gemma 2, arXiv 2408.00118); None without one."""
    sinks: Tensor | None = None
    """(head,): the score of one more key, whose value is zero (GPT-OSS, arXiv 2508.10925); None without one."""

    @classmethod
    def of(cls, query: Tensor, scaling: float | None, keywords: Mapping[str, Any]) -> "Softmax":
        """Return the softmax that an attention function is asked for, given its other keywords."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cls(scale=scale, cap=keywords.get("softcap"), sinks=keywords.get("s_aux"))

    @property
    def is_plain(self) -> bool:
        """True without caps and sinks, which fused kernels do not know."""
        return self.cap is None and self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        """Return the scores under the cap, if there is one."""
        return scores if self.cap is None else (scores / self.cap).tanh() * self.cap

    def with_sinks(self, total: Tensor) -> Tensor:
        """Return the log-sum-exp (row, head, query) of the scores and the sink, if there is one."""
        return total if self.sinks is None else torch.logaddexp(total, self.sinks.to(total)[:, None])


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Keys and values of some positions, shared by rows; the rows form as many equal blocks as there are sets."""

    keys: Tensor
    """(set, key-value head, key, size)"""
    values: Tensor
    """(set, key-value head, key, size of values), which may be another size than that of keys"""
    visible: Tensor | None = None
    """Booleans (query,) or (query, key), True where seen; None if everything is seen."""
    causal: bool = False
    """True if query i sees keys 0 to i only, which needs as many keys as queries."""
    hidden: Tensor | None = None
    """Booleans (row, head or 1, query), True where the row sees none of the keys there; None if nowhere."""
    rows: tuple[int, ...] | None = None
    """The rows that see any of the keys at all, in ascending order; None for all rows."""

    def seeing(self, count: int) -> int:
        """Return the number of rows, out of `count`, that see any of the keys."""
        return count if self.rows is None else len(self.rows)

    def on(self, device: torch.device) -> "Segment":
        """Return the segment with all its tensors on the device of the layer that attends."""
        parts = {name: getattr(self, name) for name in ("keys", "values", "visible", "hidden")}
        moved = {name: part.to(device) for name, part in parts.items() if part is not None and part.device != device}
        return replace(self, **moved) if moved else self


def causal(keys: Tensor, values: Tensor) -> tuple[Segment]:
    """Return the segment of the queries' own keys and values; each query sees those up to its own."""
    return (Segment(keys=keys, values=values, causal=True),)


@dataclass(kw_only=True, eq=False)
class Job:
    """The way in which attention is computed in one call of one decoder layer."""

    segments: Sequence[Segment] = ()
    """Keys and values from elsewhere."""
    own: Callable[[Tensor, Tensor], Sequence[Segment]] = causal
    """A function that turns the keys and values computed in this call into segments as its queries see them."""
    given: tuple[Tensor, Tensor] | None = None
    """Keys and values to use instead of the call's own."""
    is_stopped: bool = False
    """True to end the forward pass once keys and values are known."""
    computed: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    """Keys and values that the call computed: (row, key-value head, position, size) each."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The fastest kernels that passed a self-test on this device and in this dtype."""

    plain: Kernel
    """The one for parts without a mask and for causal parts."""
    masked: Kernel
    """The one for parts in which single keys are hidden from single queries."""
    name: str
    """The names of both, for reports."""


def merged_attention(query: Tensor, segments: Sequence[Segment], *, softmax: Softmax, kernels: Kernels) -> Tensor:
    """Return the attention of queries (row, head, query, size) over all segments, (row, head, query, size of values).

    Grouped-query heads are folded into the query axis. Parts are merged in float32 or wider. With gradients the
    portable kernel is used, since fused kernels give no gradient through the log-sum-exp; it also computes capped
    scores, which fused kernels do not know.
    """
    parts = [_part_of_rows(query, segment, softmax, kernels) for segment in segments if segment.keys.shape[2]]
    return _merged(parts, softmax, query.dtype)


def whole_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, softmax: Softmax, causal: bool, mask: Tensor | None
) -> Tensor:
    """Return the attention of queries (row, head, query, size) over each row's own keys, by the portable kernel.

    mask: booleans, True where seen, or numbers that are added to scores; it broadcasts to (row, head, query, key). A
    query that sees nothing but a sink gets zeros; without a sink, it is answered as if it saw everything.
    """
    dead = None
    if mask is not None and mask.dtype == torch.bool:
        dead = ~mask.any(-1)
        mask = mask | dead.unsqueeze(-1)
    output, total = portable(query, keys, values, softmax.scale, causal, mask, capped=softmax.capped)
    if dead is not None and softmax.sinks is not None:
        total = total.masked_fill(dead, -torch.inf)
    return _merged([(output, total)], softmax, query.dtype)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], softmax: Softmax, dtype: torch.dtype) -> Tensor:
    """Return the output over all parts together, from the output and the log-sum-exp of each."""
    if len(parts) == 1 and softmax.sinks is None:
        return parts[0][0].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.stack([total.to(wide) for _, total in parts])
    shares = (sums - softmax.with_sinks(sums.logsumexp(0))).exp()
    merged = parts[0][0].to(wide) * shares[0].unsqueeze(-1)
    for share, (output, _) in zip(shares[1:], parts[1:], strict=True):
        merged = merged + output.to(wide) * share.unsqueeze(-1)
    return merged.to(dtype)


def _part_of_rows(query: Tensor, segment: Segment, softmax: Softmax, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of one segment; rows that see nothing of it are not computed."""
    if segment.rows is None:
        output, total = _part(query, segment, softmax, kernels)
        return output, total if segment.hidden is None else total.masked_fill(segment.hidden, -torch.inf)
    where = torch.tensor(segment.rows).to(query.device, non_blocking=query.device.type == "cuda")
    keys, values = segment.keys, segment.values
    if len(keys) > 1:  # a set for each row
        keys, values = keys[where], values[where]
    seen = replace(segment, keys=keys, values=values, hidden=None, rows=None)
    output, total = _part(query[where], seen, softmax, kernels)
    if segment.hidden is not None:
        total = total.masked_fill(segment.hidden[where], -torch.inf)
    return (
        output.new_zeros(len(query), *output.shape[1:]).index_copy(0, where, output),
        total.new_full(query.shape[:3], -torch.inf).index_copy(0, where, total),
    )


def _part(query: Tensor, segment: Segment, softmax: Softmax, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of one segment; zero and minus infinity for queries that see none of it."""
    visible, dead = segment.visible, None
    if visible is not None and visible.ndim == 1:
        visible, dead = None, ~visible
    elif visible is not None:
        dead = ~visible.any(-1)
        visible = visible | dead[:, None]  # a kernel has no answer for a row that sees nothing
    if segment.keys.shape[2] == 1 and visible is None and dead is None and len(segment.keys) == len(query):
        return _single(query, segment, softmax)
    kernel = _kernel(query, segment, softmax, kernels.plain if visible is None else kernels.masked)
    rows, heads, length = query.shape[:3]
    if segment.keys.shape[0] == rows:
        output, total = kernel(query, segment.keys, segment.values, softmax.scale, segment.causal, visible)
    else:
        folded = _fold(query, *segment.keys.shape[:2])
        if visible is not None:
            visible = visible.repeat(folded.shape[2] // length, 1)
        output, total = kernel(folded, segment.keys, segment.values, softmax.scale, False, visible)
        output = _unfold(output, rows, heads, length)
        total = _unfold(total.unsqueeze(-1), rows, heads, length).squeeze(-1)
    if dead is not None:
        total = total.masked_fill(dead, -torch.inf)
    return output, total


def _kernel(query: Tensor, segment: Segment, softmax: Softmax, fused: Kernel) -> Kernel:
    """Return the fused kernel, or the portable one where scores are capped or gradients are needed."""
    if softmax.cap is not None:
        return partial(portable, capped=softmax.capped)
    tensors = (query, segment.keys, segment.values)
    return portable if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) else fused


def _single(query: Tensor, segment: Segment, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp for one key per row, usually the query's own, which receives all attention."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (_for_heads(part, query.shape[1]) for part in (segment.keys, segment.values))
    scores = (query.to(wide) * keys.to(wide)).sum(-1) * softmax.scale
    return values.expand(*query.shape[:3], -1), softmax.capped(scores)


def _fold(query: Tensor, sets: int, key_heads: int) -> Tensor:
    """Return rows and query heads that read the same keys as further queries: (set, key-value head, query, size)."""
    if sets == 1 and key_heads == query.shape[1]:  # the usual case, without the cost of parsing a pattern
        return query.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    return rearrange(query, "(g c) (k h) q d -> g k (c h q) d", g=sets, k=key_heads)


def _unfold(value: Tensor, rows: int, heads: int, length: int) -> Tensor:
    """Return the inverse of `_fold`: (row, head, query, size)."""
    sets, key_heads = value.shape[:2]
    if sets == 1 and key_heads == heads:
        return value[0].unflatten(1, (rows, length)).transpose(0, 1)
    return rearrange(value, "g k (c h q) d -> (g c) (k h) q d", c=rows // sets, h=heads // key_heads, q=length)


def portable(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    *,
    capped: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention by matrix products and a log-sum-exp in float32 or wider, on any device, with gradients.

    mask: booleans, True where seen, or numbers that are added to scores; it broadcasts to (row, head, query, key);
    capped: a function that bounds the scores.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (_for_heads(part, query.shape[1]).to(wide) for part in (keys, values))
    if causal:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[2], -1)
    step = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * keys.shape[2]))
    parts = []
    for start, block in zip(range(0, query.shape[2], step), query.split(step, dim=2), strict=True):
        seen = None if mask is None else mask[..., start : start + step, :]
        parts.append(_portable_block(block.to(wide), keys, values, scale, seen, capped))
    return torch.cat([output for output, _ in parts], dim=2).to(query.dtype), torch.cat([sums for _, sums in parts], 2)


def _portable_block(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    capped: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    scores = (query @ keys.transpose(-1, -2)) * scale
    if capped is not None:
        scores = capped(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1)).exp() @ values, total


def _for_heads(value: Tensor, heads: int) -> Tensor:
    """Return keys or values repeated to one set for each query head."""
    return value if value.shape[1] == heads else repeat(value, "b k n d -> b (k h) n d", h=heads // value.shape[1])


def _flash_on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call the CPU's fused kernel; it accepts fewer key-value heads than query heads, and additive masks only."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, keys, values, 0.0, causal, attn_mask=_additive(mask, query.dtype), scale=scale)


def _flash_on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call CUDA's flash kernel for half precision, which has no masks."""
    if mask is not None:
        raise ValueError("this kernel takes no mask")
    keys, values = (_for_heads(part, query.shape[1]) for part in (keys, values))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    output, total, *_ = attend(query, keys, values, 0.0, causal, False, scale=scale)
    return output, total[:, :, : query.shape[2]]


def _efficient_on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call CUDA's memory-efficient kernel, which pads its log-sum-exp by query; masks are aligned to 16 keys."""
    keys, values = (_for_heads(part, query.shape[1]) for part in (keys, values))
    bias = _additive(mask, query.dtype)
    if bias is not None:
        padded = nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[:, : bias.shape[-1]]
        bias = padded.expand(query.shape[0], query.shape[1], -1, -1)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    output, total, *_ = attend(query, keys, values, bias, True, 0.0, causal, scale=scale)
    return output, total[:, :, : query.shape[2]]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


_FUSED: dict[str, tuple[tuple[str, Kernel], ...]] = {
    "cpu": (("flash", _flash_on_cpu),),
    "cuda": (("flash", _flash_on_cuda), ("efficient", _efficient_on_cuda)),
}
"""Candidates by device type, the fastest first; one that fails its self-test is passed over."""


def _padded(
    kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call a kernel that needs keys and values of one size: zeros change no score, and are cut off the output."""
    size, narrow = max(keys.shape[-1], values.shape[-1]), values.shape[-1]
    query, keys, values = (nn.functional.pad(part, (0, size - part.shape[-1])) for part in (query, keys, values))
    output, total = kernel(query, keys, values, scale, causal, mask)
    return output[..., :narrow], total


def probe_kernels(
    *, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, value_size: int | None = None
) -> Kernels:
    """Return the fused kernels that agree with the portable one here, or else the portable one itself.

    heads and key_heads count query heads and key-value heads; size is that of keys, value_size that of values (default:
    the same), to which fused kernels are adapted by padding.
    """
    shape = {"heads": heads, "key_heads": key_heads, "size": size, "value_size": value_size or size}
    fused: Sequence[tuple[str, Kernel]] = _FUSED.get(device.type, ())
    if value_size not in (None, size):
        fused = [(name, partial(_padded, kernel)) for name, kernel in fused]
    chosen = []
    for masked in (False, True):
        passing = [each for each in fused if _agrees(each[1], masked, device=device, dtype=dtype, **shape)]
        chosen.append((*passing, ("portable", portable))[0])
    (plain_name, plain), (masked_name, with_mask) = chosen
    return Kernels(plain=plain, masked=with_mask, name=f"{plain_name}, masked {masked_name}")


def _agrees(kernel: Kernel, masked: bool, *, device: torch.device, dtype: torch.dtype, **shape: int) -> bool:
    """Return whether the kernel gives the portable one's outputs and sums on random numbers of this shape."""
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 3e-2)
    generator = torch.Generator().manual_seed(0)
    for rows, queries, keys, causal in ((3, 7, 7, not masked), (1, 37, 45, False)):
        sizes = (
            (shape["heads"], queries, shape["size"]),
            (shape["key_heads"], keys, shape["size"]),
            (shape["key_heads"], keys, shape["value_size"]),
        )
        query, key, value = (
            torch.randn(rows, *each, generator=generator, dtype=torch.float64).to(device, dtype) for each in sizes
        )
        mask = None
        if masked:
            mask = (torch.rand(queries, keys, generator=generator) < 0.5).index_fill_(1, torch.tensor([0]), True)
            mask = mask.to(device)
        arguments = (query, key, value, shape["size"] ** -0.5, causal, mask)
        try:
            results = kernel(*arguments)
        except (RuntimeError, ValueError):  # this build or device lacks the kernel
            return False
        for result, expected in zip(results, portable(*arguments), strict=True):
            if not torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance):
                return False
    return True


class AttentionMethod:
    """Stands in for an attention module's method `_attn` (GPT-J, GPT-Neo, CodeGen) and calls an attention function.

    The method's scale, and the keys that it hides of its own accord, are found by calling it.
    """

    def __init__(self, module: nn.Module, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._module, self._attend = module, attend
        self._original: Callable[..., tuple[Tensor, Tensor]] = partial(cast(Any, type(module))._attn, module)
        self._scale: float | None = None
        self._seen: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the output (row, head, query, size) of the attention function, and no weights."""
        if self._scale is None:
            self._scale = self._measured(query, key, value)
        mask = masked(attention_mask, ~self._visible(query, key, value), is_causal=False)
        output, _ = self._attend(self._module, query, key, value, mask, scaling=self._scale, is_causal=False)
        return output.transpose(1, 2), None

    def _visible(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return booleans (1, 1, query, key): the keys to which the method gives weight when all keys are equal."""
        shape = query.shape[2], key.shape[2]
        if shape not in self._seen:
            zeros = (torch.zeros_like(part[:1]) for part in (query, key, value))
            with torch.no_grad():
                self._seen[shape] = self._original(*zeros)[1][:, :1] > 0
        return self._seen[shape]

    def _measured(self, query: Tensor, key: Tensor, value: Tensor) -> float:
        """Return the factor of the products. Raises `ReplayError` if the method is not a softmax over them."""
        generator = torch.Generator().manual_seed(0)
        drawn = [
            torch.randn(1, part.shape[1], 4, part.shape[3], generator=generator).to(part)
            for part in (query, key, value)
        ]
        name = type(self._module).__name__
        tolerance = 1e-4 if torch.finfo(value.dtype).eps < 1e-6 else 2e-2
        with torch.no_grad():
            try:
                expected, mask = self._original(*drawn)[0], self._visible(*drawn)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ReplayError(f"the attention of {name} cannot be called by itself: {error}") from error
            for scale in (query.shape[3] ** -0.5, 1.0):
                output = whole_attention(*drawn, softmax=Softmax(scale=scale), causal=False, mask=mask)
                if output.shape == expected.shape and torch.allclose(output, expected, rtol=0, atol=tolerance):
                    return scale
        raise ReplayError(f"the attention of {name} is no softmax over scaled products")


def masked(mask: Tensor | None, hidden: Tensor, *, is_causal: bool) -> Tensor:
    """Return the mask (row or 1, head or 1, query, key) that hides these keys as well."""
    if mask is None:
        mask = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device)[None, None]
        mask = mask.tril() if is_causal else mask
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
