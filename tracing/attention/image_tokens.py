"""Explanations of one answer by its image tokens: the base of their results, the maps, and LLaVA-CAM.

LLaVA-CAM takes the relevance of image tokens to the answer from a layer's features and their gradients.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import drawing
from ...artefacts.drawing.styles import INK, colours_of, name_of_model
from ...artefacts.results import Result
from ...models import Prompt, Site, VisionLanguageModel, capture
from ...models.frame import DecoderInput
from ...models.layout import pixel_name
from ..engine.cells import TraceError
from ..engine.positions import group_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_ACROSS, _SIDE = 8, 1.1  # number of square maps in a line, and size in inches of a map with its margins
_CAPTION = 0.22  # height in inches of the caption above a map


def with_answer(vlm: VisionLanguageModel, prompt: Prompt, answer: str | None) -> Prompt:
    """Return the prompt with this answer, or with the model's own greedy answer (None).

    Raises `TraceError` if the model's own answer is empty.
    """
    if answer is None:
        answer = vlm.answers([prompt])[0]
        if not answer:
            raise TraceError(f"the model's own answer to {prompt.question!r} is empty; pass answer= to explain another")
    return prompt.with_answer(answer)


def predicting_logits(vlm: VisionLanguageModel, prompt: Prompt, entering: DecoderInput, count: int) -> Tensor:
    """Return the logits (row, answer token, vocab), float32 or wider, that predict the first `count` answer tokens.

    The input must include at least the token that predicts the last of these answer tokens.
    """
    last = prompt.groups["last"][0]
    return vlm.forward(entering, positions=range(last, last + count))


def reading_fields(vlm: VisionLanguageModel, prompt: Prompt) -> dict[str, Any]:
    """Return the fields by which an `ImageReading` identifies its model and its prompt."""
    return {
        "model": vlm.name,
        "revision": vlm.revision,
        "question": prompt.question,
        "input_ids": tuple(prompt.inputs["input_ids"][0, : prompt.groups["last"][0] + 1].tolist()),
        "image_positions": prompt.groups["image"],
        "patches": patch_places(prompt),
    }


def patch_places(prompt: Prompt) -> tuple[tuple[int, int, int, int], ...]:
    """Return (position, row, column, image) of each image token; empty where they do not form a grid."""
    return tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageReading(Result):
    """The base of results about the image tokens of one prompt, for one answer, in some layers."""

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    input_ids: tuple[int, ...]
    """Ids of the prompt's tokens, without the answer."""
    answer: str
    """The answer that was explained."""
    answer_ids: tuple[int, ...]
    """Ids of the answer tokens that were explained."""
    layers: tuple[int, ...]
    """The decoder layers that were read, in order."""
    image_positions: tuple[int, ...]
    """Token position of each image token."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""

    def over_picture(self, values: Tensor) -> Tensor:
        """Return values (layer, image token) on the patches as (layer, image, row, column).

        Raises `TraceError` if the image tokens form no grid.
        """
        return over_grid(values, self.image_positions, self.patches)

    def _overlay(
        self,
        prompt: Prompt,
        path: str | Path | None,
        overlays: "Sequence[drawing.Overlay]",
        *,
        kind: str,
        titles: tuple[str, str],
        unit: str,
    ) -> "Figure":
        """Return the figure of these overlays. Raises `TraceError` unless the prompt is the one that was read."""
        check_prompt(self, prompt)
        pictures = prompt.seen_pictures()
        figure = drawing.overlays_figure(pictures, overlays, kind=kind, titles=titles, scale=0.0, unit=unit)
        return drawing.finished(figure, path)

    def _rows_of(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the rows of these layers. Raises `TraceError`, which lists the layers, for any other."""
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown or not layers:
            raise TraceError(f"no layers {tuple(layers)} here; pass some of {', '.join(map(str, self.layers))}")
        return tuple(self.layers.index(layer) for layer in layers)

    def _image_columns(self) -> dict[str, Tensor]:
        """Return the position, picture, row and column of each image token; -1 marks a missing grid."""
        places = {position: (image, row, column) for position, row, column, image in self.patches}
        own = torch.tensor([places.get(position, (-1, -1, -1)) for position in self.image_positions])
        columns = dict(zip(("image", "row", "column"), own.unbind(1), strict=True))
        return {"position": torch.tensor(self.image_positions)} | columns


def evenly_spread(layers: Sequence[int], what: str) -> tuple[tuple[int, ...], str]:
    """Return at most four of these layers, evenly spread over the depth, and this rule as a clause for a caption.

    what: the layers in words, such as "layers with heat".
    """
    count = min(4, len(layers))
    shown = tuple(layers[round(step * (len(layers) - 1) / max(count - 1, 1))] for step in range(count))
    return shown, f"{count} of {len(layers)} {what}, evenly spread" if count < len(layers) else f"all {count} {what}"


def over_grid(values: Tensor, positions: Sequence[int], patches: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Return values (..., position) on the patches as (..., image, row, column), NaN where there is no position.

    The patches are (position, row, column, image). Raises `TraceError` if there are no patches, that is, no grid.
    """
    if not patches:
        raise TraceError("the image tokens of this prompt form no grid of patches; read their values one by one")
    sizes = [max(patch[axis] for patch in patches) + 1 for axis in (3, 1, 2)]
    grid = torch.full((*values.shape[:-1], *sizes), torch.nan, dtype=values.dtype)
    index = {position: number for number, position in enumerate(positions)}
    for position, row, column, image in patches:
        if position in index:
            grid[..., image, row, column] = values[..., index[position]]
    return grid


def check_prompt(result: Any, prompt: Prompt) -> None:
    """Raise `TraceError` unless the result was read from this prompt."""
    ids = tuple(prompt.inputs["input_ids"][0, : len(result.input_ids)].tolist())
    if (patch_places(prompt), ids) != (result.patches, result.input_ids):
        raise TraceError(f"this is of another prompt ({result.question!r}); pass the prompt that was read")


def tiles_figure(grid: Tensor, captions: Sequence[str], *, kind: str, titles: tuple[str, str], unit: str) -> "Figure":
    """Return a figure with a small map for each layer of a grid, several pictures side by side.

    Args:
        grid: (layer, image, row, column); NaN is drawn grey.
        captions: The caption above the map of each layer.
        kind: Kind of site, which decides the colours.
        titles: Title and subtitle of the figure.
        unit: Caption of the colour bar.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    images, rows, columns = grid.shape[1:]
    width = _SIDE * min(3.0, columns / rows) * images
    across = min(len(grid), max(1, int(_SIDE * _ACROSS / width + 1e-9)))
    lines = math.ceil(len(grid) / across)
    height = (_SIDE + _CAPTION) * lines
    figure, body = drawing.titled_figure(max(4.5, width * across + 1.0), height, titles)
    places = body.subplots(lines, across * images, squeeze=False)
    colours = ScalarMappable(Normalize(0, max(float(grid.nan_to_num(nan=0).max()), 1e-9)), colours_of(kind))
    for axes in places.flat:
        axes.set_axis_off()
    for index, (layer, caption) in enumerate(zip(grid, captions, strict=True)):
        line, place = divmod(index, across)
        for number, values in enumerate(layer):
            axes = places[line, place * images + number]
            _fill(axes, values, colours)
            if number == 0:
                axes.set_title(caption, fontsize=7, color=INK, loc="left", pad=3)
    drawing.add_colour_bar(colours, list(places.flat), unit, height)
    return figure


def _fill(axes: "Axes", values: Tensor, colours: "ScalarMappable") -> None:
    """Draw one map (row, column) without labels."""
    axes.set_axis_on()
    axes.set_facecolor("#e4e4e4")
    axes.imshow(values.numpy(), cmap=colours.get_cmap(), norm=cast("Normalize", colours.norm), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")


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
            entering = vlm.decoder_input(inputs).cut(answered.length - 1)  # the last answer token predicts nothing more
        watched = entering.with_embeddings(entering.embeddings.requires_grad_())
        logits = predicting_logits(vlm, answered, watched, len(ids))
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
    pixels = inputs[pixel_name(inputs) or "pixel_values"]
    if samples == 0:
        return [pixels]
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(pixels.shape, generator=generator, dtype=torch.float64) for _ in range(samples))
    return [(pixels.cpu().double() + noise * draw).to(pixels) for draw in draws]


def _batch(inputs: Mapping[str, Tensor], copies: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the inputs repeated for each copy, with the pixels of that copy."""
    repeated = {name: torch.cat([value] * len(copies)) for name, value in inputs.items()}
    return repeated | {pixel_name(inputs) or "pixel_values": torch.cat(list(copies))}


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
