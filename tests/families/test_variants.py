"""Configurations beside those of the recipes, each of which once went wrong."""

from dataclasses import replace
from pathlib import Path

import multrace as mt
import pytest
import torch
from multrace.models import Site, patch
from PIL import Image

from .folders import Recipe, write
from .seeing import INTERN, SEEING, SQUARE, TILES, TOWER, stack
from .texts import TEXTS

pytestmark = pytest.mark.families


def test_image_features_may_be_means_of_what_the_projector_writes(tmp_path: Path) -> None:
    recipe = SEEING["llava_onevision"]
    aspect = {"vision_aspect_ratio": "anyres_max_1"}  # four tiles are shrunk to about the tokens of one
    shrunk = replace(recipe, config=recipe.config | aspect, processor=recipe.processor | aspect)
    vlm = mt.load(write(shrunk, tmp_path / "model"))
    assert 16 < vlm.prompt(Image.new("RGB", (64, 64)), "Who?").groups["image"][-1] < 16 + 64


def test_a_picture_of_one_pixel_in_tiles_has_no_places(tmp_path: Path) -> None:
    vlm = mt.load(write(SEEING["llava_next"], tmp_path / "model"))
    prompt = vlm.prompt(Image.new("RGB", (1, 1)), "Who?")
    assert prompt.groups["image"]
    assert prompt.patches == ()


def test_a_processor_may_read_another_word_for_a_picture_than_it_names(tmp_path: Path) -> None:
    recipe = Recipe(
        config={
            "model_type": "qianfan_ocr", "text_config": stack("qwen3", head_dim=8), "image_seq_length": 4,
            "vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, "image_token_id": "<IMG_CONTEXT>",
        },
        tokens=("<image>",),
        named=INTERN,
        image={"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, **TILES},
        processor={"processor_class": "QianfanOCRProcessor", "image_seq_length": 4},
        template="<image>",
    )  # fmt: skip
    vlm = mt.load(write(recipe, tmp_path / "model"))
    prompt = vlm.prompt(Image.new("RGB", (32, 32)), "Who founded the company?", constraint="the company")
    assert len(prompt.groups["image"]) == 4
    with pytest.raises(mt.ModelError, match="image token '<image>'"):
        vlm.prompt(None, "Who is <image>?")


def test_a_model_without_a_token_for_pictures_is_refused_in_words(tmp_path: Path) -> None:
    recipe = Recipe(
        config={"model_type": "blip", "vision_config": TOWER, "text_config": {
            **stack("blip_text_model"), "encoder_hidden_size": 32, "max_position_embeddings": 64}},
        image={"image_processor_type": "BlipImageProcessor", "size": SQUARE},
        processor={"processor_class": "BlipProcessor"},
    )  # fmt: skip
    with pytest.raises(mt.ModelError, match="no token stands for a picture"):
        mt.load(write(recipe, tmp_path / "model"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_open_in_half_precision_whose_rounding_hides_small_effects(name: str, tmp_path: Path) -> None:
    assert mt.load(write(TEXTS[name], tmp_path / "model"), dtype="bfloat16").dtype == torch.bfloat16


def test_layers_that_share_the_keys_of_others_pass_nothing_on_to_later_tokens(tmp_path: Path) -> None:
    recipe = SEEING["gemma4"]
    text = {**recipe.config["text_config"], "num_kv_shared_layers": 2}
    vlm = mt.load(write(replace(recipe, config={**recipe.config, "text_config": text}), tmp_path / "model"))
    prompt = vlm.prompt(Image.new("RGB", (64, 64)), "Who founded the company?", constraint="the company")
    position, clean = prompt.groups["constraint"][0], vlm.logits(prompt)

    def erase(states: torch.Tensor) -> torch.Tensor:
        erased = states.clone()
        erased[:, position] = 0
        return erased

    reached = []
    for layer in range(vlm.layers - 1):
        with patch(vlm, {Site("hidden", layer): erase}):
            reached.append(not torch.equal(vlm.logits(prompt)[:, -1], clean[:, -1]))
    assert reached == [True, False, False]
