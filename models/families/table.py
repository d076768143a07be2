"""One frozen row per architecture: where its decoder layers keep attention and MLP. `proof` checks them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from ..errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names and quirks of one architecture. Leaf names are relative to a decoder layer unless said otherwise."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` values that this row serves."""
    text_types: tuple[str, ...]
    """`model_type` values of the text stack that this row serves."""
    layers: str = "layers"
    """Name of the list of decoder layers, relative to `model.get_decoder()`."""
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"
    """The linear map that writes attention into the residual stream."""
    mlp: str = "mlp"
    down: str = "mlp.down_proj"
    """The linear map that writes the MLP into the residual stream."""
    final_norm: str = "norm"
    """Relative to `model.get_decoder()`."""
    transposed: bool = False
    """Weights are stored (input, output), as in GPT-2's Conv1D, instead of (output, input)."""
    parallel: bool = False
    """Attention and MLP read the same input, so a layer's MLP does not see that layer's attention."""
    vision: str | None = None
    """The vision tower, relative to the base model; None for a text-only family."""
    vision_layers: str | None = None
    """Name of the list of the vision tower's layers, relative to the tower; None where they are not known."""
    projector: str | None = None
    """What turns the tower's states into image tokens, relative to the base model; None where it is not known."""
    dropped_inputs: tuple[str, ...] = ("token_type_ids",)
    """Tokenizer outputs that must not reach the model: GPT-2 would add a word embedding for each of them."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llava_llama",
        model_types=("llava",),
        text_types=("llama",),
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
    ),
    Family(
        name="llava_phi",
        model_types=("llava",),
        text_types=("phi",),
        attention_out="self_attn.dense",
        down="mlp.fc2",
        final_norm="final_layernorm",
        parallel=True,
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
    ),
    Family(name="llama", model_types=("llama",), text_types=("llama",)),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        text_types=("gpt2",),
        layers="h",
        attention="attn",
        attention_out="attn.c_proj",
        down="mlp.c_proj",
        final_norm="ln_f",
        transposed=True,
    ),
)


def family_of(config: PretrainedConfig, families: Sequence[Family] = FAMILIES) -> Family:
    """The first row that serves this configuration. ModelError lists the rows if there is none."""
    text_type = config.get_text_config().model_type
    for family in families:
        if config.model_type in family.model_types and text_type in family.text_types:
            return family
    known = ", ".join(family.name for family in families) or "none"
    raise ModelError(
        f"no family row for model type {config.model_type!r} with text type {text_type!r} (rows: {known}); "
        "pass load(..., families=(*FAMILIES, Family(...))) with a row for it"
    )
