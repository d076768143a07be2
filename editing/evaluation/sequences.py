"""Edits made one on top of the other: how many of them last, and how far the weights drift."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from ...data.facts import EFFICACY, EditRecord
from ...models import VisionLanguageModel
from ..changes import Change, EditSession
from ..errors import EditError
from .asking import Baseline, attempt, measured, measured_now, seen_statuses
from .metrics import EXACT, Interval, bootstrap_interval
from .questions import Check, LeftOut, asked_together, checks_of, names_of
from .reports import MEANS, EditCurve, EditReport, ProbeRow, SequencePoint

logger = logging.getLogger("multrace")
AT = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which a sequence is measured by default, as published curves have them."""


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """How far the norm of an edited weight may grow in a sequence; sequences fail where it runs away.

    Raises `EditError` for a growth below 0.
    """

    growth: float = 0.1
    """Relative growth of a weight's Frobenius norm beyond which a warning is logged; 0.1 is ten percent."""
    stop: bool = False
    """Also end the sequence there."""

    def __post_init__(self) -> None:
        if self.growth < 0:
            raise EditError(f"the largest growth of a weight's norm is {self.growth}; pass at least 0, such as 0.1")


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceState:
    """A sequence measured after so many edits: one unit of a run that can be resumed."""

    point: SequencePoint
    rows: tuple[ProbeRow, ...]
    """All questions of the edits so far. Free generation only, save for the last checkpoint of a sequence."""
    statuses: dict[str, str]
    """Record -> "edited", "not generated", "nothing to do", or "failed: " and why, for the edits so far."""
    left_out: tuple[LeftOut, ...]
    exceeded_at: int | None
    """The number of edits at which the growth first passed the bound."""
    is_last: bool


@dataclass(kw_only=True)
class _Progress:
    """What has happened in a sequence so far."""

    records: dict[str, EditRecord] = field(default_factory=dict)
    statuses: dict[str, str] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)
    """Records whose edits are in the model."""
    worked: dict[str, bool] = field(default_factory=dict)
    """Record -> its question gave the target right after its edit."""
    growth: float = 0.0
    exceeded_at: int | None = None

    def checks(self) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
        """Return all questions of the edits so far, and those that mean nothing while all these edits are made."""
        every = (check for name, record in self.records.items() for check in checks_of(name, record))
        return asked_together(every, self.records, self.edited)


def sequence_states(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    session: EditSession,
    reference: Baseline,
    *,
    at: Sequence[int],
    norm_bound: NormBound,
    batch_size: int,
    progress: bool,
) -> Iterator[SequenceState]:
    """Yield the state of a sequence after as many edits as `at` says, and after the last edit.

    session: the session that makes the edits, which begins and ends here. All questions of all edits so far are
    asked by free generation; the other measurements are made at the last checkpoint. The model ends bit-equal to how it
    began.
    """
    settings, names = reference.settings, names_of(records)
    run, options = _Progress(), {"settings": settings, "batch_size": batch_size}
    with session:
        norms = _norms(vlm, _matrices(vlm))
        bar = tqdm(records, desc="edits in sequence", unit="edit", disable=not progress)
        for count, (name, record) in enumerate(zip(names, bar, strict=True), start=1):
            _make(session, run, name, record, norms)
            own = next(checks_of(name, record))
            (row,) = measured_now(vlm, [own], reference, **options)
            run.worked[name] = row.numbers[EXACT][1] == 1
            _watch(run, count, norm_bound)
            if count == len(records) or (norm_bound.stop and run.exceeded_at is not None):
                break
            if count in at:
                checks, left_out = run.checks()
                rows = measured_now(vlm, checks, reference, **options)
                yield _checkpoint(run, count, rows, left_out, settings.seed, is_last=False)
        edited = session.state()
    checks, left_out = run.checks()
    rows = measured(vlm, checks, edited, reference=reference, progress=progress, **options)
    yield _checkpoint(run, count, rows, left_out, settings.seed, is_last=True)


def sequence_report(
    vlm: VisionLanguageModel, found: Sequence[SequenceState], reference: Baseline, *, number: int, bound: float
) -> EditReport:
    """Return the report on the state after the last edit, with the curve of the checkpoints on the way.

    number: how many edits there were to make. bound: the growth of a norm from which on a warning is due.
    """
    last = found[-1]
    edits = last.point.edits
    curve = EditCurve(
        model=vlm.name,
        revision=vlm.revision,
        points=tuple(each.point for each in found),
        statuses=last.statuses,
        bound=bound,
        exceeded_at=last.exceeded_at,
        stopped_at=edits if edits < number else None,
    )
    parts = {"statuses": last.statuses, "left_out": last.left_out, "curve": curve}
    return EditReport.of(vlm, "sequence", reference.settings, last.rows, **parts)


def _make(
    session: EditSession,
    run: _Progress,
    name: str,
    record: EditRecord,
    norms: dict[str, float],
) -> None:
    """Make one edit on top of the others."""
    run.records[name] = record
    change, run.statuses[name] = attempt(session.edit, record)
    if session.prompt_transform is not None:
        raise EditError("an edit that works in the prompt has no sequence; pass mode='single' or mode='batch'")
    if change is not None:
        run.edited.add(name)
        run.growth = max(run.growth, _growth(session.vlm, change, norms))


def _checkpoint(
    run: _Progress, count: int, rows: Sequence[ProbeRow], left_out: Sequence[LeftOut], seed: int, *, is_last: bool
) -> SequenceState:
    return SequenceState(
        point=_point(run, count, rows, seed),
        rows=tuple(rows),
        statuses=seen_statuses(run.statuses, rows),
        left_out=tuple(left_out),
        exceeded_at=run.exceeded_at,
        is_last=is_last,
    )


def _matrices(vlm: VisionLanguageModel) -> list[str]:
    return [name for name, weight in vlm.named_parameters() if weight.ndim > 1 and weight.is_floating_point()]


@torch.no_grad()
def _norms(vlm: VisionLanguageModel, names: Iterable[str]) -> dict[str, float]:
    """Frobenius norms, summed in float64."""
    return {name: torch.linalg.vector_norm(vlm.weight(name), dtype=torch.float64).item() for name in names}


def _growth(vlm: VisionLanguageModel, change: Change, norms: dict[str, float]) -> float:
    """The largest relative growth since the start among the weights that the change may have touched."""
    touched = getattr(change, "fingerprints", norms)  # all weights, where a change does not name its own
    names = [name for name in touched if name in norms]
    return max((norm / norms[name] - 1 for name, norm in _norms(vlm, names).items() if norms[name] > 0), default=0.0)


def _watch(run: _Progress, count: int, norm_bound: NormBound) -> None:
    if run.exceeded_at is None and run.growth > norm_bound.growth:
        run.exceeded_at = count
        logger.warning(
            "after %d edits the norm of an edited weight has grown by %.1f %%, more than %.1f %%; "
            "expect earlier edits and other answers to suffer; fewer edits, a larger ridge or a clamp may help",
            *(count, 100 * run.growth, 100 * norm_bound.growth),
        )


def _point(run: _Progress, count: int, rows: Sequence[ProbeRow], seed: int) -> SequencePoint:
    holds = {row.record: row.numbers[EXACT][1] == 1 for row in rows if row.aspect == EFFICACY}
    worked = [name for name, has_worked in run.worked.items() if has_worked]
    first = next(iter(run.worked))
    return SequencePoint(
        edits=count,
        first_holds=holds[first] if run.worked[first] else None,
        retention=sum(holds[name] for name in worked) / len(worked) if worked else float("nan"),
        growth=run.growth,
        **{name: _mean(rows, name, seed) for name in MEANS},
    )


def _mean(rows: Sequence[ProbeRow], aspect: str, seed: int) -> Interval:
    chosen = [row for row in rows if row.aspect == aspect and MEANS[aspect] in row.numbers]
    return bootstrap_interval(
        [row.numbers[MEANS[aspect]][1] for row in chosen], [row.record for row in chosen], seed=seed
    )
