"""Evaluation of edits, made one at a time, all at once, or one on top of the other, beside the unedited model."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ..changes import Change, Delta
from ..errors import EditError
from ..moments import Moments
from ..requests import EditRequest
from ..solve import ClosedFormEditor
from .asking import (
    Baseline,
    EditFunction,
    PromptTransform,
    ask,
    attempt,
    baseline as measure_baseline,
    report_of,
    rows_of,
    statuses_of,
    transform_of,
)
from .metrics import EXACT, Interval, bootstrap_interval, exact_match
from .questions import (
    EFFICACY,
    EvaluationSettings,
    General,
    Question,
    Record,
    general_questions,
    names_of,
    questions_of,
    record_questions,
    unedited_by_others,
)
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


SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


@runtime_checkable
class Editor(Protocol):
    """Anything that makes a change out of requests, such as `MultEdit` or `FineTune`."""

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool) -> Change:
        """Return the change; the model is left unchanged. Raises `EditError` if it cannot be made."""


def evaluate(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    editor: Editor | EditFunction | Change,
    *,
    mode: Literal["single", "batch", "sequence"] = "single",
    moments: Moments | None = None,
    baseline: Baseline | None = None,
    general: General = (),
    prompt_transform: PromptTransform | None = None,
    at: Sequence[int] = AT,
    norm_bound: NormBound | None = None,
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> EditReport:
    """Make the edits of the records, ask all their questions, and return a report; the model is left unchanged.

    A request that cannot be edited is named in `EditReport.statuses`, and its questions count as answered by the
    unedited model. Where several edits are in the model at once ("batch", "sequence"), a question that should keep its
    answer for one record, but whose answer another record is meant to change, is left out and counted in `left_out`.

    Args:
        vlm: The unedited model.
        records: The edits to make, each with the questions about it.
        editor: The editor that makes the edits; or a function (model, requests, earlier changes) -> change; or, in mode
            "batch", a change that was made before.
        mode: "single" makes, measures and undoes one edit at a time. "batch" puts all edits into the model at once.
            "sequence" makes each edit on top of the earlier ones, which closed-form editors are told about.
        moments: Second moments of keys, for editors that need them.
        baseline: The responses of the unedited model, from `baseline` with the same questions and settings; measured
            here by default.
        general: Held-out questions with their right answers, which measure general ability ("single" and "batch").
            In mode "single" each of them is asked after every edit.
        prompt_transform: How the edited model is asked, for changes that work in the prompt (mode "batch"); by default
            the change's own `prompt_transform`, if it has one.
        at: Numbers of edits after which a sequence is measured, by free generation; the end always is.
        norm_bound: Largest growth of an edited weight's norm in a sequence, and whether to stop there.
        settings: What is measured; None for that of the baseline.
        batch_size: Number of questions that are answered together.
        progress: Show progress bars.

    Returns:
        The report: every question with both answers, and the scores. In mode "sequence" it describes the state after
        the last edit, and `EditReport.curve` the way there.

    Raises:
        EditError: No records, a baseline that lacks a question or was measured with other settings, or an editor that
            does not fit the mode.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path
        >>> from multrace.editing import Probe, Record
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> case, other = world.edit_cases("outdated", "choose")[:2]
        >>> pictures = [world.picture(world.entities[each.fact.entity], 0).image for each in (case, other)]
        >>> prompts = [vlm.prompt(picture, world.question(case.fact).text) for picture in pictures]
        >>> probe = Probe(kind="same_question_other_picture", prompt=prompts[1])
        >>> record = Record(request=mt.EditRequest(prompt=prompts[0], target=case.target), probes=(probe,))
        >>> report = mt.evaluate(vlm, [record], mt.MultEdit(layer=5), progress=False)
        >>> report.rows[0].after == case.target
        True
    """
    if mode not in MODES:
        raise EditError(f"no evaluation mode {mode!r}; pass one of {', '.join(map(repr, MODES))}")
    is_change = hasattr(editor, "applied")
    if is_change and mode != BATCH:
        raise EditError(
            f"mode {mode!r} makes each edit itself and needs an editor, but got a {type(editor).__name__}; "
            "pass the editor, or mode='batch' for a change that was made before"
        )
    if general and mode == SEQUENCE:
        raise EditError("general questions are asked in modes 'single' and 'batch'; leave them out of a sequence")
    if prompt_transform is not None and mode != BATCH:
        raise EditError(f"prompt_transform belongs to mode 'batch'; in mode {mode!r} each change brings its own")
    if baseline is None:
        options = {"general": general, "settings": settings, "batch_size": batch_size, "progress": progress}
        baseline = measure_baseline(vlm, records, **options)
    elif settings not in (None, baseline.settings):
        raise EditError(
            f"the baseline was measured with {baseline.settings}, not {settings}; pass the same settings to baseline()"
        )
    options = {"batch_size": batch_size, "progress": progress}
    if mode == BATCH:
        change = editor if is_change else _change_of_all(vlm, records, edit_function(vlm, editor, moments))
        return _evaluate_batch(vlm, records, change, baseline, general, prompt_transform, **options)
    edit = edit_function(vlm, editor, moments)
    if mode == SEQUENCE:
        return evaluate_sequence(vlm, records, edit, baseline, at=at, norm_bound=norm_bound or NormBound(), **options)
    return _evaluate_single(vlm, records, edit, baseline, general, **options)


def edit_function(
    vlm: VisionLanguageModel, editor: Editor | EditFunction, moments: Moments | None = None
) -> EditFunction:
    """Return the editor as a function; a cost that no edit changes is factorised once for all edits."""
    if isinstance(editor, ClosedFormEditor):
        options: dict[str, Any] = {"moments": moments, "progress": False}
        if moments is not None and editor.has_fixed_cost:
            options["costs"] = editor.costs(vlm, moments)
        return lambda model, requests, earlier: editor.edit(model, requests, earlier=tuple(earlier), **options)
    if isinstance(editor, Editor):
        return lambda model, requests, _earlier: editor.edit(model, requests, progress=False)
    return editor


def _change_of_all(vlm: VisionLanguageModel, records: Sequence[Record], edit: EditFunction) -> Change:
    names_of(records)
    return edit(vlm, [record.request for record in records], ())


def _evaluate_batch(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    change: Change,
    reference: Baseline,
    general: General,
    prompt_transform: PromptTransform | None,
    **options: Any,
) -> EditReport:
    """Return the report on one change that makes all edits at once."""
    everything = questions_of(records, general)
    questions = unedited_by_others(everything, records)
    transform = prompt_transform or transform_of(change)
    with change.applied(vlm):
        after = ask(vlm, questions, reference, prompt_transform=transform, settings=reference.settings, **options)
    statuses = dict(zip(names_of(records), statuses_of(change, len(records)), strict=True))
    rows = rows_of(questions, reference.responses, after)
    left_out = len(everything) - len(questions)
    return report_of(vlm, BATCH, reference.settings, rows, statuses=statuses, left_out=left_out)


def _evaluate_single(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    edit: EditFunction,
    reference: Baseline,
    general: General,
    *,
    batch_size: int,
    progress: bool,
) -> EditReport:
    """Return the report on edits each of which was made on the unedited model, measured and undone."""
    options = {"settings": reference.settings, "batch_size": batch_size, "progress": False}
    rows: list[ProbeRow] = []
    statuses = {}
    bar = tqdm(records, desc="edits, one at a time", unit="edit", disable=not progress)
    for name, record in zip(names_of(records), bar, strict=True):
        questions = [*record_questions(name, record), *general_questions(general, record=name)]
        change, statuses[name] = attempt(vlm, edit, record.request, ())
        after = reference.responses
        if change is not None:
            with change.applied(vlm):
                after = ask(vlm, questions, reference, prompt_transform=transform_of(change), **options)
        rows += rows_of(questions, reference.responses, after)
    return report_of(vlm, SINGLE, reference.settings, rows, statuses=statuses)
