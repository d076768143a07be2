"""How a trace is computed: by which engine, in how much memory, with how many checks, and where progress is kept."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ...artefacts.fields import load_fields, save_fields
from ...models import VisionLanguageModel
from ..errors import TraceError
from .cells import Cell
from .plan import Chunk

ENGINES = ("auto", "replay", "plain")

_LAYOUT = "multrace sweep 2"
_SECONDS_BETWEEN_WRITES = 5.0


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Finished:
    """What the file holds."""

    identity: str
    """Of the sweep: its cells, batches and runs."""
    finished: Tensor
    """(chunk,) uint8: 1 where all of its cells have their scores."""
    scores: Tensor
    """(cell, metric, sample) float64."""


class Checkpoint:
    """The file of one sweep; without a path, nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._identity = ""
        self._scores: Tensor | None = None
        self._finished = torch.zeros(0, dtype=torch.bool)
        self._earlier: Tensor | None = None
        self._written = time.monotonic()

    def open(self, cells: Sequence[Cell], chunks: Sequence[Chunk], runs: Tensor) -> None:
        """Reads what an earlier sweep of the same cells, batches and runs (their scores) has finished.

        TraceError if the file belongs to another sweep or is damaged.
        """
        lanes = [(chunk.computed, chunk.merged, [lane.cell for lane in chunk.lanes]) for chunk in chunks]
        text = repr(([cell.identity for cell in cells], lanes)).encode() + runs.double().contiguous().numpy().tobytes()
        self._identity = hashlib.sha256(text).hexdigest()
        self._finished = torch.zeros(len(chunks), dtype=torch.bool)
        if self._path is None or not self._path.exists():
            return
        found = load_fields(self._path, _LAYOUT, _Finished)
        if found.identity != self._identity:
            raise TraceError(
                f"{str(self._path)!r} holds cells of another trace (another prompt, model, corruption, kind of cell or "
                "memory setting); trace with the same settings to go on, or name another file"
            )
        self._finished, self._earlier = found.finished.bool(), found.scores

    @contextmanager
    def writing(self, scores: Tensor) -> Iterator[None]:
        """A block during which scores (cell, metric, sample) fill up; what is finished is written, come what may."""
        self._scores = scores
        try:
            yield
        finally:
            self._write()

    def restore(self, number: int, chunk: Chunk, scores: Tensor) -> bool:
        """Whether the chunk was finished earlier; its scores are then filled in."""
        if not self._finished[number] or self._earlier is None:
            return False
        cells = [lane.cell for lane in chunk.lanes]
        scores[cells] = self._earlier[cells]
        return True

    def finish(self, number: int) -> None:
        """Notes a chunk as finished, and writes the file from time to time."""
        self._finished[number] = True
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if self._path is None or self._scores is None:
            return
        finished = _Finished(identity=self._identity, finished=self._finished.to(torch.uint8), scores=self._scores)
        save_fields(self._path, _LAYOUT, finished)
        self._written = time.monotonic()
