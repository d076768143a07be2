"""Curves with bands, several panels side by side: changes, shares or accuracies by layer."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..errors import ArtefactError
from .figure import GREY, INK, check_format, new_figure, wrap, write_figure, write_titles

_BODY = 2.75  # inches of a panel's height at least
_LEFT, _BELOW, _GAP = 0.72, 0.58, 0.22  # inches for the y axis, for the x axis and between panels
_LEGEND_LINE, _LETTER, _HANDLE = 0.19, 0.068, 0.62  # inches: a legend's line, a letter, a line's sample
_LONGEST_LABEL = 34  # letters in a line of the legend


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How a curve is drawn; dashes and marker tell it apart in print without colours."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    """Matplotlib's line style."""
    marker: str = "o"
    """One of matplotlib's filled markers."""


DASHED, DOTTED, DASH_DOT = (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4))
CYCLE = (  # the colours that Okabe and Ito chose for colour-blind readers, without their yellow, which is pale on white
    LineStyle(colour="#0072B2", marker="o"),
    LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    LineStyle(colour="#CC79A7", marker="D"),
    LineStyle(colour="#D55E00", dashes=DASHED, marker="v"),
    LineStyle(colour="#56B4E9", dashes=DASH_DOT, marker="P"),
    LineStyle(colour="#222222", dashes=DOTTED, marker="X"),
)


def cycled(styles: Sequence[LineStyle], index: int) -> LineStyle:
    """The style with this index; after the last one the colours come again, each time with other dashes and markers."""
    turn, count = index // len(styles), len(styles)
    dashes, marker = styles[(index + turn) % count].dashes, styles[(index + 2 * turn) % count].marker
    return LineStyle(colour=styles[index % count].colour, dashes=dashes, marker=marker)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One line of a panel."""

    label: str
    """Its name in the legend; curves of the same name in several panels look the same and share one entry."""
    x: Tensor
    """(point,)"""
    y: Tensor
    """(point,); NaN leaves a gap."""
    low: Tensor | None = None
    """(point,) lower end of the band, NaN where there is none; None for a line without a band."""
    high: Tensor | None = None
    """(point,) upper end of the band."""
    style: LineStyle | None = None
    """None takes the next one of `CYCLE`, see `cycled`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePanel:
    """Curves over the same axis."""

    curves: Sequence[Curve]
    title: str = ""
    x_label: str = "layer"


def draw_curves(
    path: str | Path,
    panels: Sequence[CurvePanel],
    *,
    titles: tuple[str, str],
    y_label: str,
    reference: float | None = 0.0,
) -> Path:
    """The written picture: panels side by side over one y axis, the legend at the right; suffix png, pdf or svg.

    titles: title and subtitle; reference: the value of no effect, where a line is drawn, or None. The y axis holds
    every curve, and of bands at most as much again on either side: the rest of a very wide band is cut off at the edge.
    ArtefactError for nothing to draw, for another format or a place that cannot be written.
    """
    check_format(path)
    if not any(panel.curves for panel in panels):
        raise ArtefactError(f"no curves to draw into {str(path)!r}; pass panels with at least one")
    return write_figure(path, _draw(panels, titles, y_label, reference))


def _draw(panels: Sequence[CurvePanel], titles: tuple[str, str], y_label: str, reference: float | None) -> Figure:
    styles = _styles([curve for panel in panels for curve in panel.curves])
    names = [textwrap.fill(name, _LONGEST_LABEL) for name in styles]
    letters = max(len(line) for name in names for line in [*name.splitlines(), ""])
    legend = 0.25 + _HANDLE + _LETTER * letters if letters else 0.15
    panel_width = max(4.4 if len(panels) == 1 else 3.5, 0.085 * max(len(panel.title) for panel in panels))
    plots = panel_width * len(panels) + _GAP * (len(panels) - 1)
    width = _LEFT + plots + legend
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.098, 0.07), strict=True)]
    above = 0.26 + 0.19 * sum(text.count("\n") + 1 for text in wrapped) + 0.24 * any(panel.title for panel in panels)
    body = max(_BODY, _LEGEND_LINE * sum(name.count("\n") + 1 for name in names) + 0.1)
    height = above + body + _BELOW
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    limits = _limits([curve for panel in panels for curve in panel.curves], reference)
    for index, panel in enumerate(panels):
        left = _LEFT + index * (panel_width + _GAP)
        axes = figure.add_axes((left / width, _BELOW / height, panel_width / width, body / height))
        _fill(axes, panel, styles, reference)
        axes.set_ylim(limits)
        _label(axes, panel, y_label if index == 0 else None)
    if letters:
        samples = [sample_line(style) for style in styles.values()]
        corner = (_LEFT + plots + 0.1) / width, (_BELOW + body) / height
        write_legend(figure, dict(zip(names, samples, strict=True)), corner)
    return figure


def _styles(curves: Sequence[Curve]) -> dict[str, LineStyle]:
    """Per label in order of appearance: its style; labels without one take the cycle's in turn."""
    styles, taken = {}, 0
    for curve in curves:
        if curve.label not in styles:
            styles[curve.label] = curve.style or cycled(CYCLE, taken)
            taken += curve.style is None
    return styles


def _limits(curves: Sequence[Curve], reference: float | None) -> tuple[float, float]:
    """Lower and upper end of the y axis."""
    own = [value for curve in curves for value in _finite(curve.y)] + ([] if reference is None else [reference])
    bands = [value for curve in curves for end in (curve.low, curve.high) if end is not None for value in _finite(end)]
    bottom, top = (min(own), max(own)) if own else (0.0, 1.0)
    reach = (top - bottom) or 1.0  # a flat line stands in the middle
    bottom, top = max(bottom - reach, min([bottom, *bands])), min(top + reach, max([top, *bands]))
    margin = 0.06 * ((top - bottom) or 2.0)
    return bottom - margin, top + margin


def _finite(values: Tensor) -> list[float]:
    return values[values.isfinite()].tolist()


def _fill(axes: Axes, panel: CurvePanel, styles: Mapping[str, LineStyle], reference: float | None) -> None:
    """The reference, then all bands, then all lines, so that no band covers a line."""
    if reference is not None:
        axes.axhline(reference, color=GREY, linewidth=0.8, zorder=1)
    for curve in panel.curves:
        if curve.low is not None and curve.high is not None:
            band = [values.numpy() for values in (curve.x, curve.low, curve.high)]
            axes.fill_between(*band, color=styles[curve.label].colour, alpha=0.16, linewidth=0, zorder=2)
    for index, curve in enumerate(panel.curves):
        step = max(1, -(-len(curve.x) // 12))  # a dozen markers, at other points than the neighbours'
        line = sample_line(styles[curve.label], markevery=(index % step, step), zorder=3)
        line.set_data(curve.x.numpy(), curve.y.numpy())
        axes.add_line(line)
    axes.autoscale_view()


def sample_line(style: LineStyle, **more: object) -> Line2D:
    """A line of this style without points."""
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle=style.dashes,
        linewidth=1.6,
        marker=style.marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        **more,
    )


def _label(axes: Axes, panel: CurvePanel, y_label: str | None) -> None:
    """Axes in plain ink with a faint grid; the y axis has numbers in the first panel only."""
    axes.set_title(panel.title, fontsize=9.5, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(panel.x_label, fontsize=9, color=INK, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=2.5, labelsize=8.5, color="#a0a0a0", labelcolor=INK)
    if y_label is None:
        axes.tick_params(axis="y", length=0, labelleft=False)
    else:
        axes.set_ylabel(y_label, fontsize=9, color=INK, parse_math=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side not in ("top", "right"))
        spine.set_color("#a0a0a0")


def write_legend(figure: Figure, samples: Mapping[str, Line2D], corner: tuple[float, float]) -> None:
    """Writes a legend right of and below a corner, given in shares of the figure, outside the panels."""
    legend = figure.legend(
        list(samples.values()),
        list(samples),
        loc="upper left",
        bbox_to_anchor=corner,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.9,
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.55,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
