"""What each token's values bring to other tokens through attention, per layer and head."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import Attention
from ..errors import TraceError
from .attended import prompt_positions, value_bias, watch_attention, written_values
from .contributions_result import AttentionContributions

_NUMBERS_AT_ONCE = 2**26
"""Entries of vectors that are held at a time: 256 MiB in float32."""


def attention_contributions(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: str | int | Sequence[int] = "last",
    sources: str | int | Sequence[int] = "all",
    by_head: bool = True,
    progress: bool = False,
) -> AttentionContributions:
    """How much the sources' values bring to the queries in every layer, from one pass over the prompt.

    A source j brings a = weight * W_O (W_V h_j) to a query through a head, the biases of both maps taken out; summed
    over sources and heads that is all the attention module writes there but its constant part. Its contribution is the
    length of the sum over heads. arXiv 2309.15098 and arXiv 2406.04236, eq. 1.

    queries, sources: a token group of the prompt, an index or several. queries="constraint", sources="image" and
    queries="last", sources="constraint" are the two analyses of arXiv 2406.04236. by_head=False leaves the lengths per
    head out. TraceError for groups without tokens, for sources that lie behind all queries, and for attention that
    does not add up to such contributions; ReplayError as `attending` raises it.
    """
    asked, given = _places(prompt, queries, sources)
    seen, _ = watch_attention(vlm, vlm.embed(prompt), asked)
    layers = tqdm(list(zip(seen, value_bias(vlm), strict=True)), desc="layers", unit="layer", disable=not progress)
    parts = [layer_norms(vlm, layer, attention, bias, given) for layer, (attention, bias) in enumerate(layers)]
    last = prompt.groups["last"][0]
    return AttentionContributions(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[: last + 1],
        input_ids=tuple(prompt.inputs["input_ids"][0, : last + 1].tolist()),
        groups={name: places for name, places in prompt.groups.items() if places and max(places) <= last},
        patches=tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches),
        queries=queries if isinstance(queries, str) else None,
        sources=sources if isinstance(sources, str) else None,
        query_positions=asked,
        source_positions=given,
        contributions=torch.stack([summed for summed, _ in parts]).cpu(),
        head_contributions=torch.stack([heads for _, heads in parts]).cpu() if by_head else None,
        weights=torch.stack([attention.weights[0, :, :, list(given)] for attention in seen]).cpu(),
    )


def contribution_vectors(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    layer: int,
    *,
    queries: str | int | Sequence[int] = "last",
    sources: str | int | Sequence[int] = "all",
) -> Tensor:
    """(head, query, source, hidden), float32 or wider: what each source brings to each query through each head.

    The sum over all heads and sources is what the layer's attention module writes, less the bias of its output
    projection and less its value bias sent through that projection. Arguments and errors as `attention_contributions`
    has them; negative layers count from the end.
    """
    asked, given = _places(prompt, queries, sources)
    number = vlm.layer_index(layer)
    seen, _ = watch_attention(vlm, vlm.embed(prompt), asked)
    values = seen[number].values[0][:, list(given)]
    written = written_values(vlm, number, values, value_bias(vlm)[number])
    return seen[number].weights[0][:, :, list(given), None] * written[:, None]


def layer_norms(
    vlm: VisionLanguageModel, layer: int, attention: Attention, bias: Tensor, sources: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Lengths of one layer's contributions: (query, source) of their sum over heads, and (head, query, source) each.

    Computed some sources at a time, so that no more vectors are held than memory has room for.
    """
    weights = attention.weights[0]
    per_source = vlm.hidden * max(weights.shape[:2])
    summed, by_head = [], []
    for chunk in _chunks(sources, max(1, _NUMBERS_AT_ONCE // per_source)):
        written = written_values(vlm, layer, attention.values[0][:, chunk], bias)
        shares = weights[:, :, chunk]
        summed.append(torch.einsum("hqs,hso->qso", shares, written).norm(dim=-1))
        by_head.append(shares * written.norm(dim=-1)[:, None])
    return torch.cat(summed, dim=-1), torch.cat(by_head, dim=-1)


def _places(
    prompt: Prompt, queries: str | int | Sequence[int], sources: str | int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    asked, given = prompt_positions(prompt, queries), prompt_positions(prompt, sources)
    if given[0] > asked[-1]:
        raise TraceError(
            f"the sources {sources!r} (from position {given[0]} on) lie behind the queries {queries!r} (up to "
            f"{asked[-1]}), which do not look ahead; ask for earlier sources or later queries"
        )
    return asked, given


def _chunks(positions: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(positions[start : start + size]) for start in range(0, len(positions), size))
