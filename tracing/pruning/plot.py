"""The pictures of image token pruning: curves by the first pruned layer, and the patches that are kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from ...artefacts.drawing.curves import CYCLE, LineStyle, sample_line, write_legend
from ...artefacts.drawing.figure import INK, check_format, new_figure, wrap, write_figure, write_titles
from ...models import Prompt

_WIDTH, _UPPER, _LOWER = 4.6, 2.5, 0.85  # inches of both panels, and their heights
_LEFT, _BELOW, _GAP = 0.75, 0.55, 0.16  # inches for the y axis, for the x axis and between the panels
_LEGEND_HEAD, _LETTER = 0.7, 0.066  # inches of a sample in the legend with what is around it, and of a letter


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningLine:
    """One number of tokens that stay."""

    label: str
    values: Tensor
    """(layer,) in 0 to 1; NaN leaves a gap."""
    low: Tensor | None = None
    """(layer,) lower end of the band; None for a line without one."""
    high: Tensor | None = None
    saved: Tensor
    """(layer,) in 0 to 1: share of operations that are no longer done."""
    cliff: int | None = None
    """The layer to mark as the cliff."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What the lines lie between; NaN is not drawn."""

    baseline: float
    floor: float


def draw_pruning(
    path: str | Path,
    layers: Sequence[int],
    lines: Sequence[PruningLine],
    *,
    levels: Levels,
    titles: tuple[str, str],
    y_label: str,
) -> Path:
    """The written picture, two panels over one axis of layers; its suffix is png, pdf or svg.

    titles: title and subtitle. TraceError for another format or a place that cannot be written.
    """
    check_format(path)
    names = [f"{line.label}, cliff at layer {line.cliff}" if line.cliff is not None else line.label for line in lines]
    entries = list(zip(names, (CYCLE[number % len(CYCLE)] for number in range(len(lines))), strict=True))
    legend = _LEGEND_HEAD + _LETTER * max(map(len, [*names, "every image token (baseline)"]))
    width = _LEFT + _WIDTH + legend
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.098, 0.07), strict=True)]
    above = 0.34 + 0.19 * sum(text.count("\n") + 1 for text in wrapped)
    height = above + _UPPER + _GAP + _LOWER + _BELOW
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    place = _LEFT / width, _WIDTH / width
    lower = figure.add_axes((place[0], _BELOW / height, place[1], _LOWER / height))
    bottom = (_BELOW + _LOWER + _GAP) / height
    upper = figure.add_axes((place[0], bottom, place[1], _UPPER / height), sharex=lower)
    for line, (_, style) in zip(lines, entries, strict=True):
        _draw_line((upper, lower), layers, line, style)
    _draw_cliffs((upper, lower), {style.colour: line.cliff for line, (_, style) in zip(lines, entries, strict=True)})
    _draw_levels(upper, levels)
    _finish(upper, y_label)
    _finish(lower, "operations\nsaved")
    lower.set_xlabel("first layer without the dropped image tokens", fontsize=9, color=INK)
    upper.tick_params(axis="x", labelbottom=False)
    for axes, tops in ((upper, [1.0]), (lower, [0.0, *(float(line.saved.max()) for line in lines)])):
        axes.set_ylim(-0.03 * max(*tops, 0.1), 1.06 * max(*tops, 0.1))
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    write_legend(figure, _legend(entries, levels), ((_LEFT + _WIDTH + 0.12) / width, bottom + _UPPER / height))
    return write_figure(path, figure)


def _draw_line(panels: tuple[Axes, Axes], layers: Sequence[int], line: PruningLine, style: LineStyle) -> None:
    """Value with band above, saving below."""
    upper, lower = panels
    if line.low is not None and line.high is not None:
        upper.fill_between(
            list(layers), line.low.numpy(), line.high.numpy(), color=style.colour, alpha=0.16, linewidth=0, zorder=2
        )
    for axes, values in ((upper, line.values), (lower, line.saved)):
        sample = sample_line(style, markevery=max(1, -(-len(layers) // 16)), zorder=3)
        sample.set_data(list(layers), values.numpy())
        axes.add_line(sample)
        axes.update_datalim(list(zip(layers, values.nan_to_num(0.0).tolist(), strict=True)))
        axes.autoscale_view()


def _draw_cliffs(panels: tuple[Axes, Axes], cliffs: Mapping[str, int | None]) -> None:
    """Upright lines by colour; those at one layer take turns."""
    for colour, layer in cliffs.items():
        sharing = [each for each, other in cliffs.items() if other == layer]
        dashes = 2 * sharing.index(colour), (2, 2 * max(1, len(sharing) - 1))
        for axes in panels if layer is not None else ():
            axes.axvline(layer, color=colour, linestyle=dashes, linewidth=1.2, zorder=1)


_LEVELS = {
    "baseline": ("every image token (baseline)", {"linestyle": "-", "color": "#8a8a8a", "linewidth": 1.2}),
    "floor": ("no image token at all (floor)", {"linestyle": (0, (1, 1.5)), "color": "#8a8a8a", "linewidth": 1.4}),
}


def _draw_levels(axes: Axes, levels: Levels) -> None:
    for name, (_, look) in _LEVELS.items():
        axes.axhline(getattr(levels, name), zorder=1.5, **look)  # NaN draws nothing


def _finish(axes: Axes, y_label: str) -> None:
    """Axes in plain ink with a faint grid."""
    axes.set_ylabel(y_label, fontsize=9, color=INK, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=2.5, labelsize=8.5, color="#a0a0a0", labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side not in ("top", "right"))
        spine.set_color("#a0a0a0")


def _legend(entries: Sequence[tuple[str, LineStyle]], levels: Levels) -> dict[str, Line2D]:
    """A sample of every curve, and of the levels that are drawn."""
    shown = [(label, look) for name, (label, look) in _LEVELS.items() if not math.isnan(getattr(levels, name))]
    return {
        **{name: sample_line(style) for name, style in entries},
        **{label: Line2D([], [], **look) for label, look in shown},
    }


_SIDE, _SPACE = 2.0, 0.2  # inches of a picture and between pictures
_FADED = 0.16  # share of its contrast that a dropped patch keeps
_PAPER = 0.93  # what it fades into


def draw_kept(
    path: str | Path, prompt: Prompt, kept: Tensor, captions: Sequence[str], *, titles: tuple[str, str]
) -> Path:
    """The written picture: one panel per caption, one line of panels per picture of the prompt.

    kept (panel, image, row, column) booleans. TraceError for another format than png, pdf or svg, or a place that
    cannot be written.
    """
    check_format(path)
    pictures = prompt.seen_pictures()
    width = max(4.5, 0.25 + (_SIDE + _SPACE) * len(kept))
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.55 + 0.21 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + (_SIDE + _SPACE) * len(pictures)
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    for line, picture in enumerate(pictures):
        lower = height - top - _SIDE - (_SIDE + _SPACE) * line
        for index, (panel, caption) in enumerate(zip(kept, captions, strict=True)):
            start = 0.2 + (_SIDE + _SPACE) * index
            axes = figure.add_axes((start / width, lower / height, _SIDE / width, _SIDE / height))
            _draw_kept(axes, picture, panel[line])
            if line == 0:
                axes.set_title(caption, fontsize=9.5, color=INK, loc="left")
    return write_figure(path, figure)


def _draw_kept(axes: Axes, picture: Tensor, kept: Tensor) -> None:
    """One picture (row, column, channel), as it is where its patches (row, column) stay."""
    height, width = picture.shape[:2]
    rows, columns = kept.shape
    place = {"extent": (0, columns, rows, 0), "aspect": columns * height / (rows * width)}
    axes.imshow(picture.numpy(), interpolation="nearest", **place)
    veil = picture.new_full((rows, columns, 4), _PAPER)
    veil[..., 3] = (1 - _FADED) * (~kept).double()
    axes.imshow(veil.numpy(), interpolation="nearest", **place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#b8b8b8")
