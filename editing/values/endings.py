"""What a model says after its answers: an end of sequence, a full stop, a line end."""

from __future__ import annotations

import torch

from ...data.facts import EditRequest
from ...models import Continuation, VisionLanguageModel
from ...models.replay.upper import PaddedBatch
from ..requests import MARKS, end_of_answer
from .keys import Goals, chunks, end_ids, target_batch

LONGEST_ANSWER = 16
"""Number of tokens within which the ending of the present answer has to be."""


def ending_of(vlm: VisionLanguageModel, request: EditRequest, present: Continuation | None) -> tuple[int, ...]:
    """Return the ids that follow the target if the model ends it as it ends its present answer, at most one of them.

    It is the first mark in what the model says now, or the end of sequence if it stops without one. Of a target that
    ends with the same mark, as a sentence does, it is what comes after. Nothing follows where the model neither stops
    nor sets a mark within the continuation, or where target and mark are one token.

    present: What the model says now; None if it cannot answer.
    """
    if present is None:
        return ()
    text = present.text.lstrip().rstrip(" ")
    place = end_of_answer(text)
    mark = text[place : place + 1]
    if mark and request.target.endswith(mark):
        mark = text[place + 1 :].lstrip(" ")[:1]
    if mark:
        return _mark_ids(vlm, request, mark) if mark in MARKS else ()
    return end_ids(vlm) if present.stopped else ()


def _mark_ids(vlm: VisionLanguageModel, request: EditRequest, mark: str) -> tuple[int, ...]:
    """The id of a mark behind the target, or nothing if the mark changes the target's own tokens."""
    if mark == "\n":  # which an answer cannot end with
        ids = vlm.tokenizer(f"{request.target}\n", add_special_tokens=False)["input_ids"]
        return (ids[-1],) if vlm.tokenizer.decode(ids[-1:]) == "\n" else ()
    prompt = vlm.prompt_for(request.question)
    plain, marked = (tuple(prompt.answer_tokens(text)) for text in (request.target, request.target + mark))
    return marked[len(plain) : len(plain) + 1] if marked[: len(plain)] == plain else ()


def _beginning(vlm: VisionLanguageModel, present: Continuation) -> Continuation:
    """The first tokens of a continuation, so that an ending does not depend on how long the model was let go on."""
    ids = vlm.tokenizer(present.text, add_special_tokens=False)["input_ids"]
    if len(ids) <= LONGEST_ANSWER:
        return present
    return Continuation(text=vlm.tokenizer.decode(ids[:LONGEST_ANSWER]), stopped=False)


@torch.no_grad()
def ends_by_itself(vlm: VisionLanguageModel, goals: Goals, token: str | int, *, rows_at_once: int = 64) -> list[bool]:
    """Return for each goal whether the model says its ending after its target by itself, in all contexts.

    The targets are teacher-forced. A goal without an ending counts as ended.
    """
    natural: dict[int, bool] = {}
    for chunk in chunks(goals, rows_at_once):
        own = [goals[index] for index in chunk]
        batch = target_batch(vlm, own, token, end=False, every=False)
        logits = PaddedBatch.after_prefix(vlm, batch.entering, batch.start).logits(vlm, batch.label_columns)
        missed = ((logits.argmax(-1).cpu() != batch.labels) & batch.label_mask).cpu()
        for number, (index, goal) in enumerate(zip(chunk, own, strict=True)):
            rows = ((batch.goals == number) & ~batch.essence).nonzero().flatten()
            last = batch.label_mask[rows].sum(-1) - 1
            natural[index] = not goal.ending or not bool(missed[rows, last].any())
    return [natural[index] for index in range(len(goals))]
