"""What turns words and pictures into tensors: the processor, and how words align with positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import ModelError
from .texts import check_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontend:
    """Processor and tokenizer of a model, with what `Prompt` must know about it."""

    processor: Any
    """The processor, or the tokenizer again for a text-only model."""
    tokenizer: Any
    image_token_id: int | None
    """The id that stands for one image position; None for a text-only model."""
    patch_size: int | None
    """Side of one vision patch in pixels; None for a text-only model."""
    dropped_inputs: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def image_token(self) -> str | None:
        """The text of one image position."""
        return None if self.image_token_id is None else self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and character offsets of the text, with one token per picture, as the processor sees it."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=self._adds_special(text))
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Model inputs of the text (batch one): input_ids and attention_mask (1, token), and the pictures' tensors."""
        special = self._adds_special(text)
        if self.image_token_id is None:
            encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)
        else:
            pictures = list(images) or None
            encoded = self.processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=special)
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in encoded.items()
            if name not in self.dropped_inputs
        }

    def answer_ids(self, text: str, answer: str) -> tuple[int, ...]:
        """Tokens that continue the text with the answer, end-of-sequence not included.

        Text, blank and answer are tokenised together, so that the answer gets the tokens it has in running text;
        apart if the answer's first letters would melt into the text's last token. ModelError for an empty answer.
        """
        answer = check_text(answer, "answer").strip()
        if not answer:
            raise ModelError("the answer is empty; pass the words that the model should say")
        continuation = answer if not text or text[-1].isspace() else f" {answer}"
        prefix, _ = self.tokenize(text)
        whole, _ = self.tokenize(text + continuation)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return tuple(whole[len(prefix) :])
        return tuple(self.tokenizer(continuation, add_special_tokens=False)["input_ids"])

    def _adds_special(self, text: str) -> bool:
        """A chat template may already have written the beginning-of-sequence token."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))


def align(short: Sequence[int], long: Sequence[int], image_token_id: int | None) -> tuple[int | None, ...]:
    """For each token of the text with one token per picture, its position after the processor expanded the pictures.

    None for a picture's token. Whatever the processor put in a picture's place is skipped, so its form does not matter.
    ModelError if the words themselves changed.
    """
    pieces: list[list[int]] = [[]]
    for token in short:
        if token == image_token_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    starts = [0]
    cursor = len(pieces[0])
    for piece in pieces[1:-1]:
        cursor += 1  # a picture has one position at least
        while long[cursor : cursor + len(piece)] != piece and cursor < len(long):
            cursor += 1
        starts.append(cursor)
        cursor += len(piece)
    if len(pieces) > 1:
        starts.append(len(long) - len(pieces[-1]))
    aligned: list[int | None] = []
    for index, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        if start < 0 or list(long[start : start + len(piece)]) != piece:
            raise ModelError(
                "the processor's tokens are not the tokenizer's; this processor rewrites the words of a prompt"
            )
        aligned += [None] * (index > 0) + list(range(start, start + len(piece)))
    if len(pieces) == 1 and len(long) != len(short):
        raise ModelError("the processor's tokens are not the tokenizer's; this processor adds tokens to a prompt")
    return tuple(aligned)
