"""Checks of `device_map`: the devices exist here, and every weight has its values in memory."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ModelError

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names by which transformers chooses the devices itself."""


def check_device_map(device_map: Any, name: str) -> None:
    """Raise `ModelError` if the map names something that is not a device, or a device that torch or this machine lacks.

    device_map: None, one of transformers' strategies, a device, or a mapping from module paths to devices.
    """
    if device_map is None or (isinstance(device_map, str) and device_map in _STRATEGIES):
        return
    devices = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    reasons = [f"{device!r} cannot be used here ({reason})" for device in devices if (reason := _why_not(device))]
    if not devices or reasons:
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), "auto"]
        raise ModelError(
            f"cannot open {name!r} with device_map={device_map!r}: {reasons[0] if reasons else 'it names no device'}; "
            f"pass one of {', '.join(map(repr, usable))}, or leave device_map out for the CPU"
        )


def check_in_memory(model: PreTrainedModel, device_map: Any, name: str) -> None:
    """Raise `ModelError` if a weight has no values, because accelerate left it on disk for lack of memory."""
    absent = [path for path, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise ModelError(
            f"device_map={device_map!r} leaves {len(absent)} weights of {name!r} without values in memory, first "
            f"{absent[0]!r}; pass a device with room for all of them, a smaller dtype, or device_map=None for the CPU"
        )


def _why_not(device: Any) -> str | None:
    """Return the reason why no tensor can be made on the device; None if one can."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return f"a device cannot be of type {type(device).__name__}"
    if str(device) in ("meta", "disk"):
        return "weights there cannot be read or changed"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        return "torch knows no such device" if isinstance(device, str) else _first_sentence(error)
    try:
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend raises its own error if it is absent
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    """Return the error's message without torch's advice about its own build."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
