"""The protocol of all corruptions, and those that show the model something else: another picture or other words."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from torch import Tensor

from ...data.pictures import Picture
from ...models import Prompt, VisionLanguageModel, open_images
from ...models.errors import check_text
from ...models.prompts import ReadOnly
from ..engine.positions import group_positions
from ..errors import TraceError

Colour = str | tuple[int, int, int]
"""A colour name known to PIL, or red, green and blue from 0 to 255."""
GREY = (127, 127, 127)
Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A corrupted prompt, which has as many tokens as before and may have several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the first decoder layer reads, up to and including the prompt's last token."""
    description: str
    """The corruption in words, including the replacement."""
    seed: int | None = None
    """Random seed of noise; None if the corruption is not random."""
    scale: float | None = None
    """Standard deviation of noise in multiples of `deviation`, after any calibration."""
    deviation: float | None = None
    """The standard deviation that `scale` multiplies."""
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """Model inputs of each sample without any answer if pictures were corrupted; else empty."""


class Corruption(Protocol):
    """A method that destroys part of a prompt and keeps its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return the corrupted prompt; neither the model nor the prompt changes."""


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
        parts = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
    except (TypeError, ValueError):
        parts = ()
    if len(parts) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in parts):
        raise TraceError(
            f"no colour {colour!r}; pass red, green and blue from 0 to 255, such as {GREY}, or a name, such as 'grey'"
        )
    return parts


def _image_name(image: Picture | Sequence[Picture]) -> str:
    if isinstance(image, Image.Image):
        return f"a picture of {image.width} x {image.height} pixels"
    if isinstance(image, (str, PathLike)):
        return Path(image).name
    return ", ".join(map(_image_name, image))


CONSTRAINTS: tuple[str, ...] = (
    "the company in this photo",
    "the company whose logo is shown",
    "the brand on this bottle",
    "the maker of this car",
    "the manufacturer of this aeroplane",
    "this building",
    "the building in the picture",
    "the bridge in this image",
    "this tower",
    "the church on the left",
    "the castle on the hill",
    "the stadium in this photo",
    "the museum shown here",
    "the monument in the background",
    "this statue",
    "the city in this picture",
    "the country whose flag is shown",
    "the flag on the right",
    "the state on this map",
    "the river in the photo",
    "the mountain in this image",
    "the island seen from above",
    "the lake in the foreground",
    "this waterfall",
    "the person in the picture",
    "the man in this photo",
    "the woman on the left",
    "the actor in this scene",
    "the singer on the stage",
    "the player with the ball",
    "the team in these shirts",
    "the politician at the desk",
    "the scientist in this portrait",
    "the writer in this photograph",
    "the founder shown here",
    "the king on this coin",
    "the painting in this image",
    "the painter of this picture",
    "this sculpture",
    "the album with this cover",
    "the band on this poster",
    "the film on the poster",
    "the book with this cover",
    "the character in this drawing",
    "the game shown on the screen",
    "the dish on the table",
    "the food in this bowl",
    "the fruit in the basket",
    "the drink in the glass",
    "the cheese on this plate",
    "the animal in the picture",
    "the dog in this photo",
    "this breed of cat",
    "the bird on the branch",
    "the fish in the tank",
    "the insect on the leaf",
    "the tree in the garden",
    "this flower",
    "the plant in the pot",
    "the car in the street",
    "the train at the station",
    "the ship in the harbour",
    "the aircraft in the sky",
    "the rocket on the launch pad",
    "this motorcycle",
    "the device in her hand",
    "the phone on the desk",
    "the camera in this advertisement",
    "the instrument he is playing",
    "the tool on the workbench",
    "the sport in this photo",
    "the trophy on the shelf",
    "the medal around her neck",
    "the uniform of this soldier",
    "the dress in the middle",
    "the currency of this banknote",
    "the script on this sign",
    "the language of this newspaper",
    "the festival in these pictures",
    "the university with this emblem",
)
"""Phrases by which questions refer to pictures: the default corpus that scales noise on words, like ROME's list of
known subjects."""


@dataclass(frozen=True)
class ReplaceText:
    """A corruption that replaces the words of a token group ("the company in this photo" becomes "Paris city").

    The replacement gets exactly as many tokens as the group: a longer one is cut, and a shorter one is repeated. This
    is the text corruption of Basu et al., arXiv 2406.04236.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?", constraint="Draivo")
        >>> mt.ReplaceText("Pimdo").corrupt(vlm, prompt).embeddings.shape[1] == prompt.length
        True
    """

    replacement: str
    """The words that replace the group."""
    group: str = field(default="constraint", kw_only=True)
    """The token group that is replaced."""
    repeat_first_token: bool = field(default=False, kw_only=True)
    """True to fill the whole group with the first token of the replacement, as the code of arXiv 2406.04236 does."""

    def __post_init__(self) -> None:
        if not self.replacement.strip():
            raise TraceError(
                "the replacement is empty; pass the words to put in place of the constraint, such as 'Paris city'"
            )

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return one sample. Raises `TraceError` if the group is absent or empty, or if it holds image tokens."""
        positions = group_positions(prompt, self.group)
        if set(positions) & set(prompt.groups["image"]):
            raise TraceError(
                f"group {self.group!r} holds image tokens, which words cannot replace; use SwapImage instead"
            )
        ids = prompt.inputs["input_ids"].clone()
        new = _replacement_ids(vlm, prompt, positions, vlm.check_words(self.replacement, "replacement").strip())
        new = new[:1] * len(positions) if self.repeat_first_token else new[: len(positions)]
        original = vlm.decode(ids[0, list(positions)].tolist()).strip()
        ids[0, list(positions)] = torch.tensor(new, device=ids.device)
        return Corrupted(
            embeddings=vlm.embed(prompt, {**prompt.inputs, "input_ids": ids}),
            description=f"replace {original!r} by {vlm.decode(new).strip()!r}",
        )


def word_embeddings(vlm: VisionLanguageModel, phrases: Sequence[str]) -> Tensor:
    """Return the embedding of every token of every phrase, repeated ones included: (token, hidden) float64 on the CPU.

    Special tokens are left out. Raises `ModelError` for a phrase that is not text, and `TraceError` without any token.
    """
    texts = [check_text(phrase, "phrase") for phrase in phrases]
    ids = [token for text in texts for token in vlm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise TraceError(f"no tokens in the phrases {texts!r}; pass phrases with words, such as 'the company shown'")
    with torch.no_grad():
        embedded = vlm.embed_words(ids)
    return embedded[0].cpu().double()


def _replacement_ids(
    vlm: VisionLanguageModel, prompt: Prompt, positions: tuple[int, ...], replacement: str
) -> list[int]:
    """Return the tokens of the repeated replacement in running text, which follow a blank if the original does."""
    tokenizer, ids = vlm.tokenizer, prompt.inputs["input_ids"][0].tolist()
    before = ids[max(0, positions[0] - 1) : positions[0]]
    original = tokenizer.decode([*before, ids[positions[0]]])[len(tokenizer.decode(before)) :]
    start = "a " if original[:1].isspace() else "\n"
    text = start + " ".join([replacement] * len(positions))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > len(start)]
