"""Accuracy over questions with image tokens dropped from each layer on, and the layer where that stops hurting."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.figure import name_of_model
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ...artefacts.proportions import wilson_interval
from ..errors import TraceError
from .plot import Levels, PruningLine, draw_pruning
from .result import ImagePruning, index_of_keep, index_of_score, keep_label, lasting_from

_LAYOUT = "multrace average image pruning 1"
_SHARED = ("model", "revision", "depth", "layers", "keep", "scores")
_ROUNDING = 1e-9
MEASURES = ("accuracy", "probability")


@dataclass(frozen=True, kw_only=True, eq=False)
class AveragePruning:
    """Prunings of one model over questions. Made by `average_prunings`; arXiv 2406.06579."""

    model: str
    """Name or path of the model."""
    revision: str | None
    depth: int
    """How many layers the decoder has."""
    layers: tuple[int, ...]
    """The first layers without the dropped tokens."""
    keep: tuple[int | str, ...]
    """How many image tokens stay; "all" of them."""
    scores: tuple[str, ...]
    """What is scored of the answer; the first is the main one."""
    questions: tuple[str, ...]
    """The questions, in the order of all that follows."""
    right: Tensor
    """(question, keep, layer) float64: 1 where the free answer is right, else 0; NaN without a right answer."""
    baseline_right: Tensor
    """(question,) float64: likewise, with every image token."""
    floor_right: Tensor
    """(question,) float64: likewise, with no image token in any layer."""
    probabilities: Tensor
    """(score, question, keep, layer) float64: the scored answer's probability."""
    baseline: Tensor
    """(score, question) float64: the same with every image token."""
    floor: Tensor
    """(score, question) float64: the same with no image token in any layer."""
    token_shares: Tensor
    """(question, keep, layer) float64: `ImagePruning.tokens_kept`."""
    operation_shares: Tensor
    """(question, keep, layer) float64: `ImagePruning.operations_kept`."""

    @property
    def count(self) -> int:
        """How many questions there are."""
        return len(self.questions)

    @property
    def graded(self) -> int:
        """How many of them have a right answer, over which accuracies are."""
        return int((~self.baseline_right.isnan()).sum())

    @property
    def baseline_accuracy(self) -> float:
        """Share of right answers with every image token; NaN if no right answer is known."""
        return float(self.baseline_right.nanmean())

    @property
    def floor_accuracy(self) -> float:
        """Share of right answers with no image token in any layer: what the words alone give."""
        return float(self.floor_right.nanmean())

    def accuracy(self) -> Tensor:
        """(keep, layer) float64: share of right free answers."""
        return self.right.nanmean(0)

    def accuracy_interval(self) -> tuple[Tensor, Tensor]:
        """(low, high), each (keep, layer): Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.accuracy(), (~self.right.isnan()).sum(0))

    def probability(self, score: str | None = None) -> Tensor:
        """(keep, layer) float64: mean probability of the scored answers."""
        return self.probabilities[self._score(score)].mean(0)

    def probability_interval(self, score: str | None = None) -> tuple[Tensor, Tensor]:
        """(low, high), each (keep, layer): 95 % interval of the mean, by Student's t; TraceError for one question."""
        return mean_interval(self.probabilities[self._score(score)])

    def tokens_kept(self) -> Tensor:
        """(keep, layer) float64: share of token-layers still computed, mean over questions."""
        return self.token_shares.mean(0)

    def operations_kept(self) -> Tensor:
        """(keep, layer) float64: share of floating-point operations still done, mean over questions."""
        return self.operation_shares.mean(0)

    def cliff_layer(
        self, keep: int | str = 0, tolerance: float = 0.01, *, by: str = "accuracy", score: str | None = None
    ) -> int | None:
        """The first layer from which on dropping no longer hurts; None if it hurts even at the last one.

        From there on the accuracy (by="accuracy") or the mean probability (by="probability") is never more than
        `tolerance`, in absolute terms, below the baseline's. Of the layers that were asked for only. TraceError for a
        negative tolerance, and for accuracy without right answers.
        """
        if tolerance < 0:
            raise TraceError(f"tolerance={tolerance} is negative; pass how much may be lost, such as 0.01")
        values, levels = self._measured(by, score)
        curve = values[index_of_keep(keep, self.keep)]
        return lasting_from(self.layers, (curve >= levels.baseline - tolerance - _ROUNDING).tolist())

    def changed(self, keep: int | str, layer: int) -> tuple[int, int]:
        """(lost, gained): how many answers are right only without dropping, and only with it."""
        before, after = self.baseline_right, self.right[:, index_of_keep(keep, self.keep), self._layer(layer)]
        return int((before > after).sum()), int((after > before).sum())

    def summary(self, tolerance: float = 0.01) -> str:
        """Lines for people: baseline and floor, then per number of kept tokens the cliff and what is saved there."""
        known, score = self.graded > 0, self.scores[0]
        lines = [f"image tokens dropped in {self.model}, {_questions(self.count)}"]
        if known:
            wrong = "" if self.graded == self.count else f" (of {self.graded} with a right answer)"
            lines.append(f"  accuracy with every image token {self.baseline_accuracy:.1%}{wrong}")
            lines.append(f"  accuracy with none in any layer {self.floor_accuracy:.1%}, by the words alone")
        ends = (float(each[0].mean()) for each in (self.baseline, self.floor))
        lines.append("  mean probability of the answer's {}: {:.3g} and {:.3g}".format(_part(score), *ends))
        by = "accuracy" if known else "probability"
        return "\n".join([*lines, *(f"  {self._keep_line(keep, tolerance, by)}" for keep in self.keep)])

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AveragePruning":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per score, keep and layer, the first one without the dropped tokens.

        Columns: the mean probability, its baseline and floor; accuracy, low and high of its 95 % interval, and its
        baseline_accuracy and floor_accuracy; n, the questions; tokens_kept and operations_kept, shares of the work.
        """
        axes = [("score", self.scores), ("keep", self.keep), ("layer", self.layers)]
        low, high = self.accuracy_interval()
        values = {"probability": self.probabilities.mean(1)}
        values |= {name: getattr(self, name).mean(1)[:, None, None] for name in ("baseline", "floor")}
        values |= {"accuracy": self.accuracy(), "low": low, "high": high}
        work = {"tokens_kept": self.tokens_kept(), "operations_kept": self.operations_kept()}
        levels = {"baseline_accuracy": self.baseline_accuracy, "floor_accuracy": self.floor_accuracy}
        return long_frame(axes, values | work).assign(n=self.count, **levels)

    def plot(
        self, path: str | Path, by: str | None = None, *, tolerance: float = 0.01, score: str | None = None
    ) -> Path:
        """The written picture (png, pdf or svg by suffix): accuracy or mean probability by layer, with 95 % bands.

        by: "accuracy" or "probability"; None for the accuracy if right answers are known. Baseline, floor and each
        cliff are marked; below them the operations saved. TraceError as for `cliff_layer`.
        """
        by = by or ("accuracy" if self.graded else "probability")
        values, levels = self._measured(by, score)
        low, high = self._band(by, score)
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
        return draw_pruning(path, self.layers, lines, levels=levels, titles=titles, y_label=label)

    def _measured(self, by: str, score: str | None) -> tuple[Tensor, Levels]:
        """(keep, layer) values, with baseline and floor."""
        if by not in MEASURES:
            raise TraceError(f"no measure {by!r}; pass by='accuracy' or by='probability'")
        if by == "probability":
            index = self._score(score)
            ends = {name: float(getattr(self, name)[index].mean()) for name in ("baseline", "floor")}
            return self.probability(score), Levels(**ends)
        if not self.graded:
            raise TraceError(
                "no right answers are known here, so there is no accuracy; pass gold= to prune_image_tokens, or "
                "by='probability'"
            )
        return self.accuracy(), Levels(baseline=self.baseline_accuracy, floor=self.floor_accuracy)

    def _band(self, by: str, score: str | None) -> tuple[Tensor, Tensor]:
        """Ends of the band; NaN where one question says nothing on others."""
        if by == "accuracy":
            return self.accuracy_interval()
        unknown = torch.full_like(self.probability(score), torch.nan)
        return self.probability_interval(score) if self.count > 1 else (unknown, unknown)

    def _keep_line(self, keep: int | str, tolerance: float, by: str) -> str:
        """One line on the cliff of so many tokens."""
        layer = self.cliff_layer(keep, tolerance, by=by)
        if layer is None:
            return f"{keep_label(keep)}: {by} is hurt even from layer {self.layers[-1]} on"
        place = index_of_keep(keep, self.keep), self.layers.index(layer)
        saved = 1 - float(self.operations_kept()[place])
        line = f"{keep_label(keep)}: {by} holds from layer {layer} on, which saves {saved:.0%} of operations"
        if by == "probability":
            return line
        share, low, high = (float(each[place]) for each in (self.accuracy(), *self.accuracy_interval()))
        lost, gained = self.changed(keep, layer)
        return f"{line}; {share:.1%} [{low:.1%}, {high:.1%}] there, {lost} answers lost and {gained} gained"

    def _layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise TraceError(f"no layer {layer} in this average; pass one of {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _score(self, score: str | None) -> int:
        return 0 if score is None else index_of_score(score, self.scores)


def average_prunings(prunings: Sequence[ImagePruning]) -> AveragePruning:
    """Accuracies and mean probabilities over questions that one model was asked with the same keeps and layers.

    Questions without a right answer count for probabilities only. TraceError for none, or for unlike prunings.
    """
    if not prunings:
        raise TraceError("no prunings to average; pass at least one")
    for name in _SHARED:
        found = {getattr(each, name): None for each in prunings}
        if len(found) > 1:
            raise TraceError(
                f"these prunings differ in their {name} ({' and '.join(map(str, found))}); average equal ones only"
            )
    first = prunings[0]
    unknown = torch.full(first.dropped.shape, torch.nan, dtype=torch.float64)
    rights = [each.is_right for each in prunings]
    return AveragePruning(
        questions=tuple(each.question for each in prunings),
        right=torch.stack([unknown if right is None else right.double() for right in rights]),
        baseline_right=_as_numbers([each.baseline_is_right for each in prunings]),
        floor_right=_as_numbers([each.floor_is_right for each in prunings]),
        probabilities=torch.stack([each.probabilities for each in prunings], 1),
        baseline=torch.stack([each.baseline for each in prunings], 1),
        floor=torch.stack([each.floor for each in prunings], 1),
        token_shares=torch.stack([each.tokens_kept() for each in prunings]),
        operation_shares=torch.stack([each.operations_kept() for each in prunings]),
        **{name: getattr(first, name) for name in _SHARED},
    )


def _as_numbers(claims: Sequence[bool | None]) -> Tensor:
    """1 for true, 0 for false, NaN where it is not known."""
    return torch.tensor([torch.nan if claim is None else float(claim) for claim in claims], dtype=torch.float64)


def _part(score: str) -> str:
    """What is scored, in words."""
    return "first token" if score == "first token" else "whole answer"


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"


def _problem(average: AveragePruning) -> str | None:
    """What does not fit together in an average that was read from a file."""
    shape, count, scores = (len(average.keep), len(average.layers)), average.count, len(average.scores)
    fits = [min(*shape, count, scores) > 0, max(average.layers) < average.depth]
    fits += [getattr(average, name).shape == (count, *shape) for name in ("right", "token_shares", "operation_shares")]
    fits += [getattr(average, name).shape == (count,) for name in ("baseline_right", "floor_right")]
    fits += [getattr(average, name).shape == (scores, count) for name in ("baseline", "floor")]
    fits += [average.probabilities.shape == (scores, count, *shape)]
    return None if all(fits) else "its tensors are of other shapes than its questions, keeps, layers and scores"
