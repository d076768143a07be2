"""Curves with bands, several panels side by side: changes, shares or accuracies by layer."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..folders import ArtefactError
from .figure import add_legend, dress, titled_figure
from .styles import CYCLE, GREY, LineStyle, cycled

_HEIGHT, _WIDTH = 2.75, 3.5  # smallest size of a panel in inches
_LEGEND_LINE, _LETTER, _HANDLE = 0.19, 0.068, 0.62  # inches: a line of the legend, a letter, a sample of a line
_LONGEST_LABEL = 34  # largest number of letters in a line of the legend


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One line of a panel."""

    label: str
    """Name in the legend; curves with the same name in several panels look the same and share one entry."""
    x: Tensor
    """(point,): positions along the x axis."""
    y: Tensor
    """(point,): values; NaN leaves a gap."""
    low: Tensor | None = None
    """(point,): lower end of the band, NaN where there is none; None for a line without a band."""
    high: Tensor | None = None
    """(point,): upper end of the band."""
    style: LineStyle | None = None
    """Style of the line; None takes the next style of `CYCLE` (see `cycled`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePanel:
    """Curves over the same axis."""

    curves: Sequence[Curve]
    title: str = ""
    x_label: str = "layer"


def curves_figure(
    panels: Sequence[CurvePanel],
    *,
    titles: tuple[str, str],
    y_label: str,
    reference: float | None = 0.0,
) -> Figure:
    """Return a figure with the panels side by side over one y axis, and one legend at the right.

    The y axis shows every curve in full. Bands may extend it by at most the range of the curves on either side; the
    rest of a very wide band is cut off at the edge.

    Args:
        panels: curves, which share one x axis within each panel.
        titles: title and subtitle of the figure.
        y_label: quantity on the y axis, with its unit.
        reference: the value without effect, at which a line is drawn; None draws no line.

    Raises:
        ArtefactError: if there is no curve.
    """
    curves = [curve for panel in panels for curve in panel.curves]
    if not curves:
        raise ArtefactError("no curves to draw; pass panels with at least one curve")
    styles = _styles(curves)
    names = {textwrap.fill(name, _LONGEST_LABEL): sample_line(style) for name, style in styles.items() if name}
    legend = 0.25 + _HANDLE + _LETTER * max((len(line) for name in names for line in name.splitlines()), default=0)
    width = max(4.4 if len(panels) == 1 else _WIDTH, 0.085 * max(len(panel.title) for panel in panels))
    height = max(_HEIGHT, _LEGEND_LINE * sum(name.count("\n") + 1 for name in names) + 0.1)
    figure, body = titled_figure(0.72 + width * len(panels) + legend, height + 0.75, titles)
    every = body.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for index, (axes, panel) in enumerate(zip(every, panels, strict=True)):
        _fill(axes, panel, styles, reference)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        dress(axes, title=panel.title, x_label=panel.x_label, y_label=None if index else y_label)
    every[0].set_ylim(_limits(curves, reference))
    if names:
        add_legend(every[-1], names)
    return figure


def _styles(curves: Sequence[Curve]) -> dict[str, LineStyle]:
    """Return the style of each label in order of appearance; labels without a style take the next one of the cycle."""
    styles, taken = {}, 0
    for curve in curves:
        if curve.label not in styles:
            styles[curve.label] = curve.style or cycled(CYCLE, taken)
            taken += curve.style is None
    return styles


def _limits(curves: Sequence[Curve], reference: float | None) -> tuple[float, float]:
    """Return the lower and upper end of the y axis."""
    own = [value for curve in curves for value in _finite(curve.y)] + ([] if reference is None else [reference])
    bands = [value for curve in curves for end in (curve.low, curve.high) if end is not None for value in _finite(end)]
    bottom, top = (min(own), max(own)) if own else (0.0, 1.0)
    reach = (top - bottom) or 1.0  # a flat line is centred
    bottom, top = max(bottom - reach, min([bottom, *bands])), min(top + reach, max([top, *bands]))
    margin = 0.06 * ((top - bottom) or 2.0)
    return bottom - margin, top + margin


def _finite(values: Tensor) -> list[float]:
    return values[values.isfinite()].tolist()


def _fill(axes: Axes, panel: CurvePanel, styles: Mapping[str, LineStyle], reference: float | None) -> None:
    """Draw the reference, then all bands, then all lines, so that no band covers a line."""
    if reference is not None:
        axes.axhline(reference, color=GREY, linewidth=0.8, zorder=1)
    for curve in panel.curves:
        if curve.low is not None and curve.high is not None:
            band = [values.numpy() for values in (curve.x, curve.low, curve.high)]
            axes.fill_between(*band, color=styles[curve.label].colour, alpha=0.16, linewidth=0, zorder=2)
    for index, curve in enumerate(panel.curves):
        step = max(1, -(-len(curve.x) // 12))  # a dozen markers, not at the points of the neighbours' markers
        line = sample_line(styles[curve.label], markevery=(index % step, step), zorder=3)
        line.set_data(curve.x.numpy(), curve.y.numpy())
        axes.add_line(line)
    axes.autoscale_view()


def sample_line(style: LineStyle, **more: object) -> Line2D:
    """Return a line of this style without points, for use in a legend."""
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
