"""What edits cost: seconds per edit, and the peak memory of the process or of the graphics card."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

ENDS = 100
"""Number of edits at the beginning and at the end of a stream whose times are compared."""
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class EditCost:
    """Time per edit and peak memory, as one run measured them. They depend on the machine and on what else it does."""

    edits: int
    """Number of edits whose time was taken, those that failed included."""
    seconds: float | None
    """Mean seconds per edit: its values, its solve and its place in the weights, without the questions about it."""
    first_seconds: float | None
    """The mean over the first hundred edits, or over all if there are fewer."""
    last_seconds: float | None
    """The mean over the last hundred edits; above that of the first ones if edits become slower."""
    peak_mib: float | None
    """Peak memory in MiB: on a CUDA device, of tensors; else, how far the peak of the process rose, 0 if the process
    had needed more before. None if the system does not say it."""
    device: str
    """Where the model is, such as "cpu" or "cuda:0"."""

    @classmethod
    def of(cls, seconds: Sequence[float], *, peak_mib: float | None, device: str) -> Self:
        """Return the cost of edits that took so many seconds each, in their order."""
        parts = {"seconds": seconds, "first_seconds": seconds[:ENDS], "last_seconds": seconds[-ENDS:]}
        means = {name: sum(part) / len(part) if part else None for name, part in parts.items()}
        return cls(edits=len(seconds), **means, peak_mib=peak_mib, device=device)

    def __str__(self) -> str:
        words = []
        if self.seconds is not None:
            words.append(f"{self.seconds:.3g} s per edit")
        if self.edits > ENDS:
            words[-1] += f" (first {ENDS}: {self.first_seconds:.3g}, last {ENDS}: {self.last_seconds:.3g})"
        if self.peak_mib is not None:
            words.append(f"peak memory {'' if self.device.startswith('cuda') else '+'}{self.peak_mib:.0f} MiB")
        return ", ".join([*words, f"on {self.device}"])


class CostMeter:
    """Takes the time of edits, and the peak of memory from its start on.

    On a CUDA device torch's peak statistics are reset at the start.

    Example:
        >>> import torch
        >>> from multrace.editing.evaluation import CostMeter
        >>> meter = CostMeter(torch.device("cpu"))
        >>> with meter.edits(2):
        ...     _ = sum(range(10))
        >>> meter.cost().edits
        2
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        """Seconds of each edit so far; edits that are made together share their time equally."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = process_peak()

    @contextmanager
    def edits(self, number: int) -> Iterator[None]:
        """Take the time of a block that makes so many edits, however it ends."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += [(time.perf_counter() - start) / number] * number

    def peak_mib(self) -> float | None:
        """Return the peak memory in MiB since the start, as `EditCost.peak_mib` has it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB
        now = process_peak()
        return None if now is None or self._before is None else now - self._before

    def cost(self) -> EditCost:
        """Return the cost of all edits so far."""
        return EditCost.of(self.seconds, peak_mib=self.peak_mib(), device=str(self.device))


def process_peak() -> float | None:
    """Return the peak of the resident memory of this process in MiB; None if the system does not say it."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
