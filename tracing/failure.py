"""Prediction of whether answers are right from features of their runs, and how well the scores separate both kinds.

Every score is out of fold: the classifier that gives it has not seen the question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..artefacts import drawing
from ..artefacts.averages import LEVEL, auroc, bootstrap_counts, weighted_auroc
from ..artefacts.drawing.styles import CYCLE, INK, name_of_model
from ..artefacts.results import Result, long_frame, stacked_frame
from ..models import Prompt, VisionLanguageModel
from .attention.contributions import contribution_norms, record_attention, value_bias
from .attention.contributions_result import Chart, HeadMap, Line, layers_figure
from .engine.cells import TraceError
from .engine.positions import prompt_positions

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


REPEATS = 10
"""Number of cuts of the records into folds."""
_ORDER = ("contribution", "weight", "answer probability", "whole-answer probability", "combination", "all heads")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FailureFeatures(Result):
    """Features of one run that predict whether its answer is right. `failure_features` returns it."""

    layout: ClassVar[str] = "multrace failure features 2"

    model: str
    """Name or path of the model."""
    question: str
    contributions: Tensor
    """(layer,) float64: contribution of the constraint to the last token, maximum over the constraint's tokens."""
    head_contributions: Tensor
    """(layer, head) float64: the contribution through each head."""
    weights: Tensor
    """(layer,) float64: the last token's attention to the constraint, mean over heads, maximum over its tokens."""
    head_weights: Tensor
    """(layer, head) float64: the attention weight of each head."""
    first_token: str
    """The likeliest first token of an answer."""
    first_probability: float
    """The probability of that token."""
    answer: str | None
    """The answer whose probability was read; None if no answer was given."""
    answer_probability: float | None
    """The product of the probabilities of the answer's tokens, each given the tokens before it."""

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with the contribution of the constraint and the attention to it, by layer and by head.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        line = "constraint, largest token"
        charts = [
            Chart(unit="length of contribution", lines=[Line(label=line, values=self.contributions)]),
            Chart(unit="attention weight", lines=[Line(label=line, values=self.weights)]),
        ]
        maps = [
            HeadMap(kind="contribution", values=self.head_contributions.T),
            HeadMap(kind="weight", values=self.head_weights.T),
        ]
        subtitle = (
            f"From the constraint to the last token; p({self.first_token.strip()}) = {self.first_probability:.3g}"
        )
        return drawing.finished(layers_figure(charts, maps, titles=(self.question, subtitle)), path)

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        layers, heads = self.head_weights.shape
        return {"layer": range(layers), "head": range(heads)}

    def _columns(self) -> Mapping[str, Tensor]:
        return {"contribution": self.head_contributions, "weight": self.head_weights}

    def _lines(self) -> tuple[str, str]:
        layer = int(self.contributions.argmax())
        return (
            f"FailureFeatures of {name_of_model(self.model)}: {self.question!r}",
            f"p({self.first_token.strip()}) = {self.first_probability:.3g}; contribution of the constraint at most "
            f"{float(self.contributions[layer]):.3g}, in layer {layer}",
        )

    def _problem(self) -> str | None:
        heads = self.head_contributions.shape
        fits = len(heads) == 2 and self.head_weights.shape == heads
        fits = fits and self.contributions.shape == self.weights.shape == heads[:1]
        return None if fits else "its tensors are of other shapes than its layers and heads"


def failure_features(
    vlm: VisionLanguageModel, prompt: Prompt, *, answer: str | None = None, constraint: str = "constraint"
) -> FailureFeatures:
    """Return features of one pass over the prompt that predict whether the model's answer is right.

    They are the contributions of the constraint to the last token (per layer and per head, each the maximum over the
    constraint's tokens), the attention that the constraint receives, and the probability of the likeliest first token.

    Args:
        vlm: The model.
        prompt: The prompt, with a constraint.
        answer: The model's own greedy answer, whose probability is read in the same pass; None reads only the first
            token.
        constraint: The token group whose contributions are read.

    Returns:
        A `FailureFeatures`, which `predict_failure` takes together with those of other prompts.

    Raises:
        TraceError: If the prompt does not have this constraint.
        ModelError: If the answer is empty.

    Source: arXiv 2309.15098 (SAT-Probe); for pictures arXiv 2406.04236, section 5.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import failure_features
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> picture = Image.new("RGB", (64, 64), "red")
        >>> prompt = vlm.prompt(picture, "What colour is this car?", constraint="this car")
        >>> failure_features(vlm, prompt).contributions.shape  # one number per layer
        torch.Size([8])
    """
    sources, last = prompt_positions(prompt, constraint), prompt.groups["last"][0]
    ids = prompt.with_answer(answer).answer_ids if answer is not None else (0,)
    recorded, logits = record_attention(
        vlm, vlm.extend(vlm.embed(prompt), ids), (last,), read=range(last, last + len(ids))
    )
    log_probabilities = logits[0].double().log_softmax(-1).cpu()
    norms = [
        contribution_norms(vlm, layer, attention, bias, sources)
        for layer, (attention, bias) in enumerate(zip(recorded, value_bias(vlm), strict=True))
    ]
    weights = torch.stack([attention.weights[0, :, 0, list(sources)] for attention in recorded])
    whole = float(log_probabilities[range(len(ids)), list(ids)].sum().exp())
    return FailureFeatures(
        model=vlm.name,
        question=prompt.question,
        contributions=_largest([summed[0] for summed, _ in norms]),
        head_contributions=_largest([heads[:, 0] for _, heads in norms]),
        weights=_largest(list(weights.mean(1))),
        head_weights=_largest(list(weights)),
        first_token=vlm.decode([int(log_probabilities[0].argmax())]),
        first_probability=float(log_probabilities[0].max().exp()),
        answer=answer,
        answer_probability=None if answer is None else whole,
    )


def _largest(values: Sequence[Tensor]) -> Tensor:
    """Return (layer, ...) float64 on the CPU: the largest entry along the last axis."""
    return torch.stack([layer.amax(-1) for layer in values]).double().cpu()


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The values that were read for each record."""

    by_layer: dict[str, NDArray]
    """Values (record, layer) by quantity."""
    by_head: NDArray
    """(record, feature): all values per layer and head."""
    probability: NDArray
    """(record,): probability of the likeliest first token."""


@dataclass(kw_only=True)
class HeldOut:
    """Scores of every record in every cut into folds, and the layers and features that the fitted models used."""

    scores: dict[str, NDArray] = field(default_factory=dict)
    """Scores (cut, record) by name."""
    windows: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """Layers of each fit, by quantity."""
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Number of features with a nonzero weight in each fit, by L1 model."""

    def add(self, name: str, cut: int, test: NDArray, scores: NDArray) -> None:
        """Store the scores (record,) of one test fold of one cut."""
        self.scores.setdefault(name, np.zeros((REPEATS, len(scores))))[cut, test] = scores[test]


def predict_failure(
    features: Sequence[FailureFeatures],
    is_right: Sequence[bool],
    *,
    layers: Sequence[int] | Literal["half"] | None = None,
    seed: int = 0,
    folds: int = 5,
    progress: bool = True,
) -> FailurePrediction:
    """Return how well contributions, attention weights and probabilities separate right answers from wrong ones.

    Scores that involve a choice or a fit are out of fold, and their AUROC is the mean over ten stratified cuts of the
    records into folds. Intervals come from 2000 bootstrap draws of records within right and within wrong answers; the
    models are not fitted again. The L1 models have SAT-Probe's settings (arXiv 2309.15098): C = 0.05, which keeps only
    features that separate the answers clearly, and none at all if there are few records.

    Args:
        features: One result of `failure_features` per answer.
        is_right: Whether each answer is right.
        layers: The layers whose mean contribution and mean weight are used. None chooses two neighbouring layers in
            each training fold, without the records that are scored; "half" takes the two in the middle of the model (16
            and 17 of 32 in arXiv 2406.04236).
        seed: Random seed of the folds and of the bootstrap draws.
        folds: Number of folds.
        progress: Show a progress bar over the fits.

    Returns:
        A `FailurePrediction`.

    Raises:
        TraceError: If all answers are right or all are wrong, if a fold could not have one of each, or if the features
            are of different models or sizes.

    Source: arXiv 2309.15098, sections 4 and 5; for pictures arXiv 2406.04236, section 5.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import failure_features
        >>> from PIL import Image
        >>> vlm, colours = mt.load(tiny_vlm_path()), ("red", "blue", "green", "white")
        >>> prompts = [
        ...     vlm.prompt(Image.new("RGB", (64, 64), colour), "What colour is this car?", constraint="this car")
        ...     for colour in colours
        ... ]
        >>> features = [failure_features(vlm, prompt) for prompt in prompts]
        >>> result = mt.predict_failure(features, [True, False, True, False], layers="half", folds=2, progress=False)
        >>> result.names
        ('contribution', 'weight', 'answer probability', 'combination', 'all heads')
    """
    labels = _labels(features, is_right, folds)
    count = len(features[0].contributions)
    numbers = _numbers(layers, count)
    readings = _readings(features)
    held_out = held_out_scores(readings, labels, layers=numbers, folds=folds, seed=seed, progress=progress)
    scores = held_out.scores | _unfitted(readings, features, numbers)
    ordered = {name: scores[name] for name in _ORDER if name in scores}
    once, counts = np.ones((1, len(labels))), bootstrap_counts(labels, seed=seed)
    return FailurePrediction(
        model=features[0].model,
        is_right=torch.from_numpy(labels),
        scores={name: torch.from_numpy(values) for name, values in ordered.items()},
        areas=_areas(ordered, labels, once)[:, 0],
        draws=_areas(ordered, labels, counts),
        layers=numbers,
        layer_counts={name: _tally(windows, count) for name, windows in held_out.windows.items()},
        feature_counts={name: torch.tensor(sizes) for name, sizes in held_out.sizes.items()},
        folds=folds,
        repeats=REPEATS,
        seed=seed,
    )


def _labels(features: Sequence[FailureFeatures], is_right: Sequence[bool], folds: int) -> NDArray:
    """Return the labels (record,) booleans after all checks."""
    if len(features) != len(is_right):
        raise TraceError(f"{len(features)} features but {len(is_right)} answers that are right or wrong; pass one each")
    labels = np.array([bool(claim) for claim in is_right], dtype=bool)
    right = int(labels.sum())
    if right in (0, len(labels)):
        problem = "there are no answers" if not len(labels) else f"all {len(labels)} answers are {_word(bool(right))}"
        raise TraceError(f"{problem}, so there is nothing to predict; pass answers of both kinds")
    fewest = min(right, len(labels) - right)
    if folds < 2 or fewest < folds:
        raise TraceError(
            f"{fewest} {_word(2 * right <= len(labels))} of {len(labels)} answers are too few for {folds} folds, which "
            "need one each and are at least 2; pass more answers or another number of folds"
        )
    kinds = {(item.model, item.head_contributions.shape, item.answer_probability is None) for item in features}
    if len(kinds) > 1:
        raise TraceError("these features are of different models or sizes, or only some have a whole answer's "
                         "probability; pass features that were read alike")  # fmt: skip
    return labels


def _word(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _numbers(layers: Sequence[int] | Literal["half"] | None, count: int) -> tuple[int, ...] | None:
    """Return the fixed layers, counted from the start; None if they are to be chosen."""
    if layers is None:
        return None
    if layers == "half":
        return tuple(sorted({count // 2, min(count // 2 + 1, count - 1)}))
    if isinstance(layers, str) or not layers or not all(-count <= layer < count for layer in layers):
        raise TraceError(f"no layers {layers!r} in these features; pass some of 0 to {count - 1}, 'half' or None")
    return tuple(sorted({layer % count for layer in layers}))


def _readings(features: Sequence[FailureFeatures]) -> Readings:
    def stacked(name: str) -> NDArray:
        return torch.stack([getattr(item, name) for item in features]).flatten(1).numpy()

    return Readings(
        by_layer={"contribution": stacked("contributions"), "weight": stacked("weights")},
        by_head=np.concatenate([stacked("head_contributions"), stacked("head_weights")], 1),
        probability=np.array([item.first_probability for item in features]),
    )


def _unfitted(
    readings: Readings, features: Sequence[FailureFeatures], layers: tuple[int, ...] | None
) -> dict[str, NDArray]:
    """Return the scores (1, record) that involve no choice and no fit."""
    scores = {"answer probability": readings.probability}
    if layers is not None:
        scores |= {name: values[:, list(layers)].mean(1) for name, values in readings.by_layer.items()}
    if features[0].answer_probability is not None:
        scores["whole-answer probability"] = np.array([item.answer_probability for item in features])
    return {name: values[None] for name, values in scores.items()}


def _areas(scores: dict[str, NDArray], labels: NDArray, counts: NDArray) -> Tensor:
    """Return the AUROC (score, draw) float64 of each score, mean over cuts, in samples with these record counts."""
    means = [np.mean([weighted_auroc(cut, labels, counts) for cut in cuts], 0) for cuts in scores.values()]
    return torch.from_numpy(np.stack(means))


def _tally(windows: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Return the number (layer,) of fits in which each layer was chosen."""
    return torch.bincount(torch.tensor([layer for window in windows for layer in window]), minlength=count)


def held_out_scores(
    readings: Readings,
    is_right: NDArray,
    *,
    layers: tuple[int, ...] | None,
    folds: int,
    seed: int,
    progress: bool,
) -> HeldOut:
    """Return scores from the chosen layers of each quantity, their L1 combination with the probability, and all heads.

    Args:
        readings: The values of each record.
        is_right: (record,) booleans.
        layers: The layers of every fold. None chooses in each training fold, for each quantity separately, the two
            neighbouring layers whose mean best separates right answers from wrong ones.
        folds: Number of folds of a cut.
        seed: Random seed of the cuts.
        progress: Show a progress bar over the fits.
    """
    from sklearn.model_selection import RepeatedStratifiedKFold

    result, splits = HeldOut(), RepeatedStratifiedKFold(n_splits=folds, n_repeats=REPEATS, random_state=seed)
    parts = splits.split(readings.by_head, is_right)
    bar = tqdm(parts, total=folds * REPEATS, desc="held-out folds", unit="fold", disable=not progress)
    for number, (train, test) in enumerate(bar):
        cut, columns = number // folds, [readings.probability]
        for name, values in readings.by_layer.items():
            window = layers or best_window(values[train], is_right[train])
            result.windows.setdefault(name, []).append(window)
            columns.append(values[:, list(window)].mean(1))
            scaled = _standardised(columns[-1][:, None], train)  # layers differ in scale, and folds in their layers
            result.add(name, cut, test, scaled[:, 0])
        for name, features in (("combination", np.stack(columns, 1)), ("all heads", readings.by_head)):
            scores, size = _fitted(features, is_right, train, seed)
            result.add(name, cut, test, scores)
            result.sizes.setdefault(name, []).append(size)
    return result


def best_window(values: NDArray, is_right: NDArray) -> tuple[int, ...]:
    """Return the two neighbouring layers (one if there is only one) whose mean value has the largest AUROC.

    The values are (record, layer). Ties go to the first window.
    """
    count = values.shape[1]
    windows: Sequence[tuple[int, ...]] = [(layer, layer + 1) for layer in range(count - 1)] or [(0,)]
    return max(windows, key=lambda window: auroc(values[:, list(window)].mean(1), is_right))


def _fitted(features: NDArray, is_right: NDArray, train: NDArray, seed: int) -> tuple[NDArray, int]:
    """Return log-odds (record,) without their constant, from a fit to the training records, and its number of weights.

    The fit is L1 with SAT-Probe's settings (arXiv 2309.15098). The constant is left out because it depends on the share
    of right answers in the training folds, and so would rank records higher in folds with fewer right answers.
    """
    from sklearn.linear_model import LogisticRegression

    scaled = _standardised(features, train)
    model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=0.05, max_iter=1000, random_state=seed)
    model.fit(scaled[train], is_right[train])
    return scaled @ model.coef_[0], int((model.coef_ != 0).sum())


def _standardised(features: NDArray, train: NDArray) -> NDArray:
    """Return features (record, feature) with mean 0 and deviation 1 over the training records, 0 if constant."""
    mean, deviation = features[train].mean(0), features[train].std(0)
    return np.where(deviation > 0, (features - mean) / np.where(deviation > 0, deviation, 1), 0.0)
