"""LLaVA-CAM: which image tokens a layer's features and their gradients say that the answer rests on."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture
from ..errors import TraceError
from ..groups import group_positions
from .answering import answered, predicting_logits, read_fields
from .cam_result import RelevanceMap

_COPIES_AT_ONCE = 4
"""How many noisy copies share a pass, whose whole graph lies in memory."""


def llava_cam(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    layers: Sequence[int] | None = None,
    answer: str | None = None,
    samples: int = 0,
    noise: float = 0.1,
    seed: int = 0,
    threshold: float = 0.0,
    progress: bool = True,
) -> RelevanceMap:
    """The Grad-CAM heat of every image token in each decoder layer, for the answer as a whole.

    With z the sum of the logits of the answer's tokens (end-of-sequence not counted) and A what the layer's MLP reads,
    the features after its norm, at the image tokens: alpha = mean over image tokens of ReLU(dz/dA), a weight for each
    channel, and heat = ReLU(sum over channels of alpha A). LLaVA-CAM, arXiv 2406.06579, section 3. All layers come from
    one forward and one backward pass. Several pictures share the weights and the maximum that heat is divided by.
    In the last layer nothing that an image token's MLP reads can reach the answer, so there the heat is zero, unless
    attention reads the same features (parallel families).

    layers: all if None; negative ones count from the end. answer: None for the model's own greedy one to the clean
    picture, which also noisy copies are made to say. samples: how many noisy copies of the processed pixels to average
    over, 0 for the picture itself (the paper has 50, its demo none); noise: standard deviation of what is added to
    them, in units of the processed pixels; drawn in float64 on the CPU from the seed. threshold: normalised heat below
    it counts as none (0.5 in the published code). TraceError for a prompt without a picture or settings out of range.
    """
    group_positions(prompt, "image")
    chosen = _chosen_layers(vlm, layers)
    _check_settings(samples, noise, threshold)
    told = answered(vlm, prompt, answer)
    copies = _copies(told.inputs, samples, noise, seed)
    heat = torch.zeros(len(chosen), len(told.groups["image"]), dtype=torch.float64)
    with tqdm(total=len(copies), desc="LLaVA-CAM", unit="copy", disable=not progress or samples == 0) as bar:
        for group in (copies[start : start + _COPIES_AT_ONCE] for start in range(0, len(copies), _COPIES_AT_ONCE)):
            heat += _heat(vlm, told, _batch(told.inputs, group), chosen).sum(1) / len(copies)
            bar.update(len(group))
    return RelevanceMap(
        answer=told.answer,
        answer_ids=told.answer_ids,
        layers=chosen,
        samples=samples,
        noise=noise if samples else None,
        seed=seed if samples else None,
        threshold=threshold,
        heat=heat,
        **read_fields(vlm, told),
    )


def _heat(vlm: VisionLanguageModel, told: Prompt, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> Tensor:
    """(layer, copy, image token) float64 on the CPU: the heat in each of the copies that these inputs hold."""
    sites, image, ids = [Site("mlp", layer) for layer in layers], list(told.groups["image"]), list(told.answer_ids)
    with torch.no_grad():
        embeddings = vlm.embeddings(inputs)[:, : told.length - 1]  # the answer's last token predicts nothing of it
    with torch.enable_grad(), capture(vlm, sites, inputs=True) as features:
        logits = predicting_logits(vlm, told, embeddings.requires_grad_(), len(ids))
        total = logits[:, range(len(ids)), ids].sum()  # copies do not see each other, so one sum serves all of them
        found = [features[site] for site in sites]
        gradients = torch.autograd.grad(total, found, materialize_grads=True)
    pairs = zip(found, gradients, strict=True)
    return torch.stack([weighted_heat(*(each.detach()[:, image].double() for each in pair)).cpu() for pair in pairs])


def weighted_heat(features: Tensor, gradients: Tensor) -> Tensor:
    """(copy, image token): Grad-CAM of features and gradients (copy, image token, channel), rectified in both steps."""
    weights = gradients.relu().mean(1, keepdim=True)
    return (weights * features).sum(-1).relu()


def _copies(inputs: Mapping[str, Tensor], samples: int, noise: float, seed: int) -> list[Tensor]:
    """The processed pixels as they are, or as many noisy copies of them."""
    pixels = inputs["pixel_values"]
    if samples == 0:
        return [pixels]
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(pixels.shape, generator=generator, dtype=torch.float64) for _ in range(samples))
    return [(pixels.cpu().double() + noise * each).to(pixels) for each in drawn]


def _batch(inputs: Mapping[str, Tensor], copies: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs once for each copy, with its pixels."""
    repeated = {name: torch.cat([value] * len(copies)) for name, value in inputs.items()}
    return repeated | {"pixel_values": torch.cat(list(copies))}


def _chosen_layers(vlm: VisionLanguageModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers counted from the start, each once."""
    asked = range(vlm.layers) if layers is None else layers
    chosen = tuple(dict.fromkeys(vlm.layer_index(layer) for layer in asked))
    if not chosen:
        raise TraceError(f"no layers to map; pass some of 0 to {vlm.layers - 1}, or layers=None for all")
    return chosen


def _check_settings(samples: int, noise: float, threshold: float) -> None:
    if samples < 0:
        raise TraceError(f"{samples} noisy copies; pass how many to average over, or samples=0 for the picture itself")
    if not (math.isfinite(noise) and noise >= 0):
        raise TraceError(f"noise {noise} is no standard deviation; pass one of at least 0, such as 0.1")
    if not 0 <= threshold <= 1:
        raise TraceError(f"threshold {threshold} is no share of the maximum; pass one from 0 to 1, such as 0.5")
