"""Evaluates edits beside the unedited model. Edits are made one at a time, all at once, or one on top of the other."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

import torch
from tqdm import tqdm

from ...data.facts import EFFICACY, GENERAL, EditRecord, EditRequest, Question
from ...models import ModelError, VisionLanguageModel
from ..changes import Change, EditSession
from ..moments import MomentSource, OwnMoments, pictures_of_requests
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
"""Numbers of edits after which a sequence is measured by default, those at which published curves have points."""
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """How far the norm of an edited weight may grow in a sequence. A norm that keeps growing ruins earlier edits.

    Raises `EditError` if the growth is below 0.
    """

    growth: float = 0.1
    """Relative growth of a weight's Frobenius norm beyond which a warning is logged; 0.1 is ten percent."""
    stop: bool = False
    """Whether the sequence also ends after the edit that exceeds the bound."""

    def __post_init__(self) -> None:
        if self.growth < 0:
            raise EditError(f"the largest growth of a weight's norm is {self.growth}; pass at least 0, such as 0.1")


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceState:
    """A sequence, measured after some number of edits: one unit of a run that can be resumed."""

    point: SequencePoint
    """The means over the rows."""
    rows: tuple[ProbeRow, ...]
    """All questions of the edits so far, measured by free generation only, or with all protocols if `is_last`."""
    statuses: dict[str, str]
    """Record -> "edited", "not generated", "nothing to do", or "failed: " and the reason, for the edits so far."""
    left_out: tuple[LeftOut, ...]
    """Questions that were not asked, and why."""
    exceeded_at: int | None
    """Number of edits at which the growth first exceeded the bound; None if it has not."""
    is_last: bool
    """Whether this is the state after the last edit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordResult:
    """One edit, made on the unedited model, measured and undone: one unit of a run that can be resumed."""

    record: str
    """Id of the record."""
    status: str
    """"edited", "not generated", "nothing to do", or "failed: " and the reason."""
    rows: tuple[ProbeRow, ...]
    """The questions about the edit, with both answers."""
    left_out: tuple[LeftOut, ...] = ()
    """Questions that were not asked, and why."""


def evaluate(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    editor: Editor | Change,
    *,
    mode: Literal["single", "batch", "sequence"] = "single",
    moments: MomentSource = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
    prompt_transform: PromptTransform | None = None,
    at: Sequence[int] = AT,
    norm_bound: NormBound | None = None,
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> EditReport:
    """Return a report on the edits of the records: all their questions, asked of the unedited and the edited model.

    The edits are made here, and the model ends bit-equal to how it began. A request that cannot be edited is named in
    `EditReport.statuses`, and its questions are asked without its edit. Questions are listed in `EditReport.left_out`
    instead of being asked in two cases: in every mode, if the answer needs an edit that is not in the model; in modes
    "batch" and "sequence", if the answer should stay for one record and another record is meant to change it.

    Prompts are made and questions are asked in blocks of four batches, and each block is reduced to rows of the report
    before the next one. Memory for questions therefore does not grow with the number of records. What grows is the
    report and, in modes "batch" and "sequence", the factors of closed-form edits: 8 (width + hidden) bytes on the CPU
    for each edited key, where width and hidden are those of the edited projection.

    Args:
        vlm: The unedited model.
        records: The edits to make, each with the questions about it.
        editor: The editor that makes the edits, in one session; or, in mode "batch", a change that was made before.
        mode: "single" makes, measures and undoes one edit at a time. "batch" puts all edits into the model at once.
            "sequence" makes each edit on top of the earlier ones, whose keys closed-form editors know.
        moments: Second moments of keys, for editors that need them; as in `MultEdit.start`. By default (None) they are
            those of own samples, also about the pictures of the first records.
        baseline: The responses of the unedited model, from `baseline` with the same questions and settings; None to
            measure them here. Pass it if several editors are evaluated on the same records.
        general: Held-out questions with their right answers, which measure general ability (modes "single" and
            "batch"); by default none. In mode "single" each of them is asked after every edit.
        prompt_transform: Turns each prompt into the one that the edited model is given, for changes that work in the
            prompt (mode "batch"); None for the `prompt_transform` of the change, if it has one.
        at: Numbers of edits after which a sequence is measured by free generation. All protocols are measured after
            the last edit.
        norm_bound: How far the norm of an edited weight may grow in a sequence, and whether to stop there; None for
            the defaults of `NormBound`.
        settings: What is measured; None for the settings of the baseline, or the defaults without one.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show progress bars.

    Returns:
        Every question with both answers, and the scores. In mode "sequence" the report describes the state after the
        last edit, and `EditReport.curve` the states before it.

    Raises:
        EditError: There are no records, two records have the same id, a held-out question has no answer, the baseline
            lacks a question or was measured with other settings, the arguments do not fit the mode, or, in mode
            "batch", no request can be edited.
        DataError: As in `baseline`.
        ModelError: As in `baseline`.

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
    if moments is None:  # nothing is sampled before an editor asks for it
        moments = OwnMoments(vlm, pictures=pictures_of_requests(records), progress=progress)
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
    moments: MomentSource = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Iterator[RecordResult]:
    """Yield the result of each record as soon as it is measured: its edit is made on the unedited model and undone.

    The result of a record does not depend on the others, so that a run can be interrupted between any two, and spread
    over processes. `evaluate` collects the results in a report. The model is unedited whenever a result is yielded.

    Args:
        vlm: The unedited model.
        records: The edits to make, each with the questions about it; any iterable, whose records are read one by one.
        editor: The editor that makes the edits.
        moments: Second moments of keys, for editors that need them; as in `MultEdit.start`. By default (None) they are
            those of own samples, also about the pictures of the first record.
        baseline: The responses of the unedited model to all questions, from `baseline` with the same settings; None to
            ask the unedited model about each record.
        general: Held-out questions with their right answers, which are asked after every edit; by default none.
        settings: What is measured; None for the settings of the baseline, or the defaults without one.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show a progress bar.

    Yields:
        The rows and the status of one record, in the order of the records.

    Raises:
        EditError: The baseline lacks a question or was measured with other settings, two records have the same id, or
            a held-out question has no answer.
        DataError: As in `baseline`.
        ModelError: As in `baseline`.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import evaluate_each
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro", id="winner")
        >>> for result in evaluate_each(vlm, [record], mt.MultEdit(layer=5, steps=25), progress=False):
        ...     print(result.record, result.status, result.rows[0].after)
        winner edited Pruro
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
    """The change for one request and its status; the change is None if it could not be made."""
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
    """Return the result of one edit that is alone in the model: the questions about it; the model ends unedited.

    Args:
        vlm: The unedited model.
        name: Id of the record in the result.
        record: The edit, with the questions about it.
        change: The change that makes the edit; None for an edit that could not be made.
        status: Status of the edit, such as "edited" or "failed: " and the reason.
        general: Held-out questions with their right answers; by default none.
        settings: What is measured.
        reference: The responses of the unedited model to all these questions; None to ask it here.
        batch_size: Number of questions that are answered together; it bounds memory.

    Returns:
        The rows of all questions that do not need another edit, and the status: "not generated" in place of "edited"
        if the question of the record is not answered with its target.

    Raises:
        EditError: The reference lacks a question, the change does not fit the model, or a held-out question has no
            answer.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.evaluation import EvaluationSettings, measured_edit
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro")
        >>> change = mt.MultEdit(layer=5, steps=25).edit(vlm, [record], progress=False)
        >>> settings = EvaluationSettings(forced=False)
        >>> measured_edit(vlm, "a", record, change, "edited", settings=settings, batch_size=8).status
        'edited'
        >>> measured_edit(vlm, "a", record, None, "failed: no layer", settings=settings, batch_size=8).status
        'failed: no layer'
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
    checks, left_out = _asked(records, edited, general)
    rows = measured(vlm, checks, change, settings=settings, **options)
    return EditReport.of(vlm, BATCH, settings, rows, statuses=seen_statuses(statuses, rows), left_out=left_out)


def batch_checks(
    records: Mapping[str, EditRecord], statuses: Mapping[str, str], general: Sequence[Question]
) -> tuple[dict[str, list[Check]], tuple[LeftOut, ...]]:
    """Return the questions to ask about each record while all edits are in the model, and those that are left out.

    Held-out questions are distributed over the records whose edits are in the model; they are dropped if there are
    none.

    Args:
        records: The records by id.
        statuses: Record -> status of its edit.
        general: Held-out questions with their right answers.

    Returns:
        Record -> its checks, for every record; and the checks that `asked_together` leaves out.
    """
    edited = [name for name, status in statuses.items() if not status.startswith(FAILED)]
    asked, left_out = _asked(records, edited, general)
    held_out = general_checks(general) if edited else ()
    homes = {check.record: edited[index % len(edited)] for index, check in enumerate(held_out)}
    checks: dict[str, list[Check]] = {name: [] for name in records}
    for check in asked:
        if home := homes.get(check.record) if check.kind == GENERAL else check.record:
            checks[home].append(check)
    moved = (replace(each, record=homes.get(each.record, "")) if each.kind == GENERAL else each for each in left_out)
    return checks, tuple(each for each in moved if each.record)


def _asked(
    records: Mapping[str, EditRecord], edited: Sequence[str], general: Sequence[Question]
) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
    """The questions of all records and the held-out ones, without and with those that are left out."""
    every = [check for name, record in records.items() for check in checks_of(name, record)]
    return asked_together([*every, *general_checks(general)], records, edited)


def _check_mode(mode: str, change: str, general: Sequence[Question], prompt_transform: PromptTransform | None) -> None:
    """Raise `EditError` if the arguments do not fit the mode. change: class of a given change; "" for an editor."""
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
    """Edits that are made one on top of the other and measured on the way.

    A `with` begins and ends the session: inside the block the model has all edits so far, and on any exit it is
    bit-equal to before.

    Args:
        vlm: The unedited model.
        session: The session that makes the edits; it must not have begun.
        reference: The responses of the unedited model to all questions.
        norm_bound: How far the norm of an edited weight may grow, and whether to stop there.
    """

    def __init__(
        self, vlm: VisionLanguageModel, session: EditSession, reference: Baseline, *, norm_bound: NormBound
    ) -> None:
        self.vlm, self.session, self.reference, self.norm_bound = vlm, session, reference, norm_bound
        self.records: dict[str, EditRecord] = {}
        self.statuses: dict[str, str] = {}
        self.edited: set[str] = set()
        """Ids of the records whose edits are in the model."""
        self.worked: dict[str, bool] = {}
        """Record -> whether its question got the target right after its edit."""
        self.growth = 0.0
        """Largest relative growth of the norm of any edited weight after any edit so far."""
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
        """Number of edits so far, those that failed included."""
        return len(self.records)

    @property
    def is_stopped(self) -> bool:
        """Whether the sequence has to end because the norm of a weight has exceeded the bound."""
        return self.norm_bound.stop and self.exceeded_at is not None

    def make(self, record: EditRecord, *, batch_size: int) -> tuple[Change | None, dict[str, Any]]:
        """Make one edit on top of the others, and return its change (None if it failed) and its row of a table.

        The model keeps the edit. `restore` takes both values in a later process. The record needs an id. Raises
        `EditError` for an editor that works in the prompt.
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
        """Put an edit that `make` made in an earlier process into the model; edits are restored in their order."""
        self.records[record.id], self.statuses[record.id] = record, row["status"]
        if change is not None:
            self.session.adopt([record], change)
            self.edited.add(record.id)
        self.worked[record.id], self.growth = row["worked"], row["growth"]
        if self.exceeded_at is None and self.growth > self.norm_bound.growth:
            self.exceeded_at = self.count

    def measure(self, *, batch_size: int) -> SequenceState:
        """Return the state after the edits so far, measured by free generation on all their questions."""
        checks, left_out = self._checks()
        settings = self.reference.settings
        rows = measured_now(self.vlm, checks, self.reference, settings=settings, batch_size=batch_size)
        return self._state(rows, left_out, is_last=False)

    def finish(self, stack: ExitStack, *, batch_size: int, progress: bool = False) -> SequenceState:
        """Return the last state with all protocols. It ends the session by closing `stack`, which entered this object.

        The unedited model can then be asked too; the edited weights are put back while the edited half is measured.
        """
        edited = self.session.state()
        stack.close()
        checks, left_out = self._checks()
        options = {"settings": self.reference.settings, "reference": self.reference, "batch_size": batch_size}
        rows = measured(self.vlm, checks, edited, progress=progress, **options)
        return self._state(rows, left_out, is_last=True)

    def _checks(self) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
        """The questions of the edits so far to ask, and those that cannot be judged while all these edits are made."""
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
    """Yield the state of a sequence after each number of edits in `at`, and after the last edit.

    All questions of the edits so far are asked by free generation, and with all protocols after the last edit. The
    model has the edits so far whenever a state but the last is yielded, and ends bit-equal to how it began.

    Args:
        vlm: The unedited model.
        records: The edits in order, with the questions about them.
        session: The session that makes the edits, which begins and ends here.
        reference: The responses of the unedited model to all questions.
        at: Numbers of edits after which to measure.
        norm_bound: How far the norm of an edited weight may grow, and whether to stop there.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show progress bars.

    Raises:
        EditError: There are no records, two records have the same id, the reference lacks a question, or the editor
            works in the prompt.
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
    """Return the report on the last state, with a curve of the points of all states.

    Args:
        vlm: The model; only its name and revision are read.
        states: At least one state, in order. They are read one by one, and only the last one is kept whole.
        reference: The responses of the unedited model, whose settings the report gets.
        number: Number of records of the sequence; with fewer edits in the last state, the curve says it was stopped.
        bound: Relative growth of a weight's norm beyond which a warning is logged.
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
    """The Frobenius norms of the weights by name, summed in float64."""
    return {name: torch.linalg.vector_norm(vlm.weight(name), dtype=torch.float64).item() for name in names}


def _growth(vlm: VisionLanguageModel, change: Change, norms: dict[str, float]) -> float:
    """The largest relative growth since the start among the weights that the change may have touched."""
    touched = getattr(change, "fingerprints", norms)  # all weights if the change does not name its own
    names = [name for name in touched if name in norms]
    return max((norm / norms[name] - 1 for name, norm in _norms(vlm, names).items() if norms[name] > 0), default=0.0)


def _mean(rows: Sequence[ProbeRow], aspect: str, seed: int) -> Interval:
    chosen = [row for row in rows if row.aspect == aspect and MEANS[aspect] in row.numbers]
    return bootstrap_interval(
        [row.numbers[MEANS[aspect]][1] for row in chosen], [row.record for row in chosen], seed=seed
    )
