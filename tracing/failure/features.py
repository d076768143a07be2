"""What one run shows about whether the model's answer will be right."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...artefacts.files import load, save
from ...models import Prompt, VisionLanguageModel
from ..attention.contributions import contribution_norms, record_attention, value_bias
from ..groups import prompt_positions

_LAYOUT = "multrace failure features 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class FailureFeatures:
    """What one run shows about whether its answer will be right. Made by `failure_features`."""

    model: str
    """Name or path of the model."""
    question: str
    contributions: Tensor
    """(layer,) float64: what the constraint brings to the last token, the largest of its tokens."""
    head_contributions: Tensor
    """(layer, head) float64: the same for each head by itself."""
    weights: Tensor
    """(layer,) float64: the last token's attention to the constraint, mean over heads, the largest of its tokens."""
    head_weights: Tensor
    """(layer, head) float64: the same for each head by itself."""
    first_token: str
    """The likeliest first token of an answer."""
    first_probability: float
    """Its probability."""
    answer: str | None
    """The answer that was read as a whole, if one was given."""
    answer_probability: float | None
    """The product of its tokens' probabilities, each after the ones before it."""

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "FailureFeatures":
        """What `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)


def failure_features(
    vlm: VisionLanguageModel, prompt: Prompt, *, answer: str | None = None, constraint: str = "constraint"
) -> FailureFeatures:
    """Return what one pass over the prompt shows about whether the model's answer will be right.

    These are the contributions of the constraint to the last token (per layer and per head, each the largest of the
    constraint's tokens), the attention that the constraint receives, and the probability of the likeliest first token.

    Args:
        vlm: The model.
        prompt: The prompt, with a constraint.
        answer: The model's own greedy answer, if the probability of the whole answer is wanted too; it is read in the
            same pass.
        constraint: The token group whose contributions are read.

    Returns:
        A `FailureFeatures`, to be passed to `predict_failure` with those of other prompts.

    Raises:
        TraceError: For a prompt without this constraint.
        ModelError: For an empty answer.

    Source: arXiv 2309.15098 (SAT-Probe); with pictures arXiv 2406.04236, section 5.

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
    """(layer, ...) float64 on the CPU: the largest entry of each last axis."""
    return torch.stack([layer.amax(-1) for layer in values]).double().cpu()


def _problem(features: FailureFeatures) -> str | None:
    heads = features.head_contributions.shape
    fits = len(heads) == 2 and features.head_weights.shape == heads
    fits = fits and features.contributions.shape == features.weights.shape == heads[:1]
    return None if fits else "its tensors are of other shapes than its layers and heads"
