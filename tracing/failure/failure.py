"""Telling from one run whether the model's answer will be right."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...artefacts.auroc import bootstrap_counts, weighted_auroc
from ...models import Prompt, VisionLanguageModel
from ..attention.attended import prompt_positions, value_bias, watch_attention
from ..attention.contributions import layer_norms
from ..errors import TraceError
from .held_out import REPEATS, Readings, held_out_scores
from .result import FailureFeatures, FailurePrediction


def failure_features(
    vlm: VisionLanguageModel, prompt: Prompt, *, answer: str | None = None, constraint: str = "constraint"
) -> FailureFeatures:
    """What one pass over the prompt says about whether the model will be right.

    What the constraint brings to the last token (each layer, each head, the largest of its tokens), the attention that
    it gets, and how probable the model finds its likeliest first token. answer: the model's own greedy answer, if its
    whole probability is wanted too; it is read in the same pass. TraceError for a prompt without this constraint,
    ModelError for an empty answer.
    """
    sources, last = prompt_positions(prompt, constraint), prompt.groups["last"][0]
    ids = prompt.with_answer(answer).answer_ids if answer is not None else (0,)
    embeddings = vlm.extend(vlm.embed(prompt), ids)
    seen, logits = watch_attention(vlm, embeddings, (last,), read=range(last, last + len(ids)))
    logarithms = logits[0].double().log_softmax(-1).cpu()
    norms = [
        layer_norms(vlm, layer, attention, bias, sources)
        for layer, (attention, bias) in enumerate(zip(seen, value_bias(vlm), strict=True))
    ]
    weights = torch.stack([attention.weights[0, :, 0, list(sources)] for attention in seen])
    return FailureFeatures(
        model=vlm.name,
        question=prompt.question,
        contributions=_largest([summed[0] for summed, _ in norms]),
        head_contributions=_largest([heads[:, 0] for _, heads in norms]),
        weights=_largest(list(weights.mean(1))),
        head_weights=_largest(list(weights)),
        first_token=vlm.decode([int(logarithms[0].argmax())]),
        first_probability=float(logarithms[0].max().exp()),
        answer=answer,
        answer_probability=None if answer is None else float(logarithms[range(len(ids)), list(ids)].sum().exp()),
    )


def predict_failure(
    features: Sequence[FailureFeatures],
    is_right: Sequence[bool],
    *,
    layers: Sequence[int] | Literal["half"] | None = None,
    seed: int = 0,
    folds: int = 5,
    progress: bool = False,
) -> FailurePrediction:
    """How well contributions, attention weights and probabilities tell right answers from wrong ones.

    features, is_right: one per answer. layers: whose mean contribution and weight count; "half" for the two in the
    middle of the model (16 and 17 of 32 in arXiv 2406.04236); None chooses two neighbouring ones in each training
    fold, never by the records that are scored. Everything that is chosen or fitted is scored out of fold, and its
    AUROC is the mean over ten stratified cuts into `folds`; intervals come from 2000 bootstrap draws of records within
    right and wrong answers, models not fitted again. L1 models have SAT-Probe's settings (arXiv 2309.15098): C = 0.05,
    which keeps only what tells clearly, and nothing at all where records are few.

    TraceError if all answers are right or all wrong, if a fold could not have one of each, and for features of
    different models or sizes.
    """
    labels = _labels(features, is_right, folds)
    count = len(features[0].contributions)
    numbers = _numbers(layers, count)
    readings = _readings(features)
    found = held_out_scores(readings, labels, layers=numbers, folds=folds, seed=seed, progress=progress)
    scores = found.scores | _unfitted(readings, features, numbers)
    ordered = {name: scores[name] for name in _ORDER if name in scores}
    once, counts = np.ones((1, len(labels))), bootstrap_counts(labels, seed=seed)
    return FailurePrediction(
        model=features[0].model,
        is_right=torch.from_numpy(labels),
        scores={name: torch.from_numpy(values) for name, values in ordered.items()},
        areas=_areas(ordered, labels, once)[:, 0],
        draws=_areas(ordered, labels, counts),
        layers=numbers,
        chosen={name: _tally(windows, count) for name, windows in found.chosen.items()},
        kept={name: torch.tensor(sizes) for name, sizes in found.kept.items()},
        folds=folds,
        repeats=REPEATS,
        seed=seed,
    )


_ORDER = ("contribution", "weight", "answer probability", "whole-answer probability", "combination", "all heads")


def _largest(values: Sequence[Tensor]) -> Tensor:
    """(layer, ...) float64 on the CPU: the largest entry of each last axis."""
    return torch.stack([each.amax(-1) for each in values]).double().cpu()


def _labels(features: Sequence[FailureFeatures], is_right: Sequence[bool], folds: int) -> NDArray:
    """(record,) booleans, after all checks."""
    if len(features) != len(is_right):
        raise TraceError(f"{len(features)} features but {len(is_right)} answers that are right or wrong; pass one each")
    labels = np.array([bool(each) for each in is_right], dtype=bool)
    right = int(labels.sum())
    if right in (0, len(labels)):
        said = "there are no answers" if not len(labels) else f"all {len(labels)} answers are {_said(bool(right))}"
        raise TraceError(f"{said}, so there is nothing to predict; pass answers of both kinds")
    fewest = min(right, len(labels) - right)
    if folds < 2 or fewest < folds:
        raise TraceError(
            f"{fewest} {_said(2 * right <= len(labels))} of {len(labels)} answers are too few for {folds} folds, which "
            "need one each and are at least 2; pass more answers or another number of folds"
        )
    kinds = {(each.model, each.head_contributions.shape, each.answer_probability is None) for each in features}
    if len(kinds) > 1:
        raise TraceError("these features are of different models or sizes, or only some have a whole answer's "
                         "probability; pass features that were read alike")  # fmt: skip
    return labels


def _said(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _numbers(layers: Sequence[int] | Literal["half"] | None, count: int) -> tuple[int, ...] | None:
    """The fixed layers counted from the start."""
    if layers is None:
        return None
    if layers == "half":
        return tuple(sorted({count // 2, min(count // 2 + 1, count - 1)}))
    if isinstance(layers, str) or not layers or not all(-count <= layer < count for layer in layers):
        raise TraceError(f"no layers {layers!r} in these features; pass some of 0 to {count - 1}, 'half' or None")
    return tuple(sorted({layer % count for layer in layers}))


def _readings(features: Sequence[FailureFeatures]) -> Readings:
    def stacked(name: str) -> NDArray:
        return torch.stack([getattr(each, name) for each in features]).flatten(1).numpy()

    return Readings(
        by_layer={"contribution": stacked("contributions"), "weight": stacked("weights")},
        by_head=np.concatenate([stacked("head_contributions"), stacked("head_weights")], 1),
        probability=np.array([each.first_probability for each in features]),
    )


def _unfitted(
    readings: Readings, features: Sequence[FailureFeatures], layers: tuple[int, ...] | None
) -> dict[str, NDArray]:
    """Scores (1, record) that nothing was chosen or fitted for, as they were read."""
    scores = {"answer probability": readings.probability}
    if layers is not None:
        scores |= {name: values[:, list(layers)].mean(1) for name, values in readings.by_layer.items()}
    if features[0].answer_probability is not None:
        scores["whole-answer probability"] = np.array([each.answer_probability for each in features])
    return {name: values[None] for name, values in scores.items()}


def _areas(scores: dict[str, NDArray], labels: NDArray, counts: NDArray) -> Tensor:
    """(score, draw) float64: AUROC of each score, mean over cuts, in samples that hold each record so many times."""
    means = [np.mean([weighted_auroc(cut, labels, counts) for cut in cuts], 0) for cuts in scores.values()]
    return torch.from_numpy(np.stack(means))


def _tally(windows: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """(layer,): in how many fits each layer was chosen."""
    return torch.bincount(torch.tensor([layer for window in windows for layer in window]), minlength=count)
