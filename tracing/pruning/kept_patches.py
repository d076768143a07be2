"""The patches that stay, in the picture as the model saw it: all others fade away."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from torch import Tensor

from ...artefacts.drawing.figure import INK, check_format, new_figure, wrap, write_figure, write_titles
from ...models import Prompt

_SIDE, _SPACE = 2.0, 0.2  # inches of a picture and between pictures
_FADED = 0.16  # share of its contrast that a dropped patch keeps
_PAPER = 0.93  # what it fades into


def draw_kept(
    path: str | Path, prompt: Prompt, kept: Tensor, captions: Sequence[str], *, titles: tuple[str, str]
) -> Path:
    """The written picture: one panel per caption, one line of panels per picture of the prompt.

    kept (panel, image, row, column) booleans. TraceError for another format than png, pdf or svg, or a place that
    cannot be written.
    """
    check_format(path)
    pictures = prompt.seen_pictures()
    width = max(4.5, 0.25 + (_SIDE + _SPACE) * len(kept))
    wrapped = [wrap(text, width, size) for text, size in zip(titles, (0.105, 0.078), strict=True)]
    top = 0.55 + 0.21 * sum(text.count("\n") + 1 for text in wrapped)
    height = top + (_SIDE + _SPACE) * len(pictures)
    figure = new_figure(width, height)
    write_titles(figure, wrapped, height)
    for line, picture in enumerate(pictures):
        lower = height - top - _SIDE - (_SIDE + _SPACE) * line
        for index, (panel, caption) in enumerate(zip(kept, captions, strict=True)):
            start = 0.2 + (_SIDE + _SPACE) * index
            axes = figure.add_axes((start / width, lower / height, _SIDE / width, _SIDE / height))
            _draw(axes, picture, panel[line])
            if line == 0:
                axes.set_title(caption, fontsize=9.5, color=INK, loc="left")
    return write_figure(path, figure)


def _draw(axes: Axes, picture: Tensor, kept: Tensor) -> None:
    """One picture (row, column, channel), as it is where its patches (row, column) stay."""
    height, width = picture.shape[:2]
    rows, columns = kept.shape
    place = {"extent": (0, columns, rows, 0), "aspect": columns * height / (rows * width)}
    axes.imshow(picture.numpy(), interpolation="nearest", **place)
    veil = picture.new_full((rows, columns, 4), _PAPER)
    veil[..., 3] = (1 - _FADED) * (~kept).double()
    axes.imshow(veil.numpy(), interpolation="nearest", **place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#b8b8b8")
