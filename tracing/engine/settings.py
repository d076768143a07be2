"""How a trace is computed: which engine, how much memory, how many cells are checked, where progress is kept."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from ...models import VisionLanguageModel
from ..errors import TraceError

ENGINES = ("auto", "replay", "plain")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Settings of the engines; none of them changes what a trace says beyond rounding."""

    name: str = "auto"
    """"replay": the fast exact sweep; "plain": one forward pass per cell; "auto": the first if the model allows it."""
    memory: int = 2048
    """MiB for open cells and for the work of one call, beside the model and the two recorded runs."""
    tokens_per_call: int = 4096
    """Tokens that go through a decoder layer together, at most."""
    checks: int = 2
    """Cells, chosen at random, that are recomputed the plain way to check the sweep; 0 for none."""
    checkpoint: str | PathLike[str] | None = None
    """File that finished cells are kept in, so that an interrupted trace continues from there; read as a `Path`."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        if self.name not in ENGINES:
            raise TraceError(f"no engine {self.name!r}; pass one of {', '.join(ENGINES)}")
        for name, least in (("memory", 1), ("tokens_per_call", 1), ("checks", 0)):
            if getattr(self, name) < least:
                raise TraceError(f"{name}={getattr(self, name)} is too small; pass at least {least}")

    def lane_tokens(self, vlm: VisionLanguageModel, samples: int) -> int:
        """Positions that open cells may hold together: their states, for all samples, take half of the memory."""
        return max(1, self.memory * 2**19 // (samples * vlm.hidden * vlm.dtype.itemsize))

    def call_tokens(self, vlm: VisionLanguageModel) -> int:
        """Tokens that may go through a layer together: what it computes for them takes a quarter of the memory."""
        each = (8 * vlm.hidden + 3 * vlm.mlp) * vlm.dtype.itemsize
        return max(1, min(self.tokens_per_call, self.memory * 2**18 // each))

    def may_share(self, vlm: VisionLanguageModel, count: int) -> bool:
        """Whether so many states may be kept for the whole sweep: they take an eighth of the memory at most."""
        return count * vlm.hidden * vlm.dtype.itemsize <= self.memory * 2**17

    def read_rows(self, vlm: VisionLanguageModel, scored: int) -> int:
        """Rows whose logits may be held at a time: with their float64 copies they take an eighth of the memory."""
        vocabulary = vlm.output_head.weight.shape[0]
        return max(1, self.memory * 2**17 // (scored * vocabulary * 24))


def is_out_of_memory(error: Exception) -> bool:
    """Torch has a class of its own for accelerators only; on the CPU it is a RuntimeError with a telling text."""
    texts = ("not enough memory", "can't allocate memory")  # of Windows, and of other systems
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)
