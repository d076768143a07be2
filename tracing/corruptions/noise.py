"""Corruptions of embeddings: noise (also on pixels), zeros, and the mean of a reference set."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from ...data.pictures import Picture
from ...models import Prompt, VisionLanguageModel, open_images
from ...models.prompts import ReadOnly
from ..engine.positions import group_positions
from ..errors import TraceError
from .corruption import CONSTRAINTS, Corrupted, Corruption, word_embeddings

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
        description = f"noise of {scale:g} standard deviations {where}, {self.samples} samples"
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
        positions, clean = list(group_positions(prompt, self.group)), vlm.embed(prompt)
        if self.over == "prompt":
            return self._on_tokens(clean, positions, clean[0, positions], f"of their own on the {self.group} tokens")
        entries = word_embeddings(vlm, CONSTRAINTS if self.corpus is None else self.corpus)
        return self._on_tokens(clean, positions, entries, f"over a corpus on the {self.group} tokens")


@dataclass(frozen=True, kw_only=True)
class ImageNoise(Noise):
    """Noise on the image tokens, after vision tower and projector, in standard deviations of their own entries."""

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption as a function of the scale. Raises `TraceError` if the prompt has no picture."""
        positions, clean = list(group_positions(prompt, "image")), vlm.embed(prompt)
        return self._on_tokens(clean, positions, clean[0, positions], "on the image")


@dataclass(frozen=True, kw_only=True)
class PixelNoise(Noise):
    """Noise on the processed pixels, in standard deviations of the pictures' own normalised pixel values.

    The vision tower runs once for each sample. Normalised values may leave the range of a real picture.
    """

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """Return the corruption by scale. Raises `TraceError` without a picture, or if all its pixels are equal."""
        group_positions(prompt, "image")
        inputs, where = prompt.with_answer(None).inputs, "on the pixels"
        pixels = inputs["pixel_values"]
        kept, deviation, drawn = pixels.cpu().double(), _deviation(pixels, where), self._drawn(*pixels.shape)

        def corrupted(scale: float) -> Corrupted:
            noised = tuple(
                ReadOnly({**inputs, "pixel_values": (kept + scale * deviation * each).to(pixels)}) for each in drawn
            )
            # Samples are processed one at a time, like the clean picture: another batch size would round differently.
            embeddings = torch.cat([vlm.embed(prompt, each) for each in noised])
            return self._corrupted(scale, deviation, where, embeddings=embeddings, inputs=noised)

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
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, score: Callable[[Tensor], float]
) -> Corrupted:
    """Return the prompt under the smallest noise that halves the score.

    The scales of `LADDER` are tried in turn on the same random numbers, until the score is at most half of the clean
    one. If no scale suffices, the one with the lowest score is taken. Noise with a scale, and any other corruption, is
    applied unchanged.

    Args:
        vlm: The model.
        prompt: The question.
        corruption: Noise with scale=None, or any other corruption.
        score: A function from embeddings (sample, token, hidden) to the answer's mean probability.

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
        >>> def score(embeddings):
        ...     return float(vlm.next_token_probabilities(embeddings)[:, likeliest].mean())
        >>> noise = calibrate(vlm, prompt, mt.TextNoise(scale=None, samples=2, seed=1), score)
        >>> score(noise.embeddings) <= score(vlm.embed(prompt)) / 2
        True
    """
    if not isinstance(corruption, Noise) or corruption.scale is not None:
        return corruption.corrupt(vlm, prompt)
    half = _finite(score(vlm.embed(prompt)), "the clean prompt") / 2
    noised = corruption.draw(vlm, prompt)
    lowest, best = math.inf, None
    for scale in LADDER:
        corrupted = noised(scale)
        value = _finite(score(corrupted.embeddings), f"noise of scale {scale:g}")
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
    embeddings = vlm.embed(prompt)
    embeddings[:, list(positions)] = value.to(embeddings)
    return embeddings


def _image_embeddings(vlm: VisionLanguageModel, prompt: Prompt, pictures: Sequence[Picture]) -> Tensor:
    """Return (image token, hidden) float64 on the CPU: every token of every picture, as the decoder receives it."""
    shown = [vlm.prompt(picture, prompt.question) for picture in open_images(pictures)]
    return torch.cat([vlm.embed(each)[0, list(each.groups["image"])].cpu().double() for each in shown])
