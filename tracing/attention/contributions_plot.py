"""Curves by layer with bands, heads as heat maps beside them, and shares by index of the image token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ...artefacts.drawing.curves import CYCLE
from ...artefacts.drawing.figure import INK, check_format, draw_bar, new_figure, wrap, write_figure, write_titles

_WIDTH, _HEIGHT = 3.3, 2.1  # inches of a panel
_LEFT, _GAP, _BELOW = 0.75, 0.85, 0.62  # inches for labels of an axis: left of the first panel, between, below
_STEP = 2.25  # inches from one line of bars to the next
_COLOURS = {"contribution": "Reds", "weight": "Oranges"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A curve over the layers."""

    label: str
    values: Tensor
    """(layer,)"""
    low: Tensor | None = None
    """(layer,) lower end of its band; None for no band."""
    high: Tensor | None = None
    """(layer,) upper end of its band."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """Curves that share a unit."""

    unit: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMap:
    """A quantity by head and layer."""

    kind: str
    unit: str
    values: Tensor
    """(head, layer)"""


def bin_edges(count: int, bins: int) -> list[tuple[int, int]]:
    """The first index of each bin, and the one after its last."""
    return [(count * index // bins, count * (index + 1) // bins) for index in range(bins)]


def draw_layers(path: str | Path, charts: Sequence[Chart], maps: Sequence[HeadMap], *, titles: tuple[str, str]) -> Path:
    """The written picture: charts side by side, heat maps of heads below them; suffix png, pdf or svg.

    titles: title and subtitle. TraceError for another format or a place that cannot be written.
    """
    check_format(path)
    across = max(len(charts), len(maps))
    rows = [_HEIGHT] + ([max(1.2, min(4.8, 0.16 * maps[0].values.shape[0]))] if maps else [])
    width = _LEFT + (_WIDTH + _GAP) * across
    figure, top, height = _framed(width, titles, sum(rows) + _BELOW * len(rows) + 0.15 * (len(rows) - 1))
    lower = height - top - rows[0]
    for index, chart in enumerate(charts):
        axes = _add(figure, (_LEFT + (_WIDTH + _GAP) * index, lower, _WIDTH, rows[0]))
        _draw_chart(axes, chart, has_legend=index == 0)
    lower = _BELOW
    for index, each in enumerate(maps):
        start = _LEFT + (_WIDTH + _GAP) * index
        bar = _add(figure, (start + _WIDTH + 0.1, lower + rows[-1] - min(rows[-1], 1.2), 0.1, min(rows[-1], 1.2)))
        _draw_heads(_add(figure, (start, lower, _WIDTH, rows[-1])), bar, each)
    return write_figure(path, figure)


def draw_shares(
    path: str | Path,
    shares: Tensor,
    *,
    captions: Sequence[str],
    count: int,
    titles: tuple[str, str],
    ends: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """The written picture: one panel of bars for each row of shares (row, bin), their captions above.

    count: number of image tokens, whose index is the lower axis; ends: lower and upper ends of intervals. A line marks
    the share that every bin would hold if all tokens brought the same.
    """
    check_format(path)
    across = min(2, len(shares))
    lines = -(-len(shares) // across)
    body = _STEP - 0.8
    figure, top, height = _framed(_LEFT + (_WIDTH + 0.5) * across, titles, _STEP * lines + 0.1)
    tallest = float((shares if ends is None else ends[1]).nan_to_num(nan=0).max()) * 1.08 or 1.0
    edges = np.array(bin_edges(count, shares.shape[1]))
    for index, (row, caption) in enumerate(zip(shares, captions, strict=True)):
        line, place = divmod(index, across)
        lower = height - top - body - _STEP * line
        axes = _add(figure, (_LEFT + (_WIDTH + 0.5) * place, lower, _WIDTH, body))
        error = None if ends is None else torch.stack([row - ends[0][index], ends[1][index] - row]).clamp(min=0).numpy()
        axes.bar(
            edges[:, 0], row.numpy(), (edges[:, 1] - edges[:, 0]) * 0.92, align="edge", color="#c8553d", yerr=error,
            error_kw={"ecolor": INK, "elinewidth": 0.8},
        )  # fmt: skip
        axes.axhline(1 / shares.shape[1], color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(0, count)
        axes.set_ylim(0, tallest)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        _dress(axes, "index of the image token" if index >= len(shares) - across else "", "share" if not place else "")
        axes.set_title(caption, fontsize=9.5, color=INK, loc="left", parse_math=False)
    return write_figure(path, figure)


def draw_band(axes: Axes, line: Line, number: int) -> None:
    """Draws a curve, its band and its points in the colour of this number."""
    style, layers = CYCLE[number % len(CYCLE)], range(len(line.values))
    if line.low is not None and line.high is not None:
        axes.fill_between(layers, line.low.numpy(), line.high.numpy(), color=style.colour, alpha=0.18, linewidth=0)
    axes.plot(
        layers, line.values.numpy(), color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=4,
        linewidth=1.5, label=line.label,
    )  # fmt: skip


def _framed(width: float, titles: tuple[str, str], body: float) -> tuple[Figure, float, float]:
    """A figure with its titles written, the inches that they take, and its height."""
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.62 + 0.21 * (sum(text.count("\n") + 1 for text in wrapped) - 1)
    height = top + body
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    return figure, top, height


def _add(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes at a place given in inches: left, lower, width, height."""
    width, height = figure.get_size_inches()
    return figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))


def _draw_chart(axes: Axes, chart: Chart, *, has_legend: bool) -> None:
    for number, line in enumerate(chart.lines):
        draw_band(axes, line, number)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _dress(axes, "layer", chart.unit)
    if has_legend:
        legend = axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_heads(axes: Axes, bar: Axes, heads: HeadMap) -> None:
    mesh = axes.pcolormesh(heads.values.numpy(), cmap=_COLOURS[heads.kind], vmin=0, edgecolors="white", linewidth=0.3)
    axes.invert_yaxis()
    count, layers = heads.values.shape
    for axis, number in ((axes.xaxis, layers), (axes.yaxis, count)):
        shown = range(0, number, 1 if number <= 12 else 4)
        axis.set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
    _dress(axes, "layer", "head")
    axes.tick_params(length=0)
    draw_bar(bar, mesh, heads.kind)


def _dress(axes: Axes, below: str, left: str) -> None:
    """Labels, small ticks and pale borders."""
    axes.set_xlabel(below, fontsize=8.5, color=INK)
    axes.set_ylabel(left, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, length=2, color="#a0a0a0", labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_color("#d0d0d0")
        spine.set_visible(side in ("left", "bottom"))
