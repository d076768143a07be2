"""One edit on top of the other: what the later ones leave of the earlier, and how far the weights have drifted."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import VisionLanguageModel
from .curves import MEANS, EditCurve, SequencePoint
from .delta import Delta
from .errors import EditError
from .evaluate import Baseline, Change, Edit, ask, attempt, report, rows_of, unedited, worded_by
from .measuring import EvaluationSettings
from .metrics import EXACT, Interval, exact_match, mean_interval
from .probes import EFFICACY, Record, names_of
from .questions import Question, record_questions, unedited_by_others
from .reports import EditReport, ProbeRow

logger = logging.getLogger("multrace")
AT = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which all of them are measured, as published curves have them."""


@dataclass(frozen=True, kw_only=True)
class Governor:
    """Watches how far edited weights grow: sequences fail where their norm runs away. EditError for a bound below 0."""

    bound: float = 0.1
    """Relative growth of a weight's Frobenius norm from which on a warning is logged."""
    stops: bool = False
    """Also end the sequence there."""

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise EditError(f"the bound of the norm's growth is {self.bound}; pass at least 0, such as 0.1")


@dataclass(kw_only=True)
class _Sequence:
    """What has happened so far."""

    asked: dict[str, list[Question]] = field(default_factory=dict)
    statuses: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    held: dict[str, bool] = field(default_factory=dict)
    """Record -> its question gave the target right after its edit."""
    growth: float = 0.0
    exceeded_at: int | None = None


def evaluate_sequentially(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    edit: Edit,
    *,
    at: Sequence[int] = AT,
    baseline: Baseline | None = None,
    governor: Governor | None = None,
    batch_size: int = 32,
    measures: EvaluationSettings | None = None,
    progress: bool = True,
) -> tuple[EditCurve, EditReport]:
    """The curve over edits made one on top of the other, and the report on all of them after the last.

    edit: as in `evaluate_singly`, with the earlier changes in the model and passed on (see `with_history`). After as
    many edits as `at` says, and after the last, all questions of all edits so far are asked again, by free generation;
    the rest of the measures waits for the report. A request that cannot be made is noted, and the others go on. The
    model ends bit-equal to how it began. EditError for a change that works in the prompt, which knows no sequence.
    """
    options = {"batch_size": batch_size, "progress": False}
    governor, names = governor or Governor(), names_of(records)
    baseline = baseline or unedited(vlm, records, measures=measures, batch_size=batch_size, progress=progress)
    free = replace(baseline.measures, forced=False, fluency_tokens=0)
    run, points = _Sequence(), []
    with _standing(vlm) as stack:
        norms = _norms(vlm, _matrices(vlm))
        bar = tqdm(records, desc="edits in sequence", unit="edit", disable=not progress)
        for count, (name, record) in enumerate(zip(names, bar, strict=True), start=1):
            run.asked[name] = [*record_questions(name, record)]
            change, run.statuses[name] = attempt(vlm, edit, record.request, run.changes)
            if change is not None:
                _put_in(stack, change)
                run.changes.append(change)
                run.growth = max(run.growth, _growth(vlm, change, norms))
            said = ask(vlm, run.asked[name][:1], baseline, worded=None, measures=free, **options)
            run.held[name] = exact_match(said.generated[run.asked[name][0].key], record.request.target)
            _watch(run, count, governor)
            is_last = count == len(records) or (governor.stops and run.exceeded_at is not None)
            if count in at or is_last:
                counted = _counted(run, records[:count])
                rows = _rows(vlm, counted, baseline, baseline.measures if is_last else free, **options)
                points.append(_point(run, count, rows, baseline.measures.seed))
            if is_last:
                break
    curve = EditCurve(
        model=vlm.name,
        revision=vlm.revision,
        points=tuple(points),
        statuses=run.statuses,
        bound=governor.bound,
        exceeded_at=run.exceeded_at,
        stopped_at=count if count < len(records) else None,
    )
    left_out = sum(map(len, run.asked.values())) - len(counted)
    return curve, report(vlm, "sequence", baseline.measures, rows, run.statuses, left_out)


@contextmanager
def _standing(vlm: VisionLanguageModel) -> Iterator["_Standing"]:
    """Changes put in one on top of the other; on leaving, every weight is bit-equal to before.

    Of weights that deltas change, one copy is held in all, however many deltas there are.
    """
    with vlm.lock, ExitStack() as stack:
        yield _Standing(vlm=vlm, stack=stack)


@dataclass(kw_only=True)
class _Standing:
    vlm: VisionLanguageModel
    stack: ExitStack
    saved: set[str] = field(default_factory=set)


def _put_in(standing: _Standing, change: Change) -> None:
    vlm = standing.vlm
    if worded_by(change) is not None:
        raise EditError("an edit that works in the prompt has no sequence; evaluate it singly or together")
    if not isinstance(change, Delta):
        standing.stack.enter_context(change.applied(vlm))
        return
    for name in change.changes.keys() - standing.saved:
        standing.stack.callback(_restore, vlm.weight(name), vlm.weight(name).detach().clone())
        standing.saved.add(name)
    change.apply(vlm)  # the copies in its handle go at once, ours are enough


@torch.no_grad()
def _restore(weight: Tensor, saved: Tensor) -> None:
    weight.copy_(saved)


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


def _watch(run: _Sequence, count: int, governor: Governor) -> None:
    if run.exceeded_at is None and run.growth > governor.bound:
        run.exceeded_at = count
        logger.warning(
            "after %d edits the norm of an edited weight has grown by %.1f %%, more than the bound of %.1f %%; "
            "expect earlier edits and other answers to suffer: fewer edits, a larger ridge or a clamp may help",
            *(count, 100 * run.growth, 100 * governor.bound),
        )


def _counted(run: _Sequence, records: Sequence[Record]) -> tuple[Question, ...]:
    """All questions of the edits so far, but those that one of them leaves alone and another changes."""
    return unedited_by_others([question for each in run.asked.values() for question in each], records)


def _rows(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    baseline: Baseline,
    measures: EvaluationSettings,
    **options: object,
) -> tuple[ProbeRow, ...]:
    state = ask(vlm, questions, baseline, worded=None, measures=measures, **options)
    return rows_of(questions, baseline.state, state)


def _point(run: _Sequence, count: int, rows: Sequence[ProbeRow], seed: int) -> SequencePoint:
    holds = {row.record: row.numbers[EXACT][1] == 1 for row in rows if row.aspect == EFFICACY}
    held = [name for name, was in run.held.items() if was]
    first = next(iter(run.held))
    return SequencePoint(
        edits=count,
        first_retained=holds[first] if run.held[first] else None,
        retained=sum(holds[name] for name in held) / len(held) if held else float("nan"),
        growth=run.growth,
        **{name: _mean(rows, name, seed) for name in MEANS},
    )


def _mean(rows: Sequence[ProbeRow], aspect: str, seed: int) -> Interval:
    chosen = [row for row in rows if row.aspect == aspect and MEANS[aspect] in row.numbers]
    return mean_interval([row.numbers[MEANS[aspect]][1] for row in chosen], [row.record for row in chosen], seed=seed)
