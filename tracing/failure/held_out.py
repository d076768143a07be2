"""Scores of records by models that never saw them: layers chosen and weights fitted in the other folds only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold
from tqdm import tqdm

from ...artefacts.auroc import auroc

REPEATS = 10
"""How often the records are cut into folds anew."""


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was read for each record."""

    by_layer: dict[str, NDArray]
    """Per quantity (record, layer)."""
    by_head: NDArray
    """(record, feature): everything that was read per layer and head."""
    probability: NDArray
    """(record,)"""


@dataclass(kw_only=True)
class HeldOut:
    """Scores of every record in every cut into folds, and what the models in the other folds looked like."""

    scores: dict[str, NDArray] = field(default_factory=dict)
    """Per name (cut, record)."""
    chosen: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """Per quantity the layers of each fit."""
    kept: dict[str, list[int]] = field(default_factory=dict)
    """Per L1 model the number of features with a weight, of each fit."""

    def add(self, name: str, cut: int, test: NDArray, scores: NDArray) -> None:
        """Keeps the scores (record,) of one test fold of one cut."""
        self.scores.setdefault(name, np.zeros((REPEATS, len(scores))))[cut, test] = scores[test]


def held_out_scores(
    readings: Readings,
    is_right: NDArray,
    *,
    layers: tuple[int, ...] | None,
    folds: int,
    seed: int,
    progress: bool,
) -> HeldOut:
    """Scores by the quantities' chosen layers, by their L1 combination with the probability, and by all heads.

    layers: the same ones in every fold, or None to choose in each training fold the two neighbouring layers whose mean
    tells its right answers from its wrong ones best, for each quantity by itself.
    """
    result, splits = HeldOut(), RepeatedStratifiedKFold(n_splits=folds, n_repeats=REPEATS, random_state=seed)
    parts = splits.split(readings.by_head, is_right)
    bar = tqdm(parts, total=folds * REPEATS, desc="held-out folds", unit="fold", disable=not progress)
    for number, (train, test) in enumerate(bar):
        cut, columns = number // folds, [readings.probability]
        for name, values in readings.by_layer.items():
            window = layers or best_window(values[train], is_right[train])
            result.chosen.setdefault(name, []).append(window)
            columns.append(values[:, list(window)].mean(1))
            scaled = _standardised(columns[-1][:, None], train)  # layers differ in scale, and folds in their layers
            result.add(name, cut, test, scaled[:, 0])
        for name, features in (("combination", np.stack(columns, 1)), ("all heads", readings.by_head)):
            scores, kept = _fitted(features, is_right, train, seed)
            result.add(name, cut, test, scores)
            result.kept.setdefault(name, []).append(kept)
    return result


def best_window(values: NDArray, is_right: NDArray) -> tuple[int, ...]:
    """The two neighbouring layers (one, where there is only one) whose mean (record,) has the largest AUROC.

    values (record, layer). Of equals the first.
    """
    count = values.shape[1]
    windows: Sequence[tuple[int, ...]] = [(layer, layer + 1) for layer in range(count - 1)] or [(0,)]
    return max(windows, key=lambda window: auroc(values[:, list(window)].mean(1), is_right))


def _fitted(features: NDArray, is_right: NDArray, train: NDArray, seed: int) -> tuple[NDArray, int]:
    """(record,) log-odds without their constant, from a fit to the training records, and how many weights it has.

    L1 with SAT-Probe's settings (arXiv 2309.15098). The constant differs from fold to fold with the share of right
    answers in the others, which would rank a fold's records by how few right ones it holds itself.
    """
    scaled = _standardised(features, train)
    model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=0.05, max_iter=1000, random_state=seed)
    model.fit(scaled[train], is_right[train])
    return scaled @ model.coef_[0], int((model.coef_ != 0).sum())


def _standardised(features: NDArray, train: NDArray) -> NDArray:
    """(record, feature) with mean 0 and deviation 1 over the training records; constant features become 0."""
    mean, deviation = features[train].mean(0), features[train].std(0)
    return np.where(deviation > 0, (features - mean) / np.where(deviation > 0, deviation, 1), 0.0)
