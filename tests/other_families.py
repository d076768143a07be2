"""Families that are in no row of ours, built with random weights to compute in true float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from exact_models import SIZES, assemble, lift_casts
from multrace import VisionLanguageModel
from multrace.models.families import Family
from transformers import PreTrainedModel

SLIDING, FULL = "sliding_attention", "full_attention"
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IMAGE_IDS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
GRID = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
PHI = {"attention_out": "self_attn.dense", "down": "mlp.fc2", "final_norm": "final_layernorm", "parallel": True}
NEOX = {"attention": "attention", "attention_out": "attention.dense", "down": "mlp.dense_4h_to_h",
        "final_norm": "final_layer_norm"}  # fmt: skip
GPT2 = {"layers": "h", "attention": "attn", "attention_out": "attn.c_proj", "down": "mlp.c_proj",
        "final_norm": "ln_f", "transposed": True}  # fmt: skip
GPTJ = {"layers": "h", "attention": "attn", "attention_out": "attn.out_proj", "down": "mlp.fc_out",
        "final_norm": "ln_f"}  # fmt: skip
GPTNEO = {**GPTJ, "attention_out": "attn.attention.out_proj", "down": "mlp.c_proj"}
DENSE = {"head_dim": 16, "global_head_dim": 16, "sliding_window": 4, "hidden_size_per_layer_input": 0,
         "num_kv_shared_layers": 0, "layer_types": [SLIDING, FULL, SLIDING, FULL],
         "final_logit_softcapping": None}  # fmt: skip
CAPPED = {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": None}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
          "num_key_value_heads": 4, "first_k_dense_replace": 4, "n_routed_experts": 4, "n_group": 1,
          "topk_group": 1}  # fmt: skip


def text(name: str, **settings) -> Callable[[], PreTrainedModel]:
    """A text model of transformers, from the first part of its classes' names."""
    config = getattr(
        transformers, f"{name}TextConfig" if hasattr(transformers, f"{name}TextConfig") else f"{name}Config"
    )
    return lambda: getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **settings}))


def seeing(name: str, text_config: dict | transformers.PretrainedConfig, **settings) -> Callable[[], PreTrainedModel]:
    """A vision-language model of transformers around a text stack."""
    config = getattr(transformers, f"{name}Config")
    make = getattr(transformers, f"{name}ForConditionalGeneration")
    return lambda: make(config(text_config=text_config, **settings))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str | bool]]] = {
    "Mistral, a window shorter than the prompt": (text("Mistral", sliding_window=5), {}),
    "Qwen2, biases": (text("Qwen2"), {}),
    "Qwen2, windows in the later layers": (
        text("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
        {},
    ),
    "Qwen3": (text("Qwen3", head_dim=16), {}),
    "Gemma, a scaled embedding": (text("Gemma", head_dim=16), {}),
    "Gemma3, sliding and full layers": (
        text(
            "Gemma3", head_dim=16, sliding_window=4, num_hidden_layers=5,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING],
        ),
        {},
    ),
    "Gemma 4, which may share keys between layers": (text("Gemma4", **DENSE), {}),
    "Gemma2, capped scores": (text("Gemma2", **CAPPED), {}),
    "GPT-OSS, sinks and experts": (
        text("GptOss", head_dim=16, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
             experts_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        {"down": "mlp.router"},  # experts have no matrix of two dimensions
    ),
    "DeepSeek-V3, values of another size than keys": (text("DeepseekV3", **LATENT), {}),
    "MiMo-V2, sinks in some layers, values of another size": (
        text("MiMoV2Flash", mlp_layer_types=["dense"] * 4, head_dim=12, v_head_dim=8, sliding_window=4,
             layer_types=[FULL, SLIDING, SLIDING, FULL]),
        {},
    ),
    "Llama 4, chunks and full layers": (
        text("Llama4", head_dim=8, attention_chunk_size=6, no_rope_layers=[1, 1, 0, 1], intermediate_size_mlp=64,
             moe_layers=[], interleave_moe_layer_step=9, num_local_experts=2, use_qk_norm=True),
        {"mlp": "feed_forward", "down": "feed_forward.down_proj"},
    ),
    "GPT-J, a method for attention": (text("GPTJ", hidden_size=64, n_inner=64, rotary_dim=4), GPTJ),
    "GPT-Neo, a method with windows": (
        text("GPTNeo", num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4), GPTNEO),
    "CodeGen": (text("CodeGen", hidden_size=64, n_inner=64, rotary_dim=4, n_ctx=128), GPTJ),
    "StableLM, an interface that it does not declare": (text("StableLm"), {}),
    "GPT-2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2)), GPT2),
    "GPT-NeoX": (text("GPTNeoX"), NEOX),
    "Phi": (text("Phi"), PHI),
    "Phi-3, one projection for queries, keys and values": (text("Phi3", sliding_window=6), {}),
    "OLMo-2, norms after attention and MLP": (text("Olmo2"), {}),
    "LLaVA-OneVision": (
        seeing("LlavaOnevision", transformers.Qwen2Config(**SIZES), image_token_index=290,
               vision_config=transformers.SiglipVisionConfig(**VISION)),
        {},
    ),
    "Qwen2.5-VL": (
        seeing("Qwen2_5_VL", {**SIZES, "rope_parameters": ROPE}, **IMAGE_IDS,
               vision_config={**GRID, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
                              "fullatt_block_indexes": [0], "window_size": 56}),
        {},
    ),
    "Gemma3 with a vision tower": (
        seeing("Gemma3", transformers.Gemma3TextConfig(**{**SIZES, "head_dim": 16, "sliding_window": 4}),
               vision_config=transformers.SiglipVisionConfig(**VISION), mm_tokens_per_image=4),
        {},
    ),
    "PaliGemma, everything sees everything": (
        seeing("PaliGemma", transformers.GemmaConfig(**SIZES, head_dim=16).to_dict(), image_token_index=290,
               vision_config={**VISION, "model_type": "siglip_vision_model"}, projection_dim=32),
        {},
    ),
    "PaliGemma 2, capped scores": (
        seeing("PaliGemma", transformers.Gemma2Config(**{**SIZES, **CAPPED}).to_dict(), image_token_index=290,
               vision_config={**VISION, "model_type": "siglip_vision_model"}, projection_dim=32),
        {},
    ),
}  # fmt: skip

LINEAR = "linear_attention"
MIXED = {"layer_types": [LINEAR, LINEAR, LINEAR, FULL], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}  # fmt: skip
MIXED_NAMES = {"attention": ("self_attn", "linear_attn"), "attention_out": ("self_attn.o_proj", "linear_attn.out_proj")}
RUNNING: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "Qwen3.5, linear attention": (text("Qwen3_5", **MIXED), MIXED_NAMES),
    "LFM2, short convolutions": (
        text("Lfm2", layer_types=["conv", FULL, "conv", FULL], block_auto_adjust_ff_dim=False),
        {"attention": ("self_attn", "conv"), "attention_out": ("self_attn.out_proj", "conv.out_proj"),
         "mlp": "feed_forward", "down": "feed_forward.w2", "final_norm": "embedding_norm"},
    ),
    "Qwen3.5, linear attention last": (text("Qwen3_5", **{**MIXED, "layer_types": [FULL, LINEAR] * 2}), MIXED_NAMES),
    "Jamba, a state that takes one token at a time": (
        text("Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=10, expert_layer_offset=9,
             use_mamba_kernels=False, mamba_dt_rank=4, num_experts=1, num_experts_per_tok=1),
        {"attention": ("self_attn", "mamba"), "attention_out": ("self_attn.o_proj", "mamba.out_proj"),
         "mlp": "feed_forward", "down": "feed_forward.down_proj", "final_norm": "final_layernorm"},
    ),
}  # fmt: skip
"""Families with layers that have no attention."""
NO_PLAIN_SOFTMAX = [name for name in MODELS if any(what in name for what in ("capped scores", "sinks", "another size"))]


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    build, names = {**MODELS, **RUNNING}[name]
    torch.manual_seed(0)
    model = build().double()
    lift_casts(model, monkeypatch)
    return assemble(model, Family(name=name, model_types=(), text_types=(), **names))
