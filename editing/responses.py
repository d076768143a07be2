"""How a model responds to questions: its free answers, and its predictions while given answers are fed in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import NotFiniteError, Prompt, VisionLanguageModel
from ..models.prompts import collate
from .errors import EditError
from .metrics import RANKS


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation measures. Raises `EditError` for numbers out of range."""

    forced: bool = True
    """Also measure how the model predicts given answers (teacher forcing), which about doubles the time. False
    measures free generation only."""
    max_new_tokens: int = 16
    """Maximum length of a free answer in tokens."""
    fluency_tokens: int = 0
    """Length in tokens of the free answers whose fluency is measured, for edited questions; 0 skips fluency."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.fluency_tokens < 0:
            raise EditError(
                f"got max_new_tokens={self.max_new_tokens} and fluency_tokens={self.fluency_tokens}; "
                "pass at least 1 and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """How a model predicts a given answer, each token from the ones before it."""

    ids: tuple[int, ...]
    predicted: tuple[int, ...]
    """The most probable token at the position of each of the ids."""
    log_probabilities: tuple[float, ...]
    """Natural logarithm of the probability of each of the ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerFeed:
    """The answers to be fed in after one prompt."""

    key: str
    """The key of the question, which stays the same where a prompt transform changes the prompt."""
    prompt: Prompt
    answers: tuple[str, ...] = ()
    reference: str | None = None
    """The answer under which whole rankings are kept, for comparison with another state of the model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """The responses of one state of a model."""

    generated: dict[str, str] = field(default_factory=dict)
    """Key -> free answer."""
    scores: dict[tuple[str, str], AnswerScore] = field(default_factory=dict)
    """(key, answer) -> its score."""
    ranks: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (token, RANKS) int32, the most probable next tokens at every position, the answer's included."""
    first: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (vocab,) float32 logits where the answer's first token is predicted."""
    fluencies: dict[str, str] = field(default_factory=dict)
    """Key -> the longer free answer whose fluency is measured."""


def generate_answers(
    vlm: VisionLanguageModel, prompts: Mapping[str, Prompt], *, max_new_tokens: int, batch_size: int, progress: bool
) -> dict[str, str]:
    """Return the free answer to each prompt by key; prompts of similar length share a batch."""
    ordered = dict(sorted(prompts.items(), key=lambda pair: _place(pair[1])))
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    answers = answers_where_finite(vlm, list(ordered.values()), **options) if ordered else []
    return {key: answer or "" for key, answer in zip(ordered, answers, strict=True)}


def answers_where_finite(vlm: VisionLanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[str | None]:
    """Return the model's answers, None for prompts whose logits are not finite; the options are those of `answers`.

    One prompt that overflows costs only itself: the others are asked again, one by one.
    """
    try:
        return list(vlm.answers(prompts, **options))
    except NotFiniteError:
        if len(prompts) == 1:
            return [None]
        return [answer for prompt in prompts for answer in answers_where_finite(vlm, [prompt], **options)]


@torch.no_grad()
def feed(
    vlm: VisionLanguageModel, feeds: Sequence[AnswerFeed], responses: Responses, *, batch_size: int, progress: bool
) -> None:
    """Add the model's predictions of all answers to the responses; an answer without tokens is left out."""
    rows = {}
    for each in feeds:
        for answer in dict.fromkeys(each.answers):
            prompt = each.prompt.with_answer(answer)
            is_kept = answer == each.reference
            # two questions may share prompt and answer; the ranking is kept if either needs it
            if prompt.answer_ids and (is_kept or (each.key, answer) not in rows):
                rows[each.key, answer] = (prompt, is_kept)
    ordered = sorted(rows.items(), key=lambda row: _place(row[1][0]))
    starts = range(0, len(ordered), batch_size)
    for start in tqdm(starts, desc="feeding answers", unit="batch", disable=not progress, leave=False):
        chunk = ordered[start : start + batch_size]
        inputs, offsets = collate([prompt for _, (prompt, _) in chunk], vlm.tokenizer, side="left")
        for logits, offset, (name, (prompt, is_kept)) in zip(vlm.logits(inputs), offsets, chunk, strict=True):
            _note(responses, name, prompt, logits[offset:], is_kept=is_kept)


def _note(responses: Responses, name: tuple[str, str], prompt: Prompt, logits: Tensor, *, is_kept: bool) -> None:
    """Add the logits (token, vocab) of one row."""
    start = prompt.groups["answer"][0] - 1
    predicting = logits[start : start + len(prompt.answer_ids)]
    ids = torch.tensor(prompt.answer_ids, device=logits.device)
    chosen = predicting.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    responses.scores[name] = AnswerScore(
        ids=prompt.answer_ids,
        predicted=tuple(predicting.argmax(-1).tolist()),
        log_probabilities=tuple(chosen.tolist()),
    )
    if is_kept:
        # the last position predicts what follows the answer, which no protocol compares
        responses.ranks[name] = logits[:-1].topk(RANKS, dim=-1).indices.int().cpu()
        responses.first[name] = predicting[0].float().cpu()


def _place(prompt: Prompt) -> tuple[bool, int]:
    """Sort key that keeps the padding of batches small."""
    return bool(prompt.images), prompt.length
