"""Effects of image patches drawn over the picture as the model saw it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..folders import ArtefactError
from .figure import add_colour_bar, add_picture, titled_figure
from .styles import INK, colours_of

_SIDE, _SPACE = 2.2, 0.2  # inches: side of a picture, space between pictures
_BRIGHTNESS = (0.299, 0.587, 0.114)  # perceived brightness of red, green and blue
_FLOOR = 0.001  # the darkest colour is at least this share of the total effect; few patches have more


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """Values over the patches of every picture."""

    title: str
    values: Tensor
    """(image, row, column): values over patches; NaN where nothing was traced."""


def over_patches(
    effects: Tensor, row_positions: Sequence[tuple[int, ...]], patches: Sequence[tuple[int, int, int, int]]
) -> Tensor:
    """Return the effect (column, image, patch row, patch column) of each patch, NaN where no row covers it.

    A row is used if all its positions are patches and it is not the whole picture. Where rows overlap, the smallest row
    is used.

    Args:
        effects: (row, column) effects of a map.
        row_positions: token positions of each row.
        patches: (position, row, column, image) of each image token.

    Raises:
        ArtefactError: if no row can be used.
    """
    places = {position: (image, row, column) for position, row, column, image in patches}
    parts = [
        index
        for index, positions in enumerate(row_positions)
        if set(positions) <= set(places) and len(positions) < len(places)
    ]
    if not parts:
        raise ArtefactError(
            "no row of this trace is a part of the picture; trace again with positions such as 'patches', Blocks(3), "
            "'image_rows' or Box(left, top, right, bottom)"
        )
    sizes = [max(place[axis] for place in places.values()) + 1 for axis in range(3)]
    grid = torch.full((effects.shape[1], *sizes), torch.nan, dtype=effects.dtype)
    for index in sorted(parts, key=lambda index: -len(row_positions[index])):
        for position in row_positions[index]:
            grid[(slice(None), *places[position])] = effects[index]
    return grid


def strongest(grid: Tensor, count: int = 4) -> tuple[int, ...]:
    """Return the indices of at most `count` columns with the largest effects, in ascending order."""
    peaks = grid.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1).amax(1)
    return tuple(sorted(peaks.topk(min(count, len(peaks))).indices.tolist()))


def overlays_figure(
    pictures: Sequence[Tensor],
    overlays: Sequence[Overlay],
    *,
    kind: str,
    titles: tuple[str, str],
    scale: float,
    unit: str = "indirect effect",
) -> Figure:
    """Return a figure with one column per overlay and one line of panels per picture.

    Stronger effects are darker; patches without an effect, or with a negative one, show the bare picture.

    Args:
        pictures: (row, column, channel) of each picture, in 0 to 1; see `Prompt.seen_pictures`.
        overlays: values over the patches of all pictures.
        kind: kind of site, which decides the colours.
        titles: title and subtitle of the figure.
        scale: the total effect; colours span at least a thousandth of it.
        unit: caption of the colour bar.
    """
    largest = float(torch.stack([each.values for each in overlays]).nan_to_num(nan=0).max())
    high = max(largest, _FLOOR * abs(scale), 1e-9)
    colours = ScalarMappable(Normalize(0, high), colours_of(kind))
    tallest = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    width, height = max(3.4, (_SIDE + _SPACE) * len(overlays) + 0.8), (_SIDE * tallest + _SPACE) * len(pictures)
    figure, body = titled_figure(width, height + 0.25, titles)
    every = body.subplots(len(pictures), len(overlays), squeeze=False)
    for line, picture in enumerate(pictures):
        for axes, overlay in zip(every[line], overlays, strict=True):
            _draw(axes, picture, overlay.values[line], colours)
            if line == 0:
                axes.set_title(overlay.title, fontsize=9.5, color=INK, loc="left")
    add_colour_bar(colours, list(every.flat), unit, height)
    return figure


def _draw(axes: Axes, picture: Tensor, values: Tensor, colours: ScalarMappable) -> None:
    """Draw a pale, nearly grey picture with coloured patches; stronger effects have stronger colours."""
    shades = colours.to_rgba(values.nan_to_num(nan=0).numpy())
    shades[..., 3] = 0.85 * colours.norm(values.nan_to_num(nan=0).clamp(min=0).numpy())
    grey = picture @ picture.new_tensor(_BRIGHTNESS)
    paled = 0.4 + 0.6 * (0.25 * picture + 0.75 * grey[..., None])
    add_picture(axes, paled.numpy(), tuple(values.shape), [shades])
