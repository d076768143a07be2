"""Work in a process of its own, and how much memory a process has held at most."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import CommandError

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_Result = TypeVar("_Result")
_MIB = 2**20
_STATUS = Path("/proc/self/status")


def in_new_process(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """work(*arguments), computed in a new process. CommandError if that process is killed.

    The work must be a module's function; its arguments and result must survive being sent between processes.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise CommandError(
                "the process that measures was killed, likely for want of memory; choose a smaller shape or fewer "
                "samples"
            ) from error


def peak_mb(device: torch.device) -> float:
    """MiB that this process has held at most: on a CUDA device what tensors took since `forget_peak`; else resident
    memory since the process started, Python, torch and the model included.

    Linux's own count for the running program comes first: getrusage also counts what the parent held when it started
    this process, until the new program took over.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if _STATUS.is_file():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) / 1024
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def forget_peak(device: torch.device) -> None:
    """Lets the peak of a CUDA device start anew; that of a process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
