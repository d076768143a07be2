"""multrace flow --contributions: what attention brings from picture to constraint to answer, and what it foretells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..models import Prompt
from ..tracing import TraceError
from ..tracing.attention.contributions import AverageContributions, attention_contributions
from ..tracing.attention.contributions_result import AttentionContributions
from ..tracing.averages import average
from ..tracing.failure.prediction import FailureFeatures, failure_features, predict_failure
from ..tracing.failure.result import FailurePrediction
from ..tracing.knockout.average import FilteredQuestion
from .errors import CommandError
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Asked, Files, Reading, need_constraint, need_image

_SHARE = 0.8
_FOLDS = 5
_BINS = 16
_NAMED = 16
"""Maximum number of image tokens that are listed one by one."""


@dataclass(frozen=True, kw_only=True)
class _Contributions(Reading):
    """Attention contributions to a group of tokens."""

    analysis = "contributions"
    kind = AttentionContributions
    counts_wrong = True
    queries: ClassVar[str]
    sources: ClassVar[str]

    by_head: bool
    """Keep the weights of each head; otherwise their mean over heads, which takes a small part of the memory."""

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question without a constraint."""
        need_constraint(question, self.analysis)

    def compute(self, asked: Asked) -> AttentionContributions:
        """Return the contributions in every layer."""
        found = attention_contributions(
            asked.vlm,
            asked.prompt,
            queries=self.queries,
            sources=self.sources,
            by_head=self.by_head,
            progress=asked.progress,
        )
        return found if self.by_head else replace(found, weights=found.weights.mean(1, keepdim=True))

    def average(
        self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]
    ) -> AverageContributions:
        """Return the mean contributions by layer."""
        return average((result for _, result in found), share=_SHARE)


@dataclass(frozen=True, kw_only=True)
class ToLast(_Contributions):
    """From every token to the last one, which gives the answer."""

    name = "contributions"
    drawings = ("contributions.png",)
    average_drawings = ("contributions.png", "contributions.csv")
    queries, sources = "last", "all"

    def files(self, result: AttentionContributions, prompt: Prompt) -> Files:
        """Return curves by layer, and maps by head."""
        return {"contributions.png": result.plot}

    def told(self, result: AttentionContributions) -> list[str]:
        """Return the layer in which the constraint contributes most to the last token."""
        values = result.by_layer("constraint")
        layer = int(values.argmax())
        return [f"constraint to last token: longest contribution {float(values[layer]):.3g}, in layer {layer}"]

    def average_told(self, average: AverageContributions) -> list[str]:
        """Return the same for the average."""
        values = average.by_layer("constraint")
        layer, ends = int(values.argmax()), ""
        if average.count > 1:
            ends = " [{:.3g}, {:.3g}]".format(*(float(end[layer]) for end in average.interval("constraint")))
        return [
            f"constraint to last token, mean over {average.count} prompts: longest contribution "
            f"{float(values[layer]):.3g}{ends}, in layer {layer}"
        ]


@dataclass(frozen=True, kw_only=True)
class ImageToConstraint(_Contributions):
    """From the image tokens to the constraint."""

    name = "image_to_constraint"
    drawings = ("image_to_constraint.png", "image_tokens.png")
    average_drawings = ("image_to_constraint.png", "image_to_constraint.csv", "image_tokens.png")
    queries, sources = "constraint", "image"

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question without a picture or a constraint."""
        need_image(question, self.analysis)
        super().check(question)

    def files(self, result: AttentionContributions, prompt: Prompt) -> Files:
        """Return the strongest layers over the picture, if its tokens form a grid, and contributions by token index."""
        mass, draw = result.image_mass(), (lambda path: result.overlay(prompt, path)) if result.patches else result.plot
        layers, bins = _first_and_strongest(mass.sum(1)), min(_BINS, mass.shape[1])
        return {
            "image_to_constraint.png": draw,
            "image_tokens.png": lambda path: result.plot_histogram(path, layers, bins),
        }

    def told(self, result: AttentionContributions) -> list[str]:
        """Return the image tokens with most of the picture's contribution, in the layer where it is largest."""
        mass = result.image_mass()
        layer = int(mass.sum(1).argmax())
        count = result.tokens_for(_SHARE, layer=layer)
        indices = mass[layer].argsort(descending=True)[:count].sort().values.tolist()
        words = ", ".join(map(str, indices[:_NAMED])) + (", ..." if count > _NAMED else "")
        return [
            f"image to constraint: strongest in layer {layer}, where {count} of {mass.shape[1]} image tokens hold "
            f"{_SHARE:.0%}, by index {words}"
        ]

    def average_files(self, average: AverageContributions) -> Files:
        """Return the files of the base class, and contributions by token index."""
        files = super().average_files(average)
        if average.image_shares is None or average.image_count is None:
            return files
        layers = _first_and_strongest(average.by_layer("image"))
        return files | {"image_tokens.png": lambda path: average.plot_histogram(path, layers=layers)}

    def average_told(self, average: AverageContributions) -> list[str]:
        """Return how many image tokens hold most of the picture's contribution."""
        layer = int(average.by_layer("image").argmax())
        if average.image_tokens is None:
            return []
        of = "" if average.image_count is None else f" of {average.image_count}"
        return [
            f"image to constraint, mean over {average.count} prompts: strongest in layer {layer}, where "
            f"{float(average.image_tokens.mean[layer]):.1f}{of} image tokens hold {average.share:.0%}"
        ]


@dataclass(frozen=True, kw_only=True)
class Failure(Reading):
    """Features of one run that may tell whether its answer is right; the average measures how well they do."""

    name, analysis = "failure", "contributions"
    kind = FailureFeatures
    counts_wrong = True
    drawings = ()
    average_drawings = ("failure.png", "failure.csv")

    seed: int

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question without a constraint or a right answer."""
        need_constraint(question, self.analysis)
        if question.gold is None:
            raise CommandError("failure prediction needs the right answer; write 'answer' into the record")

    def compute(self, asked: Asked) -> FailureFeatures:
        """Return contributions of the constraint, attention to it, and probabilities."""
        return failure_features(asked.vlm, asked.prompt, answer=asked.generated or None)

    def files(self, result: FailureFeatures, prompt: Prompt) -> Files:
        """Return no files: a single run shows little."""
        return {}

    def told(self, result: FailureFeatures) -> list[str]:
        """Return the probabilities."""
        return [f"probability of the first token {result.first_token!r}: {result.first_probability:.3g}"]

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> FailurePrediction:
        """Return how well right answers are told from wrong ones, with fewer folds if one kind is rare."""
        if not found:
            raise TraceError("there are no answers, so there is nothing to predict")
        right = [answered.is_right for answered, _ in found]
        fewest = min(right.count(True), right.count(False))
        features = _alike([result for _, result in found])
        return predict_failure(features, right, folds=max(2, min(_FOLDS, fewest)), seed=self.seed, progress=True)

    def average_told(self, average: FailurePrediction) -> list[str]:
        """Return every area under the curve."""
        return average.summary().splitlines()


def _alike(features: Sequence[FailureFeatures]) -> list[FailureFeatures]:
    """Drop the probabilities of whole answers if one answer is empty, since all must have them or none."""
    if all(each.answer_probability is not None for each in features):
        return list(features)
    return [replace(each, answer=None, answer_probability=None) for each in features]


def _first_and_strongest(values: Tensor) -> tuple[int, ...]:
    """The first layer, and the three layers of (layer,) with the largest values."""
    return tuple(sorted({0, *values[1:].topk(min(3, len(values) - 1)).indices.add(1).tolist()}))
