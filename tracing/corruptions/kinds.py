"""All kinds of corruptions, the calibration of noise, and the spelling of corruptions on a command line.

Some show the model something else: another picture or other words. The others change embeddings: noise (also on
pixels), zeros, and the mean of a reference set.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from torch import Tensor

from ...data.pictures import Picture
from ...models import Prompt, VisionLanguageModel, open_images
from ...models.frame import DecoderInput
from ...models.layout import pixel_name
from ...models.prompts import ReadOnly
from ..engine.cells import TraceError
from ..engine.positions import check_pictures, group_positions
from .corruption import CONSTRAINTS, Corrupted, Corruption, word_embeddings

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
        check_pictures(prompt)
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
        check_pictures(prompt)
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
    changed = vlm.embed(prompt, inputs)
    return Corrupted(
        embeddings=changed.embeddings, frame=changed.frame, description=description, inputs=(ReadOnly(inputs),)
    )


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
        changed = vlm.embed(prompt, {**prompt.inputs, "input_ids": ids})
        return Corrupted(
            embeddings=changed.embeddings,
            frame=changed.frame,
            description=f"replace {original!r} by {vlm.decode(new).strip()!r}",
        )


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


# ---- noise and ablation ----

LADDER = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0)
"""Scales that calibration tries, in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Noise(ABC):
    """Several samples of Gaussian noise on a part of the prompt that a subclass selects.

    The numbers are drawn in float64 on the CPU from the seed, so that they are the same on every machine, on every
    device and in every precision.
    """

    scale: float | None = 3.0
    """Standard deviation of the noise in units of the deviation; None lets `causal_trace` or `calibrate` choose it."""
    samples: int = 10
    """Number of random versions, over which scores are averaged."""
    seed: int = 0
    """Random seed of the noise."""

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise TraceError(
                f"noise scale {self.scale} destroys nothing; pass a positive number, such as 3, or None to calibrate it"
            )
        if self.samples < 1:
            raise TraceError(f"{self.samples} noise samples; pass at least 1, such as 10")

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return `samples` samples, which are the same for the same seed.

        Raises `TraceError` if there is no scale, or if the prompt has nothing to which noise could be added.
        """
        if self.scale is None:
            raise TraceError(
                f"{type(self).__name__} has no scale yet (scale=None); use causal_trace or calibrate, which find one, "
                "or pass a number, such as scale=3"
            )
        return self.draw(vlm, prompt)(self.scale)

    @abstractmethod
    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption as a function of the scale; the random numbers are drawn once, here."""

    def _drawn(self, *shape: int) -> Tensor:
        """Return standard normal numbers (sample, *shape) in float64."""
        generator = torch.Generator().manual_seed(int(self.seed))
        return torch.randn(self.samples, *shape, generator=generator, dtype=torch.float64)

    def _corrupted(self, scale: float, deviation: float, where: str, **details: Any) -> Corrupted:
        samples = "one sample" if self.samples == 1 else f"{self.samples} samples"
        description = f"noise of {scale:g} standard deviations {where}, {samples}"
        return Corrupted(description=description, seed=self.seed, scale=scale, deviation=deviation, **details)

    def _on_tokens(self, clean: Tensor, positions: list[int], entries: Tensor, where: str) -> Callable[..., Corrupted]:
        """Return noise on positions of clean embeddings (1, token, hidden) by scale, in deviations of these entries."""
        deviation = _deviation(entries, where)
        drawn, kept = self._drawn(len(positions), clean.shape[-1]), clean[:, positions].cpu().double()

        def corrupted(scale: float) -> Corrupted:
            embeddings = clean.repeat(self.samples, 1, 1)
            embeddings[:, positions] = (kept + scale * deviation * drawn).to(clean)
            return self._corrupted(scale, deviation, where, embeddings=embeddings)

        return corrupted


@dataclass(frozen=True, kw_only=True)
class TextNoise(Noise):
    """Noise on the embeddings of the tokens of a group, as in ROME (Meng et al., arXiv 2202.05262).

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?", constraint="Draivo")
        >>> mt.TextNoise(scale=3, samples=2).corrupt(vlm, prompt).embeddings.shape[0]
        2
    """

    group: str = "constraint"
    """The token group that gets noise."""
    over: Literal["corpus", "prompt"] = "corpus"
    """The embeddings whose standard deviation `scale` multiplies: all entries of the tokens of a corpus of constraints
    ("corpus", which takes the place of ROME's known subjects), or of the group's own tokens ("prompt")."""
    corpus: tuple[str, ...] | None = None
    """Phrases of the corpus; None for the ones supplied with the package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in ("corpus", "prompt"):
            raise TraceError(f"no deviation over {self.over!r}; pass over='corpus' or over='prompt'")
        if self.corpus is None:
            return
        if self.over == "prompt":
            raise TraceError("a corpus plays no part with over='prompt'; leave out corpus= or pass over='corpus'")
        if isinstance(self.corpus, str) or not self.corpus:
            raise TraceError(
                f"a corpus of phrases cannot be {self.corpus!r}; pass a tuple of phrases, or None for the one that "
                "comes with the package"
            )

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption by scale. Raises `TraceError` for an empty group or a corpus without tokens."""
        positions, clean = list(group_positions(prompt, self.group)), vlm.embed(prompt).embeddings
        if self.over == "prompt":
            return self._on_tokens(clean, positions, clean[0, positions], f"of their own on the {self.group} tokens")
        entries = word_embeddings(vlm, CONSTRAINTS if self.corpus is None else self.corpus)
        return self._on_tokens(clean, positions, entries, f"over a corpus on the {self.group} tokens")


@dataclass(frozen=True, kw_only=True)
class ImageNoise(Noise):
    """Noise on the image tokens, after vision tower and projector, in standard deviations of their own entries."""

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption as a function of the scale. Raises `TraceError` if the prompt has no picture."""
        positions, clean = list(group_positions(prompt, "image")), vlm.embed(prompt).embeddings
        return self._on_tokens(clean, positions, clean[0, positions], "on the image")


@dataclass(frozen=True, kw_only=True)
class PixelNoise(Noise):
    """Noise on the processed pixels, in standard deviations of the pictures' own normalised pixel values.

    The vision tower runs once for each sample. Normalised values may leave the range of a real picture.
    """

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption by scale. Raises `TraceError` without a picture, or if all its pixels are equal."""
        check_pictures(prompt)
        inputs, where = prompt.with_answer(None).inputs, "on the pixels"
        name = pixel_name(inputs) or "pixel_values"
        pixels = inputs[name]
        kept, deviation, drawn = pixels.cpu().double(), _deviation(pixels, where), self._drawn(*pixels.shape)

        def corrupted(scale: float) -> Corrupted:
            noised = tuple(ReadOnly({**inputs, name: (kept + scale * deviation * each).to(pixels)}) for each in drawn)
            # Samples are processed one at a time, like the clean picture: another batch size would round differently.
            changed = DecoderInput.of_runs([vlm.embed(prompt, each) for each in noised])
            details = {"embeddings": changed.embeddings, "frame": changed.frame, "inputs": noised}
            return self._corrupted(scale, deviation, where, **details)

        return corrupted


def _deviation(entries: Tensor, where: str) -> float:
    """Return the standard deviation of all entries. Raises `TraceError` if it is zero or not finite."""
    deviation = entries.cpu().double().std().item()
    if not (math.isfinite(deviation) and deviation > 0):
        raise TraceError(
            f"noise {where} is measured in standard deviations, and here that is {deviation:g}; use another "
            "corruption, such as SwapImage or ReplaceText"
        )
    return deviation


def calibrate(
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, score: Callable[[DecoderInput], float]
) -> Corrupted:
    """Return the prompt under the smallest noise that halves the score.

    The scales of `LADDER` are tried in turn on the same random numbers, until the score is at most half of the clean
    one. If no scale suffices, the one with the lowest score is taken. Noise with a scale, and any other corruption, is
    applied unchanged.

    Args:
        vlm: The model.
        prompt: The question.
        corruption: Noise with scale=None, or any other corruption.
        score: A function from the input of the text stack (`vlm.embed`) to the answer's mean probability.

    Returns:
        The corrupted prompt; its description says that the scale was calibrated.

    Raises:
        TraceError: A score is not finite.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?", constraint="Draivo")
        >>> likeliest = vlm.next_token_probabilities(vlm.embed(prompt))[0].argmax()
        >>> from multrace.tracing import calibrate
        >>> def score(entering):
        ...     return float(vlm.next_token_probabilities(entering)[:, likeliest].mean())
        >>> noise = calibrate(vlm, prompt, mt.TextNoise(scale=None, samples=2, seed=1), score)
        >>> clean = vlm.embed(prompt)
        >>> score(noise.entering(clean)) <= score(clean) / 2
        True
    """
    if not isinstance(corruption, Noise) or corruption.scale is not None:
        return corruption.corrupt(vlm, prompt)
    clean = vlm.embed(prompt)
    half = _finite(score(clean), "the clean prompt") / 2
    noised = corruption.draw(vlm, prompt)
    lowest, best = math.inf, None
    for scale in LADDER:
        corrupted = noised(scale)
        value = _finite(score(corrupted.entering(clean)), f"noise of scale {scale:g}")
        if value <= half:
            return _described(corrupted, "calibrated")
        if value < lowest:
            lowest, best = value, corrupted
    assert best is not None, "every score is finite, so some scale has the lowest one"
    return _described(best, "calibrated (no scale tried halves the score)")


def _described(corrupted: Corrupted, text: str) -> Corrupted:
    return replace(corrupted, description=f"{corrupted.description}, {text}")


def _finite(score: float, what: str) -> float:
    """Return the score if it is finite."""
    if not math.isfinite(score):
        raise TraceError(
            f"the score of {what} is {score}, so no noise can be calibrated by it; load the model with dtype='float32' "
            "or pass a scale"
        )
    return float(score)


@dataclass(frozen=True, kw_only=True)
class ZeroAblation:
    """A corruption that replaces the embeddings of a token group by zeros."""

    group: str = "image"
    """The token group that is ablated."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return one sample. Raises `TraceError` if the group is absent or empty."""
        embeddings = _filled(vlm, prompt, group_positions(prompt, self.group), torch.zeros(()))
        return Corrupted(embeddings=embeddings, description=f"zeros on the {self.group} tokens")


@dataclass(frozen=True, kw_only=True)
class MeanAblation:
    """A corruption that replaces each embedding of a token group by the mean embedding of a reference set."""

    references: Sequence[Picture] = ()
    """For image tokens: pictures (paths or PIL), whose features are averaged over all their tokens and all pictures.
    For words: phrases, whose embeddings are averaged over all their tokens."""
    group: str = "image"
    """The token group that is ablated: image tokens or words, not both."""

    def __post_init__(self) -> None:
        if not isinstance(self.references, Image.Image | PathLike) and not self.references:
            raise TraceError(
                "a mean needs something to be the mean of; pass references=, pictures for image tokens or phrases for "
                "words"
            )

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return one sample.

        Raises `TraceError` if the group is empty or holds both image tokens and words, and `ModelError` for a picture
        that cannot be read.
        """
        positions, image = group_positions(prompt, self.group), set(prompt.groups["image"])
        references = self.references
        if isinstance(references, str | PathLike | Image.Image):
            references = (references,)
        if image.issuperset(positions):
            kind, entries = "pictures", _image_embeddings(vlm, prompt, references)
        elif image.isdisjoint(positions):
            kind, entries = "phrases", word_embeddings(vlm, cast("Sequence[str]", references))
        else:
            raise TraceError(
                f"group {self.group!r} holds image tokens and words, which have no mean in common; ask for 'image' or "
                "for a group of words"
            )
        return Corrupted(
            embeddings=_filled(vlm, prompt, positions, entries.mean(0)),
            description=f"mean over {len(references)} reference {kind} on the {self.group} tokens",
        )


def _filled(vlm: VisionLanguageModel, prompt: Prompt, positions: tuple[int, ...], value: Tensor) -> Tensor:
    """Return (1, token, hidden): the prompt's embeddings with one value, (hidden,) or a number, at some positions."""
    embeddings = vlm.embed(prompt).embeddings
    embeddings[:, list(positions)] = value.to(embeddings)
    return embeddings


def _image_embeddings(vlm: VisionLanguageModel, prompt: Prompt, pictures: Sequence[Picture]) -> Tensor:
    """Return (image token, hidden) float64 on the CPU: every token of every picture, as the decoder receives it."""
    shown = [vlm.prompt(picture, prompt.question) for picture in open_images(pictures)]
    return torch.cat([vlm.embed(each).embeddings[0, list(each.groups["image"])].cpu().double() for each in shown])


# ---- the spelling ----

SPELLINGS = (
    "swap:other.jpg, replace:Paris city, text-noise:3, image-noise:3, pixel-noise:3, blank, blur:10, "
    "boxes:0,0,50,50;60,0,99,50, zero:image or mean:one.jpg,two.jpg; a noise whose scale is auto, as in "
    "text-noise:auto, is calibrated"
)
"""One example of each corruption."""


def parse_corruption(text: str) -> Corruption:
    """Return the corruption that this text describes.

    The spellings are swap:PATH, replace:PHRASE, text-noise[:SCALE], image-noise[:SCALE], pixel-noise[:SCALE] (a SCALE
    may be "auto"), blank, blur[:RADIUS], boxes:L,T,R,B[;L,T,R,B...], zero[:GROUP] and mean:PATH[,PATH...]. Raises
    `TraceError` for anything else.

    Example:
        >>> from multrace.tracing import parse_corruption
        >>> parse_corruption("blur:5")
        BlurImage(image=None, radius=5.0)
    """
    kind, _, value = text.partition(":")
    readers: dict[str, Callable[[str, str], Corruption | None]] = {
        "swap": lambda value, _: SwapImage(value) if value else None,
        "replace": lambda value, _: ReplaceText(value),
        "text-noise": lambda value, text: _noise(TextNoise, value, text),
        "image-noise": lambda value, text: _noise(ImageNoise, value, text),
        "pixel-noise": lambda value, text: _noise(PixelNoise, value, text),
        "blank": lambda value, _: None if value else BlankImage(),
        "blur": lambda value, text: BlurImage(radius=_number(value, text, "radius")) if value else BlurImage(),
        "boxes": lambda value, text: MaskBoxes(boxes=tuple(_box(each, text) for each in value.split(";"))),
        "zero": lambda value, _: ZeroAblation(group=value) if value else ZeroAblation(),
        "mean": lambda value, _: _mean(value),
    }
    corruption = readers[kind](value.strip(), text) if kind in readers else None
    if corruption is None:
        raise TraceError(f"no corruption {text!r}; write {SPELLINGS}")
    return corruption


def corruption_pictures(corruption: Corruption) -> tuple[str, ...]:
    """Return the paths of the pictures that a corruption from `parse_corruption` names."""
    if isinstance(corruption, SwapImage):
        return (str(corruption.image),)
    return tuple(str(path) for path in corruption.references) if isinstance(corruption, MeanAblation) else ()


def _noise(kind: type[Noise], value: str, text: str) -> Noise:
    """Return noise of the default scale, of a calibrated one ("auto") or of the given one."""
    if not value:
        return kind()
    return kind(scale=None if value == "auto" else _number(value, text, "noise scale"))


def _mean(value: str) -> MeanAblation | None:
    """Return the ablation of the image tokens by the mean over these pictures, or None if no picture is given."""
    paths = tuple(path.strip() for path in value.split(",") if path.strip())
    return MeanAblation(references=paths) if paths else None


def _number(value: str, text: str, what: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise TraceError(
            f"{value!r} in {text!r} is not a number; write the {what}, such as {text.split(':')[0]}:3"
        ) from None


def _box(value: str, text: str) -> Box:
    edges = value.split(",")
    try:
        left, top, right, bottom = (int(edge) for edge in edges)
    except ValueError:
        raise TraceError(
            f"{value!r} in {text!r} is no box; write left, top, right and bottom in pixels, such as boxes:0,0,50,50"
        ) from None
    return left, top, right, bottom
