"""The figures of image token pruning: curves by the first pruned layer, and the patches that are kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK, LineStyle
from ...models import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _UPPER, _LOWER = 5.3, 2.7, 1.3  # width of both panels and height of each, in inches
_LEGEND_HEAD, _LETTER = 0.7, 0.066  # inches: a sample in the legend with its margins, a letter
_SIDE = 2.2  # size in inches of a picture with its margins
_FADED = 0.16  # share of the contrast that a dropped patch keeps
_PAPER = 0.93  # brightness towards which dropped patches fade
_LEVELS = {
    "baseline": ("every image token (baseline)", {"linestyle": "-", "color": "#8a8a8a", "linewidth": 1.2}),
    "floor": ("no image token at all (floor)", {"linestyle": (0, (1, 1.5)), "color": "#8a8a8a", "linewidth": 1.4}),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningLine:
    """The curve of one number of kept tokens."""

    label: str
    values: Tensor
    """(layer,): accuracy or probability in 0 to 1; NaN leaves a gap."""
    low: Tensor | None = None
    """(layer,): lower end of the band; None for a line without a band."""
    high: Tensor | None = None
    """(layer,): upper end of the band."""
    saved: Tensor
    """(layer,): share of operations that are saved, in 0 to 1."""
    cliff: int | None = None
    """The layer to mark as the cliff."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Baseline and floor of the lines; NaN is not drawn."""

    baseline: float
    floor: float


def pruning_figure(
    layers: Sequence[int], lines: Sequence[PruningLine], *, levels: Levels, titles: tuple[str, str], y_label: str
) -> "Figure":
    """Return a figure with two panels over one axis of layers: the values, and below them the operations saved.

    Args:
        layers: The first pruned layers.
        lines: One curve per number of kept tokens.
        levels: Baseline and floor.
        titles: Title and subtitle of the figure.
        y_label: Label of the upper panel's y axis.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = [f"{line.label}, cliff at layer {line.cliff}" if line.cliff is not None else line.label for line in lines]
    styles = [CYCLE[number % len(CYCLE)] for number in range(len(lines))]
    samples = {name: drawing.sample_line(style) for name, style in zip(names, styles, strict=True)}
    drawn = [_LEVELS[name] for name in _LEVELS if not math.isnan(getattr(levels, name))]
    samples |= {label: Line2D([], [], **look) for label, look in drawn}
    legend = _LEGEND_HEAD + _LETTER * max(map(len, samples))
    figure, body = drawing.titled_figure(_WIDTH + legend, _UPPER + _LOWER, titles)
    upper, lower = body.subplots(2, 1, sharex=True, height_ratios=(_UPPER, _LOWER))
    for line, style in zip(lines, styles, strict=True):
        _draw_line((upper, lower), layers, line, style)
    cliffs = {style.colour: line.cliff for line, style in zip(lines, styles, strict=True)}
    _draw_cliffs((upper, lower), cliffs)
    for name, (_, look) in _LEVELS.items():
        upper.axhline(getattr(levels, name), zorder=1.5, **look)  # NaN draws nothing
    drawing.dress(upper, y_label=y_label)
    drawing.dress(lower, x_label="first layer without the dropped image tokens", y_label="operations\nsaved")
    lower.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    most_saved = max([0.1, *(float(line.saved.max()) for line in lines)])
    for axes, top in ((upper, 1.0), (lower, most_saved)):
        axes.set_ylim(-0.03 * top, 1.06 * top)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    drawing.add_legend(upper, samples)
    return figure


def kept_figure(prompt: Prompt, kept: Tensor, captions: Sequence[str], *, titles: tuple[str, str]) -> "Figure":
    """Return a figure with the kept patches in the picture as the model saw it; all others are faded.

    Args:
        prompt: The prompt with the pictures; each picture has one line of panels.
        kept: (panel, image, row, column) booleans.
        captions: The caption above each panel.
        titles: Title and subtitle of the figure.
    """
    pictures = prompt.seen_pictures()
    width, height = max(4.5, _SIDE * len(kept) + 0.2), _SIDE * len(pictures) + 0.25
    figure, body = drawing.titled_figure(width, height, titles)
    grid = body.subplots(len(pictures), len(kept), squeeze=False)
    for line, picture in enumerate(pictures):
        for axes, panel, caption in zip(grid[line], kept, captions, strict=True):
            rows, columns = panel[line].shape
            veil = picture.new_full((rows, columns, 4), _PAPER)
            veil[..., 3] = (1 - _FADED) * (~panel[line]).double()
            drawing.add_picture(axes, picture.numpy(), (rows, columns), [veil.numpy()])
            if line == 0:
                axes.set_title(caption, fontsize=9.5, color=INK, loc="left")
    return figure


def _draw_line(panels: "tuple[Axes, Axes]", layers: Sequence[int], line: PruningLine, style: LineStyle) -> None:
    """Draw the values with their band in the upper panel, and the saving in the lower panel."""
    upper, lower = panels
    if line.low is not None and line.high is not None:
        band = {"color": style.colour, "alpha": 0.16, "linewidth": 0, "zorder": 2}
        upper.fill_between(list(layers), line.low.numpy(), line.high.numpy(), **band)
    for axes, values in ((upper, line.values), (lower, line.saved)):
        sample = drawing.sample_line(style, markevery=max(1, -(-len(layers) // 16)), zorder=3)
        sample.set_data(list(layers), values.numpy())
        axes.add_line(sample)
        axes.update_datalim(list(zip(layers, values.nan_to_num(0.0).tolist(), strict=True)))
        axes.autoscale_view()


def _draw_cliffs(panels: "tuple[Axes, Axes]", cliffs: Mapping[str, int | None]) -> None:
    """Draw cliffs as vertical lines by colour; the dashes of cliffs at the same layer alternate."""
    for colour, layer in cliffs.items():
        sharing = [name for name, other in cliffs.items() if other == layer]
        dashes = 2 * sharing.index(colour), (2, 2 * max(1, len(sharing) - 1))
        for axes in panels if layer is not None else ():
            axes.axvline(layer, color=colour, linestyle=dashes, linewidth=1.2, zorder=1)
