"""Evaluates edits beside the unedited model. Edits are made one at a time, all at once, or one on top of the other."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from tqdm import tqdm

from ...data.facts import GENERAL, EditRecord, Question
from ...models import VisionLanguageModel
from ..changes import Change
from ..moments import MomentSource, OwnMoments, pictures_of_requests
from ..requests import FAILED, EditError
from ..solve import Editor
from .ability import AbilityTests, ability_tests
from .asking import (
    Baseline,
    PromptTransform,
    baseline as measure_baseline,
    measured,
    seen_statuses,
    statuses_of,
    transform_of,
)
from .checks import Check, asked_together, checks_of, general_checks, lacking, names_of
from .costs import CostMeter
from .judging import Judge
from .reports import EditReport, EvaluationSettings, LeftOut, ProbeRow
from .sequences import NormBound, attempt, sequence_report, sequence_states

logger = logging.getLogger("multrace")
AT = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which a sequence is measured by default, those at which published curves have points."""
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


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
    seconds: float = field(default=0.0, compare=False)
    """Time that the edit took, without the questions about it; 0 for an edit that was made before."""


def evaluate(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    editor: Editor | Change,
    *,
    mode: Literal["single", "batch", "sequence"] = "single",
    moments: MomentSource = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
    texts: Sequence[str] = (),
    cloze: Sequence[Question] = (),
    prompt_transform: PromptTransform | None = None,
    at: Sequence[int] = AT,
    per_step: int = 1,
    norm_bound: NormBound | None = None,
    judge: Judge | None = None,
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
        texts: Texts whose perplexity is measured, besides those that `settings.perplexity_texts` lets the unedited
            model sample; by default none. As the cloze questions, they are asked after every edit in mode "single", and
            at every point of a sequence.
        cloze: Questions with right answers about facts that no edit touches, from `cloze_questions` or a file; those
            that the unedited model answers rightly, and that no edit is meant to change, are asked in every mode. By
            default none.
        prompt_transform: Turns each prompt into the one that the edited model is given, for changes that work in the
            prompt (mode "batch"); None for the `prompt_transform` of the change, if it has one.
        at: Numbers of edits after which a sequence is measured by free generation, at the end of the step that reaches
            them. All protocols are measured after the last edit.
        per_step: Number of edits that a sequence makes together in one step, such as 100.
        norm_bound: How far the norm of an edited weight may grow in a sequence, and whether to stop there; None for
            the defaults of `NormBound`.
        judge: A function judge(question, expected, answer), whose verdicts stand beside exact match
            (`EditReport.judged`); None for none.
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
    _check_mode(mode, type(editor).__name__ if is_change else "", general, prompt_transform, per_step)
    settings = _settings(settings, baseline)
    names = names_of(records)
    ability = ability_tests(vlm, texts=texts, cloze=cloze, settings=settings, batch_size=batch_size)
    ability = ability if mode == SINGLE else ability.beside(records)  # alone, an edit touches only its own questions
    options: dict[str, Any] = {"ability": ability, "batch_size": batch_size, "progress": progress}
    if moments is None:  # nothing is sampled before an editor asks for it
        moments = OwnMoments(vlm, pictures=pictures_of_requests(records), progress=progress)
    if mode == BATCH:
        meter = CostMeter(vlm.device)
        change = cast(Change, editor)
        if not is_change:
            with meter.edits(len(records)):
                change = maker.start(vlm, moments=moments).propose(records)
        transform = prompt_transform or transform_of(change)
        options |= {"settings": settings, "reference": baseline, "transform": transform}
        report = _evaluate_batch(vlm, dict(zip(names, records, strict=True)), change, general, **options)
        report = replace(report, cost=meter.cost())
    elif mode == SEQUENCE:
        known = {"settings": settings, "batch_size": batch_size, "progress": progress}
        reference = baseline or measure_baseline(vlm, records, **known)
        bound, session = norm_bound or NormBound(), maker.start(vlm, moments=moments)
        way = {"at": at, "per_step": per_step, "norm_bound": bound}
        states = sequence_states(vlm, records, session, reference, **way, **options)
        report = sequence_report(vlm, states, reference, number=len(records), bound=bound.growth, per_step=per_step)
    else:
        given = {"baseline": baseline, "general": general, "settings": settings}
        report = _evaluate_single(
            vlm, evaluate_each(vlm, records, maker, moments=moments, **given, **options), settings
        )
    return report if judge is None else report.judged(judge)


def _evaluate_single(
    vlm: VisionLanguageModel, results: Iterable[RecordResult], settings: EvaluationSettings
) -> EditReport:
    """Return the report on edits that are made one at a time, in the order of their results."""
    meter = CostMeter(vlm.device)
    results = [*results]
    meter.seconds += [result.seconds for result in results]
    return EditReport.of(
        vlm,
        SINGLE,
        settings,
        [row for result in results for row in result.rows],
        statuses={result.record: result.status for result in results},
        left_out=tuple(each for result in results for each in result.left_out),
        cost=meter.cost(),
    )


def evaluate_each(
    vlm: VisionLanguageModel,
    records: Iterable[EditRecord],
    editor: Editor,
    *,
    moments: MomentSource = None,
    baseline: Baseline | None = None,
    general: Sequence[Question] = (),
    ability: AbilityTests | None = None,
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
        ability: Texts and cloze questions of `ability_tests`, which are asked after every edit; None for none.
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
    options = {"ability": ability, "settings": settings, "reference": baseline, "batch_size": batch_size}
    ids: set[str] = set()
    for index, record in enumerate(tqdm(records, desc="edits, one at a time", unit="edit", disable=not progress)):
        name = record.id or str(index)
        if name in ids:
            raise EditError(f"two records have the id {name!r}; give each one its own, or none an id")
        ids.add(name)
        meter = CostMeter(vlm.device)
        with meter.edits(1):
            change, (status,) = attempt(session.propose, [record])
        result = measured_edit(vlm, name, record, change, status, general=general, **options)
        yield replace(result, seconds=meter.seconds[0])


def measured_edit(
    vlm: VisionLanguageModel,
    name: str,
    record: EditRecord,
    change: Change | None,
    status: str,
    *,
    general: Sequence[Question] = (),
    ability: AbilityTests | None = None,
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
        ability: Texts and cloze questions of `ability_tests`; None for none.
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
    rows += () if ability is None else ability.beside([record]).rows_with(vlm, change, record=name)
    return RecordResult(record=name, status=seen_statuses({name: status}, rows)[name], rows=rows, left_out=left_out)


def _evaluate_batch(
    vlm: VisionLanguageModel,
    records: dict[str, EditRecord],
    change: Change,
    general: Sequence[Question],
    *,
    ability: AbilityTests,
    settings: EvaluationSettings,
    **options: Any,
) -> EditReport:
    """Return the report on one change that makes all edits at once."""
    statuses = dict(zip(records, statuses_of(change, len(records)), strict=True))
    edited = [name for name, status in statuses.items() if not status.startswith(FAILED)]
    checks, left_out = _asked(records, edited, general)
    rows = measured(vlm, checks, change, settings=settings, **options) + ability.rows_with(vlm, change)
    parts = {"statuses": seen_statuses(statuses, rows), "left_out": left_out, "step": len(records)}
    return EditReport.of(vlm, BATCH, settings, rows, **parts)


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


def _check_mode(
    mode: str, change: str, general: Sequence[Question], prompt_transform: PromptTransform | None, per_step: int
) -> None:
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
    check_step(per_step)
    if per_step > 1 and mode != SEQUENCE:
        raise EditError(f"per_step={per_step} belongs to mode 'sequence'; mode {mode!r} has a step size of its own")
    if prompt_transform is not None and mode != BATCH:
        raise EditError(f"prompt_transform belongs to mode 'batch'; in mode {mode!r} each change brings its own")


def check_step(per_step: int) -> None:
    """Raise `EditError` unless a step makes a whole number of edits, at least 1."""
    if type(per_step) is not int or per_step < 1:
        raise EditError(f"per_step is {per_step!r}; pass the number of edits per step, a whole number of at least 1")


def _settings(settings: EvaluationSettings | None, baseline: Baseline | None) -> EvaluationSettings:
    """Return what is measured. Raises `EditError` for a baseline that was measured with other settings."""
    if baseline is not None and settings not in (None, baseline.settings):
        raise EditError(
            f"the baseline was measured with {baseline.settings}, not {settings}; pass the same settings to baseline()"
        )
    return settings or (EvaluationSettings() if baseline is None else baseline.settings)
