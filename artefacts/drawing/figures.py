"""Figures with title, subtitle and matplotlib's layout engine, and curves with bands, several panels side by side."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ..folders import ArtefactError, write_whole
from .styles import CYCLE, GREY, INK, LineStyle, cycled

_FORMATS = ("png", "pdf", "svg")
_TITLE, _SUBTITLE = 11, 8.5
_LETTERS = 0.0095  # width of a letter in inches per point of font size
_EDGE = {"w_pad": 0.06, "h_pad": 0.06}
_HEIGHT, _WIDTH = 2.75, 3.5  # smallest size of a panel in inches
_LEGEND_LINE, _LETTER, _HANDLE = 0.19, 0.068, 0.62  # inches: a line of the legend, a letter, a sample of a line
_LONGEST_LABEL = 34  # largest number of letters in a line of the legend


class NotebookFigure(Figure):
    """A matplotlib figure outside pyplot's global state that notebooks display."""

    def savefig(self, *arguments: Any, **keywords: Any) -> None:
        """Write the figure like matplotlib, but draw characters that the font lacks as boxes without a warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            super().savefig(*arguments, **{"facecolor": "white", **keywords})

    def _repr_png_(self) -> bytes:
        return _content(self, "png", 100)


def titled_figure(width: float, height: float, titles: tuple[str, str]) -> tuple[Figure, SubFigure]:
    """Return a figure with title and subtitle, and the part below them, in which panels are placed.

    Args:
        width: width of the figure in inches.
        height: height in inches of the part below title and subtitle.
        titles: title and subtitle, which are wrapped to the width and may contain line breaks.
    """
    title, subtitle = (
        wrap(text, width, _LETTERS * size) for text, size in zip(titles, (_TITLE, _SUBTITLE), strict=True)
    )
    lines = [text.count("\n") + 1 if text.strip() else 0 for text in (title, subtitle)]
    figure = NotebookFigure(figsize=(width, height + 0.2 + 0.2 * lines[0] + 0.165 * lines[1]), layout="constrained")
    FigureCanvasAgg(figure)
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(**_EDGE)
    place = {"x": 0.01, "ha": "left", "parse_math": False}
    figure.suptitle(title, fontsize=_TITLE, weight="bold", color=INK, **place)
    body = cast(SubFigure, figure.subfigures(1, 1))
    body.suptitle(subtitle, fontsize=_SUBTITLE, color=GREY, **place)
    return figure, body


def finished(figure: Figure, path: str | Path | None) -> Figure:
    """Return the figure, which is also written to a given path. Raises `ArtefactError` if it cannot be written."""
    if path is not None:
        write_whole(path, _content(figure, check_format(path), 160))
    return figure


def check_format(path: str | Path) -> str:
    """Return the format that the path's suffix names (png, pdf or svg). Raises `ArtefactError` for any other suffix."""
    suffix = Path(path).suffix
    if suffix.lower().lstrip(".") not in _FORMATS:
        raise ArtefactError(f"cannot draw into {str(path)!r}: no format {suffix!r}; end the name in .png, .pdf or .svg")
    return suffix.lower().lstrip(".")


def wrap(text: str, width: float, size: float) -> str:
    """Return the text with line breaks so that lines fit into `width` inches, at `size` inches per letter."""
    lines = text.splitlines() or [""]
    return "\n".join(textwrap.fill(line, max(30, int(width / size))) for line in lines)


def add_colour_bar(colours: ScalarMappable, axes: Axes | Sequence[Axes], unit: str, height: float) -> None:
    """Add a colour bar with the name of its unit at the right of these axes, aligned with their top.

    height: height of the axes in inches; the bar is at most 1.7 inches high.
    """
    first = axes if isinstance(axes, Axes) else axes[0]
    length = min(height, 1.7)
    bar = first.figure.colorbar(
        colours, ax=axes, shrink=length / height, anchor=(0.0, 1.0), aspect=length / 0.11, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, color="#a0a0a0", labelcolor=INK)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    caption = textwrap.fill(unit, max(24, int(length / (_LETTERS * 7.5))))
    bar.set_label(caption, fontsize=7.5, color=INK, labelpad=4, parse_math=False)


def add_legend(axes: Axes, samples: Mapping[str, Any]) -> None:
    """Add a legend of labels and their samples at the right of these axes, which should be the rightmost ones."""
    legend = axes.legend(
        list(samples.values()),
        list(samples),
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.9,
        borderpad=0,
        labelspacing=0.55,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def add_picture(axes: Axes, picture: Any, shape: tuple[int, int], layers: Sequence[Any] = ()) -> None:
    """Draw a picture (row, column, channel) and images over it, in units of patches of the given (rows, columns)."""
    height, width = picture.shape[:2]
    rows, columns = shape
    for image in (picture, *layers):
        place = {"extent": (0, columns, rows, 0), "aspect": columns * height / (rows * width)}
        axes.imshow(image, interpolation="nearest", **place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")


def dress(axes: Axes, *, title: str = "", x_label: str = "", y_label: str | None = "") -> None:
    """Give axes of curves or bars plain labels, small ticks, a faint grid and two borders.

    y_label: None for a panel that shares the y axis of its left neighbour.
    """
    axes.set_title(title, fontsize=9.5, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(x_label, fontsize=9, color=INK, parse_math=False)
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


def _content(figure: Figure, format_: str, dpi: int) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=format_, dpi=dpi, facecolor="white")
    return content.getvalue()


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
