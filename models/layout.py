"""Where in its picture an image token is: the grids of a prompt's image tokens over its pictures.

Processors make tensors of many shapes of a picture: one square, tiles beside a small copy of the whole, or a list of
patches. Here each becomes one or several grids. A grid knows its image positions, row by row, and how to put the
processor's pixels together into the picture that it lies over. Which tile shows which part of a picture is measured:
pictures of the same sizes are painted with gradients and processed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional

_OUTERMOST = 20
"""A tile reaches an edge if at most one part in so many is missing; the blur of resizing takes a little."""

Sizes = Sequence[tuple[int, int]]
"""Width and height of each picture of a prompt."""
Paint = Callable[[list[Image.Image]], Tensor]
"""Turns pictures of the prompt's own sizes into the processor's pixels."""
Canvas = Callable[[Tensor], Tensor]
"""Turns the processor's pixels into a picture, (channel, row, column)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureGrid:
    """Image tokens that lie over one picture in rows and columns of equal size."""

    image: int
    """Index of the picture in the prompt."""
    rows: int
    columns: int
    positions: tuple[int, ...]
    """Positions of the tokens, row by row."""
    is_overview: bool
    """True for a copy of the whole picture beside tiles that show it in more detail."""
    canvas: Canvas
    """Turns the processor's pixels into what the grid lies over, (channel, row, column)."""

    def brightest(self, light: Tensor) -> Tensor:
        """Return the largest value of each token's part of the canvas, (rows, columns), of values (row, column)."""
        return functional.adaptive_max_pool2d(light[None, None].float(), (self.rows, self.columns))[0, 0]


def pixel_name(inputs: Mapping[str, Tensor]) -> str | None:
    """Return under which name a prompt's inputs have pixels; None if there is no picture."""
    return next((name for name in inputs if name.startswith("pixel_values")), None)


def pixels_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the pixels among a prompt's inputs; None if there is no picture."""
    name = pixel_name(inputs)
    return None if name is None else inputs[name]


def picture_grids(
    inputs: Mapping[str, Tensor],
    positions: Sequence[int],
    sizes: Sizes,
    *,
    patch_size: int | None,
    most_tiles: int | None,
    paint: Paint,
) -> tuple[PictureGrid, ...]:
    """Return the grids of a prompt, in the order of the pictures; empty if its image tokens form none.

    Args:
        inputs: The prompt's inputs.
        positions: Its image positions.
        sizes: Width and height of its pictures.
        patch_size: Side of a vision patch in pixels; None if unknown.
        most_tiles: LLaVA-OneVision shrinks a picture of more tiles than this to that many; None for other models.
        paint: Processes pictures of the same sizes; called for pictures in tiles only.
    """
    pixels = pixels_of(inputs)
    if pixels is None or not positions:
        return ()
    if "image_grid_thw" in inputs:
        tiles = _flat(pixels, inputs["image_grid_thw"].tolist(), len(positions))
    elif "image_position_ids" in inputs:
        tiles = _numbered(pixels, inputs["image_position_ids"], len(positions))
    elif "target_sizes" in inputs:
        tiles = _strips(pixels, inputs["target_sizes"].tolist(), len(positions))
    elif pixels.ndim == 4 and "image_sizes" in inputs:
        tiles = _cropped(inputs["image_sizes"].tolist(), len(positions))
    elif pixels.ndim in (4, 5):
        tiles = _squares(pixels, len(positions), len(sizes), patch_size)
    else:
        return ()
    if len(tiles) == len(sizes) and _count(tiles) == len(positions):
        shown = [(image, False, tile) for image, tile in enumerate(tiles)]
        return _with_positions(shown, positions)
    if "target_sizes" not in inputs:
        canvases = [partial(_tile, index=index, patch_size=None) for index in range(len(pixels.flatten(0, -4)))]
        views = _views(canvases, sizes, paint)
        if "image_sizes" in inputs:
            shown = _unpadded(views, sizes, patch_size=patch_size, most_tiles=most_tiles)
            return _with_positions(shown, positions) if _count([tile for *_, tile in shown]) == len(positions) else ()
        tiles = _alike(views, len(positions), patch_size)
    else:
        views = _views([tile.canvas for tile in tiles], sizes, paint)
    if not tiles or len(views) != len(tiles) or _count(tiles) != len(positions):
        return ()
    return _stitched(views, tiles, positions, len(sizes))


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Tokens in rows and columns over one canvas, with tokens between the rows left out."""

    rows: int
    columns: int
    canvas: Canvas
    before: int = 0
    """Tokens of the tile before the first row, such as a class token."""
    between: int = 0
    """Tokens after each row, such as a line end."""
    after: int = 0
    """Tokens after the last row."""

    @property
    def tokens(self) -> int:
        return self.before + self.rows * (self.columns + self.between) + self.after


def _count(tiles: Sequence[_Tile]) -> int:
    return sum(tile.tokens for tile in tiles)


def _with_positions(shown: Sequence[tuple[int, bool, _Tile]], positions: Sequence[int]) -> tuple[PictureGrid, ...]:
    """Return the grids of tiles whose tokens follow one another: (picture, whether it is an overview, tile)."""
    grids, start = [], 0
    for image, is_overview, tile in shown:
        width = tile.columns + tile.between
        first = start + tile.before
        places = [first + row * width + column for row in range(tile.rows) for column in range(tile.columns)]
        own = tuple(positions[place] for place in places)
        start += tile.tokens
        grids.append(
            PictureGrid(
                image=image, rows=tile.rows, columns=tile.columns, positions=own, is_overview=is_overview,
                canvas=tile.canvas,
            )
        )  # fmt: skip
    return tuple(grids)


def grid_boxes(
    grids: Sequence[PictureGrid], sizes: Sizes, paint: Paint
) -> tuple[tuple[float, float, float, float], ...]:
    """Return left, top, right and bottom of what each grid lies over, in pixels of its original picture.

    They reach beyond the picture where the processor has added a border.
    """
    black, white, drawn = _painted(sizes, paint)
    boxes = []
    for grid in grids:
        low, high, middle = (grid.canvas(value) for value in (black, white, drawn))
        span = high - low
        is_shown = span.abs().amin(0) > span.abs().amax() / 2
        place = (middle - low) / torch.where(span == 0, 1, span)
        width, height = sizes[grid.image]
        left, right = _edges(place[0], is_shown, axis=1)
        top, bottom = _edges(place[1], is_shown, axis=0)
        boxes.append((left * width, top * height, right * width, bottom * height))
    return tuple(boxes)


# ---- patches in a list ----


def _flat(pixels: Tensor, grids: list[list[int]], tokens: int) -> list[_Tile]:
    """Return the pictures of Qwen-VL, GLM-V and Kimi: patches in a list, merged in squares into tokens."""
    merge = math.isqrt(len(pixels) // tokens)
    tiles, start = [], 0
    for time, rows, columns in grids:
        stop = start + time * rows * columns
        canvas = partial(_unflattened, start=start, stop=stop, rows=rows, columns=columns, merge=merge)
        tiles.append(_Tile(rows=rows // merge, columns=columns // merge, canvas=canvas))
        start = stop
    return tiles


def _unflattened(pixels: Tensor, *, start: int, stop: int, rows: int, columns: int, merge: int) -> Tensor:
    patches = pixels[start:stop]
    if patches.ndim == 4:  # whole patches, row by row
        return rearrange(patches, "(row column) c y x -> c (row y) (column x)", row=rows, column=columns)
    frames = 1 if math.isqrt(patches.shape[1] // 3) ** 2 * 3 == patches.shape[1] else 2  # a picture is shown twice
    side = math.isqrt(patches.shape[1] // (3 * frames))
    sizes = {"row": rows // merge, "column": columns // merge, "down": merge, "right": merge, "t": frames}
    pattern = "(row column down right) (c t y x) -> t c (row down y) (column right x)"
    return rearrange(patches, pattern, c=3, y=side, x=side, **sizes)[0]


def _numbered(pixels: Tensor, places: Tensor, tokens: int) -> list[_Tile]:
    """Return the pictures of Gemma 4: patches with their column and row, -1 for padding, averaged in squares."""
    ends = [[int(axis.max()) + 1 for axis in each.unbind(-1)] for each in places]
    merge = math.isqrt(sum(columns * rows for columns, rows in ends) // tokens)
    return [
        _Tile(
            rows=rows // merge,
            columns=columns // merge,
            canvas=partial(_placed, image=image, rows=rows, columns=columns),
        )
        for image, (columns, rows) in enumerate(ends)
    ]


def _placed(pixels: Tensor, *, image: int, rows: int, columns: int) -> Tensor:
    patches = pixels[image, : rows * columns]
    side = math.isqrt(patches.shape[1] // 3)
    return rearrange(patches, "(row column) (y x c) -> c (row y) (column x)", row=rows, column=columns, y=side, x=side)


def _strips(pixels: Tensor, sizes: list[list[int]], tokens: int) -> list[_Tile]:
    """Return the slices of MiniCPM-V: patches side by side in one strip, 4 x 4 or 2 x 2 of them to a token."""
    merge = math.isqrt(sum(rows * columns for rows, columns in sizes) // tokens)
    tiles, start = [], 0
    for rows, columns in sizes:
        canvas = partial(_cut, start=start, rows=rows, columns=columns)
        tiles.append(_Tile(rows=rows // merge, columns=columns // merge, canvas=canvas))
        start += rows * columns
    return tiles


def _cut(pixels: Tensor, *, start: int, rows: int, columns: int) -> Tensor:
    side = pixels.shape[-2]
    strip = pixels.flatten(0, -4)[0][..., start * side : (start + rows * columns) * side]
    return rearrange(strip, "c y (row column x) -> c (row y) (column x)", row=rows, column=columns)


def _cropped(sizes: list[list[int]], tokens: int) -> list[_Tile]:
    """Return the pictures of Pixtral: each in the corner of a canvas that is as large as the largest one."""
    side = math.isqrt(sum(height * width for height, width in sizes) // tokens)
    return [
        _Tile(
            rows=height // side,
            columns=width // side,
            canvas=partial(_corner, image=image, height=height, width=width),
        )
        for image, (height, width) in enumerate(sizes)
    ]


def _corner(pixels: Tensor, *, image: int, height: int, width: int) -> Tensor:
    return pixels[image, :, :height, :width]


# ---- squares: one for each picture, or tiles ----


def _squares(pixels: Tensor, tokens: int, pictures: int, patch_size: int | None) -> list[_Tile]:
    """Return one tile per picture if there are no more; empty otherwise."""
    flat = pixels.flatten(0, -4)
    each, left_over = divmod(tokens, len(flat))
    shape = None if left_over else _tile_shape(each, flat.shape[-2], flat.shape[-1], patch_size)
    if len(flat) != pictures or shape is None:
        return []
    before, rows, columns = shape
    return [
        _Tile(rows=rows, columns=columns, before=before, canvas=partial(_tile, index=index, patch_size=patch_size))
        for index in range(pictures)
    ]


def _tile(pixels: Tensor, *, index: int, patch_size: int | None) -> Tensor:
    """Return one tile without the rows and columns at its end that fill no patch."""
    tile = pixels.flatten(0, -4)[index]
    height, width = (length - length % (patch_size or 1) for length in tile.shape[-2:])
    return tile[:, :height, :width]


def _tile_shape(tokens: int, height: int, width: int, patch_size: int | None) -> tuple[int, int, int] | None:
    """Return class tokens, rows and columns of a tile of this size in pixels with so many tokens, or None.

    Tokens are squares of one or several patches; without a patch size, any squares that fill the tile.
    """
    sides = range(patch_size, max(height, width) + 1, patch_size) if patch_size else ()
    for before in (0, 1):
        for side in sides:
            if (height // side) * (width // side) == tokens - before:
                return before, height // side, width // side
        rows = math.isqrt((tokens - before) * height // width)
        if rows and rows * rows * width == (tokens - before) * height:
            return before, rows, (tokens - before) // rows
    return None


@dataclass(frozen=True, kw_only=True)
class _View:
    """A tile of pixels, and the part of a picture that it shows, which may reach beyond the picture."""

    index: int
    """Number of the tile among the processor's tiles."""
    image: int
    height: int
    """Height of the tile in pixels."""
    width: int
    left: float
    top: float
    right: float
    bottom: float

    def is_whole(self) -> bool:
        """Return whether the view shows its picture from edge to edge; edges are fractions of the picture's sides."""
        edge = 1 / _OUTERMOST
        return self.left <= edge and self.top <= edge and self.right >= 1 - edge and self.bottom >= 1 - edge


def _views(canvases: Sequence[Canvas], sizes: Sizes, paint: Paint) -> list[_View]:
    """Return what each tile with a picture in it shows, measured with gradients."""
    black, white, drawn = _painted(sizes, paint)
    parts = [tuple(canvas(pixels) for pixels in (black, white, drawn)) for canvas in canvases]
    brightest = max(float((high - low).abs().max()) for low, high, _ in parts)
    views = []
    for index, (low, high, middle) in enumerate(parts):
        span = high - low
        is_shown = span.abs().amin(0) > brightest / 2  # padding is the same in every picture
        if not is_shown.any():
            continue
        place = (middle - low) / torch.where(span == 0, 1, span)
        image = round(float(place[2][is_shown].median()) * len(sizes)) - 1
        left, right = _edges(place[0], is_shown, axis=1)
        top, bottom = _edges(place[1], is_shown, axis=0)
        height, width = is_shown.shape
        views.append(
            _View(
                index=index, image=image, height=height, width=width, left=left, top=top, right=right, bottom=bottom
            )
        )  # fmt: skip
    return views


def _painted(sizes: Sizes, paint: Paint) -> list[Tensor]:
    """Return the processor's pixels of black and of white pictures and of gradients, in float64 on the CPU."""
    return [
        paint([_gradient(size, low, high, (number + 1) / len(sizes)) for number, size in enumerate(sizes)])
        for low, high in ((0, 0), (1, 1), (0, 1))
    ]


def _gradient(size: tuple[int, int], low: int, high: int, number: float) -> Image.Image:
    """Return a picture whose red grows from left to right and whose green grows from top to bottom.

    Its blue is the same everywhere, and says which picture of the prompt it is. With equal ends it has one colour.
    """
    width, height = size
    across = (torch.arange(width) + 0.5) / width * (high - low) + low
    down = (torch.arange(height) + 0.5) / height * (high - low) + low
    blue = torch.full((height, width), number if high != low else float(low))
    values = torch.stack([across.expand(height, width), down[:, None].expand(height, width), blue], dim=-1)
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())


def _edges(place: Tensor, is_shown: Tensor, *, axis: int) -> tuple[float, float]:
    """Return where the first and the last edge of a tile are, by a line through the places of its pixels."""
    counts = is_shown.sum(1 - axis)
    known = counts > 0
    means = (place * is_shown).sum(1 - axis)[known] / counts[known]
    centres = (torch.arange(len(known), dtype=place.dtype) + 0.5)[known]
    if len(centres) == 1:
        return 0.0, 1.0
    spread = centres - centres.mean()
    slope = float((spread * means).sum() / (spread * spread).sum())
    first = float(means.mean()) - slope * float(centres.mean())
    return first, first + slope * len(known)


def _alike(views: Sequence[_View], tokens: int, patch_size: int | None) -> list[_Tile]:
    """Return the tokens of each tile where all have as many; empty if they are no squares of it."""
    each, left_over = divmod(tokens, len(views)) if views else (0, 1)
    shape = None if left_over else _tile_shape(each, views[0].height, views[0].width, patch_size)
    if shape is None:
        return []
    before, rows, columns = shape
    return [
        _Tile(
            rows=rows,
            columns=columns,
            before=before,
            canvas=partial(_tile, index=view.index, patch_size=patch_size),
        )
        for view in views
    ]


def _stitched(
    views: Sequence[_View], tiles: Sequence[_Tile], positions: Sequence[int], pictures: int
) -> tuple[PictureGrid, ...]:
    """Return the grids of pictures in tiles: one over all tiles of a picture, and one of its copy of the whole."""
    singles = _with_positions(
        [(view.image, view.is_whole(), tile) for view, tile in zip(views, tiles, strict=True)], positions
    )
    grids = []
    for image in range(pictures):
        own = [(view, grid) for view, grid in zip(views, singles, strict=True) if view.image == image]
        overview = next((grid for _, grid in own if grid.is_overview), None) if len(own) > 1 else None
        arranged = _arranged([(view, grid) for view, grid in own if grid is not overview])
        if arranged is None:
            return ()
        grids += [_joined_grid(arranged), *([] if overview is None else [overview])]
    return tuple(grids)


def _joined_grid(lines: Sequence[Sequence[PictureGrid]]) -> PictureGrid:
    """Return one grid of those that lie beside and below one another."""
    places = torch.cat(
        [torch.cat([torch.tensor(grid.positions).view(grid.rows, -1) for grid in line], dim=1) for line in lines]
    )
    return PictureGrid(
        image=lines[0][0].image,
        rows=places.shape[0],
        columns=places.shape[1],
        positions=tuple(places.flatten().tolist()),
        is_overview=False,
        canvas=partial(_joined, lines=tuple(tuple(grid.canvas for grid in line) for line in lines)),
    )


def _unpadded(
    views: Sequence[_View], sizes: Sizes, *, patch_size: int | None, most_tiles: int | None
) -> list[tuple[int, bool, _Tile]]:
    """Return the tokens of LLaVA-NeXT and OneVision: a copy of the whole, then tiles with a line end after each row.

    Tokens of the border that the processor adds are left out, and OneVision keeps fewer rows and columns of many tiles.
    """
    shown: list[tuple[int, bool, _Tile]] = []
    for image, size in enumerate(sizes):
        own = [view for view in views if view.image == image]
        if not own or patch_size is None:
            return []
        base, tiles = own[0], own[1:]
        canvas = partial(_tile, index=base.index, patch_size=patch_size)
        rows, columns = base.height // patch_size, base.width // patch_size
        if not tiles:
            shown.append((image, False, _Tile(rows=rows, columns=columns, after=1, canvas=canvas)))
            continue
        lines = _arranged([(view, view) for view in tiles])
        if lines is None:
            return []
        height, width = len(lines) * rows, len(lines[0]) * columns
        top, left = _padding(height, width, size)
        indices = [[partial(_tile, index=view.index, patch_size=patch_size) for view in line] for line in lines]
        detail = partial(_joined, lines=tuple(map(tuple, indices)), top=top * patch_size, left=left * patch_size)
        height, width = _fewer(height - 2 * top, width - 2 * left, most_tiles and most_tiles * rows * rows)
        shown.append((image, True, _Tile(rows=rows, columns=columns, canvas=canvas)))
        shown.append((image, False, _Tile(rows=height, columns=width, between=1, canvas=detail)))
    return shown


def _fewer(rows: int, columns: int, most: int | None) -> tuple[int, int]:
    """Return the rows and columns that LLaVA-OneVision keeps of so many, which is about `most` tokens at most."""
    ratio = math.sqrt(rows * columns / most) if most else 1.0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _padding(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows above and below, and the columns on either side, that show nothing of a picture of this size."""
    across, down = size
    if across / down > width / height:
        return (height - int(round(down * (width / across), 7))) // 2, 0
    return 0, (width - int(round(across * (height / down), 7))) // 2


_Item = TypeVar("_Item")


def _arranged(tiles: Sequence[tuple[_View, _Item]]) -> list[list[_Item]] | None:
    """Return what belongs to the tiles in rows, top to bottom and left to right; None if they fill no rectangle."""
    if not tiles:
        return None
    views = [view for view, _ in tiles]
    across, down = views[0].right - views[0].left, views[0].bottom - views[0].top
    if not (across and down):  # a picture of a single pixel, whose tiles all show the same
        return None
    left, top = min(view.left for view in views), min(view.top for view in views)
    places = {(round((view.top - top) / down), round((view.left - left) / across)): item for view, item in tiles}
    height, width = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    if len(places) != len(tiles) or height * width != len(tiles):
        return None
    return [[places[row, column] for column in range(width)] for row in range(height)]


def _joined(pixels: Tensor, *, lines: tuple[tuple[Canvas, ...], ...], top: int = 0, left: int = 0) -> Tensor:
    """Return canvases beside and below one another, without `top` rows and `left` columns on either side."""
    whole = torch.cat([torch.cat([canvas(pixels) for canvas in line], dim=-1) for line in lines], dim=-2)
    height, width = whole.shape[-2:]
    return whole[..., top : height - top, left : width - left]
