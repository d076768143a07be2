"""The figure of a failure prediction: ROC curves beside the areas under them with their intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE, _BARS, _LETTER = 3.4, 2.8, 0.075  # inches: the curves, the intervals, a letter of a label
_POINTS = 501
"""Number of points of a mean curve."""
_CHANCE = {"color": "#a0a0a0", "linewidth": 0.8, "linestyle": (0, (4, 3))}


def prediction_figure(
    names: Sequence[str],
    scores: Sequence[Tensor],
    is_right: Tensor,
    areas: Sequence[tuple[float, float, float]],
    *,
    titles: tuple[str, str],
) -> "Figure":
    """Return a figure with ROC curves at the left, and with their areas and intervals in the same colours at the right.

    Args:
        names: The name of each curve.
        scores: (cut, record) scores of each curve; the curves of several cuts are averaged.
        is_right: (record,) booleans.
        areas: (value, low, high) of the area under each curve.
        titles: Title and subtitle of the figure.
    """
    bars = _BARS + _LETTER * max(map(len, names))
    figure, body = drawing.titled_figure(_SIDE + bars + 0.4, _SIDE, titles)
    left, right = body.subplots(1, 2, width_ratios=(_SIDE, bars))
    _draw_curves(left, scores, is_right)
    _draw_areas(right, names, areas)
    return figure


def roc_curve(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares (point,) of wrong and of right answers that score at least each threshold.

    Both shares start at zero. For scores (cut, record) of several cuts, the shares of right answers at each share of
    wrong ones are averaged.
    """
    if len(scores) == 1:
        return _steps(scores[0], is_right)
    wrong = np.linspace(0, 1, _POINTS)
    curves = [_steps(cut, is_right) for cut in scores]
    right = np.mean([np.interp(wrong, xs.numpy(), ys.numpy()) for xs, ys in curves], 0)
    return torch.from_numpy(wrong), torch.from_numpy(right)


def _steps(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ROC curve of one cut."""
    thresholds = scores.unique().flip(0)
    reached = scores[None] >= thresholds[:, None]
    shares = [(reached & members).sum(1) / members.sum() for members in (~is_right, is_right)]
    wrong, right = (torch.cat([torch.zeros(1), share]) for share in shares)
    return wrong, right


def _draw_curves(axes: "Axes", scores: Sequence[Tensor], is_right: Tensor) -> None:
    axes.plot([0, 1], [0, 1], **_CHANCE)
    for number, values in enumerate(scores):
        style, (wrong, right) = CYCLE[number % len(CYCLE)], roc_curve(values, is_right)
        axes.plot(wrong.numpy(), right.numpy(), color=style.colour, linestyle=style.dashes, linewidth=1.6)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    wrong, right = "share of wrong answers above the threshold", "share of right answers above it"
    drawing.dress(axes, x_label=wrong, y_label=right)


def _draw_areas(axes: "Axes", names: Sequence[str], areas: Sequence[tuple[float, float, float]]) -> None:
    for number, (value, low, high) in enumerate(areas):
        style = CYCLE[number % len(CYCLE)]
        axes.barh(number, value, height=0.62, color=style.colour, alpha=0.35)
        axes.plot([low, high], [number, number], color=style.colour, linewidth=2)
        axes.plot([value], [number], color=style.colour, marker=style.marker, markersize=6, markeredgecolor="white")
        axes.text(1.03, number, f"{value:.2f}", fontsize=9, color=INK, va="center")
    axes.axvline(0.5, **_CHANCE)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    drawing.dress(axes, x_label="AUROC with its 95% interval")
    axes.grid(visible=False)
