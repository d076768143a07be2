"""The input and output of a sweep: the runs of one prompt, the cells that change them, and the resulting scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...models import VisionLanguageModel
from ...models.replay.cuts import Cut
from ...models.replay.replay import Work
from .report import EngineReport

KINDS = ("hidden", "mlp", "attention")
"""Kinds of sites of a decoder layer."""

Measure = Callable[[Tensor], Tensor]
"""A function from logits (row, scored position, vocab) to float64 scores (row, metric)."""


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
    keywords: Mapping[str, Tensor] = field(default_factory=dict)
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


def all_edges(cells: Sequence[Cell]) -> bool:
    """Return whether these are edge cells; a sweep computes cells of one kind only."""
    kinds = {type(cell) for cell in cells}
    assert len(kinds) < 2, "a sweep answers state cells or edge cells, not both"
    return EdgeCell in kinds
