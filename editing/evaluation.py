"""Evaluation of edits, made one at a time, all at once, or one on top of the other, beside the unedited model."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from tqdm import tqdm

from ..models import VisionLanguageModel
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
from .changes import Change
from .closed_form import ClosedFormEditor
from .errors import EditError
from .moments import Moments
from .probes import Record, names_of
from .questions import General, general_questions, questions_of, record_questions, unedited_by_others
from .reports import EditReport, ProbeRow
from .requests import EditRequest
from .responses import EvaluationSettings
from .sequences import AT, NormBound, evaluate_sequence

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
        >>> prompts = [vlm.prompt(picture, world.question(case.fact).question) for picture in pictures]
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
