"""Replacement of a token group by other words, and the word embeddings of phrases."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.texts import check_text
from ..engine.positions import group_positions
from ..errors import TraceError
from .corruption import Corrupted

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
