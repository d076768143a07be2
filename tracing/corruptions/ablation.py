"""A group's embeddings taken away: zeros in their place, or the mean of a reference set."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from PIL import Image
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.images import Picture, open_images
from ..errors import TraceError
from ..groups import group_positions
from .corpus import word_embeddings
from .corruption import Corrupted


@dataclass(frozen=True, kw_only=True)
class ZeroAblation:
    """Zeros in the place of a group's embeddings."""

    group: str = "image"

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """One sample. TraceError if the group is absent or empty."""
        embeddings = _filled(vlm, prompt, group_positions(prompt, self.group), torch.zeros(()))
        return Corrupted(embeddings=embeddings, description=f"zeros on the {self.group} tokens")


@dataclass(frozen=True, kw_only=True)
class MeanAblation:
    """One mean vector, over a reference set, in the place of each of a group's embeddings."""

    references: Sequence[Picture] = ()
    """For image tokens: pictures (paths or PIL), whose features are averaged over all their tokens and all pictures.
    For words: phrases, whose embeddings are averaged over all their tokens."""
    group: str = "image"

    def __post_init__(self) -> None:
        if not isinstance(self.references, Image.Image | PathLike) and not self.references:
            raise TraceError(
                "a mean needs something to be the mean of; pass references=, pictures for image tokens or phrases for "
                "words"
            )

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """One sample. TraceError if the group is empty or holds both image tokens and words, ModelError as `prompt`."""
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
    """(1, token, hidden): the prompt's embeddings with one value, (hidden,) or a number, at some positions."""
    embeddings = vlm.embed(prompt)
    embeddings[:, list(positions)] = value.to(embeddings)
    return embeddings


def _image_embeddings(vlm: VisionLanguageModel, prompt: Prompt, pictures: Sequence[Picture]) -> Tensor:
    """(image token, hidden) float64 on the CPU: every token of every picture, as the text stack gets it."""
    shown = [vlm.prompt(picture, prompt.question) for picture in open_images(pictures)]
    return torch.cat([vlm.embed(each)[0, list(each.groups["image"])].cpu().double() for each in shown])
