"""The processor of a model: opening it, also without its video part, completing it, and checking that it fits."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.utils import PushToHubMixin, cached_file, is_torchvision_available

from ..errors import ModelError, gist, quoted
from ..pictures import shows_places
from ..prompts import Prompt
from ..vlm import VisionLanguageModel

_COARSE = 0.05
"""Share by which other tokens of a batch can move logits of a quantised model, which may round its activations."""
_MOST_TILES = 16
"""Upper bound on the tiles side by side into which a processor cuts a picture."""
_MOST_EXTRA_TOKENS = 64
"""Upper bound on the tokens per picture that are not patches (class token, registers) in any vision tower."""
_VIDEO = "video_processor"
_OF_VIDEOS_ONLY = "num2words"
"""A package with which processors write about videos, and which they ask for even if there are none."""


class NoVideo(PushToHubMixin):
    """Stands in a processor for the part that reads videos, which needs torchvision, and keeps its settings.

    A processor that is saved with it has the same files as one that can read videos.
    """

    _auto_class = None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        """Return a setting by its name, None if it is unknown; processors read some of them without any video."""
        if name.startswith("__") or name == "settings":  # while it is copied or unpickled
            raise AttributeError(name)
        return self.settings.get(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the part that is missing."""
        return dict(self.settings)


def open_processor(where: str, **options: Any) -> Any:
    """Return the processor of a folder or hub id, without its video part if torchvision is missing.

    Without torchvision, a processor that also reads videos is put together from its tokenizer and its PIL image
    processor. Raises `ModelError` if it reads pictures through torchvision only.
    """
    try:
        return AutoProcessor.from_pretrained(where, **options)
    except (ImportError, ValueError) as error:
        if not _lacks_torchvision(error):
            raise
    try:
        return _without_video(where, **options)
    except (ImportError, ValueError) as error:
        if not _lacks_torchvision(error):
            raise
        raise ImportError("it reads pictures through torchvision only", name="torchvision") from error


def _lacks_torchvision(error: Exception) -> bool:
    """Return whether the error, an ImportError or transformers' own ValueError, is about torchvision's absence."""
    return not is_torchvision_available() and (isinstance(error, ImportError) or "torchvision" in str(error))


def _without_video(where: str, **options: Any) -> Any:
    kind = _processor_class(where, **options)
    settings, further = kind.get_processor_dict(where, **options)
    parts = kind.get_attributes()
    own = [part for part in parts if part != _VIDEO]
    limited: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: own)})
    opened = dict(zip(own, limited._get_arguments_from_pretrained(where, settings, **options), strict=True))
    if len(own) < len(parts):
        opened[_VIDEO] = NoVideo(_video_settings(where, settings, **options))
    unchecked: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    with _no_words_about_videos(sys.modules[kind.__module__]):
        processor = unchecked.from_args_and_dict([opened[part] for part in parts], settings, **further)
    processor.__class__ = kind  # so that it can be pickled, and is saved as what it is
    return processor


def _processor_class(where: str, **options: Any) -> Any:
    """Return the class that the files name. Raise `ImportError` if it does not work without torchvision."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    named = (_settings(where, file, **options).get("processor_class") for file in files)
    model_type = _settings(where, "config.json", **options).get("model_type")
    mapping = cast(dict[str, str], PROCESSOR_MAPPING_NAMES)
    name = next(filter(None, named), None) or mapping.get(str(model_type), "")
    kind = _pixtral_processor() if name == "PixtralProcessor" else processor_class_from_name(name)
    if not isinstance(kind, type) or getattr(kind, "is_dummy", False):
        raise ImportError(f"no class {name!r} that works without torchvision", name="torchvision")
    return kind


def _pixtral_processor() -> type:
    """Return Pixtral's class, whose file imports a function from the torchvision file that the PIL file also has."""
    path = "transformers.models.pixtral.image_processing_pixtral"
    is_missing = path not in sys.modules
    if is_missing:
        sys.modules[path] = image_processing_pil_pixtral
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        if is_missing:
            del sys.modules[path]
    return PixtralProcessor


@contextmanager
def _no_words_about_videos(module: Any) -> Iterator[None]:
    """Let a processor be made inside the block without the package that it needs for texts about videos."""
    is_missing = getattr(module, _OF_VIDEOS_ONLY, module) is None
    if is_missing:
        setattr(module, _OF_VIDEOS_ONLY, str)
    try:
        yield
    finally:
        if is_missing:
            setattr(module, _OF_VIDEOS_ONLY, None)


def _video_settings(where: str, settings: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Return the settings of the video part, from the file that transformers would read them from."""
    if isinstance(settings.get(_VIDEO), dict):
        return settings[_VIDEO]
    own = _settings(where, "video_preprocessor_config.json", **options)
    shared = own or _settings(where, "preprocessor_config.json", **options)
    return {name: value for name, value in shared.items() if name not in ("image_processor_type", "processor_class")}


def _settings(where: str, file: str, *, revision: str | None, local_files_only: bool, **_: Any) -> dict[str, Any]:
    """Return the content of a JSON file of the folder or hub id; empty if there is none."""
    options = {"revision": revision, "local_files_only": local_files_only}
    path = cached_file(where, file, _raise_exceptions_for_missing_entries=False, **options)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as opened:
        content = json.load(opened)
    return content if isinstance(content, dict) else {}


def find_image_token(processor: Any, config: PretrainedConfig, name: str) -> int:
    """Return the token id of one image position. Raises `ModelError` if processor and configuration disagree."""
    written = getattr(processor, "image_token_id", None)
    image_token = getattr(config, "image_token_id", written)
    is_known = isinstance(image_token, int) and 0 <= image_token < len(processor.tokenizer)
    if not is_known or written not in (None, image_token) and not _writes(processor, image_token):
        if image_token is None and written is None:
            raise ModelError(
                f"no token stands for a picture in the prompts of {name!r}: neither its config.json nor its processor "
                "has an image_token_id, so its pictures are at no position that multrace could trace"
            )
        token = quoted(getattr(processor, "image_token", None))
        raise ModelError(
            f"the config.json of {name!r} says that token {image_token} stands for a picture, and its processor writes "
            f"{token}, token {written}; mend image_token_id there, or fetch both again"
        )
    return image_token


def _writes(processor: Any, token: int) -> bool:
    """Return whether the processor writes this token for a picture, whose own word in the text is another one."""
    word = str(getattr(processor.image_token, "content", processor.image_token))
    try:
        written = processor(images=[_gradient(inverted=False)], text=f"{word} ?", return_tensors="pt")
    except Exception:  # the caller says what does not fit
        return False
    return bool((written["input_ids"] == token).any())


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
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    if not vlm.has_vision or not all(hasattr(processor, name) for name in names):
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
    if not isinstance(own, int) or images is None or hasattr(images, "merge_size"):
        return  # with a merge size, sizes are numbers of pixels, not sides
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


def with_answer_fills(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Return the model, whose prompts continue token_type_ids so that an answer does not change what precedes it.

    PaliGemma's type 0 is the part of a prompt in which every token sees every other; an answer of that type would be
    seen by its own question. Type 1 is taken if it alone leaves the logits before an answer as they are.
    """
    name, prompt = "token_type_ids", probe_prompt(vlm)
    if name not in prompt.inputs:
        return vlm
    filled = [replace(vlm, frontend=replace(vlm.frontend, answer_fills={name: fill})) for fill in (0, 1)]
    with torch.no_grad():
        bare = vlm.logits(prompt)
        is_kept = [answer_gap(each, probe_prompt(each), bare) <= rounding(each) for each in filled]
    return filled[is_kept == [False, True]]


def with_picture_kind(vlm: VisionLanguageModel) -> tuple[VisionLanguageModel, tuple[str, ...]]:
    """Return the model with what its pictures are to the text stack, and in words what could not be told of them.

    Layers attend to pictures if another picture changes what the text stack is called with, and no embedding. Whether
    image tokens show places is measured from the vision tower on.
    """
    if not vlm.has_vision:
        return vlm, ()
    complete_processor(vlm)
    prompts = [probe_prompt(vlm, inverted=inverted) for inverted in (False, True)]
    entering, other = map(vlm.decoder_input, prompts)
    attends = torch.equal(entering.embeddings, other.embeddings) and entering.frame.differs(other.frame)
    image = list(prompts[0].groups["image"])
    parts = [vlm.vision_tower, *(vlm.vision_layers[-1:] if vlm.family.vision_layers else ())]
    places = False if attends else shows_places(parts, lambda: vlm.embeddings(prompts[0])[0, image])
    kind = {"attended": attends, "places": vlm.family.places if places is None else places}
    family, frontend = replace(vlm.family, **kind), replace(vlm.frontend, **kind)
    measured = replace(vlm, family=family, frontend=frontend, addresses=replace(vlm.addresses, family=family))
    return measured, ("whether image tokens show places",) if places is None else ()


def answer_gap(vlm: VisionLanguageModel, prompt: Prompt, bare: Tensor) -> float:
    """Return how far an answer moves the logits before it, relative to those of the prompt alone, `bare`."""
    answered = vlm.logits(prompt.with_answer("last one"))[:, : prompt.length]
    return float((answered - bare).norm() / bare.norm())


def rounding(vlm: VisionLanguageModel) -> float:
    """Return a bound on the relative gap of logits that are equal but for rounding; norms are often in float32.

    A quantised model may round its activations, and each token among the others of its batch.
    """
    if vlm.is_quantised:
        return _COARSE
    kinds = {torch.float32, *(weight.dtype for weight in vlm.decoder.parameters() if weight.is_floating_point())}
    return max(torch.finfo(kind).eps for kind in kinds) ** 0.5  # BLIP-2 keeps other parts in float32


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
