"""Edits made one on top of the other: how many of them last, and how far the weights drift."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import VisionLanguageModel
from .asking import Baseline, EditFunction, ask, attempt, report_of, rows_of, transform_of
from .changes import Change
from .delta import Delta
from .errors import EditError
from .metrics import EXACT, Interval, bootstrap_interval, exact_match
from .probes import EFFICACY, Record, names_of
from .questions import Question, record_questions, unedited_by_others
from .reports import MEANS, EditCurve, EditReport, ProbeRow, SequencePoint
from .responses import EvaluationSettings

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


@dataclass(kw_only=True)
class _Progress:
    """What has happened in a sequence so far."""

    questions: dict[str, list[Question]] = field(default_factory=dict)
    statuses: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    worked: dict[str, bool] = field(default_factory=dict)
    """Record -> its question gave the target right after its edit."""
    growth: float = 0.0
    exceeded_at: int | None = None


def evaluate_sequence(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    edit: EditFunction,
    reference: Baseline,
    *,
    at: Sequence[int],
    norm_bound: NormBound,
    batch_size: int,
    progress: bool,
) -> EditReport:
    """Return the report on all edits after the last one, with the curve of the points on the way.

    After as many edits as `at` says, and after the last, all questions of all edits so far are asked by free
    generation; the other measurements wait for the report. The model ends bit-equal to how it began.
    """
    options = {"batch_size": batch_size, "progress": False}
    settings, names = reference.settings, names_of(records)
    free = replace(settings, forced=False, fluency_tokens=0)
    run, points = _Progress(), []
    with _standing(vlm) as stack:
        norms = _norms(vlm, _matrices(vlm))
        bar = tqdm(records, desc="edits in sequence", unit="edit", disable=not progress)
        for count, (name, record) in enumerate(zip(names, bar, strict=True), start=1):
            run.questions[name] = own = [*record_questions(name, record)]
            change, run.statuses[name] = attempt(vlm, edit, record.request, run.changes)
            if change is not None:
                _put_in(stack, change)
                run.changes.append(change)
                run.growth = max(run.growth, _growth(vlm, change, norms))
            answers = ask(vlm, own[:1], reference, settings=free, **options).generated
            run.worked[name] = exact_match(answers[own[0].key], record.request.target)
            _watch(run, count, norm_bound)
            is_last = count == len(records) or (norm_bound.stop and run.exceeded_at is not None)
            if count in at or is_last:
                counted = _counted(run, records[:count])
                rows = _rows(vlm, counted, reference, settings if is_last else free, **options)
                points.append(_point(run, count, rows, settings.seed))
            if is_last:
                break
    curve = EditCurve(
        model=vlm.name,
        revision=vlm.revision,
        points=tuple(points),
        statuses=run.statuses,
        bound=norm_bound.growth,
        exceeded_at=run.exceeded_at,
        stopped_at=count if count < len(records) else None,
    )
    left_out = sum(map(len, run.questions.values())) - len(counted)
    return report_of(vlm, "sequence", settings, rows, statuses=run.statuses, left_out=left_out, curve=curve)


@contextmanager
def _standing(vlm: VisionLanguageModel) -> Iterator["_Standing"]:
    """A block in which changes are put in one on top of the other; on exit every weight is bit-equal to before.

    One copy is held of each weight that deltas change, however many deltas there are.
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
    if transform_of(change) is not None:
        raise EditError("an edit that works in the prompt has no sequence; pass mode='single' or mode='batch'")
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


def _watch(run: _Progress, count: int, norm_bound: NormBound) -> None:
    if run.exceeded_at is None and run.growth > norm_bound.growth:
        run.exceeded_at = count
        logger.warning(
            "after %d edits the norm of an edited weight has grown by %.1f %%, more than %.1f %%; "
            "expect earlier edits and other answers to suffer; fewer edits, a larger ridge or a clamp may help",
            *(count, 100 * run.growth, 100 * norm_bound.growth),
        )


def _counted(run: _Progress, records: Sequence[Record]) -> tuple[Question, ...]:
    """All questions of the edits so far, without those that should stay for one of them but that another changes."""
    return unedited_by_others([question for own in run.questions.values() for question in own], records)


def _rows(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    reference: Baseline,
    settings: EvaluationSettings,
    **options: object,
) -> tuple[ProbeRow, ...]:
    return rows_of(questions, reference.responses, ask(vlm, questions, reference, settings=settings, **options))


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
