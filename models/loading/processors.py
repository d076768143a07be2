"""Agreement between processor and model: a common image token, and as many image tokens as image features."""

from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from ..errors import ModelError, gist, quoted
from ..prompts import Prompt
from ..vlm import VisionLanguageModel

_MOST_TILES = 16
"""Upper bound on the tiles side by side into which a processor cuts a picture."""
_MOST_EXTRA_TOKENS = 64
"""Upper bound on the tokens per picture that are not patches (class token, registers) in any vision tower."""


def find_image_token(processor: Any, config: PretrainedConfig, name: str) -> int:
    """Return the token id of one image position. Raises `ModelError` if processor and configuration disagree."""
    image_token, written = config.image_token_id, getattr(processor, "image_token_id", None)
    is_known = isinstance(image_token, int) and 0 <= image_token < len(processor.tokenizer)
    if not is_known or written not in (None, image_token):
        token = quoted(getattr(processor, "image_token", None))
        raise ModelError(
            f"the config.json of {name!r} says that token {image_token} stands for a picture, and its processor writes "
            f"{token}, token {written}; mend image_token_id there, or fetch both again"
        )
    return image_token


def complete_processor(vlm: VisionLanguageModel) -> None:
    """Set the vision tower's properties in a LLaVA-style processor if its folder lacks them.

    These processors write one token per patch, and older published checkpoints have one without `patch_size`,
    `vision_feature_select_strategy` or `num_additional_image_tokens` (which then is 0). The configuration has the
    first two, and the number of features tells how many tokens are no patch. Raises `ModelError` if that does not
    complete it.
    """
    processor = vlm.processor
    _check_fields(processor, vlm.name)
    _check_sizes(processor, vlm.config, vlm.name)
    if not vlm.has_vision or not hasattr(processor, "num_additional_image_tokens"):
        return
    if processor.patch_size and processor.vision_feature_select_strategy and processor.num_additional_image_tokens:
        return
    if processor.patch_size is None:
        if not isinstance(vlm.frontend.patch_size, int) or vlm.frontend.patch_size < 1:
            raise ModelError(
                f"the processor_config.json of {vlm.name!r} has no patch_size, nor has vision_config in its config.json"
                "; write the side of a vision patch in pixels into one of them"
            )
        processor.patch_size = vlm.frontend.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = getattr(vlm.config, "vision_feature_select_strategy", None)
    positions, features = count_image_tokens(vlm, probe_prompt(vlm))
    extra = processor.num_additional_image_tokens + features - positions
    if positions != features and extra not in (0, 1):
        raise image_token_error(vlm, positions, features)
    processor.num_additional_image_tokens = extra


def _check_fields(processor: Any, name: str) -> None:
    """Raise `ModelError` if one of LLaVA's processor fields has a value that no model has."""
    valid = {
        "patch_size": lambda value: value is None or isinstance(value, int) and value > 0,
        "num_additional_image_tokens": lambda value: isinstance(value, int) and 0 <= value <= _MOST_EXTRA_TOKENS,
        "vision_feature_select_strategy": lambda value: value in (None, "default", "full"),
    }
    for field, is_valid in valid.items():
        value = getattr(processor, field, None)
        if hasattr(processor, field) and not is_valid(value):
            raise ModelError(
                f"the processor_config.json of {name!r} has {field}={quoted(value)}, which no model has; mend "
                "that field, or fetch the file again"
            )


def _check_sizes(processor: Any, config: PretrainedConfig, name: str) -> None:
    """Raise `ModelError` if the image processor would enlarge pictures far beyond what the vision tower takes."""
    own = getattr(getattr(config, "vision_config", None), "image_size", None)
    images = getattr(processor, "image_processor", None)
    if not isinstance(own, int) or images is None:
        return
    for field in ("size", "crop_size", "image_grid_pinpoints"):
        value = getattr(images, field, None)
        if any(not 0 < side <= _MOST_TILES * own for side in _sides(value)):
            raise ModelError(
                f"the processor_config.json of {name!r} has {field}={quoted(value)}, and the vision_config of its "
                f"config.json has image_size={own}; mend the wrong one, or fetch both again"
            )


def _sides(value: Any) -> list[float]:
    """Return the sides, in pixels, of a size of an image processor (one dictionary or several pairs)."""
    if isinstance(value, list | tuple):
        return [side for item in value for side in _sides(item)]
    if isinstance(value, int | float):
        return [value]
    sides = (getattr(value, name, None) for name in ("height", "width", "shortest_edge", "longest_edge"))
    return [side for side in sides if isinstance(side, int | float)]


def count_image_tokens(vlm: VisionLanguageModel, prompt: Prompt) -> tuple[int, int]:
    """Return how many image positions the processor makes, and how many features the model has for them."""
    with torch.no_grad():
        return len(prompt.groups["image"]), len(vlm.image_features(prompt))


def image_token_error(vlm: VisionLanguageModel, positions: int, features: int) -> ModelError:
    """Return the error for different numbers of image positions and image features."""
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    settings = ", ".join(
        f"{name} {quoted(getattr(vlm.processor, name))}" for name in names if hasattr(vlm.processor, name)
    )
    return ModelError(
        f"the processor of {vlm.name!r} writes {positions} tokens for a picture of which the model makes {features}; "
        f"mend its processor_config.json{f' ({settings})' if settings else ''}, or the vision_config of its config.json"
    )


def probe_prompt(vlm: VisionLanguageModel, *, inverted: bool = False) -> Prompt:
    """Return the question used to verify a model; a model with vision also gets a gradient picture, or its negative."""
    picture = _gradient(inverted=inverted) if vlm.has_vision else None
    try:
        return vlm.prompt(picture, "Which of these words is the one that comes last?", template="raw")
    except ModelError as error:
        raise ModelError(
            f"{vlm.name!r} cannot be asked a short question: {gist(error)}; if that is no fault of its "
            "config.json, mend its processor_config.json or tokenizer files, or fetch all of them again"
        ) from error


def _gradient(*, inverted: bool) -> Image.Image:
    """Return a gradient with corners of different colours, or its negative."""
    size = 64
    pixels = [(4 * column, 4 * row, 255 - 2 * (row + column)) for row in range(size) for column in range(size)]
    image = Image.new("RGB", (size, size))
    image.putdata([tuple(255 - value for value in pixel) if inverted else pixel for pixel in pixels])
    return image
