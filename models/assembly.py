"""LLaVA put together from a text model and the parts that make it see: tower, projector, factors of attention weights.

The parts are a folder:

- `factors.safetensors`, in half precision: the tensors of the tower (`model.vision_tower.*`) and of the projector
  (`model.multi_modal_projector.*`) under their names in `LlavaForConditionalGeneration`, and for each changed weight of
  the text model's attention `model.language_model.layers.{i}.self_attn.{q,k,v,o}_proj.lora_A` (rank, inputs) and
  `.lora_B` (outputs, rank). The merged weight is W + lora_B @ lora_A, in float32. The metadata of the file hold the
  recipe and the SHA-256 of what the text model was made from.
- `config.json`, the configuration of the whole model, and `processor_config.json` and `chat_template.jinja`.

Everything else is the text model's own: its tokenizer, to which the image token is added as the last one with an
embedding of zeros, and all its other weights, to the bit.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from ..artefacts import read_tensors, replacing_files, write_tensors
from .errors import ModelError, quoted, reason
from .guards import quiet_transformers
from .loading.processors import open_processor

IMAGE_TOKEN = "<image>"
_FACTORS = "factors.safetensors"
_SETTINGS = ("processor_config.json", "chat_template.jinja")
_TEXT = "model.language_model."
_CHANGED = re.compile(r"\.self_attn\.[qkvo]_proj\.weight$")
"""The weights of a text model that factors may change."""
_EMBEDDINGS = (f"{_TEXT}embed_tokens.weight", "lm_head.weight")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionParts:
    """The parts that make a text model see, as a folder holds them."""

    folder: Path
    tensors: Mapping[str, Tensor]
    """The tensors of `factors.safetensors` by name."""
    config: LlavaConfig
    """The configuration of the whole model."""
    text_model: str
    """SHA-256 of the file that the text model was made from."""
    recipe: Mapping[str, Any]
    """What is known of the training."""

    def change(self, name: str) -> Tensor | None:
        """Return lora_B @ lora_A for the weight of this name, in float32, or None if it is not changed."""
        path = name.removesuffix(".weight")
        if f"{path}.lora_A" not in self.tensors:
            return None
        return self.tensors[f"{path}.lora_B"].float() @ self.tensors[f"{path}.lora_A"].float()

    @property
    def vision(self) -> dict[str, Tensor]:
        """The tensors of tower and projector, in float32."""
        return {name: value.float() for name, value in self.tensors.items() if not name.startswith(_TEXT)}

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the weights that factors change."""
        factors = (name.rpartition(".")[0] for name in self.tensors if name.startswith(_TEXT))
        return tuple(dict.fromkeys(f"{path}.weight" for path in factors))


def write_parts(
    folder: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    config: LlavaConfig,
    processor: ProcessorMixin,
    *,
    text_model: str,
    recipe: Mapping[str, Any],
) -> None:
    """Write the parts that make a text model see into a folder, in half precision; other files in it stay.

    Args:
        folder: The folder to write to; it need not exist.
        tensors: The tensors of tower, projector and factors under the names that the module's docstring lists.
        config: The configuration of the whole model; its vocabulary has one token more than the text model's.
        processor: The processor, of which the settings and the chat template are kept; the tokenizer is not.
        text_model: SHA-256 of the file that the text model was made from.
        recipe: What is to be known of the training, as plain values.

    Raises:
        ModelError: The folder cannot be written.
    """
    with replacing_files(Path(folder), error=ModelError) as new, tempfile.TemporaryDirectory() as whole:
        processor.save_pretrained(whole)
        for name in _SETTINGS:
            shutil.copyfile(Path(whole) / name, new / name)
        config.save_pretrained(new)
        half = {name: value.half() for name, value in tensors.items()}
        write_tensors(new / _FACTORS, half, {"text_model": text_model, "recipe": json.dumps(dict(recipe))})


def read_parts(folder: str | PathLike[str]) -> VisionParts:
    """Return the parts in a folder. Raises `ModelError` if one is missing or damaged."""
    place = Path(folder)
    if missing := [name for name in (_FACTORS, "config.json", *_SETTINGS) if not (place / name).is_file()]:
        raise ModelError(
            f"{fspath(folder)!r} holds no parts of a model: it lacks {', '.join(missing)}; pass their folder"
        )
    tensors, text = read_tensors(place / _FACTORS, error=ModelError)
    try:
        config = LlavaConfig.from_pretrained(place, local_files_only=True)
        recipe = json.loads(text["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the parts in {fspath(folder)!r} are damaged: {reason(error)}; fetch them again") from error
    return VisionParts(
        folder=place, tensors=tensors, config=config, text_model=text.get("text_model", ""), recipe=recipe
    )


def assemble(
    text_model: str | PathLike[str], parts: str | PathLike[str]
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return LLaVA in float32 and its processor, put together from a text model and the parts that make it see.

    Args:
        text_model: The folder of the text model, in Hugging Face's layout.
        parts: The folder of the parts, as `write_parts` makes it.

    Raises:
        ModelError: The text model has another size than the parts are for, or either is damaged.
    """
    opened = read_parts(parts)
    text, tokenizer = _text_model(text_model)
    config = _whole_config(opened, text, fspath(text_model))
    state = dict(_state(opened, text))
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = LlavaForConditionalGeneration(config)
    model.tie_weights()  # making it without values unties them
    _check_state(state, model, opened)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.generation_config = copy.deepcopy(text.generation_config)
    return model.eval(), _processor(opened, tokenizer, config)


def unlike_text_model(model: PreTrainedModel, text_model: str | PathLike[str]) -> list[str]:
    """Return the names of the weights, attention's four maps aside, that are not the text model's to the bit.

    The row of the image token is not compared, which the text model does not have.

    Args:
        model: The whole model, a `LlavaForConditionalGeneration` in float32.
        text_model: The folder of the text model, as safetensors in float32.
    """
    own, unlike = dict(model.named_parameters()), []
    for path in sorted(Path(text_model).glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for stored in opened.keys():
                name = _name_in_whole(stored)
                if _CHANGED.search(name) or name == "lm_head.weight" and name not in own:  # tied to the embeddings
                    continue
                value = opened.get_tensor(stored)
                if name not in own or not torch.equal(own[name][: len(value)], value):
                    unlike.append(name)
    return unlike


def _text_model(folder: str | PathLike[str]) -> tuple[PreTrainedModel, Any]:
    """Return the text model in a folder, in float32, and its tokenizer."""
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
            return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries raise for damaged files
        raise ModelError(
            f"no usable text model in {fspath(folder)!r}: {reason(error)}; make it again with multrace fetch-smollm2"
        ) from error


def _whole_config(parts: VisionParts, text: PreTrainedModel, name: str) -> LlavaConfig:
    """Return the configuration of the whole model. Raises `ModelError` if the text model has another size."""
    needed = parts.config.get_text_config()
    for size in _SIZES:
        own, other = getattr(text.config, size, None), getattr(needed, size, None)
        if size == "vocab_size" and isinstance(other, int):
            other -= 1  # the image token
        if own != other:
            raise ModelError(
                f"the text model {name!r} has {size}={quoted(own)}, and the parts in {str(parts.folder)!r} are for one "
                f"with {size}={quoted(other)}; pass the folder that multrace fetch-smollm2 writes"
            )
    config = copy.deepcopy(parts.config)
    config.text_config = copy.deepcopy(text.config)
    config.text_config.vocab_size += 1
    config.tie_word_embeddings = text.config.tie_word_embeddings
    config.image_token_index = config.text_config.vocab_size - 1
    config.dtype = torch.float32
    return config


def _state(parts: VisionParts, text: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every weight of the whole model."""
    yield from parts.vision.items()
    for stored, value in text.named_parameters():
        name, change = _name_in_whole(stored), parts.change(_name_in_whole(stored))
        value = value.detach()
        if name in _EMBEDDINGS:
            value = torch.cat((value, value.new_zeros(1, value.shape[1])))
        yield name, value if change is None else value + change


def _check_state(state: Mapping[str, Tensor], model: PreTrainedModel, parts: VisionParts) -> None:
    """Raises `ModelError` if the parts lack a weight of the model, or have one that it has no place for."""
    sizes = {name: weight.shape for name, weight in model.named_parameters()}
    missing, foreign = sorted(sizes.keys() - state.keys()), sorted(state.keys() - sizes.keys())
    foreign += [name for name in parts.changed if name not in sizes or not _CHANGED.search(name)]
    other = [name for name, shape in sizes.items() if name in state and state[name].shape != shape]
    if problem := missing or foreign or other:
        what = "lack" if missing else "have no place in the model for" if foreign else "have another shape of"
        raise ModelError(
            f"the parts in {str(parts.folder)!r} {what} {problem[0]!r} ({len(problem)} in all); fetch them again from "
            "one place"
        )


def _processor(parts: VisionParts, tokenizer: Any, config: LlavaConfig) -> LlavaProcessor:
    """Return the processor of the parts over the text model's tokenizer with the image token."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True, normalized=False)]}
    )
    number = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if number != config.image_token_index:
        raise ModelError(
            f"the text model's tokenizer gives {IMAGE_TOKEN} the id {number}, and its vocabulary ends at "
            f"{config.image_token_index - 1}; make the text model again with multrace fetch-smollm2"
        )
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        for name in _SETTINGS:
            shutil.copyfile(parts.folder / name, Path(folder) / name)
        return open_processor(folder, local_files_only=True)


def _name_in_whole(stored: str) -> str:
    """Return the name that a weight of the text model has in the whole model."""
    return f"{_TEXT}{stored.removeprefix('model.')}" if stored.startswith("model.") else stored
