"""From pictures to image tokens inside a model: the features that its image positions hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .errors import ModelError
from .hooks import main_tensor
from .layout import pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEW = 0.5
"""Share of the image tokens that a change at one place of the tower may reach; queries carry it to all of them."""


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


def shows_places(parts: Sequence[nn.Module], read: Callable[[], Tensor]) -> bool | None:
    """Return whether image tokens show parts of their picture; None if that cannot be told.

    What one token of the tower holds is changed. That reaches a few image tokens, or all of them if they are answers of
    learned queries to the whole picture.

    Args:
        parts: The vision tower, and its last layer if that is known.
        read: Runs the model on one picture and returns its image tokens, (image token, hidden).
    """
    with torch.no_grad():
        clean, shares = read(), [0.0]
        for part in parts:
            handle = part.register_forward_hook(lambda *call: _change_one(call[-1]))
            try:
                moved = read()
            finally:
                handle.remove()
            shares.append(float((moved != clean).any(-1).double().mean()))
    return None if max(shares) == 0 else max(shares) <= _FEW


def _change_one(output: Any) -> None:
    """Write something else into one token of all states in an output: the last ones, and those of earlier layers."""
    states = list(_states_in(output))
    for state in states:
        if state.shape[:-1] == states[0].shape[:-1]:
            middle = tuple(size // 2 if axis else 0 for axis, size in enumerate(state.shape[:-1]))
            state[middle if state.ndim > 2 else len(state) // 2] = torch.linspace(-1, 1, state.shape[-1]).to(state)


def _states_in(value: Any) -> Iterator[Tensor]:
    """Yield the states, (..., token, width), in an output."""
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.is_floating_point():
            yield value
        return
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ():
        yield from _states_in(part)


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
