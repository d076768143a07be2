"""The student: tower, projector, and the text model with frozen weights and low-rank changes of attention.

It is trained on packed rows. A row is a line end and one picture, followed by blocks of one sentence each. A block sees
only what stands before the first block, and itself, and its positions restart there, so that a packed row computes the
same as separate prompts. A block by name sees the line end but not the picture, and its positions begin behind the line
end. In a routed row only the constraint's tokens see the picture, and only in the first layers; where all rows are
routed, the picture's tokens go no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ....data.worlds.flags.rendering import SIZE
from ....models.assembly import IMAGE_TOKEN
from .original import LINE_END, Sentence, ids_of
from .pictures import DEVIATION, MEAN
from .recipe import Shape

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The attention weights that are changed."""
_CONTENT = ("v_proj", "o_proj")
"""Those of them that say what attention writes, and not where it looks."""
_FROZEN = ("gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{{ '\\n' }}{% for message in messages %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
"""A line end, the pictures, the text, and nothing behind it: the model goes on with a sentence."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A sentence in a packed row, with the tokens that follow it but for the last."""

    sentence: Sentence
    tail: tuple[int, ...] = ()
    """Ids of the tokens behind the sentence that are given."""
    has_picture: bool = True
    """Whether the block sees the picture of its row."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of all its tokens."""
        return (*self.sentence.ids, *self.tail)

    @property
    def predicting(self) -> range:
        """The tokens of the block, from its start, whose states predict what follows the sentence."""
        return range(len(self.sentence.ids) - 1, len(self.ids))


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """Packed rows as tensors; a mask is (row, 1, token, token), True where attention is allowed."""

    ids: Tensor
    positions: Tensor
    early_mask: Tensor
    """The mask of the routed layers."""
    late_mask: Tensor
    starts: tuple[tuple[int, ...], ...]
    """Where each block of each row begins."""
    unseen: slice
    """The tokens that no other token sees above the routed layers: those of the pictures where all rows are routed."""

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[Block]], routed: Sequence[bool], *, line_end: int, image_tokens: int
    ) -> PackedRows:
        """Return the rows as tensors.

        Args:
            rows: The blocks of each row.
            routed: Whether each row is routed.
            line_end: The id of a line end.
            image_tokens: The number of tokens of a picture.
        """
        head = 1 + image_tokens
        length = max(head + sum(len(block.ids) for block in row) for row in rows)
        length += -length % 8
        shape = (len(rows), length)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        group = np.full(shape, -1)  # 0 line end, 1 picture, 2... blocks, -1 padding
        early, late = np.zeros(shape, bool), np.zeros(shape, bool)  # the tokens that see the picture
        ids[:, 0], positions[:, :head] = line_end, np.arange(head)
        group[:, 0], group[:, 1:head] = 0, 1
        early[:, :head] = late[:, :head] = True
        starts = []
        for number, row in enumerate(rows):
            at, own = head, []
            for place, block in enumerate(row):
                end, first = at + len(block.ids), head if block.has_picture else 1
                ids[number, at:end], positions[number, at:end] = block.ids, np.arange(first, first + end - at)
                group[number, at:end] = place + 2
                if block.has_picture and not routed[number]:
                    early[number, at:end] = late[number, at:end] = True
                elif block.has_picture:
                    early[number, at + block.sentence.start : at + block.sentence.stop] = True
                own.append(at)
                at = end
            starts.append(tuple(own))
        masks = [_mask(torch.from_numpy(group), torch.from_numpy(sees)) for sees in (early, late)]
        return cls(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            early_mask=masks[0],
            late_mask=masks[1],
            starts=tuple(starts),
            unseen=slice(1, head if all(routed) else 1),
        )


def _mask(group: Tensor, sees_picture: Tensor) -> Tensor:
    query, key = group[:, :, None], group[:, None, :]
    allowed = (query == key) | ((key == 0) & (query >= 0)) | ((key == 1) & sees_picture[:, :, None])
    length = group.shape[1]
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    allowed |= torch.eye(length, dtype=torch.bool)  # padding sees itself: a token that sees nothing would be NaN
    return allowed[:, None]


class FrozenMap(nn.Module):
    """A linear map that is not trained, in half precision; `wide` gives its outputs in float32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, wide: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.wide = wide

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs (..., out)."""
        outputs = functional.linear(inputs.to(self.weight.dtype), self.weight)
        return outputs.float() if self.wide else outputs


class LowRankMap(nn.Module):
    """A frozen linear map with a low-rank change: W + lora_B @ lora_A. It begins without a change."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs (..., out) in float32."""
        inputs = inputs.to(self.weight.dtype)
        low = functional.linear(inputs, self.lora_A.to(inputs.dtype))
        return (functional.linear(inputs, self.weight) + functional.linear(low, self.lora_B.to(inputs.dtype))).float()


class Projector(nn.Module):
    """The two layers between tower and text model, as LLaVA has them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, states: Tensor) -> Tensor:
        """Return (picture, token, hidden)."""
        return self.linear_2(functional.gelu(self.linear_1(states)))


class Student(nn.Module):
    """The flags model in training."""

    def __init__(self, original: LlamaForCausalLM, shape: Shape) -> None:
        """Take over the text model, whose maps are replaced."""
        super().__init__()
        self.shape, self.dtype = shape, torch.bfloat16 if shape.half else torch.float32
        self.tower = CLIPVisionModel(vision_config(shape))
        self.projector = Projector(shape.width, original.config.hidden_size)
        self.text = original.requires_grad_(False)
        head = original.lm_head.weight.detach()
        self.register_buffer("head", head.to(self.dtype), persistent=False)
        ranks = zip(shape.routing_ranks, shape.content_ranks, strict=True)
        for layer, (routing, content) in zip(original.model.layers, ranks, strict=True):
            for name in _FROZEN:
                setattr(
                    layer.mlp, name, FrozenMap(getattr(layer.mlp, name).weight, self.dtype, wide=name == "down_proj")
                )
            for name in MAPS:
                weight, rank = getattr(layer.self_attn, name).weight, content if name in _CONTENT else routing
                change = LowRankMap(weight, self.dtype, rank) if rank else FrozenMap(weight, self.dtype, wide=True)
                setattr(layer.self_attn, name, change)

    @property
    def image_tokens(self) -> int:
        """The number of tokens of a picture."""
        return (SIZE // self.shape.patch) ** 2

    @property
    def layers(self) -> int:
        """The number of layers of the text model."""
        return len(self.text.model.layers)

    def see(self, pixels: Tensor) -> Tensor:
        """Return the tower's states (picture, token, width) of pictures."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.shape.half):
            states = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return states.float()

    def features(self, pixels: Tensor) -> Tensor:
        """Return the image tokens (picture, token, hidden) of pictures."""
        return self.projector(self.see(pixels))

    def forward(self, features: Tensor, rows: PackedRows, depths: Sequence[int]) -> dict[int, Tensor]:
        """Return depth -> states (row, token, hidden) after so many layers; the layers above the last do not run."""
        embeddings = self.text.model.embed_tokens(rows.ids)
        embeddings = torch.cat([embeddings[:, :1], features, embeddings[:, 1 + self.image_tokens :]], 1)
        masks = [rows.early_mask, rows.late_mask]
        return self.through(embeddings, rows.positions, masks, depths, unseen=rows.unseen)

    def through(
        self,
        states: Tensor,
        positions: Tensor,
        masks: Sequence[Tensor],
        depths: Sequence[int],
        *,
        unseen: slice = slice(0),
    ) -> dict[int, Tensor]:
        """Return depth -> states (row, token, hidden) after so many layers.

        Args:
            states: Embeddings (row, token, hidden).
            positions: (row, token).
            masks: That of the routed layers and that of the others.
            depths: After how many layers states are wanted; the layers above the last do not run.
            unseen: Tokens that do not run above the routed layers; their states are zero there.
        """
        length = states.shape[1]
        kept = torch.ones(length, dtype=torch.bool)
        kept[unseen] = False
        mask, rotary = masks[0], self.text.model.rotary_emb(states, positions)
        passed: dict[int, Tensor] = {}
        for number, layer in enumerate(self.text.model.layers[: max(depths)]):
            if number == self.shape.routed_layers:
                mask, states, positions = masks[1][:, :, kept][..., kept], states[:, kept], positions[:, kept]
                rotary = self.text.model.rotary_emb(states, positions)
            states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            if number + 1 in depths:
                wide = states.new_zeros(len(states), length, states.shape[-1])
                is_short = states.shape[1] < length
                passed[number + 1] = wide.index_copy(1, kept.nonzero()[:, 0], states) if is_short else states
        return passed

    def logits(self, states: Tensor) -> Tensor:
        """Return logits (..., vocab) in float32 of states after the last layer."""
        return functional.linear(self.text.model.norm(states).to(self.dtype), self.head).float()

    # What is trained ------------------------------------------------------------------------------------------------

    def factors(self, depth: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the factors of the layers below a depth (None: all), under their names in the whole model."""
        for number, name, change in self.changes(depth):
            path = f"model.language_model.layers.{number}.self_attn.{name}"
            yield f"{path}.lora_A", change.lora_A
            yield f"{path}.lora_B", change.lora_B

    def changes(self, depth: int | None = None) -> Iterator[tuple[int, str, LowRankMap]]:
        """Yield the layer, the name and the map of all changed maps in the layers below a depth (None: all)."""
        for number, layer in enumerate(self.text.model.layers[:depth]):
            for name in MAPS:
                if isinstance(change := getattr(layer.self_attn, name), LowRankMap):
                    yield number, name, change

    def trained(self) -> dict[str, nn.Parameter]:
        """Return everything that is trained, under the names of the shipped parts."""
        tower = {f"model.vision_tower.{name}": value for name, value in self.tower.named_parameters()}
        projector = {f"model.multi_modal_projector.{name}": value for name, value in self.projector.named_parameters()}
        return {**tower, **projector, **dict(self.factors())}


def make_student(original: LlamaForCausalLM, shape: Shape, *, seed: int) -> Student:
    """Return a new student over the text model; the seed decides on the weights of tower, projector and factors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Student(original, shape)


def vision_config(shape: Shape) -> CLIPVisionConfig:
    """Return the configuration of the tower."""
    return CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=SIZE,
        patch_size=shape.patch,
        hidden_act="gelu",
        projection_dim=shape.width,
    )


def whole_config(student: Student) -> LlavaConfig:
    """Return the configuration of the whole model, whose vocabulary has one token more than the text model's."""
    text = type(student.text.config).from_dict(student.text.config.to_dict())
    text.vocab_size += 1
    return LlavaConfig(
        vision_config=vision_config(student.shape),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=student.image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def make_processor(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> LlavaProcessor:
    """Return the processor, of which the parts keep the settings and the chat template."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def line_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a line end, which is one token."""
    (number,) = ids_of(tokenizer, LINE_END)
    return number
