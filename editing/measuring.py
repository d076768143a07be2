"""What one state of a model says to questions: free answers, and given answers fed in token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import Prompt, VisionLanguageModel
from ..models.prompts import collate
from .errors import EditError
from .metrics import RANKS


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured of every question, and how. EditError for numbers out of range."""

    forced: bool = True
    """Also feed the answers in (teacher forcing), which about doubles the time; else free generation alone."""
    max_new_tokens: int = 16
    """Longest free answer."""
    fluency_tokens: int = 0
    """Longest free answer to the edited questions of which the fluency is measured; 0 leaves it out."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.fluency_tokens < 0:
            raise EditError(
                f"got max_new_tokens={self.max_new_tokens} and fluency_tokens={self.fluency_tokens}; "
                "pass at least 1 and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """How a model finds a given answer, each of its tokens seeing those before it."""

    ids: tuple[int, ...]
    predicted: tuple[int, ...]
    """The most probable token in the place of each."""
    log_probabilities: tuple[float, ...]
    """Of each of the answer's tokens, natural logarithm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A prompt under the key of the question that it words, and the answers to be fed in."""

    key: str
    prompt: Prompt
    answers: tuple[str, ...] = ()
    reference: str | None = None
    """The answer under which whole rankings are kept, to be compared with those of another state."""


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """All that one state of a model said."""

    generated: dict[str, str] = field(default_factory=dict)
    """Key -> free answer."""
    scores: dict[tuple[str, str], AnswerScore] = field(default_factory=dict)
    """(key, answer) -> its score."""
    ranks: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (token, RANKS) int32, the most probable next tokens at every position, the answer's included."""
    first: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (vocab,) float32 logits where the answer's first token is predicted."""
    fluencies: dict[str, str] = field(default_factory=dict)
    """Key -> the longer free answer of which fluency is measured."""


def generate(
    vlm: VisionLanguageModel, prompts: Mapping[str, Prompt], *, max_new_tokens: int, batch_size: int, progress: bool
) -> dict[str, str]:
    """The free answer by key; prompts of like length share a batch."""
    ordered = dict(sorted(prompts.items(), key=lambda pair: _place(pair[1])))
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    return dict(zip(ordered, vlm.answers(list(ordered.values()), **options), strict=True)) if ordered else {}


@torch.no_grad()
def feed(vlm: VisionLanguageModel, asked: Sequence[Asked], state: State, *, batch_size: int, progress: bool) -> None:
    """Adds to the state what the model makes of all the answers; an answer without tokens is left out."""
    rows = {}
    for question in asked:
        for answer in dict.fromkeys(question.answers):
            prompt = question.prompt.with_answer(answer)
            is_kept = answer == question.reference
            # two questions may share prompt and answer; it is kept if either wants it
            if prompt.answer_ids and (is_kept or (question.key, answer) not in rows):
                rows[question.key, answer] = (prompt, is_kept)
    ordered = sorted(rows.items(), key=lambda row: _place(row[1][0]))
    starts = range(0, len(ordered), batch_size)
    for start in tqdm(starts, desc="feeding answers", unit="batch", disable=not progress, leave=False):
        chunk = ordered[start : start + batch_size]
        inputs, offsets = collate([prompt for _, (prompt, _) in chunk], vlm.tokenizer, side="left")
        for logits, offset, (name, (prompt, is_kept)) in zip(vlm.logits(inputs), offsets, chunk, strict=True):
            _note(state, name, prompt, logits[offset:], is_kept=is_kept)


def _note(state: State, name: tuple[str, str], prompt: Prompt, logits: Tensor, *, is_kept: bool) -> None:
    """Adds one row's logits (token, vocab)."""
    start = prompt.groups["answer"][0] - 1
    predicting = logits[start : start + len(prompt.answer_ids)]
    ids = torch.tensor(prompt.answer_ids, device=logits.device)
    chosen = predicting.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    state.scores[name] = AnswerScore(
        ids=prompt.answer_ids,
        predicted=tuple(predicting.argmax(-1).tolist()),
        log_probabilities=tuple(chosen.tolist()),
    )
    if is_kept:
        # the last position predicts what follows the answer, which no protocol compares
        state.ranks[name] = logits[:-1].topk(RANKS, dim=-1).indices.int().cpu()
        state.first[name] = predicting[0].float().cpu()


def _place(prompt: Prompt) -> tuple[bool, int]:
    """Where a prompt stands among others, so that a batch holds little padding."""
    return bool(prompt.images), prompt.length
