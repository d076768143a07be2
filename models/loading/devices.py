"""Where a model's weights are asked to be: devices that this machine has, and memory that holds values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names by which transformers chooses the devices itself."""


def check_device_map(device_map: Any, name: str) -> None:
    """ModelError if the map names a device that is none, or that this torch or this machine does not have.

    device_map: None, one of transformers' strategies, a device, or a mapping of module paths to devices.
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


def check_in_memory(model: nn.Module, device_map: Any, name: str) -> None:
    """ModelError if a weight has no values: accelerate put it on disk or behind a hook, for want of room."""
    absent = [path for path, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise ModelError(
            f"device_map={device_map!r} leaves {len(absent)} weights of {name!r} without values in memory, first "
            f"{absent[0]!r}; pass a device with room for all of them, a smaller dtype, or device_map=None for the CPU"
        )


def _why_not(device: Any) -> str | None:
    """Why no tensor can be made on the device; None if one can."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return f"a device cannot be of type {type(device).__name__}"
    if str(device) in ("meta", "disk"):
        return "weights there cannot be read or changed"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        return "torch knows no such device" if isinstance(device, str) else _first_sentence(error)
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend says in its own way that it is absent
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    """Torch goes on with advice about its own build."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
