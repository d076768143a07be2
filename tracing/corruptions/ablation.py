"""Ablation of a token group: its embeddings are replaced by zeros or by the mean of a reference set."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from PIL import Image
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.images import Picture, open_images
from ..engine.positions import group_positions
from ..errors import TraceError
from .corruption import Corrupted
from .words import word_embeddings


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
            kind, entries = "phrases", word_embeddings(vlm, references)
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
