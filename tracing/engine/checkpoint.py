"""Finished cells of a sweep, kept in a file, so that an interrupted one goes on where it stopped."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...artefacts.fields import load_fields, save_fields
from ..errors import TraceError
from .cells import Cell
from .plan import Chunk

_LAYOUT = "multrace sweep 1"
_SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kept:
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
        text = repr((list(cells), list(chunks))).encode() + runs.double().contiguous().numpy().tobytes()
        self._identity = hashlib.sha256(text).hexdigest()
        self._finished = torch.zeros(len(chunks), dtype=torch.bool)
        if self._path is None or not self._path.exists():
            return
        kept = load_fields(self._path, _LAYOUT, _Kept)
        if kept.identity != self._identity:
            raise TraceError(
                f"{str(self._path)!r} holds cells of another trace (another prompt, model, corruption, kind of cell or "
                "memory setting); trace with the same settings to go on, or name another file"
            )
        self._finished, self._earlier = kept.finished.bool(), kept.scores

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
        kept = _Kept(identity=self._identity, finished=self._finished.to(torch.uint8), scores=self._scores)
        save_fields(self._path, _LAYOUT, kept)
        self._written = time.monotonic()
