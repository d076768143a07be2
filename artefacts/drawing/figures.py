"""Figures with title, subtitle and matplotlib's layout engine: curves with bands, heat maps, and overlays on pictures.

Heat maps over (row, column) are in ROME's style; overlays lie on the picture that the model saw.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ..folders import ArtefactError, write_whole
from .styles import CYCLE, GREY, INK, SITE_NAMES, LineStyle, colours_of, cycled

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
            settings: dict[str, Any] = {"facecolor": "white", **keywords}
            super().savefig(*arguments, **settings)

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
        _fill_curves(axes, panel, styles, reference)
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


def _fill_curves(axes: Axes, panel: CurvePanel, styles: Mapping[str, LineStyle], reference: float | None) -> None:
    """Draw the reference, then all bands, then all lines, so that no band covers a line."""
    if reference is not None:
        axes.axhline(reference, color=GREY, linewidth=0.8, zorder=1)
    for curve in panel.curves:
        if curve.low is not None and curve.high is not None:
            x, low, high = (values.numpy() for values in (curve.x, curve.low, curve.high))
            axes.fill_between(x, low, high, color=styles[curve.label].colour, alpha=0.16, linewidth=0, zorder=2)
    for index, curve in enumerate(panel.curves):
        step = max(1, -(-len(curve.x) // 12))  # a dozen markers, not at the points of the neighbours' markers
        line = sample_line(styles[curve.label], markevery=(index % step, step), zorder=3)
        line.set_data(curve.x.numpy(), curve.y.numpy())
        axes.add_line(line)
    axes.autoscale_view()


def sample_line(style: LineStyle, **more: Any) -> Line2D:
    """Return a line of this style without points, for use in a legend."""
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle=cast(Any, style.dashes),  # the stub lists the names of dashes one by one
        linewidth=1.6,
        marker=style.marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        **more,
    )


_ROW_HEIGHT, _LABEL_WIDTH = 0.24, 0.078  # inches per row, and per character of a row label
_TALLEST = 60  # largest height of all rows in inches, so that files with a row per patch can still be opened
_BAR = 0.95  # width of a colour bar with its labels in inches
_SIDE, _SPACE = 2.2, 0.2  # inches: side of a picture, space between pictures
_BRIGHTNESS = (0.299, 0.587, 0.114)  # perceived brightness of red, green and blue
FLOOR = 0.001
"""The darkest colour of an overlay is at least this share of the total effect; few patches have more."""
_VISIBLE = 0.1  # share of the largest effect below which a layer looks empty


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One heat map: a kind of site and its values."""

    kind: str
    """Kind of site, which decides colours and title."""
    window: int
    """Number of layers that each cell restores together."""
    values: Tensor
    """(row, column) in the unit of the colour bar; NaN is drawn grey."""
    low: float
    """The value without effect, which is drawn white."""
    scale: float
    """Total effect; colours span at least a tenth of it, so that tiny effects do not look large."""
    verb: str = "restored"
    """The intervention on the layers: "restored" or "corrupted"."""
    numbers: bool = False
    """True if values are written into the cells if there is room."""
    clear: Tensor | None = None
    """(row, column) bool: numbers are pale where it is False; None makes no number pale."""
    estimated: Tensor | None = None
    """(row, column) bool: cells are hatched where it is True, because the value is an estimate."""

    @property
    def high(self) -> float:
        """The largest value, or a little more than `low` if all are tiny."""
        largest = float(self.values.nan_to_num(nan=self.low).max())
        return max(largest, self.low + 0.1 * abs(self.scale), self.low + 1e-9)

    @property
    def has_windows(self) -> bool:
        """True if several layers were restored together in each cell."""
        return self.window > 1 and self.kind not in ("hidden", "projector")


def show_numbers(panels: Sequence[Panel]) -> bool:
    """Return whether all these panels request numbers in their cells and have room for them."""
    return all(panel.numbers and panel.values.shape[0] <= 12 and panel.values.shape[1] <= 16 for panel in panels)


def heat_maps(
    panels: Sequence[Panel],
    *,
    rows: Sequence[str],
    stars: Sequence[bool],
    titles: tuple[str, str],
    unit: str,
) -> Figure:
    """Return a figure with panels side by side, over one scale; panels may have different numbers of columns.

    The darkest colour of every panel stands for the largest value of all of them, so that shades can be compared
    between panels.

    Args:
        panels: one heat map each.
        rows: label of each row, the same in all panels.
        stars: whether each row belongs to the constraint.
        titles: title and subtitle of the figure.
        unit: caption of the colour bars.
    """
    labels = [_label(row, star) for row, star in zip(rows, stars, strict=True)]
    numbers = show_numbers(panels)
    widths = [_width(panel, numbers) for panel in panels]
    row_height = 0.34 if numbers else min(_ROW_HEIGHT, _TALLEST / len(labels))
    height = max(1.1, row_height * len(labels))
    total = 0.3 + _LABEL_WIDTH * max(map(len, labels)) + sum(widths) + _BAR * len(widths)
    figure, body = titled_figure(total, height + 0.75, titles)
    every = body.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    ends = min(panel.low for panel in panels), max(panel.high for panel in panels)
    for index, (axes, panel) in enumerate(zip(every, panels, strict=True)):
        add_colour_bar(_fill(axes, panel, ends), axes, unit, height)
        _label_axes(axes, panel, labels if index == 0 else None)
        if numbers:
            _write_numbers(axes, panel)
    return figure


def _width(panel: Panel, numbers: bool) -> float:
    """Return the width in inches of a panel's map, wide enough for the title above it."""
    columns = panel.values.shape[1]
    cell = 0.46 if numbers else min(0.32, max(0.12, 3.2 / columns))
    return max(1.0 if columns == 1 else 2.2, cell * columns)


def _fill(axes: Axes, panel: Panel, ends: tuple[float, float]) -> QuadMesh:
    """Draw and return the coloured cells; ends: values of the lightest and darkest colour. Estimates are hatched."""
    axes.set_facecolor("#e4e4e4")
    colours = {"cmap": colours_of(panel.kind), "vmin": ends[0], "vmax": ends[1]}
    mesh = axes.pcolormesh(panel.values.numpy(), edgecolors="white", linewidth=0.4, **colours)
    axes.invert_yaxis()
    for row, column in [] if panel.estimated is None else panel.estimated.nonzero().tolist():
        hatch = Rectangle((column, row), 1, 1, fill=False, hatch="//", edgecolor="#00000055", linewidth=0)
        axes.add_patch(hatch)
    return mesh


def _label_axes(axes: Axes, panel: Panel, labels: Sequence[str] | None) -> None:
    """Write layers below the panel, row labels at the left of the first panel, and the intervention above the panel."""
    count, columns = panel.values.shape
    shown = range(0, columns, 1 if columns <= 12 else 5)
    axes.set_xticks([column + 0.5 for column in shown], [str(column) for column in shown])
    axes.set_yticks([row + 0.5 for row in range(count)], labels or [""] * count)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a token may contain dollar signs
        label.set_fontweight("bold" if label.get_text().endswith("*") else "normal")
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.tick_params(axis="y", labelsize=min(8, 58 * _TALLEST / count))
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    name = SITE_NAMES.get(panel.kind, panel.kind)
    caption = f"centre of interval of {panel.window} {panel.verb} layers" if panel.has_windows else ""
    tower = "vision " if panel.kind == "vision" else ""
    caption = caption or (f"single {panel.verb} {tower}layer" if columns > 1 else panel.verb)
    axes.set_xlabel(caption, fontsize=8.5, color=INK)
    has_estimates = panel.estimated is not None and bool(panel.estimated.any())
    title = f"{name} (hatched: estimated)" if has_estimates else name
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")


def _write_numbers(axes: Axes, panel: Panel) -> None:
    """Write the value of each cell with two digits (three if all are small), pale where it is not clear of zero."""
    mesh, digits = axes.collections[0], 2 if float(panel.values.nan_to_num(nan=-1).max()) >= 0.1 else 3
    norm: Any = mesh.norm  # which takes numbers as well as the arrays that its annotation names
    for row, column in torch.isfinite(panel.values).nonzero().tolist():
        value = float(panel.values[row, column])
        is_clear = panel.clear is None or bool(panel.clear[row, column])
        style = {
            "color": "white" if norm(value) > 0.6 else INK,
            "alpha": 1.0 if is_clear else 0.45,
        }
        text = f"{round(value, digits) + 0.0:.{digits}f}".replace("0.", ".", 1)  # + 0.0 turns -0.0 into 0.0
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, **style)


def _label(row: str, star: bool) -> str:
    """Return the label of a row, with a sign for a lone blank and a star for the constraint."""
    text = row.replace("\n", "↵").strip() or "␣"
    return f"{text}*" if star else text


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """Values over the patches of every picture."""

    title: str
    values: Tensor
    """(image, row, column): values over patches; NaN where nothing was traced."""


def over_patches(
    effects: Tensor, row_positions: Sequence[tuple[int, ...]], patches: Sequence[tuple[int, int, int, int]]
) -> Tensor:
    """Return the effect (column, image, patch row, patch column) of each patch, NaN where no row covers it.

    A row is used if all its positions are patches and it is not the whole picture. Where rows overlap, the smallest row
    is used.

    Args:
        effects: (row, column) effects of a map.
        row_positions: token positions of each row.
        patches: (position, row, column, image) of each image token.

    Raises:
        ArtefactError: if no row can be used.
    """
    places = {position: (image, row, column) for position, row, column, image in patches}
    parts = [
        index
        for index, positions in enumerate(row_positions)
        if set(positions) <= set(places) and len(positions) < len(places)
    ]
    if not parts:
        raise ArtefactError(
            "no row of this trace is a part of the picture; trace again with positions such as 'patches', Blocks(3), "
            "'image_rows' or Box(left, top, right, bottom)"
        )
    sizes = [max(place[axis] for place in places.values()) + 1 for axis in range(3)]
    grid = torch.full((effects.shape[1], *sizes), torch.nan, dtype=effects.dtype)
    for index in sorted(parts, key=lambda index: -len(row_positions[index])):
        for position in row_positions[index]:
            grid[(slice(None), *places[position])] = effects[index]
    return grid


def strongest(grid: Tensor, count: int = 4, *, least: float = 0.0) -> tuple[int, ...]:
    """Return the indices of at most `count` layers that are not empty: those with the largest effects, ascending.

    A layer counts if its largest effect is above `least` and at least a tenth of the largest one in the grid. If no
    layer counts, the layer with the largest effect is returned.
    """
    peaks = _peaks(grid)
    visible = int(_is_visible(peaks, least).sum())
    return tuple(sorted(peaks.topk(min(count, max(1, visible))).indices.tolist()))


def choice_in_words(grid: Tensor, layers: Sequence[int], *, least: float = 0.0, quantity: str = "effect") -> str:
    """Return the rule by which `strongest` chose these layers, as a clause for a caption."""
    visible, count = int(_is_visible(_peaks(grid), least).sum()), len(layers)
    if not visible:
        return f"the layer with the largest {quantity}, which is too small to be seen"
    if visible > count:
        return f"the {count} of {len(grid)} layers with the largest {quantity}"
    shown = "layer" if count == 1 else f"{count} layers"
    return f"the {shown} of {len(grid)} with at least a tenth of the largest {quantity}"


def _peaks(grid: Tensor) -> Tensor:
    """Return (layer,): the largest value of each layer."""
    return grid.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1).amax(1)


def _is_visible(peaks: Tensor, least: float) -> Tensor:
    """Return (layer,) bool: whether the largest value of a layer can be seen beside those of the others."""
    return (peaks > least) & (peaks >= _VISIBLE * peaks.max())


def overlays_figure(
    pictures: Sequence[Tensor],
    overlays: Sequence[Overlay],
    *,
    kind: str,
    titles: tuple[str, str],
    scale: float,
    unit: str = "indirect effect",
) -> Figure:
    """Return a figure with one column per overlay and one line of panels per picture.

    Stronger effects are darker; patches without an effect, or with a negative one, show the bare picture.

    Args:
        pictures: (row, column, channel) of each picture, in 0 to 1; see `Prompt.seen_pictures`.
        overlays: values over the patches of all pictures.
        kind: kind of site, which decides the colours.
        titles: title and subtitle of the figure.
        scale: the total effect; colours span at least a thousandth of it.
        unit: caption of the colour bar.
    """
    largest = float(torch.stack([each.values for each in overlays]).nan_to_num(nan=0).max())
    high = max(largest, FLOOR * abs(scale), 1e-9)
    colours = ScalarMappable(Normalize(0, high), colours_of(kind))
    tallest = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    width, height = max(3.4, (_SIDE + _SPACE) * len(overlays) + 0.8), (_SIDE * tallest + _SPACE) * len(pictures)
    figure, body = titled_figure(width, height + 0.25, titles)
    every = body.subplots(len(pictures), len(overlays), squeeze=False)
    for line, picture in enumerate(pictures):
        for axes, overlay in zip(every[line], overlays, strict=True):
            _draw(axes, picture, overlay.values[line], colours)
            if line == 0:
                axes.set_title(overlay.title, fontsize=9.5, color=INK, loc="left")
    add_colour_bar(colours, list(every.flat), unit, height)
    return figure


def _draw(axes: Axes, picture: Tensor, values: Tensor, colours: ScalarMappable) -> None:
    """Draw a pale, nearly grey picture with coloured patches; stronger effects have stronger colours."""
    shades = colours.to_rgba(values.nan_to_num(nan=0).numpy())
    shades[..., 3] = 0.85 * colours.norm(values.nan_to_num(nan=0).clamp(min=0).numpy())
    grey = picture @ picture.new_tensor(_BRIGHTNESS)
    paled = 0.4 + 0.6 * (0.25 * picture + 0.75 * grey[..., None])
    rows, columns = values.shape
    add_picture(axes, paled.numpy(), (rows, columns), [shades])
