"""The questions that a sweep answers, and its answers: runs of one prompt, cells that change them, and their scores."""

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
    """The attention head, for the kind "head": its slice of what the output projection reads."""
    severed: str | None = None
    """"mlp" or "attention": those of later layers are frozen, at the same positions, at the base run's values."""
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
    """The sources are gone from the first layer on: all that sees them is among the targets, up to the last layer, so
    that nothing needs their own states any more."""

    @property
    def identity(self) -> str:
        """A text that is the same for equal cells in every process."""
        sources, targets = sorted(self.cut.sources), sorted(self.cut.targets)
        return repr((sources, targets, self.cut.heads, self.first, self.last, self.is_dropped))


Cell = StateCell | EdgeCell


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Two runs of one prompt. Cells change the base run; the source run lends the states that are put in."""

    base: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    source: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    scored: tuple[int, ...]
    """Positions whose logits are scored, ascending: the prompt's last token and the answer's tokens but the last."""
    frozen: tuple[int, ...] = ()
    """Positions that direct cells freeze: those of the pictures."""
    keywords: Mapping[str, Tensor] = field(default_factory=dict)
    """attention_mask (1, 1, token, token) and position_ids (1, token), unless the model's own are meant."""

    @classmethod
    def of_one(cls, embeddings: Tensor, *, scored: Sequence[int], **keywords: Tensor) -> "Runs":
        """The run on embeddings (1, token, hidden) as base and source: edge cells borrow no states."""
        return cls(base=embeddings, source=embeddings, scored=tuple(scored), keywords=keywords)

    @property
    def samples(self) -> int:
        """Number of samples that run side by side."""
        return max(len(self.base), len(self.source))

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.base.shape[1]

    def along(self, vlm: VisionLanguageModel, ids: Sequence[int]) -> "Runs":
        """The runs of a prompt in which these tokens follow it; they are scored at the positions that predict them."""
        base, source = (vlm.extend(each, ids) for each in (self.base, self.source))
        last = self.length - 1
        scored = tuple(range(last, last + len(ids)))
        return Runs(base=base, source=source, scored=scored, frozen=self.frozen, keywords=self.keywords)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellScores:
    """Scores of cells and of both runs, and what they cost."""

    scores: Tensor
    """(cell, metric, sample) float64 on the CPU."""
    base: Tensor
    """(metric, sample): scores of the run that cells change."""
    source: Tensor
    """(metric, sample): scores of the run that lends its states."""
    free: Tensor
    """(cell,) booleans: the score follows from the two runs without any computation."""
    report: EngineReport
    recording: Work = field(default_factory=Work)
    """Counted work of recording the runs, which all cells share; nothing for the plain way."""
    work: Work = field(default_factory=Work)
    """Counted work of the cells beyond that; nothing for the plain way."""


def all_edges(cells: Sequence[Cell]) -> bool:
    """Whether these are edge cells; a sweep answers cells of one kind only."""
    kinds = {type(cell) for cell in cells}
    assert len(kinds) < 2, "a sweep answers state cells or edge cells, not both"
    return EdgeCell in kinds
