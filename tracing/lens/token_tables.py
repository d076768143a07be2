"""Tables of the likeliest token per layer and position, as logit-lens pictures show them."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ...artefacts.drawing.figure import GREY, INK, check_format, draw_bar, new_figure, wrap, write_figure, write_titles
from ..errors import TraceError
from .followed import shown

_MOST_COLUMNS = 60
_CELL_WIDTH, _CELL_HEIGHT = 0.82, 0.25  # inches
_LETTERS = 11  # that fit into a cell
_FRAME = "#d55e00"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """The cells of a table, and what stands beside them."""

    texts: tuple[tuple[str, ...], ...]
    """Per state and column, the token."""
    probabilities: Tensor
    """(state, column) float64"""
    framed: Tensor
    """(state, column) booleans"""
    states: tuple[str, ...]
    """What each state is called, the embedding first; drawn from the bottom up."""
    columns: tuple[tuple[str, str], ...]
    """Per column the position's own token and its role."""


def token_table(path: str | Path, table: TokenTable, *, titles: tuple[str, str]) -> Path:
    """The written picture; its suffix names the format (png, pdf or svg).

    TraceError for no or too many columns, another format, or a place that cannot be written.
    """
    check_format(path)
    count = len(table.columns)
    if not 1 <= count <= _MOST_COLUMNS:
        raise TraceError(f"cannot draw {count} positions in one table; pass positions= with 1 to {_MOST_COLUMNS}")
    left, bottom, right = 0.95, 0.2, 1.15
    width = left + count * _CELL_WIDTH + right
    total = max(width, 5.2)
    wrapped = [wrap(text, total, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    body = _CELL_HEIGHT * len(table.states)
    top = 0.68 + 0.2 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + body + bottom
    figure = new_figure(total, height)
    write_titles(figure, wrapped, height)
    axes = figure.add_axes((left / total, bottom / height, (width - left - right) / total, body / height))
    mesh = axes.pcolormesh(table.probabilities.numpy(), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    _write_cells(axes, table)
    _label(axes, table)
    reach = min(body - 0.3, 1.5)
    place = ((width - right + 0.3) / total, (bottom + body - 0.3 - reach) / height, 0.11 / total, reach / height)
    draw_bar(figure.add_axes(place), mesh, "probability")
    return write_figure(path, figure)


def _write_cells(axes: Axes, table: TokenTable) -> None:
    """Each cell's token, and frames."""
    for state, row in enumerate(table.texts):
        for column, text in enumerate(row):
            colour = "white" if table.probabilities[state, column] > 0.55 else INK
            place = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour}
            axes.text(column + 0.5, state + 0.5, _cut(text), parse_math=False, **place)
            if table.framed[state, column]:
                corner = (column + 0.03, state + 0.06)
                axes.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=_FRAME, linewidth=1.2))


def _label(axes: Axes, table: TokenTable) -> None:
    """States at the left; the positions' own tokens above, with their roles."""
    axes.set_yticks([state + 0.5 for state in range(len(table.states))], table.states)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for column, (token, role) in enumerate(table.columns):
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "parse_math": False}
        above = (column + 0.5, len(table.states))
        axes.annotate(_cut(token), above, (0, 16), fontsize=8, weight="bold", color=INK, **place)
        axes.annotate(_cut(role, 13), above, (0, 5), fontsize=6.5, color=GREY, **place)


def _cut(text: str, letters: int = _LETTERS) -> str:
    """The text as a cell can show it."""
    text = shown(text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
