"""The reading of a map of indirect effects: its largest cell, its causal blocks, and the site for an edit."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...artefacts.drawing.styles import SITE_NAMES
from ...artefacts.results import Result
from ..errors import TraceError


class Peak(NamedTuple):
    """One cell of a map: the row's label, the layer (centre of its window) and the indirect effect (main metric)."""

    row: str
    layer: int
    effect: float


@dataclass(frozen=True, kw_only=True)
class CausalBlock:
    """Neighbouring columns of one row whose restored outputs all recover the answer."""

    kind: str
    row: str
    positions: tuple[int, ...]
    """The row's token positions; empty in an average, where they differ from prompt to prompt."""
    token: str | int | None
    """Group name or position by which an edit names the row's token; None for rows of several tokens or patches."""
    first: int
    last: int
    """First and last column, both included; for layers restored in windows, a column is the centre of its window."""
    layers: tuple[int, ...]
    """All layers, of the decoder or of the kind's own tower, that a window of the block restores."""
    effect: float
    """The largest indirect effect inside the block, in units of the main metric."""
    spread: float | None = None
    """Standard deviation of that cell's effect over the noise samples of one prompt; None for one sample."""
    interval: tuple[float, float] | None = None
    """95 % interval of that cell's mean effect over prompts, corrected for the choice among all cells of the kind."""


@dataclass(frozen=True, kw_only=True)
class EditSite:
    """The recommended site of an edit: the layer's MLP at the token, with the reason in words."""

    layer: int
    token: str | int
    """The token's group name if it has one (it then names the same token in every prompt), else its position."""
    effect: float
    """Indirect effect of the MLPs there, in units of the main metric."""
    onset: int
    """First layer at which restoring this token's hidden state recovers the requested share of the total effect."""
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EffectMap(Result):
    """Indirect effects over (row, column) for some kinds of sites, the common base of single traces and averages.

    A column is a decoder layer; for "vision" it is a layer of the vision tower, and "projector" has one column.
    """

    model: str
    """Name or path of the traced model."""
    revision: str | None
    rows: tuple[str, ...]
    """Label of each row: a token, or the name of a token group."""
    row_tokens: tuple[str | int | None, ...]
    """Group name or position by which an edit names the row's token; None for rows of several tokens or patches."""
    layers: int
    """Number of decoder layers."""
    window: int
    """Number of neighbouring MLPs or attentions restored together; hidden states are restored one at a time."""
    spans: Mapping[str, Tensor]
    """Per kind (column, 2): first and last layer, both included, that a cell restores."""
    corruption: str
    seed: int | None
    """Random seed of the noise; None if the corruption is not random."""
    metrics: tuple[str, ...] = ("probability",)
    """Names of the metrics; the first is the main one."""
    direction: Literal["restore", "corrupt"] = "restore"
    """"restore" patches clean states into the corrupted run, "corrupt" corrupted states into the clean run."""
    effect: Literal["total", "direct"] = "total"
    """"total", or "direct" if the other image tokens were frozen at the run's own states, so that a patch acts on the
    text only."""
    severed: str | None = None
    """"mlp" or "attention" if later modules of that kind were frozen at the run's own values, else None."""
    estimated: Mapping[str, Tensor] = field(default_factory=dict)
    """Per kind (row, column), True where the value is an estimate by attribution; empty where all are exact."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the requested order."""
        raise NotImplementedError

    def total_effect_of(self, metric: str | None = None) -> float:
        """Return clean minus corrupted score in this metric (default: the main one)."""
        raise NotImplementedError

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: the part of the total effect that each cell recovers.

        Args:
            kind: a kind of site that was traced, such as "hidden" or "mlp".
            metric: one of `metrics`; the main one by default.

        Raises:
            TraceError: if this kind or metric was not traced.
        """
        raise NotImplementedError

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Return the token positions of the row with this index; none if they differ from prompt to prompt."""
        raise NotImplementedError

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        """Return a function from row and column to the fields of a block that describe the certainty of its effect."""
        raise NotImplementedError

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted score in the main metric."""
        return self.total_effect_of()

    def normalised_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: each indirect effect as a share of the total effect.

        Raises `TraceError` if the total effect is not positive.
        """
        return self.indirect_effect(kind, metric) / self._positive_total(metric)

    def best(self, kind: str = "mlp") -> Peak:
        """Return the cell with the largest indirect effect."""
        effects = _present(self.indirect_effect(kind))
        row, column = divmod(int(effects.argmax()), effects.shape[1])
        return Peak(self.rows[row], column, float(effects[row, column]))

    def causal_blocks(self, kind: str = "mlp", fraction: float = 0.5) -> tuple[CausalBlock, ...]:
        """Return runs of neighbouring columns with large effects, the strongest first; none if no effect is positive.

        Args:
            kind: a kind of site that was traced.
            fraction: share of the map's largest effect that every column of a block reaches, above 0 and at most 1.

        A trace of one prompt gives the spread of an effect over its noise samples, which does not measure significance;
        an average gives an interval over prompts.
        """
        _check_fraction(fraction)
        effects = _present(self.indirect_effect(kind))
        threshold = fraction * float(effects.max())
        if threshold <= 0:
            return ()
        certainty = self._certainty(kind)
        blocks = []
        for row in range(len(self.rows)):
            for first, last in _runs((effects[row] >= threshold).tolist()):
                peak = first + int(effects[row, first : last + 1].argmax())
                block = CausalBlock(
                    kind=kind,
                    row=self.rows[row],
                    positions=self.positions_of(row),
                    token=self.row_tokens[row],
                    first=first,
                    last=last,
                    layers=tuple(range(int(self.spans[kind][first, 0]), int(self.spans[kind][last, 1]) + 1)),
                    effect=float(effects[row, peak]),
                    **certainty(row, peak),
                )
                blocks.append(block)
        return tuple(sorted(blocks, key=lambda block: -block.effect))

    def onset(self, row: str | int, fraction: float = 0.25) -> int | None:
        """Return the first layer at which a row's hidden state recovers a share of the total effect, or None.

        Args:
            row: label or index of the row, or the group name of its token.
            fraction: share of the total effect, above 0 and at most 1.

        Raises:
            TraceError: if hidden states were not traced or the corruption lowers nothing.
        """
        _check_fraction(fraction)
        effects = self.indirect_effect("hidden")[self._row_index(row)]
        reached = (effects >= fraction * self._positive_total()).nonzero().flatten().tolist()
        return reached[0] if reached else None

    def edit_site(self, fraction: float = 0.25) -> EditSite:
        """Return the site where an edit belongs: the strongest MLP cell at or after the onset of its token.

        Candidates are the rows of a single text token. The onset of a token is the first layer at which restoring its
        hidden state recovers a share of the total effect. Before it, the token does not yet carry what the corruption
        destroyed: a key taken there depends on the wording and not on the picture, so that an edit would change the
        answer for every picture. For facts about pictures, trace under image corruption; a trace of corrupted words
        cannot tell.

        Args:
            fraction: share of the total effect that defines the onset, above 0 and at most 1.

        Raises:
            TraceError: if "hidden" and "mlp" were not both traced, if the corruption lowers nothing, if no candidate
                ever carries the information, or for direct effects, severed runs and patched-in corrupted states.
        """
        if not self._is_usual:
            raise TraceError(
                f"an edit site needs total effects of restoring clean states, this trace holds {self.variant}; "
                'trace with direction="restore", effect="total" and severed=None'
            )
        effects, best = _present(self.indirect_effect("mlp")), None
        for row, token in enumerate(self.row_tokens):
            if token is None or (onset := self.onset(row, fraction)) is None:
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

    @property
    def variant(self) -> str:
        """The kind of effect in words, which is "total effects of restored states" for the default settings."""
        states = {"restore": "restored states", "corrupt": "corrupted states put into the clean run"}[self.direction]
        severed = f", later {SITE_NAMES.get(self.severed, self.severed)} outputs severed" if self.severed else ""
        return f"{self.effect} effects of {states}{severed}"

    @property
    def _is_usual(self) -> bool:
        """True for total effects of restored states without severed modules."""
        return (self.direction, self.effect, self.severed) == ("restore", "total", None)

    def _strongest(self) -> str:
        """Return a description of the largest cell of each kind."""
        peaks = {kind: self.best(kind) for kind in self.kinds}
        cells = [f"{kind} {peak.effect:.3f} ({peak.row.strip()!r}, layer {peak.layer})" for kind, peak in peaks.items()]
        return f"largest: {', '.join(cells)}"

    def _positive_total(self, metric: str | None = None) -> float:
        """Return the total effect, which must be positive for shares of it to have a meaning."""
        total = self.total_effect_of(metric)
        if not total > 0:
            raise TraceError(
                f"the corruption ({self.corruption}) does not lower the answer's {metric or self.metrics[0]} (total "
                f"effect {total:.3f}), so nothing can be brought back; trace with a stronger or another corruption"
            )
        return total

    def _metric(self, metric: str | None) -> int:
        """Return the index of a metric; None is the main one."""
        if metric is not None and metric not in self.metrics:
            raise TraceError(
                f"no metric {metric!r} in this trace: it holds {', '.join(map(repr, self.metrics))}; "
                f"trace again with metrics=({', '.join(map(repr, (*self.metrics, metric)))})"
            )
        return 0 if metric is None else self.metrics.index(metric)

    def _row_index(self, row: str | int) -> int:
        """Return the index of the row with this index, label or token name; a name must occur exactly once."""
        if isinstance(row, int) and -len(self.rows) <= row < len(self.rows):
            return row
        if isinstance(row, str) and self.rows.count(row) == 1:
            return self.rows.index(row)
        if isinstance(row, str) and row not in self.rows and self.row_tokens.count(row) == 1:
            return self.row_tokens.index(row)
        problem = (
            "several rows have that label" if row in self.rows else f"the rows are {', '.join(map(repr, self.rows))}"
        )
        raise TraceError(
            f"no single row {row!r} in this trace: {problem}; pass an index from 0 to {len(self.rows) - 1}"
        )

    def _check_kind(self, kind: str) -> str:
        """Return the kind if it was traced."""
        if kind not in self.kinds:
            raise TraceError(
                f"no {kind!r} effects in this trace: it holds {', '.join(map(repr, self.kinds))}; "
                f"trace again with sites=({', '.join(map(repr, (*self.kinds, kind)))})"
            )
        return kind


def _present(effects: Tensor) -> Tensor:
    """Return the effects with untraced cells replaced so that they are never the largest."""
    return effects.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Return the first and last index of every unbroken run of true flags."""
    starts = [index for index, flag in enumerate(flags) if flag and not (index and flags[index - 1])]
    ends = [index for index, flag in enumerate(flags) if flag and not (index + 1 < len(flags) and flags[index + 1])]
    return list(zip(starts, ends, strict=True))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise TraceError(
            f"fraction {fraction} is not a share of an effect; pass one above 0 and at most 1, such as 0.5"
        )
