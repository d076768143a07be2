"""Effects of image patches drawn over the picture as the model saw it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from ..errors import ArtefactError
from .figure import INK, check_format, colours_of, draw_bar, new_figure, wrap, write_figure, write_titles

_SIDE, _SPACE = 2.2, 0.2  # inches of a picture and between pictures
_BRIGHTNESS = (0.299, 0.587, 0.114)  # how bright the eye sees red, green and blue
_FLOOR = 0.001  # share of the total effect that is drawn darkest at least; single patches rarely have much more


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """Values over the patches of every picture."""

    title: str
    values: Tensor
    """(image, row, column); NaN where nothing was traced."""


def over_patches(
    effects: Tensor, row_positions: Sequence[tuple[int, ...]], patches: Sequence[tuple[int, int, int, int]]
) -> Tensor:
    """(column, image, patch row, patch column): each patch's effect, NaN where no row tells.

    effects (row, column); patches: (position, row, column, image). A row counts if all its positions are patches but
    it is not the whole picture; where rows overlap, the smallest one counts. ArtefactError if there is no such row.
    """
    places = {position: (image, row, column) for position, row, column, image in patches}
    telling = [
        index
        for index, positions in enumerate(row_positions)
        if set(positions) <= set(places) and len(positions) < len(places)
    ]
    if not telling:
        raise ArtefactError(
            "no row of this trace is a part of the picture; trace again with positions such as 'patches', Blocks(3), "
            "'image_rows' or Box(left, top, right, bottom)"
        )
    sizes = [max(place[axis] for place in places.values()) + 1 for axis in range(3)]
    grid = torch.full((effects.shape[1], *sizes), torch.nan, dtype=effects.dtype)
    for index in sorted(telling, key=lambda index: -len(row_positions[index])):
        for position in row_positions[index]:
            grid[(slice(None), *places[position])] = effects[index]
    return grid


def strongest(grid: Tensor, count: int = 4) -> tuple[int, ...]:
    """The columns with the largest effects, at most so many, in ascending order."""
    peaks = grid.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1).amax(1)
    return tuple(sorted(peaks.topk(min(count, len(peaks))).indices.tolist()))


def draw_overlays(
    path: str | Path,
    pictures: Sequence[Tensor],
    overlays: Sequence[Overlay],
    *,
    kind: str,
    titles: tuple[str, str],
    scale: float,
    unit: str = "indirect effect",
) -> Path:
    """The written picture: one panel per overlay, one line of panels per picture.

    pictures: (row, column, channel) in 0 to 1, see `Prompt.seen_pictures`. Stronger effects are darker; what has none, or a negative one, shows the bare picture. scale: the total effect, of
    which colours span a thousandth at least. unit: caption of the colour bar. ArtefactError for another format than png,
    pdf or svg, or a place that cannot be written.
    """
    check_format(path)
    largest = float(torch.stack([each.values for each in overlays]).nan_to_num(nan=0).max())
    high = max(largest, _FLOOR * abs(scale), 1e-9)
    colours = ScalarMappable(Normalize(0, high), colours_of(kind))
    width = max(4.5, 0.25 + (_SIDE + _SPACE) * len(overlays) + 1.2)
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.55 + 0.21 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + (_SIDE + _SPACE) * len(pictures)
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    for line, picture in enumerate(pictures):
        lower = height - top - _SIDE - (_SIDE + _SPACE) * line
        for index, overlay in enumerate(overlays):
            start = 0.25 + (_SIDE + _SPACE) * index
            axes = figure.add_axes((start / width, lower / height, _SIDE / width, _SIDE / height))
            _draw(axes, picture, overlay.values[line], colours)
            if line == 0:
                axes.set_title(overlay.title, fontsize=9.5, color=INK, loc="left")
    start, lower = 0.55 + (_SIDE + _SPACE) * len(overlays), height - top - _SIDE
    bar = figure.add_axes((start / width, (lower + 0.2) / height, 0.11 / width, (_SIDE - 0.4) / height))
    draw_bar(bar, colours, unit)
    return write_figure(path, figure)


def _draw(axes: Axes, picture: Tensor, values: Tensor, colours: ScalarMappable) -> None:
    """One picture, nearly grey and paled, with its patches coloured as strongly as they act."""
    height, width = picture.shape[:2]
    rows, columns = values.shape
    strength = colours.norm(values.nan_to_num(nan=0).clamp(min=0).numpy())
    shades = colours.to_rgba(values.nan_to_num(nan=0).numpy())
    shades[..., 3] = 0.85 * strength
    grey = picture @ picture.new_tensor(_BRIGHTNESS)
    paled = 0.4 + 0.6 * (0.25 * picture + 0.75 * grey[..., None])
    for layer in (paled.numpy(), shades):
        place = {"extent": (0, columns, rows, 0), "aspect": columns * height / (rows * width)}
        axes.imshow(layer, interpolation="nearest", **place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
