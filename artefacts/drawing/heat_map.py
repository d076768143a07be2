"""Heat maps over (row, column) in ROME's style: rows from the top, the constraint starred, a colour per kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .figure import INK, check_format, colours_of, draw_bar, new_figure, wrap, write_figure, write_titles

SITE_NAMES = {"hidden": "hidden state", "mlp": "MLP"}
"""What people call a kind of site, where that is not its own name."""

_ROW_HEIGHT, _LABEL_WIDTH = 0.24, 0.078  # inches per row, and per character of a row's label
_TALLEST = 60  # inches of all rows together: every patch of a large picture still makes a file that can be opened
_GAP = 1.15  # inches between panels, for a colour bar


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One heat map: a kind of site and its values."""

    kind: str
    window: int
    values: Tensor
    """(row, column); NaN is left grey."""
    low: float
    """The value without effect, which is drawn white."""
    scale: float
    """Total effect; colours span a tenth of it at least, so that nothing looks like something."""
    verb: str = "restored"
    """What was done to the layers."""
    numbers: bool = False
    """Write the values into the cells where there is room."""
    clear: Tensor | None = None
    """(row, column) booleans: False prints the number pale."""
    estimated: Tensor | None = None
    """(row, column) booleans: True hatches the cell, whose value is an estimate."""

    @property
    def high(self) -> float:
        """The value that is drawn darkest."""
        largest = float(self.values.nan_to_num(nan=self.low).max())
        return max(largest, self.low + 0.1 * abs(self.scale), self.low + 1e-9)

    @property
    def has_windows(self) -> bool:
        """Several layers were restored together in each cell."""
        return self.window > 1 and self.kind not in ("hidden", "projector")


def show_numbers(panels: Sequence[Panel]) -> bool:
    """Whether there is room for numbers in the cells of all these panels, and they are asked for."""
    return all(panel.numbers and panel.values.shape[0] <= 12 and panel.values.shape[1] <= 16 for panel in panels)


def heat_maps(
    path: str | Path,
    panels: Sequence[Panel],
    *,
    rows: Sequence[str],
    stars: Sequence[bool],
    titles: tuple[str, str],
    unit: str,
) -> Path:
    """The written picture with the panels side by side; its suffix names the format (png, pdf or svg).

    titles: title and subtitle; unit: caption of the colour bars. TraceError for another format or a place that cannot
    be written.
    """
    check_format(path)
    labels = [_label(row, star) for row, star in zip(rows, stars, strict=True)]
    return write_figure(path, _draw(panels, labels, titles, unit))


def _draw(panels: Sequence[Panel], labels: Sequence[str], titles: tuple[str, str], unit: str) -> Figure:
    """The figure with all panels, which may have different numbers of columns."""
    numbers = show_numbers(panels)
    widths = [_width(panel, numbers) for panel in panels]
    left = 0.3 + _LABEL_WIDTH * max(map(len, labels))
    total = left + sum(widths) + _GAP * len(widths)
    wrapped = [wrap(text, total, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    lines = sum(text.count("\n") + 1 for text in wrapped)
    row_height = 0.34 if numbers else min(_ROW_HEIGHT, _TALLEST / len(labels))
    body = max(1.1, row_height * len(labels))
    top, bottom = 0.5 + 0.21 * lines, 0.6
    height = top + body + bottom
    figure = new_figure(total, height)
    write_titles(figure, wrapped, height)
    for index, (panel, width) in enumerate(zip(panels, widths, strict=True)):
        start = left + sum(widths[:index]) + _GAP * index
        axes = figure.add_axes((start / total, bottom / height, width / total, body / height))
        reach = min(body, 1.7)
        bar = figure.add_axes(
            ((start + width + 0.12) / total, (bottom + body - reach) / height, 0.11 / total, reach / height)
        )
        _fill(axes, bar, panel, unit)
        _label_axes(axes, panel, labels if index == 0 else None)
        if numbers:
            _write_numbers(axes, panel)
    return figure


def _width(panel: Panel, numbers: bool) -> float:
    """Inches of a panel's map; its title has to fit above it."""
    columns = panel.values.shape[1]
    cell = 0.46 if numbers else min(0.32, max(0.12, 3.2 / columns))
    return max(1.0 if columns == 1 else 2.2, cell * columns)


def _fill(axes: Axes, bar: Axes, panel: Panel, unit: str) -> None:
    """The coloured cells, hatched where estimated, and their colour bar."""
    axes.set_facecolor("#e4e4e4")
    colours = colours_of(panel.kind)
    mesh = axes.pcolormesh(
        panel.values.numpy(), cmap=colours, vmin=panel.low, vmax=panel.high, edgecolors="white", linewidth=0.4
    )
    axes.invert_yaxis()
    for row, column in [] if panel.estimated is None else panel.estimated.nonzero().tolist():
        hatch = Rectangle((column, row), 1, 1, fill=False, hatch="//", edgecolor="#00000055", linewidth=0)
        axes.add_patch(hatch)
    draw_bar(bar, mesh, unit)


def _label_axes(axes: Axes, panel: Panel, labels: Sequence[str] | None) -> None:
    """Layers below, rows at the left of the first panel, what was restored above."""
    count, columns = panel.values.shape
    shown = range(0, columns, 1 if columns <= 12 else 5)
    axes.set_xticks([column + 0.5 for column in shown], [str(column) for column in shown])
    axes.set_yticks([row + 0.5 for row in range(count)], labels or [""] * count)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a token may hold dollar signs
        label.set_weight("bold" if label.get_text().endswith("*") else "normal")
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
    """Each cell's value in two digits (three where all are small), pale where it is not clear of zero."""
    mesh, digits = axes.collections[0], 2 if float(panel.values.nan_to_num(nan=-1).max()) >= 0.1 else 3
    for row, column in torch.isfinite(panel.values).nonzero().tolist():
        value = float(panel.values[row, column])
        is_clear = panel.clear is None or bool(panel.clear[row, column])
        style = {"color": "white" if mesh.norm(value) > 0.6 else INK, "alpha": 1.0 if is_clear else 0.45}
        text = f"{round(value, digits) + 0.0:.{digits}f}".replace("0.", ".", 1)  # + 0.0 turns -0.0 into 0.0
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, **style)


def _label(row: str, star: bool) -> str:
    """A row's label, with a sign where it is only a blank, starred if it is part of the constraint."""
    text = row.replace("\n", "↵").strip() or "␣"
    return f"{text}*" if star else text
