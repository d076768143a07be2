"""Heat maps over (row, layer) in ROME's style: rows from the top, the constraint starred, a colour per kind of site."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from .errors import TraceError
from .storage import write_atomically

_COLOURS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
_NAMES = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
_FORMATS = ("png", "pdf", "svg")
_INK, _GREY = "#222222", "#555555"
_ROW_HEIGHT, _LABEL_WIDTH = 0.24, 0.078  # inches per row, and per character of a row's label


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One heat map: a kind of site and its values."""

    kind: str
    window: int
    values: Tensor
    """(row, layer)"""
    low: float
    """The value without effect, which is drawn white."""
    scale: float
    """Total effect; colours span a tenth of it at least, so that nothing looks like something."""
    numbers: bool = False
    """Write the values into the cells where there is room."""
    clear: Tensor | None = None
    """(row, layer) booleans: False prints the number pale."""


def heat_maps(
    path: str | Path,
    panels: Sequence[Panel],
    *,
    rows: Sequence[str],
    stars: Sequence[bool],
    title: str,
    subtitle: str,
    unit: str,
) -> Path:
    """The written picture with the panels side by side; its suffix names the format (png, pdf or svg).

    unit: caption of the colour bars. TraceError for another format or a place that cannot be written.
    """
    path = Path(path)
    kind_of_file = path.suffix.lower().lstrip(".")
    if kind_of_file not in _FORMATS:
        raise TraceError(
            f"cannot draw into {str(path)!r}: no format {path.suffix!r}; end the name in .png, .pdf or .svg"
        )
    figure = _draw(panels, [_label(row, star) for row, star in zip(rows, stars, strict=True)], (title, subtitle), unit)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token outside the font is drawn as a box
        figure.savefig(content, format=kind_of_file, dpi=160, facecolor="white")
    return write_atomically(path, content.getvalue())


def _draw(panels: Sequence[Panel], labels: Sequence[str], titles: tuple[str, str], unit: str) -> Figure:
    """The figure, without any of matplotlib's global state."""
    count, layers = panels[0].values.shape
    numbers = panels[0].numbers and count <= 12 and layers <= 16
    cell = 0.46 if numbers else min(0.32, max(0.12, 3.2 / layers))
    width = max(2.2, cell * layers)
    left = 0.3 + _LABEL_WIDTH * max(map(len, labels))
    total = left + sum(width + 1.15 for _ in panels)
    wrapped = [
        textwrap.fill(text, max(30, int(total / size))) for text, size in zip(titles, (0.105, 0.078), strict=True)
    ]
    lines = sum(text.count("\n") + 1 for text in wrapped)
    body = max(1.1, (0.34 if numbers else _ROW_HEIGHT) * count)
    top, bottom = 0.5 + 0.21 * lines, 0.6
    height = top + body + bottom
    figure = Figure(figsize=(total, height))
    FigureCanvasAgg(figure)
    _write_titles(figure, wrapped, height)
    for index, panel in enumerate(panels):
        start = left + index * (width + 1.15)
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


def _write_titles(figure: Figure, titles: Sequence[str], height: float) -> None:
    """Title and subtitle from the top left corner."""
    title, subtitle = titles
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=11, weight="bold", color=_INK, va="top", parse_math=False)
    below = 0.16 + 0.2 * (title.count("\n") + 1)
    figure.text(0.012, 1 - below / height, subtitle, fontsize=8.5, color=_GREY, va="top", parse_math=False)


def _fill(axes: Axes, bar: Axes, panel: Panel, unit: str) -> None:
    """The coloured cells and their colour bar."""
    high = max(float(panel.values.max()), panel.low + 0.1 * abs(panel.scale), panel.low + 1e-9)
    mesh = axes.pcolormesh(
        panel.values.numpy(), cmap=_COLOURS[panel.kind], vmin=panel.low, vmax=high, edgecolors="white", linewidth=0.4
    )
    axes.invert_yaxis()
    colours = axes.figure.colorbar(mesh, cax=bar)
    colours.outline.set_visible(False)
    bar.tick_params(labelsize=7, length=2, color="#a0a0a0", labelcolor=_INK)
    bar.yaxis.set_major_locator(MaxNLocator(4))
    bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.set_title(unit, fontsize=7.5, color=_INK, pad=5, parse_math=False)


def _label_axes(axes: Axes, panel: Panel, labels: Sequence[str] | None) -> None:
    """Layers below, rows at the left of the first panel, what was restored above."""
    count, layers = panel.values.shape
    step = 1 if layers <= 12 else 5
    axes.set_xticks([layer + 0.5 for layer in range(0, layers, step)], [str(layer) for layer in range(0, layers, step)])
    axes.set_yticks([row + 0.5 for row in range(count)], labels or [""] * count)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a token may hold dollar signs
        label.set_weight("bold" if label.get_text().endswith("*") else "normal")
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK)
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    windowed = panel.kind != "hidden" and panel.window > 1
    axes.set_xlabel(
        f"centre of {panel.window} restored layers" if windowed else "restored layer", fontsize=8.5, color=_INK
    )
    axes.set_title(_NAMES[panel.kind], fontsize=9.5, color=_INK, loc="left")


def _write_numbers(axes: Axes, panel: Panel) -> None:
    """Each cell's value in two digits (three where all are small), pale where it is not clear of zero."""
    mesh, digits = axes.collections[0], 2 if float(panel.values.max()) >= 0.1 else 3
    for row, values in enumerate(panel.values.tolist()):
        for layer, value in enumerate(values):
            is_clear = panel.clear is None or bool(panel.clear[row, layer])
            style = {"color": "white" if mesh.norm(value) > 0.6 else _INK, "alpha": 1.0 if is_clear else 0.45}
            text = f"{round(value, digits) + 0.0:.{digits}f}".replace("0.", ".", 1)  # + 0.0 turns -0.0 into 0.0
            axes.text(layer + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, **style)


def _label(row: str, star: bool) -> str:
    """A row's label, with a sign where it is only a blank, starred if it is part of the constraint."""
    text = row.replace("\n", "↵").strip() or "␣"
    return f"{text}*" if star else text
