"""multrace flow --relevance: which image tokens the answer rests on, and from which layer on it needs them no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from torch import Tensor

from ..models import Prompt
from ..tracing.attention.cam import RelevanceMap, llava_cam
from ..tracing.attention.saliency import AttentionSaliency, AverageSaliency, attention_saliency
from ..tracing.attention.shares import AttentionShare, AverageShare, attention_share
from ..tracing.averages import average
from ..tracing.knockout.average import FilteredQuestion
from ..tracing.pruning.average import AveragePruning
from ..tracing.pruning.pruning import prune_image_tokens
from ..tracing.pruning.result import ImagePruning
from .errors import CommandError
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Asked, Files, Reading, need_image

_FLOWS = 3
"""Maximum number of saliency flows in the text output."""


@dataclass(frozen=True, kw_only=True)
class _Relevance(Reading):
    """A reading that needs a picture."""

    analysis = "relevance"

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question without a picture."""
        need_image(question, self.analysis)


@dataclass(frozen=True, kw_only=True)
class Cam(_Relevance):
    """LLaVA-CAM."""

    name = "cam"
    kind = RelevanceMap
    drawings = ("cam.png", "cam_overlay.png")

    samples: int
    seed: int

    def compute(self, asked: Asked) -> RelevanceMap:
        """Return the relevance of every image token in every layer, for the model's own answer."""
        options = {"samples": self.samples, "seed": self.seed, "progress": asked.progress}
        return llava_cam(asked.vlm, asked.prompt, answer=asked.generated or None, **options)

    def files(self, result: RelevanceMap, prompt: Prompt) -> Files:
        """Return maps of all layers, and some drawn over the picture if its tokens form a grid."""
        over = {"cam_overlay.png": lambda path: result.overlay(prompt, path)} if result.patches else {}
        return {"cam.png": result.plot, **over}

    def told(self, result: RelevanceMap) -> list[str]:
        """Return the layers with relevance."""
        silent = len(result.silent_layers)
        found = f"heat in {len(result.layers) - silent} of {len(result.layers)} layers"
        return [f"LLaVA-CAM for {result.answer.strip()!r}: {found}"]


@dataclass(frozen=True, kw_only=True)
class Share(_Relevance):
    """How the attention of the last token is divided between picture and text."""

    name = "share"
    kind = AttentionShare
    drawings = ("share.png",)
    average_drawings = ("share.png", "share.csv")

    def compute(self, asked: Asked) -> AttentionShare:
        """Return the shares in every layer."""
        return attention_share(asked.vlm, asked.prompt)

    def files(self, result: AttentionShare, prompt: Prompt) -> Files:
        """Return curves by layer."""
        return {"share.png": result.plot}

    def told(self, result: AttentionShare) -> list[str]:
        """Return the attention share of the picture."""
        return [_share_words(result)]

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> AverageShare:
        """Return the mean shares."""
        return average(result for _, result in found)

    def average_told(self, average: AverageShare) -> list[str]:
        """Return the mean attention share of the picture."""
        return [f"{_share_words(average)}, mean over {average.count} prompts"]


@dataclass(frozen=True, kw_only=True)
class Saliency(_Relevance):
    """Attention times gradient."""

    name = "saliency"
    kind = AttentionSaliency
    drawings = ("saliency.png", "saliency_overlay.png")
    average_drawings = ("saliency.png", "saliency.csv")

    def compute(self, asked: Asked) -> AttentionSaliency:
        """Return the saliency of every edge into question and last token, for the model's own answer."""
        return attention_saliency(asked.vlm, asked.prompt, answer=asked.generated or None)

    def files(self, result: AttentionSaliency, prompt: Prompt) -> Files:
        """Return flows between groups by layer, and the strongest layers over the picture if its tokens form a grid."""
        over = {"saliency_overlay.png": lambda path: result.overlay(prompt, path)} if result.patches else {}
        return {"saliency.png": result.plot, **over}

    def told(self, result: AttentionSaliency) -> list[str]:
        """Return the strongest flows."""
        words = [f"{name}: {peak:.3g} in layer {layer}" for name, peak, layer in _strongest(result.flows)]
        return [f"attention x gradient, strongest per edge: {'; '.join(words)}"]

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> AverageSaliency:
        """Return the geometric means of the flows."""
        return average(result for _, result in found)

    def average_told(self, average: AverageSaliency) -> list[str]:
        """Return the strongest flows of the average."""
        words = []
        for name, peak, layer in _strongest({flow: average.of(flow) for flow in average.flows}):
            low, high = (float(end[layer]) for end in average.interval(name)) if average.count > 1 else (nan, nan)
            ends = "" if isnan(low) else f" [{low:.3g}, {high:.3g}]"
            words.append(f"{name}: {peak:.3g}{ends} in layer {layer}")
        over = f"geometric mean over {average.count} prompts"
        return [f"attention x gradient, {over}, strongest per edge: {'; '.join(words)}"]


@dataclass(frozen=True, kw_only=True)
class Pruned(_Relevance):
    """Image tokens dropped from each layer on."""

    name = "pruning"
    kind = ImagePruning
    drawings = ("pruning.png", "pruning_overlay.png")
    average_drawings = ("pruning.png", "pruning.csv")
    uses_engine = True

    keep: tuple[int | str, ...]

    def check_settings(self) -> None:
        """Raises `CommandError` for a negative number of tokens."""
        if wrong := [each for each in self.keep if isinstance(each, int) and each < 0]:
            raise CommandError(f"--keep {wrong[0]}: keep 0 image tokens or more, or all")

    def compute(self, asked: Asked) -> ImagePruning:
        """Probability and free answer for each layer from which tokens are gone."""
        return prune_image_tokens(
            asked.vlm,
            asked.prompt,
            keep=self.keep,
            gold=asked.question.gold,
            generated=asked.generated,
            engine=asked.engine,
            progress=asked.progress,
        )

    def files(self, result: ImagePruning, prompt: Prompt) -> Files:
        """Curves by layer, and which tokens stay if that is some and not all, and they form a grid."""
        counts = result.kept.sum(-1)
        is_part = bool(((counts > 0) & (counts < len(result.image_positions))).any())
        over = {"pruning_overlay.png": lambda path: result.overlay(prompt, path)}
        return {"pruning.png": result.plot, **(over if is_part and result.patches else {})}

    def told(self, result: ImagePruning) -> list[str]:
        """Return the answer with and without the picture, and the layer from which it stays."""
        return ["image tokens dropped", *result.summary().splitlines()[1:]]

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> AveragePruning:
        """Return accuracies and mean probabilities."""
        return average(result for _, result in found)

    def average_told(self, average: AveragePruning) -> list[str]:
        """Return baseline, floor and cliff layers."""
        return average.summary().splitlines()


def _strongest(flows: Mapping[str, Tensor]) -> list[tuple[str, float, int]]:
    """The strongest few flows (layer,), each with its peak and the layer of that; NaN counts as none."""
    found = [(name, *flow.nan_to_num(nan=0).max(0)) for name, flow in flows.items()]
    peaks = [(name, float(peak), int(layer)) for name, peak, layer in found]
    return sorted(peaks, key=lambda each: -each[1])[:_FLOWS]


def _share_words(found: AttentionShare | AverageShare) -> str:
    """The picture's share in the first and last layer, and where it is highest."""
    shares = found.of("image")
    layer, ends = int(shares.argmax()), (float(shares[0]), float(shares[-1]))
    words = f"highest {float(shares[layer]):.1%} in layer {layer}"
    return f"attention of the last token to the picture: {ends[0]:.1%} in layer 0, {words}, {ends[1]:.1%} in the last"
