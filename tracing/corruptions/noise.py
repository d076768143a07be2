"""Gaussian noise on words, on the image's embeddings or on pixels, in multiples of a standard deviation."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError
from ..groups import group_positions
from .corpus import CONSTRAINTS, word_embeddings
from .corruption import Corrupted


@dataclass(frozen=True, kw_only=True)
class Noise(ABC):
    """Several samples of Gaussian noise; what it lies on, a subclass says.

    Drawn in float64 on the CPU from the seed, so the same on every machine, device and precision.
    """

    scale: float | None = 3.0
    """Standard deviation of the noise in multiples of the deviation; None: `calibrate` or `causal_trace` finds it."""
    samples: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise TraceError(
                f"noise scale {self.scale} destroys nothing; pass a positive number, such as 3, or None to calibrate it"
            )
        if self.samples < 1:
            raise TraceError(f"{self.samples} noise samples; pass at least 1, such as 10")

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """`samples` samples, the same for the same seed. TraceError without a scale, or where nothing can be noised."""
        if self.scale is None:
            raise TraceError(
                f"{type(self).__name__} has no scale yet (scale=None); use causal_trace or calibrate, which find one, "
                "or pass a number, such as scale=3"
            )
        return self.draw(vlm, prompt)(self.scale)

    @abstractmethod
    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """The damage as a function of the scale; the random numbers are drawn once, here."""

    def _drawn(self, *shape: int) -> Tensor:
        """(sample, *shape) float64: standard normal numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.samples, *shape, generator=generator, dtype=torch.float64)

    def _corrupted(self, scale: float, deviation: float, where: str, **found: object) -> Corrupted:
        description = f"noise of {scale:g} standard deviations {where}, {self.samples} samples"
        return Corrupted(description=description, seed=self.seed, scale=scale, deviation=deviation, **found)

    def _on_tokens(self, clean: Tensor, positions: list[int], entries: Tensor, where: str) -> Callable[..., Corrupted]:
        """The noise on some positions of the clean embeddings (1, token, hidden), in deviations of these entries."""
        deviation = _deviation(entries, where)
        drawn, kept = self._drawn(len(positions), clean.shape[-1]), clean[:, positions].cpu().double()

        def corrupted(scale: float) -> Corrupted:
            embeddings = clean.repeat(self.samples, 1, 1)
            embeddings[:, positions] = (kept + scale * deviation * drawn).to(clean)
            return self._corrupted(scale, deviation, where, embeddings=embeddings)

        return corrupted


@dataclass(frozen=True, kw_only=True)
class TextNoise(Noise):
    """Noise on the embeddings of a group's tokens; ROME's corruption (arXiv 2202.05262).

    The deviation that `scale` multiplies is that of all embedding entries of the tokens of a corpus of constraints, as
    ROME takes that of its known subjects; or with over="prompt" that of the group's own tokens.
    """

    group: str = "constraint"
    over: Literal["corpus", "prompt"] = "corpus"
    corpus: tuple[str, ...] | None = None
    """Phrases of your own; None for the corpus that comes with the package."""

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
        """TraceError if the group is absent or empty, or if the corpus has no tokens."""
        positions, clean = list(group_positions(prompt, self.group)), vlm.embed(prompt)
        if self.over == "prompt":
            return self._on_tokens(clean, positions, clean[0, positions], f"of their own on the {self.group} tokens")
        entries = word_embeddings(vlm, CONSTRAINTS if self.corpus is None else self.corpus)
        return self._on_tokens(clean, positions, entries, f"over a corpus on the {self.group} tokens")


@dataclass(frozen=True, kw_only=True)
class ImageNoise(Noise):
    """Noise on the image's embeddings, after vision tower and projector, in deviations of their own entries."""

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """TraceError if the prompt has no picture."""
        positions, clean = list(group_positions(prompt, "image")), vlm.embed(prompt)
        return self._on_tokens(clean, positions, clean[0, positions], "on the image")


@dataclass(frozen=True, kw_only=True)
class PixelNoise(Noise):
    """Noise on the pixels that the processor made, in deviations of the pictures' own normalised pixel values.

    The vision tower runs once for each sample. Normalised values may leave the range that a real picture has.
    """

    def draw(self, vlm: VisionLanguageModel, prompt: Prompt) -> Callable[[float], Corrupted]:
        """TraceError if the prompt has no picture, or if all its pixel values are equal."""
        group_positions(prompt, "image")
        inputs, where = prompt.with_answer(None).inputs, "on the pixels"
        pixels = inputs["pixel_values"]
        kept, deviation, drawn = pixels.cpu().double(), _deviation(pixels, where), self._drawn(*pixels.shape)

        def corrupted(scale: float) -> Corrupted:
            noised = tuple(
                MappingProxyType({**inputs, "pixel_values": (kept + scale * deviation * each).to(pixels)})
                for each in drawn
            )
            # One at a time, as the clean picture is seen: a batch of another size would round otherwise.
            embeddings = torch.cat([vlm.embed(prompt, each) for each in noised])
            return self._corrupted(scale, deviation, where, embeddings=embeddings, inputs=noised)

        return corrupted


def _deviation(entries: Tensor, where: str) -> float:
    """Standard deviation of all entries. TraceError if it is none that noise could be a multiple of."""
    deviation = entries.cpu().double().std().item()
    if not (math.isfinite(deviation) and deviation > 0):
        raise TraceError(
            f"noise {where} is measured in standard deviations, and here that is {deviation:g}; use another "
            "corruption, such as SwapImage or ReplaceText"
        )
    return deviation
