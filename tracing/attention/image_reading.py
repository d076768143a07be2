"""What the experiments that explain one answer by its image tokens share: the answer, the result, the maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from ...artefacts.drawing.figure import (
    INK,
    check_format,
    colours_of,
    draw_bar,
    new_figure,
    wrap,
    write_figure,
    write_titles,
)
from ...artefacts.drawing.overlay import Overlay, draw_overlays
from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError


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

    The embeddings (row, token, hidden) must reach at least to the token that predicts the last of them.
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


_ACROSS, _SIDE, _SPACE = 8, 0.98, 0.14  # square maps in a line, inches of a map and between maps
_CAPTION, _GAP = 0.22, 0.06  # inches above a map, and between the pictures of one


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageReading:
    """What one run says about the image tokens of one prompt, for one answer, in some layers."""

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    input_ids: tuple[int, ...]
    """The prompt's tokens as the model reads them, without the answer."""
    answer: str
    """The answer that was explained."""
    answer_ids: tuple[int, ...]
    """The tokens of it that counted."""
    layers: tuple[int, ...]
    """The decoder layers that were read, in order."""
    image_positions: tuple[int, ...]
    """Token position of each image token."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""

    def over_picture(self, values: Tensor) -> Tensor:
        """(layer, image, row, column): values (layer, image token) on the grids of patches; TraceError for no grid."""
        return over_grid(values, self.image_positions, self.patches)

    def _draw_over(
        self,
        path: str | Path,
        prompt: Prompt,
        overlays: Sequence[Overlay],
        *,
        kind: str,
        titles: tuple[str, str],
        unit: str,
    ) -> Path:
        """The written picture of these overlays. TraceError for another prompt than the one that was read."""
        check_prompt(self, prompt)
        return draw_overlays(path, prompt.seen_pictures(), overlays, kind=kind, titles=titles, scale=0.0, unit=unit)

    def _rows_of(self, layers: Sequence[int] | None, candidates: Sequence[int]) -> tuple[int, ...]:
        """Rows of these layers; if None, of at most four of the candidates, as far apart as can be."""
        if layers is None:
            among = tuple(candidates) or self.layers
            steps = min(4, len(among))
            layers = [among[round(step * (len(among) - 1) / max(steps - 1, 1))] for step in range(steps)]
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown or not layers:
            raise TraceError(f"no layers {tuple(layers)} here; pass some of {', '.join(map(str, self.layers))}")
        return tuple(self.layers.index(layer) for layer in layers)

    def _image_columns(self) -> dict[str, Tensor]:
        """Per image token its position, picture, row and column, which are -1 where there is no grid."""
        places = {position: (image, row, column) for position, row, column, image in self.patches}
        found = torch.tensor([places.get(position, (-1, -1, -1)) for position in self.image_positions])
        columns = dict(zip(("image", "row", "column"), found.unbind(1), strict=True))
        return {"position": torch.tensor(self.image_positions)} | columns


def over_grid(values: Tensor, positions: Sequence[int], patches: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """(..., image, row, column): values (..., position) on the patches, NaN where no position is.

    patches: (position, row, column, image). TraceError where image tokens form no grid.
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
    """Raises `TraceError` for another prompt than the one that the result was read from."""
    ids = tuple(prompt.inputs["input_ids"][0, : len(result.input_ids)].tolist())
    if (patch_places(prompt), ids) != (result.patches, result.input_ids):
        raise TraceError(f"this is of another prompt ({result.question!r}); pass the prompt that was read")


def draw_tiles(
    path: str | Path, grid: Tensor, captions: Sequence[str], *, kind: str, titles: tuple[str, str], unit: str
) -> Path:
    """The written picture: a small map for each layer of a grid (layer, image, row, column), pictures side by side.

    captions: what stands above each. TraceError for another format than png, pdf or svg, or a place that cannot be
    written.
    """
    check_format(path)
    images, rows, columns = grid.shape[1:]
    each = _SIDE * min(3.0, columns / rows)
    wide = (each + _GAP) * images - _GAP
    across = min(len(grid), max(1, int((_SIDE + _SPACE) * _ACROSS / (wide + _SPACE) + 1e-9)))
    lines = math.ceil(len(grid) / across)
    width = max(4.5, 0.15 + (wide + _SPACE) * across + 0.85)
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.3 + 0.21 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + (_SIDE + _CAPTION + _SPACE) * lines
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    colours = ScalarMappable(Normalize(0, max(float(grid.nan_to_num(nan=0).max()), 1e-9)), colours_of(kind))
    for index, (layer, caption) in enumerate(zip(grid, captions, strict=True)):
        line, place = divmod(index, across)
        lower = height - top - (_SIDE + _CAPTION + _SPACE) * line - _CAPTION - _SIDE
        for number, picture in enumerate(layer):
            start = 0.15 + (wide + _SPACE) * place + (each + _GAP) * number
            axes = figure.add_axes((start / width, lower / height, each / width, _SIDE / height))
            _fill(axes, picture, colours)
            if number == 0:
                axes.set_title(caption, fontsize=7, color=INK, loc="left", pad=3)
    start, lower = 0.15 + (wide + _SPACE) * across + 0.1, height - top - _CAPTION - _SIDE
    bar = figure.add_axes((start / width, lower / height, 0.1 / width, 0.8 / height))
    draw_bar(bar, colours, unit)
    return write_figure(path, figure)


def _fill(axes: Axes, values: Tensor, colours: ScalarMappable) -> None:
    """One map (row, column), nothing else around it."""
    axes.set_facecolor("#e4e4e4")
    axes.imshow(values.numpy(), cmap=colours.get_cmap(), norm=colours.norm, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
