"""The parts of the embedded model, and the packed rows that it is trained on.

A row is the head of a prompt ("<s>USER:" and the image tokens) followed by blocks of one question and its answer each.
A block sees only the head and itself, and its positions restart after the head, so that the packed row computes the
same as separate prompts. A text-only block sees "<s>USER:" but not the image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...data import Question
from ...data.world import KINDS, PLACES, RELATIONS, SIZE, World

PATCH = 8
LAYERS = 8
HIDDEN = 128
MLP = 1024
HEADS = 4
VISION_HIDDEN = 128
VISION_LAYERS = 4
VOCABULARY = 1600
IMAGE_TOKENS = (SIZE // PATCH) ** 2

# There is no separator between the picture and the question: its token would become a hub that gathers the picture,
# which would then not reach the tokens of the question.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER:' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ ' ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on all questions and answers of the world.

    An answer has one to three tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(world), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def _corpus(world: World) -> Iterator[str]:
    for entity in world.entities:
        for fact in world.facts_of(entity):
            for template in range(len(_templates(fact.key[0]))):
                yield f"USER: {world.question_by_name(fact, template=template).text} ASSISTANT: {fact.answer}"
                for phrase in range(len(KINDS[entity.kind].phrases)):
                    yield f"USER: {world.question(fact, template=template, phrase=phrase).text} ASSISTANT:"
        yield f" {entity.name}"
        for value in entity.attributes.values():
            yield f" {value}"
    for kind in KINDS.values():
        for templates, span in kind.attributes.values():
            yield from (f"USER: {template.format(x=span)} ASSISTANT:" for template in templates)
        yield from (f" {side}" for side in (*kind.sides.values(), *PLACES))


def _templates(name: str) -> tuple[str, ...]:
    return next(row.templates for row in RELATIONS if row.name == name)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return a processor of LLaVA with this tokenizer, SIZE x SIZE pixels and IMAGE_TOKENS image tokens."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return a randomly initialised LLaVA: CLIP tower, two-layer projector, Llama text model."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=4 * VISION_HIDDEN,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=VISION_HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.04,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


IGNORED = -100
ROUTED_LAYERS = 3
"""Number of layers, from the first, in which constraint tokens see the picture in routed rows; no other token does."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A question and its answer, as token ids that follow the head of the row."""

    ids: tuple[int, ...]
    answer_start: int
    """Index in `ids` of the first token of the answer, which ends with the end-of-sequence token."""
    constraint: range
    """Indices in `ids` of the tokens of the constraint."""
    is_visual: bool
    """Whether the constraint refers to the picture."""
    has_image: bool
    """Whether the picture comes before the question."""
    entity: int
    """The index of the entity that the question is about; -1 if the reader is not asked for it."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows as tensors; a mask is (row, 1, token, token), True where attention is allowed."""

    ids: Tensor
    positions: Tensor
    early_mask: Tensor
    """The mask of the layers below ROUTED_LAYERS."""
    late_mask: Tensor
    labels: Tensor
    """(row, token): the next token of the answer, or IGNORED."""
    owner: Tensor
    """(row, token): the number of the block that a labelled token belongs to, or -1."""
    entity_rows: Tensor
    """(mention, 2): the row and the token of the last constraint token of each mention of a known entity."""
    entities: Tensor
    """(mention,): the index of the entity that is mentioned."""


class Packer:
    """Turns questions into blocks, whose tokens it remembers, and rows of blocks into batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        head = tokenizer("USER:<image>").input_ids
        self.text_head = len(head) - 1
        self.head = head[:-1] + [head[-1]] * image_tokens
        self.end = tokenizer.eos_token_id
        self._tokens: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    def block(self, record: Question, *, entity: int = -1, has_image: bool = True, is_visual: bool = True) -> Block:
        """Return the block of a question.

        Without a constraint, no token of the block sees the picture of a routed row.

        Args:
            record: The question with its answer.
            entity: The index of the entity that the reader is asked for; -1 (default) for none.
            has_image: Whether the picture comes before the question (default True).
            is_visual: Whether the constraint refers to the picture (default True).
        """
        ids, offsets = self._encode(f"USER: {record.text} ASSISTANT: {record.answer}")
        question_end = len(f"USER: {record.text} ASSISTANT:")
        answer_start = next(index for index, (start, _) in enumerate(offsets) if start >= question_end)
        covered: list[int] = []
        if isinstance(record.constraint, str) and record.constraint:
            start = len("USER: ") + record.text.lower().index(record.constraint.lower())
            end = start + len(record.constraint)
            covered = [index for index, (left, right) in enumerate(offsets) if left < end and right > start]
        skip = self.text_head
        return Block(
            ids=(*ids[skip:], self.end),
            answer_start=answer_start - skip,
            constraint=range(covered[0] - skip, covered[-1] + 1 - skip) if covered else range(0),
            is_visual=is_visual,
            has_image=has_image,
            entity=entity,
        )

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if text not in self._tokens:
            encoded = self.tokenizer(text, return_offsets_mapping=True)
            self._tokens[text] = encoded["input_ids"], encoded["offset_mapping"]
        return self._tokens[text]

    def collate(self, rows: Sequence[Sequence[Block]], routed: Sequence[bool]) -> Batch:
        """Return the batch of the rows; in routed rows the picture passes through the constraint tokens alone."""
        head = len(self.head)
        length = max(head + sum(len(block.ids) for block in row) for row in rows)
        length += -length % 8
        shape = (len(rows), length)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        group = np.full(shape, -1, np.int64)  # 0 text head, 1 image, 2... blocks, -1 padding
        early, late = np.zeros(shape, bool), np.zeros(shape, bool)  # the tokens that see the image
        labels, owner = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        mentions: list[tuple[int, int, int]] = []
        count = 0
        for row, blocks in enumerate(rows):
            ids[row, :head], positions[row, :head] = self.head, np.arange(head)
            group[row, : self.text_head], group[row, self.text_head : head] = 0, 1
            early[row, :head] = late[row, :head] = True
            at = head
            for number, block in enumerate(blocks):
                end, start = at + len(block.ids), head if block.has_image else self.text_head
                ids[row, at:end], positions[row, at:end] = block.ids, np.arange(start, start + len(block.ids))
                group[row, at:end] = number + 2
                span = slice(at + block.constraint.start, at + block.constraint.stop)
                if block.has_image and not routed[row]:
                    early[row, at:end] = late[row, at:end] = True
                elif block.has_image and block.is_visual:
                    early[row, span] = True
                labels[row, at + block.answer_start - 1 : end - 1] = block.ids[block.answer_start :]
                owner[row, at + block.answer_start - 1 : end - 1] = count
                if block.entity >= 0:
                    mentions.append((row, span.stop - 1, block.entity))
                count, at = count + 1, end
        early_mask, late_mask = (self._mask(torch.from_numpy(group), torch.from_numpy(seen)) for seen in (early, late))
        where = torch.tensor(mentions, dtype=torch.long).reshape(-1, 3)
        return Batch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            early_mask=early_mask,
            late_mask=late_mask,
            labels=torch.from_numpy(labels),
            owner=torch.from_numpy(owner),
            entity_rows=where[:, :2],
            entities=where[:, 2],
        )

    @staticmethod
    def _mask(group: Tensor, sees_image: Tensor) -> Tensor:
        query, key = group[:, :, None], group[:, None, :]
        allowed = (query == key) | ((key == 0) & (query >= 0)) | ((key == 1) & sees_image[:, :, None])
        length = group.shape[1]
        allowed &= torch.ones(length, length, dtype=torch.bool).tril()
        allowed |= torch.eye(
            length, dtype=torch.bool
        )  # padding sees itself, because a token that sees nothing would be NaN
        return allowed[:, None]
