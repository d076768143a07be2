"""The protocol of all corruptions, and the phrases by which questions refer to pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.errors import check_text
from ...models.frame import DecoderInput, Frame
from ..engine.cells import TraceError


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A corrupted prompt, which has as many tokens as before and may have several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the text stack reads, up to and including the prompt's last token."""
    frame: Frame | None = None
    """What the text stack is called with beside the embeddings, if that changed; None for the clean prompt's frame."""
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

    def entering(self, clean: DecoderInput) -> DecoderInput:
        """Return the corrupted input of the text stack, given that of the clean prompt."""
        frame = clean.frame if self.frame is None else self.frame
        return DecoderInput(embeddings=self.embeddings, frame=frame)


class Corruption(Protocol):
    """A method that destroys part of a prompt and keeps its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return the corrupted prompt; neither the model nor the prompt changes."""


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
