"""Put questions to the unedited and to the edited model in the same way, and turn the responses into report rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from ...data.facts import EDITED, EditRecord, EditRequest, Question
from ...models import ModelError, Prompt, VisionLanguageModel
from ..changes import Change
from ..errors import EditError
from ..requests import EDITED as EDITED_STATUS, NOT_GENERATED
from .metrics import EXACT
from .questions import (
    Check,
    EvaluationSettings,
    Responses,
    answers_to_feed,
    blocks,
    checks_of,
    feed,
    general_checks,
    generate_answers,
    names_of,
    numbers,
)
from .reports import ProbeRow

PromptTransform = Callable[[Prompt], Prompt]
"""What turns a question's prompt into the one that the edited model is given."""
_BATCHES = 4
"""Number of batches whose prompts exist at a time; a change is put in and taken out once for each such block."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Baseline:
    """The responses of the unedited model to a set of questions, measured once for all editors by `baseline`.

    It holds texts and a few numbers per question and no tensors: rankings, which some protocols compare, are computed
    anew where they are compared.
    """

    model: str
    revision: str | None
    settings: EvaluationSettings
    responses: Responses

    def __repr__(self) -> str:
        return f"Baseline of {self.model!r}: {len(self.responses.generated)} questions, {self.settings}"


def baseline(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    *,
    general: Sequence[Question] = (),
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
        progress: Show a progress bar.

    Returns:
        The responses, without tensors.

    Raises:
        EditError: No records, two records with one id, or a held-out question without an answer.
    """
    settings, names = settings or EvaluationSettings(), names_of(records)
    checks = [check for name, record in zip(names, records, strict=True) for check in checks_of(name, record)]
    checks += general_checks(general)
    responses = Responses()
    bar = tqdm(total=len(checks), desc="unedited answers", unit="question", disable=not progress, leave=False)
    with bar:
        for block in blocks(checks, _BATCHES * batch_size):
            found = _responses(vlm, block, _prompts(vlm, block), settings, batch_size=batch_size, is_ranked=False)
            for part in ("generated", "scores", "fluencies"):
                getattr(responses, part).update(getattr(found, part))
            bar.update(len(block))
    return Baseline(model=vlm.name, revision=vlm.revision, settings=settings, responses=responses)


def measured(
    vlm: VisionLanguageModel,
    checks: Iterable[Check],
    change: Change | None,
    *,
    settings: EvaluationSettings,
    reference: Baseline | None = None,
    transform: PromptTransform | None = None,
    batch_size: int,
    progress: bool = False,
) -> tuple[ProbeRow, ...]:
    """Return one row per check, in order, measured without and with the change; the model ends unedited.

    Checks are asked in blocks. Nothing but the rows is kept of a block that is done, so that memory does not grow with
    the number of checks.

    Args:
        vlm: The unedited model.
        checks: The questions.
        change: The change; None stands for an edit that could not be made: both answers are those of the unedited
            model.
        settings: What is measured.
        reference: Responses of the unedited model that were measured before.
        transform: What turns each prompt into the one that the edited model is given.
        batch_size: Number of questions that are answered together.
        progress: Show a progress bar.

    Raises:
        EditError: The reference lacks a question, or the change does not fit the model.
    """
    checks = tuple(checks)
    rows: dict[Check, ProbeRow] = {}
    bar = tqdm(total=len(checks), desc="questions", unit="question", disable=not progress, leave=False)
    with bar:
        for block in blocks(checks, _BATCHES * batch_size):
            prompts = _prompts(vlm, block)
            before = (
                _responses(vlm, block, prompts, settings, batch_size=batch_size)
                if reference is None
                else _known(vlm, block, prompts, reference, settings, batch_size=batch_size)
            )
            after = before
            if change is not None:
                shown = prompts if transform is None else {key: transform(each) for key, each in prompts.items()}
                with change.applied(vlm):
                    after = _responses(vlm, block, shown, settings, before=before, batch_size=batch_size)
            rows |= zip(block, rows_of(block, before, after), strict=True)
            bar.update(len(block))
    return tuple(rows[check] for check in checks)


def measured_now(
    vlm: VisionLanguageModel,
    checks: Iterable[Check],
    reference: Baseline,
    *,
    settings: EvaluationSettings,
    batch_size: int,
) -> tuple[ProbeRow, ...]:
    """Return one row per check, in order, of the model as it is now by free generation only, beside the reference."""
    checks, rows = tuple(checks), {}
    free = replace(settings, forced=False, fluency_tokens=0)
    for block in blocks(checks, _BATCHES * batch_size):
        _check_known(block, reference)
        after = _responses(vlm, block, _prompts(vlm, block), free, batch_size=batch_size)
        rows |= zip(block, rows_of(block, reference.responses, after), strict=True)
    return tuple(rows[check] for check in checks)


def attempt(make: Callable[[Sequence[EditRequest]], Change], request: EditRequest) -> tuple[Change | None, str]:
    """Return the change of one request and its status; the change is None if it could not be made."""
    try:
        change = make([request])
    except (EditError, ModelError) as error:
        return None, f"failed: {error}"
    return change, statuses_of(change, 1)[0]


def statuses_of(change: Change, count: int) -> tuple[str, ...]:
    """Return the status that the change itself gives each of its requests, "edited" where it gives none."""
    reports = getattr(change, "requests", ())
    reports = reports if len(reports) == count else ({},) * count
    return tuple(report.get("status", EDITED_STATUS) for report in reports)


def seen_statuses(statuses: Mapping[str, str], rows: Iterable[ProbeRow]) -> dict[str, str]:
    """Return the statuses, "not generated" for edits whose own question does not give the target afterwards."""
    silent = {row.record for row in rows if row.kind == EDITED and not row.numbers[EXACT][1]}
    is_silent = {name: status == EDITED_STATUS and name in silent for name, status in statuses.items()}
    return {name: NOT_GENERATED if is_silent[name] else status for name, status in statuses.items()}


def transform_of(change: Change | None) -> PromptTransform | None:
    """Return how a model with this change is asked; None for a change that works by its weights."""
    return getattr(change, "prompt_transform", None)


def rows_of(checks: Iterable[Check], before: Responses, after: Responses) -> Iterator[ProbeRow]:
    """Yield one row per check, with its numbers in both states of the model."""
    for check in checks:
        yield ProbeRow(
            record=check.record,
            kind=check.kind,
            hops=check.hops,
            question=check.question.text,
            has_picture=bool(check.question.images),
            new=check.new,
            old=check.old(before),
            before=before.generated[check.key],
            after=after.generated[check.key],
            numbers=numbers(check, before, after),
        )


def _prompts(vlm: VisionLanguageModel, checks: Iterable[Check]) -> dict[str, Prompt]:
    questions = {check.key: check.question for check in checks}
    return {key: vlm.prompt_for(question) for key, question in questions.items()}


def _responses(
    vlm: VisionLanguageModel,
    checks: Sequence[Check],
    prompts: Mapping[str, Prompt],
    settings: EvaluationSettings,
    *,
    before: Responses | None = None,
    is_ranked: bool = True,
    batch_size: int,
) -> Responses:
    """Return the responses of the model as it is now; `before` knows the present answers, by default the model itself.

    is_ranked: whether whole rankings are kept for questions that should stay.
    """
    responses = Responses()
    # before any answer is fed in, since the present answers may be what is fed in
    responses.generated.update(
        generate_answers(vlm, prompts, max_new_tokens=settings.max_new_tokens, batch_size=batch_size)
    )
    if settings.forced:
        answers = answers_to_feed(checks, responses if before is None else before)
        ranked = {name: is_kept and is_ranked for name, is_kept in answers.items()}
        feed(vlm, prompts, ranked, responses, batch_size=batch_size)
    if settings.fluency_tokens:
        edited = {check.key: prompts[check.key] for check in checks if check.kind == EDITED}
        responses.fluencies.update(
            generate_answers(vlm, edited, max_new_tokens=settings.fluency_tokens, batch_size=batch_size)
        )
    return responses


def _known(
    vlm: VisionLanguageModel,
    checks: Sequence[Check],
    prompts: Mapping[str, Prompt],
    reference: Baseline,
    settings: EvaluationSettings,
    *,
    batch_size: int,
) -> Responses:
    """Return the reference's responses, with the rankings of the unedited model, which is asked for them."""
    _check_known(checks, reference)
    known, ranked = reference.responses, Responses()
    if settings.forced:
        answers = {name: True for name, is_kept in answers_to_feed(checks, known).items() if is_kept}
        feed(vlm, prompts, answers, ranked, batch_size=batch_size)
    return replace(known, ranks=ranked.ranks, first=ranked.first)


def _check_known(checks: Iterable[Check], reference: Baseline) -> None:
    for check in checks:
        if check.key not in reference.responses.generated:
            raise EditError(
                f"the baseline does not hold {check.question.text!r} ({check.kind}); "
                "make it with baseline() from the same records and general questions"
            )
