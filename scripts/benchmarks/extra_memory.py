"""Memory that a piece of work takes beyond what is held before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .peaks import peak_mb

_MIB = 2**20
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def extra_mb(work: Callable[[], object], device: torch.device) -> float:
    """MiB by which the peak during work() is above what was held when it began; its result counts as long as it lives.

    On a CUDA device it is the tensors' memory. Else it is resident memory, libraries' workspaces included, which Linux
    starts to count anew at each call. Where the system cannot do that, the highest peak of the process so far is taken,
    so that the figure may be too large; where it does not tell what is held, it is nan. Memory that was freed but not
    given back is used again unseen: do it in a fresh process, whose first large allocation this is.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) / _MIB
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")  # sets the peak to what is resident now
        held = _resident_mb()
    work()
    return peak_mb(device) - held


def _resident_mb() -> float:
    """MiB of this process that are in memory; nan where the system does not say."""
    if not _STATUS.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024 if "VmRSS" in lines else float("nan")
