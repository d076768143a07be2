"""The figures of attention contributions: curves and heads by layer, and shares by index of the image token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.0, 2.6  # size in inches of a panel, labels included
_COLOURS = {"contribution": "Reds", "weight": "Oranges"}


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
