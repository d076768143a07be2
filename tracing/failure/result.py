"""The result of a failure prediction, how well scores separate right answers from wrong ones, and its figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK, name_of_model
from ...artefacts.results import Result, long_frame, stacked_frame
from ...artefacts.statistics import LEVEL
from ..errors import TraceError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: Mapping[str, str] = {
    "contribution": "contribution of the constraint",
    "weight": "attention to the constraint",
    "answer probability": "probability of the first token",
    "whole-answer probability": "probability of the whole answer",
    "combination": "these combined (L1)",
    "all heads": "all layers and heads (L1)",
}
"""Names of the scores in figures and summaries."""
_SIDE, _BARS, _LETTER = 3.4, 2.8, 0.075  # inches: the curves, the intervals, a letter of a label
_POINTS = 501
"""Number of points of a mean curve."""
_CHANCE = {"color": "#a0a0a0", "linewidth": 0.8, "linestyle": (0, (4, 3))}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FailurePrediction(Result):
    """The separation of right answers from wrong ones by several scores. `predict_failure` returns it.

    The area under the ROC curve (AUROC) is the share of pairs of a right and a wrong answer in which the right answer
    scores higher: 0.5 is chance, and below 0.5 wrong answers score higher.
    """

    layout: ClassVar[str] = "multrace failure prediction 2"

    model: str
    """Name or path of the model."""
    is_right: Tensor
    """(record,) booleans: whether each answer is right."""
    scores: Mapping[str, Tensor]
    """Scores (cut, record) float64 by name; larger scores predict right answers. Scores without choice or fit have one
    cut. All others have one per cut of the records into folds, where models never score their training records."""
    areas: Tensor
    """(score,) float64: AUROC of each score, mean over its cuts, in the order of `scores`."""
    draws: Tensor
    """(score, draw) float64: AUROC of each score in bootstrap samples, which are the same for all scores."""
    layers: tuple[int, ...] | None
    """The layers whose mean was used; None if they were chosen in each training fold."""
    layer_counts: Mapping[str, Tensor]
    """Number (layer,) int64 of fits that used each layer, by quantity."""
    feature_counts: Mapping[str, Tensor]
    """Number (fit,) int64 of features with a nonzero weight, by L1 model."""
    folds: int
    repeats: int
    """Number of cuts of the records into folds."""
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(self.scores)

    def auroc(self, name: str) -> float:
        """Return the share of pairs in which this score ranks the right answer above the wrong one; ties count half."""
        return float(self.areas[self._index(name)])

    def interval(self, name: str) -> tuple[float, float]:
        """Return (low, high) of the 95 % bootstrap interval of the AUROC over records; models are not fitted again."""
        low, high = _ends(self.draws[self._index(name)])
        return float(low), float(high)

    def difference(self, first: str, second: str) -> tuple[float, float, float]:
        """Return (value, low, high): the AUROC of the first minus that of the second, and its 95 % interval.

        Both scores use the same bootstrap samples.
        """
        one, other = self._index(first), self._index(second)
        low, high = _ends(self.draws[one] - self.draws[other])
        return float(self.areas[one] - self.areas[other]), float(low), float(high)

    def auroc_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score: its AUROC, and low and high of the interval."""
        low, high = _ends(self.draws)
        return long_frame({"score": self.names}, {"auroc": self.areas, "low": low, "high": high})

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score, cut and record: its value, and whether the answer is right."""
        frames = {}
        for name, values in self.scores.items():
            axes = {"cut": range(len(values)), "record": range(values.shape[1])}
            frames[name] = long_frame(axes, {"value": values, "is_right": self.is_right})
        return stacked_frame(frames, "score")

    def summary(self) -> str:
        """Return lines of text: the number of answers, every AUROC, and how layers and features were chosen."""
        width = max(len(TITLES[name]) for name in self.names)
        lines = [f"{self._counted}; AUROC (right answers score higher), {LEVEL:.0%} intervals over records"]
        for name in self.names:
            low, high = self.interval(name)
            lines.append(f"{TITLES[name]:{width}}  {self.auroc(name):.3f}  [{low:.3f}, {high:.3f}]")
        return "\n".join([*lines, self._layers_in_words, *self._empty_models])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with the ROC curves, and every AUROC with its interval.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        names = [TITLES[name] for name in self.names]
        areas = [(self.auroc(name), *self.interval(name)) for name in self.names]
        titles = "Right or wrong? What one run shows", f"{self._counted}\n{self._layers_in_words}"
        figure = prediction_figure(names, list(self.scores.values()), self.is_right, areas, titles=titles)
        return drawing.finished(figure, path)

    @property
    def _counted(self) -> str:
        right = int(self.is_right.sum())
        return f"{len(self.is_right)} answers, {right} right and {len(self.is_right) - right} wrong"

    @property
    def _layers_in_words(self) -> str:
        """A description of the layers that were used."""
        if self.layers is not None:
            return f"mean over layers {' and '.join(map(str, self.layers))}"
        parts = []
        for name, counts in self.layer_counts.items():
            most = counts.topk(min(2, len(counts))).indices.sort().values.tolist()
            parts.append(f"{' and '.join(map(str, most))} for the {name}")
        return f"layers chosen in each training fold, most often {' and '.join(parts)}"

    @property
    def _empty_models(self) -> tuple[str, ...]:
        """One line for each L1 model that kept no feature in some fits."""
        empty = {name: int((sizes == 0).sum()) for name, sizes in self.feature_counts.items()}
        return tuple(
            f"{TITLES[name]}: no feature was kept in {count} of {len(self.feature_counts[name])} fits"
            for name, count in empty.items()
            if count
        )

    def _index(self, name: str) -> int:
        if name not in self.scores:
            raise TraceError(f"no score {name!r}; this prediction has {', '.join(self.names)}")
        return self.names.index(name)

    def _lines(self) -> tuple[str, str]:
        best = max(self.names, key=self.auroc)
        low, high = self.interval(best)
        return (
            f"FailurePrediction for {name_of_model(self.model)}: {self._counted}",
            f"best AUROC {self.auroc(best):.3f} [{low:.3f}, {high:.3f}], by the {TITLES[best]}",
        )

    def _problem(self) -> str | None:
        count = len(self.scores)
        fits = [values.shape[1:] == self.is_right.shape for values in self.scores.values()]
        fits += [count > 0, set(self.scores) <= set(TITLES), self.areas.shape == (count,)]
        fits += [len(self.draws) == count, set(self.feature_counts) <= set(TITLES)]
        return None if all(fits) else "its tensors are of other shapes than its scores and records"


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of the middle 95 % of the values (..., draw)."""
    outside = (1 - LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([outside, 1 - outside], dtype=values.dtype), dim=-1)
    return low, high


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
