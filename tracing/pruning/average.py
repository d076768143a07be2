"""Image token pruning averaged over questions: accuracy by first pruned layer, and the layer where pruning is free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result
from ..engine.cells import TraceError
from .result import (
    ImagePruning,
    Levels,
    PruningLine,
    index_of_keep,
    index_of_score,
    keep_label,
    lasting_from,
    pruning_figure,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ROUNDING = 1e-9
MEASURES = ("accuracy", "probability")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AveragePruning(Result):
    """Image token pruning of one model over questions (arXiv 2406.06579). `average` returns it.

    Questions without a known right answer count for probabilities only.
    """

    layout: ClassVar[str] = "multrace average image pruning 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    depth: int
    """Number of decoder layers."""
    layers: tuple[int, ...]
    """First layers without the dropped tokens."""
    keep: tuple[int | str, ...]
    """Numbers of image tokens that stay; "all" for all of them."""
    scores: tuple[str, ...]
    """The scores of the answer; the first is the main one."""
    count: int
    """Number of questions."""
    right: Mean
    """(keep, layer): 1 where the free answer is right, else 0, over questions with a known right answer."""
    baseline_right: Mean
    """(): 1 where the free answer with every image token is right, else 0."""
    floor_right: Mean
    """(): 1 where the free answer with no image token in any layer is right, else 0."""
    lost: Mean
    """(keep, layer): 1 where the answer is right only without pruning, else 0."""
    gained: Mean
    """(keep, layer): 1 where the answer is right only with pruning, else 0."""
    probabilities: Mean
    """(score, keep, layer): probability of the scored answer."""
    baseline: Mean
    """(score,): probability of the scored answer with every image token."""
    floor: Mean
    """(score,): probability of the scored answer with no image token in any layer."""
    token_shares: Mean
    """(keep, layer): `ImagePruning.tokens_kept`."""
    operation_shares: Mean
    """(keep, layer): `ImagePruning.operations_kept`."""

    @property
    def graded(self) -> int:
        """Number of questions with a known right answer, over which accuracies are computed."""
        return int(self.baseline_right.count)

    @property
    def baseline_accuracy(self) -> float:
        """Share of right answers with every image token; NaN if no right answer is known."""
        return float(self.baseline_right.mean)

    @property
    def floor_accuracy(self) -> float:
        """Share of right answers with no image token in any layer, that is, from the words alone."""
        return float(self.floor_right.mean)

    def accuracy(self) -> Tensor:
        """Return the share (keep, layer) float64 of right free answers."""
        return self.right.mean

    def accuracy_interval(self) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (keep, layer): Wilson's 95 % interval of the accuracy."""
        return self.right.wilson()

    def probability(self, score: str | None = None) -> Tensor:
        """Return the mean probability (keep, layer) float64 of the scored answers."""
        return self.probabilities.mean[self._score(score)]

    def probability_interval(self, score: str | None = None) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (keep, layer): the 95 % interval of the mean by Student's t.

        Raises `ArtefactError` for one question.
        """
        return self.probabilities[self._score(score)].interval()

    def tokens_kept(self) -> Tensor:
        """Return the share (keep, layer) float64 of token-layers that are still computed, mean over questions."""
        return self.token_shares.mean

    def operations_kept(self) -> Tensor:
        """Return the share (keep, layer) float64 of floating-point operations that remain, mean over questions."""
        return self.operation_shares.mean

    def cliff_layer(
        self, keep: int | str = 0, tolerance: float = 0.01, *, by: str = "accuracy", score: str | None = None
    ) -> int | None:
        """Return the first layer from which pruning no longer hurts; None if it hurts even at the last one.

        From this layer on, the measure is never more than the tolerance below the baseline. Only the layers of this
        average are considered.

        Args:
            keep: The number of image tokens that stay.
            tolerance: Largest absolute loss that still counts as none.
            by: The measure: "accuracy" or "probability" (the mean).
            score: The score whose probability counts; the main one by default.

        Raises:
            TraceError: If the tolerance is negative, or if the measure is the accuracy and no right answers are known.
        """
        if tolerance < 0:
            raise TraceError(f"tolerance={tolerance} is negative; pass how much may be lost, such as 0.01")
        values, levels = self._measured(by, score)
        curve = values[index_of_keep(keep, self.keep)]
        return lasting_from(self.layers, (curve >= levels.baseline - tolerance - _ROUNDING).tolist())

    def changed(self, keep: int | str, layer: int) -> tuple[int, int]:
        """Return (lost, gained): the numbers of answers that are right only without pruning, and only with it."""
        place = index_of_keep(keep, self.keep), self._layer(layer)
        lost, gained = (
            round(float(part.mean[place].nan_to_num(0.0) * self.graded)) for part in (self.lost, self.gained)
        )
        return lost, gained

    def summary(self, tolerance: float = 0.01) -> str:
        """Return lines of text: baseline and floor, then the cliff and its saving for each number of kept tokens."""
        known, score = self.graded > 0, self.scores[0]
        lines = [f"image tokens dropped in {self.model}, {_questions(self.count)}"]
        if known:
            some = "" if self.graded == self.count else f" (of {self.graded} with a right answer)"
            lines.append(f"  accuracy with every image token {self.baseline_accuracy:.1%}{some}")
            lines.append(f"  accuracy with none in any layer {self.floor_accuracy:.1%}, by the words alone")
        ends = (float(level.mean[0]) for level in (self.baseline, self.floor))
        lines.append("  mean probability of the answer's {}: {:.3g} and {:.3g}".format(_part(score), *ends))
        by = "accuracy" if known else "probability"
        return "\n".join([*lines, *(f"  {self._keep_line(keep, tolerance, by)}" for keep in self.keep)])

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score, keep and layer (the first layer without the dropped tokens).

        The columns are the mean probability, its baseline and floor; accuracy, low and high of its 95 % interval, and
        baseline_accuracy and floor_accuracy; tokens_kept and operations_kept, shares of the work; and n, the number of
        questions.
        """
        return (
            super()
            .to_dataframe()
            .assign(n=self.count, baseline_accuracy=self.baseline_accuracy, floor_accuracy=self.floor_accuracy)
        )

    def plot(
        self,
        path: str | Path | None = None,
        by: str | None = None,
        *,
        tolerance: float = 0.01,
        score: str | None = None,
    ) -> "Figure":
        """Return a figure with accuracy or mean probability by layer, with 95 % bands, and the operations saved.

        Baseline, floor and each cliff are marked.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            by: "accuracy" or "probability"; by default the accuracy if right answers are known.
            tolerance: Largest absolute loss at a cliff, as in `cliff_layer`.
            score: The score whose probability is drawn; the main one by default.

        Raises:
            TraceError: If `cliff_layer` raises it.
            ArtefactError: If the file cannot be written.
        """
        by = by or ("accuracy" if self.graded else "probability")
        values, levels = self._measured(by, score)
        low, high = self.accuracy_interval() if by == "accuracy" else self.probabilities[self._score(score)].band()
        saved, lines = 1 - self.operations_kept(), []
        for row, keep in enumerate(self.keep):
            cliff = self.cliff_layer(keep, tolerance, by=by, score=score)
            lines.append(
                PruningLine(
                    label=keep_label(keep),
                    values=values[row],
                    low=low[row],
                    high=high[row],
                    saved=saved[row],
                    cliff=None if keep == "all" else cliff,
                )
            )
        part = _part(self.scores[self._score(score)])
        label = "accuracy" if by == "accuracy" else f"mean probability of the {part}"
        bands = "" if high.isnan().all() else "; bands: 95% intervals"
        subtitle = f"{name_of_model(self.model)}\n{label.capitalize()}{bands}"
        titles = f"Image tokens dropped, {_questions(self.count)}", subtitle
        return drawing.finished(pruning_figure(self.layers, lines, levels=levels, titles=titles, y_label=label), path)

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        return {"score": self.scores, "keep": self.keep, "layer": self.layers}

    def _columns(self) -> Mapping[str, Tensor]:
        low, high = self.accuracy_interval()
        levels = {name: getattr(self, name).mean[:, None, None] for name in ("baseline", "floor")}
        accuracies = {"accuracy": self.accuracy(), "low": low, "high": high}
        work = {"tokens_kept": self.tokens_kept(), "operations_kept": self.operations_kept()}
        return {"probability": self.probabilities.mean} | levels | accuracies | work

    def _measured(self, by: str, score: str | None) -> tuple[Tensor, Levels]:
        """Return values (keep, layer), and their baseline and floor."""
        if by not in MEASURES:
            raise TraceError(f"no measure {by!r}; pass by='accuracy' or by='probability'")
        if by == "probability":
            index = self._score(score)
            ends = {name: float(getattr(self, name).mean[index]) for name in ("baseline", "floor")}
            return self.probability(score), Levels(**ends)
        if not self.graded:
            raise TraceError(
                "no right answers are known here, so there is no accuracy; pass gold= to prune_image_tokens, or "
                "by='probability'"
            )
        return self.accuracy(), Levels(baseline=self.baseline_accuracy, floor=self.floor_accuracy)

    def _cliff_line(self, keep: int | str, tolerance: float, by: str) -> str:
        """Return a line about the cliff of a number of kept tokens."""
        layer = self.cliff_layer(keep, tolerance, by=by)
        if layer is None:
            return f"{keep_label(keep)}: {by} is hurt even from layer {self.layers[-1]} on"
        saved = 1 - float(self.operations_kept()[index_of_keep(keep, self.keep), self.layers.index(layer)])
        return f"{keep_label(keep)}: {by} holds from layer {layer} on, which saves {saved:.0%} of operations"

    def _keep_line(self, keep: int | str, tolerance: float, by: str) -> str:
        """Return a line about the cliff of a number of kept tokens, with the accuracy at the cliff."""
        line, layer = self._cliff_line(keep, tolerance, by), self.cliff_layer(keep, tolerance, by=by)
        if layer is None or by == "probability":
            return line
        place = index_of_keep(keep, self.keep), self.layers.index(layer)
        share, low, high = (float(part[place]) for part in (self.accuracy(), *self.accuracy_interval()))
        lost, gained = self.changed(keep, layer)
        return f"{line}; {share:.1%} [{low:.1%}, {high:.1%}] there, {lost} answers lost and {gained} gained"

    def _layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise TraceError(f"no layer {layer} in this average; pass one of {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _score(self, score: str | None) -> int:
        return 0 if score is None else index_of_score(score, self.scores)

    def _lines(self) -> tuple[str, str]:
        by = "accuracy" if self.graded else "probability"
        return (
            f"AveragePruning of {name_of_model(self.model)} over {_questions(self.count)}",
            self._cliff_line(self.keep[0], 0.01, by),
        )

    def _problem(self) -> str | None:
        shape, scores = (len(self.keep), len(self.layers)), len(self.scores)
        fits = [min(*shape, self.count, scores) > 0, max(self.layers) < self.depth]
        names = ("right", "lost", "gained", "token_shares", "operation_shares")
        fits += [getattr(self, name).fits(*shape) for name in names]
        fits += [getattr(self, name).fits() for name in ("baseline_right", "floor_right")]
        fits += [getattr(self, name).fits(scores) for name in ("baseline", "floor")]
        fits += [self.probabilities.fits(scores, *shape)]
        return None if all(fits) else "its tensors are of other shapes than its keeps, layers and scores"


class PruningAverager(Averager[ImagePruning, AveragePruning]):
    """Average accuracies and probabilities over questions to one model with the same `keep` and `layers`."""

    alike = ("model", "revision", "depth", "layers", "keep", "scores")

    def _take(self, result: ImagePruning) -> None:
        axes = {"keep": result.keep, "layer": result.layers}
        unknown = torch.full(result.dropped.shape, torch.nan, dtype=torch.float64)
        right = unknown if result.is_right is None else result.is_right.double()
        baseline, floor = (_number(claim) for claim in (result.baseline_is_right, result.floor_is_right))
        self._add("right", right, axes)
        self._add("baseline_right", baseline)
        self._add("floor_right", floor)
        self._add("lost", (baseline - right).clamp(min=0), axes)
        self._add("gained", (right - baseline).clamp(min=0), axes)
        self._add("probabilities", result.probabilities, {"score": result.scores} | axes)
        self._add("baseline", result.baseline, {"score": result.scores})
        self._add("floor", result.floor, {"score": result.scores})
        self._add("token_shares", result.tokens_kept(), axes)
        self._add("operation_shares", result.operations_kept(), axes)

    def _average(self) -> AveragePruning:
        means: dict[str, Any] = {name: self._mean(name) for name in self._means}
        return AveragePruning(**{name: getattr(self.first, name) for name in self.alike}, count=self.count, **means)


def _number(claim: bool | None) -> float:
    """Return 1 for true, 0 for false, and NaN for unknown."""
    return torch.nan if claim is None else float(claim)


def _part(score: str) -> str:
    """Return a description of the scored part of the answer."""
    return "first token" if score == "first token" else "whole answer"


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"
