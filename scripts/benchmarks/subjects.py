"""The model and prompt that a benchmark traces: opened from a folder as any other, and made sure of its answer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...models import Prompt, VisionLanguageModel, load
from ...tracing import Corruption, ImageNoise, TextNoise
from ...tracing.engine.cells import Runs
from .shapes import Shape, prompt_words

_CONFIDENCE = 0.5
_NOISE = {"text": 3.0, "image": 0.5}
"""Standard deviations; as much as leaves the image-corrupted answer a probability that restoring can be seen in."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that it takes to open the same subject again, in another process too."""

    folder: Path
    shape: Shape
    device: str | None
    seed: int
    samples: Mapping[str, int]
    """Noise samples of the "text" and of the "image" corruption."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model and a question whose answer it finds about as likely as not."""

    vlm: VisionLanguageModel
    prompt: Prompt
    answer: int
    """The likeliest next token of the clean run."""
    recipe: Recipe

    def runs(self, corruption: str) -> Runs:
        """The corrupted and the clean embeddings: noise on the constraint ("text") or on the picture ("image")."""
        settings = {"scale": _NOISE[corruption], "samples": self.recipe.samples[corruption], "seed": self.recipe.seed}
        kinds: Mapping[str, Corruption] = {
            "text": TextNoise(over="prompt", **settings),  # its words are none of a corpus
            "image": ImageNoise(**settings),
        }
        return Runs(
            base=kinds[corruption].corrupt(self.vlm, self.prompt).embeddings,
            source=self.vlm.embed(self.prompt),
            scored=(self.prompt.length - 1,),
            frozen=self.prompt.groups["image"],
        )

    def measure(self, logits: Tensor) -> Tensor:
        """(row, 1) float64: the answer's probability after the last token; logits (row, scored position, vocab)."""
        return logits[:, -1].double().softmax(-1)[:, self.answer, None]


def open_subject(recipe: Recipe) -> Subject:
    """The subject, its output head scaled so that the clean answer has a probability of one half."""
    shape = recipe.shape
    vlm = load(recipe.folder, dtype=shape.dtype, device_map=recipe.device)
    before, after = prompt_words(shape, seed=recipe.seed)
    prompt = vlm.prompt(
        _picture(shape.image, recipe.seed),
        " ".join(after),
        constraint=" ".join(after[: shape.constraint]),
        template=" ".join([*before, "{image}", "{question}"]),
    )
    with torch.no_grad():
        logits = vlm.logits(prompt)[0, -1].double()
        vlm.output_head.weight.mul_(confident(logits))
    return Subject(vlm=vlm, prompt=prompt, answer=int(logits.argmax()), recipe=recipe)


def confident(logits: Tensor) -> float:
    """The factor on logits (vocab,) that gives the likeliest token a probability of one half."""
    low, high = 0.0, 1.0
    while float((high * logits).softmax(-1).max()) < _CONFIDENCE:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        is_enough = float((middle * logits).softmax(-1).max()) >= _CONFIDENCE
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def _picture(side: int, seed: int) -> Image.Image:
    """A picture of noise."""
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
