"""Configurations beside those of the recipes, each of which once went wrong."""

from dataclasses import replace
from pathlib import Path

import multrace as mt
import pytest
from PIL import Image

from .folders import write
from .seeing import SEEING

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
