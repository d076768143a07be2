"""Prompts: the model inputs of a question about pictures, with names for every group of positions."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..data.errors import DataError
from ..data.facts import PictureSource, Question, Words
from ..data.pictures import Picture
from ..data.spans import find_spans
from .errors import ModelError, check_text, plain_number, whole_number
from .frontend import Frontend, align, frame, is_per_token, open_images
from .layout import PictureGrid, grid_boxes, picture_grids, pixels_of

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One image position and the square of its picture that it stands for."""

    position: int
    row: int
    """Row of the patch, counted from the top and from 0."""
    column: int
    """Column of the patch, counted from the left and from 0; rows and columns of tiles are counted over all tiles."""
    image: int = 0
    """Index of the picture in the prompt."""
    is_overview: bool = False
    """True in a copy of the whole picture that the model sees beside its tiles; such a copy has its own rows."""


class ReadOnly(Mapping[str, _Value]):
    """A mapping that cannot be changed, but can be copied and pickled, unlike `types.MappingProxyType`."""

    def __init__(self, items: Mapping[str, _Value]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> _Value:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __or__(self, other: Mapping[str, _Value]) -> dict[str, _Value]:
        return {**self._items, **other}

    def __repr__(self) -> str:
        return repr(self._items)


class PromptInputs(ReadOnly[Tensor]):
    """The tensors of a prompt or a batch, with the frontend that made them, so that no other model takes them."""

    def __init__(self, items: Mapping[str, Tensor], frontend: Frontend) -> None:
        super().__init__(items)
        self.frontend = frontend


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Model inputs of one question (batch one) and the named groups of its positions. Made by `vlm.prompt`.

    A prompt can be copied and pickled; it belongs to the model that made it and to models with an equal vocabulary
    and image processor.
    """

    images: tuple[Image.Image, ...]
    question: str
    text: str
    """The text given to the model, with one image token per picture and without the answer."""
    inputs: Mapping[str, Tensor]
    """input_ids and attention_mask (1, token), pixel_values (image, channel, row, column) if there are pictures."""
    tokens: tuple[str, ...]
    """One readable string per position."""
    groups: Mapping[str, tuple[int, ...]]
    """Positions by name.

    "image": the pictures' tokens. "question": every text token from the end of the last picture to the end of the
    question; "question_only": without separators. If spans were given: "constraint" and "constraint:NAME", all tokens
    of the span; "constraint_last", the last of them. "last": the prompt's final token, which predicts the answer's
    first. "answer": the given answer's tokens, else none. "all": everything up to and including "last".
    """
    template: str | None = None
    """The template that the prompt was made with, as `vlm.prompt` takes it; None for the model's own."""
    sources: tuple[PictureSource, ...] = ()
    """For each picture, the path that it was read from, or the picture in `images` if it came without a path."""
    words: Mapping[str, Words] = field(default_factory=dict)
    """Words of the question by name, as `vlm.prompt(constraint=...)` takes them; "constraint" is the constraint."""
    answer: str | None = None
    answer_ids: tuple[int, ...] = ()
    """Tokens of the answer, without an end-of-sequence token."""
    frontend: Frontend = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", PromptInputs(self.inputs, self.frontend))
        object.__setattr__(self, "groups", ReadOnly(self.groups))
        object.__setattr__(self, "words", ReadOnly(self.words))

    def __repr__(self) -> str:
        pictures = f", {len(self.images)} picture{'s' if len(self.images) > 1 else ''}" if self.images else ""
        answer = "" if self.answer is None else f", answer {_shown(self.answer, 40)}"
        groups = ", ".join(f"{name} {len(positions)}" for name, positions in self.groups.items() if positions)
        size = f"{self.length} tokens{pictures}{answer}"
        return f"Prompt({_shown(self.question, 100 - len(size))}: {size};\n       {_cut(groups, 110)})"

    @property
    def length(self) -> int:
        """Number of positions, including those of the answer."""
        return self.inputs["input_ids"].shape[1]

    @property
    def patch_size(self) -> int | None:
        """Side of one vision patch in pixels of the processed picture; None for a text-only model."""
        return self.frontend.patch_size

    @cached_property
    def grids(self) -> tuple[PictureGrid, ...]:
        """The grids that the image tokens form over their pictures; empty where they form none.

        A picture in tiles has one over all tiles and one over the copy of the whole picture, if there is such a copy.
        """
        if not self.frontend.places:
            return ()
        return picture_grids(
            self.inputs,
            self.groups["image"],
            [image.size for image in self.images],
            patch_size=self.frontend.patch_size,
            most_tiles=self.frontend.most_tiles,
            paint=self.processed,
        )

    @cached_property
    def patches(self) -> tuple[Patch, ...]:
        """Image positions with their row and column, picture by picture; empty where a picture's tokens form no grid.

        Tokens of line ends, classes and padding are not among them, nor is a copy of the whole picture beside its tiles
        (`overview`).
        """
        return self._patches(is_overview=False)

    @property
    def overview(self) -> tuple[Patch, ...]:
        """The patches of the copies of whole pictures that the model sees beside their tiles."""
        return self._patches(is_overview=True)

    def place(self, patch: Patch) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of a patch, in pixels of its original picture.

        Patches of a border that the processor adds lie beyond the picture. The first call runs the image processor
        three times.
        """
        grid, box = next(
            (grid, box)
            for grid, box in zip(self.grids, self._boxes, strict=True)
            if (grid.image, grid.is_overview) == (patch.image, patch.is_overview)
        )
        width, height = (box[2] - box[0]) / grid.columns, (box[3] - box[1]) / grid.rows
        left, top = box[0] + patch.column * width, box[1] + patch.row * height
        return left, top, left + width, top + height

    @cached_property
    def _boxes(self) -> tuple[tuple[float, float, float, float], ...]:
        return grid_boxes(self.grids, [image.size for image in self.images], self.processed)

    @property
    def attends_to_pictures(self) -> bool:
        """Whether its pictures stand at no position, because layers attend to their states (Mllama)."""
        return bool(self.images) and self.frontend.attended

    @property
    def shows_places(self) -> bool:
        """True if each image token shows a part of its picture; False for answers of learned queries to all of it."""
        return self.frontend.places

    def processed(self, images: list[Image.Image]) -> Tensor:
        """Return what the processor makes of other pictures, in float64 on the CPU, unrounded by the model's dtype."""
        pixels = pixels_of(self.frontend.outputs(self.text, images))
        if pixels is None:
            raise ModelError(f"the processor makes no pixels of {len(images)} pictures; pass a prompt with pictures")
        return pixels.double().cpu()

    def _patches(self, *, is_overview: bool) -> tuple[Patch, ...]:
        grids = [grid for grid in self.grids if grid.is_overview == is_overview]
        return tuple(
            Patch(
                position=position,
                row=number // grid.columns,
                column=number % grid.columns,
                image=grid.image,
                is_overview=is_overview,
            )
            for grid in grids
            for number, position in enumerate(grid.positions)
        )

    def seen_pictures(self) -> tuple[Tensor, ...]:
        """Return each picture as the model sees it, resized and cropped: (row, column, channel) in 0 to 1.

        Tiles are put together, and the image processor's own scaling of colours is undone. Raises `ModelError` if the
        image tokens form no grid over the pictures.
        """
        shown = [grid for grid in self.grids if not grid.is_overview]
        pixels = pixels_of(self.inputs)
        if pixels is None or not shown:
            raise ModelError(f"the image tokens of {self.question!r} form no grid over its pictures")
        return tuple(self._coloured(grid.canvas(pixels.double().cpu())) for grid in shown)

    def _coloured(self, pixels: Tensor) -> Tensor:
        """Return (row, column, channel) in 0 to 1 of processed pixels (channel, row, column)."""
        processor = self.frontend.processor.image_processor
        if processor.do_normalize:
            mean, deviation = (
                torch.tensor(each).view(-1, 1, 1) for each in (processor.image_mean, processor.image_std)
            )
            pixels = pixels * deviation + mean
        if not processor.do_rescale:
            pixels = pixels / 255
        return pixels.clamp(0, 1).permute(1, 2, 0)

    def as_question(self) -> Question:
        """Return the plain question: its words, pictures, constraint, other spans and template, without tensors.

        A picture that was read from a path is that path. `vlm.prompt_for` makes a prompt with equal inputs and groups
        of it, for the model that made this one and for others. The answer is left out, since a prompt may be followed
        by any answer, right or wrong.
        """
        spans = {name: words for name, words in self.words.items() if name != "constraint"}
        return Question(
            text=self.question,
            image=self.sources[0] if len(self.sources) == 1 else self.sources or None,
            constraint=self.words.get("constraint"),
            spans=spans,
            template=self.template,
        )

    def inputs_with(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return model inputs of the same words, without an answer, with these pictures in place of its own."""
        return self.frontend.encode(self.text, images)

    def answer_tokens(self, answer: str) -> tuple[int, ...]:
        """Return the token ids by which this answer continues the prompt. Raise `ModelError` if it is empty."""
        return self.frontend.answer_ids(self.text, answer, after=self.tokens[self.groups["last"][0]])

    def asked_anew(self, question: str) -> "Prompt":
        """Return a prompt of another question with the same pictures, template and answer, without constraints."""
        images = list(self.images) or None
        prompt = build(self.frontend, images, question, template=self.template, answer=self.answer)
        return replace(prompt, sources=self.sources)

    def with_answer(self, answer: str | None) -> "Prompt":
        """Return the same prompt followed by this answer's tokens (teacher forcing); None: without an answer.

        Raises:
            ModelError: The answer is empty, holds a special token, or does not fit into the model's positions.
        """
        end = self.groups["last"][0] + 1
        ids = self.answer_tokens(answer) if answer is not None else ()
        self.frontend.check_length(end + len(ids))
        own = {name for name, value in self.inputs.items() if is_per_token(name, value, self.length)}
        inputs = {name: value[:, :end] if name in own else value for name, value in self.inputs.items()}
        added = torch.tensor([ids], dtype=torch.long, device=inputs["input_ids"].device)
        fills = {"attention_mask": 1, **self.frontend.answer_fills}
        for name in own:
            value = inputs[name]
            if value.ndim > 2:  # which pictures a token sees: an answer sees those of the last token
                fill = value[:, -1:].expand(-1, len(ids), *value.shape[2:])
            else:
                fill = added if name == "input_ids" else torch.full_like(added, fills.get(name, 0))
            inputs[name] = torch.cat([value, fill.to(value.dtype)], dim=1)
        return replace(
            self,
            inputs=inputs,
            tokens=self.tokens[:end] + tuple(self.frontend.tokenizer.decode([token]) for token in ids),
            groups={**self.groups, "answer": tuple(range(end, end + len(ids)))},
            answer=answer,
            answer_ids=ids,
        )

    def with_images(self, images: Picture | Sequence[Picture]) -> "Prompt":
        """Return the same prompt, with its answer, for an equal number of other pictures.

        Raises:
            ModelError: There is another number of pictures, one cannot be read, or the processor gives them another
                number of tokens than the present ones.
        """
        opened = open_images(images)
        if len(opened) != len(self.images):
            raise ModelError(
                f"{self.question!r} is about {len(self.images)} pictures and got {len(opened)}; pass as many, or make "
                "a new prompt"
            )
        bare = self.with_answer(None)
        inputs = self.frontend.encode(self.text, opened)
        if not torch.equal(inputs["input_ids"], bare.inputs["input_ids"]):
            length = inputs["input_ids"].shape[1]
            raise ModelError(
                f"the prompt has {length} positions with these pictures and {bare.length} with its own; "
                "pass pictures of the same sizes, or make a new prompt"
            )
        pictures = {"images": opened, "sources": _sources(images, opened)}
        return replace(bare, **pictures, inputs=inputs).with_answer(self.answer)

    def positions(self, group: str | SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
        """Return the positions of a group, of one index (negative counts from the end) or of several.

        Raises:
            ModelError: The prompt has no such group or position; the message lists those that it has.
        """
        if isinstance(group, str):
            if group not in self.groups:
                raise ModelError(f"no token group {group!r}; this prompt has {', '.join(self.groups)}")
            return self.groups[group]
        group = plain_number(group)
        indices = (
            (group,) if isinstance(group, int) else tuple(whole_number(position, "a position") for position in group)
        )
        for position in indices:
            if not -self.length <= position < self.length:
                raise ModelError(f"no position {position}; this prompt has {self.length} (0 to {self.length - 1})")
        return tuple(position % self.length for position in indices)


def build(
    frontend: Frontend,
    image: Picture | Sequence[Picture] | None,
    question: str,
    *,
    constraint: Words | Mapping[str, Words] | None = None,
    answer: str | None = None,
    template: str | None = None,
) -> Prompt:
    """Return the prompt for this question; see `VisionLanguageModel.prompt`."""
    question = frontend.check_words(question, "question").strip()
    if not question:
        raise ModelError("the question is empty; pass what the model should answer")
    images = open_images(image)
    before, after = frame(frontend.processor, images=len(images), image_word=frontend.image_word, template=template)
    words = _named(constraint)
    spans = _places(question, words)
    text = before + question + after
    inputs = frontend.encode(text, images)
    short, offsets = frontend.tokenize(text)
    ids = inputs["input_ids"][0].tolist()
    frontend.check_length(len(ids))
    layout = _Layout(
        offsets=offsets,
        aligned=_aligned(text, short, offsets, ids, frontend.image_word if images else None),
        before=before,
        question=question,
        image_word=frontend.image_word if images else None,
    )
    image_token = None if frontend.attended else frontend.image_token_id
    image_positions = tuple(index for index, token in enumerate(ids) if token == image_token)
    prompt = Prompt(
        images=images,
        question=question,
        text=text,
        inputs=inputs,
        tokens=tuple(frontend.tokenizer.decode([token]) for token in ids),
        groups=_groups(layout, spans, image_positions, len(ids)),
        template=template,
        sources=_sources(image, images),
        words={name: span if isinstance(span, str) else (span[0], span[1]) for name, span in words.items()},
        frontend=frontend,
    )
    return prompt if answer is None else prompt.with_answer(answer)


def build_for(frontend: Frontend, question: Question, *, answer: str | None = None) -> Prompt:
    """Return the prompt of a plain question; see `VisionLanguageModel.prompt_for`."""
    return build(
        frontend,
        question.images or None,
        question.text,
        constraint=question.words or None,
        answer=answer,
        template=question.template,
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The mapping from characters of the prompt's text to its positions."""

    offsets: list[tuple[int, int]]
    aligned: tuple[int | None, ...]
    before: str
    question: str
    image_word: str | None
    """What stands for a picture in the text, as the frontend has it; None without pictures."""

    def positions(self, start: int, end: int) -> tuple[int, ...]:
        """Return positions of text tokens with a character of the question's [start, end); negative: before it."""
        shift = len(self.before)
        positions = (self.aligned[index] for index in covering(self.offsets, start + shift, end + shift))
        return tuple(position for position in positions if position is not None)

    def after_image(self) -> int:
        """Return the end of the last picture before the question, relative to the question's start; 0 without one."""
        if self.image_word == "":
            return -len(self.before)  # the processor puts the pictures before all words
        if self.image_word is None or self.image_word not in self.before:
            return 0
        return self.before.rindex(self.image_word) + len(self.image_word) - len(self.before)


def _aligned(
    text: str, short: Sequence[int], offsets: Sequence[tuple[int, int]], ids: Sequence[int], image_word: str | None
) -> tuple[int | None, ...]:
    """Return the position of each of the tokenizer's tokens among the processor's ids; None for pictures' words."""
    words = [match.span() for match in re.finditer(re.escape(image_word), text)] if image_word else []
    shown = {index for start, end in words for index in covering(offsets, start, end)}
    masked = [None if index in shown else token for index, token in enumerate(short)]
    return align(masked, ids, added=[first == last for first, last in offsets])


def _sources(given: Picture | Sequence[Picture] | None, images: tuple[Image.Image, ...]) -> tuple[PictureSource, ...]:
    """Return the path of each picture that was given as one, and the picture itself for the others."""
    given = () if given is None else (given,) if isinstance(given, str | PathLike | Image.Image) else given
    pairs = zip(given, images, strict=True)
    return tuple(image if isinstance(each, Image.Image) else Path(os.fsdecode(each)) for each, image in pairs)


def _places(question: str, words: Mapping[str, Words]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the places of the words in the question by group name, each (start, end) in characters."""
    for span in words.values():
        check_text(span[0] if isinstance(span, tuple | list) and span else span, "constraint")
    try:
        return {name: find_spans(question, span) for name, span in words.items()}
    except DataError as error:
        raise ModelError(str(error)) from error


def covering(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Return indices of the tokens that hold at least one character of [start, end).

    A token that only holds the blank before the span is not among them; one that holds the blank and the first word is.
    Special tokens that a tokenizer adds have empty offsets and are never among them.
    """
    return tuple(index for index, (first, last) in enumerate(offsets) if first < last and first < end and start < last)


def _named(constraint: Words | Mapping[str, Words] | None) -> dict[str, Words]:
    """Return the words by name; those called "constraint", else the first ones, are the constraint itself."""
    if constraint is None:
        return {}
    if not isinstance(constraint, Mapping):
        return {"constraint": constraint}
    if not constraint:
        raise ModelError("the mapping of constraints is empty; pass constraint=None or name -> words of the question")
    return {"constraint": constraint.get("constraint", next(iter(constraint.values())))} | dict(constraint)


def _groups(
    layout: _Layout, spans: Mapping[str, Sequence[tuple[int, int]]], image: tuple[int, ...], length: int
) -> dict[str, tuple[int, ...]]:
    groups = {
        "image": image,
        "question": layout.positions(layout.after_image(), len(layout.question)),
        "question_only": layout.positions(0, len(layout.question)),
    }
    for name, places in spans.items():
        group = name if name == "constraint" else f"constraint:{name}"
        groups[group] = tuple(dict.fromkeys(position for place in places for position in layout.positions(*place)))
    if "constraint" in groups:
        groups["constraint_last"] = groups["constraint"][-1:]
    return groups | {"last": (length - 1,), "answer": (), "all": tuple(range(length))}


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Return the indices of prompts that `collate` can put into one batch, at most `batch_size` of them together.

    Pictures of unequal size after the processor go into different batches. Batches are in the order of their first
    prompts.
    """
    done: list[list[int]] = []
    open_batches: list[tuple[dict[str, object], list[int]]] = []
    for index, prompt in enumerate(prompts):
        shapes = _fixed_shapes(prompt)
        for known, members in open_batches:
            if all(known[name] == shape for name, shape in shapes.items() if name in known):
                known.update(shapes)
                members.append(index)
                break
        else:
            open_batches.append((shapes, [index]))
            done.append(open_batches[-1][1])
        open_batches = [batch for batch in open_batches if len(batch[1]) < batch_size]
    return done


def _fixed_shapes(prompt: Prompt) -> dict[str, object]:
    """Return what must be equal in a batch: which inputs are per token, and the shape of one row of each input."""
    own = {name for name, value in prompt.inputs.items() if is_per_token(name, value, prompt.length)}
    shapes: dict[str, object] = {
        name: value.shape[:-1] if _is_strip(name, prompt) else value.shape[1 + (name in own) :]
        for name, value in prompt.inputs.items()
    }
    return shapes | {"": own}


def _is_strip(name: str, prompt: Prompt) -> bool:
    """Return whether the input holds patches side by side in one strip (MiniCPM-V), which a batch continues."""
    return name == "pixel_values" and "target_sizes" in prompt.inputs


def collate(prompts: Sequence[Prompt], tokenizer: Any, side: str = "left") -> tuple[PromptInputs, tuple[int, ...]]:
    """Return one batch of inputs, padded on the given side, and by how much each prompt's positions moved.

    Args:
        prompts: At least one prompt, all made by the same model.
        tokenizer: The tokenizer of that model, whose padding token fills the rows.
        side: "left", as generation needs it, or "right".

    Returns:
        The batch: input_ids and attention_mask (prompt, token), and pictures stacked in the order of the prompts. The
        offsets: position p of prompt i is column p + offsets[i] of row i.

    Raises:
        ModelError: There is no prompt, the side is unknown, a prompt was made with another vocabulary or image
            processor than the rest, or pictures have different sizes after the processor (see `batches`).
    """
    if not prompts:
        raise ModelError("no prompts to put into a batch; pass at least one")
    if side not in ("left", "right"):
        raise ModelError(f"no padding side {side!r}; pass 'left' or 'right'")
    _check_alike(prompts, tokenizer)
    longest = max(prompt.length for prompt in prompts)
    offsets = tuple(longest - prompt.length if side == "left" else 0 for prompt in prompts)
    fills = {"input_ids": prompts[0].frontend.padding_id}
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.inputs):
        values = [prompt.inputs[name] for prompt in prompts if name in prompt.inputs]
        if len(values) == len(prompts) and all(
            is_per_token(name, value, prompt.length) for value, prompt in zip(values, prompts, strict=True)
        ):
            values = [_padded(value, longest, side, fills.get(name, 0)) for value in values]
        if _is_strip(name, next(prompt for prompt in prompts if name in prompt.inputs)):
            batch[name] = torch.cat(values, dim=-1)
            continue
        if len({value.shape[1:] for value in values}) > 1:
            sizes = ", ".join(str(tuple(value.shape[1:])) for value in values)
            raise ModelError(
                f"{name} of these prompts do not fit into one batch: {sizes}; use batch_size=1, or collate those that "
                "`batches(prompts, batch_size)` puts together"
            )
        batch[name] = torch.cat(values)
    return PromptInputs(batch, prompts[0].frontend), offsets


def _check_alike(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Raise `ModelError` unless all prompts share a meaning of ids and pictures, and this tokenizer has the ids."""
    first = prompts[0].frontend
    has_pictures = any(prompt.images for prompt in prompts)
    alike = all(first.accepts(prompt.frontend, has_pictures=has_pictures) for prompt in prompts)
    if not alike or first.tokenizer is not tokenizer and first.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"not all of these prompts were made with the tokenizer of {tokenizer.name_or_path!r} and one image "
            "processor; make all prompts of a batch with the model that runs them"
        )


def _padded(value: Tensor, length: int, side: str, fill: int) -> Tensor:
    missing = length - value.shape[1]
    further = (0, 0) * (value.ndim - 2)
    amounts = (*further, missing, 0) if side == "left" else (*further, 0, missing)
    return torch.nn.functional.pad(value, amounts, value=fill)


def _shown(text: str, width: int) -> str:
    return repr(_cut(text, width))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
