"""One pass that records attention, and what the recorded values write into the residual stream at full weight."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...models.replay.observe import Attention, attending
from ..errors import TraceError
from ..groups import group_positions

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far two ways to weigh values may be apart, as a share of the largest; half precision is given 0.05."""


def prompt_positions(prompt: Prompt, asked: str | int | Sequence[int]) -> tuple[int, ...]:
    """Ascending positions of a group, of one index or of several. TraceError for none, or for tokens of an answer."""
    if isinstance(asked, str):
        return tuple(sorted(group_positions(prompt, asked)))
    positions, last = tuple(sorted(set(prompt.positions(asked)))), prompt.groups["last"][0]
    if not positions or positions[-1] > last:
        raise TraceError(
            f"no positions {asked} within this prompt; pass at least one, and none beyond its last token ({last})"
        )
    return positions


def watch_attention(
    vlm: VisionLanguageModel, embeddings: Tensor, queries: Sequence[int], *, read: Sequence[int] = (-1,)
) -> tuple[list[Attention], Tensor]:
    """Each layer's attention at the queries in one pass over embeddings (1, token, hidden), and logits where read.

    read: positions of logits (1, read position, vocab). TraceError if the output projection of a layer reads anything
    but the values as they are weighed (a gate, for example), since contributions would not add up to its output.
    """
    projections = [vlm.attention_projection(layer) for layer in range(vlm.layers)]
    positions = [position % embeddings.shape[1] for position in read]
    with torch.no_grad(), attending(vlm, queries) as seen, capture(vlm, projections, inputs=True) as given:
        logits = vlm.forward(inputs_embeds=embeddings, positions=positions)
    for layer, (attention, projection) in enumerate(zip(seen, projections, strict=True)):
        _check_weighed(layer, attention, given[projection][:, list(queries)])
    return list(seen), logits


def value_bias(vlm: VisionLanguageModel) -> tuple[Tensor, ...]:
    """Per layer (key-value head, size): the part of every value that does not depend on its token.

    Exact: one token runs with zeros put into each attention module, whose values are the bias then.
    """
    zeros = {Site("attention", layer): torch.zeros_like for layer in range(vlm.layers)}
    nothing = torch.zeros(1, 1, vlm.hidden, device=vlm.device, dtype=vlm.dtype)
    with torch.no_grad(), attending(vlm, (0,)) as seen, patch(vlm, zeros, inputs=True):
        vlm.forward(inputs_embeds=nothing)
    return tuple(attention.values[0, :, 0] for attention in seen)


def written_values(vlm: VisionLanguageModel, layer: int, values: Tensor, bias: Tensor) -> Tensor:
    """(head, source, hidden), float32 or wider: what each source writes through each head at a weight of one.

    values (key-value head, source, size) and bias (key-value head, size) of this layer; the bias is taken out. The
    head's columns of the output projection are its own; heads of one group read the same values. TraceError for a
    projection whose weights are not numbers in memory.
    """
    projection = vlm.attention_projection(layer)
    weight = projection.weight.detach()
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise TraceError(
            f"the output projection at {projection} is quantised or offloaded, so its columns cannot be read; "
            "load the model without that"
        )
    columns = rearrange(weight if projection.transposed else weight.T, "(h d) o -> h d o", d=values.shape[-1])
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    own = values.to(wide) - bias[:, None].to(wide)
    return repeat(own, "k s d -> (k g) s d", g=len(columns) // len(own)) @ columns.to(own)


def _check_weighed(layer: int, attention: Attention, given: Tensor) -> None:
    values = attention.values.to(attention.weights.dtype)
    values = repeat(values, "b k s d -> b (k g) s d", g=attention.weights.shape[1] // values.shape[1])
    expected = rearrange(attention.weights @ values, "b h q d -> b q (h d)")
    tolerance = _TOLERANCE.get(given.dtype, 0.05) * float(expected.abs().max())
    if given.shape != expected.shape or not torch.allclose(given.to(expected), expected, rtol=0, atol=tolerance):
        raise TraceError(
            f"the output projection of decoder layer {layer} reads something else than the values that its attention "
            "weighs, so contributions would not add up to what it writes; they cannot be told for this model"
        )
