"""Requests to edit as a model sees them: their prompts, the answers to them, and their text for headers."""

from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ..data.facts import EditRequest, Question
from ..models import NotFiniteError, Prompt, VisionLanguageModel

_PARTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")


def request_text(request: EditRequest) -> dict[str, str]:
    """Return the request as text, for the header of a saved edit."""
    counts = {part: str(len(getattr(request, part))) for part in _PARTS}
    return {"name": request.id, "question": request.question.text, "target": request.target, **counts}


def edited_questions(request: EditRequest) -> tuple[Question, ...]:
    """Return all questions that must get the target: the request's own, its contexts and its rewrite prompts."""
    return (request.question, *request.contexts, *request.rewrite_prompts)


def room_for_targets(vlm: VisionLanguageModel, requests: Sequence[EditRequest]) -> int:
    """Return a length in tokens for answers that leaves room for every target and a little more.

    A target that the model goes on after is then seen to go on.
    """
    return 4 + max(len(vlm.prompt_for(request.question).answer_tokens(request.target)) for request in requests)


def answers_where_finite(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    progress: bool = False,
    **options: Any,
) -> list[str | None]:
    """Return the model's answers, None for questions whose logits are not finite.

    Prompts are made batch by batch. The other options are those of `VisionLanguageModel.answers`.
    """
    answers: list[str | None] = []
    bar = tqdm(total=len(questions), desc="answering", unit="question", disable=not progress, leave=False)
    with bar:
        for prompts in prompt_batches(vlm, questions, batch_size):
            answers += prompt_answers(vlm, prompts, batch_size=batch_size, **options)
            bar.update(len(prompts))
    return answers


def prompt_batches(vlm: VisionLanguageModel, questions: Sequence[Question], batch_size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts of the questions, as many at a time as are run together."""
    for start in range(0, len(questions), batch_size):
        yield [vlm.prompt_for(question) for question in questions[start : start + batch_size]]


def prompt_answers(vlm: VisionLanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[str | None]:
    """Return the model's answers, None for prompts whose logits are not finite; the options are those of `answers`.

    One prompt that overflows costs only itself: the others are asked again, one by one.
    """
    try:
        return list(vlm.answers(prompts, **options))
    except NotFiniteError:
        if len(prompts) == 1:
            return [None]
        return [answer for prompt in prompts for answer in prompt_answers(vlm, [prompt], **options)]
