"""Prediction of whether answers are right from features of their runs; every score is out of fold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...artefacts.statistics import auroc, bootstrap_counts, weighted_auroc
from ..errors import TraceError
from .features import FailureFeatures
from .result import FailurePrediction

REPEATS = 10
"""Number of cuts of the records into folds."""
_ORDER = ("contribution", "weight", "answer probability", "whole-answer probability", "combination", "all heads")


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
