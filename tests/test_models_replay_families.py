"""Families that are in no row of ours: the fast sweep equals one forward pass per cell, in true float64, on each."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from exact_models import (
    CHANGED,
    FROZEN,
    LENGTH,
    SIZES,
    assemble,
    largest_difference,
    lift_casts,
    make_runs,
    mixed_cells,
)
from multrace import VisionLanguageModel, load
from multrace.models.families import FAMILIES, Family
from multrace.models.replay import replaying
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

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
}  # fmt: skip


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    build, names = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    lift_casts(model, monkeypatch)
    return assemble(model, Family(name=name, model_types=(), text_types=(), **names))


def check(vlm: VisionLanguageModel, share: float = 0.4, cells: int = 45, **keywords: Tensor) -> None:
    """Sweep and plain way agree on a mixture of cells, in both directions; so much of them moves a score."""
    every = mixed_cells(vlm)
    for restores in (True, False):
        some = random.Random(int(restores)).sample(every, min(cells, len(every)))
        difference, moved = largest_difference(vlm, make_runs(vlm, restores=restores, **keywords), some)
        assert difference <= 1e-12
        assert moved > share


@pytest.mark.parametrize("name", MODELS)
def test_a_family_without_a_row_is_swept_exactly(name, monkeypatch):
    check(make(name, monkeypatch))


ROWS = {"mistral": Family(name="mistral", model_types=("mistral",), text_types=("mistral",)),
        "qwen2": Family(name="qwen2", model_types=("qwen2",), text_types=("qwen2",))}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "build"),
    [("mistral", text("Mistral", sliding_window=5, vocab_size=400)), ("qwen2", text("Qwen2", vocab_size=400))],
    ids=["Mistral", "Qwen2"],
)
def test_a_row_that_the_caller_adds_is_enough(row, build, llama_path: Path, tmp_path: Path, monkeypatch):
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_path).save_pretrained(tmp_path)
    vlm = load(tmp_path, dtype="float64", families=(*FAMILIES, ROWS[row]))
    lift_casts(vlm.model, monkeypatch)
    check(vlm)


@pytest.mark.parametrize(
    ("name", "sliding"),
    [
        ("Mistral, a window shorter than the prompt", {0, 1, 2, 3}),
        ("Qwen2, windows in the later layers", {2, 3}),
        ("Gemma3, sliding and full layers", {0, 1, 3, 4}),
        ("GPT-2", set()),
    ],
)
@torch.no_grad()
def test_windows_are_captured_layer_by_layer(name, sliding, monkeypatch):
    vlm = make(name, monkeypatch)
    with replaying(vlm) as replay:
        replay.record(make_runs(vlm).source, kept=(), read=(LENGTH - 1,))
        masks = replay.masks
    seen = [LENGTH if mask is None else int(mask[-1].sum()) for mask in masks.layers]
    assert {layer for layer, count in enumerate(seen) if count < LENGTH} == sliding
    reached = [len(masks.reach({2}, first)) for first in range(len(seen) + 1)]
    assert reached == sorted(reached, reverse=True)
    assert (reached[len(seen) - 1] < LENGTH - 2) == (len(seen) - 1 in sliding)


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def with_block(positions: tuple[int, ...]) -> Tensor:
    mask = causal()
    mask[torch.tensor(positions)[:, None], torch.tensor(positions)] = True
    return mask[None, None]


def with_gaps() -> Tensor:
    """Some queries see only some earlier keys, themselves among them."""
    drawn = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    return ((drawn | torch.eye(LENGTH, dtype=torch.bool)) & causal())[None, None]


MASKS = {
    "causal": causal()[None, None],
    "a bidirectional block": with_block(FROZEN),
    "a block wider than the change": with_block((0, 1, *CHANGED, 8)),
    "prefix-LM": with_block(tuple(range(10))),
    "with gaps": with_gaps(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["Qwen2, biases", "GPT-2"])
def test_any_mask_that_a_caller_gives_is_kept(name, mask, monkeypatch):
    check(make(name, monkeypatch), attention_mask=MASKS[mask])


@torch.no_grad()
def test_the_masks_make_a_difference(monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    logits = [vlm.forward(inputs_embeds=make_runs(vlm).source, attention_mask=mask) for mask in MASKS.values()]
    assert all((each - logits[0])[:, -1].abs().max() > 1e-3 for each in logits[1:])


def test_positions_that_a_caller_gives_are_kept(monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    places = torch.arange(LENGTH)[None] + torch.arange(LENGTH)[None].ge(5) * 7
    check(vlm, position_ids=places)
    given = make_runs(vlm).source
    assert not torch.allclose(vlm.forward(inputs_embeds=given), vlm.forward(inputs_embeds=given, position_ids=places))


def test_models_with_accelerates_hooks_are_swept_exactly(monkeypatch):
    vlm = make("Qwen2, biases", monkeypatch)
    for layer in vlm.addresses.layers:
        add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))
    check(vlm, cells=256)
