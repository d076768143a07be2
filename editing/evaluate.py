"""Evaluation of edits: every question put to the unedited model and to the edited one, in the same way."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tqdm import tqdm

from ..models import Prompt, VisionLanguageModel
from .errors import EditError
from .measuring import Asked, EvaluationSettings, State, feed, generate
from .probes import EDITED, Record, names_of
from .questions import General, Question, general_questions, numbers, questions_of, record_questions, unedited_by_others
from .reports import EDITED_STATUS, EditReport, ProbeRow
from .requests import EditRequest

Worded = Callable[[Prompt], Prompt]


class Change(Protocol):
    """Anything that can be put into a model and taken out again bit by bit.

    One that works by what the model is told, rather than by its weights, also has a method worded(prompt) -> Prompt;
    one that knows what became of each request has `requests`, mappings with a "status".
    """

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """The model with the change in it."""


Edit = Callable[[VisionLanguageModel, Sequence[EditRequest], Sequence[Any]], Change]
"""(model, requests, earlier changes, which are in the model) -> the change. EditError where it cannot be made."""


def with_history(editor: Any, **options: Any) -> Edit:
    """An editor that solves each edit knowing the earlier ones (MEMIT, AlphaEdit, ...); options go to its `edit`."""
    return lambda vlm, requests, earlier: editor.edit(vlm, requests, earlier=tuple(earlier), **options)


def without_history(editor: Any, **options: Any) -> Edit:
    """An editor that takes the model as it finds it (the baselines); options go to its `edit`."""
    return lambda vlm, requests, earlier: editor.edit(vlm, requests, **options)


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """All that the unedited model says to a set of questions; measured once, it serves every editor. See `unedited`."""

    model: str
    revision: str | None
    measures: EvaluationSettings
    state: State


def unedited(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    *,
    general: General = (),
    batch_size: int = 32,
    measures: EvaluationSettings | None = None,
    progress: bool = True,
) -> Baseline:
    """The answers of the model as it is to all questions of the records; a question asked twice is answered once."""
    measures, state = measures or EvaluationSettings(), State()
    questions = questions_of(records, general)
    options = {"batch_size": batch_size, "progress": progress}
    # before anything is fed in, since what is fed in may be the present answer
    state.generated.update(generate(vlm, _prompts(questions), max_new_tokens=measures.max_new_tokens, **options))
    _measure_rest(vlm, [question.asked(state) for question in questions], questions, state, measures, **options)
    return Baseline(model=vlm.name, revision=vlm.revision, measures=measures, state=state)


def evaluate(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    change: Change,
    *,
    baseline: Baseline | None = None,
    general: General = (),
    worded: Worded | None = None,
    batch_size: int = 32,
    measures: EvaluationSettings | None = None,
    progress: bool = True,
) -> EditReport:
    """The report on one change that is meant to make all these edits at once; the model is left as it is.

    A question that should stay for one record, but that another one is to change, is left out, counted in `left_out`.
    baseline: from `unedited`, with the same questions and measures; measured here if None. general: held-out questions
    with their answers. worded: how the edited model is asked, for editors that work in the prompt; by default the
    change's own `worded`, if it has one. EditError if the baseline lacks a question.
    """
    options = {"batch_size": batch_size, "progress": progress}
    baseline = baseline or unedited(vlm, records, general=general, measures=measures, **options)
    everything = questions_of(records, general)
    questions = unedited_by_others(everything, records)
    measures = _agreed(baseline, measures)
    with change.applied(vlm):
        state = ask(vlm, questions, baseline, worded=worded or worded_by(change), measures=measures, **options)
    statuses = dict(zip(names_of(records), statuses_of(change, len(records)), strict=True))
    left_out = len(everything) - len(questions)
    return report(vlm, "together", measures, rows_of(questions, baseline.state, state), statuses, left_out)


def evaluate_singly(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    edit: Edit,
    *,
    baseline: Baseline | None = None,
    general: General = (),
    batch_size: int = 32,
    measures: EvaluationSettings | None = None,
    progress: bool = True,
) -> EditReport:
    """The report on one edit at a time: each made on the unedited model, measured and undone.

    edit: (model, requests, earlier changes: here none) -> change; see `without_history`. A request that raises an
    EditError is noted in `statuses`, its questions count as answered by the unedited model, and the others go on.
    baseline, general: as in `evaluate`; every general question is asked after every edit.
    """
    options = {"batch_size": batch_size, "progress": False}
    baseline = baseline or unedited(
        vlm, records, general=general, measures=measures, batch_size=batch_size, progress=progress
    )
    measures = _agreed(baseline, measures)
    rows: list[ProbeRow] = []
    statuses = {}
    bar = tqdm(records, desc="edits, one at a time", unit="edit", disable=not progress)
    for name, record in zip(names_of(records), bar, strict=True):
        own = [*record_questions(name, record), *general_questions(general, record=name)]
        change, statuses[name] = attempt(vlm, edit, record.request, ())
        state = baseline.state
        if change is not None:
            with change.applied(vlm):
                state = ask(vlm, own, baseline, worded=worded_by(change), measures=measures, **options)
        rows += rows_of(own, baseline.state, state)
    return report(vlm, "single", measures, rows, statuses)


def attempt(
    vlm: VisionLanguageModel, edit: Edit, request: EditRequest, earlier: Sequence[Change]
) -> tuple[Change | None, str]:
    """The change of one request and its status; no change if it could not be made."""
    try:
        change = edit(vlm, [request], tuple(earlier))
    except EditError as error:
        return None, f"failed: {error}"
    return change, statuses_of(change, 1)[0]


def statuses_of(change: Change, count: int) -> tuple[str, ...]:
    """What the change itself says of each of so many requests, "edited" where it says nothing."""
    told = getattr(change, "requests", ())
    told = told if len(told) == count else ({},) * count
    return tuple(each.get("status", EDITED_STATUS) for each in told)


def worded_by(change: Change) -> Worded | None:
    """How a model with this change is to be asked; None: as ever."""
    return getattr(change, "worded", None)


def ask(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    baseline: Baseline,
    *,
    worded: Worded | None,
    measures: EvaluationSettings,
    batch_size: int,
    progress: bool,
) -> State:
    """All that the model says now to questions of the baseline. EditError for a question that the baseline lacks."""
    known = baseline.state.generated
    for question in questions:
        if question.key not in known:
            raise EditError(
                f"the baseline does not hold {question.prompt.question!r} ({question.kind}); "
                "make it with unedited() from the same records and general questions"
            )
    state, options = State(), {"batch_size": batch_size, "progress": progress}
    words = worded or (lambda prompt: prompt)
    prompts = {key: words(prompt) for key, prompt in _prompts(questions).items()}
    state.generated.update(generate(vlm, prompts, max_new_tokens=measures.max_new_tokens, **options))
    asked = [question.asked(baseline.state) for question in questions]
    asked = [
        Asked(key=each.key, prompt=prompts[each.key], answers=each.answers, reference=each.reference) for each in asked
    ]
    _measure_rest(vlm, asked, questions, state, measures, **options)
    return state


def rows_of(questions: Iterable[Question], before: State, after: State) -> tuple[ProbeRow, ...]:
    """One row per question, with its numbers in both states."""
    return tuple(
        ProbeRow(
            record=question.record,
            kind=question.kind,
            hops=question.hops,
            question=question.prompt.question,
            has_picture=bool(question.prompt.images),
            new=question.new,
            old=question.old(before),
            before=before.generated[question.key],
            after=after.generated[question.key],
            numbers=numbers(question, before, after),
        )
        for question in questions
    )


def report(
    vlm: VisionLanguageModel,
    mode: str,
    measures: EvaluationSettings,
    rows: Sequence[ProbeRow],
    statuses: Mapping[str, str],
    left_out: int = 0,
) -> EditReport:
    """The report on these rows."""
    return EditReport(
        model=vlm.name,
        revision=vlm.revision,
        mode=mode,
        settings={name: str(value) for name, value in asdict(measures).items()},
        rows=tuple(rows),
        statuses=dict(statuses),
        left_out=left_out,
        seed=measures.seed,
    )


def _measure_rest(
    vlm: VisionLanguageModel,
    asked: Sequence[Asked],
    questions: Sequence[Question],
    state: State,
    measures: EvaluationSettings,
    **options: Any,
) -> None:
    """Adds the answers fed in, and the longer free answers, where they are measured."""
    if measures.forced:
        feed(vlm, asked, state, **options)
    if measures.fluency_tokens:
        edited = {question.key for question in questions if question.kind == EDITED}
        prompts = {each.key: each.prompt for each in asked if each.key in edited}
        state.fluencies.update(generate(vlm, prompts, max_new_tokens=measures.fluency_tokens, **options))


def _agreed(baseline: Baseline, measures: EvaluationSettings | None) -> EvaluationSettings:
    """What both states were or will be measured by. EditError if the baseline was measured otherwise."""
    wanted = measures or baseline.measures
    if wanted != baseline.measures:
        raise EditError(
            f"the baseline was measured with {baseline.measures}, not {wanted}; pass the same measures to unedited()"
        )
    return wanted


def _prompts(questions: Iterable[Question]) -> dict[str, Prompt]:
    return {question.key: question.prompt for question in questions}
