"""The input and output of a sweep: settings, the runs of one prompt, cells that change them, scores and a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard, cast

from torch import Tensor

from ...models import VisionLanguageModel
from ...models.replay.cuts import Cut
from ...models.replay.replay import Work
from ..errors import TraceError

ENGINES = ("auto", "replay", "plain")
KINDS = ("hidden", "mlp", "attention")
"""Kinds of sites of a decoder layer."""
Measure = Callable[[Tensor], Tensor]
"""A function from logits (row, scored position, vocab) to float64 scores (row, metric)."""


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


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """The cost of one result and the outcome of its self-check."""

    engine: str
    """"replay", which computes only what can have changed, or "plain", one hooked forward pass per cell."""
    reason: str | None = None
    """The reason why the plain engine ran; None if the fast one did."""
    cells: int = 0
    """Number of scored cells."""
    free_cells: int = 0
    """Number of cells whose score follows from the base runs without computation."""
    token_layers: int | None = None
    """Number of positions times decoder layers that were computed; None if nothing was counted."""
    halvings: int = 0
    """Number of times that a batch was halved because memory ran out."""
    checked_cells: int = 0
    """Number of cells that were computed a second time by plain forward passes."""
    largest_difference: float | None = None
    """Largest difference between the two over the checked cells, in units of the score; None without a check."""
    plain_noise: float | None = None
    """Difference of plain forward passes between two batch sizes, on the same cells; None without a check."""

    def summary(self) -> str:
        """Return the report as one line of text."""
        parts = [f"{self.engine} engine" + (f" ({self.reason})" if self.reason else "")]
        parts.append(f"{self.cells} cells" + (f", {self.free_cells} of them free" if self.free_cells else ""))
        if self.token_layers is not None:
            parts.append(f"{self.token_layers} token-layers")
        if self.halvings:
            parts.append(f"batch halved {self.halvings} times")
        if self.largest_difference is not None:
            noise = "" if self.plain_noise is None else f" (plain passes among themselves: {self.plain_noise:.1e})"
            parts.append(
                f"{self.checked_cells} cells recomputed by plain forward passes, largest difference "
                f"{self.largest_difference:.1e}{noise}"
            )
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class StateCell:
    """One restoration: outputs of one kind of site, in the layers first to last (both included), at some positions."""

    kind: str
    """"hidden", "mlp", "attention" or "head" of the decoder; "vision" or "projector" before it."""
    first: int
    last: int
    positions: tuple[int, ...]
    head: int | None = None
    """The attention head, for the kind "head": the cell restores its slice of the output projection's input."""
    severed: str | None = None
    """"mlp" or "attention": modules of this kind in later layers are frozen at the base run's values, at the same
    positions."""
    is_direct: bool = False
    """The other frozen positions keep the base run's states in every layer."""

    @property
    def identity(self) -> str:
        """A text that is the same for equal cells in every process."""
        return repr(self)


@dataclass(frozen=True, kw_only=True)
class EdgeCell:
    """Attention edges that are missing in the layers first to last, both included."""

    cut: Cut
    first: int
    last: int
    is_dropped: bool = False
    """The sources are removed from the first layer on: every position that sees them is a target, up to the last layer,
    so their own states are no longer needed."""

    @property
    def identity(self) -> str:
        """A text that is the same for equal cells in every process."""
        sources, targets = sorted(self.cut.sources), sorted(self.cut.targets)
        return repr((sources, targets, self.cut.heads, self.first, self.last, self.is_dropped))


Cell = StateCell | EdgeCell


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Two runs of one prompt. Cells change the base run; the patched-in states come from the source run."""

    base: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    source: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    scored: tuple[int, ...]
    """Positions whose logits are scored, ascending: the prompt's last token and all answer tokens but the last."""
    frozen: tuple[int, ...] = ()
    """Positions that direct cells freeze: the image tokens."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """attention_mask (1, 1, token, token) and position_ids (1, token); without them the model makes its own."""

    @classmethod
    def of_one(cls, embeddings: Tensor, *, scored: Sequence[int], **keywords: Tensor) -> "Runs":
        """Return runs of edge cells, with the same embeddings (1, token, hidden) as base and source."""
        return cls(base=embeddings, source=embeddings, scored=tuple(scored), keywords=keywords)

    @property
    def samples(self) -> int:
        """The number of samples that run side by side."""
        return max(len(self.base), len(self.source))

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.base.shape[1]

    def along(self, vlm: VisionLanguageModel, ids: Sequence[int]) -> "Runs":
        """Return the runs with these tokens appended to the prompt, scored at the positions that predict them."""
        base, source = (vlm.extend(each, ids) for each in (self.base, self.source))
        last = self.length - 1
        scored = tuple(range(last, last + len(ids)))
        return Runs(base=base, source=source, scored=scored, frozen=self.frozen, keywords=self.keywords)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellScores:
    """Scores of cells and of both runs, with the cost of computing them."""

    scores: Tensor
    """(cell, metric, sample) float64 on the CPU."""
    base: Tensor
    """(metric, sample): scores of the run that cells change."""
    source: Tensor
    """(metric, sample): scores of the run from which states are patched in."""
    free: Tensor
    """(cell,) booleans: the score follows from the two runs without any computation."""
    report: EngineReport
    recording: Work = field(default_factory=Work)
    """Counted work of recording the runs, which all cells share; zero for the plain engine."""
    work: Work = field(default_factory=Work)
    """Counted work of the cells beyond that; zero for the plain engine."""


def all_edges(cells: Sequence[Cell]) -> TypeGuard[Sequence[EdgeCell]]:
    """Return whether these are edge cells; a sweep computes cells of one kind only."""
    kinds = {type(cell) for cell in cells}
    assert len(kinds) < 2, "a sweep answers state cells or edge cells, not both"
    return EdgeCell in kinds


def state_cells(cells: Sequence[Cell]) -> Sequence[StateCell]:
    """Return the cells of a sweep whose cells are not edge cells (`all_edges`), under their narrower type."""
    return cast("Sequence[StateCell]", cells)
