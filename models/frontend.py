"""From a question and its pictures to tensors: pictures, template and processor, and where each word went."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.errors import DataError
from ..data.pictures import Picture, read_pictures
from .errors import ModelError, check_text, gist, quoted, reason
from .guards import without_panics

_NOT_OF_PICTURES = ("tokenizer", "chat_template", "video_processor")
"""Parts of a processor that do not decide what becomes of a picture."""
_MARK = "\ue000"  # a private-use character: no template and no question contains it


def open_images(image: Picture | Sequence[Picture] | None) -> tuple[Image.Image, ...]:
    """Return the pictures as `data.read_pictures` does: RGB, fully read, upright, transparent pixels white.

    Args:
        image: A path, a PIL image, a sequence of these, or None for no picture.

    Returns:
        One image per picture, in the order given.

    Raises:
        ModelError: A picture cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million, or
            what `multrace.data.megapixel_limit` sets); the message says what was found and what to do.
    """
    try:
        return read_pictures(image)
    except DataError as error:
        raise ModelError(str(error)) from error


def frame(processor: Any, *, images: int, image_word: str | None, template: str | None = None) -> tuple[str, str]:
    """Return the text before and after the question; together they contain the picture's word once per picture.

    Args:
        processor: The processor, or the tokenizer of a text-only model.
        images: Number of pictures.
        image_word: What the processor reads as the place of a picture; empty if it needs no such word, and None for a
            text-only model.
        template: None for the model's own (the processor's chat template; "USER: <image>\\n{question} ASSISTANT:" where
            it has none; the bare question for a text-only model without one), "raw" for the pictures' words and the
            question alone, or a text with {question} once and {image} once for all pictures or once for each. Without
            pictures, {image} stands for nothing.

    Raises:
        ModelError: The template cannot be rendered, or shows the question or the pictures more or less often than it
            should.
    """
    if images and image_word is None:
        raise ModelError("this is a text-only model; pass image=None")
    words = [image_word or ""] * images
    if template == "raw":
        return "".join(words), ""
    if template is not None:
        rendered = _custom(template, words)
    elif getattr(processor, "chat_template", None):
        rendered = _chat(processor, images, has_vision=image_word is not None)
    elif image_word is None:
        rendered = _MARK
    else:
        rendered = "USER: " + "".join(f"{word}\n" for word in words if word) + _MARK + " ASSISTANT:"
    check_text(rendered, "template")
    if rendered.count(_MARK) != 1:
        raise ModelError(f"the template shows the question {rendered.count(_MARK)} times; it must show it exactly once")
    if image_word and template is not None and rendered.count(image_word) != images:
        raise ModelError(
            f"the template {template!r} shows {rendered.count(image_word)} pictures and the prompt has {images}; "
            f"write {{image}} in place of {image_word!r}"
        )
    before, after = rendered.split(_MARK)
    return before, after


def _custom(template: str, image_words: list[str]) -> str:
    if "{question}" not in check_text(template, "template"):
        raise ModelError(f"the template {template!r} has no {{question}}; write where the question goes")
    shown, given = template.count("{image}"), len(image_words)
    if given and not shown:
        raise ModelError(f"the template {template!r} has no {{image}}; write where the picture goes")
    if given and shown not in (1, given):
        raise ModelError(
            f"the template {template!r} has {{image}} {shown} times and the prompt has {given} "
            f"picture{'s' if given > 1 else ''}; write it once for all pictures, or once for each"
        )
    parts = image_words if shown == given else ["\n".join(filter(None, image_words))] * shown
    for part in parts:
        template = template.replace("{image}", part, 1)
    return template.replace("{question}", _MARK)


def _chat(processor: Any, images: int, *, has_vision: bool) -> str:
    content: Any = [*[{"type": "image"}] * images, {"type": "text", "text": _MARK}] if has_vision else _MARK
    messages = [{"role": "user", "content": content}]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a chat template is third-party code, which can raise anything
        where = getattr(processor, "tokenizer", processor).name_or_path
        raise ModelError(
            f"the chat template of {where!r} cannot be rendered: {type(error).__name__}: {gist(error)}; mend its "
            "chat_template, or pass template='raw' or a text with {question} and {image}"
        ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontend:
    """Processor and tokenizer of a model, with everything that making a `Prompt` needs."""

    processor: Any
    """The processor; for a text-only model, the tokenizer."""
    tokenizer: Any
    image_token_id: int | None
    """The id that stands for one image position; None for a text-only model."""
    patch_size: int | None
    """Side length of one vision patch in pixels; None for a text-only model."""
    dropped_inputs: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    limit: int | None = None
    """Number of positions that the model has, as `position_limit` reads it; None if it has no limit."""
    vocab: int | None = None
    """Number of tokens that the model has embeddings for; None if unknown."""
    accepted: frozenset[str] | None = None
    """Names of the inputs that the model takes; None if unknown, so that it gets everything."""
    attended: bool = False
    """True if pictures stand at no position of the prompt, because layers attend to their states."""
    places: bool = True
    """True if an image token shows a part of its picture; False for answers of learned queries."""
    answer_fills: Mapping[str, int] = field(default_factory=dict)
    """What an answer's tokens have in an input that has a number per token, such as token_type_ids; 0 by default."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """Return the object itself, because a copied prompt belongs to the same model."""
        return self

    @cached_property
    def image_token(self) -> str | None:
        """The text of one image position."""
        return None if self.image_token_id is None else self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    @cached_property
    def image_word(self) -> str | None:
        """What the processor reads as the place of a picture, which need not be the text of an image position.

        Gemma 3 reads `<start_of_image>` and writes `<image_soft_token>`, for example, and HunYuan-VL reads its image
        token only between the tokens that begin and end a picture. Empty for a processor that puts pictures first by
        itself and does not count a word for one; None for a text-only model.
        """
        if self.image_token_id is None:
            return None
        placeholder = getattr(self.processor, "image_placeholder_token", None)
        named = placeholder or getattr(self.processor, "image_token", None)
        word = str(getattr(named, "content", named) or self.image_token)
        if alone := self._image_tokens(""):
            return word if alone == self._image_tokens(word) else ""
        edges = [getattr(self.processor, f"image_{edge}_token", None) for edge in ("start", "end")]
        if not all(edges) or self._image_tokens(word):
            return word
        between = f"{edges[0]}{word}{edges[1]}"
        return between if self._image_tokens(between) else word

    def _image_tokens(self, word: str) -> int:
        """Return how many image positions the processor makes of this word and one picture; 0 if it refuses them."""
        try:
            ids = self._processed(f"{word} ?", [Image.new("RGB", (64, 64))], special=True)["input_ids"]
        except ModelError:
            return 0
        return ids.flatten().tolist().count(self.image_token_id)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as one special token each, the image token among them, longest first.

        Single characters and plain words are excluded: some tokenizers pad with "!", which also occurs in questions.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {self.image_token or "", self.image_word or ""}
        return tuple(sorted((text for text in special if _is_markup(text)), key=len, reverse=True))

    @property
    def most_tiles(self) -> int | None:
        """LLaVA-OneVision's largest number of tiles, of which "anyres_max_9" is an example; None for other models."""
        number = str(getattr(self.processor, "vision_aspect_ratio", "")).rpartition("anyres_max_")[2]
        return int(number) if number.isdecimal() else None

    @property
    def padding_id(self) -> int:
        """A token id that fills masked positions: the padding token if the model has it, else one that it has."""
        own = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in own if token is not None and (self.vocab is None or token < self.vocab)), 0)

    @cached_property
    def vocabulary_digest(self) -> str:
        """A sha256 (hex) of the vocabulary: tokenizers that share it mean the same tokens by the same ids."""
        return _digest({} if self.tokenizer is None else self.tokenizer.get_vocab())

    @cached_property
    def picture_digest(self) -> str:
        """A sha256 (hex) of what decides which tensors and image tokens a picture becomes."""
        described = self.processor.to_dict() if self.image_token_id is not None else {}
        settings = {name: value for name, value in described.items() if name not in _NOT_OF_PICTURES}
        return _digest([self.image_token_id, self.patch_size, settings])

    def accepts(self, other: "Frontend", *, has_pictures: bool) -> bool:
        """Return whether inputs made by the other frontend mean the same to this one.

        Returns True for the same object, and for two with equal vocabularies and, if there are pictures, equal image
        processors: two copies of one model accept each other's prompts.
        """
        if other is self:
            return True
        if has_pictures and other.picture_digest != self.picture_digest:
            return False
        return other.tokenizer is self.tokenizer or other.vocabulary_digest == self.vocabulary_digest

    def check_words(self, text: Any, what: str) -> str:
        """Return the text. Raise `ModelError`, which calls it `what`, if it is not a text or contains a special token.

        A tokenizer would read "</s>" in a question as the end of the sequence, not as four characters.
        """
        special = next((token for token in self.special_tokens if token in check_text(text, what)), None)
        if special is None:
            return text
        is_image = special in (self.image_token, self.image_word)
        name = "image token" if is_image else "special token"
        remedy = "pass pictures as image=" if is_image else "write it in other words"
        raise ModelError(f"the {what} {text!r} holds the {name} {special!r}, which is not read as text; {remedy}")

    def check_length(self, tokens: int) -> None:
        """Raise `ModelError` if there are more tokens than the model has positions."""
        if self.limit is not None and tokens > self.limit:
            raise ModelError(
                f"the prompt has {tokens} tokens, its answer included, and the model has {self.limit} positions; "
                "shorten the text or pass fewer pictures"
            )

    def check_width(self, width: int, attention_mask: torch.Tensor | None) -> None:
        """Raise `ModelError` if a row of a batch has more tokens, without padding, than the model has positions."""
        if self.limit is not None and width > self.limit:
            if attention_mask is not None and attention_mask.ndim == 2:
                width = int(attention_mask.sum(-1).max())
            self.check_length(width)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and character offsets of the text, with one token per picture, as the processor reads it."""
        special = self._adds_special(text)
        encoded = self._tokenized(text, return_offsets_mapping=True, add_special_tokens=special)
        end = len(encoded["input_ids"]) - special * self._appended
        return encoded["input_ids"][:end], encoded["offset_mapping"][:end]

    def encode(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return model inputs of the text (batch one): input_ids and attention_mask (1, token), and picture tensors.

        Tokens that a tokenizer appends, such as an end-of-sequence token, are omitted because an answer follows.
        Raises `ModelError` if the processor fails.
        """
        special = self._adds_special(text)
        encoded = {name: value for name, value in self.outputs(text, images).items() if self.passes(name)}
        length = encoded["input_ids"].shape[1]
        self._check_ids(encoded["input_ids"][0].tolist())
        end = length - special * self._appended
        return to_device(
            {name: value[:, :end] if is_per_token(name, value, length) else value for name, value in encoded.items()},
            self.device,
            self.dtype,
        )

    def outputs(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Tensor]:
        """Return everything that the processor makes of the text (batch one), used by the model or not."""
        special = self._adds_special(text)
        if self.image_token_id is None:
            return self._tokenized(text, return_tensors="pt", add_special_tokens=special)
        if len(images) > 1 and not self.image_word:
            raise ModelError(
                "the processor puts a picture before the words by itself and has no word for a second one; "
                f"pass one picture instead of {len(images)}"
            )
        return self._processed(text, images, special)

    def passes(self, name: str) -> bool:
        """Return whether an output of the processor is an input of the model; labels are for training only."""
        is_taken = self.accepted is None or name in self.accepted
        return is_taken and name != "labels" and name not in self.dropped_inputs

    def answer_ids(self, text: str, answer: str, *, after: str | None = None) -> tuple[int, ...]:
        """Return the tokens that continue the text with the answer, without an end-of-sequence token.

        after: the text of the prompt's last token, where the processor adds to the text; default: the text's own end.

        Text, space and answer are tokenised together, so that the answer gets the tokens it has in running text. They
        are tokenised separately if the answer's first letters would merge with the text's last token. Raises
        `ModelError` if the answer is empty or contains a special token.
        """
        answer = self.check_words(answer, "answer").strip()
        if not answer:
            raise ModelError("the answer is empty; pass the words that the model should say")
        end = text if after is None else after
        continuation = answer if not end or end[-1].isspace() else f" {answer}"
        prefix, _ = self.tokenize(text)
        whole, _ = self.tokenize(text + continuation)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            ids = whole[len(prefix) :]
        else:
            ids = self._tokenized(continuation, add_special_tokens=False)["input_ids"]
        self._check_ids(ids)
        return tuple(ids)

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raise `ModelError` if the tokenizer gives a token that the model has no embedding for."""
        for token in ids:
            if self.vocab is not None and token >= self.vocab and token != self.image_token_id:
                text = self.tokenizer.convert_ids_to_tokens(token)
                raise ModelError(
                    f"the tokenizer of {self.tokenizer.name_or_path!r} reads {text!r} as token {token}, and the model "
                    f"has {self.vocab} tokens; mend its tokenizer.json and tokenizer_config.json, or fetch them again"
                )

    def _adds_special(self, text: str) -> bool:
        """Return whether to add special tokens: a chat template may already have written the first one."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    @cached_property
    def _appended(self) -> int:
        """The number of special tokens that the tokenizer appends to a text."""
        mask = self._tokenized("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return next((count for count, is_special in enumerate(reversed(mask)) if not is_special), 0)

    def _tokenized(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Return what the tokenizer makes of the text. Raise `ModelError` if it fails."""
        try:
            with without_panics():
                return self.tokenizer(text, **options)
        except Exception as error:  # tokenizers raises Exception itself
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} cannot read {quoted(text)}: {reason(error)}; mend "
                "its tokenizer.json, or fetch it again"
            ) from error

    def _processed(self, text: str, images: Sequence[Image.Image], special: bool) -> Mapping[str, Tensor]:
        name, options = self.tokenizer.name_or_path, {"return_tensors": "pt", "add_special_tokens": special}
        try:
            with without_panics(), np.errstate(all="ignore"):
                inputs = self.processor(images=list(images) or None, text=text, **options)
        except Exception as error:  # a processor may run third-party code, which can raise anything
            sizes = list(dict.fromkeys(f"{image.width} x {image.height}" for image in images))
            if len(sizes) > 1 and self._takes(images=[images[0]] * len(images), text=text, **options):
                raise ModelError(
                    f"the processor of {name!r} takes no pictures of unequal sizes ({', '.join(sizes)} pixels) in one "
                    "prompt; pass pictures of one size, such as picture.resize(...)"
                ) from error
            count = f"{len(images)} picture{'' if len(images) == 1 else 's'}"
            raise ModelError(
                f"the processor of {name!r} cannot turn {count} and the text {text!r} into model inputs: "
                f"{type(error).__name__}: {gist(error)}"
            ) from error
        pixels = (value for part, value in inputs.items() if part.startswith("pixel") and isinstance(value, Tensor))
        if any(value.is_floating_point() and not value.isfinite().all() for value in pixels):
            raise ModelError(
                f"the processor of {name!r} makes pixels that are not finite: its image_mean, image_std or "
                "rescale_factor is wrong"
            )
        return inputs

    def _takes(self, **options: Any) -> bool:
        """Return whether the processor can be called with these arguments."""
        try:
            with without_panics():
                self.processor(**options)
        except Exception:  # the caller reports its own error
            return False
        return True


def is_per_token(name: str, value: Tensor, length: int) -> bool:
    """Return whether an input has one entry per token of a prompt of this length (1, token, ...).

    Pictures and the tokens of a Q-Former can have that shape by chance.
    """
    return value.shape[:2] == (1, length) and not name.startswith(("qformer", "pixel", "image"))


def to_device(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors on this device, with floating-point tensors converted to this dtype."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in tensors.items()
    }


def position_limit(config: Any) -> int | None:
    """Return how many positions a model with this Hugging Face configuration has; None if it states no limit.

    A scaling factor of rotary positions multiplies the limit; dynamically scaled positions have no limit.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = list(ropes.values()) if ropes and all(isinstance(rope, dict) for rope in ropes.values()) else [ropes]
    if any(rope.get("rope_type") == "dynamic" for rope in ropes):
        return None
    original = ((rope.get("original_max_position_embeddings") or stated, rope.get("factor") or 1) for rope in ropes)
    return max(stated, *(int(length * factor) for length, factor in original))


def align(
    short: Sequence[int | None], long: Sequence[int], *, added: Sequence[bool] | None = None
) -> tuple[int | None, ...]:
    """Return the position of each token of the tokenizer's text in the processor's, which has pictures written out.

    The processor's replacement of a picture is skipped, so its form does not matter. Where the processor also adds or
    moves words (PaliGemma writes the first token after the pictures and a line end at the end), runs of equal tokens
    are matched, longest first.

    Args:
        short: The tokenizer's ids, with None in place of every token of a picture's word; its position is None.
        long: The processor's ids.
        added: True for tokens that the tokenizer adds to the text; they have no position if the processor moves words.

    Raises:
        ModelError: The words themselves changed.
    """
    exact = _skipping(short, long)
    if exact is not None:
        return exact
    aligned: list[int | None] = [None] * len(short)
    wanted = [token is not None and not own for token, own in zip(short, added or [False] * len(short), strict=True)]
    masked = [token if is_wanted else -1 for token, is_wanted in zip(short, wanted, strict=True)]  # equal to no id
    for start, place, size in SequenceMatcher(None, masked, long, autojunk=False).get_matching_blocks():
        aligned[start : start + size] = range(place, place + size)
    if any(place is None and is_wanted for place, is_wanted in zip(aligned, wanted, strict=True)):
        raise ModelError(
            "the processor's tokens are not the tokenizer's; this processor rewrites the words of a prompt"
        )
    return tuple(aligned)


def _skipping(short: Sequence[int | None], long: Sequence[int]) -> tuple[int | None, ...] | None:
    """Return the alignment where the words between pictures are as they were; None if they are not."""
    pieces: list[list[int]] = [[]]
    for token in short:
        if token is None:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if len(pieces) == 1 and len(long) != len(short):
        return None
    starts = [0]
    cursor = len(pieces[0])
    for piece in pieces[1:-1]:
        cursor += 1  # a picture has at least one position
        while long[cursor : cursor + len(piece)] != piece and cursor < len(long):
            cursor += 1
        starts.append(cursor)
        cursor += len(piece)
    if len(pieces) > 1:
        starts.append(len(long) - len(pieces[-1]))
    aligned: list[int | None] = []
    for index, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        if start < 0 or list(long[start : start + len(piece)]) != piece:
            return None
        aligned += [None] * (index > 0) + list(range(start, start + len(piece)))
    return tuple(aligned)


def _is_markup(text: str) -> bool:
    """Return whether a special token's text differs from ordinary words, as "</s>" and "[SEP]" do."""
    return len(text.strip()) > 1 and not text.strip().isalnum()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
