"""LLaVA-shaped models with random weights: their sizes, and how one is made and written to a folder."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...models.quiet import quiet_transformers

PATCH = 14
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a LLaVA and of the prompt that it is asked."""

    layers: int = 16
    width: int = 512
    mlp: int = 1376
    heads: int = 8
    vision_layers: int = 4
    vision_width: int = 256
    vision_heads: int = 4
    vocabulary: int = 4000
    image: int = 336
    """Side of the picture in pixels."""
    before: int = 4
    """Text tokens in front of the picture, the beginning-of-sequence token included."""
    after: int = 28
    """Text tokens behind it: the question."""
    constraint: int = 8
    """How many of these, the first ones, are the constraint."""
    dtype: str = "float32"

    @property
    def image_positions(self) -> range:
        """Positions of the picture's tokens in the prompt."""
        return range(self.before, self.before + (self.image // PATCH) ** 2)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.image_positions.stop + self.after


SHAPES: Mapping[str, Shape] = {
    "base": Shape(),
    "small": Shape(layers=8, width=192, mlp=512, heads=3, vision_layers=2, vision_width=64),
    "llava-7b": Shape(
        layers=32,
        width=4096,
        mlp=11008,
        heads=32,
        vision_layers=24,
        vision_width=1024,
        vision_heads=16,
        vocabulary=32064,
        dtype="bfloat16",
    ),
}


def write_model(shape: Shape, folder: Path, *, seed: int, device: torch.device) -> Path:
    """The folder, which now holds a model of this shape with random weights, and its processor.

    Word embeddings and image features are scaled so that noise on either one is felt in the answer.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))  # weights are drawn in it: twice the size may not fit
    try:
        with device:
            model = LlavaForConditionalGeneration(_config(shape))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        cast(nn.Embedding, model.get_input_embeddings()).weight.mul_(10)
        model.model.multi_modal_projector.linear_2.weight.mul_(30)
    with quiet_transformers():
        model.save_pretrained(folder)
        _processor(shape).save_pretrained(folder)
    return folder


def prompt_words(shape: Shape, *, seed: int) -> tuple[list[str], list[str]]:
    """The words before the picture and those behind it, one token each; no word comes twice."""
    words = random.Random(seed).sample(range(shape.vocabulary - len(_SPECIAL)), shape.before - 1 + shape.after)
    named = [f"word{number}" for number in words]
    return named[: shape.before - 1], named[shape.before - 1 :]


def _config(shape: Shape) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.9 * shape.width**-0.5,  # queries and keys of the same size at every width
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_SPECIAL.index("<image>"),
        image_seq_length=len(shape.image_positions),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _processor(shape: Shape) -> LlavaProcessor:
    """A LLaVA processor whose tokens are whole words, so that a prompt has exactly as many tokens as wanted."""
    words = [*_SPECIAL, *(f"word{number}" for number in range(shape.vocabulary - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
