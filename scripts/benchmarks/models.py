"""The models of the benchmarks: random weights in the shapes of LLaVA and Qwen-VL, opened from a folder like any other.

Configuration, model class and processor are those of transformers; `load` finds the family as for a real checkpoint.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...models import Prompt, VisionLanguageModel, load
from ...models.guards import quiet_transformers
from ...models.loading.load import check_device_map
from ...tracing import Corruption, ImageNoise, TextNoise
from ...tracing.engine.cells import Runs
from ..options import CommandError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a vision-language model and of its prompt."""

    architecture: str = "llava"
    """The name in transformers: "llava", "qwen2_5_vl" or "qwen3_vl"."""
    layers: int = 16
    width: int = 512
    mlp: int = 1376
    heads: int = 8
    heads_per_key: int = 1
    """Number of query heads that share a key-value head."""
    vision_layers: int = 4
    vision_width: int = 256
    vision_mlp: int | None = None
    """None for four times the width of the vision tower."""
    vision_heads: int = 4
    vocabulary: int = 4000
    image: int = 336
    """The side of the picture, in pixels."""
    patch: int = 14
    """The side of the square of pixels that is one patch of the vision tower."""
    merge: int = 1
    """The side of the square of patches that are merged into one image token."""
    before: int = 4
    """Number of text tokens before the picture, with the beginning-of-sequence or beginning-of-picture token."""
    after: int = 28
    """Number of text tokens after the picture: the question, after the end-of-picture token where there is one."""
    constraint: int = 8
    """Number of tokens of the question, from its first, that are the constraint."""
    dtype: str = "float32"

    @property
    def image_positions(self) -> range:
        """The positions of the image tokens in the prompt."""
        return range(self.before, self.before + (self.image // (self.patch * self.merge)) ** 2)

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt."""
        return self.image_positions.stop + self.after

    @property
    def axes(self) -> tuple[int, int, int]:
        """The number of rotary frequencies for time, row and column (mrope): 16, 24 and 24 for heads of 128 entries.

        Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
        """
        half = self.width // self.heads // 2
        return half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8


_TINY = Shape(
    layers=4,
    width=32,
    mlp=48,
    heads=2,
    heads_per_key=2,
    vision_layers=4,
    vision_width=32,
    vision_mlp=48,
    vision_heads=2,
    vocabulary=120,
    merge=2,
)
SHAPES: Mapping[str, Shape] = {
    "base": Shape(),
    "small": Shape(layers=8, width=192, mlp=512, heads=3, vision_layers=2, vision_width=64),
    "qwen2.5-vl-tiny": replace(_TINY, architecture="qwen2_5_vl", image=112),
    "qwen3-vl-tiny": replace(_TINY, architecture="qwen3_vl", layers=6, image=128, patch=16),
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
    "qwen2.5-vl-7b": Shape(
        architecture="qwen2_5_vl",
        layers=28,
        width=3584,
        mlp=18944,
        heads=28,
        heads_per_key=7,
        vision_layers=32,
        vision_width=1280,
        vision_mlp=3420,
        vision_heads=16,
        vocabulary=152064,
        image=672,
        merge=2,
        dtype="bfloat16",
    ),
    "qwen3-vl-8b": Shape(
        architecture="qwen3_vl",
        layers=36,
        width=4096,
        mlp=12288,
        heads=32,
        heads_per_key=4,
        vision_layers=27,
        vision_width=1152,
        vision_mlp=4304,
        vision_heads=16,
        vocabulary=151936,
        image=768,
        patch=16,
        merge=2,
        dtype="bfloat16",
    ),
}


def write_model(shape: Shape, folder: Path, *, seed: int, device: torch.device) -> Path:
    """Write a model of this shape with random weights, and its processor, into a folder, and return the folder.

    Word embeddings and image features are scaled so that noise on either of them changes the answer.
    """
    architecture = _ARCHITECTURES[shape.architecture]
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(
        getattr(torch, shape.dtype)
    )  # weights are drawn in their own precision, since twice the size may not fit
    try:
        with device:
            model = architecture.model(model_config(shape))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        cast(nn.Embedding, model.get_input_embeddings()).weight.mul_(10)
        for name in architecture.projections:
            model.get_submodule(name).weight.mul_(30)
    with quiet_transformers():
        model.save_pretrained(folder)
        architecture.write_processor(shape, folder)
    return folder


def model_config(shape: Shape) -> Any:
    """Return the configuration of transformers for a model of this shape."""
    return _ARCHITECTURES[shape.architecture].config(shape)


def prompt_words(shape: Shape, *, seed: int) -> tuple[list[str], list[str]]:
    """Return the words before the picture and those of the question, of one token each; no word occurs twice."""
    architecture = _ARCHITECTURES[shape.architecture]
    counts = shape.before - 1, shape.after - len(architecture.closing)  # the first is without one special token
    words = random.Random(seed).sample(range(shape.vocabulary - len(architecture.special)), sum(counts))
    named = [f"word{number}" for number in words]
    return named[: counts[0]], named[counts[0] :]


def prompt_template(shape: Shape, before: Sequence[str]) -> str:
    """Return the template of a prompt with these words before the picture."""
    architecture = _ARCHITECTURES[shape.architecture]
    return " ".join([*before, *architecture.opening, "{image}", *architecture.closing, "{question}"])


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How a model of one architecture is made, and what its prompts hold beside words."""

    model: Callable[[Any], Any]
    """The class of the model, which is called with the configuration."""
    config: Callable[[Shape], Any]
    write_processor: Callable[[Shape, Path], None]
    """A function that writes tokenizer and processor into a folder."""
    projections: tuple[str, ...]
    """The last linear maps of whatever turns the vision tower's states into states of the decoder."""
    special: tuple[str, ...]
    """The special tokens by their ids, from 0."""
    opening: tuple[str, ...] = ()
    """Tokens of the template before the picture."""
    closing: tuple[str, ...] = ()
    """Tokens of the template after the picture."""


_COMMON = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
_FRAMED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _text_settings(shape: Shape) -> dict[str, Any]:
    """Return the settings of a text stack that all architectures share."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // shape.heads_per_key,
        "max_position_embeddings": 2048,
        "pad_token_id": _COMMON.index("<pad>"),
        "bos_token_id": _COMMON.index("<s>"),
        "eos_token_id": _COMMON.index("</s>"),
        "tie_word_embeddings": False,
        "initializer_range": 0.9 * shape.width**-0.5,  # makes queries and keys equally large at every width
    }


def _llava(shape: Shape) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp or 4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=64,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_settings(shape)),
        image_token_index=_COMMON.index("<image>"),
        image_seq_length=len(shape.image_positions),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_processor(shape: Shape, folder: Path) -> None:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=_tokenizer(shape, _COMMON, {"image_token": "<image>"}, begins=True),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def _qwen(shape: Shape, *, vision: Mapping[str, Any], rope: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """Return the configuration of a Qwen-VL model, with these further settings of its parts."""
    axes = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(shape.axes), **rope}
    tower = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp or 4 * shape.vision_width,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.width,
        "patch_size": shape.patch,
        "spatial_merge_size": shape.merge,
    }
    numbers = {name: (*_COMMON, *_FRAMED).index(name) for name in _FRAMED}
    return AutoConfig.for_model(
        shape.architecture,
        text_config={**_text_settings(shape), "rope_parameters": axes, **text},
        vision_config={**tower, **vision},
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=numbers["<|video_pad|>"],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _qwen2_5(shape: Shape) -> Any:
    """Every eighth layer of the vision tower attends everywhere, the others within windows of 8 x 8 patches."""
    everywhere = list(range(7, shape.vision_layers, 8)) or [shape.vision_layers - 1]
    return _qwen(
        shape,
        vision={"fullatt_block_indexes": everywhere, "window_size": 8 * shape.patch},
        rope={},
        text={"sliding_window": None},
    )


def _qwen3(shape: Shape) -> Any:
    """Features of three layers of the vision tower are added behind the first layers of the decoder (DeepStack)."""
    step = (shape.vision_layers - 1) // 3
    return _qwen(
        shape,
        vision={"deepstack_visual_indexes": [step, 2 * step, 3 * step]},
        rope={"mrope_interleaved": True, "rope_theta": 5e6},
        text={"head_dim": shape.width // shape.heads},
    )


def _qwen_processor(shape: Shape, folder: Path) -> None:
    """Write the files as the hub has them, since the class itself cannot be made where its video part is missing."""
    kind = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[shape.architecture]
    named = dict(zip(("vision_start_token", "vision_end_token", "image_token", "video_token"), _FRAMED, strict=True))
    _tokenizer(shape, (*_COMMON, *_FRAMED), named, begins=False).save_pretrained(folder)
    pixels = {"shortest_edge": shape.image**2, "longest_edge": shape.image**2}
    sizes = {"patch_size": shape.patch, "merge_size": shape.merge, "temporal_patch_size": 2}
    files = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **sizes, "size": pixels},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **sizes},
        "processor_config.json": {},
    }
    for name, settings in files.items():
        (folder / name).write_text(json.dumps({**settings, "processor_class": kind}), encoding="utf-8")


def _tokenizer(
    shape: Shape, special: Sequence[str], named: Mapping[str, str], *, begins: bool
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with whole words as tokens, so that a prompt has exactly the tokens of its shape.

    named: special tokens by the names under which a processor looks for them; begins: texts begin with "<s>".
    """
    words = [*special, *(f"word{number}" for number in range(shape.vocabulary - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
        padding_side="left",
        model_max_length=2048,
    )


_QWEN: Mapping[str, Any] = {
    "write_processor": _qwen_processor,
    "special": (*_COMMON, *_FRAMED),
    "opening": _FRAMED[:1],
    "closing": _FRAMED[1:2],
}
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llava": _Architecture(
        model=LlavaForConditionalGeneration,
        config=_llava,
        write_processor=_llava_processor,
        projections=("model.multi_modal_projector.linear_2",),
        special=_COMMON,
    ),
    "qwen2_5_vl": _Architecture(
        model=Qwen2_5_VLForConditionalGeneration,
        config=_qwen2_5,
        projections=("model.visual.merger.mlp.2",),
        **_QWEN,
    ),
    "qwen3_vl": _Architecture(
        model=Qwen3VLForConditionalGeneration,
        config=_qwen3,
        projections=("model.visual.merger.linear_fc2",),
        **_QWEN,
    ),
}


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
        template=prompt_template(shape, before),
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
        heads = 1 if width % size else width // size
        shared = math.gcd(heads, shape.heads_per_key)
        shape = replace(shape, width=width, mlp=mlp, heads=heads, heads_per_key=shared)
    changes = {"layers": layers, "dtype": dtype}
    return replace(shape, **{name: value for name, value in changes.items() if value is not None})


@contextmanager
def random_model(shape: Shape, *, device: str | None, seed: int, samples: Mapping[str, int]) -> Iterator[Recipe]:
    """Yield the recipe of a random model of this shape, which exists in a temporary folder while the block lasts.

    Raises `ModelError` for a device that does not exist.
    """
    check_device_map(device, "the random model")
    with tempfile.TemporaryDirectory(prefix="multrace-bench-") as folder:
        recipe = Recipe(folder=Path(folder), shape=shape, device=device, seed=seed, samples=dict(samples))
        write_model(shape, recipe.folder, seed=seed, device=torch.device(device or "cpu"))
        yield recipe
