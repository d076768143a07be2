"""Put questions to the unedited and to the edited model in the same way, and turn the responses into report rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...models import Prompt, VisionLanguageModel
from ..changes import Change
from ..errors import EditError
from ..requests import EditRequest
from .questions import (
    EDITED,
    AnswerFeed,
    EvaluationSettings,
    General,
    Question,
    Record,
    Responses,
    feed,
    generate_answers,
    numbers,
    questions_of,
)
from .reports import EDITED_STATUS, EditReport, ProbeRow

PromptTransform = Callable[[Prompt], Prompt]
"""What turns a question's prompt into the one that the edited model is given."""
EditFunction = Callable[[VisionLanguageModel, Sequence[EditRequest], Sequence[Any]], Change]
"""(model, requests, earlier changes that are in the model) -> the change. Raises `EditError` if it cannot be made."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Baseline:
    """The responses of the unedited model to a set of questions, measured once for all editors by `baseline`."""

    model: str
    revision: str | None
    settings: EvaluationSettings
    responses: Responses

    def __repr__(self) -> str:
        return f"Baseline of {self.model!r}: {len(self.responses.generated)} questions, {self.settings}"


def baseline(
    vlm: VisionLanguageModel,
    records: Sequence[Record],
    *,
    general: General = (),
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Baseline:
    """Return the responses of the model as it is to all questions of the records; each question is asked once.

    Pass the result to several calls of `evaluate`, which would otherwise measure it anew each time.

    Args:
        vlm: The unedited model.
        records: The edits and the questions about them.
        general: Held-out questions with their right answers, which measure general ability.
        settings: What is measured; None for the defaults.
        batch_size: Number of questions that are answered together.
        progress: Show progress bars.

    Raises:
        EditError: No records, or two records with one name.
    """
    settings, responses = settings or EvaluationSettings(), Responses()
    questions = questions_of(records, general)
    options = {"batch_size": batch_size, "progress": progress}
    # before any answer is fed in, since the present answers may be what is fed in
    responses.generated.update(
        generate_answers(vlm, _prompts(questions), max_new_tokens=settings.max_new_tokens, **options)
    )
    feeds = [question.feed(responses) for question in questions]
    _measure_rest(vlm, feeds, questions, responses, settings, **options)
    return Baseline(model=vlm.name, revision=vlm.revision, settings=settings, responses=responses)


def ask(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    reference: Baseline,
    *,
    settings: EvaluationSettings,
    prompt_transform: PromptTransform | None = None,
    batch_size: int,
    progress: bool,
) -> Responses:
    """Return the responses of the model as it is now. Raises `EditError` for a question that the baseline lacks."""
    known = reference.responses.generated
    for question in questions:
        if question.key not in known:
            raise EditError(
                f"the baseline does not hold {question.prompt.question!r} ({question.kind}); "
                "make it with baseline() from the same records and general questions"
            )
    responses, options = Responses(), {"batch_size": batch_size, "progress": progress}
    prompts = _prompts(questions)
    if prompt_transform is not None:
        prompts = {key: prompt_transform(prompt) for key, prompt in prompts.items()}
    responses.generated.update(generate_answers(vlm, prompts, max_new_tokens=settings.max_new_tokens, **options))
    feeds = [question.feed(reference.responses) for question in questions]
    feeds = [
        AnswerFeed(key=each.key, prompt=prompts[each.key], answers=each.answers, reference=each.reference)
        for each in feeds
    ]
    _measure_rest(vlm, feeds, questions, responses, settings, **options)
    return responses


def attempt(
    vlm: VisionLanguageModel, edit: EditFunction, request: EditRequest, earlier: Sequence[Change]
) -> tuple[Change | None, str]:
    """Return the change of one request and its status; the change is None if it could not be made."""
    try:
        change = edit(vlm, [request], tuple(earlier))
    except EditError as error:
        return None, f"failed: {error}"
    return change, statuses_of(change, 1)[0]


def statuses_of(change: Change, count: int) -> tuple[str, ...]:
    """Return the status that the change itself gives each of its requests, "edited" where it gives none."""
    reports = getattr(change, "requests", ())
    reports = reports if len(reports) == count else ({},) * count
    return tuple(report.get("status", EDITED_STATUS) for report in reports)


def transform_of(change: Change) -> PromptTransform | None:
    """Return how a model with this change is asked; None for a change that works by its weights."""
    return getattr(change, "prompt_transform", None)


def rows_of(questions: Iterable[Question], before: Responses, after: Responses) -> tuple[ProbeRow, ...]:
    """Return one row per question, with its numbers in both states of the model."""
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


def report_of(
    vlm: VisionLanguageModel, mode: str, settings: EvaluationSettings, rows: Sequence[ProbeRow], **parts: Any
) -> EditReport:
    """Return the report on these rows; parts are further fields of it."""
    return EditReport(
        model=vlm.name,
        revision=vlm.revision,
        mode=mode,
        settings={name: str(value) for name, value in asdict(settings).items()},
        rows=tuple(rows),
        seed=settings.seed,
        **parts,
    )


def _measure_rest(
    vlm: VisionLanguageModel,
    feeds: Sequence[AnswerFeed],
    questions: Sequence[Question],
    responses: Responses,
    settings: EvaluationSettings,
    **options: Any,
) -> None:
    """Add the predictions of given answers, and the longer free answers, where they are measured."""
    if settings.forced:
        feed(vlm, feeds, responses, **options)
    if settings.fluency_tokens:
        edited = {question.key for question in questions if question.kind == EDITED}
        prompts = {each.key: each.prompt for each in feeds if each.key in edited}
        responses.fluencies.update(generate_answers(vlm, prompts, max_new_tokens=settings.fluency_tokens, **options))


def _prompts(questions: Iterable[Question]) -> Mapping[str, Prompt]:
    return {question.key: question.prompt for question in questions}
