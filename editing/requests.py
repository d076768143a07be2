"""Requests to edit as a model sees them: their prompts, answers and text for headers; and the error of this room."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..data.facts import EditRequest, Question
from ..models import NotFiniteError, Prompt, VisionLanguageModel

EDITED = "edited"
"""What became of a request: its edit was made, and the model answers its question with the target."""
NOT_GENERATED = "not generated"
"""Its edit was made, but the model does not answer its question with the target."""
NOTHING_TO_DO = "nothing to do"
FAILED = "failed"
"""Followed by the reason."""
_PARTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")


class EditError(ValueError):
    """An edit that cannot be made, applied, undone, saved or loaded: what was asked, what was found, what to do."""


def request_text(request: EditRequest) -> dict[str, str]:
    """Return the request as text, for the header of a saved edit: how often there is a picture, and where it lies."""
    counts = {part: str(len(getattr(request, part))) for part in _PARTS}
    question = request.question
    paths = [str(image) for image in question.images if not isinstance(image, Image.Image)]
    asked = {"template": question.template} if question.template is not None else {}
    if question.images:
        asked["pictures"] = str(len(question.images))
        asked |= {"image": paths[0]} if len(paths) == len(question.images) == 1 else {}
    return {"name": request.id, "question": question.text, "target": request.target, **counts, **asked}


def edited_questions(request: EditRequest) -> tuple[Question, ...]:
    """Return all questions that must get the target: the request's own, its contexts and its rewrite prompts."""
    return (request.question, *request.contexts, *request.rewrite_prompts)


def listed_requests(requests: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """Return the requests as a tuple. Raises `EditError` if there are none, or if something else stands among them."""
    if isinstance(requests, EditRequest) or not isinstance(requests, Iterable):
        raise EditError(f"the requests are of type {type(requests).__name__}; pass a list of EditRequest")
    listed = tuple(requests)
    if not listed:
        raise EditError("no requests to edit; pass at least one EditRequest")
    if foreign := [request for request in listed if not isinstance(request, EditRequest)]:
        raise EditError(f"among the requests is one of type {type(foreign[0]).__name__}; pass a list of EditRequest")
    return listed


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
    transform: Callable[[Prompt], Prompt] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[str | None]:
    """Return the model's answers, None for questions whose logits are not finite.

    Prompts are made batch by batch. transform: what turns each into the one that the model is given. The
    other options are those of `VisionLanguageModel.answers`.
    """
    answers: list[str | None] = []
    bar = tqdm(total=len(questions), desc="answering", unit="question", disable=not progress, leave=False)
    with bar:
        for prompts in prompt_batches(vlm, questions, batch_size):
            prompts = prompts if transform is None else [transform(prompt) for prompt in prompts]
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


def with_answers_seen(vlm: VisionLanguageModel, change: Any, requests: Sequence[EditRequest]) -> Any:
    """Return the change with what its requests' own questions show: one that is not answered with its target is not
    "edited" but "not generated", with what the model `says` instead and the `probability` of the target.

    vlm: The model without the change, which it has for the length of the questions.
    """
    edited = [index for index, report in enumerate(change.requests) if report.get("status") == EDITED]
    if not edited or len(change.requests) != len(requests):
        return change
    reports = [dict(report) for report in change.requests]
    own, transform = [requests[index] for index in edited], getattr(change, "prompt_transform", None)
    with change.applied(vlm):
        for index, request, prompt in zip(edited, own, _asked_prompts(vlm, own, transform), strict=True):
            (said,) = prompt_answers(vlm, [prompt], max_new_tokens=4 + len(prompt.answer_tokens(request.target)))
            if said != request.target.strip():
                probability = target_probability(vlm, prompt.with_answer(request.target))
                reports[index] |= {"status": NOT_GENERATED, "says": said or "", "probability": probability}
    return replace(change, requests=tuple(reports))


@torch.no_grad()
def target_probability(vlm: VisionLanguageModel, prompt: Prompt) -> float:
    """Return the probability of all tokens of the prompt's answer, without the end of the answer."""
    first = prompt.groups["answer"][0]
    logits = vlm.logits(prompt)[0, first - 1 : first - 1 + len(prompt.answer_ids)].double().log_softmax(-1)
    ids = torch.tensor(prompt.answer_ids, device=logits.device)
    return logits.gather(-1, ids[:, None]).sum().exp().item()


def _asked_prompts(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], transform: Callable[[Prompt], Prompt] | None
) -> Iterator[Prompt]:
    """Yield the prompt of each request's question, as the edited model is asked."""
    for request in requests:
        prompt = vlm.prompt_for(request.question)
        yield prompt if transform is None else transform(prompt)
