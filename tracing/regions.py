"""Regions of the picture and the patches they touch, found by sending a painted picture through the processor."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from ..models import Prompt
from ..models.prompts import Patch
from .errors import TraceError


@dataclass(frozen=True)
class Blocks:
    """Blocks of size x size patches; those at the right and lower edge are smaller where the grid does not divide."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise TraceError(
                f"no blocks of {self.size} x {self.size} patches; pass Blocks(1) or more, such as Blocks(3)"
            )


@dataclass(frozen=True)
class Box:
    """A rectangle of the original picture, in its pixels; right and bottom are excluded."""

    left: int
    top: int
    right: int
    bottom: int
    image: int = 0
    """Which picture of the prompt."""

    @property
    def label(self) -> str:
        """The row's name."""
        return f"box {self.left}, {self.top} to {self.right}, {self.bottom}"


def box_patches(prompt: Prompt, box: Box) -> tuple[Patch, ...]:
    """The patches that the box touches, as the model sees the picture: resized, cropped and padded.

    Painted white on black and processed like the prompt's picture, the box makes a patch at least half as bright as
    the brightest one; the blur of resizing does not count. TraceError with the valid range if there is no such picture
    or grid, or if the box is empty, leaves the picture, or lies where the processor cuts the picture off.
    """
    if not 0 <= box.image < len(prompt.images):
        raise TraceError(f"no image {box.image} for {box}: this prompt has {len(prompt.images)}, counted from 0")
    if not prompt.patches:
        raise TraceError(f"no patches for {box}: the image tokens do not form a grid; pass group names or positions")
    width, height = prompt.images[box.image].size
    if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
        raise TraceError(
            f"{box} is empty or leaves the picture of {width} x {height} pixels; "
            f"pass 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )
    light, own = _light(prompt, box), [patch for patch in prompt.patches if patch.image == box.image]
    brightest = float(light.max())
    if brightest == 0:
        left, top, right, bottom = _visible(prompt, box.image)
        raise TraceError(
            f"{box} touches no patch: it is too small for the model's resolution, or the processor cuts it off; "
            f"the model sees the picture from left {left} to right {right} and from top {top} to bottom {bottom}"
        )
    return tuple(patch for patch in own if light[patch.row, patch.column] >= brightest / 2)


def _light(prompt: Prompt, box: Box) -> Tensor:
    """(row, column) of the patch grid: the largest difference from black where the box is painted white."""
    pixels, side = [], prompt.frontend.patch_size
    for is_painted in (False, True):
        pictures = [Image.new("RGB", image.size) for image in prompt.images]
        if is_painted:
            corners = (box.left, box.top, box.right - 1, box.bottom - 1)
            ImageDraw.Draw(pictures[box.image]).rectangle(corners, fill="white")
        pixels.append(prompt.frontend.encode(prompt.text, pictures)["pixel_values"][box.image].double().cpu())
    light = (pixels[1] - pixels[0]).abs().amax(0)
    rows, columns = (length // side for length in light.shape)
    return light[: rows * side, : columns * side].reshape(rows, side, columns, side).amax((1, 3))


def _visible(prompt: Prompt, image: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of the picture that reaches the model."""
    width, height = prompt.images[image].size

    def dark(length: int, strip: Callable[[int], Box]) -> int:
        """How broad a strip along one edge may be before anything of it is seen."""
        return bisect_left(range(1, length), True, key=lambda size: float(_light(prompt, strip(size)).max()) > 0)

    left = dark(width, lambda size: Box(0, 0, size, height, image))
    top = dark(height, lambda size: Box(0, 0, width, size, image))
    right = width - dark(width, lambda size: Box(width - size, 0, width, height, image))
    bottom = height - dark(height, lambda size: Box(0, height - size, width, height, image))
    return left, top, right, bottom
