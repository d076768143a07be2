"""What a sweep is asked: two runs of one prompt, and cells that put some states of one into the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

KINDS = ("hidden", "mlp", "attention")
"""Kinds of sites of a decoder layer."""

Measure = Callable[[Tensor], Tensor]
"""(row, scored position, vocab) logits -> (row, metric) float64 scores."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One restoration: outputs of one kind of site, in layers first to last (both included), at some positions."""

    kind: str
    """"hidden", "mlp", "attention" or "head" of the decoder; "vision" or "projector" before it."""
    first: int
    last: int
    positions: tuple[int, ...]
    head: int | None = None
    """Which attention head, for the kind "head": its slice of what the output projection reads."""
    severed: str | None = None
    """"mlp" or "attention": those of later layers are frozen, at the same positions, at the base run's values."""
    is_direct: bool = False
    """The other frozen positions keep the base run's states in every layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Two runs of one prompt. The base is changed; the source lends the states that are put in."""

    base: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    source: Tensor
    """Embeddings (sample or 1, token, hidden)."""
    scored: tuple[int, ...]
    """Positions whose logits are scored, ascending: the prompt's last token and the answer's tokens but the last."""
    frozen: tuple[int, ...] = ()
    """Positions that direct cells freeze: those of the pictures."""
    keywords: Mapping[str, Tensor] = field(default_factory=dict)
    """attention_mask (1, 1, token, token) and position_ids (1, token), where the model's own are not meant."""

    @property
    def samples(self) -> int:
        """How many samples are run side by side."""
        return max(len(self.base), len(self.source))

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.base.shape[1]
