"""Features of one run that predict whether the model's answer is right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result
from ...models import Prompt, VisionLanguageModel
from ..attention.contributions import contribution_norms, record_attention, value_bias
from ..attention.contributions_plot import Chart, HeadMap, Line, layers_figure
from ..engine.positions import prompt_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    embeddings = vlm.extend(vlm.embed(prompt), ids)
    recorded, logits = record_attention(vlm, embeddings, (last,), read=range(last, last + len(ids)))
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
