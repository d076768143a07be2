"""Evaluation of edits, made one at a time, all at once, or one on top of the other, beside the unedited model."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

import torch
from tqdm import tqdm

from ...data.facts import EFFICACY, EditRecord, EditRequest, Question
from ...models import ModelError, VisionLanguageModel
from ..changes import Change, EditSession
from ..moments import Moments
from ..requests import FAILED, EditError
from ..solve import Editor
from .asking import (
    Baseline,
    Check,
    PromptTransform,
    asked_together,
    baseline as measure_baseline,
    checks_of,
    general_checks,
    lacking,
    measured,
    measured_now,
    names_of,
    seen_statuses,
    statuses_of,
    transform_of,
)
from .metrics import EXACT, Interval, bootstrap_interval
from .reports import MEANS, EditCurve, EditReport, EvaluationSettings, LeftOut, ProbeRow, SequencePoint

logger = logging.getLogger("multrace")
AT = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which a sequence is measured by default, as published curves have them."""
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordResult:
    """One edit made on the unedited model, measured and undone: one unit of a run that can be resumed."""

    record: str
    """The record's id."""
    status: str
    """"edited", "not generated", "nothing to do", or "failed: " and why."""
    rows: tuple[ProbeRow, ...]
    left_out: tuple[LeftOut, ...] = ()


def evaluate(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    editor: Editor | Change,
    *,
    mode: Literal["single", "batch", "sequence"] = "single",
    moments: Moments | None = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
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
    answer for one record, but whose answer another record is meant to change, is left out and listed in
    `EditReport.left_out`; so is, in every mode, a probe that needs an edit that is not in the model.

    Prompts are made and questions are asked in blocks of a few batches, and each block is reduced to the numbers of the
    report before the next one: memory for questions does not grow with the number of records. What grows is the report,
    and in modes "batch" and "sequence" the factors of closed-form edits: 8 (width + hidden) bytes on the CPU for each
    edited key, where width and hidden are those of the edited projection.

    Args:
        vlm: The unedited model.
        records: The edits to make, each with the questions about it.
        editor: The editor that makes the edits, in one session; or, in mode "batch", a change that was made before.
        mode: "single" makes, measures and undoes one edit at a time. "batch" puts all edits into the model at once.
            "sequence" makes each edit on top of the earlier ones, whose keys closed-form editors know.
        moments: Second moments of keys, for editors that need them.
        baseline: The responses of the unedited model, from `baseline` with the same questions and settings; measured
            here by default. Pass one where several editors are evaluated on the same records.
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
        >>> from multrace.data import Probe, World, tiny_vlm_path
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> case, other = world.edit_cases("outdated", "choose")[:2]
        >>> pictures = [world.picture(world.entities[each.fact.entity], 0).image for each in (case, other)]
        >>> text = world.question(case.fact).text
        >>> questions = [mt.Question(text=text, image=picture) for picture in pictures]
        >>> probe = Probe(kind="same_question_other_picture", question=questions[1])
        >>> record = mt.EditRecord(question=questions[0], target=case.target, probes=[probe])
        >>> report = mt.evaluate(vlm, [record], mt.MultEdit(layer=5), progress=False)
        >>> report.rows[0].after == case.target
        True
    """
    is_change, maker = hasattr(editor, "applied"), cast(Editor, editor)
    _check_mode(mode, type(editor).__name__ if is_change else "", general, prompt_transform)
    settings = _settings(settings, baseline)
    names = names_of(records)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if mode == BATCH:
        change = cast(Change, editor) if is_change else maker.start(vlm, moments=moments).propose(records)
        transform = prompt_transform or transform_of(change)
        options |= {"settings": settings, "reference": baseline, "transform": transform}
        return _evaluate_batch(vlm, dict(zip(names, records, strict=True)), change, general, **options)
    if mode == SEQUENCE:
        reference = baseline or measure_baseline(vlm, records, settings=settings, **options)
        bound, session = norm_bound or NormBound(), maker.start(vlm, moments=moments)
        states = sequence_states(vlm, records, session, reference, at=at, norm_bound=bound, **options)
        return sequence_report(vlm, states, reference, number=len(records), bound=bound.growth)
    given = {"baseline": baseline, "general": general, "settings": settings}
    results = [*evaluate_each(vlm, records, maker, moments=moments, **given, **options)]
    return EditReport.of(
        vlm,
        SINGLE,
        settings,
        [row for result in results for row in result.rows],
        statuses={result.record: result.status for result in results},
        left_out=tuple(each for result in results for each in result.left_out),
    )


def evaluate_each(
    vlm: VisionLanguageModel,
    records: Iterable[EditRecord],
    editor: Editor,
    *,
    moments: Moments | None = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Iterator[RecordResult]:
    """Yield the result of each record as it is finished: its edit is made on the unedited model, measured and undone.

    The result of a record does not depend on the others, so that a run can be interrupted between any two, and spread
    over processes. `evaluate` collects the results in a report.

    Args:
        vlm: The unedited model.
        records: The edits to make, each with the questions about it; any iterable, which is read one by one.
        editor: As in `evaluate`.
        moments: As in `evaluate`.
        baseline: As in `evaluate`; None asks the unedited model about each record before its edit.
        general: As in `evaluate`.
        settings: As in `evaluate`.
        batch_size: As in `evaluate`.
        progress: Show a progress bar.

    Raises:
        EditError: A baseline that lacks a question or was measured with other settings, or two records with one id.
    """
    settings, session = _settings(settings, baseline), editor.start(vlm, moments=moments)
    options = {"settings": settings, "reference": baseline, "batch_size": batch_size}
    ids: set[str] = set()
    for index, record in enumerate(tqdm(records, desc="edits, one at a time", unit="edit", disable=not progress)):
        name = record.id or str(index)
        if name in ids:
            raise EditError(f"two records have the id {name!r}; give each one its own, or none an id")
        ids.add(name)
        change, status = _attempt(session.propose, record)
        yield measured_edit(vlm, name, record, change, status, general=general, **options)


def _attempt(make: Callable[[Sequence[EditRequest]], Change], request: EditRequest) -> tuple[Change | None, str]:
    """The change of one request and its status; the change is None if it could not be made."""
    try:
        change = make([request])
    except (EditError, ModelError) as error:
        return None, f"{FAILED}: {error}"
    return change, statuses_of(change, 1)[0]


def measured_edit(
    vlm: VisionLanguageModel,
    name: str,
    record: EditRecord,
    change: Change | None,
    status: str,
    *,
    general: Sequence[Question] = (),
    settings: EvaluationSettings,
    reference: Baseline | None = None,
    batch_size: int,
) -> RecordResult:
    """Return what one edit, alone in the model, makes of the questions about it; the model ends unedited.

    Args:
        vlm: The unedited model.
        name: What the result calls the record.
        record: The edit, with the questions about it.
        change: The change that makes it; None for an edit that could not be made.
        status: What became of the edit.
        general: Held-out questions with their right answers.
        settings: What is measured.
        reference: Responses of the unedited model that were measured before.
        batch_size: Number of questions that are answered together.

    Raises:
        EditError: The reference lacks a question, or the change does not fit the model.
    """
    edited = () if change is None else (name,)
    checks = [*checks_of(name, record), *general_checks(general, record=name)]
    left_out = tuple(missing for check in checks if (missing := lacking(check, edited)))
    asked = [check for check in checks if not lacking(check, edited)]
    options = {"settings": settings, "reference": reference, "batch_size": batch_size}
    rows = measured(vlm, asked, change, transform=transform_of(change), **options)
    return RecordResult(record=name, status=seen_statuses({name: status}, rows)[name], rows=rows, left_out=left_out)


def _evaluate_batch(
    vlm: VisionLanguageModel,
    records: dict[str, EditRecord],
    change: Change,
    general: Sequence[Question],
    *,
    settings: EvaluationSettings,
    **options: Any,
) -> EditReport:
    """Return the report on one change that makes all edits at once."""
    statuses = dict(zip(records, statuses_of(change, len(records)), strict=True))
    edited = [name for name, status in statuses.items() if not status.startswith(FAILED)]
    every = [check for name, record in records.items() for check in checks_of(name, record)]
    checks, left_out = asked_together([*every, *general_checks(general)], records, edited)
    rows = measured(vlm, checks, change, settings=settings, **options)
    return EditReport.of(vlm, BATCH, settings, rows, statuses=seen_statuses(statuses, rows), left_out=left_out)


def batch_checks(
    records: Mapping[str, EditRecord], statuses: Mapping[str, str], general: Sequence[Question]
) -> tuple[dict[str, list[Check]], tuple[LeftOut, ...]]:
    """Return the questions of each record whose edit is in the model, and those that are left out.

    Held-out questions are shared out among these records.

    Args:
        records: The records by id.
        statuses: What became of the edit of each record.
        general: Held-out questions with their right answers.
    """
    edited = [name for name, status in statuses.items() if not status.startswith(FAILED)]
    every = [check for name, record in records.items() for check in checks_of(name, record)]
    asked, left_out = asked_together(every, records, edited)
    checks: dict[str, list[Check]] = {name: [] for name in records}
    for check in asked:
        checks[check.record].append(check)
    for index, check in enumerate(general_checks(general) if edited else ()):
        checks[edited[index % len(edited)]].append(check)
    return checks, left_out


def _check_mode(mode: str, change: str, general: Sequence[Question], prompt_transform: PromptTransform | None) -> None:
    """Raise `EditError` if the arguments do not fit the mode. change: type of a change made before, if any."""
    if mode not in MODES:
        raise EditError(f"no evaluation mode {mode!r}; pass one of {', '.join(map(repr, MODES))}")
    if change and mode != BATCH:
        raise EditError(
            f"mode {mode!r} makes each edit itself and needs an editor, but got a {change}; "
            "pass the editor, or mode='batch' for a change that was made before"
        )
    if general and mode == SEQUENCE:
        raise EditError("general questions are asked in modes 'single' and 'batch'; leave them out of a sequence")
    if prompt_transform is not None and mode != BATCH:
        raise EditError(f"prompt_transform belongs to mode 'batch'; in mode {mode!r} each change brings its own")


def _settings(settings: EvaluationSettings | None, baseline: Baseline | None) -> EvaluationSettings:
    """Return what is measured. Raises `EditError` for a baseline that was measured with other settings."""
    if baseline is not None and settings not in (None, baseline.settings):
        raise EditError(
            f"the baseline was measured with {baseline.settings}, not {settings}; pass the same settings to baseline()"
        )
    return settings or (EvaluationSettings() if baseline is None else baseline.settings)


class SequenceSteps:
    """Edits made one on top of the other, with what is measured on the way. Used in a `with`, which begins the session.

    Args:
        vlm: The unedited model.
        session: The session that makes the edits, not begun yet.
        reference: The responses of the unedited model to all questions.
        norm_bound: Largest growth of an edited weight's norm, and whether to stop there.
    """

    def __init__(
        self, vlm: VisionLanguageModel, session: EditSession, reference: Baseline, *, norm_bound: NormBound
    ) -> None:
        self.vlm, self.session, self.reference, self.norm_bound = vlm, session, reference, norm_bound
        self.records: dict[str, EditRecord] = {}
        self.statuses: dict[str, str] = {}
        self.edited: set[str] = set()
        """Records whose edits are in the model."""
        self.worked: dict[str, bool] = {}
        """Record -> its question gave the target right after its edit."""
        self.growth = 0.0
        self.exceeded_at: int | None = None
        self._before: dict[str, float] = {}

    def __enter__(self) -> Self:
        self.session.__enter__()
        self._before = _norms(self.vlm, _matrices(self.vlm))
        return self

    def __exit__(self, *error: Any) -> None:
        self.session.__exit__(*error)

    @property
    def count(self) -> int:
        """The number of edits so far, those that failed included."""
        return len(self.records)

    @property
    def is_stopped(self) -> bool:
        """Whether the norm of a weight has grown so far that the sequence is to end."""
        return self.norm_bound.stop and self.exceeded_at is not None

    def make(self, record: EditRecord, *, batch_size: int) -> tuple[Change | None, dict[str, Any]]:
        """Make one edit on top of the others, and return its change, None if it failed, and its row of a table.

        `restore` takes both to go on later. The record has an id.
        """
        name = record.id
        change, status = _attempt(self.session.edit, record)
        if self.session.prompt_transform is not None:
            raise EditError("an edit that works in the prompt has no sequence; pass mode='single' or mode='batch'")
        self.records[name], self.statuses[name] = record, status
        if change is not None:
            self.edited.add(name)
            self.growth = max(self.growth, _growth(self.vlm, change, self._before))
        own = next(checks_of(name, record))
        (row,) = measured_now(self.vlm, [own], self.reference, settings=self.reference.settings, batch_size=batch_size)
        self.worked[name] = row.numbers[EXACT][1] == 1
        self._watch()
        said = {"question": row.question, "target": row.new, "status": status, "before": row.before, "after": row.after}
        return change, said | {"worked": self.worked[name], "growth": self.growth}

    def restore(self, record: EditRecord, change: Change | None, row: Mapping[str, Any]) -> None:
        """Put an edit that was made before into the model, in the order in which the edits were made."""
        self.records[record.id], self.statuses[record.id] = record, row["status"]
        if change is not None:
            self.session.adopt([record], change)
            self.edited.add(record.id)
        self.worked[record.id], self.growth = row["worked"], row["growth"]
        if self.exceeded_at is None and self.growth > self.norm_bound.growth:
            self.exceeded_at = self.count

    def measure(self, *, batch_size: int) -> SequenceState:
        """Return the state after the edits so far; all their questions are asked by free generation."""
        checks, left_out = self._checks()
        settings = self.reference.settings
        rows = measured_now(self.vlm, checks, self.reference, settings=settings, batch_size=batch_size)
        return self._state(rows, left_out, is_last=False)

    def finish(self, stack: ExitStack, *, batch_size: int, progress: bool = False) -> SequenceState:
        """End the session, which `stack` holds, and return the last state with all measurements."""
        edited = self.session.state()
        stack.close()
        checks, left_out = self._checks()
        options = {"settings": self.reference.settings, "reference": self.reference, "batch_size": batch_size}
        rows = measured(self.vlm, checks, edited, progress=progress, **options)
        return self._state(rows, left_out, is_last=True)

    def _checks(self) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
        """All questions of the edits so far, and those that mean nothing while all these edits are made."""
        every = (check for name, record in self.records.items() for check in checks_of(name, record))
        return asked_together(every, self.records, self.edited)

    def _state(self, rows: Sequence[ProbeRow], left_out: Sequence[LeftOut], *, is_last: bool) -> SequenceState:
        return SequenceState(
            point=self._point(rows),
            rows=tuple(rows),
            statuses=seen_statuses(self.statuses, rows),
            left_out=tuple(left_out),
            exceeded_at=self.exceeded_at,
            is_last=is_last,
        )

    def _point(self, rows: Sequence[ProbeRow]) -> SequencePoint:
        holds = {row.record: row.numbers[EXACT][1] == 1 for row in rows if row.aspect == EFFICACY}
        worked = [name for name, has_worked in self.worked.items() if has_worked]
        first, seed = next(iter(self.worked)), self.reference.settings.seed
        return SequencePoint(
            edits=self.count,
            first_holds=holds[first] if self.worked[first] else None,
            retention=sum(holds[name] for name in worked) / len(worked) if worked else float("nan"),
            growth=self.growth,
            **{name: _mean(rows, name, seed) for name in MEANS},
        )

    def _watch(self) -> None:
        if self.exceeded_at is None and self.growth > self.norm_bound.growth:
            self.exceeded_at = self.count
            logger.warning(
                "after %d edits the norm of an edited weight has grown by %.1f %%, more than %.1f %%; "
                "expect earlier edits and other answers to suffer; fewer edits, a larger ridge or a clamp may help",
                *(self.count, 100 * self.growth, 100 * self.norm_bound.growth),
            )


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

    All questions of all edits so far are asked by free generation; the other measurements are made after the last edit.
    The model ends bit-equal to how it began.

    Args:
        vlm: The unedited model.
        records: The edits in order, with the questions about them.
        session: The session that makes the edits, which begins and ends here.
        reference: The responses of the unedited model to all questions.
        at: Numbers of edits after which to measure.
        norm_bound: Largest growth of an edited weight's norm, and whether to stop there.
        batch_size: Number of questions that are answered together.
        progress: Show progress bars.
    """
    names = names_of(records)
    steps = SequenceSteps(vlm, session, reference, norm_bound=norm_bound)
    with ExitStack() as stack:
        stack.enter_context(steps)
        bar = tqdm(records, desc="edits in sequence", unit="edit", disable=not progress)
        for name, record in zip(names, bar, strict=True):
            steps.make(replace(record, id=name), batch_size=batch_size)
            if steps.count == len(records) or steps.is_stopped:
                break
            if steps.count in at:
                yield steps.measure(batch_size=batch_size)
        yield steps.finish(stack, batch_size=batch_size, progress=progress)


def sequence_report(
    vlm: VisionLanguageModel, states: Iterable[SequenceState], reference: Baseline, *, number: int, bound: float
) -> EditReport:
    """Return the report on the state after the last edit, with the curve of the checkpoints on the way.

    Of every other state only its point is kept.

    Args:
        vlm: The unedited model.
        states: At least one state, in order; they are read one by one.
        reference: The responses of the unedited model.
        number: Number of edits that there were to make.
        bound: Growth of a weight's norm beyond which a warning is logged.
    """
    points: list[SequencePoint] = []
    for last in states:
        points.append(last.point)
    edits = last.point.edits
    curve = EditCurve(
        model=vlm.name,
        revision=vlm.revision,
        points=tuple(points),
        statuses=last.statuses,
        bound=bound,
        exceeded_at=last.exceeded_at,
        stopped_at=edits if edits < number else None,
    )
    parts = {"statuses": last.statuses, "left_out": last.left_out, "curve": curve}
    return EditReport.of(vlm, "sequence", reference.settings, last.rows, **parts)


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


def _mean(rows: Sequence[ProbeRow], aspect: str, seed: int) -> Interval:
    chosen = [row for row in rows if row.aspect == aspect and MEANS[aspect] in row.numbers]
    return bootstrap_interval(
        [row.numbers[MEANS[aspect]][1] for row in chosen], [row.record for row in chosen], seed=seed
    )
