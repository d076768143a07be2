"""Values as colours: heat maps over (row, column) in ROME's style, and overlays on the picture that the model saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..folders import ArtefactError
from .figures import add_colour_bar, add_picture, titled_figure
from .styles import INK, SITE_NAMES, colours_of

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
    for row, column in torch.isfinite(panel.values).nonzero().tolist():
        value = float(panel.values[row, column])
        is_clear = panel.clear is None or bool(panel.clear[row, column])
        style = {"color": "white" if mesh.norm(value) > 0.6 else INK, "alpha": 1.0 if is_clear else 0.45}
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
    add_picture(axes, paled.numpy(), tuple(values.shape), [shades])
