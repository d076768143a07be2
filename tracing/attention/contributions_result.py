"""The attention contributions of one prompt as a value, and the figures of contributions and of their averages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK, name_of_model
from ...artefacts.results import Result, long_frame
from ...models import Prompt
from ..engine.cells import TraceError
from .image_tokens import check_prompt, over_grid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.0, 2.6  # size in inches of a panel, labels included
_COLOURS = {"contribution": "Reds", "weight": "Oranges"}
Quantity = Literal["contribution", "weight"]
"""The length of the contribution of a source's values, or only the attention weight."""
Reduction = Literal["max", "sum", "mean"]
"""The reduction of the tokens of a source group to one number."""
REDUCED: Mapping[str, str] = {"max": "largest token", "sum": "sum over tokens", "mean": "mean over tokens"}
NAMES: Mapping[str, str] = {"last": "the last token", "constraint": "the constraint", "image": "the picture"}
"""Readable names of groups; other groups keep their own names."""
UNITS: Mapping[Quantity, str] = {"contribution": "length of contribution", "weight": "attention weight"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A curve over the layers."""

    label: str
    values: Tensor
    """(layer,): the values of the curve."""
    low: Tensor | None = None
    """(layer,): lower end of the band, NaN where there is none; None for a curve without a band."""
    high: Tensor | None = None
    """(layer,): upper end of the band."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """Curves that share a unit."""

    unit: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMap:
    """A quantity by head and layer."""

    kind: str
    values: Tensor
    """(head, layer): the values of the map."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionContributions(Result):
    """The attention contributions of one prompt. `attention_contributions` returns it."""

    layout: ClassVar[str] = "multrace attention contributions 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    input_ids: tuple[int, ...]
    """Ids of the prompt's tokens."""
    groups: Mapping[str, tuple[int, ...]]
    """The prompt's token groups that are not empty, by name."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""
    queries: str | None
    """The token group of the queries; None if positions were given."""
    sources: str | None
    """The token group of the sources; None if positions were given."""
    query_positions: tuple[int, ...]
    """Token positions of the queries, in ascending order."""
    source_positions: tuple[int, ...]
    """Token positions of the sources, in ascending order."""
    contributions: Tensor
    """(layer, query, source), float32 or wider, in units of the residual stream: length of the sum over heads."""
    head_contributions: Tensor | None
    """(layer, head, query, source): length of each head's own contribution; None if they were not computed."""
    weights: Tensor
    """(layer, head, query, source): attention weights, which sum to one over all tokens of the prompt."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.contributions)

    @property
    def source_groups(self) -> tuple[str, ...]:
        """Names of the groups whose tokens are all among the sources, the requested group first, without "all"."""
        sources = set(self.source_positions)
        names = [name for name, places in self.groups.items() if name != "all" and set(places) <= sources]
        return tuple(sorted(names, key=lambda name: name != self.sources))

    def by_layer(
        self,
        group: str | None = None,
        *,
        into: str | None = None,
        of: Quantity = "contribution",
        reduction: Reduction = "max",
    ) -> Tensor:
        """Return the contribution (layer,) of a source group, averaged over queries.

        Attention weights are also averaged over heads.

        Args:
            group: A source group; None takes all sources.
            into: Only the queries of this group; None takes all queries.
            of: The contribution or the attention weight.
            reduction: How the tokens of the group are reduced to one number: "max", as in SAT-Probe for a constraint of
                several tokens (arXiv 2309.15098), "sum" or "mean".

        Raises:
            TraceError: If a group is not among the sources or queries.
        """
        values = self.contributions if _checked(of) == "contribution" else self.weights.mean(1)
        return self._reduced(values, group, into, reduction)

    def by_head(
        self,
        group: str | None = None,
        *,
        into: str | None = None,
        of: Quantity = "contribution",
        reduction: Reduction = "max",
    ) -> Tensor:
        """Return the contribution (layer, head) of a source group for each head, averaged over queries.

        Args:
            group: A source group, as for `by_layer`.
            into: A group of queries, as for `by_layer`.
            of: "contribution" or "weight".
            reduction: How the tokens of the group are reduced to one number, as for `by_layer`.

        Raises:
            TraceError: If the lengths per head were not computed, or if a group is not among the sources or queries.
        """
        values = self.head_contributions if _checked(of) == "contribution" else self.weights
        if values is None:
            raise TraceError("lengths per head were left out; read the prompt again with by_head=True, or ask by_layer")
        return self._reduced(values, group, into, reduction)

    def image_mass(self, of: Quantity = "contribution") -> Tensor:
        """Return the contribution (layer, image token) of each image token, averaged over queries.

        Raises `TraceError` unless all image tokens are among the sources.
        """
        values = self.contributions if _checked(of) == "contribution" else self.weights.mean(1)
        return values[..., self._source_columns("image")].mean(1)

    def image_map(self, layer: int, of: Quantity = "contribution") -> Tensor:
        """Return `image_mass` of a layer over the patches, (image, row, column).

        Raises `TraceError` if the patches form no grid.
        """
        return over_grid(self.image_mass(of)[self._layer(layer)], self.groups["image"], self.patches)

    def index_histogram(self, layer: int, bins: int = 16) -> Tensor:
        """Return the share (bin,) of the picture's contributions by index of the image token, summing to one.

        arXiv 2406.04236 found most of the mass at index 540 to 576 of 576, the last of 16 bins. Shares are NaN if
        there are no contributions.
        """
        return index_shares(self.image_mass()[self._layer(layer)], bins)

    def tokens_for(self, share: float = 0.8, *, layer: int) -> int:
        """Return the smallest number of image tokens that hold this share of the picture's contributions."""
        return int(tokens_for_share(self.image_mass()[self._layer(layer)], share))

    def to_dataframe(self, *, by_head: bool = False) -> "pd.DataFrame":
        """Return a table with one row per layer (and head), query and source: contribution and weight.

        Without `by_head`, the weight is the mean over heads. Raises `TraceError` if `by_head` is set and the
        lengths per head were not computed.
        """
        lengths = self.head_contributions if by_head else self.contributions
        if lengths is None:
            raise TraceError("lengths per head were left out; read the prompt again with by_head=True")
        heads = {"head": range(self.weights.shape[1])} if by_head else {}
        axes = {"layer": range(self.layers), **heads, "query": self.query_positions, "source": self.source_positions}
        weights = self.weights if by_head else self.weights.mean(1)
        frame = long_frame(axes, {"contribution": lengths, "weight": weights})
        for name in ("source", "query"):
            texts = [self.tokens[position] for position in frame[name]]
            frame.insert(list(frame.columns).index(name) + 1, f"{name}_token", texts)
        return frame

    def plot(
        self, path: str | Path | None = None, groups: Sequence[str] | None = None, *, reduction: Reduction = "max"
    ) -> "Figure":
        """Return a figure with contribution and weight by layer, and of the first group by head.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            groups: Source groups, one line each; by default the requested group, or if there is none, constraint, image
                and last token.
            reduction: How the tokens of a group are reduced to one number.

        Raises:
            TraceError: If the sources hold no whole group.
            ArtefactError: If the file cannot be written.
        """
        names = self._drawn(groups)
        charts = [
            Chart(
                unit=UNITS[of],
                lines=[Line(label=name, values=self.by_layer(name, of=of, reduction=reduction)) for name in names],
            )
            for of in UNITS
        ]
        kinds: Sequence[Quantity] = tuple(UNITS) if self.head_contributions is not None else ("weight",)
        maps = [HeadMap(kind=of, values=self.by_head(names[0], of=of, reduction=reduction).T) for of in kinds]
        what = f"{REDUCED[reduction]} of each group of sources; heads: from {name_of(names[0])}"
        titles = self.question, f"What attention contributes to {self._query_name}; {what}"
        return drawing.finished(layers_figure(charts, maps, titles=titles), path)

    def plot_histogram(
        self, path: str | Path | None = None, layers: Sequence[int] | None = None, bins: int = 16
    ) -> "Figure":
        """Return a figure with the `index_histogram` of some layers.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each; by default four from first to last.
            bins: Number of bins of the image tokens.

        Raises:
            TraceError: If layers are missing or unknown, or if image tokens are missing from the sources.
            ArtefactError: If the file cannot be written.
        """
        numbers, mass = self._some(layers), self.image_mass()
        captions = [f"layer {number}: {self.tokens_for(layer=number)} tokens hold 80%" for number in numbers]
        subtitle = f"Share of the picture's contributions to {self._query_name} by index of the image token"
        shares, titles = index_shares(mass[list(numbers)], bins), (self.question, subtitle)
        figure = shares_figure(shares, captions=captions, count=mass.shape[-1], titles=titles)
        return drawing.finished(figure, path)

    def overlay(
        self,
        prompt: Prompt,
        path: str | Path | None = None,
        layers: Sequence[int] | None = None,
        of: Quantity = "contribution",
    ) -> "Figure":
        """Return a figure with the contributions of image tokens over the picture as the model saw it.

        Args:
            prompt: The prompt that was read.
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each; by default those with at least a tenth of the largest value, at
                most four. The caption states how they were chosen.
            of: The contribution or the attention weight.

        Raises:
            TraceError: If the prompt is another one, or if the image tokens form no grid.
            ArtefactError: If the file cannot be written.
        """
        check_prompt(self, prompt)
        grid = over_grid(self.image_mass(of), self.groups["image"], self.patches)
        numbers = drawing.strongest(grid) if layers is None else self._some(layers)
        overlays = [drawing.Overlay(title=f"layer {number}", values=grid[number]) for number in numbers]
        style = {"kind": "attention", "scale": 0.0, "unit": of}
        rule = "" if layers is not None else f"\nshown: {drawing.choice_in_words(grid, numbers, quantity=UNITS[of])}"
        titles = self.question, f"From the picture to {self._query_name}: {UNITS[of]}{rule}"
        return drawing.finished(drawing.overlays_figure(prompt.seen_pictures(), overlays, titles=titles, **style), path)

    @property
    def _query_name(self) -> str:
        """The readable name of the queries."""
        count = len(self.query_positions)
        return name_of(self.queries) + (f" (mean over {count} tokens)" if count > 1 else "")

    def _reduced(self, values: Tensor, group: str | None, into: str | None, reduction: Reduction) -> Tensor:
        if reduction not in ("max", "sum", "mean"):
            raise TraceError(f"no reduction {reduction!r}; pass 'max', 'sum' or 'mean'")
        chosen = values if group is None else values[..., self._source_columns(group)]
        reduced = chosen.amax(-1) if reduction == "max" else getattr(chosen, reduction)(-1)
        if into is None:
            return reduced.mean(-1)
        rows = self._indices(into, self.query_positions, "queries")
        return reduced[..., rows].mean(-1)

    def _source_columns(self, group: str) -> list[int]:
        return self._indices(group, self.source_positions, "sources")

    def _indices(self, group: str, positions: tuple[int, ...], name: str) -> list[int]:
        """Return the indices of a group's tokens among the positions. Raises `TraceError` if any is missing."""
        index = {position: number for number, position in enumerate(positions)}
        places = self.groups.get(group, ())
        if not places or not set(places) <= set(index):
            whole = ", ".join(each for each, members in self.groups.items() if set(members) <= set(index))
            raise TraceError(
                f"the {name} do not hold all of a group {group!r}; they hold {whole or 'no whole group'}: "
                f"ask for one of these, or read the prompt again with other {name}"
            )
        return [index[position] for position in places]

    def _layer(self, layer: int) -> int:
        if not -self.layers <= layer < self.layers:
            raise TraceError(f"no layer {layer}; these contributions have layers 0 to {self.layers - 1}")
        return layer % self.layers

    def _some(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Return the layers counted from the start; by default four from first to last."""
        if layers is None:
            return tuple(dict.fromkeys(round(step * (self.layers - 1) / 3) for step in range(4)))
        if not layers:
            raise TraceError(f"no layers to draw; pass some of 0 to {self.layers - 1}")
        return tuple(self._layer(layer) for layer in layers)

    def _drawn(self, groups: Sequence[str] | None) -> tuple[str, ...]:
        if groups is not None:
            return tuple(groups)
        available = self.source_groups
        usual = [name for name in ("constraint", "image", "last") if name in available]
        names = (self.sources,) if self.sources in available else tuple(usual)
        if not names:
            raise TraceError("the sources hold no whole group of tokens to draw; pass groups= or read other sources")
        return names

    def _lines(self) -> tuple[str, str]:
        values = self.by_layer()
        layer = int(values.argmax())
        return (
            f"AttentionContributions of {name_of_model(self.model)}: {self.question!r}, "
            f"from {name_of(self.sources)} to {name_of(self.queries)}",
            f"longest contribution of a token {float(values[layer]):.3g}, in layer {layer} of {self.layers}",
        )

    def _problem(self) -> str | None:
        heads = self.weights.shape[1]
        sizes = len(self.query_positions), len(self.source_positions)
        whole = (self.layers, heads, *sizes)
        fits = [self.contributions.shape == (self.layers, *sizes), self.weights.shape == whole]
        fits += [self.head_contributions is None or self.head_contributions.shape == whole]
        fits += [len(self.tokens) == len(self.input_ids), min(sizes) > 0]
        return None if all(fits) else "its tensors are of other shapes than its layers, heads, queries and sources"


def index_shares(mass: Tensor, bins: int) -> Tensor:
    """Return the share (..., bin) of the mass (..., image token) in bins of equally many tokens, by index.

    The shares sum to one. For 576 tokens, each of 16 bins holds 36 tokens; if the tokens do not divide evenly, bins
    differ by one token. Shares are NaN where there is no mass. Raises `TraceError` if there are no bins or more bins
    than tokens.
    """
    count = mass.shape[-1]
    if not 1 <= bins <= count:
        raise TraceError(f"cannot put {count} image tokens into {bins} bins; pass a number from 1 to {count}")
    parts = [mass[..., start:stop].sum(-1) for start, stop in bin_edges(count, bins)]
    return torch.stack(parts, -1) / mass.sum(-1, keepdim=True)


def tokens_for_share(mass: Tensor, share: float) -> Tensor:
    """Return the smallest number (...,) int64 of image tokens that hold this share of the mass (..., image token).

    The number is 0 where there is no mass.

    Raises `TraceError` unless the share is above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise TraceError(f"no share {share} of the picture's mass; pass one above 0 and at most 1, such as 0.8")
    ordered = mass.double().sort(-1, descending=True).values
    target = share * ordered.sum(-1, keepdim=True)
    reached = ordered.cumsum(-1) >= target * (1 - 1e-12)  # a share of one is reached in spite of rounding
    first = torch.where(reached, torch.arange(1, mass.shape[-1] + 1), mass.shape[-1]).min(-1).values
    return torch.where(target[..., 0] > 0, first, 0)


def name_of(group: str | None) -> str:
    """Return the readable name of a group."""
    return NAMES.get(group, group) if group is not None else "some tokens"


def _checked(quantity: str) -> str:
    if quantity not in UNITS:
        raise TraceError(f"no quantity {quantity!r}; pass 'contribution' or 'weight'")
    return quantity


def layers_figure(charts: Sequence[Chart], maps: Sequence[HeadMap], *, titles: tuple[str, str]) -> "Figure":
    """Return a figure with charts side by side and heat maps of heads below them.

    Args:
        charts: The curves of each panel; the first panel has the legend.
        maps: The heat maps; an empty sequence draws the charts alone.
        titles: Title and subtitle of the figure.
    """
    across = max(len(charts), len(maps))
    heights = [_HEIGHT] + ([max(1.2, min(4.8, 0.16 * maps[0].values.shape[0])) + 0.5] if maps else [])
    figure, body = drawing.titled_figure(_WIDTH * across, sum(heights), titles)
    grid = body.subplots(len(heights), across, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, chart in enumerate(charts):
        _draw_chart(grid[0, index], chart, has_legend=index == 0)
    for index, head_map in enumerate(maps):
        _draw_heads(grid[1, index], head_map, heights[1] - 0.5)
    return figure


def shares_figure(
    shares: Tensor,
    *,
    captions: Sequence[str],
    count: int,
    titles: tuple[str, str],
    ends: tuple[Tensor, Tensor] | None = None,
) -> "Figure":
    """Return a figure with one panel of bars for each row of shares.

    A dashed line marks the share that every bin would hold if all tokens contributed equally.

    Args:
        shares: (row, bin), each row summing to one.
        captions: The caption above each panel.
        count: Number of image tokens, whose index is on the lower axis.
        titles: Title and subtitle of the figure.
        ends: Lower and upper ends (row, bin) of intervals; None draws no intervals.
    """
    from matplotlib.ticker import PercentFormatter

    across = min(2, len(shares))
    rows = -(-len(shares) // across)
    figure, body = drawing.titled_figure(_WIDTH * across, 2.1 * rows, titles)
    grid = body.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    edges = torch.tensor(bin_edges(count, shares.shape[1]))
    widths = (edges[:, 1] - edges[:, 0]) * 0.92
    for index, axes in enumerate(grid.flat):
        if index >= len(shares):
            axes.set_axis_off()
            continue
        row, error = shares[index], None
        if ends is not None:
            error = torch.stack([row - ends[0][index], ends[1][index] - row]).clamp(min=0).numpy()
        line = {"ecolor": INK, "elinewidth": 0.8}
        axes.bar(edges[:, 0], row.numpy(), widths.numpy(), align="edge", color="#c8553d", yerr=error, error_kw=line)
        axes.axhline(1 / shares.shape[1], color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(0, count)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        below = "index of the image token" if index >= len(shares) - across else ""
        drawing.dress(axes, title=captions[index], x_label=below, y_label="" if index % across else "share")
    tallest = float((shares if ends is None else ends[1]).nan_to_num(nan=0).max()) * 1.08
    grid[0, 0].set_ylim(0, tallest or 1.0)
    return figure


def bin_edges(count: int, bins: int) -> list[tuple[int, int]]:
    """Return the first index of each bin, and the index after its last one."""
    return [(count * index // bins, count * (index + 1) // bins) for index in range(bins)]


def _draw_chart(axes: "Axes", chart: Chart, *, has_legend: bool) -> None:
    """Draw the curves of a chart with their bands, in the colours of the cycle."""
    from matplotlib.ticker import MaxNLocator

    axes.set_axis_on()
    for style, line in zip(CYCLE, chart.lines, strict=False):
        layers = range(len(line.values))
        if line.low is not None and line.high is not None:
            axes.fill_between(layers, line.low.numpy(), line.high.numpy(), color=style.colour, alpha=0.18, linewidth=0)
        sample = drawing.sample_line(style, label=line.label)
        sample.set_data(list(layers), line.values.numpy())
        axes.add_line(sample)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    drawing.dress(axes, x_label="layer", y_label=chart.unit)
    if has_legend:
        for text in axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK).get_texts():
            text.set_parse_math(False)


def _draw_heads(axes: "Axes", head_map: HeadMap, height: float) -> None:
    """Draw a heat map with its colour bar; the height is in inches."""
    axes.set_axis_on()
    values, colours = head_map.values.numpy(), _COLOURS[head_map.kind]
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0, edgecolors="white", linewidth=0.3)
    axes.invert_yaxis()
    for axis, number in zip((axes.yaxis, axes.xaxis), values.shape, strict=True):
        places = range(0, number, 1 if number <= 12 else 4)
        axis.set_ticks([place + 0.5 for place in places], [str(place) for place in places])
    drawing.dress(axes, x_label="layer", y_label="head")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    drawing.add_colour_bar(mesh, axes, head_map.kind, height)
