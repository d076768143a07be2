"""Shared parts of the experiments that explain one answer by its image tokens: the answer, the result, the maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import INK, colours_of
from ...artefacts.results import Result
from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError

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


def predicting_logits(vlm: VisionLanguageModel, prompt: Prompt, embeddings: Tensor, count: int) -> Tensor:
    """Return the logits (row, answer token, vocab), float32 or wider, that predict the first `count` answer tokens.

    The embeddings (row, token, hidden) must include at least the token that predicts the last of these answer tokens.
    """
    last = prompt.groups["last"][0]
    return vlm.forward(inputs_embeds=embeddings, positions=range(last, last + count))


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
