"""Recipes of the vision-language models, with pictures of 32 to 96 pixels wherever a class allows that.

Some sizes are built into transformers: GOT-OCR2 and Gemma 3n make 256 image tokens, Aria takes pictures of 980 pixels,
Phi-4 of 448.
"""

from .folders import IDS, VOCABULARY, Recipe, Settings
from .texts import ALTERNATING, EXPERTS, GEMMA, HEADS, TEXT, WINDOW

SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TOWER: Settings = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32, "initializer_factor": 5.0}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
"""Positions on three axes: time, row and column."""
TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def stack(model_type: str, **settings: object) -> Settings:
    """The configuration of a text stack under a vision-language model."""
    return {"model_type": model_type, **TEXT, "tie_word_embeddings": False, **settings}


# ----------------------------------------------------------------------------------- Qwen, and those that work like it

QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
GRID = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
SHOWN = {"size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}}


def qwen(
    model_type: str, vision: Settings, processor: str, video: str = "Qwen2VLVideoProcessor", **text: object
) -> Recipe:
    """A member of the Qwen-VL line: pictures as flat patches, positions on three axes."""
    blocks = {
        "depth": 2, "num_heads": 2, "hidden_size": 32, "patch_size": 8, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return Recipe(
        config={
            "model_type": model_type,
            "text_config": {**TEXT, "rope_parameters": MROPE, **text},
            "vision_config": {**blocks, **vision},
            **{f"{name}_id": token for name, token in QWEN.items()},
        },
        named=QWEN,
        image={"image_processor_type": "Qwen2VLImageProcessor", **GRID, **SHOWN},
        video={"video_processor_type": video, **GRID},
        processor={"processor_class": processor},
        template="<|vision_start|><|image_pad|><|vision_end|>",
    )


QWEN3_VISION = {"intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64}
DEEPSTACK = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
QWEN3 = {"processor": "Qwen3VLProcessor", "video": "Qwen3VLVideoProcessor"}
QWEN3_TEXT = {**HEADS, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
PARTLY_ROTARY = {**MROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
HYBRID = {"head_dim": 16, "rope_parameters": PARTLY_ROTARY, **LINEAR}
"""Three layers of linear attention, and one of full attention."""
GLM_TOKENS = (
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
KIMI = {
    "image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>",
    "vision_start_token": "<|media_begin|>", "vision_end_token": "<|media_end|>",
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4,
}  # fmt: skip
"""Latent attention, whose keys and values have different sizes, over four dense layers."""
GRIDS = {
    "qwen2_vl": qwen("qwen2_vl", {"embed_dim": 32, "mlp_ratio": 2}, "Qwen2VLProcessor"),
    "qwen2_5_vl": qwen(
        "qwen2_5_vl",
        {"intermediate_size": 64, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32},
        "Qwen2_5_VLProcessor",
    ),
    "qwen3_vl": qwen("qwen3_vl", DEEPSTACK, **QWEN3, **QWEN3_TEXT),
    "qwen3_vl_moe": qwen("qwen3_vl_moe", DEEPSTACK, **QWEN3, **QWEN3_TEXT, **EXPERTS),
    "qwen3_5": qwen("qwen3_5", QWEN3_VISION, **QWEN3, **HYBRID),
    "glm4v": Recipe(
        config={
            "model_type": "glm4v",
            "text_config": {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 32, "patch_size": 8, "out_hidden_size": 32,
                "intermediate_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2,
            },
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            **{f"{kind}_{edge}_token_id": f"<|{word}_of_{kind}|>"
               for kind in ("image", "video") for edge, word in (("start", "begin"), ("end", "end"))},
        },
        tokens=GLM_TOKENS,
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image={"image_processor_type": "Glm4vImageProcessor", **GRID, **SHOWN},
        video={"video_processor_type": "Glm4vVideoProcessor", **GRID},
        processor={"processor_class": "Glm4vProcessor"},
        template="<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "kimi_k25": Recipe(
        config={
            "model_type": "kimi_k25",
            "text_config": stack("deepseek_v3", **MLA),
            "vision_config": {
                "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4,
                "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
            },
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
            **{f"{name}_id": token for name, token in KIMI.items()},
        },
        named=KIMI,
        image={"image_processor_type": "Kimi_K25ImageProcessor", "patch_size": 8},
        video={"video_processor_type": "Kimi_K25VideoProcessor", "patch_size": 8},
        processor={"processor_class": "Kimi_K25Processor"},
        template="<|media_begin|><|media_pad|><|media_end|>",
    ),
    "minicpmv4_6": Recipe(
        config={
            "model_type": "minicpmv4_6",
            "text_config": stack("qwen3_5_text", **HYBRID),
            "vision_config": {**TOWER, "image_size": 64, "insert_layer_id": 0},
            "insert_layer_id": 0,
            "image_size": 64,
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
        },
        named={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
            "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
        },
        image={"image_processor_type": "MiniCPMV4_6ImageProcessor", "scale_resolution": 64, "patch_size": 8,
               "max_slice_nums": 4},
        video={"video_processor_type": "MiniCPMV4_6VideoProcessor"},
        processor={"processor_class": "MiniCPMV4_6Processor"},
        template="<|image_pad|>",
    ),
}  # fmt: skip

# -------------------------------------------------------------------------------------------- LLaVA and its descendants


def llava(model_type: str, text: Settings, image: Settings, vision: Settings = CLIP, **settings: object) -> Recipe:
    """A LLaVA: a tower, a projector and a text stack, one token for each patch."""
    return Recipe(
        config={
            "model_type": model_type, "vision_config": vision, "text_config": text, "image_seq_length": 16,
            "image_token_index": "<image>", **settings,
        },
        named={"image_token": "<image>", "video_token": "<video>"},
        image=image,
        processor={"processor_class": "LlavaProcessor", **ONE_CLASS_TOKEN},
        template="<image>",
    )  # fmt: skip


ONE_CLASS_TOKEN = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
CLIP_IMAGE = {"image_processor_type": "CLIPImageProcessor", **CROPPED}
FASTVIT = {
    "inference_mode": True, "layers": [1] * 5, "embed_dims": [8, 8, 8, 8, 32], "mlp_ratios": [2] * 5,
    "se_downsamples": [False] * 5, "downsamples": [False, True, True, True, True], "pos_embs": [None] * 5,
    "token_mixers": ["repmixer"] * 5, "lkc_use_act": True, "stem_use_scale_branch": False,
}  # fmt: skip
PERCEPTION = {
    "depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": [32, 32], "patch_size": 8, "global_pool": "",
    "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4],
}  # fmt: skip
BREAKS = ("[IMG_BREAK]", "[IMG_END]")
PIXTRAL = {**TOWER, "model_type": "pixtral", "image_size": 64}


def mistral(config: Settings, *, merge: int) -> Recipe:
    """A model with Pixtral's tower and processor, whose picture's rows end with a token of their own."""
    side = 8 * merge
    return Recipe(
        config={
            **config, "vision_config": PIXTRAL, "text_config": stack("mistral", **HEADS), "image_token_index": "[IMG]",
        },
        tokens=BREAKS,
        named={"image_token": "[IMG]"},
        image={"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 64},
               "patch_size": {"height": side, "width": side}},
        processor={"processor_class": "PixtralProcessor", "patch_size": 8, "spatial_merge_size": merge},
        template="[IMG]",
    )  # fmt: skip


LLAVAS = {
    "llava": llava("llava", stack("llama"), CLIP_IMAGE, **LAST),
    "vipllava": llava("vipllava", stack("llama"), CLIP_IMAGE, vision_feature_layers=[-1, -2]),
    "llava_next": Recipe(
        config={
            "model_type": "llava_next", "vision_config": CLIP, "text_config": stack("mistral"), "image_seq_length": 16,
            "image_token_index": "<image>", "image_grid_pinpoints": PINPOINTS, **LAST,
        },
        named={"image_token": "<image>"},
        image={"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, **CROPPED},
        processor={"processor_class": "LlavaNextProcessor", **ONE_CLASS_TOKEN},
        template="<image>",
    ),
    "llava_onevision": Recipe(
        config={
            "model_type": "llava_onevision", "vision_config": SIGLIP, "text_config": stack("qwen2"),
            "image_grid_pinpoints": PINPOINTS, "image_token_index": "<image>", "video_token_index": "<video>", **WHOLE,
        },
        named={"image_token": "<image>", "video_token": "<video>"},
        image={"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS,
               "size": SQUARE},
        video={"video_processor_type": "LlavaOnevisionVideoProcessor", "size": SQUARE},
        processor={"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16,
                   "vision_feature_select_strategy": "full"},
        template="<image>",
    ),
    "video_llava": Recipe(
        config={
            "model_type": "video_llava", "vision_config": CLIP, "text_config": stack("llama"), "image_seq_length": 16,
            "image_token_index": "<image>", "video_token_index": "<video>", **LAST,
        },
        named={"image_token": "<image>", "video_token": "<video>"},
        image={"image_processor_type": "VideoLlavaImageProcessor", **CROPPED},
        video={"video_processor_type": "VideoLlavaVideoProcessor", **CROPPED},
        processor={"processor_class": "VideoLlavaProcessor", **ONE_CLASS_TOKEN},
        template="<image>",
    ),
    "fast_vlm": Recipe(
        config={
            "model_type": "fast_vlm",
            "vision_config": {
                "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
                "hidden_size": 64, "num_classes": 2, "model_args": FASTVIT,
            },
            "text_config": stack("qwen2"), "image_token_index": "<image>", "image_seq_length": 1,
        },
        named={"image_token": "<image>"},
        image={"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 128},
               "crop_size": {"height": 128, "width": 128}},
        processor={"processor_class": "LlavaProcessor", "patch_size": 64, "vision_feature_select_strategy": "full",
                   "num_additional_image_tokens": 0},
        template="<image>",
    ),
    "perception_lm": Recipe(
        config={
            "model_type": "perception_lm",
            "vision_config": {
                "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
                "num_classes": 2, "global_pool": "map", "initializer_range": 0.2, "model_args": PERCEPTION,
            },
            "text_config": stack("llama"), "image_token_id": "<|image|>", "video_token_id": "<|video|>",
            "projector_pooling_ratio": 2, "vision_use_cls_token": True,
        },
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image={"image_processor_type": "PerceptionLMImageProcessor", "tile_size": 32, "max_num_tiles": 4,
               "vision_input_type": "thumb+tile", "size": SQUARE},
        video={"video_processor_type": "PerceptionLMVideoProcessor", "size": SQUARE},
        processor={"processor_class": "PerceptionLMProcessor", "patch_size": 8, "pooling_ratio": 2},
        template="<|image|>",
    ),
    "mistral3": mistral({"model_type": "mistral3", "spatial_merge_size": 2, "vision_feature_layer": -1,
                         "tie_word_embeddings": False}, merge=2),
    "pixtral": mistral({"model_type": "llava", "image_seq_length": 1, **WHOLE}, merge=1),
}  # fmt: skip

# -------------------------------------------------------------------------------------------------- pictures in pieces

ROWS_AND_COLUMNS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS_AND_COLUMNS)
INTERN = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
COHERE = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
          "img_line_break_token": "<|IMG_LINE_BREAK|>"}  # fmt: skip
OVIS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "mlp_dim": 64, "window_size": 4, "initializer_range": 0.2,
}  # fmt: skip


def idefics(model_type: str, name: str, video: Settings | None = None) -> Recipe:
    """Idefics 3 or SmolVLM: a grid of tiles with a word before each, and the whole picture."""
    return Recipe(
        config={
            "model_type": model_type, "vision_config": TOWER, "text_config": stack("llama"), "scale_factor": 2,
            "image_token_id": "<image>", "pad_token_id": 0,
        },
        tokens=IDEFICS,
        named={"image_token": "<image>"},
        image={"image_processor_type": f"{name}ImageProcessor", "size": {"longest_edge": 64},
               "max_image_size": {"longest_edge": 32}},
        video=video,
        processor={"processor_class": f"{name}Processor", "image_seq_len": 4},
        template="<image>",
    )  # fmt: skip


PIECES = {
    "idefics3": idefics("idefics3", "Idefics3"),
    "smolvlm": idefics("smolvlm", "SmolVLM", {
        "video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 32}}),
    "internvl": Recipe(
        config={
            "model_type": "internvl",
            "vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
            "text_config": stack("qwen2"), "image_seq_length": 4, "tie_word_embeddings": False,
            "image_token_id": "<IMG_CONTEXT>",
        },
        named=INTERN,
        image={"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, **TILES},
        video={"video_processor_type": "InternVLVideoProcessor", "size": SQUARE},
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
        template="<IMG_CONTEXT>",
    ),
    "aya_vision": Recipe(
        config={
            "model_type": "aya_vision", "vision_config": SIGLIP, "text_config": stack("cohere2", **WINDOW),
            "downsample_factor": 2, "image_token_index": "<|IMG_PATCH|>", "adapter_layer_norm_eps": 1e-6, **WHOLE,
        },
        tokens=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL",
                *(f"TILE_{tile}" for tile in range(1, 5))),
        named={"image_token": "<image>"},
        image={"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, **TILES},
        processor={"processor_class": "AyaVisionProcessor", "patch_size": 8, "img_size": 32, "downsample_factor": 2},
        template="<image>",
    ),
    "cohere2_vision": Recipe(
        config={
            "model_type": "cohere2_vision", "vision_config": SIGLIP, "text_config": stack("cohere2", **WINDOW),
            "downsample_factor": 2, "image_token_id": "<|IMG_PATCH|>", "alignment_intermediate_size": 64,
        },
        named=COHERE,
        # as many tokens for a tile as the square of patch_size says
        image={"image_processor_type": "Cohere2VisionImageProcessor", "size": SQUARE, "patch_size": 2,
               "downsample_factor": 2, "min_patches": 1, "max_patches": 4},
        processor={"processor_class": "Cohere2VisionProcessor"},
        template="<|IMG_PATCH|>",
    ),
    "ovis2": Recipe(
        config={
            "model_type": "ovis2", "vision_config": {**TOWER, "vocab_size": 24, "hidden_stride": 2},
            "text_config": stack("qwen2"), "image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": list(OVIS),
            "vocab_size": VOCABULARY, "hidden_size": 32, "tie_word_embeddings": False,
        },
        tokens=("<IMG_ATOM>", *OVIS),
        named={"image_token": "<image>"},
        image={"image_processor_type": "Ovis2ImageProcessor", "size": SQUARE, **TILES},
        processor={"processor_class": "Ovis2Processor", "image_seq_length": 4},
        template="<image>",
    ),
    "llama4": Recipe(
        config={
            "model_type": "llama4",
            "vision_config": {
                **TOWER, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "text_config": {**TEXT, **HEADS, "intermediate_size_mlp": 64, "num_local_experts": 2,
                            "interleave_moe_layer_step": 2, "attention_chunk_size": 16},
            "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>", "image_token_index": "<|patch|>",
        },
        tokens=("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
                "<|image|>"),
        image={"image_processor_type": "Llama4ImageProcessor", "size": SQUARE, "max_patches": 4,
               "resize_to_max_canvas": False},
        processor={"processor_class": "Llama4Processor", "patch_size": 8, "pixel_shuffle_ratio": 0.5},
        template="<|image|>",
    ),
    "got_ocr2": Recipe(
        config={
            "model_type": "got_ocr2", "vision_config": {**SAM, "image_size": 512, "global_attn_indexes": []},
            "text_config": stack("qwen2"), "image_token_index": "<imgpad>", "image_seq_length": 256,
            "tie_word_embeddings": False,
        },
        tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
        named={"image_token": "<imgpad>"},
        image={"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 512, "width": 512}},
        processor={"processor_class": "GotOcr2Processor"},
        template="<imgpad>",
    ),
    "aria": Recipe(
        config={
            "model_type": "aria",
            "vision_config": {**TOWER, "image_size": 980, "patch_size": 140, "model_type": "idefics3_vision"},
            "text_config": {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "image_token_index": "<|img|>", "projector_patch_to_query_dict": {49: 4}, "vision_feature_layer": -1,
            "initializer_range": 0.2,
        },
        named={"image_token": "<|img|>"},
        unknown="<pad>",
        image={"image_processor_type": "AriaImageProcessor", "max_image_size": 980, "min_image_size": 140},
        processor={"processor_class": "AriaProcessor", "size_conversion": {"490": 2, "980": 4}},
        template="<|img|>",
    ),
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------- Gemma's line

GEMMA3 = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA3N = {
    **GEMMA3,
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}
GEMMA4 = {
    "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image_soft|>", "boa_token": "<|audio>",
    "eoa_token": "<audio|>", "audio_token": "<|audio_soft|>", "video_token": "<|video_soft|>", "etc": "<etc>",
}  # fmt: skip
INPUTS_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}


def block(stride: int) -> Settings:
    """One block of Gemma 3n's tower, as timm reads it out of "er_r1_k3_s{stride}_e1_c8"."""
    return {
        "block_type": "er", "out_chs": 8, "stride": stride, "act_layer": None, "exp_kernel_size": 3,
        "pw_kernel_size": 1, "exp_ratio": 1.0, "force_in_chs": 0, "se_ratio": 0.0, "noskip": False,
    }  # fmt: skip


MOBILENET = {
    "block_args": [[block(2)], [block(2)], [block(2)], [block(1)]], "stem_size": 8, "num_features": 32,
    "msfa_indices": [-2, -1], "msfa_output_resolution": 2,
}  # fmt: skip


def paligemma(text: Settings) -> Recipe:
    """A PaliGemma, whose prompt is a prefix in which every token sees every other."""
    return Recipe(
        config={
            "model_type": "paligemma", "vision_config": SIGLIP, "text_config": text, "projection_dim": 32,
            "hidden_size": 32, "image_token_index": "<image>", "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        },
        named={"image_token": "<image>"},
        image={"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_seq_length": 16},
        processor={"processor_class": "PaliGemmaProcessor"},
    )  # fmt: skip


def gemma4(**text: object) -> Recipe:
    """A Gemma 4 without its part for sound."""
    own = {"vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8, "layer_types": ALTERNATING}
    return Recipe(
        config={
            "model_type": "gemma4",
            "text_config": {**TEXT, **HEADS, **WINDOW, **own, **text},
            "vision_config": {
                **TOWER, "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "audio_config": None, "tie_word_embeddings": True,
            **{f"{part}_token_id": GEMMA4[f"{part}_token"]
               for part in ("boi", "eoi", "image", "boa", "audio", "video")},
        },
        named=GEMMA4,
        image={"image_processor_type": "Gemma4ImageProcessor", "patch_size": 8, "pooling_kernel_size": 2,
               "max_soft_tokens": 70},
        video={"video_processor_type": "Gemma4VideoProcessor", "patch_size": 8, "pooling_kernel_size": 2},
        audio={"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        processor={"processor_class": "Gemma4Processor", "image_seq_length": 70},
        template="<|image_soft|>",
    )  # fmt: skip


GEMMAS = {
    "paligemma": paligemma(stack("gemma", **HEADS)),
    "paligemma2": paligemma(stack("gemma2", **GEMMA)),
    "gemma3": Recipe(
        config={
            "model_type": "gemma3", "vision_config": SIGLIP, "text_config": stack("gemma3_text", **GEMMA),
            "mm_tokens_per_image": 4, "tie_word_embeddings": False,
            **{f"{name}_index": token for name, token in GEMMA3.items()},
        },
        named=GEMMA3,
        image={"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE, "image_seq_length": 4},
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
        template="<start_of_image>",
    ),
    "gemma3n": Recipe(
        config={
            "model_type": "gemma3n",
            "text_config": {
                **TEXT, **HEADS, **WINDOW, **INPUTS_PER_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 8,
                "altup_num_inputs": 2, "layer_types": ALTERNATING, "activation_sparsity_pattern": [0.0] * 4,
            },
            "vision_config": {
                "architecture": "mobilenetv5_300m_enc", "hidden_size": 32, "vocab_size": 8,
                "vocab_offset": VOCABULARY, "do_pooling": False, "num_classes": 2, "model_args": MOBILENET,
            },
            "audio_config": {
                "vocab_size": 8, "vocab_offset": VOCABULARY, "input_feat_size": 32, "hidden_size": 32,
                "conf_num_attention_heads": 4, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [8, 8],
            },
            "vision_soft_tokens_per_image": 256, "tie_word_embeddings": True,
            **{f"{name}_id": token for name, token in GEMMA3N.items()},
        },
        named=GEMMA3N,
        image={"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}},
        audio={"feature_extractor_type": "Gemma3nAudioFeatureExtractor", "feature_size": 32},
        processor={"processor_class": "Gemma3nProcessor", "image_seq_length": 256},
        template="<image_soft_token>",
    ),
    "gemma4": gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=2),
    "gemma4_dense": gemma4(hidden_size_per_layer_input=0, use_bidirectional_attention="vision"),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ all else

QFORMER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "encoder_hidden_size": 32, "initializer_range": 0.2,
}  # fmt: skip
PLACEHOLDER = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}


def queries(model_type: str, name: str, text: Settings, second_tokenizer: str | None = None) -> Recipe:
    """A model with a Q-Former, whose processor wants no word for the picture: four query tokens come first."""
    return Recipe(
        config={
            "model_type": model_type, "vision_config": TOWER, "qformer_config": QFORMER, "text_config": text,
            "num_query_tokens": 4, "image_token_index": "<image>", "initializer_range": 0.2,
        },
        tokens=("<image>",),
        image={"image_processor_type": "BlipImageProcessor", "size": SQUARE},
        processor={"processor_class": f"{name}Processor", "num_query_tokens": 4},
        second_tokenizer=second_tokenizer,
    )  # fmt: skip


def placeholder(model_type: str, name: str, image: Settings, vision: Settings = SIGLIP, **settings: object) -> Recipe:
    """A DeepSeek-VL or a Janus."""
    return Recipe(
        config={
            "model_type": model_type, "vision_config": vision, "text_config": stack("llama"),
            "image_token_id": "<image_placeholder>", "tie_word_embeddings": False, **settings,
        },
        named=PLACEHOLDER,
        image={"image_processor_type": f"{name}ImageProcessor", "size": SQUARE, "min_size": 8, **image},
        processor={"processor_class": f"{name}Processor", "num_image_tokens": 16},
        template="<image_placeholder>",
    )  # fmt: skip


OTHERS = {
    "deepseek_vl": placeholder("deepseek_vl", "DeepseekVL", {}),
    "deepseek_vl_hybrid": placeholder(
        "deepseek_vl_hybrid", "DeepseekVLHybrid",
        {"high_res_size": {"height": 64, "width": 64}, "high_res_min_size": 8},
        high_res_vision_config={**SAM, "model_type": "sam_vision_model", "image_size": 64, "global_attn_indexes": [1],
                                "num_pos_feats": 8},
    ),
    "janus": placeholder(
        "janus", "Janus", {},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
         "projection_dim": 32, "mlp_ratio": 2.0, "num_image_tokens": 16, "initializer_range": 0.2},
        vq_config={"embed_dim": 4, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32,
                   "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
                   "num_hidden_layers": 1},
    ),
    "blip-2": queries("blip-2", "Blip2", {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 32, "init_std": 0.2, **IDS}),
    "instructblip": queries("instructblip", "InstructBlip", stack("llama"), "qformer_tokenizer"),
    "mllama": Recipe(
        config={
            "model_type": "mllama",
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
                "intermediate_size": 64, "vision_output_dim": 64, "image_size": 32, "patch_size": 8,
                "intermediate_layers_indices": [1], "initializer_range": 0.2,
            },
            # two layers of cross attention, and enough of self attention after them
            "text_config": {**TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 3],
                            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "image_token_index": "<|image|>",
        },
        tokens=("<|python_tag|>",),
        named={"image_token": "<|image|>"},
        image={"image_processor_type": "MllamaImageProcessor", "size": SQUARE, "max_image_tiles": 4},
        processor={"processor_class": "MllamaProcessor"},
        template="<|image|>",
        begins=True,
    ),
    "phi4_multimodal": Recipe(
        config={
            "model_type": "phi4_multimodal", **TEXT, "original_max_position_embeddings": 2048,
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 448, "patch_size": 14, "crop_size": 448, "image_token_id": "<|image|>",
                "feature_layer": -1,
            },
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4,
                "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8,
                "audio_token_id": "<|audio|>", "input_size": 16,
            },
        },
        named={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        image={"image_processor_type": "Phi4MultimodalImageProcessor", "dynamic_hd": 1},
        audio={"feature_extractor_type": "Phi4MultimodalFeatureExtractor"},
        processor={"processor_class": "Phi4MultimodalProcessor"},
        template="<|image|>",
    ),
    "florence2": Recipe(
        config={
            "model_type": "florence2",
            "vision_config": {
                "depths": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 32], "num_heads": [1, 1, 2, 4],
                "num_groups": [1, 1, 2, 4], "window_size": 4, "projection_dim": 32, "drop_path_rate": 0.0,
                "initializer_range": 0.2,
            },
            "text_config": {
                "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2,
                "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64, "max_position_embeddings": 512, "init_std": 0.2, **IDS,
            },
            "image_token_id": "<image>",
        },
        named={"image_token": "<image>"},
        image={"image_processor_type": "CLIPImageProcessor", "size": {"height": 64, "width": 64},
               "do_center_crop": False, "image_seq_length": 5},
        processor={"processor_class": "Florence2Processor"},
    ),
}  # fmt: skip

SEEING: dict[str, Recipe] = {**GRIDS, **LLAVAS, **PIECES, **GEMMAS, **OTHERS}
