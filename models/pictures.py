"""From pictures to image tokens inside a model: the features that its image positions hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .errors import ModelError
from .hooks import main_tensor
from .layout import pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def named_features(model: PreTrainedModel, ready: Mapping[str, Tensor]) -> Tensor | None:
    """Return the image features by the model's own method, (image token, hidden); None if it has none or gives none.

    The outer class often lacks the method, or names fewer of the inputs than the class inside, so the one that names
    most of them is asked.
    """
    owners = [owner for owner in (model, model.base_model) if hasattr(owner, "get_image_features")]
    if not owners:
        return None
    readers = [cast(Callable[..., Any], owner.get_image_features) for owner in owners]
    read = max(readers, key=lambda reader: len(ready.keys() & signature(reader).parameters.keys()))
    features = read(**_visual_inputs(read, ready), return_dict=True)
    pooled = features if isinstance(features, Tensor) else getattr(features, "pooler_output", None)
    if pooled is None:
        return None
    tiles = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([tile.flatten(0, -2) for tile in tiles])


def projected_features(projector: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what the projector writes while the model runs, (image token, hidden): its features without a method."""
    written: list[Tensor] = []
    handle = projector.register_forward_hook(lambda *call: written.append(main_tensor(call[-1], "projector")))
    try:
        run()
    finally:
        handle.remove()
    if not written:
        raise ModelError("the projector does not run for these pictures; name another one in the family's row")
    return torch.cat([each.flatten(0, -2) for each in written])


def _visual_inputs(read: Callable[..., Any], ready: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs that the method names; a parameter without a value gets the pixels, whatever their name is."""
    parameters = signature(read).parameters
    visual = {name: value for name, value in ready.items() if name in parameters}
    pixels = pixels_of(ready)
    plain = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    for name, parameter in parameters.items():
        is_needed = parameter.kind in plain and parameter.default is Parameter.empty
        if is_needed and name not in visual and pixels is not None:
            visual[name] = pixels
    return visual
