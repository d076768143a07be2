"""The two figures of the logit lens: curves of tokens over the layers, and a table of the likeliest tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import GREY, INK
from ..errors import TraceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WIDTH, _HEIGHT = 3.7, 2.2  # size in inches of a panel of curves, labels included
_ANSWER, _FOIL = "#0072b2", "#d55e00"
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#7a4fbf")
_MOST_COLUMNS = 60
_CELL_WIDTH, _CELL_HEIGHT = 0.82, 0.25  # inches
_LETTERS = 11  # number of letters that fit into a cell
_FRAME = "#d55e00"

_Style = tuple[str, str | tuple[float, tuple[float, float]]]  # colour and dashes


@dataclass(frozen=True, kw_only=True, eq=False)
class LensCurve:
    """The curve of one token or role over the states."""

    label: str
    roles: tuple[str, ...]
    """The roles of the token, which decide its colour and dashes."""
    values: Tensor
    """(state,) float64: probability or share in [0, 1], or rank from 1."""
    low: Tensor | None = None
    """(state,): lower end of a band; None without a band."""
    high: Tensor | None = None
    """(state,): upper end of the band."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinePanel:
    """The curves of one quantity."""

    caption: str
    curves: tuple[LensCurve, ...]
    is_rank: bool = False
    """True if the values are ranks, which are drawn on a logarithmic axis with 1 on top."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """The cells of a table and their labels."""

    texts: tuple[tuple[str, ...], ...]
    """The token of each state and column."""
    probabilities: Tensor
    """(state, column) float64: the probability of each token."""
    framed: Tensor
    """(state, column) booleans: the cells with a frame."""
    states: tuple[str, ...]
    """The name of each state, the embedding first; drawn from the bottom up."""
    columns: tuple[tuple[str, str], ...]
    """The token at the position of each column, and its role."""


def lines_figure(
    rows: Mapping[str, Sequence[LinePanel]], *, layers: Sequence[int], titles: tuple[str, str]
) -> "Figure":
    """Return a figure with one row of panels per name, equal quantities below each other, and one legend.

    Args:
        rows: The panels of each row by the row's name.
        layers: The layer of each state; -1 is the embedding.
        titles: Title and subtitle of the figure.
    """
    columns = max(len(panels) for panels in rows.values())
    samples = {curve.label: _sample(style) for curve, style in _styled(next(iter(rows.values()))[0].curves)}
    legend = 0.7 + 0.066 * max(map(len, samples))
    figure, body = drawing.titled_figure(columns * _WIDTH + legend, len(rows) * _HEIGHT, titles)
    grid = body.subplots(len(rows), columns, squeeze=False, sharex=True)
    for row, (name, panels) in enumerate(rows.items()):
        for column, panel in enumerate(panels):
            axes, is_last = grid[row, column], row == len(rows) - 1
            titles_of = {"title": "" if column else name, "x_label": "layer (E: embedding)" if is_last else ""}
            drawing.dress(axes, y_label=panel.caption, **titles_of)
            _fill(axes, panel, layers)
    drawing.add_legend(grid[0, -1], samples)
    return figure


def tokens_figure(table: TokenTable, *, titles: tuple[str, str]) -> "Figure":
    """Return a figure with a table of tokens, coloured by their probability.

    Raises `TraceError` if there are no columns or more than 60.
    """
    count = len(table.columns)
    if not 1 <= count <= _MOST_COLUMNS:
        raise TraceError(f"cannot draw {count} positions in one table; pass positions= with 1 to {_MOST_COLUMNS}")
    height = _CELL_HEIGHT * len(table.states)
    figure, body = drawing.titled_figure(max(5.2, count * _CELL_WIDTH + 2.0), height + 0.7, titles)
    axes = body.subplots()
    colours = {"cmap": "Blues", "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.8}
    mesh = axes.pcolormesh(table.probabilities.numpy(), **colours)
    _write_cells(axes, table)
    _label(axes, table)
    drawing.add_colour_bar(mesh, axes, "probability", height)
    return figure


def _fill(axes: "Axes", panel: LinePanel, layers: Sequence[int]) -> None:
    """Draw the curves of one panel with their bands, if any; the answer is drawn on top."""
    from matplotlib.ticker import FuncFormatter

    marker = "o" if len(layers) <= 16 else ""
    for index, (curve, style) in enumerate(_styled(panel.curves)):
        line = _sample(style, marker=marker, zorder=4 - index / len(panel.curves))
        line.set_data(list(layers), curve.values.numpy())
        axes.add_line(line)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(layers, curve.low, curve.high, color=style[0], alpha=0.14, linewidth=0)
    if panel.is_rank:  # rank 1 on top, labels at whole powers of ten
        axes.set_yscale("log")
        axes.set_ylim(max(_largest(panel.curves), 10) * 1.5, 0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
    else:
        highest = _largest(panel.curves) or 1.0
        axes.set_ylim(-0.04 * highest, 1.06 * highest)
    _mark_layers(axes, layers)


def _mark_layers(axes: "Axes", layers: Sequence[int]) -> None:
    """Label the lower axis with layer numbers, and with E for the embedding."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(min(9, len(layers)), integer=True, steps=[1, 2, 4, 5, 10])
    first = 0 if len(layers) <= 20 else 1  # with many layers, a label 0 would touch the E
    ticks = [int(tick) for tick in locator.tick_values(layers[0], layers[-1]) if first <= tick <= layers[-1]]
    axes.set_xticks([-1, *ticks], ["E", *map(str, ticks)])
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)


def _largest(curves: Sequence[LensCurve]) -> float:
    """Return the largest value of all curves and bands."""
    parts = [part for curve in curves for part in (curve.values, curve.high) if part is not None]
    return float(torch.cat(parts).nan_to_num(0).max())


def _styled(curves: Sequence[LensCurve]) -> Iterator[tuple[LensCurve, _Style]]:
    """Yield each curve with its colour and dashes.

    The answer is blue, the false option is orange, and capitalised spellings are dashed.
    """
    others = iter(_OTHERS * len(curves))
    for curve in curves:
        sides = ((_ANSWER, "answer"), (_FOIL, "false option"))
        colours = [colour for colour, side in sides if any(role.startswith(side) for role in curve.roles)]
        only_capital = all(role.endswith("capitalised") for role in curve.roles)
        yield curve, (colours[0] if colours else next(others), (0, (3, 1.5)) if only_capital else "-")


def _sample(style: _Style, marker: str = "o", **more: object) -> "Line2D":
    """Return a line of this style without points."""
    from matplotlib.lines import Line2D

    colour, dashes = style
    return Line2D([], [], color=colour, linestyle=dashes, linewidth=1.5, marker=marker, markersize=2.6, **more)


def _write_cells(axes: "Axes", table: TokenTable) -> None:
    """Write the token into each cell, and draw the frames."""
    from matplotlib.patches import Rectangle

    for state, row in enumerate(table.texts):
        for column, text in enumerate(row):
            colour = "white" if table.probabilities[state, column] > 0.55 else INK
            place = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour}
            axes.text(column + 0.5, state + 0.5, _cut(text), parse_math=False, **place)
            if table.framed[state, column]:
                corner = (column + 0.03, state + 0.06)
                axes.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=_FRAME, linewidth=1.2))


def _label(axes: "Axes", table: TokenTable) -> None:
    """Write the states at the left, and the token and role of each position above."""
    axes.set_yticks([state + 0.5 for state in range(len(table.states))], table.states)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for column, (token, role) in enumerate(table.columns):
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "parse_math": False}
        above = (column + 0.5, len(table.states))
        axes.annotate(_cut(token), above, (0, 14), fontsize=8, weight="bold", color=INK, **place)
        axes.annotate(_cut(role, 13), above, (0, 4), fontsize=6.5, color=GREY, **place)


def _cut(text: str, letters: int = _LETTERS) -> str:
    """Return the text, shortened to fit into a cell."""
    text = token_text(text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def token_text(text: str) -> str:
    """Return the text of a token for figures: no outer blanks, and a sign for a line break and for a lone blank."""
    return text.replace("\n", "↵").strip() or "␣"
