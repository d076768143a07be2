"""Whether a model's answers could be told to be right or wrong from what one run showed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import LEVEL
from ..errors import TraceError
from .plot import draw_prediction

_LAYOUT = "multrace failure prediction 1"

TITLES: Mapping[str, str] = {
    "contribution": "contribution of the constraint",
    "weight": "attention to the constraint",
    "answer probability": "probability of the first token",
    "whole-answer probability": "probability of the whole answer",
    "combination": "these combined (L1)",
    "all heads": "all layers and heads (L1)",
}
"""What each score is called in drawings and summaries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FailurePrediction:
    """How well scores tell right answers from wrong ones. Made by `predict_failure`.

    The area under the ROC curve (AUROC) is the share of pairs of a right and a wrong answer of which the right one
    scores higher: 0.5 is chance, and below it wrong answers score higher.
    """

    model: str
    """Name or path of the model."""
    is_right: Tensor
    """(record,) booleans."""
    scores: Mapping[str, Tensor]
    """Per name (cut, record) float64, larger where the answer should be right. One cut where nothing was chosen or
    fitted; else one per way to cut the records into folds, each record scored by models that never saw it."""
    areas: Tensor
    """(score,) float64: AUROC of each, mean over its cuts, in the order of `scores`."""
    draws: Tensor
    """(score, draw) float64: AUROC of each in bootstrap samples, the same samples for all."""
    layers: tuple[int, ...] | None
    """The layers whose mean counted; None if they were chosen in each training fold."""
    chosen: Mapping[str, Tensor]
    """Per quantity (layer,): in how many fits each layer counted."""
    kept: Mapping[str, Tensor]
    """Per L1 model (fit,): how many features had a weight."""
    folds: int
    repeats: int
    """How often the records were cut into folds."""
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(self.scores)

    def auroc(self, name: str) -> float:
        """The share of pairs that this score ranks rightly, right answers above wrong ones; ties count half."""
        return float(self.areas[self._index(name)])

    def interval(self, name: str) -> tuple[float, float]:
        """(low, high) of the 95 % bootstrap interval of its AUROC over records; models are not fitted again."""
        return _ends(self.draws[self._index(name)])

    def difference(self, first: str, second: str) -> tuple[float, float, float]:
        """(AUROC of the first minus that of the second, low, high): its 95 % interval over the same samples."""
        one, other = self._index(first), self._index(second)
        return float(self.areas[one] - self.areas[other]), *_ends(self.draws[one] - self.draws[other])

    def table(self) -> pd.DataFrame:
        """One line per score: AUROC, low and high."""
        lines = [(name, self.auroc(name), *self.interval(name)) for name in self.names]
        return pd.DataFrame(lines, columns=["score", "auroc", "low", "high"])

    def to_dataframe(self) -> pd.DataFrame:
        """One line per score, cut and record: its value, and whether the answer is right."""
        parts = []
        for name, values in self.scores.items():
            axes = [("score", (name,)), ("cut", range(len(values))), ("record", range(values.shape[1]))]
            parts.append(long_frame(axes, {"value": values, "is_right": self.is_right}))
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> tuple[str, ...]:
        """A few lines of text: what was told apart, every AUROC, and how layers and features were chosen."""
        width = max(len(TITLES[name]) for name in self.names)
        lines = [f"{self._counted}; AUROC (right answers score higher), {LEVEL:.0%} intervals over records"]
        for name in self.names:
            low, high = self.interval(name)
            lines.append(f"{TITLES[name]:{width}}  {self.auroc(name):.3f}  [{low:.3f}, {high:.3f}]")
        return (*lines, self._layers_said, *self._kept_said)

    def plot(self, path: str | Path) -> Path:
        """The written picture (png, pdf, svg): ROC curves, and every AUROC with its interval."""
        names = [TITLES[name] for name in self.names]
        areas = [(self.auroc(name), *self.interval(name)) for name in self.names]
        titles = "Right or wrong? What one run shows", f"{self._counted}\n{self._layers_said}"
        return draw_prediction(path, names, list(self.scores.values()), self.is_right, areas, titles=titles)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "FailurePrediction":
        """What `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    @property
    def _counted(self) -> str:
        right = int(self.is_right.sum())
        return f"{len(self.is_right)} answers, {right} right and {len(self.is_right) - right} wrong"

    @property
    def _layers_said(self) -> str:
        """Which layers counted, in words."""
        if self.layers is not None:
            return f"mean over layers {' and '.join(map(str, self.layers))}"
        most = {name: counts.topk(min(2, len(counts))).indices.sort().values for name, counts in self.chosen.items()}
        said = [f"{' and '.join(map(str, layers.tolist()))} for the {name}" for name, layers in most.items()]
        return f"layers chosen in each training fold, most often {' and '.join(said)}"

    @property
    def _kept_said(self) -> tuple[str, ...]:
        """A line for each L1 model that kept nothing in some fits."""
        empty = {name: int((sizes == 0).sum()) for name, sizes in self.kept.items()}
        return tuple(
            f"{TITLES[name]}: no feature was kept in {count} of {len(self.kept[name])} fits"
            for name, count in empty.items()
            if count
        )

    def _index(self, name: str) -> int:
        if name not in self.scores:
            raise TraceError(f"no score {name!r}; this prediction has {', '.join(self.names)}")
        return self.names.index(name)


def _ends(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of the values."""
    outside = (1 - LEVEL) / 2
    return tuple(torch.quantile(values, torch.tensor([outside, 1 - outside], dtype=values.dtype)).tolist())


def _problem(prediction: FailurePrediction) -> str | None:
    count = len(prediction.scores)
    fits = [values.shape[1:] == prediction.is_right.shape for values in prediction.scores.values()]
    fits += [count > 0, set(prediction.scores) <= set(TITLES), prediction.areas.shape == (count,)]
    fits += [len(prediction.draws) == count, set(prediction.kept) <= set(TITLES)]
    return None if all(fits) else "its tensors are of other shapes than its scores and records"
