"""One frozen row per architecture, which locates attention and MLP in its decoder layers. Loading verifies the row."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from ..errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Family:
    """The module names and properties of one architecture, as its classes in transformers have them.

    Names are dotted module paths, relative to a decoder layer unless a field says otherwise. The defaults are Llama's.
    Loading verifies a row on the model itself and raises `ModelError` with the site where a name or property is wrong.

    Example:
        >>> import multrace as mt
        >>> from multrace.models import FAMILIES, Family
        >>> row = Family(name="qwen2", model_types=("qwen2",), text_types=("qwen2",))
        >>> families = (*FAMILIES, row)  # for mt.load(..., families=families)
    """

    name: str
    """The name of the row in log lines and errors."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that the row serves."""
    text_types: tuple[str, ...]
    """Values of `model_type` of the text configuration that the row serves; for a text-only model, the same values."""
    layers: str = "layers"
    """The list of decoder layers, relative to `model.get_decoder()`."""
    attention: str = "self_attn"
    """The attention module, whose output is the site "attention"."""
    attention_out: str = "self_attn.o_proj"
    """The linear map by which attention writes into the residual stream."""
    mlp: str = "mlp"
    """The MLP, whose output is the site "mlp"."""
    down: str = "mlp.down_proj"
    """The linear map by which the MLP writes into the residual stream."""
    final_norm: str = "norm"
    """The norm between the last decoder layer and the output head, relative to `model.get_decoder()`."""
    transposed: bool = False
    """True if the two linear maps store their weights as (input, output), as GPT-2's Conv1D does."""
    parallel: bool = False
    """True if attention and MLP read the same input, so that a layer's MLP does not see that layer's attention."""
    vision: str | None = None
    """The vision tower, relative to the base model; None for a text-only family."""
    vision_layers: str | None = None
    """The list of the vision tower's layers, relative to the tower; None if unknown."""
    projector: str | None = None
    """The module that turns the tower's states into image tokens, relative to the base model; None where unknown."""
    dropped_inputs: tuple[str, ...] = ("token_type_ids",)
    """Outputs of the tokenizer that must not reach the model: GPT-2 would add a word embedding for each of them."""


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
    """Return the first row that serves this configuration. Raises `ModelError`, which lists the rows, if none does."""
    text_type = config.get_text_config().model_type
    for family in families:
        if config.model_type in family.model_types and text_type in family.text_types:
            return family
    known = ", ".join(family.name for family in families) or "none"
    raise ModelError(
        f"no family row for model type {config.model_type!r} with text type {text_type!r} (rows: {known}); "
        "pass load(..., families=(*FAMILIES, Family(...))) with a row for it"
    )
