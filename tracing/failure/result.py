"""The result of a failure prediction: how well scores of single runs separate right answers from wrong ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result, long_frame, stacked_frame
from ...artefacts.statistics import LEVEL
from ..errors import TraceError
from .plot import prediction_figure

if TYPE_CHECKING:
    import pandas as pd
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
