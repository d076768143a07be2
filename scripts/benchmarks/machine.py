"""What a measurement was taken on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

_CPU = Path("/proc/cpuinfo")


def machine_facts(name: str) -> dict[str, Any]:
    """The device that torch calls so, and the versions and threads that compute."""
    device = torch.device(name)
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and _CPU.is_file():
        for line in _CPU.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() if device.type == "cpu" else str(device)
