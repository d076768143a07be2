"""Settings of a computation: engine, memory, number of checks, and the file in which progress is kept."""

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
    """Settings of the computation of traces, knockouts and pruning. None of them changes a result beyond rounding.

    Example:
        >>> import multrace as mt
        >>> mt.Engine(name="replay", memory=512).checks
        2
    """

    name: str = "auto"
    """"replay" for the fast exact sweep, "plain" for one forward pass per cell, "auto" (default) for the sweep if the
    model allows it and plain passes otherwise."""
    memory: int = 2048
    """Memory in MiB for open cells and for the work of one call, in addition to the model and the recorded runs."""
    tokens_per_call: int = 4096
    """Largest number of tokens that go through a decoder layer together."""
    checks: int = 2
    """Number of random cells that are computed a second time by plain forward passes to check the sweep; 0 for none."""
    checkpoint: str | PathLike[str] | None = None
    """File for finished cells, from which an interrupted trace or knockout continues; None for no file."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        if self.name not in ENGINES:
            raise TraceError(f"no engine {self.name!r}; pass one of {', '.join(ENGINES)}")
        for name, least in (("memory", 1), ("tokens_per_call", 1), ("checks", 0)):
            if getattr(self, name) < least:
                raise TraceError(f"{name}={getattr(self, name)} is too small; pass at least {least}")

    def lane_tokens(self, vlm: VisionLanguageModel, samples: int) -> int:
        """Return the number of positions that open cells may hold: all samples' states take half of the memory."""
        return max(1, self.memory * 2**19 // (samples * vlm.hidden * vlm.dtype.itemsize))

    def call_tokens(self, vlm: VisionLanguageModel) -> int:
        """Return the number of tokens that may pass a layer together, with a quarter of the memory for activations."""
        each = (8 * vlm.hidden + 3 * vlm.mlp) * vlm.dtype.itemsize
        return max(1, min(self.tokens_per_call, self.memory * 2**18 // each))

    def may_share(self, vlm: VisionLanguageModel, count: int) -> bool:
        """Return whether `count` states may be kept for the whole sweep, in at most an eighth of the memory."""
        return count * vlm.hidden * vlm.dtype.itemsize <= self.memory * 2**17

    def read_rows(self, vlm: VisionLanguageModel, scored: int) -> int:
        """Return the number of rows of logits that fit, with their float64 copies, into an eighth of the memory."""
        vocabulary = vlm.output_head.weight.shape[0]
        return max(1, self.memory * 2**17 // (scored * vocabulary * 24))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Torch has an error class for accelerators only; on the CPU the text decides."""
    texts = ("not enough memory", "can't allocate memory")  # Windows, other systems
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Finished:
    """The contents of a checkpoint."""

    identity: str
    """Digest of the cells, batches and runs of a sweep."""
    finished: Tensor
    """(chunk,) uint8: 1 where all cells of the chunk have their scores."""
    scores: Tensor
    """(cell, metric, sample) float64."""


class Checkpoint:
    """The file with the finished cells of one sweep; without a path, nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._identity = ""
        self._scores: Tensor | None = None
        self._finished = torch.zeros(0, dtype=torch.bool)
        self._earlier: Tensor | None = None
        self._written = time.monotonic()

    def open(self, cells: Sequence[Cell], chunks: Sequence[Chunk], runs: Tensor) -> None:
        """Read the finished cells of an earlier sweep with the same cells, batches and runs (compared by their scores).

        Raises `TraceError` if the file belongs to another sweep, and `ArtefactError` if it is damaged.
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
        """Return a context for filling in scores (cell, metric, sample); it saves finished ones even if interrupted."""
        self._scores = scores
        try:
            yield
        finally:
            self._write()

    def restore(self, number: int, chunk: Chunk, scores: Tensor) -> bool:
        """Return whether the chunk was finished earlier, and fill in its scores if so."""
        if not self._finished[number] or self._earlier is None:
            return False
        cells = [lane.cell for lane in chunk.lanes]
        scores[cells] = self._earlier[cells]
        return True

    def finish(self, number: int) -> None:
        """Mark a chunk as finished, and write the file from time to time."""
        self._finished[number] = True
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if self._path is None or self._scores is None:
            return
        finished = _Finished(identity=self._identity, finished=self._finished.to(torch.uint8), scores=self._scores)
        save_fields(self._path, _LAYOUT, finished)
        self._written = time.monotonic()
