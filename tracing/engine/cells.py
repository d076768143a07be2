"""The cells of a sweep, its settings, runs and report, and the plan by which the cells are computed.

The plan states which cells cost nothing, which positions the others change, and which of them form a batch. This module
only keeps account of positions and layers; it computes no states. It also defines the errors of all experiments.
"""

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from ...models import VisionLanguageModel
from ...models.frame import DecoderInput
from ...models.replay.recording import Cut, Masks
from ...models.replay.replay import Work


class TraceError(ValueError):
    """A trace that cannot be made, read or written as asked; says what was found and what to do."""


class WeakCorruption(TraceError):
    """A corruption that does not lower the answer's probability, so there is nothing to bring back."""


_PACKAGE = __name__.partition(".")[0]


def warn_caller(message: str) -> None:
    """Warn at the line outside this package from which the call came."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def in_words(layers: Sequence[int]) -> str:
    """Return ascending decoder layers in words: "decoder layer 3" or "decoder layers 0-2, 4"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    numbers = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"decoder layer{'s' if len(layers) > 1 else ''} {numbers}"


def skipped_in_words(vlm: VisionLanguageModel, layers: Sequence[int]) -> str:
    """Return in words that these layers do not run for a prompt without a picture."""
    return f"{in_words(layers)} of {vlm.name!r} did not run, since the prompt has no picture to attend to"


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

    base: DecoderInput
    """What the text stack reads, in one row or one for each sample."""
    source: DecoderInput
    """What the text stack reads, in one row or one for each sample."""
    scored: tuple[int, ...]
    """Positions whose logits are scored, ascending: the prompt's last token and all answer tokens but the last."""
    frozen: tuple[int, ...] = ()
    """Positions that direct cells freeze: the image tokens."""

    @classmethod
    def of_one(cls, entering: DecoderInput, *, scored: Sequence[int]) -> "Runs":
        """Return runs of edge cells, with the same input of one row as base and source."""
        return cls(base=entering, source=entering, scored=tuple(scored))

    @property
    def samples(self) -> int:
        """The number of samples that run side by side."""
        return max(self.base.rows, self.source.rows)

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.base.length

    def along(self, vlm: VisionLanguageModel, ids: Sequence[int]) -> "Runs":
        """Return the runs with these tokens appended to the prompt, scored at the positions that predict them."""
        base = vlm.extend(self.base, ids)
        source = base if self.source is self.base else vlm.extend(self.source, ids)
        last = self.length - 1
        scored = tuple(range(last, last + len(ids)))
        return Runs(base=base, source=source, scored=scored, frozen=self.frozen)


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


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The change of the base run by one cell."""

    computed: tuple[int, ...]
    """Positions whose states must be computed anew, ascending."""
    merged: tuple[int, ...] = ()
    """Positions that follow the source run from the cell's first layer on."""
    live: tuple[int, ...] = ()
    """Positions whose patched-in states differ between the runs."""
    cut: Cut | None = None
    """The edges of an edge cell that exist in the model."""
    reached: tuple[int, ...] = ()
    """Positions whose last state can differ from both runs, ascending."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One cell's path through the layers."""

    cell: int
    """The number of the cell among all cells."""
    join: int
    """The layer after which the lane starts; -1 for the input of the first layer."""
    leader: int | None
    """The lane of the same chunk whose states it copies there, since both agree so far; None if it copies none."""
    live: tuple[int, ...] = ()
    """Positions at which a state cell patches in states."""
    cut: Cut | None = None
    """The edges that an edge cell removes."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lanes that run together: they change the same positions and take all others from the same runs."""

    computed: tuple[int, ...]
    merged: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    """Positions that lack edges, the same for all lanes; empty for state cells."""
    lanes: tuple[Lane, ...]
    """The lanes in the order in which they join."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The distinct cuts of the lanes."""
        return tuple(dict.fromkeys(lane.cut for lane in self.lanes if lane.cut is not None))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of computation of a sweep."""

    chunks: tuple[Chunk, ...]
    free: dict[int, tuple[int, ...]]
    """Cells that need no computation, with the scored positions that take the source run's logits; the other positions
    take the base run's."""
    copies: dict[int, int] = field(default_factory=dict)
    """Edge cells that remove the same edges as an earlier cell, with that cell's number; both share the scores."""


class _Member(NamedTuple):
    """A cell of a chunk, by its number, with its effect."""

    cell: int
    live: tuple[int, ...]
    cut: Cut | None


_Group = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The computed, merged and target positions that the lanes of a chunk have in common."""


def make_plan(
    cells: Sequence[Cell],
    *,
    masks: Masks,
    changed: Collection[int],
    scored: Collection[int],
    frozen: Collection[int] = (),
    alike_from: int = 0,
    lane_tokens: int,
) -> Plan:
    """Return the plan for these cells.

    Args:
        cells: Cells of one kind.
        masks: The attention masks of all layers.
        changed: All positions at which the two runs can differ.
        scored: Positions whose logits are scored.
        frozen: Positions that direct cells freeze.
        alike_from: The first layer after which both runs give the layers the same beside their states (default 0).
        lane_tokens: Largest number of computed positions in all lanes of a chunk together; a chunk has at least one.

    Raises:
        TraceError: An edge cell leaves a token that would see nothing.
    """
    if all_edges(cells):
        effects, copies = _edge_effects(cells, masks)
    else:
        effects, copies = dict(enumerate(_state_effects(state_cells(cells), masks, changed, frozen, alike_from))), {}
    free: dict[int, tuple[int, ...]] = {}
    groups: dict[_Group, list[_Member]] = {}
    for number, effect in effects.items():
        if not set(effect.reached) & set(scored):
            free[number] = tuple(position for position in scored if position in effect.merged)
        else:
            targets = () if effect.cut is None else tuple(sorted(effect.cut.targets))
            member = _Member(cell=number, live=effect.live, cut=effect.cut)
            groups.setdefault((effect.computed, effect.merged, targets), []).append(member)
    chunks = [
        chunk
        for group, members in groups.items()
        for chunk in _chunks(group, members, cells, max(1, lane_tokens // len(group[0])))
    ]
    free |= {number: free[other] for number, other in copies.items() if other in free}
    copies = {number: other for number, other in copies.items() if other not in free}
    return Plan(chunks=tuple(chunks), free=free, copies=copies)


def single(cell: int) -> Chunk:
    """Return a chunk for one cell that is computed separately, by either engine."""
    return Chunk(computed=(), lanes=(Lane(cell=cell, join=0, leader=None),))


def halved(chunk: Chunk, cells: Sequence[Cell]) -> tuple[Chunk, ...]:
    """Return the chunk in two parts, or unchanged if it has one lane."""
    if len(chunk.lanes) == 1:
        return (chunk,)
    members = [_Member(cell=lane.cell, live=lane.live, cut=lane.cut) for lane in chunk.lanes]
    return tuple(_chunks((chunk.computed, chunk.merged, chunk.targets), members, cells, (len(members) + 1) // 2))


# ---- what a cell changes ----


def effect_of(
    cell: StateCell, *, masks: Masks, changed: Collection[int], frozen: Collection[int] = (), alike_from: int = 0
) -> Effect:
    """Return the positions that a state cell changes.

    Args:
        cell: The cell.
        masks: The attention masks of all layers.
        changed: All positions at which the two runs can differ.
        frozen: Positions that direct cells freeze.
        alike_from: The first layer after which both runs give the layers the same beside their states (default 0);
            before it, a position whose state is patched in does not follow the source run.
    """
    live = tuple(sorted(set(cell.positions) & set(changed)))
    reached = set(masks.reach(live, cell.first + 1))
    if cell.is_direct:
        reached -= set(frozen) - set(live)
    merged: set[int] = set()
    if cell.kind == "hidden" and cell.severed is None and not cell.is_direct and cell.first >= alike_from:
        merged = _merged(live, masks, changed, cell.first + 1)
    computed = tuple(sorted(reached - merged))
    return Effect(computed=computed, merged=tuple(sorted(merged)), live=live, reached=computed)


def touched(
    cells: Sequence[StateCell],
    *,
    masks: Masks,
    changed: Collection[int],
    frozen: Collection[int] = (),
    alike_from: int = 0,
) -> tuple[int, ...]:
    """Return the ascending positions whose states any cell computes or patches in; only these need to be recorded.

    The arguments are those of `effect_of`.
    """
    positions: set[int] = set()
    for effect in {id(each): each for each in _state_effects(cells, masks, changed, frozen, alike_from)}.values():
        positions.update(effect.computed, effect.live)
    return tuple(sorted(positions))


def _state_effects(
    cells: Sequence[StateCell], masks: Masks, changed: Collection[int], frozen: Collection[int], alike_from: int
) -> list[Effect]:
    """Return each cell's effect; cells that agree in everything that determines the effect share one object."""
    known: dict[tuple, Effect] = {}
    effects = []
    for cell in cells:
        key = (cell.positions, cell.first, cell.kind == "hidden", cell.severed, cell.is_direct)
        if key not in known:
            known[key] = effect_of(cell, masks=masks, changed=changed, frozen=frozen, alike_from=alike_from)
        effects.append(known[key])
    return effects


def _merged(live: Collection[int], masks: Masks, changed: Collection[int], first: int) -> set[int]:
    """Return the live positions for which all changed positions they see from layer `first` on are live and merged."""
    merged = set(live)
    while merged:
        spoilt = set(masks.reach(set(changed) - merged, first)) & merged
        if not spoilt:
            break
        merged -= spoilt
    return merged


def _edge_effects(cells: Sequence[EdgeCell], masks: Masks) -> tuple[dict[int, Effect], dict[int, int]]:
    """Return the effects of all distinct edge cells by number, and for each duplicate the number of the cell it equals.

    Edges that the model's own masks exclude in all layers of a cell's window are ignored.
    """
    known: dict[tuple[Cut, frozenset[int]], Cut] = {}
    numbers: dict[tuple, int] = {}
    effects, copies = {}, {}
    for number, cell in enumerate(cells):
        kinds = {id(masks.layers[layer]): layer for layer in range(cell.first, cell.last + 1)}
        key = cell.cut, frozenset(kinds)
        if key not in known:
            known[key] = _effective(cell.cut, masks, kinds.values())
        same = numbers.setdefault((known[key], cell.first, cell.last, cell.is_dropped), number)
        if same == number:
            effects[number] = _edge_effect(cell, known[key], masks)
        else:
            copies[number] = same
    return effects, copies


def _edge_effect(cell: EdgeCell, cut: Cut, masks: Masks) -> Effect:
    """Return the effect of removing the edges of this cut in the cell's layers."""
    reached = set(masks.reach(cut.targets, cell.first + 1)) | cut.targets
    # No layer follows the last one, so the positions that can change there do not depend on where the window begins.
    computed = set(masks.reach(cut.targets, min(cell.first + 1, len(masks.layers) - 1))) | cut.targets
    if cell.is_dropped:
        computed -= cut.sources
    return Effect(computed=tuple(sorted(computed)), cut=cut, reached=tuple(sorted(reached)))


def _effective(cut: Cut, masks: Masks, layers: Collection[int]) -> Cut:
    """Return the cut without edges that none of these layers has. Raises `TraceError` if a target would see nothing."""
    sources, targets = (torch.tensor(sorted(each), dtype=torch.long) for each in (cut.sources, cut.targets))
    met = torch.zeros(len(targets), len(sources), dtype=torch.bool)
    everything = torch.arange(masks.length)
    for layer in filter(masks.has_edges, layers):
        visible = masks.block(layer, targets, everything)
        if bool((visible.sum(1) == visible[:, sources].sum(1)).any()):
            raise TraceError(
                "some token would see nothing at all, not even itself, if these edges were cut; leave it out of the "
                "targets, or itself or the first token out of the sources"
            )
        met |= visible[:, sources]
    return Cut(
        sources=frozenset(sources[met.any(0)].tolist()),
        targets=frozenset(targets[met.any(1)].tolist()),
        heads=cut.heads,
    )


# ---- which cells run together ----


def _chunks(group: _Group, members: Sequence[_Member], cells: Sequence[Cell], size: int) -> list[Chunk]:
    """Return the members of a group as chunks of at most `size` lanes.

    State cells of one family stay together if they fit; edge cells are divided in their order.
    """
    members = sorted(members, key=lambda member: _order(member, cells))
    families: dict[tuple, list[_Member]] = {}
    for member in members:
        families.setdefault(_family(member, cells) if member.cut is None else (), []).append(member)
    pieces = [
        family[start : start + size]
        for _, family in sorted(families.items(), key=lambda item: item[0])
        for start in range(0, len(family), size)
    ]
    parts: list[list[_Member]] = []
    for piece in pieces:
        if not parts or len(parts[-1]) + len(piece) > size:
            parts.append([])
        parts[-1] += piece
    computed, merged, targets = group
    # If a cut changes only its targets, its first layer runs like any other: the lane starts with that layer's input.
    starts = {member.cell: cells[member.cell].first - (targets == computed) for member in members}
    return [
        Chunk(computed=computed, merged=merged, targets=targets, lanes=_lanes(part, cells, starts)) for part in parts
    ]


def _family(member: _Member, cells: Sequence[Cell]) -> tuple:
    """Return a key shared by the cells that act equally up to the end of the shortest of their windows."""
    cell = cells[member.cell]
    if isinstance(cell, EdgeCell):
        return member.cut, cell.first
    return cell.first, cell.kind, cell.head or 0, member.live, cell.positions


def _order(member: _Member, cells: Sequence[Cell]) -> tuple:
    """Return the sort key of lanes that join at the same layer."""
    cell = cells[member.cell]
    if isinstance(cell, EdgeCell) and member.cut is not None:
        return cell.first, tuple(sorted(member.cut.sources)), member.cut.heads, -cell.last
    return (member.cell,)


def _lanes(members: Sequence[_Member], cells: Sequence[Cell], starts: Mapping[int, int]) -> tuple[Lane, ...]:
    """Return the lanes of these members in the order in which they join.

    The widest window of a family leads, and the others branch off where their own window ends. State cells of a single
    layer do not benefit from this, since starts are shared in any case.
    """
    leaders: dict[tuple, int] = {}
    for member in members:
        key = _family(member, cells)
        leaders[key] = max(leaders.get(key, member.cell), member.cell, key=lambda number: cells[number].last)
    waiting = []
    for rank, member in enumerate(sorted(members, key=lambda member: _order(member, cells))):
        cell, leader = cells[member.cell], leaders[_family(member, cells)]
        leads = member.cell == leader or (isinstance(cell, StateCell) and cell.first == cell.last)
        waiting.append((cell.first if leads else cell.last, not leads, rank, member, leader))
    waiting.sort(key=lambda lane: lane[:3])
    slots = {member.cell: slot for slot, (*_, member, _) in enumerate(waiting)}
    return tuple(
        Lane(cell=member.cell, join=last, leader=slots[leader], live=member.live, cut=member.cut)
        if follows
        else Lane(cell=member.cell, join=starts[member.cell], leader=None, live=member.live, cut=member.cut)
        for last, follows, _, member, leader in waiting
    )
