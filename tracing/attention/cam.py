"""LLaVA-CAM: the relevance of image tokens to the answer, from a layer's features and their gradients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import drawing
from ...artefacts.drawing.styles import name_of_model
from ...models import Prompt, Site, VisionLanguageModel, capture
from ..engine.positions import group_positions
from ..errors import TraceError
from .image_reading import ImageReading, evenly_spread, predicting_logits, reading_fields, tiles_figure, with_answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COPIES_AT_ONCE = 4
"""Number of noisy copies in one pass, since memory must hold the whole graph of each copy."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RelevanceMap(ImageReading):
    """The relevance of each image token to the answer, by the features of each layer. `llava_cam` returns it."""

    layout: ClassVar[str] = "multrace relevance map 2"

    samples: int
    """Number of noisy copies in the average; 0 if the picture itself was read."""
    noise: float | None
    """Standard deviation of the noise, in units of the processed pixels; None without noise."""
    seed: int | None
    """Random seed of the noise; None without noise."""
    threshold: float
    """Normalised heat below this value is set to zero."""
    heat: Tensor
    """(layer, image token) float64, at least 0: mean over copies, in units of the model's own features and logits."""

    @property
    def normalised(self) -> Tensor:
        """(layer, image token) float64, 0 to 1: the heat divided by the layer's maximum, 0 below the threshold.

        A layer of `silent_layers` is all zeros.
        """
        highest = self.heat.amax(1, keepdim=True)
        shares = self.heat / highest.masked_fill(highest == 0, 1.0)
        return shares.masked_fill(shares < self.threshold, 0.0)

    @property
    def silent_layers(self) -> tuple[int, ...]:
        """The layers without any heat, which have no maximum to divide by."""
        return tuple(layer for layer, heat in zip(self.layers, self.heat, strict=True) if not heat.any())

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with a small map of normalised heat for each layer, without the picture.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        grid = self.over_picture(self.normalised) if self.patches else self.normalised[:, None, None]
        captions = [self._caption(layer) for layer in self.layers]
        return drawing.finished(tiles_figure(grid, captions, kind="mlp", titles=self._titles, unit="heat"), path)

    def overlay(self, prompt: Prompt, path: str | Path | None = None, layers: Sequence[int] | None = None) -> "Figure":
        """Return a figure with the normalised heat over the picture as the model saw it.

        Args:
            prompt: The prompt that was read.
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each; by default at most four layers with heat, evenly spread over the
                depth, as the caption states.

        Raises:
            TraceError: If the prompt is another one, if a layer was not read, or if the image tokens form no grid.
            ArtefactError: If the file cannot be written.
        """
        grid, (title, subtitle) = self.over_picture(self.normalised), self._titles
        if layers is None:
            with_heat = [layer for layer in self.layers if layer not in self.silent_layers]
            layers, rule = evenly_spread(with_heat or self.layers[:1], "layers with heat")
            subtitle += f"\nshown: {rule}" if with_heat else "\nno layer has heat"
        rows = self._rows_of(layers)
        overlays = [drawing.Overlay(title=self._caption(self.layers[row]), values=grid[row]) for row in rows]
        return self._overlay(prompt, path, overlays, kind="mlp", titles=(title, subtitle), unit="heat")

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        return {"layer": self.layers, "image_token": range(len(self.image_positions))}

    def _columns(self) -> Mapping[str, Tensor]:
        return self._image_columns() | {"heat": self.heat, "normalised": self.normalised}

    def _caption(self, layer: int) -> str:
        return f"layer {layer}" + (" (no heat)" if layer in self.silent_layers else "")

    @property
    def _titles(self) -> tuple[str, str]:
        """Title and subtitle of figures."""
        smoothed = f"mean of {self.samples} noisy copies (sigma {self.noise:g})" if self.samples else "not smoothed"
        cutoff = f", heat below {self.threshold:g} left out" if self.threshold else ""
        return (
            self.question,
            f"LLaVA-CAM by decoder layer for {self.answer!r}, each over its maximum; {smoothed}{cutoff}",
        )

    def _lines(self) -> tuple[str, str]:
        with_heat = len(self.layers) - len(self.silent_layers)
        return (
            f"RelevanceMap of {name_of_model(self.model)}: {self.question!r} -> {self.answer!r}",
            f"heat in {with_heat} of {len(self.layers)} layers over {len(self.image_positions)} image tokens",
        )

    def _problem(self) -> str | None:
        fits = self.heat.shape == (len(self.layers), len(self.image_positions))
        if self.samples and self.noise is None:
            return f"it has {self.samples} noisy copies, but no noise"
        return None if fits else "its heat is of another shape than its layers and image tokens"


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
    """Return the Grad-CAM heat of every image token in each decoder layer, for the answer as a whole.

    Let z be the sum of the logits of the answer's tokens (without end-of-sequence), and A the features that the MLP of
    a layer reads at the image tokens, after its norm. Then alpha = mean over image tokens of ReLU(dz/dA), a weight for
    each channel, and heat = ReLU(sum over channels of alpha A). One forward and one backward pass cover all layers.
    Several pictures share the weights and the maximum by which the heat is divided. In the last layer, the input of an
    image token's MLP cannot affect the answer, so the heat is zero unless attention reads the same features (parallel
    families).

    Args:
        vlm: The model.
        prompt: The prompt, with a picture.
        layers: Decoder layers to map; negative ones count from the end (default: all).
        answer: The answer to explain; None takes the model's own greedy answer to the unchanged picture, which is
            explained for the noisy copies as well.
        samples: Number of noisy copies of the processed pixels to average over; 0 takes the picture itself. The paper
            uses 50 copies, and its demo uses none.
        noise: Standard deviation of the noise, in units of the processed pixels.
        seed: Random seed of the noise, which is drawn in float64 on the CPU.
        threshold: Normalised heat below this value is set to zero (0.5 in the published code).
        progress: Show a progress bar over the noisy copies.

    Returns:
        A `RelevanceMap`.

    Raises:
        TraceError: If the prompt has no picture or a setting is out of range.

    Source: LLaVA-CAM, arXiv 2406.06579, section 3.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import llava_cam
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64), "red"), "What colour is this?")
        >>> llava_cam(vlm, prompt, answer="red", layers=[2, 4]).layers
        (2, 4)
    """
    group_positions(prompt, "image")
    layers = _chosen_layers(vlm, layers)
    _check_settings(samples, noise, threshold)
    answered = with_answer(vlm, prompt, answer)
    copies = _copies(answered.inputs, samples, noise, seed)
    heat = torch.zeros(len(layers), len(answered.groups["image"]), dtype=torch.float64)
    with tqdm(total=len(copies), desc="LLaVA-CAM", unit="copy", disable=not progress or samples == 0) as bar:
        for start in range(0, len(copies), _COPIES_AT_ONCE):
            group = copies[start : start + _COPIES_AT_ONCE]
            heat += _heat(vlm, answered, _batch(answered.inputs, group), layers).sum(1) / len(copies)
            bar.update(len(group))
    return RelevanceMap(
        answer=str(answered.answer),
        answer_ids=answered.answer_ids,
        layers=layers,
        samples=samples,
        noise=noise if samples else None,
        seed=seed if samples else None,
        threshold=threshold,
        heat=heat,
        **reading_fields(vlm, answered),
    )


def _heat(vlm: VisionLanguageModel, answered: Prompt, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> Tensor:
    """Return the heat (layer, copy, image token) float64 on the CPU, for each copy in these inputs."""
    sites, image = [Site("mlp", layer) for layer in layers], list(answered.groups["image"])
    ids = list(answered.answer_ids)
    with vlm.gradients(), capture(vlm, sites, inputs=True) as captured:
        with torch.no_grad():
            embeddings = vlm.embeddings(inputs)[:, : answered.length - 1]  # the last answer token predicts nothing more
        logits = predicting_logits(vlm, answered, embeddings.requires_grad_(), len(ids))
        total = logits[:, range(len(ids)), ids].sum()  # copies are independent, so one sum serves all of them
        features = [captured[site] for site in sites]
        gradients = torch.autograd.grad(total, features, materialize_grads=True)
    pairs = zip(features, gradients, strict=True)
    return torch.stack([weighted_heat(*(part.detach()[:, image].double() for part in pair)).cpu() for pair in pairs])


def weighted_heat(features: Tensor, gradients: Tensor) -> Tensor:
    """Return the Grad-CAM heat (copy, image token) of features and gradients (copy, image token, channel).

    Both the weights and the weighted sum are rectified.
    """
    weights = gradients.relu().mean(1, keepdim=True)
    return (weights * features).sum(-1).relu()


def _copies(inputs: Mapping[str, Tensor], samples: int, noise: float, seed: int) -> list[Tensor]:
    """Return the processed pixels unchanged, or the requested number of noisy copies."""
    pixels = inputs["pixel_values"]
    if samples == 0:
        return [pixels]
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(pixels.shape, generator=generator, dtype=torch.float64) for _ in range(samples))
    return [(pixels.cpu().double() + noise * draw).to(pixels) for draw in draws]


def _batch(inputs: Mapping[str, Tensor], copies: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the inputs repeated for each copy, with the pixels of that copy."""
    repeated = {name: torch.cat([value] * len(copies)) for name, value in inputs.items()}
    return repeated | {"pixel_values": torch.cat(list(copies))}


def _chosen_layers(vlm: VisionLanguageModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers counted from the start, without duplicates."""
    requested = range(vlm.layers) if layers is None else layers
    chosen = tuple(dict.fromkeys(vlm.layer_index(layer) for layer in requested))
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
