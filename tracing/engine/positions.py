"""Token positions: by group, by index, or by the region of the picture that they show."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from PIL import Image, ImageDraw
from torch import Tensor

from ...models import Prompt, VisionLanguageModel, patch
from ...models.errors import plain_number
from ...models.hooks import first_input
from ...models.prompts import Patch
from ..errors import TraceError

Positions = str | int | Sequence[str | int]
"""A token group, a position (negative ones count from the end), or several of either."""


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Return the positions of a token group.

    Raises `TraceError`, which lists the groups, if the group is empty or reaches into an answer.
    """
    positions = prompt.groups.get(group, ())
    if not positions:
        names = ", ".join(name for name, members in prompt.groups.items() if members)
        hints = {"image": "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {names}{hint}")
    last = prompt.groups["last"][0]
    if max(positions) > last:
        raise TraceError(
            f"group {group!r} reaches beyond the prompt's last token (position {last}) into the answer; "
            "ask for a group of the prompt"
        )
    return positions


def named_positions(prompt: Prompt, positions: Positions) -> dict[int, str]:
    """Return each requested position once, in the requested order, with a role that has the same name in every prompt.

    A role is the name of the group ("last"), numbered from 1 if the group has several tokens ("question 2"), or
    "position -2" for a number. Raises `TraceError` for a group without tokens and if no position is given, and
    `ModelError` for an unknown group.
    """
    roles: dict[int, str] = {}
    positions = plain_number(positions)
    for item in map(plain_number, (positions,) if isinstance(positions, str | int) else positions):
        members = prompt.positions(item)
        if not members:
            names = ", ".join(name for name, own in prompt.groups.items() if own)
            raise TraceError(f"no tokens in group {item!r} of this prompt; groups with tokens are {names}")
        name = item if isinstance(item, str) else f"position {item}"
        for number, position in enumerate(members, start=1):
            roles.setdefault(position, f"{name} {number}" if len(members) > 1 else name)
    if not roles:
        raise TraceError("no positions to read; name a group such as 'last', a position or several")
    return roles


def prompt_positions(prompt: Prompt, positions: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the ascending positions of a group, of one index or of several indices within the prompt.

    Raises `TraceError` if there are none or if one of them belongs to an answer.
    """
    if isinstance(positions, str):
        return tuple(sorted(group_positions(prompt, positions)))
    members, last = tuple(sorted(set(prompt.positions(positions)))), prompt.groups["last"][0]
    if not members or members[-1] > last:
        raise TraceError(
            f"no positions {positions} within this prompt; pass at least one, and none beyond its last token ({last})"
        )
    return members


# ---- regions of the picture, located by processing a painted picture ----


@dataclass(frozen=True)
class Blocks:
    """Rows of size x size patches each; blocks at the right and lower edge may be smaller."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise TraceError(
                f"no blocks of {self.size} x {self.size} patches; pass Blocks(1) or more, such as Blocks(3)"
            )


@dataclass(frozen=True)
class Box:
    """A rectangle of the original picture in pixels; right and bottom are excluded."""

    left: int
    top: int
    right: int
    bottom: int
    image: int = 0
    """Index of the picture in the prompt."""

    @property
    def label(self) -> str:
        """The name of a row for this box."""
        return f"box {self.left}, {self.top} to {self.right}, {self.bottom}"


def box_patches(prompt: Prompt, box: Box) -> tuple[Patch, ...]:
    """Return the patches that the box touches in the picture that the model sees, which is resized, cropped and padded.

    The box is painted white on black and processed like the prompt's picture. A patch counts as touched if it is at
    least half as bright as the brightest one, so that the blur of resizing does not count. Raises `TraceError`, with
    the valid range, if there is no such picture or grid, or if the box is empty, leaves the picture, or lies where the
    processor cuts the picture off.
    """
    _check_box(prompt, box)
    side = prompt.patch_size
    if not prompt.patches or side is None:
        raise TraceError(
            f"no patches for {box}: the image tokens do not form a grid; pass group names or positions, "
            "such as those of box_positions(vlm, prompt, box)"
        )
    own = [patch for patch in prompt.patches if patch.image == box.image]
    light = _pooled(_pixel_light(prompt, box)[box.image][None], side)[0]
    brightest = float(light.max())
    if brightest == 0:
        raise _unseen(prompt, box)
    return tuple(patch for patch in own if light[patch.row, patch.column] >= brightest / 2)


def box_positions(vlm: VisionLanguageModel, prompt: Prompt, box: Box) -> tuple[int, ...]:
    """Return the image positions whose patches the box touches, in ascending order.

    If the image tokens form one grid, these are the positions of `box_patches`. Otherwise the patches are located in
    each tile that the vision tower reads, and the model's own packing gives the positions of their tokens: it runs with
    marks in place of the projector's output, so that tiles keep the model's order, and tokens of padding, line ends or
    classes belong to no box. A tile that shows the whole picture is judged by its own brightness, since a small box is
    dimmer there than in tiles that show a part of it; positions in both belong to the box. This runs the vision tower
    twice and the image processor seven times.

    Args:
        vlm: The model.
        prompt: A prompt of this model with pictures.
        box: The rectangle, in pixels of the original picture.

    Returns:
        Token positions, usable as `positions=` of a trace.

    Raises:
        TraceError: The box is empty, leaves the picture or cannot be seen; the prompt belongs to another model; or the
            projector does not write one token per square of a tile, row by row.
        ModelError: The family row does not name the projector.

    Example:
        >>> import multrace as mt
        >>> from PIL import Image
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64)), "Who founded the company in this photo?")
        >>> from multrace.tracing import box_positions
        >>> corner = box_positions(vlm, prompt, mt.Box(0, 0, 8, 8))
        >>> corner[0] == prompt.groups["image"][0]
        True
    """
    if prompt.patches:
        return tuple(patch.position for patch in box_patches(prompt, box))
    _check_box(prompt, box)
    black = _tiles(vlm, prompt, _painted(prompt))
    light = _light(black, _tiles(vlm, prompt, _painted(prompt, box)))
    if float(light.max()) == 0:
        raise _unseen(prompt, box)
    is_whole = _show_whole_picture(vlm, prompt, box.image, black)
    bare = _packed(vlm, prompt, torch.zeros_like)
    marked = _packed(vlm, prompt, lambda written: _marks(light, is_whole, written, prompt.patch_size))
    positions = prompt.groups["image"]
    if len(marked) != len(positions):
        raise TraceError(
            f"{vlm.name!r} makes {len(marked)} image tokens of these pictures, and the prompt has {len(positions)}; "
            "pass a prompt of this model"
        )
    is_touched = (marked != bare).any(-1).tolist()
    return tuple(position for position, touched in zip(positions, is_touched, strict=True) if touched)


def _check_box(prompt: Prompt, box: Box) -> None:
    if not 0 <= box.image < len(prompt.images):
        raise TraceError(f"no image {box.image} for {box}: this prompt has {len(prompt.images)}, counted from 0")
    width, height = prompt.images[box.image].size
    if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
        raise TraceError(
            f"{box} is empty or leaves the picture of {width} x {height} pixels; "
            f"pass 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )


def _unseen(prompt: Prompt, box: Box) -> TraceError:
    left, top, right, bottom = _visible(prompt, box.image)
    return TraceError(
        f"{box} touches no patch: it is too small for the model's resolution, or the processor cuts it off; "
        f"the model sees the picture from left {left} to right {right} and from top {top} to bottom {bottom}"
    )


def _painted(prompt: Prompt, box: Box | None = None) -> list[Image.Image]:
    """Return the prompt's pictures in black, with the box in white."""
    pictures = [Image.new("RGB", image.size) for image in prompt.images]
    if box is not None:
        corners = (box.left, box.top, box.right - 1, box.bottom - 1)
        ImageDraw.Draw(pictures[box.image]).rectangle(corners, fill="white")
    return pictures


def _light(dark: Tensor, lit: Tensor) -> Tensor:
    """Return (..., row, column): the largest difference over channels between pixels (..., channel, row, column)."""
    return (lit - dark).abs().amax(-3)


def _pixel_light(prompt: Prompt, box: Box) -> Tensor:
    """Return (image, row, column), or (image, tile, row, column): how brightly the processed pictures show the box."""
    pictures = (_painted(prompt), _painted(prompt, box))
    return _light(*(prompt.inputs_with(each)["pixel_values"].double().cpu() for each in pictures))


def _pooled(light: Tensor, side: int) -> Tensor:
    """Return (tile, row, column): the brightest pixel of each square of this side; incomplete squares are dropped."""
    rows, columns = (length // side for length in light.shape[1:])
    squares = light[:, : rows * side, : columns * side]
    return reduce(squares, "tile (row y) (column x) -> tile row column", "max", y=side, x=side)


def _visible(prompt: Prompt, image: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the part of the picture that the model sees."""
    width, height = prompt.images[image].size

    def dark(length: int, strip: Callable[[int], Box]) -> int:
        """Return the width of the broadest strip along one edge that the model does not see."""
        return bisect_left(range(1, length), True, key=lambda size: float(_pixel_light(prompt, strip(size)).max()) > 0)

    left = dark(width, lambda size: Box(0, 0, size, height, image))
    top = dark(height, lambda size: Box(0, 0, width, size, image))
    right = width - dark(width, lambda size: Box(width - size, 0, width, height, image))
    bottom = height - dark(height, lambda size: Box(0, height - size, width, height, image))
    return left, top, right, bottom


def _tiles(vlm: VisionLanguageModel, prompt: Prompt, pictures: list[Image.Image]) -> Tensor:
    """Return (tile, channel, row, column): the vision tower's input with these pictures in place of the prompt's."""
    with torch.no_grad(), first_input(vlm, vlm.vision_tower, "the vision tower") as read:
        vlm.image_features(prompt.inputs_with(pictures))
    if read[0].ndim != 4:
        shape = tuple(read[0].shape)
        raise TraceError(f"the vision tower of {vlm.name!r} reads {shape}, no tiles of pixels; pass positions instead")
    return read[0].double().cpu()


def _show_whole_picture(vlm: VisionLanguageModel, prompt: Prompt, image: int, black: Tensor) -> Tensor:
    """Return booleans (tile,): True where a tile spans the whole part of the picture that any tile shows.

    Two gradients painted over the picture reveal the origin of a tile's outermost pixels.
    """
    size, pictures, lights = prompt.images[image].size, _painted(prompt), []
    gradient = Image.linear_gradient("L")
    for shown in (Image.new("L", size, 255), gradient.resize(size), gradient.rotate(90).resize(size)):
        pictures[image] = shown.convert("RGB")
        lights.append(_light(black, _tiles(vlm, prompt, pictures)))
    is_dark = lights[0] <= lights[0].max() / 2  # padding, or another picture
    is_whole = ~is_dark.flatten(1).all(1)
    for light in lights[1:]:
        first = light.masked_fill(is_dark, torch.inf).amin((1, 2))
        last = light.masked_fill(is_dark, -torch.inf).amax((1, 2))
        blur = (last.max() - first.min()) / 20  # a coarse tile's outermost pixels average over a few of the picture's
        is_whole &= (first <= first.min() + blur) & (last >= last.max() - blur)
    return is_whole


def _packed(vlm: VisionLanguageModel, prompt: Prompt, write: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (image token, hidden): the features of black pictures after `write` replaces the projector's output."""
    with torch.no_grad(), patch(vlm, {vlm.projector: write}):
        return vlm.image_features(prompt.inputs_with(_painted(prompt)))


def _marks(light: Tensor, is_whole: Tensor, written: Tensor, patch_size: int | None) -> Tensor:
    """Return ones at the tokens of lit patches and zeros elsewhere, in the projector's shape (tile, token, hidden)."""
    squares = _squares(light, written, patch_size)
    brightest = squares.amax((1, 2))
    in_parts = brightest.masked_fill(is_whole, 0).max()  # a box that ends at a tile's edge merely blurs into the next
    brightest = torch.where(is_whole, brightest, in_parts)
    is_touched = ((squares > 0) & (squares >= brightest[:, None, None] / 2)).flatten(1)
    marks = torch.zeros_like(written)
    marks[:, written.shape[1] - is_touched.shape[1] :] = is_touched[..., None].to(written)  # after a class token
    return marks


def _squares(light: Tensor, written: Tensor, patch_size: int | None) -> Tensor:
    """Return (tile, row, column): the light in each token's square, which is one patch or several merged patches."""
    longest = max(light.shape[1:])
    for side in range(patch_size, longest + 1, patch_size) if patch_size and written.ndim == 3 else ():
        squares = _pooled(light, side)
        if len(written) == len(squares) and written.shape[1] - squares[0].numel() in (0, 1):
            return squares
    raise TraceError(
        f"the projector writes {tuple(written.shape)} for tiles {tuple(light.shape)}, not one token per square of "
        f"{patch_size} pixels or a multiple; pass positions instead of a box"
    )
