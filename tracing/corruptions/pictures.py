"""Corruption of a prompt's pictures before the model's processor reads them: swapped, blank, blurred or masked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from ...models import Prompt, VisionLanguageModel
from ...models.images import Picture, open_images
from ...models.prompts import ReadOnly
from ..engine.positions import group_positions
from ..errors import TraceError
from .corruption import Corrupted

Colour = str | tuple[int, int, int]
"""A colour name known to PIL, or red, green and blue from 0 to 255."""
GREY = (127, 127, 127)
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SwapImage:
    """A corruption that shows another picture with the same words, the cleanest test of where image information goes.

    Example:
        >>> import multrace as mt
        >>> from PIL import Image
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
        >>> prompt = vlm.prompt(red, "Who founded the company in this photo?")
        >>> mt.SwapImage(blue).corrupt(vlm, prompt).description
        'swap the image for a picture of 64 x 64 pixels'
    """

    image: Picture | Sequence[Picture]
    """A path or a PIL picture; a sequence for a prompt with several pictures."""
    resize: bool = field(default=False, kw_only=True)
    """True to resize the other picture to the size of the prompt's, which keeps the number of image tokens."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return one sample.

        Raises `ModelError` if the picture cannot be read, and `TraceError` if it takes another number of tokens.
        """
        group_positions(prompt, "image")
        images = open_images(self.image)
        if len(images) != len(prompt.images):
            raise TraceError(
                f"the prompt has {len(prompt.images)} pictures, {len(images)} were given to swap; pass as many"
            )
        if self.resize:
            images = tuple(new.resize(old.size) for new, old in zip(images, prompt.images, strict=True))
        return _shown(vlm, prompt, images, f"swap the image for {_image_name(self.image)}")


@dataclass(frozen=True, kw_only=True)
class PictureDamage(ABC):
    """A change to one or all pictures of a prompt that keeps their sizes."""

    image: int | None = None
    """Index of the damaged picture; None for all pictures of the prompt."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return one sample. Raises `TraceError` if there is no such picture, or if the damage does not fit it."""
        group_positions(prompt, "image")
        count = len(prompt.images)
        if self.image is not None and self.image not in range(count):
            raise TraceError(f"no picture {self.image}: the prompt has {count} (0 to {count - 1}); pass one, or None")
        images = tuple(
            self.damaged(image) if self.image in (None, index) else image for index, image in enumerate(prompt.images)
        )
        name = "the image" if self.image is None else f"image {self.image}"
        return _shown(vlm, prompt, images, self._words(name))

    @abstractmethod
    def damaged(self, image: Image.Image) -> Image.Image:
        """Return a new picture of the same size; the given one does not change."""

    @abstractmethod
    def _words(self, name: str) -> str:
        """Return a description of the change to a picture of this name."""


@dataclass(frozen=True, kw_only=True)
class BlankImage(PictureDamage):
    """A corruption that fills the whole picture with one colour."""

    colour: Colour = GREY
    """A colour name, or red, green and blue from 0 to 255 (default: middle grey)."""

    def __post_init__(self) -> None:
        _rgb(self.colour)

    def damaged(self, image: Image.Image) -> Image.Image:
        """Return a picture of one colour."""
        return Image.new("RGB", image.size, _rgb(self.colour))

    def _words(self, name: str) -> str:
        return f"blank {name} with colour {_rgb(self.colour)}"


@dataclass(frozen=True, kw_only=True)
class BlurImage(PictureDamage):
    """A corruption that applies a Gaussian blur."""

    radius: float = 10.0
    """Standard deviation in pixels of the original picture, before the processor changes its size."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise TraceError(f"a blur of radius {self.radius} changes nothing; pass a positive number of pixels")

    def damaged(self, image: Image.Image) -> Image.Image:
        """Return the blurred picture."""
        return image.filter(ImageFilter.GaussianBlur(self.radius))

    def _words(self, name: str) -> str:
        return f"blur {name} with a radius of {self.radius:g} pixels"


@dataclass(frozen=True, kw_only=True)
class MaskBoxes(PictureDamage):
    """A corruption that fills boxes of the picture with one colour."""

    boxes: tuple[Box, ...]
    """Boxes (left, top, right, bottom) in pixels of the original picture; right and bottom are excluded."""
    colour: Colour = GREY
    """A colour name, or red, green and blue from 0 to 255 (default: middle grey)."""

    def __post_init__(self) -> None:
        _rgb(self.colour)
        if not self.boxes:
            raise TraceError("no boxes to mask; pass some as (left, top, right, bottom), such as boxes=((0, 0, 8, 8),)")
        for box in self.boxes:
            if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(edge, int) for edge in box):
                raise TraceError(f"no box {box!r}; pass four whole numbers of pixels (left, top, right, bottom)")
            left, top, right, bottom = box
            if left >= right or top >= bottom:
                raise TraceError(f"box {tuple(box)} is empty; pass left < right and top < bottom")

    def damaged(self, image: Image.Image) -> Image.Image:
        """Return the picture with filled boxes. Raises `TraceError` for a box that reaches beyond it."""
        masked = image.copy()
        draw = ImageDraw.Draw(masked)
        for left, top, right, bottom in self.boxes:
            if left < 0 or top < 0 or right > image.width or bottom > image.height:
                raise TraceError(
                    f"box {(left, top, right, bottom)} reaches beyond the picture; pass left and right from 0 to "
                    f"{image.width}, top and bottom from 0 to {image.height}"
                )
            draw.rectangle((left, top, right - 1, bottom - 1), fill=_rgb(self.colour))  # PIL includes both corners
        return masked

    def _words(self, name: str) -> str:
        boxes = "; ".join(",".join(map(str, box)) for box in self.boxes)
        return f"mask boxes {boxes} of {name} with colour {_rgb(self.colour)}"


def _shown(vlm: VisionLanguageModel, prompt: Prompt, images: Sequence[Image.Image], description: str) -> Corrupted:
    """Return the prompt with these pictures instead. Raises `TraceError` if they take different tokens."""
    inputs = prompt.inputs_with(images)
    clean = prompt.inputs["input_ids"][:, : prompt.groups["last"][0] + 1]
    if not torch.equal(inputs["input_ids"], clean):
        sizes = ", ".join(f"{old.width} x {old.height}" for old in prompt.images)
        advice = f"pass a picture of the same size as the prompt's ({sizes} pixels), or resize=True to resize it first"
        if all(new.size == old.size for new, old in zip(images, prompt.images, strict=True)):
            advice = f"it is of the same size ({sizes} pixels), so resizing cannot help; pass another picture"
        raise TraceError(
            f"the other picture turns {clean.shape[1]} tokens into {inputs['input_ids'].shape[1]}; {advice}"
        )
    return Corrupted(embeddings=vlm.embed(prompt, inputs), description=description, inputs=(ReadOnly(inputs),))


def _rgb(colour: Colour) -> tuple[int, int, int]:
    """Return red, green and blue. Raises `TraceError` for an unknown colour."""
    try:
        found = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in found):
        raise TraceError(
            f"no colour {colour!r}; pass red, green and blue from 0 to 255, such as {GREY}, or a name, such as 'grey'"
        )
    return found


def _image_name(image: Picture | Sequence[Picture]) -> str:
    if isinstance(image, Image.Image):
        return f"a picture of {image.width} x {image.height} pixels"
    if isinstance(image, (str, PathLike)):
        return Path(image).name
    return ", ".join(map(_image_name, image))
