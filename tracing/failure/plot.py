"""ROC curves beside the areas under them with their intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ...artefacts.drawing.curves import CYCLE
from ...artefacts.drawing.figure import INK, check_format, new_figure, wrap, write_figure, write_titles

_SIDE, _BARS, _LETTER = 2.9, 2.6, 0.075  # inches of the curves, of the intervals, and of a letter of a label
_POINTS = 501
"""Points of a mean curve."""


def draw_prediction(
    path: str | Path,
    names: Sequence[str],
    scores: Sequence[Tensor],
    is_right: Tensor,
    areas: Sequence[tuple[float, float, float]],
    *,
    titles: tuple[str, str],
) -> Path:
    """The written picture: ROC curves at the left, at the right each area with its interval in the curve's colour.

    names, scores (cut, record), areas (value, low, high): one per curve; is_right (record,) booleans. TraceError for
    another format than png, pdf or svg, or a place that cannot be written. Curves of several cuts are averaged.
    """
    check_format(path)
    labels = 0.35 + _LETTER * max(map(len, names))
    width = 0.75 + _SIDE + labels + _BARS + 0.75
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.5 + 0.21 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + _SIDE + 0.6
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    body = 0.6 / height, _SIDE / height
    curves = figure.add_axes((0.65 / width, body[0], _SIDE / width, body[1]))
    bars = figure.add_axes(((0.75 + _SIDE + labels) / width, body[0], _BARS / width, body[1]))
    _draw_curves(curves, scores, is_right)
    _draw_areas(bars, names, areas)
    for axes in (curves, bars):
        axes.tick_params(labelsize=8.5, length=2, color="#a0a0a0", labelcolor=INK)
        for side, spine in axes.spines.items():
            spine.set_color("#d0d0d0")
            spine.set_visible(side in ("left", "bottom"))
    return write_figure(path, figure)


def roc_curve(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of wrong and of right answers, each (point,), that score at least as much as each threshold; from zero.

    scores (cut, record): of several cuts the mean share of right answers at each share of wrong ones.
    """
    if len(scores) == 1:
        return _steps(scores[0], is_right)
    wrong = np.linspace(0, 1, _POINTS)
    right = np.mean([np.interp(wrong, *map(np.asarray, _steps(cut, is_right))) for cut in scores], 0)
    return torch.from_numpy(wrong), torch.from_numpy(right)


def _steps(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """The curve of one cut."""
    thresholds = scores.unique().flip(0)
    reached = scores[None] >= thresholds[:, None]
    shares = [(reached & members).sum(1) / members.sum() for members in (~is_right, is_right)]
    wrong, right = (torch.cat([torch.zeros(1), each]) for each in shares)
    return wrong, right


def _draw_curves(axes: Axes, scores: Sequence[Tensor], is_right: Tensor) -> None:
    axes.plot([0, 1], [0, 1], color="#a0a0a0", linewidth=0.8, linestyle=(0, (4, 3)))
    for number, values in enumerate(scores):
        style, (wrong, right) = CYCLE[number % len(CYCLE)], roc_curve(values, is_right)
        axes.plot(wrong.numpy(), right.numpy(), color=style.colour, linestyle=style.dashes, linewidth=1.6)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel("share of wrong answers above the threshold", fontsize=8.5, color=INK)
    axes.set_ylabel("share of right answers above it", fontsize=8.5, color=INK)


def _draw_areas(axes: Axes, names: Sequence[str], areas: Sequence[tuple[float, float, float]]) -> None:
    for number, (value, low, high) in enumerate(areas):
        style = CYCLE[number % len(CYCLE)]
        axes.barh(number, value, height=0.62, color=style.colour, alpha=0.35)
        axes.plot([low, high], [number, number], color=style.colour, linewidth=2)
        axes.plot([value], [number], color=style.colour, marker=style.marker, markersize=6, markeredgecolor="white")
        axes.text(1.03, number, f"{value:.2f}", fontsize=9, color=INK, va="center")
    axes.axvline(0.5, color="#a0a0a0", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("AUROC with its 95% interval", fontsize=8.5, color=INK)
