"""Recipes of the text-only models: four layers of 32 numbers, as small as their classes allow."""

from .folders import IDS, VOCABULARY, Recipe, Settings

TEXT: Settings = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.2, **IDS,
}  # fmt: skip
"""What most text configurations take; two query heads for each key head."""
GPT: Settings = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 64,
    "initializer_range": 0.2, **IDS,
}  # fmt: skip
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 8}
"""Shorter than every prompt, so that masks of layers differ."""
ALTERNATING = ["sliding_attention", "full_attention"] * 2
GEMMA = {**HEADS, **WINDOW, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
GRANITE = {
    "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.2,
}  # fmt: skip


def text(model_type: str, **settings: object) -> Recipe:
    """A text-only model with the sizes that most of them take, and these settings."""
    return Recipe(config={"model_type": model_type, **TEXT, **settings})


TEXTS: dict[str, Recipe] = {
    "llama": text("llama"),
    "qwen2": text("qwen2"),
    "qwen3": text("qwen3", **HEADS),
    "mistral": text("mistral", **WINDOW),
    "gemma": text("gemma", **HEADS),
    "gemma2": text("gemma2", **GEMMA),
    "gemma3_text": text("gemma3_text", **GEMMA),
    "phi": text("phi"),
    "phi3": text("phi3", **WINDOW, original_max_position_embeddings=2048),
    "gpt_neox": text("gpt_neox"),
    "gptj": Recipe(config={"model_type": "gptj", **GPT, "rotary_dim": 4}),
    "olmo2": text("olmo2"),
    "olmo3": text("olmo3", **WINDOW),
    "gpt_oss": text("gpt_oss", **HEADS, **WINDOW, **EXPERTS),
    "mixtral": text("mixtral", **EXPERTS),
    "qwen3_moe": text("qwen3_moe", **HEADS, **EXPERTS),
    "glm4": text("glm4", **HEADS),
    "cohere2": text("cohere2", **WINDOW),
    "granite": text("granite", **GRANITE),
    "smollm3": text("smollm3"),
    "opt": text("opt", ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
}
