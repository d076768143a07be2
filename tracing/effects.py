"""What a map of indirect effects says: its best cell, its causal blocks, and where an edit belongs."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .errors import TraceError


class Cell(NamedTuple):
    """One cell of a map: the row's label, the layer (centre of its window) and the indirect effect (probability)."""

    row: str
    layer: int
    effect: float


@dataclass(frozen=True, kw_only=True)
class CausalBlock:
    """Neighbouring layers of one row whose restored outputs all bring the answer back."""

    kind: str
    row: str
    positions: tuple[int, ...]
    """The row's token positions; empty in an average, where they differ from prompt to prompt."""
    first: int
    last: int
    """First and last layer, both included; centres where layers were restored in windows."""
    effect: float
    """The largest indirect effect inside, in probability."""


@dataclass(frozen=True, kw_only=True)
class EditSite:
    """Where an edit belongs: the layer's MLP at the token, with the reason in words."""

    layer: int
    token: str | int
    """A group name wherever the token has one (it then names the same token in every prompt), else a position."""
    effect: float
    """Indirect effect of the MLPs there, in probability."""
    onset: int
    """First layer at which restoring the hidden state of this token gives back the asked share of the total effect."""
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectMap:
    """Indirect effects over (row, layer) for some kinds of sites; the part that single traces and averages share."""

    model: str
    """Name or path of the traced model."""
    revision: str | None
    rows: tuple[str, ...]
    """Label of each row: a token, or the name of a token group."""
    row_tokens: tuple[str | int | None, ...]
    """What an edit calls the row: a group name or a position where the row is one text token, else None."""
    layers: int
    window: int
    """How many neighbouring MLPs or attentions were restored together; hidden states are restored one at a time."""
    corruption: str
    seed: int | None
    """Seed of the noise; None where the corruption is not random."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the order asked."""
        raise NotImplementedError

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted probability of the answer."""
        raise NotImplementedError

    def indirect_effect(self, kind: str) -> Tensor:
        """(row, layer) float64: restored minus corrupted probability. TraceError if this kind was not traced."""
        raise NotImplementedError

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Token positions of the row with this index; empty where they differ from prompt to prompt."""
        raise NotImplementedError

    def best(self, kind: str = "mlp") -> Cell:
        """The cell with the largest indirect effect."""
        effects = self.indirect_effect(kind)
        row, layer = divmod(int(effects.argmax()), self.layers)
        return Cell(self.rows[row], layer, float(effects[row, layer]))

    def causal_blocks(self, kind: str = "mlp", fraction: float = 0.5) -> tuple[CausalBlock, ...]:
        """Runs of neighbouring layers with at least `fraction` of the map's largest effect, strongest first.

        0 < fraction <= 1. Empty where no effect is positive.
        """
        _check_fraction(fraction)
        effects = self.indirect_effect(kind)
        threshold = fraction * float(effects.max())
        if threshold <= 0:
            return ()
        blocks = [
            CausalBlock(
                kind=kind,
                row=self.rows[row],
                positions=self.positions_of(row),
                first=first,
                last=last,
                effect=float(effects[row, first : last + 1].max()),
            )
            for row in range(len(self.rows))
            for first, last in _runs((effects[row] >= threshold).tolist())
        ]
        return tuple(sorted(blocks, key=lambda block: -block.effect))

    def onset(self, row: str | int, fraction: float = 0.25) -> int | None:
        """First layer at which restoring the row's hidden state gives back `fraction` of the total effect, or None.

        row: a label or an index. TraceError if hidden states were not traced or the corruption lowers nothing.
        """
        _check_fraction(fraction)
        effects = self.indirect_effect("hidden")[self._row_index(row)]
        if self.total_effect <= 0:
            raise TraceError(
                f"the corruption ({self.corruption}) does not lower the answer's probability (total effect "
                f"{self.total_effect:.3f}), so nothing can be brought back; trace with a stronger or another corruption"
            )
        reached = (effects >= fraction * self.total_effect).nonzero().flatten().tolist()
        return reached[0] if reached else None

    def edit_site(self, fraction: float = 0.25) -> EditSite:
        """Where this trace says that an edit belongs: the strongest MLP cell at or after the onset of its token.

        Candidates are rows of a single text token. The onset of a token is the first layer at which restoring its
        hidden state gives back `fraction` of the total effect: before it, the token does not yet carry what the
        corruption destroyed, so a key taken there knows the wording and not the picture, and an edit would fire for
        every picture. For facts about pictures use it on a trace under image corruption; a trace of corrupted words
        cannot tell. TraceError if "hidden" and "mlp" were not both traced, if the corruption lowers nothing, or if no
        candidate ever carries the information.
        """
        effects, best = self.indirect_effect("mlp"), None
        for row, token in enumerate(self.row_tokens):
            onset = None if token is None else self.onset(row, fraction)
            if onset is None:
                continue
            layer = onset + int(effects[row, onset:].argmax())
            if best is None or effects[row, layer] > best.effect:
                reason = (
                    f"restoring the hidden state of {self.rows[row]!r} first gives back {fraction:.0%} of the total "
                    f"effect at layer {onset}; from there on its MLPs act most at layer {layer}"
                )
                best = EditSite(layer=layer, token=token, effect=float(effects[row, layer]), onset=onset, reason=reason)
        if best is None:
            raise TraceError(
                f"no single token among the rows {', '.join(map(repr, self.rows))} gives back {fraction:.0%} of the "
                'total effect when its hidden state is restored; trace more rows, such as positions="tokens"'
            )
        return best

    def _row_index(self, row: str | int) -> int:
        """Index of the row; a label must be there, and only once."""
        if isinstance(row, int) and -len(self.rows) <= row < len(self.rows):
            return row
        if isinstance(row, str) and self.rows.count(row) == 1:
            return self.rows.index(row)
        found = (
            "several rows have that label" if row in self.rows else f"the rows are {', '.join(map(repr, self.rows))}"
        )
        raise TraceError(f"no single row {row!r} in this trace: {found}; pass an index from 0 to {len(self.rows) - 1}")

    def _check_kind(self, kind: str) -> str:
        """The kind, if it was traced."""
        if kind not in self.kinds:
            raise TraceError(
                f"no {kind!r} effects in this trace: it holds {', '.join(map(repr, self.kinds))}; "
                f"trace again with sites=({', '.join(map(repr, (*self.kinds, kind)))})"
            )
        return kind


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """First and last index of every unbroken run of true flags."""
    starts = [index for index, flag in enumerate(flags) if flag and not (index and flags[index - 1])]
    ends = [index for index, flag in enumerate(flags) if flag and not (index + 1 < len(flags) and flags[index + 1])]
    return list(zip(starts, ends, strict=True))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise TraceError(
            f"fraction {fraction} is not a share of an effect; pass one above 0 and at most 1, such as 0.5"
        )
