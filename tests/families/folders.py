"""Model folders as the hub has them: a recipe says what config.json, tokenizer and processor hold.

Nothing here opens a processor. Its files are written as plain JSON, since most processors cannot be made without
torchvision, and a folder must not depend on what this machine has installed.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_models import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Settings = dict[str, Any]
ORDINARY = ("<pad>", "<s>", "</s>")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MERGES = 400
"""The number of tokens beside the special ones."""
VOCABULARY = "{size of the vocabulary}"
"""Stands in a configuration for the number of tokens. The text of a special token stands for its id in the same way."""
JITTER = 0.3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a folder of one tiny model is made from."""

    config: Settings
    """config.json; special tokens and `VOCABULARY` stand for their numbers."""
    tokens: tuple[str, ...] = ()
    """Special tokens that the tokenizer has without a name for them."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer knows by name, such as image_token, because the processor asks for them so."""
    unknown: str | None = None
    """The tokenizer's token for unknown words."""
    image: Settings | None = None
    """preprocessor_config.json; None for a text-only model."""
    video: Settings | None = None
    """video_preprocessor_config.json; None where the hub has none."""
    audio: Settings | None = None
    """The settings of a feature extractor, which live in processor_config.json."""
    processor: Settings = field(default_factory=dict)
    """processor_config.json; of a vision-language model at least its processor_class."""
    template: str | None = None
    """What the chat template writes for each picture; None for a folder without a chat template."""
    begins: bool = False
    """Whether the chat template writes the token that begins a sequence."""
    second_tokenizer: str | None = None
    """The folder of a second tokenizer (InstructBLIP's Q-Former has one)."""

    @property
    def sees(self) -> bool:
        return self.image is not None


def write(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe's model, with random weights, and return the folder."""
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    model.config = configure(recipe, tokenizer)  # timm writes functions into the configuration that it is given
    model.save_pretrained(folder)
    if recipe.template is not None:
        tokenizer.chat_template = chat_template(recipe.template, begins=recipe.begins)
    tokenizer.save_pretrained(folder)
    if recipe.second_tokenizer:
        make_tokenizer(Recipe(config={})).save_pretrained(folder / recipe.second_tokenizer)
    if recipe.image is not None:
        write_processor(recipe, folder)
    return folder


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with random weights, none of them constant: a norm, gate or bias that does nothing proves nothing."""
    config = configure(recipe, tokenizer)
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else None
    model = (kind or AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.numel() and bool((weight == weight.flatten()[0]).all()):
                weight += JITTER * torch.randn_like(weight)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # timm's own are so small that nothing of a picture passes a dozen of them
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def configure(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The recipe's configuration with the numbers of this tokenizer."""
    settings = numbered(deepcopy(recipe.config), tokenizer)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def numbered(value: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    if isinstance(value, dict):
        return {name: numbered(each, tokenizer) for name, each in value.items()}
    if isinstance(value, list):
        return [numbered(each, tokenizer) for each in value]
    if value == VOCABULARY:
        return len(tokenizer)
    return tokenizer.get_added_vocab().get(value, value) if isinstance(value, str) else value


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot; ids 0 to 2 are <pad>, <s>, </s>, and special tokens follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*ORDINARY, *recipe.tokens, *recipe.named.values()]))
    trainer = trainers.BpeTrainer(
        vocab_size=MERGES + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=2048,
        **({"extra_special_tokens": dict(recipe.named)} if recipe.named else {}),
        **({"unk_token": recipe.unknown} if recipe.unknown else {}),
    )


def chat_template(picture: str, *, begins: bool) -> str:
    """A chat template that shows these words for each picture, and the question after all of them."""
    return (
        f"{'{{ bos_token }}' if begins else ''}"
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + picture + "\n{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )


def write_processor(recipe: Recipe, folder: Path) -> None:
    """The processor's files, each with the name of the processor's class, as the hub has them."""
    kind = {"processor_class": recipe.processor["processor_class"]}
    whole = recipe.processor | ({"feature_extractor": recipe.audio} if recipe.audio else {})
    files = {
        "preprocessor_config.json": recipe.image,
        "video_preprocessor_config.json": recipe.video,
        "processor_config.json": whole,
    }
    for name, settings in files.items():
        if settings is not None:
            (folder / name).write_text(json.dumps(settings | kind, indent=2), encoding="utf-8")
