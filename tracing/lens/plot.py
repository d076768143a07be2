"""The two pictures of the logit lens: curves of tokens over the layers, and a table of the likeliest tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ...artefacts.drawing.figure import GREY, INK, check_format, draw_bar, new_figure, wrap, write_figure, write_titles
from ..errors import TraceError

_WIDTH, _HEIGHT, _GAP, _ROW_GAP = 3.1, 1.9, 0.75, 0.75  # inches of a panel and between panels
_LEGEND = 2.9  # of the widest legend
_ANSWER, _FOIL = "#0072b2", "#d55e00"
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#7a4fbf")


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One token or role over the states."""

    label: str
    roles: tuple[str, ...]
    """Colour and dashes follow from these."""
    values: Tensor
    """(state,) float64: probability or share in [0, 1], or rank from 1."""
    low: Tensor | None = None
    """(state,): lower end of a band; None without one."""
    high: Tensor | None = None
    """(state,): upper end of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinePanel:
    """The curves of one quantity."""

    caption: str
    curves: tuple[Curve, ...]
    is_rank: bool = False
    """Drawn on a logarithmic axis with 1 on top."""


def draw_lines(
    path: str | Path, rows: Mapping[str, Sequence[LinePanel]], *, layers: Sequence[int], titles: tuple[str, str]
) -> Path:
    """The written picture: a row of panels per name, the same quantities beside each other, one legend at the right.

    TraceError for a suffix other than png, pdf or svg, or a place that cannot be written.
    """
    check_format(path)
    return write_figure(path, _draw(rows, layers, titles))


def _draw(rows: Mapping[str, Sequence[LinePanel]], layers: Sequence[int], titles: tuple[str, str]) -> Figure:
    """The figure with all rows of panels, and the legend."""
    columns = max(len(panels) for panels in rows.values())
    left, bottom = 0.7, 0.55
    longest = max(len(curve.label) for panels in rows.values() for panel in panels for curve in panel.curves)
    legend = min(_LEGEND, 0.4 + 0.07 * longest)
    total = left + columns * (_WIDTH + _GAP) + legend
    wrapped = [wrap(text, total, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.55 + 0.2 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + len(rows) * (_HEIGHT + _ROW_GAP) - _ROW_GAP + bottom
    figure = new_figure(total, height)
    write_titles(figure, wrapped, height)
    for row, (name, panels) in enumerate(rows.items()):
        base = height - top - _HEIGHT - row * (_HEIGHT + _ROW_GAP)
        for column, panel in enumerate(panels):
            start = left + column * (_WIDTH + _GAP)
            axes = figure.add_axes((start / total, base / height, _WIDTH / total, _HEIGHT / height))
            _fill(axes, panel, layers)
            if column == 0:
                axes.set_title(name, fontsize=9.5, color=INK, loc="left", pad=7)
            if row == len(rows) - 1:
                axes.set_xlabel("layer (E: embedding)", fontsize=8.5, color=INK)
    _write_legend(figure, axes, 1 - (legend + 0.5) / total, 1 - (top - 0.1) / height)
    return figure


def _fill(axes: Axes, panel: LinePanel, layers: Sequence[int]) -> None:
    """The curves of one panel, with bands where they have them."""
    marker = "o" if len(layers) <= 16 else ""
    for index, (curve, (colour, dashes)) in enumerate(zip(panel.curves, _styles(panel.curves), strict=True)):
        label = " " * curve.label.startswith("_") + wrap(curve.label, _LEGEND - 0.5, 0.07)  # "_" hides it from legends
        style = {"color": colour, "ls": dashes, "lw": 1.5, "marker": marker, "ms": 2.6}
        axes.plot(layers, curve.values, label=label, zorder=4 - index / len(panel.curves), **style)  # the answer on top
        if curve.low is not None and curve.high is not None:
            axes.fill_between(layers, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    if panel.is_rank:
        _scale_ranks(axes, panel.curves)
    else:
        highest = _largest(panel.curves) or 1.0
        axes.set_ylim(-0.04 * highest, 1.06 * highest)
    axes.set_ylabel(panel.caption, fontsize=8, color=INK)
    _dress(axes, layers)


def _scale_ranks(axes: Axes, curves: Sequence[Curve]) -> None:
    """Rank 1 on top, whole powers of ten named."""
    axes.set_yscale("log")
    axes.set_ylim(max(_largest(curves), 10) * 1.5, 0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()


def _largest(curves: Sequence[Curve]) -> float:
    """The largest value, ends of bands included."""
    parts = [part for curve in curves for part in (curve.values, curve.high) if part is not None]
    return float(torch.cat(parts).nan_to_num(0).max())


def _dress(axes: Axes, layers: Sequence[int]) -> None:
    """Quiet axes; the embedding is E, layers are whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(min(9, len(layers)), integer=True, steps=[1, 2, 4, 5, 10]))
    first = 0 if len(layers) <= 20 else 1  # where layers are narrow, a 0 would touch the E
    ticks = [tick for tick in axes.get_xticks() if first <= tick <= layers[-1]]
    axes.set_xticks([-1, *ticks], ["E", *(f"{tick:.0f}" for tick in ticks)])
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, labelsize=7.5, color="#a0a0a0", labelcolor=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color("#b0b0b0")


def _write_legend(figure: Figure, axes: Axes, left: float, top: float) -> None:
    """One legend for all panels, which hold the same curves."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(left, top), frameon=False, fontsize=8, handlelength=2.4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a token may hold dollar signs
        text.set_color(GREY)


def _styles(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """(colour, dashes): the answer blue, the false option orange, others in turn; a capitalised spelling is dashed."""
    others, styles = iter(_OTHERS * len(curves)), []
    for curve in curves:
        sides = ((_ANSWER, "answer"), (_FOIL, "false option"))
        kinds = [colour for colour, side in sides if any(role.startswith(side) for role in curve.roles)]
        only_capital = all(role.endswith("capitalised") for role in curve.roles)
        styles.append((kinds[0] if kinds else next(others), (0, (3, 1.5)) if only_capital else "-"))
    return styles


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


def draw_tokens(path: str | Path, table: TokenTable, *, titles: tuple[str, str]) -> Path:
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
    text = token_text(text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def token_text(text: str) -> str:
    """Return the text of a token for pictures: outer blanks removed, with a sign for line breaks and for a lone blank."""
    return text.replace("\n", "↵").strip() or "␣"
