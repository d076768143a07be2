"""The contributions of each token to other tokens through attention, of one prompt and averaged over prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result, long_frame, stacked_frame
from ...models import ModelError, Prompt, Site, VisionLanguageModel, capture, patch
from ...models.frame import DecoderInput
from ...models.replay.attending import Attention, attending
from ..engine.cells import TraceError
from ..engine.positions import prompt_positions
from .contributions_result import (
    REDUCED,
    UNITS,
    AttentionContributions,
    Chart,
    Line,
    Quantity,
    Reduction,
    index_shares,
    layers_figure,
    name_of,
    shares_figure,
    tokens_for_share,
)
from .image_tokens import patch_places

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ENTRIES = 2**26
"""Number of entries of contribution vectors in memory at a time: 256 MiB in float32."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest difference between two ways to weight values, as a share of the largest entry; 0.05 in half precision."""
_USUAL = ("constraint", "image", "last")


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
    minus the bias of its output projection and minus its value bias mapped through that projection. Where a norm stands
    between attention and the residual stream, it scales the vectors as it scales their sum. The arguments and errors
    are those of `attention_contributions`; a negative layer counts from the end.
    """
    query_positions, source_positions = _places(prompt, queries, sources)
    index = vlm.layer_index(layer)
    recorded, _ = record_attention(vlm, vlm.embed(prompt), query_positions)
    values = recorded[index].values[0][:, list(source_positions)]
    written = projected_values(vlm, index, values, value_bias(vlm)[index])
    vectors = recorded[index].weights[0][:, :, list(source_positions), None] * written[:, None]
    gain = _norm_gain(vlm, index, recorded[index])
    return vectors if gain is None else vectors * gain[:, None]


def contribution_norms(
    vlm: VisionLanguageModel, layer: int, attention: Attention, bias: Tensor, sources: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the lengths of a layer's contributions: (query, source) summed over heads, and (head, query, source).

    Sources are processed in chunks, which bounds the memory of the vectors.
    """
    weights = attention.weights[0]
    per_source = vlm.hidden * max(weights.shape[:2])
    summed, by_head, gain = [], [], _norm_gain(vlm, layer, attention)
    for chunk in _chunks(sources, max(1, _ENTRIES // per_source)):
        written = projected_values(vlm, layer, attention.values[0][:, chunk], bias)
        shares = weights[:, :, chunk]
        vectors, lengths = torch.einsum("hqs,hso->qso", shares, written), written.norm(dim=-1)[:, None]
        if gain is not None:
            vectors = vectors * gain[:, None]
            lengths = torch.einsum("hso,qo->hqs", written.square(), gain.square()).sqrt()
        summed.append(vectors.norm(dim=-1))
        by_head.append(shares * lengths)
    return torch.cat(summed, dim=-1), torch.cat(by_head, dim=-1)


def record_attention(
    vlm: VisionLanguageModel, entering: DecoderInput, queries: Sequence[int], *, read: Sequence[int] = (-1,)
) -> tuple[list[Attention], Tensor]:
    """Return each layer's attention at the queries in one pass over an input of one row, and the logits.

    The logits (1, read position, vocab) belong to the positions in `read`. Raises `TraceError` if the output
    projection of a layer reads anything but the weighted values (for example gated values), since the contributions
    would not add up to its output.
    """
    projections = [vlm.attention_projection(layer) for layer in range(vlm.layers)]
    positions = [position % entering.length for position in read]
    with torch.no_grad(), attending(vlm, queries) as recorded, capture(vlm, projections, inputs=True) as inputs:
        logits = vlm.forward(entering, positions=positions)
    for layer, (attention, projection) in enumerate(zip(recorded, projections, strict=True)):
        _check_weighted(layer, attention, inputs[projection][:, list(queries)])
    return list(recorded), logits


def value_bias(vlm: VisionLanguageModel) -> tuple[Tensor, ...]:
    """Return for each layer the part (key-value head, size) of the values that does not depend on the token.

    It is exact: one token is run with zeros as the input of every attention module, so its values are the bias.
    """
    zeros = {vlm.attention_module(layer): torch.zeros_like for layer in range(vlm.layers)}
    nothing = torch.zeros(1, 1, vlm.hidden, device=vlm.device, dtype=vlm.dtype)
    with torch.no_grad(), attending(vlm, (0,)) as recorded, patch(vlm, zeros, inputs=True):
        vlm.forward(nothing)
    return tuple(attention.values[0, :, 0] for attention in recorded)


def projected_values(vlm: VisionLanguageModel, layer: int, values: Tensor, bias: Tensor) -> Tensor:
    """Return the vectors (head, source, hidden) that each source writes through each head at a weight of one.

    The vectors are float32 or wider. The values (key-value head, source, size) and their bias (key-value head, size)
    are those of the layer; the bias is subtracted. Each head has its own columns of the output projection, and the
    heads of one group read the same values. Raises `TraceError` for a projection whose weights cannot be read.
    """
    projection = vlm.attention_projection(layer)
    try:
        weight = vlm.weight(projection.name).detach()
    except ModelError as error:
        raise TraceError(f"the output projection at {projection}: its columns cannot be read: {error}") from error
    columns = rearrange(weight if projection.transposed else weight.T, "(h d) o -> h d o", d=values.shape[-1])
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    own = values.to(wide) - bias[:, None].to(wide)
    return repeat(own, "k s d -> (k g) s d", g=len(columns) // len(own)) @ columns.to(own)


def _norm_gain(vlm: VisionLanguageModel, layer: int, attention: Attention) -> Tensor | None:
    """Return the factors (query, hidden) of the norm behind a layer's attention, float32 or wider; None without one.

    A norm of Llama's kind multiplies each entry of what attention writes by a number; with all sources given, each
    source's part is multiplied by the same one.
    """
    norm, projection = vlm.module(Site("attention", layer)), vlm.attention_projection(layer)
    if norm is vlm.attention_module(layer):
        return None
    wide = torch.float64 if vlm.dtype == torch.float64 else torch.float32
    weighted = _weighted_values(attention)[0].to(vlm.dtype)
    with torch.no_grad():
        written = projection.module(weighted)
        return torch.where(written == 0, 0, norm(written[None])[0].to(wide) / written.to(wide))


def _weighted_values(attention: Attention) -> Tensor:
    """Return what the output projection reads if it reads the weighted values, (row, query, head x size)."""
    values = attention.values.to(attention.weights.dtype)
    values = repeat(values, "b k s d -> b (k g) s d", g=attention.weights.shape[1] // values.shape[1])
    return rearrange(attention.weights @ values, "b h q d -> b q (h d)")


def _check_weighted(layer: int, attention: Attention, inputs: Tensor) -> None:
    """Raise `TraceError` unless the inputs (row, query, width) of the output projection are the weighted values."""
    expected = _weighted_values(attention)
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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageContributions(Result):
    """The contributions of token groups to the queries by layer, over several prompts. `average` returns it."""

    layout: ClassVar[str] = "multrace average contributions 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    queries: str | None
    """The token group that attended; None if positions were given."""
    reduction: Reduction
    """The reduction of the tokens of a group to one number."""
    groups: tuple[str, ...]
    """The source groups."""
    count: int
    """Number of prompts."""
    contributions: Mean
    """(group, layer), in units of the residual stream: length of the contribution."""
    weights: Mean
    """(group, layer): attention weight, mean over heads."""
    share: float
    """The share of the picture's contributions that `image_tokens` hold."""
    image_tokens: Mean | None
    """(layer,): number of image tokens that hold that share; None if pictures were not read."""
    image_count: int | None
    """Number of image tokens of a prompt; None if pictures were not read or differ in size."""
    image_shares: Mean | None
    """(layer, bin): share of the picture's contributions by index of the image token; None if `image_count` is None."""

    def by_layer(self, group: str, *, of: Quantity = "contribution") -> Tensor:
        """Return the mean contribution (layer,) of a group. Raises `TraceError` for a group that was not averaged."""
        return self._of(of).mean[self._index(group, of)]

    def interval(self, group: str, *, of: Quantity = "contribution") -> tuple[Tensor, Tensor]:
        """Return (low, high), each (layer,): the 95 % interval of `by_layer` over prompts, by Student's t.

        Raises `ArtefactError` for an average of one prompt.
        """
        index = self._index(group, of)
        low, high = self._of(of).interval()
        return low[index], high[index]

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per quantity, group and layer: mean over prompts, its 95 % interval, and n.

        quantity is contribution, weight, or "image tokens" for the group image. low and high are NaN where n is 1.
        """
        frames = {of: _frame(self.groups, self._of(of)) for of in UNITS}
        if self.image_tokens is not None:
            frames["image tokens"] = _frame(("image",), self.image_tokens[None])
        return stacked_frame(frames, "quantity")

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with contribution and weight by layer, and the number of tokens that hold `share`.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        charts = [
            Chart(unit=unit, lines=[_line(group, self._of(of)[index]) for index, group in enumerate(self.groups)])
            for of, unit in UNITS.items()
        ]
        if self.image_tokens is not None:
            line = _line(f"tokens for {self.share:.0%}", self.image_tokens)
            charts.append(Chart(unit=f"image tokens that hold {self.share:.0%}", lines=[line]))
        bands = "; bands: 95% intervals over prompts" if self.count > 1 else ""
        subtitle = f"Mean over {self.count} prompts, {REDUCED[self.reduction]} of each group of sources{bands}"
        titles = f"What attention contributes to {name_of(self.queries)}", subtitle
        return drawing.finished(layers_figure(charts, [], titles=titles), path)

    def plot_histogram(self, path: str | Path | None = None, *, layers: Sequence[int]) -> "Figure":
        """Return a figure with the share of contributions by index of the image token, in some layers.

        Bars are means over prompts with their 95 % intervals.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each.

        Raises:
            TraceError: If pictures were not read or differ in size, or if layers are missing or unknown.
            ArtefactError: If the file cannot be written.
        """
        if self.image_shares is None or self.image_count is None:
            raise TraceError("there are no shares by index here; average prompts whose sources hold pictures of a size")
        count = self.image_shares.shape[0]
        if not layers or not all(-count <= layer < count for layer in layers):
            raise TraceError(f"no layers {tuple(layers)} here; pass some of 0 to {count - 1}")
        shares = self.image_shares[list(layers)]
        ends = shares.band() if self.count > 1 else None
        titles = (
            f"Where in the picture contributions to {name_of(self.queries)} come from",
            f"Share by index of the image token, mean over {self.count} prompts"
            + ("; lines: 95% intervals over prompts" if ends else ""),
        )
        captions = [f"layer {layer % count}" for layer in layers]
        figure = shares_figure(shares.mean, captions=captions, count=self.image_count, titles=titles, ends=ends)
        return drawing.finished(figure, path)

    def _of(self, quantity: str) -> Mean:
        """Return the mean (group, layer) of a quantity."""
        return self.weights if quantity == "weight" else self.contributions

    def _index(self, group: str, of: str) -> int:
        if of not in UNITS or group not in self.groups:
            raise TraceError(
                f"no {of} of {group!r} in this average; pass 'contribution' or 'weight' and one of the groups "
                f"{', '.join(self.groups)}"
            )
        return self.groups.index(group)

    def _lines(self) -> tuple[str, str]:
        place = int(self.contributions.mean.argmax())
        group, layer = divmod(place, self.contributions.shape[1])
        return (
            f"AverageContributions of {name_of_model(self.model)} over {self.count} prompts, to "
            f"{name_of(self.queries)} from {', '.join(self.groups)}",
            f"longest mean contribution {float(self.contributions.mean.max()):.3g}, of {name_of(self.groups[group])} "
            f"in layer {layer}",
        )

    def _problem(self) -> str | None:
        layers = self.contributions.shape[-1]
        fits = [part.fits(len(self.groups), layers) for part in (self.contributions, self.weights)]
        fits += [self.image_tokens is None or self.image_tokens.fits(layers)]
        fits += [self.image_shares is None or self.image_shares.shape[0] == layers]
        return None if all(fits) else "its tensors are of other shapes than its layers and groups"


class ContributionsAverager(Averager[AttentionContributions, AverageContributions]):
    """Average the contributions of source groups by layer, over prompts of one model with the same queries.

    Args:
        groups: Source groups, which all results must hold; by default those among constraint, image and last
            token that all results hold.
        reduction: How the tokens of a group are reduced to one number, as in `AttentionContributions.by_layer`.
        share: Share of the picture's contributions whose image tokens are counted, if all results hold the picture.
        bins: Number of bins for the shares by index of the image token.
    """

    alike = ("model", "revision", "layers", "queries")

    def __init__(
        self,
        *,
        groups: Sequence[str] | None = None,
        reduction: Reduction = "max",
        share: float = 0.8,
        bins: int = 16,
    ) -> None:
        super().__init__()
        self._groups, self._reduction, self._share, self._bins = groups, reduction, share, bins
        self._image_counts: list[int] = []

    def _take(self, result: AttentionContributions) -> None:
        names = [name for name in _USUAL if name in result.source_groups] if self._groups is None else self._groups
        axes = {"group": names, "layer": range(result.layers)}
        for of in UNITS if names else ():
            values = [result.by_layer(name, of=of, reduction=self._reduction) for name in names]
            self._add(of, torch.stack(values), axes)
        if "image" in result.source_groups:
            mass, layers = result.image_mass(), {"layer": range(result.layers)}
            self._image_counts.append(mass.shape[-1])
            self._add("image tokens", tokens_for_share(mass, self._share), layers)
            if len(set(self._image_counts)) == 1:
                bins = min(self._bins, mass.shape[-1])
                self._add("image shares", index_shares(mass, bins), layers | {"bin": range(bins)})

    def _average(self) -> AverageContributions:
        means = {of: self._mean(of) for of in UNITS if of in self._means}
        names = self._labels("contribution", "group") if means else ()
        common = [index for index in range(len(names)) if int(means["contribution"].count[index].max()) == self.count]
        if not common:
            raise TraceError("these results have no group of sources in common; pass groups=, or read the same sources")
        has_images = len(self._image_counts) == self.count
        is_one_size = has_images and len(set(self._image_counts)) == 1
        return AverageContributions(
            model=self.first.model,
            revision=self.first.revision,
            queries=self.first.queries,
            reduction=self._reduction,
            groups=tuple(names[index] for index in common),
            count=self.count,
            contributions=means["contribution"][common],
            weights=means["weight"][common],
            share=self._share,
            image_tokens=self._mean("image tokens") if has_images else None,
            image_count=self._image_counts[0] if is_one_size else None,
            image_shares=self._mean("image shares") if is_one_size else None,
        )


def _line(label: str, mean: Mean) -> Line:
    low, high = mean.band()
    return Line(label=label, values=mean.mean, low=low, high=high)


def _frame(groups: Sequence[str], mean: Mean) -> "pd.DataFrame":
    """Return a table of a mean (group, layer)."""
    low, high = mean.band()
    axes = {"group": groups, "layer": range(mean.shape[-1])}
    return long_frame(axes, {"mean": mean.mean, "low": low, "high": high, "n": mean.count})
