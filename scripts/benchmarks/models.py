"""The models of the benchmarks: random weights in the shape of LLaVA, opened from a folder like any other model."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...models import Prompt, VisionLanguageModel, load
from ...models.guards import quiet_transformers
from ...models.loading.load import check_device_map
from ...tracing import Corruption, ImageNoise, TextNoise
from ...tracing.engine.cells import Runs
from ..options import CommandError

PATCH = 14
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model with the shape of LLaVA, and of its prompt."""

    layers: int = 16
    width: int = 512
    mlp: int = 1376
    heads: int = 8
    vision_layers: int = 4
    vision_width: int = 256
    vision_heads: int = 4
    vocabulary: int = 4000
    image: int = 336
    """The side of the picture, in pixels."""
    before: int = 4
    """Number of text tokens before the picture, with the beginning-of-sequence token."""
    after: int = 28
    """Number of text tokens after the picture: the question."""
    constraint: int = 8
    """Number of tokens of the question, from its first, that are the constraint."""
    dtype: str = "float32"

    @property
    def image_positions(self) -> range:
        """The positions of the image tokens in the prompt."""
        return range(self.before, self.before + (self.image // PATCH) ** 2)

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt."""
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
    """Write a model of this shape with random weights, and its processor, into a folder, and return the folder.

    Word embeddings and image features are scaled so that noise on either of them changes the answer.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(
        getattr(torch, shape.dtype)
    )  # weights are drawn in their own precision, since twice the size may not fit
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
    """Return the words before the picture and those after it, of one token each; no word occurs twice."""
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
        initializer_range=0.9 * shape.width**-0.5,  # makes queries and keys equally large at every width
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
    """Return a processor of LLaVA with whole words as tokens, so that a prompt has exactly the tokens of its shape."""
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


_CONFIDENCE = 0.5
_NOISE = {"text": 3.0, "image": 0.5}
"""Standard deviations that leave the corrupted answer probable enough for effects of restoring to be seen."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is needed to open the same subject again, in this or another process."""

    folder: Path
    shape: Shape
    device: str | None
    seed: int
    samples: Mapping[str, int]
    """Number of noise samples of the "text" and of the "image" corruption."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model, and a question whose answer has a probability of about one half."""

    vlm: VisionLanguageModel
    prompt: Prompt
    answer: int
    """The id of the most probable next token of the clean run."""
    recipe: Recipe

    def runs(self, corruption: str) -> Runs:
        """Return the corrupted and the clean run, with noise on the constraint ("text") or on the picture ("image")."""
        settings = {"scale": _NOISE[corruption], "samples": self.recipe.samples[corruption], "seed": self.recipe.seed}
        kinds: Mapping[str, Corruption] = {
            "text": TextNoise(over="prompt", **settings),  # its words come from no corpus
            "image": ImageNoise(**settings),
        }
        clean = self.vlm.embed(self.prompt)
        return Runs(
            base=kinds[corruption].corrupt(self.vlm, self.prompt).entering(clean),
            source=clean,
            scored=(self.prompt.length - 1,),
            frozen=self.prompt.groups["image"],
        )

    def measure(self, logits: Tensor) -> Tensor:
        """Return (row, 1) float64, the probability of the answer, from logits (row, scored position, vocab)."""
        return logits[:, -1].double().softmax(-1)[:, self.answer, None]


def open_subject(recipe: Recipe) -> Subject:
    """Return the subject, with its output head scaled so that the clean answer has a probability of one half."""
    shape = recipe.shape
    vlm = load(recipe.folder, dtype=shape.dtype, device_map=recipe.device)
    before, after = prompt_words(shape, seed=recipe.seed)
    prompt = vlm.prompt(
        _picture(shape.image, recipe.seed),
        " ".join(after),
        constraint=" ".join(after[: shape.constraint]),
        template=" ".join([*before, "{image}", "{question}"]),
    )
    with torch.no_grad():
        logits = vlm.logits(prompt)[0, -1].double()
        vlm.output_head.weight.mul_(confident(logits))
    return Subject(vlm=vlm, prompt=prompt, answer=int(logits.argmax()), recipe=recipe)


def confident(logits: Tensor) -> float:
    """Return the factor on logits (vocab,) that gives the most probable token a probability of one half."""
    low, high = 0.0, 1.0
    while float((high * logits).softmax(-1).max()) < _CONFIDENCE:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        is_enough = float((middle * logits).softmax(-1).max()) >= _CONFIDENCE
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def _picture(side: int, seed: int) -> Image.Image:
    """Return a picture of noise."""
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


class Labelled(Protocol):
    """A row of a table."""

    @property
    def label(self) -> str:
        """The label of the row in the table."""


_Row = TypeVar("_Row", bound=Labelled)


def chosen_cases(cases: Sequence[_Row], words: Sequence[str]) -> tuple[_Row, ...]:
    """Return the cases whose labels contain one of the words, or all cases if there are no words.

    Raises `CommandError`, with all labels, if there is no such case.
    """
    found = tuple(case for case in cases if not words or any(word in case.label for word in words))
    if not found:
        labels = "; ".join(case.label for case in cases)
        raise CommandError(f"no row of the table holds {' or '.join(map(repr, words))}; the rows are: {labels}")
    return found


_Case = TypeVar("_Case")
_Measured = TypeVar("_Measured")


def measured_rows(
    recipe: Recipe,
    cases: Sequence[_Case],
    measure: Callable[[Subject, _Case], _Measured],
    measure_anew: Callable[[Recipe, _Case], _Measured],
) -> Iterator[_Measured]:
    """Yield the row of each case as soon as it is measured.

    On a CUDA device this process measures all rows and opens the model once; elsewhere `measure_anew` measures each row
    in a process of its own.
    """
    if torch.device(recipe.device or "cpu").type == "cuda":
        subject = open_subject(recipe)
        yield from (measure(subject, case) for case in cases)
    else:
        yield from (measure_anew(recipe, case) for case in cases)


def resized(shape: Shape, *, layers: int | None = None, width: int | None = None, dtype: str | None = None) -> Shape:
    """Return the shape with the sizes that are given; MLP and heads keep their proportion to the width."""
    if width is not None:
        size, mlp = shape.width // shape.heads, 16 * math.ceil(shape.mlp / shape.width * width / 16)
        shape = replace(shape, width=width, mlp=mlp, heads=1 if width % size else width // size)
    changes = {"layers": layers, "dtype": dtype}
    return replace(shape, **{name: value for name, value in changes.items() if value is not None})


@contextmanager
def random_model(shape: Shape, *, device: str | None, seed: int, samples: Mapping[str, int]) -> Iterator[Recipe]:
    """Yield the recipe of a random model of this shape, which exists in a temporary folder while the block lasts.

    Raises `ModelError` for a device that does not exist.
    """
    check_device_map(device, "the random model")
    with tempfile.TemporaryDirectory(prefix="multrace-bench-") as folder:
        recipe = Recipe(folder=Path(folder), shape=shape, device=device, seed=seed, samples=samples)
        write_model(shape, recipe.folder, seed=seed, device=torch.device(device or "cpu"))
        yield recipe
