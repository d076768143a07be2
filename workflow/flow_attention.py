"""The readings of attention: contributions, failure that they foretell, and which image tokens the answer rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan
from typing import Any, ClassVar

from torch import Tensor

from ..artefacts import ArtefactError
from ..data import Question
from ..data.errors import gist
from ..models import Prompt
from ..tracing import (
    AttentionContributions,
    AttentionSaliency,
    AttentionShare,
    FailureFeatures,
    ImagePruning,
    RelevanceMap,
    TraceError,
    attention_contributions,
    attention_saliency,
    attention_share,
    failure_features,
    llava_cam,
    predict_failure,
    prune_image_tokens,
)
from .analysis import Summary
from .flow_readings import AskedQuestion, Files, FlowReading, ReadingAverage, need_constraint, need_image, table_file
from .run_folder import StoredRecord

_SHARE = 0.8
_BINS = 16
_LISTED = 16
"""Maximum number of image tokens that are listed one by one."""
_STRONGEST = 3
"""Maximum number of saliency flows in the text output."""
_FOLDS = 5


# ---- attention contributions ----


@dataclass(frozen=True, kw_only=True)
class _ContributionsReading(FlowReading):
    """Attention contributions to a group of tokens."""

    analysis = "contributions"
    kind = AttentionContributions
    counts_wrong = True
    queries: ClassVar[str]
    sources: ClassVar[str]

    by_head: bool
    """Keep the weights of each head; otherwise their mean over heads, which takes a small part of the memory."""

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question without a constraint."""
        need_constraint(question, self.analysis)

    def experiment(self, asked: AskedQuestion) -> Callable[[], AttentionContributions]:
        """Return the call for the contributions in every layer."""
        options = {"queries": self.queries, "sources": self.sources, "progress": asked.progress}
        return partial(attention_contributions, asked.vlm, asked.prompt, by_head=self.by_head, **options)

    def reduced(self, result: AttentionContributions) -> AttentionContributions:
        """Return the contributions with their weights by head or, if that is not asked for, averaged over heads."""
        return result if self.by_head else replace(result, weights=result.weights.mean(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class LastTokenReading(_ContributionsReading):
    """Contributions of every token to the last one, which gives the answer."""

    name = "contributions"
    queries, sources = "last", "all"

    def files(self, result: AttentionContributions, prompt: Prompt) -> Files:
        """Return curves by layer, and maps by head."""
        return {"contributions.png": result.plot}

    def lines(self, result: AttentionContributions) -> list[str]:
        """Return the layer in which the constraint contributes most to the last token."""
        values = result.by_layer("constraint")
        layer = int(values.argmax())
        return [f"constraint to last token: longest contribution {float(values[layer]):.3g}, in layer {layer}"]

    def row(self, result: AttentionContributions) -> dict[str, Any]:
        """Return the longest contribution of the constraint and its layer."""
        values = result.by_layer("constraint")
        return {"constraint_contribution": float(values.max()), "constraint_layer": int(values.argmax())}

    def average(self) -> ReadingAverage:
        """Return the mean contributions by layer."""
        return ReadingAverage(self, words=_last_token_words, share=_SHARE)


def _last_token_words(average: Any) -> list[str]:
    """The layer in which the constraint contributes most to the last token."""
    values = average.by_layer("constraint")
    layer, ends = int(values.argmax()), ""
    if average.count > 1:
        ends = " [{:.3g}, {:.3g}]".format(*(float(end[layer]) for end in average.interval("constraint")))
    return [
        f"constraint to last token, mean over {average.count} prompts: longest contribution "
        f"{float(values[layer]):.3g}{ends}, in layer {layer}"
    ]


@dataclass(frozen=True, kw_only=True)
class ConstraintReading(_ContributionsReading):
    """Contributions of the image tokens to the constraint."""

    name = "image_to_constraint"
    queries, sources = "constraint", "image"

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question without a picture or a constraint."""
        need_image(question, self.analysis)
        super().check(question)

    def files(self, result: AttentionContributions, prompt: Prompt) -> Files:
        """Return the strongest layers over the picture, if its tokens form a grid, and contributions by token index."""
        mass, draw = result.image_mass(), partial(result.overlay, prompt) if result.patches else result.plot
        layers, bins = _first_and_strongest(mass.sum(1)), min(_BINS, mass.shape[1])
        return {
            "image_to_constraint.png": draw,
            "image_tokens.png": partial(result.plot_histogram, layers=layers, bins=bins),
        }

    def lines(self, result: AttentionContributions) -> list[str]:
        """Return the image tokens with most of the picture's contribution, in the layer where it is largest."""
        mass = result.image_mass()
        layer = int(mass.sum(1).argmax())
        count = result.tokens_for(_SHARE, layer=layer)
        indices = mass[layer].argsort(descending=True)[:count].sort().values.tolist()
        words = ", ".join(map(str, indices[:_LISTED])) + (", ..." if count > _LISTED else "")
        return [
            f"image to constraint: strongest in layer {layer}, where {count} of {mass.shape[1]} image tokens hold "
            f"{_SHARE:.0%}, by index {words}"
        ]

    def row(self, result: AttentionContributions) -> dict[str, Any]:
        """Return the layer where the picture contributes most to the constraint and how many tokens hold most of it."""
        layer = int(result.image_mass().sum(1).argmax())
        return {"image_layer": layer, "image_tokens": result.tokens_for(_SHARE, layer=layer)}

    def average(self) -> ReadingAverage:
        """Return the mean contributions by layer, and by token index if the pictures have equally many."""
        return ReadingAverage(self, files=_image_histogram, words=_image_words, share=_SHARE)


def _image_histogram(average: Any) -> Files:
    """The contributions by token index, if the pictures have equally many tokens."""
    if average.image_shares is None or average.image_count is None:
        return {}
    layers = _first_and_strongest(average.by_layer("image"))
    return {"image_tokens.png": partial(average.plot_histogram, layers=layers)}


def _image_words(average: Any) -> list[str]:
    """How many image tokens hold most of the picture's contribution."""
    layer = int(average.by_layer("image").argmax())
    if average.image_tokens is None:
        return []
    of = "" if average.image_count is None else f" of {average.image_count}"
    return [
        f"image to constraint, mean over {average.count} prompts: strongest in layer {layer}, where "
        f"{float(average.image_tokens.mean[layer]):.1f}{of} image tokens hold {average.share:.0%}"
    ]


def _first_and_strongest(values: Tensor) -> tuple[int, ...]:
    """The first layer, and the three layers of (layer,) with the largest values."""
    return tuple(sorted({0, *values[1:].topk(min(3, len(values) - 1)).indices.add(1).tolist()}))


@dataclass(frozen=True, kw_only=True)
class FailureReading(FlowReading):
    """Features of one run that may tell whether its answer is right; the average measures how well they do."""

    name, analysis = "failure", "contributions"
    kind = FailureFeatures  # type: ignore[assignment]
    counts_wrong = True

    seed: int

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question without a constraint or a right answer."""
        need_constraint(question, self.analysis)
        if question.answer is None:
            raise TraceError("failure prediction needs the right answer; write 'answer' into the record")

    def experiment(self, asked: AskedQuestion) -> Callable[[], FailureFeatures]:
        """Return the call for contributions of the constraint, attention to it, and probabilities."""
        return partial(failure_features, asked.vlm, asked.prompt, answer=asked.generated or None)

    def lines(self, result: FailureFeatures) -> list[str]:
        """Return the probability of the first token."""
        return [f"probability of the first token {result.first_token!r}: {result.first_probability:.3g}"]

    def row(self, result: FailureFeatures) -> dict[str, Any]:
        """Return the probability of the first token."""
        return {"first_probability": float(result.first_probability)}

    def average(self) -> Summary:
        """Return how well right answers are told from wrong ones."""
        return FailureSummary(self)


class FailureSummary(Summary):
    """The prediction of failure from the features of all questions, which are a few numbers per layer each."""

    def __init__(self, reading: FailureReading) -> None:
        self.seed = reading.seed
        self.features: list[FailureFeatures] = []
        self.is_right: list[bool] = []
        self.value: Any = None
        self.problem = ""

    def add(self, record: StoredRecord) -> None:
        """Keep the features of a question."""
        if record.has("failure"):
            self.features.append(record.load("failure", FailureFeatures))  # type: ignore[type-var]
            self.is_right.append(bool(record.row["right"]))

    def files(self) -> Files:
        """Return the prediction, its figure and its table; nothing if there is too little to predict."""
        try:
            self.value = self._prediction()
        except (TraceError, ArtefactError) as error:
            self.problem = gist(error)
            return {}
        return {
            "failure.safetensors": self.value.save,
            "failure.png": self.value.plot,
            "failure.csv": table_file(self.value),
        }

    def lines(self) -> list[str]:
        """Return every area under the curve, or why there is none."""
        if self.value is None:
            return [f"no average of failure: {self.problem}"]
        return ["failure", *(f"  {line}" for line in self.value.summary().splitlines())]

    def _prediction(self) -> Any:
        """The prediction, with fewer folds if one kind of answer is rare."""
        if not self.features:
            raise TraceError("there are no answers, so there is nothing to predict")
        fewest = min(self.is_right.count(True), self.is_right.count(False))
        features = self.features
        if any(each.answer_probability is None for each in features):  # all must have whole answers or none
            features = [replace(each, answer=None, answer_probability=None) for each in features]
        folds = max(2, min(_FOLDS, fewest))
        return predict_failure(features, self.is_right, folds=folds, seed=self.seed, progress=False)


# ---- relevance of image tokens ----


@dataclass(frozen=True, kw_only=True)
class _RelevanceReading(FlowReading):
    """A reading that needs a picture."""

    analysis = "relevance"

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question without a picture."""
        need_image(question, self.analysis)


@dataclass(frozen=True, kw_only=True)
class CamReading(_RelevanceReading):
    """LLaVA-CAM; it has no average."""

    name = "cam"
    kind = RelevanceMap
    always_drawn = True

    samples: int
    seed: int

    def check_settings(self) -> None:
        """Raise `TraceError` for a negative number of noisy copies."""
        if self.samples < 0:
            raise TraceError(f"no {self.samples} noisy copies to average over; pass 0 or more")

    def experiment(self, asked: AskedQuestion) -> Callable[[], RelevanceMap]:
        """Return the call for the relevance of each image token in each layer, for the model's own answer."""
        options = {"samples": self.samples, "seed": self.seed, "progress": asked.progress}
        return partial(llava_cam, asked.vlm, asked.prompt, answer=asked.generated or None, **options)

    def files(self, result: RelevanceMap, prompt: Prompt) -> Files:
        """Return maps of all layers, and some drawn over the picture if its tokens form a grid."""
        over = {"cam_overlay.png": partial(result.overlay, prompt)} if result.patches else {}
        return {"cam.png": result.plot, **over}

    def lines(self, result: RelevanceMap) -> list[str]:
        """Return the number of layers with relevance."""
        silent = len(result.silent_layers)
        heat = f"heat in {len(result.layers) - silent} of {len(result.layers)} layers"
        return [f"LLaVA-CAM for {result.answer.strip()!r}: {heat}"]

    def average(self) -> None:
        """Return None: maps of different pictures are not averaged."""


@dataclass(frozen=True, kw_only=True)
class ShareReading(_RelevanceReading):
    """How the attention of the last token is divided between picture and text."""

    name = "share"
    kind = AttentionShare

    def experiment(self, asked: AskedQuestion) -> Callable[[], AttentionShare]:
        """Return the call for the shares in every layer."""
        return partial(attention_share, asked.vlm, asked.prompt)

    def files(self, result: AttentionShare, prompt: Prompt) -> Files:
        """Return curves by layer."""
        return {"share.png": result.plot}

    def lines(self, result: AttentionShare) -> list[str]:
        """Return the attention share of the picture."""
        return [_share_words(result)]

    def row(self, result: AttentionShare) -> dict[str, Any]:
        """Return the largest attention share of the picture and its layer."""
        shares = result.of("image")
        return {"image_share": float(shares.max()), "image_share_layer": int(shares.argmax())}

    def average(self) -> ReadingAverage:
        """Return the mean shares."""
        return ReadingAverage(self, words=lambda value: [f"{_share_words(value)}, mean over {value.count} prompts"])


@dataclass(frozen=True, kw_only=True)
class SaliencyReading(_RelevanceReading):
    """Attention times gradient."""

    name = "saliency"
    kind = AttentionSaliency

    def experiment(self, asked: AskedQuestion) -> Callable[[], AttentionSaliency]:
        """Return the call for the saliency of each edge into question and last token, for the model's answer."""
        return partial(attention_saliency, asked.vlm, asked.prompt, answer=asked.generated or None)

    def files(self, result: AttentionSaliency, prompt: Prompt) -> Files:
        """Return flows between groups by layer, and the strongest layers over the picture if its tokens form a grid."""
        over = {"saliency_overlay.png": partial(result.overlay, prompt)} if result.patches else {}
        return {"saliency.png": result.plot, **over}

    def lines(self, result: AttentionSaliency) -> list[str]:
        """Return the strongest flows."""
        words = [f"{name}: {peak:.3g} in layer {layer}" for name, peak, layer in _strongest(result.flows)]
        return [f"attention x gradient, strongest per edge: {'; '.join(words)}"]

    def average(self) -> ReadingAverage:
        """Return the geometric means of the flows."""
        return ReadingAverage(self, words=_saliency_words)


def _saliency_words(average: Any) -> list[str]:
    """The strongest flows of the average."""
    words = []
    for name, peak, layer in _strongest({flow: average.of(flow) for flow in average.flows}):
        low, high = (float(end[layer]) for end in average.interval(name)) if average.count > 1 else (nan, nan)
        ends = "" if isnan(low) else f" [{low:.3g}, {high:.3g}]"
        words.append(f"{name}: {peak:.3g}{ends} in layer {layer}")
    over = f"geometric mean over {average.count} prompts"
    return [f"attention x gradient, {over}, strongest per edge: {'; '.join(words)}"]


@dataclass(frozen=True, kw_only=True)
class PruningReading(_RelevanceReading):
    """Image tokens dropped from each layer on."""

    name = "pruning"
    kind = ImagePruning

    keep: tuple[int | str, ...]

    def check_settings(self) -> None:
        """Raise `TraceError` for a negative number of tokens."""
        if wrong := [each for each in self.keep if isinstance(each, int) and each < 0]:
            raise TraceError(f"{wrong[0]} image tokens cannot be kept; keep 0 or more, or all")

    def experiment(self, asked: AskedQuestion) -> Callable[[], ImagePruning]:
        """Return the call for probability and free answer for each layer from which tokens are gone."""
        return partial(
            prune_image_tokens,
            asked.vlm,
            asked.prompt,
            keep=self.keep,
            gold=asked.question.answer,
            generated=asked.generated,
            engine=asked.engine,
            progress=asked.progress,
        )

    def files(self, result: ImagePruning, prompt: Prompt) -> Files:
        """Return curves by layer, and which tokens stay if that is some and not all, and they form a grid."""
        counts = result.kept.sum(-1)
        is_part = bool(((counts > 0) & (counts < len(result.image_positions))).any())
        over = {"pruning_overlay.png": partial(result.overlay, prompt)}
        return {"pruning.png": result.plot, **(over if is_part and result.patches else {})}

    def lines(self, result: ImagePruning) -> list[str]:
        """Return the answer with and without the picture, and the layer from which it stays."""
        return ["image tokens dropped", *result.summary().splitlines()[1:]]

    def row(self, result: ImagePruning) -> dict[str, Any]:
        """Return the answer's probability with every image token and with none."""
        return {"pruning_baseline": float(result.baseline[0]), "pruning_floor": float(result.floor[0])}

    def average(self) -> ReadingAverage:
        """Return accuracies and mean probabilities."""
        return ReadingAverage(self, words=lambda value: value.summary().splitlines())


def _strongest(flows: Mapping[str, Tensor]) -> list[tuple[str, float, int]]:
    """The strongest few flows (layer,), each with its peak and the layer of that; NaN counts as none."""
    peaks = [(name, *flow.nan_to_num(nan=0).max(0)) for name, flow in flows.items()]
    values = [(name, float(peak), int(layer)) for name, peak, layer in peaks]
    return sorted(values, key=lambda value: -value[1])[:_STRONGEST]


def _share_words(result: Any) -> str:
    """The picture's share in the first and last layer, and where it is highest."""
    shares = result.of("image")
    layer, ends = int(shares.argmax()), (float(shares[0]), float(shares[-1]))
    words = f"highest {float(shares[layer]):.1%} in layer {layer}"
    return f"attention of the last token to the picture: {ends[0]:.1%} in layer 0, {words}, {ends[1]:.1%} in the last"
