"""The differences between architectures as two tables: text stacks by text type, and picture fronts by model type.

Text stacks and the parts that see vary independently (LLaVA-NeXT surrounds a Mistral, a Llama or a Qwen2), so each has
rows of its own. A `Family` is the pair that serves one model. Loading proves it on the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Names = str | tuple[str, ...]
"""A dotted module path, or several of which the first that exists counts: layers of one model may have other names."""


@dataclass(frozen=True, kw_only=True)
class TextStack:
    """The module names and properties of a text stack, as its classes in transformers have them.

    Names are dotted module paths, relative to a decoder layer unless a field says otherwise. The defaults are Llama's;
    a text type without a row has them.

    Example:
        >>> from multrace.models import TextStack
        >>> row = TextStack(text_types=("starcoder2",), down="mlp.c_proj")
        >>> rows = (row,)  # for mt.load(..., families=rows)
    """

    text_types: tuple[str, ...]
    """Values of `model_type` of the text configuration that the row serves; for a text-only model, of config.json."""
    layers: str = "layers"
    """The list of decoder layers, relative to the text stack: `model.get_decoder()`, or the module inside it."""
    attention: Names = "self_attn"
    """The attention module, whose output is the site "attention" unless a norm follows."""
    attention_out: Names = "self_attn.o_proj"
    """The linear map by which attention writes."""
    attention_norm: str | None = None
    """The norm between what attention writes and the residual stream, whose output then is the site; None for none."""
    mlp: Names = "mlp"
    """The MLP, whose output is the site "mlp" unless a norm follows."""
    down: Names | None = "mlp.down_proj"
    """The linear map by which the MLP writes; None where no layer has a single one."""
    experts: str = "mlp.experts"
    """The experts. A layer that has them has no single linear map by which its MLP writes."""
    shared: Names = ("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj")
    """The linear map by which the expert that every token sees writes its part of the MLP output, if there is one."""
    mlp_norm: str | None = None
    """The norm between what the MLP writes and the residual stream, whose output then is the site; None for none."""
    beside: str | None = None
    """A module beside attention and MLP whose output a layer adds as well, where the layer has it; it is no site."""
    final_norm: str = "norm"
    """The norm between the last decoder layer and the output head, relative to the text stack."""
    transposed: bool = False
    """True if the two linear maps store their weights as (input, output), as GPT-2's Conv1D does."""
    parallel: bool | str = False
    """True if attention and MLP read the same input, so that a layer's MLP does not see that layer's attention; or the
    name of the setting of the text configuration that says so."""
    dropped_inputs: tuple[str, ...] = ()
    """Outputs of the processor that must not reach the model although its call has such an argument."""


@dataclass(frozen=True, kw_only=True)
class PictureFront:
    """The module names of the parts that see, as their classes in transformers have them.

    Names are relative to the base model, or to the whole model where it has no base model. Of several names, the first
    that exists counts; where none does, the part is unknown. The defaults are the usual ones.

    Example:
        >>> from multrace.models import PictureFront
        >>> row = PictureFront(model_types=("qianfan_ocr",), vision_layers="layers")
        >>> rows = (row,)  # for mt.load(..., families=rows)
    """

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that the row serves."""
    vision: Names | None = ("vision_tower", "vision_model", "visual", "image_tower", "vision_encoder")
    """The vision tower; None for a text-only model."""
    vision_layers: Names | None = ("encoder.layers", "encoder.layer", "transformer.layers", "blocks", "layers")
    """The list of the vision tower's layers, relative to the tower; None if unknown."""
    projector: Names | None = (
        *("multi_modal_projector", "connector", "aligner", "projector", "merger", "vision_projection"),
    )
    """The module that turns the tower's states into image tokens; None if unknown."""
    attended: bool = False
    """True if pictures stand at no position of the prompt: some layers attend to their states (Mllama)."""
    places: bool = True
    """True if an image token shows a part of its picture; False if it is the answer of a learned query to all of it."""
    prefix: bool = False
    """True if all positions before the answer attend to one another, so that a patch moves earlier positions, too."""


@dataclass(frozen=True, kw_only=True)
class Family(TextStack, PictureFront):
    """A text stack and a picture front as one row: what `vlm.family` holds, and what `load` also takes as a row.

    Example:
        >>> from multrace.models import Family
        >>> row = Family(name="mine", model_types=("qwen2",), text_types=("qwen2",))
        >>> row.down, row.vision
        ('mlp.down_proj', None)
    """

    name: str
    """The name in log lines and errors."""
    parallel: bool = False
    """True if attention and MLP read the same input, so that a layer's MLP does not see that layer's attention."""
    vision: Names | None = None
    """The vision tower; None for a text-only model."""
    vision_layers: Names | None = None
    """The list of the vision tower's layers, relative to the tower; None if unknown."""
    projector: Names | None = None
    """The module that turns the tower's states into image tokens; None if unknown."""


STAYING_OUT = {
    "gemma3n_text": "its layers pass on several streams side by side (AltUp), not one residual stream",
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
        "it has no attention: each of its layers is one mixer with a running state, which no row of attention and MLP "
        "describes",
    ),
    "phi4_multimodal": "it embeds pictures inside its text stack, so no prompt has the embeddings that the layers read",
}
"""Text types that no row can serve, with the reason."""

Row = TextStack | PictureFront
"""A row of either table; a `Family` is both."""

TEXT_STACKS: tuple[TextStack, ...] = (
    TextStack(
        text_types=("gpt2",),
        dropped_inputs=("token_type_ids",),  # a word embedding would be added for each of them
        layers="h",
        attention="attn",
        attention_out="attn.c_proj",
        down="mlp.c_proj",
        final_norm="ln_f",
        transposed=True,
    ),
    TextStack(
        text_types=("gpt_bigcode",),
        dropped_inputs=("token_type_ids",),  # a word embedding would be added for each of them
        layers="h",
        attention="attn",
        attention_out="attn.c_proj",
        down="mlp.c_proj",
        final_norm="ln_f",
    ),
    TextStack(
        text_types=("gpt_neo",),
        dropped_inputs=("token_type_ids",),  # a word embedding would be added for each of them
        layers="h",
        attention="attn",
        attention_out="attn.attention.out_proj",
        down="mlp.c_proj",
        final_norm="ln_f",
    ),
    TextStack(
        text_types=("gptj", "codegen"),
        dropped_inputs=("token_type_ids",),  # a word embedding would be added for each of them
        layers="h",
        attention="attn",
        attention_out="attn.out_proj",
        down="mlp.fc_out",
        final_norm="ln_f",
        parallel=True,
    ),
    TextStack(
        text_types=("gpt_neox",),
        attention="attention",
        attention_out="attention.dense",
        down="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        parallel="use_parallel_residual",
    ),
    TextStack(
        text_types=("opt",),
        attention_out="self_attn.out_proj",
        mlp="fc2",
        down="fc2",
        final_norm="final_layer_norm",
    ),
    TextStack(
        text_types=("xglm", "biogpt"),
        attention_out="self_attn.out_proj",
        mlp="fc2",
        down="fc2",
        final_norm="layer_norm",
    ),
    TextStack(
        text_types=("mpt",),
        layers="blocks",
        attention="attn",
        attention_out="attn.out_proj",
        mlp="ffn.down_proj",  # its module adds the residual stream itself
        down="ffn.down_proj",
        final_norm="norm_f",
    ),
    TextStack(
        text_types=("phi",),
        attention_out="self_attn.dense",
        down="mlp.fc2",
        final_norm="final_layernorm",
        parallel=True,
    ),
    TextStack(
        text_types=("persimmon",),
        attention_out="self_attn.dense",
        down="mlp.dense_4h_to_h",
        final_norm="final_layernorm",
    ),
    TextStack(text_types=("starcoder2",), down="mlp.c_proj"),
    TextStack(text_types=("nanochat",), down="mlp.fc2"),
    TextStack(
        text_types=(
            *("gemma2", "gemma3_text", "beam"),
            *("olmo2", "olmo3", "exaone4", "flex_olmo"),
        ),
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    TextStack(
        text_types=("gemma4_text", "gemma4_unified_text"),
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        experts="experts",
        beside="post_per_layer_input_norm",
    ),
    TextStack(
        text_types=("glm4", "glm4v_text", "glm_ocr_text", "kolibri1"),
        attention_norm="post_self_attn_layernorm",
        mlp_norm="post_mlp_layernorm",
    ),
    TextStack(text_types=("afmoe",), attention_norm="post_attention_layernorm", mlp_norm="post_mlp_layernorm"),
    TextStack(text_types=("hyperclovax",), attention_norm="post_norm1", mlp_norm="post_norm2"),
    TextStack(text_types=("cohere", "cohere2", "cohere2_moe"), parallel=True),
    TextStack(
        text_types=("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
        attention=("self_attn", "linear_attn"),
        attention_out=("self_attn.o_proj", "linear_attn.out_proj"),
    ),
    TextStack(
        text_types=("mllama_text_model",),
        attention=("self_attn", "cross_attn"),
        attention_out=("self_attn.o_proj", "cross_attn.o_proj"),
    ),
    TextStack(
        text_types=("llama4_text",),
        mlp="feed_forward",
        down="feed_forward.down_proj",
        experts="feed_forward.experts",
        shared="feed_forward.shared_expert.down_proj",
    ),
    TextStack(
        text_types=("lfm2",),
        attention=("self_attn", "conv"),
        attention_out=("self_attn.out_proj", "conv.out_proj"),
        mlp="feed_forward",
        down="feed_forward.w2",
        final_norm="embedding_norm",
    ),
    TextStack(
        text_types=("bamba", "jamba"),
        attention=("self_attn", "mamba"),
        attention_out=("self_attn.o_proj", "mamba.out_proj"),
        mlp="feed_forward",
        down="feed_forward.down_proj",
        experts="feed_forward.experts",
        final_norm="final_layernorm",
    ),
    TextStack(
        text_types=("recurrent_gemma",),
        attention="temporal_block",
        attention_out=("temporal_block.o_proj", "temporal_block.linear_out"),
        mlp="mlp_block",
        down="mlp_block.down_proj",
        final_norm="final_norm",
    ),
    TextStack(
        text_types=("granitemoe", "granitemoe_swa", "granitemoeshared"),
        mlp="block_sparse_moe",
        down=None,
        experts="block_sparse_moe.experts",
        beside="shared_mlp",
    ),
    TextStack(
        text_types=("falcon",),
        layers="h",
        attention="self_attention",
        attention_out="self_attention.dense",
        down="mlp.dense_4h_to_h",
        final_norm="ln_f",
        parallel="parallel_attn",
    ),
    TextStack(text_types=("stablelm",), parallel="use_parallel_residual"),
    TextStack(
        text_types=("falcon_h1",),
        mlp="feed_forward",
        down="feed_forward.down_proj",
        final_norm="final_layernorm",
        beside="mamba",
    ),
)
"""The text stacks that need more than the defaults; a text type without a row has the defaults."""

PICTURE_FRONTS: tuple[PictureFront, ...] = (
    PictureFront(
        model_types=(
            *("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "internvl", "mistral3"),
            *("gemma3", "shieldgemma2", "aya_vision", "cohere2_vision", "lfm2_vl"),
        ),
        vision="vision_tower",
        vision_layers=("encoder.layers", "transformer.layers", "encoder.layer"),
        projector="multi_modal_projector",
    ),
    PictureFront(
        model_types=("aria",),
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
        places=False,
    ),
    PictureFront(
        model_types=(
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            *("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "exaone4_5", "cosmos3_omni"),
        ),
        vision="visual",
        vision_layers="blocks",
        projector="visual.merger",
    ),
    PictureFront(
        model_types=("idefics3", "smolvlm"),
        vision="vision_model",
        vision_layers="encoder.layers",
        projector="connector",
    ),
    PictureFront(
        model_types=("idefics2",),
        vision="vision_model",
        vision_layers="encoder.layers",
        projector="connector",
        places=False,
    ),
    PictureFront(
        model_types=("paligemma",),
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
        prefix=True,
    ),
    PictureFront(
        model_types=("deepseek_vl", "deepseek_vl_hybrid", "janus"),
        vision="vision_model",
        vision_layers="encoder.layers",
        projector="aligner",
    ),
    PictureFront(
        model_types=("llama4",), vision="vision_model", vision_layers="model.layers", projector="multi_modal_projector"
    ),
    PictureFront(
        model_types=("mllama",),
        attended=True,
        places=False,
        vision="vision_model",
        vision_layers="transformer.layers",
        projector="multi_modal_projector",
    ),
    PictureFront(
        model_types=("blip-2", "instructblip"),
        places=False,
        vision="vision_model",
        vision_layers="encoder.layers",
        projector="language_projection",
    ),
    PictureFront(
        model_types=("video_llava",),
        vision="image_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
    ),
    PictureFront(model_types=("kimi_k25",), vision="vision_tower", vision_layers="layers", projector="mm_projector"),
    PictureFront(
        model_types=("got_ocr2", "pp_chart2table", "qianfan_ocr", "minimax_m3_vl", "molmo2"),
        vision="vision_tower",
        vision_layers="layers",
        projector="multi_modal_projector",
    ),
    PictureFront(
        model_types=("minicpmv4_6", "minicpmv4_7"),
        vision="vision_tower",
        vision_layers=None,
        projector="merger",
    ),
    PictureFront(
        model_types=("ovis2",), vision="vision_tower", vision_layers="transformer.encoder.layers", projector=None
    ),
    PictureFront(
        model_types=("fast_vlm", "perception_lm"),
        vision="vision_tower",
        vision_layers=None,
        projector="multi_modal_projector",
    ),
    PictureFront(
        model_types=("gemma4",), vision="vision_tower", vision_layers="encoder.layers", projector="embed_vision"
    ),
    PictureFront(model_types=("gemma3n",), vision="vision_tower", vision_layers=None, projector="embed_vision"),
)
"""The picture fronts that are known; a model type without a row has the defaults."""


def family_of(config: PretrainedConfig, rows: Sequence[Row] = ()) -> Family:
    """Return the pair of rows that serves this configuration: of the given rows, else of the tables, else the defaults.

    Args:
        config: The configuration of the model, as `config.json` has it.
        rows: Further rows, which come before those of the tables; a `Family` is taken as it is.

    Returns:
        The family.

    Raises:
        ModelError: The model is an encoder-decoder or of another kind that no row can serve.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ModelError(
            f"model type {config.model_type!r} is an encoder-decoder: its decoder reads the question through "
            "cross-attention, not at positions of its own; multrace opens decoder-only models"
        )
    reason = STAYING_OUT.get(text.model_type)
    if reason is not None:
        raise ModelError(f"model type {config.model_type!r} cannot be opened: {reason}")
    for row in rows:
        if isinstance(row, Family) and config.model_type in row.model_types and text.model_type in row.text_types:
            return row
    parts = [row for row in rows if not isinstance(row, Family)]
    return pair_of(config, text_stack_of(text.model_type, parts), picture_front_of(config, parts))


def has_rows(config: PretrainedConfig, rows: Sequence[Row] = ()) -> bool:
    """Return whether each part of this configuration, text stack and picture front, has a row of its own."""
    text_type = config.get_text_config().model_type
    stacks = [row for row in (*rows, *TEXT_STACKS) if isinstance(row, TextStack)]
    return has_front(config, rows) and any(text_type in row.text_types for row in stacks)


def has_front(config: PretrainedConfig, rows: Sequence[Row] = ()) -> bool:
    """Return whether the picture front of this configuration has a row, or there is none."""
    fronts = [row for row in (*rows, *PICTURE_FRONTS) if isinstance(row, PictureFront)]
    is_text_only = config.get_text_config().model_type == config.model_type
    return is_text_only or any(config.model_type in row.model_types for row in fronts)


def text_stack_of(text_type: str, rows: Sequence[Row] = ()) -> TextStack:
    """Return the first row for a text type, from the given rows and the table; the defaults where there is none."""
    for row in (*rows, *TEXT_STACKS):
        if isinstance(row, TextStack) and text_type in row.text_types:
            return row
    return TextStack(text_types=(text_type,))


def picture_front_of(config: PretrainedConfig, rows: Sequence[Row] = ()) -> PictureFront | None:
    """Return the first row for a model type, from the given rows and the table, or the defaults; None for text only."""
    if config.get_text_config().model_type == config.model_type:
        return None
    for row in (*rows, *PICTURE_FRONTS):
        if isinstance(row, PictureFront) and config.model_type in row.model_types:
            return row
    return PictureFront(model_types=(config.model_type,))


def pair_of(config: PretrainedConfig, stack: TextStack, front: PictureFront | None) -> Family:
    """Return a text stack and a picture front (None for a text-only model) as the family of this configuration."""
    outer, text = config.model_type, config.get_text_config().model_type
    parts = {field.name: getattr(stack, field.name) for field in fields(TextStack)}
    if isinstance(stack.parallel, str):
        parts["parallel"] = bool(getattr(config.get_text_config(), stack.parallel))
    if front is not None:
        parts |= {field.name: getattr(front, field.name) for field in fields(PictureFront)}
    name = outer if text.startswith(outer) or front is None else f"{outer}_{text}"
    return Family(**parts | {"name": name, "model_types": (outer,), "text_types": (text,)})
