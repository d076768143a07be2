"""Variants of a request's own picture, so that an edit keys on what is seen and not on one rendering of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageChops, ImageEnhance, ImageStat

from ..data.facts import EditRequest, Question
from ..models import open_images
from .requests import EditError

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How many variants of a picture are made, and how far they differ from it.

    Every variant has the size of its picture. The same seed gives the same variants. On the embedded model crops and
    shifts carry an edit to other renderings, and jitters alone do nothing. Raises `EditError` for a setting out of
    range.
    """

    crops: int = 2
    """Number of random cutouts with the shape of the picture, enlarged to its size again."""
    jitters: int = 1
    """Number of variants in brightness, contrast and colour."""
    shifts: int = 2
    """Number of variants moved sideways and up or down, with the gap filled with the mean colour of the picture."""
    smallest: float = 0.8
    """Side of the smallest crop as a share of the side of the picture, above 0 and at most 1."""
    strength: float = 0.15
    """Brightness, contrast and colour are multiplied by a factor between 1 - strength and 1 + strength."""
    reach: float = 0.12
    """Longest shift in each direction as a share of the side of the picture, at least 0 and below 1."""
    seed: int = 0
    """Random seed of the variants."""

    def __post_init__(self) -> None:
        ranges = {
            "crops of at least 0": self.crops >= 0,
            "jitters of at least 0": self.jitters >= 0,
            "shifts of at least 0": self.shifts >= 0,
            "smallest above 0 and at most 1": 0 < self.smallest <= 1,
            "strength of at least 0 and below 1": 0 <= self.strength < 1,
            "reach of at least 0 and below 1": 0 <= self.reach < 1,
        }
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"Augmentation got {name}={getattr(self, name)}; pass {wanted}")

    def pictures(self, image: Image.Image) -> tuple[Image.Image, ...]:
        """Return the variants of an RGB picture: crops, then jitters, then shifts. The picture is not changed."""
        draw = _Draw(self.seed)
        found = [_cropped(image, draw.between(self.smallest, 1), draw) for _ in range(self.crops)]
        found += [_jittered(image, self.strength, draw) for _ in range(self.jitters)]
        found += [_shifted(image, self.reach, draw) for _ in range(self.shifts)]
        return tuple(found)

    def questions(self, question: Question) -> Iterator[Question]:
        """Yield the question with each variant of its picture in turn (of all its pictures, if it has several)."""
        variants = [self.pictures(image) for image in open_images(question.images)]
        yield from (question.with_image(images) for images in zip(*variants, strict=True))

    def of(self, request: EditRequest) -> EditRequest:
        """Return the request with variants of its question after its other contexts: keys are averaged over them.

        Raises `EditError` if the question has no picture, and `ModelError` if the picture cannot be read.
        """
        if not request.question.images:
            raise EditError(
                f"{request.question.text!r} has no picture to make variants of; pass a question with one, "
                "or leave the augmentation out"
            )
        return replace(request, contexts=(*request.contexts, *self.questions(request.question)))


class _Draw:
    """Random numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()


def _cropped(image: Image.Image, share: float, draw: _Draw) -> Image.Image:
    width, height = (share * side for side in image.size)
    left, top = draw.between(0, image.width - width), draw.between(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _jittered(image: Image.Image, strength: float, draw: _Draw) -> Image.Image:
    for enhancer in _ENHANCERS:
        image = enhancer(image).enhance(draw.between(1 - strength, 1 + strength))
    return image


def _shifted(image: Image.Image, reach: float, draw: _Draw) -> Image.Image:
    right, down = (round(draw.between(-reach, reach) * side) for side in image.size)
    moved = ImageChops.offset(image, right, down)
    mean = tuple(round(channel) for channel in ImageStat.Stat(image).mean)
    if right:
        moved.paste(mean, (0, 0, right, image.height) if right > 0 else (image.width + right, 0, *image.size))
    if down:
        moved.paste(mean, (0, 0, image.width, down) if down > 0 else (0, image.height + down, *image.size))
    return moved
