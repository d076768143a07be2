"""The contributions of each token's values to other tokens through attention, per layer and head."""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...models.replay.observe import Attention, attending
from ..engine.positions import prompt_positions
from ..errors import TraceError
from .contributions_result import AttentionContributions
from .image_reading import patch_places

_ENTRIES = 2**26
"""Number of entries of contribution vectors in memory at a time: 256 MiB in float32."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest difference between two ways to weight values, as a share of the largest entry; 0.05 in half precision."""


def attention_contributions(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: str | int | Sequence[int] = "last",
    sources: str | int | Sequence[int] = "all",
    by_head: bool = True,
    progress: bool = True,
) -> AttentionContributions:
    """Return how much the source tokens contribute to the query tokens in every layer, from one forward pass.

    A source j contributes a_j = weight * W_O (W_V h_j) to a query through a head, without the biases of both maps.
    The sum over sources and heads is everything that the attention module writes at the query, except for a constant.
    The contribution of a source is the length of its sum over heads.

    Args:
        vlm: The model.
        prompt: The prompt; an answer that it carries is ignored.
        queries: The tokens that attend: a token group, an index or several indices (default: the last token).
        sources: The tokens that are attended to (default: all tokens of the prompt).
        by_head: Also compute the length of each head's own contribution.
        progress: Show a progress bar over the layers.

    Returns:
        An `AttentionContributions`. queries="constraint" with sources="image", and queries="last" with
        sources="constraint", are the two analyses of arXiv 2406.04236.

    Raises:
        TraceError: If a group has no tokens, if all sources come after all queries, or if the model's attention is not
            a sum of such contributions.
        ReplayError: If the attention is not a softmax over scaled products.

    Source: arXiv 2309.15098 (SAT-Probe); arXiv 2406.04236, equation 1.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64), "red"), "What colour is this?")
        >>> result = mt.attention_contributions(vlm, prompt, sources="image", progress=False)
        >>> result.by_layer("image", reduction="sum").shape  # one number per layer
        torch.Size([8])
    """
    query_positions, source_positions = _places(prompt, queries, sources)
    recorded, _ = record_attention(vlm, vlm.embed(prompt), query_positions)
    layers = list(zip(recorded, value_bias(vlm), strict=True))
    bar = tqdm(layers, desc="layers", unit="layer", disable=not progress)
    parts = [
        contribution_norms(vlm, layer, attention, bias, source_positions) for layer, (attention, bias) in enumerate(bar)
    ]
    last = prompt.groups["last"][0]
    return AttentionContributions(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[: last + 1],
        input_ids=tuple(prompt.inputs["input_ids"][0, : last + 1].tolist()),
        groups={name: members for name, members in prompt.groups.items() if members and max(members) <= last},
        patches=patch_places(prompt),
        queries=queries if isinstance(queries, str) else None,
        sources=sources if isinstance(sources, str) else None,
        query_positions=query_positions,
        source_positions=source_positions,
        contributions=torch.stack([summed for summed, _ in parts]).cpu(),
        head_contributions=torch.stack([heads for _, heads in parts]).cpu() if by_head else None,
        weights=torch.stack([attention.weights[0, :, :, list(source_positions)] for attention in recorded]).cpu(),
    )


def contribution_vectors(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    layer: int,
    *,
    queries: str | int | Sequence[int] = "last",
    sources: str | int | Sequence[int] = "all",
) -> Tensor:
    """Return the vectors (head, query, source, hidden) that each source contributes to each query through each head.

    The vectors are float32 or wider. Their sum over all heads and sources is the output of the layer's attention module
    minus the bias of its output projection and minus its value bias mapped through that projection. The arguments and
    errors are those of `attention_contributions`; a negative layer counts from the end.
    """
    query_positions, source_positions = _places(prompt, queries, sources)
    index = vlm.layer_index(layer)
    recorded, _ = record_attention(vlm, vlm.embed(prompt), query_positions)
    values = recorded[index].values[0][:, list(source_positions)]
    written = projected_values(vlm, index, values, value_bias(vlm)[index])
    return recorded[index].weights[0][:, :, list(source_positions), None] * written[:, None]


def contribution_norms(
    vlm: VisionLanguageModel, layer: int, attention: Attention, bias: Tensor, sources: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the lengths of a layer's contributions: (query, source) summed over heads, and (head, query, source).

    Sources are processed in chunks, which bounds the memory of the vectors.
    """
    weights = attention.weights[0]
    per_source = vlm.hidden * max(weights.shape[:2])
    summed, by_head = [], []
    for chunk in _chunks(sources, max(1, _ENTRIES // per_source)):
        written = projected_values(vlm, layer, attention.values[0][:, chunk], bias)
        shares = weights[:, :, chunk]
        summed.append(torch.einsum("hqs,hso->qso", shares, written).norm(dim=-1))
        by_head.append(shares * written.norm(dim=-1)[:, None])
    return torch.cat(summed, dim=-1), torch.cat(by_head, dim=-1)


def record_attention(
    vlm: VisionLanguageModel, embeddings: Tensor, queries: Sequence[int], *, read: Sequence[int] = (-1,)
) -> tuple[list[Attention], Tensor]:
    """Return each layer's attention at the queries in one pass over embeddings (1, token, hidden), and the logits.

    The logits (1, read position, vocab) belong to the positions in `read`. Raises `TraceError` if the output
    projection of a layer reads anything but the weighted values (for example gated values), since the contributions
    would not add up to its output.
    """
    projections = [vlm.attention_projection(layer) for layer in range(vlm.layers)]
    positions = [position % embeddings.shape[1] for position in read]
    with torch.no_grad(), attending(vlm, queries) as recorded, capture(vlm, projections, inputs=True) as inputs:
        logits = vlm.forward(inputs_embeds=embeddings, positions=positions)
    for layer, (attention, projection) in enumerate(zip(recorded, projections, strict=True)):
        _check_weighted(layer, attention, inputs[projection][:, list(queries)])
    return list(recorded), logits


def value_bias(vlm: VisionLanguageModel) -> tuple[Tensor, ...]:
    """Return for each layer the part (key-value head, size) of the values that does not depend on the token.

    It is exact: one token is run with zeros as the input of every attention module, so its values are the bias.
    """
    zeros = {Site("attention", layer): torch.zeros_like for layer in range(vlm.layers)}
    nothing = torch.zeros(1, 1, vlm.hidden, device=vlm.device, dtype=vlm.dtype)
    with torch.no_grad(), attending(vlm, (0,)) as recorded, patch(vlm, zeros, inputs=True):
        vlm.forward(inputs_embeds=nothing)
    return tuple(attention.values[0, :, 0] for attention in recorded)


def projected_values(vlm: VisionLanguageModel, layer: int, values: Tensor, bias: Tensor) -> Tensor:
    """Return the vectors (head, source, hidden) that each source writes through each head at a weight of one.

    The vectors are float32 or wider. The values (key-value head, source, size) and their bias (key-value head, size)
    are those of the layer; the bias is subtracted. Each head has its own columns of the output projection, and the
    heads of one group read the same values. Raises `TraceError` for a projection whose weights are not floating-point
    numbers in memory.
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


def _check_weighted(layer: int, attention: Attention, inputs: Tensor) -> None:
    """Raise `TraceError` unless the inputs (row, query, width) of the output projection are the weighted values."""
    values = attention.values.to(attention.weights.dtype)
    values = repeat(values, "b k s d -> b (k g) s d", g=attention.weights.shape[1] // values.shape[1])
    expected = rearrange(attention.weights @ values, "b h q d -> b q (h d)")
    tolerance = _TOLERANCE.get(inputs.dtype, 0.05) * float(expected.abs().max())
    if inputs.shape != expected.shape or not torch.allclose(inputs.to(expected), expected, rtol=0, atol=tolerance):
        raise TraceError(
            f"the output projection of decoder layer {layer} reads something else than the values that its attention "
            "weighs, so contributions would not add up to what it writes; they cannot be computed for this model"
        )


def _places(
    prompt: Prompt, queries: str | int | Sequence[int], sources: str | int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of queries and sources. Raises `TraceError` if no query can see a source."""
    query_positions, source_positions = prompt_positions(prompt, queries), prompt_positions(prompt, sources)
    if source_positions[0] > query_positions[-1]:
        raise TraceError(
            f"the sources {sources!r} (from position {source_positions[0]} on) lie behind the queries {queries!r} (up "
            f"to {query_positions[-1]}), which do not look ahead; ask for earlier sources or later queries"
        )
    return query_positions, source_positions


def _chunks(positions: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(positions[start : start + size]) for start in range(0, len(positions), size))
