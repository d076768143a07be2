"""The questions about edits, how a model responds to them, and the numbers that two states of a model give for each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ...models.prompts import collate
from ..errors import EditError
from ..requests import EditRequest, answers_where_finite, counted, key_of
from .metrics import (
    EXACT,
    FLUENCY,
    HIGHER,
    KEPT_HIGHER,
    KL,
    MARGIN,
    RANKS,
    SAYS_NEW,
    SEQUENCE,
    TOKENS,
    TOP1_ANSWER,
    TOP1_WHOLE,
    TOP10_WHOLE,
    UNCHANGED,
    UNCHANGED_RIGHT,
    VQA,
    agreement,
    exact_match,
    fluency,
    kl_divergence,
    normalised_probability,
    sequence_accuracy,
    token_accuracy,
    vqa_match,
)

EDITED, PORTABILITY, GENERAL = "edited", "portability", "general"
REPHRASE, OTHER_PICTURE, REPHRASE_OTHER_PICTURE = "rephrase", "other_picture", "rephrase_other_picture"
BY_NAME = "by_name"
SAME_QUESTION_OTHER_PICTURE = "same_question_other_picture"
OTHER_QUESTION_SAME_PICTURE = "other_question_same_picture"
NO_PICTURE, UNRELATED = "no_picture", "unrelated"

EFFICACY, GENERALITY, LOCALITY, ABILITY = "efficacy", "generality", "locality", "general ability"
ASPECTS = (EFFICACY, GENERALITY, PORTABILITY, LOCALITY, ABILITY)
KINDS: Mapping[str, tuple[str, str]] = {
    EDITED: (EFFICACY, "the edited question and picture"),
    REPHRASE: (GENERALITY, "other wordings"),
    OTHER_PICTURE: (GENERALITY, "other pictures of the same thing"),
    REPHRASE_OTHER_PICTURE: (GENERALITY, "other wordings, other pictures"),
    BY_NAME: (GENERALITY, "asked by name"),
    PORTABILITY: (PORTABILITY, "questions that need the new fact"),
    SAME_QUESTION_OTHER_PICTURE: (LOCALITY, "same question, pictures of other things"),
    OTHER_QUESTION_SAME_PICTURE: (LOCALITY, "other questions, same picture"),
    NO_PICTURE: (LOCALITY, "same question, no picture"),
    UNRELATED: (LOCALITY, "unrelated questions"),
    GENERAL: (ABILITY, "held-out questions"),
}
"""Kind of question -> (what it measures, its name for people)."""
PROBE_KINDS = tuple(kind for kind in KINDS if kind not in (EDITED, GENERAL))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question about an edit. Raises `EditError` for an unknown kind, or for portability without an answer."""

    kind: str
    """One of PROBE_KINDS."""
    prompt: Prompt
    answer: str | None = None
    """If it moves: the answer after the edit, by default the target. If it stays: the right answer, where known."""
    moves: bool | None = None
    """The answer should become the target (or `answer`) with the edit; by default as the kind says."""
    hops: int | None = None
    """Of portability: how many facts away from the edited one."""

    def __post_init__(self) -> None:
        if self.kind not in PROBE_KINDS:
            raise EditError(f"no kind of probe {self.kind!r}; pass one of {', '.join(PROBE_KINDS)}")
        if self.moves is None:
            object.__setattr__(self, "moves", self.aspect != LOCALITY)
        if self.moves != (self.aspect != LOCALITY):
            raise EditError(
                f"a probe of kind {self.kind!r} measures {self.aspect}; moves={self.moves} does not fit, leave it out"
            )
        if self.kind == PORTABILITY and self.answer is None:
            raise EditError(
                f"the portability probe {self.prompt.question!r} has no answer; pass the answer that follows from the "
                "new fact"
            )

    @property
    def aspect(self) -> str:
        """What it measures: generality, portability or locality."""
        return KINDS[self.kind][0]


@dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """One edit to make, and the questions about it."""

    request: EditRequest
    probes: tuple[Probe, ...] = ()
    old: str | None = None
    """The present answer, which the target is compared with; None: what the unedited model says."""
    name: str = ""
    """Short and its own; by default the request's name, or else the record's place in the list."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", tuple(self.probes))

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.request}, {counted(len(self.probes), 'probe')})"


def names_of(records: Sequence[Record]) -> tuple[str, ...]:
    """The records' names, in order. EditError for no records, or for a name that two of them have."""
    if not records:
        raise EditError("no records to evaluate; pass at least one Record")
    names = tuple(record.name or record.request.name or str(index) for index, record in enumerate(records))
    for name in names:
        if names.count(name) > 1:
            raise EditError(
                f"{names.count(name)} records have the name {name!r}; give each one its own, or none a name"
            )
    return names


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


Pair = tuple[float, float]
"""A number of the unedited and of the edited model."""
General = Sequence[tuple[Prompt, str]]
"""Held-out questions with their right answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """One question of one record."""

    record: str
    """The record's name."""
    kind: str
    prompt: Prompt
    key: str
    """`key_of` its prompt."""
    new: str
    """The answer that it should have after the edit; where it should stay, the one that must not leak into it."""
    known: str | None = None
    """The present answer as the caller knows it."""
    hops: int | None = None

    @property
    def aspect(self) -> str:
        """What it measures."""
        return KINDS[self.kind][0]

    @property
    def stays(self) -> bool:
        """Its answer should be the same after the edit."""
        return self.aspect in (LOCALITY, ABILITY)

    def old(self, before: Responses) -> str:
        """The present answer: as the caller knows it, else what the unedited model says."""
        return before.generated[self.key] if self.known is None else self.known

    def feed(self, before: Responses) -> AnswerFeed:
        """Return the answers to feed in: the new and the old one. Whole rankings are kept for questions that stay."""
        if self.kind == GENERAL:
            return AnswerFeed(key=self.key, prompt=self.prompt)
        old = self.old(before)
        return AnswerFeed(
            key=self.key, prompt=self.prompt, answers=(self.new, old), reference=old if self.stays else None
        )


def questions_of(records: Sequence[Record], general: General = ()) -> tuple[Question, ...]:
    """The edited question and the probes of each record, then the general ones. EditError as `names_of`."""
    named = zip(names_of(records), records, strict=True)
    own = [question for name, record in named for question in record_questions(name, record)]
    return (*own, *general_questions(general))


def unedited_by_others(questions: Iterable[Question], records: Sequence[Record]) -> tuple[Question, ...]:
    """Return the questions without those that should stay, but whose answer another record is meant to change.

    For edits that are in the model at once. A request is meant to change its prompt, contexts and rewrite prompts, and
    whatever asks whether it generalises; a prompt is the same only with the same picture and words.
    """
    questions = tuple(questions)
    changing: dict[str, set[str]] = {}
    for name, record in zip(names_of(records), records, strict=True):
        for prompts in record.request.goals:
            for prompt in prompts:
                changing.setdefault(key_of(prompt), set()).add(name)
    for each in questions:
        if not each.stays:
            changing.setdefault(each.key, set()).add(each.record)
    return tuple(each for each in questions if not (each.stays and changing.get(each.key, set()) - {each.record}))


def general_questions(general: General, record: str | None = None) -> tuple[Question, ...]:
    """Held-out questions as questions of this record, or each on its own."""
    return tuple(
        Question(
            record=record or f"general {index}",
            kind=GENERAL,
            prompt=prompt,
            key=key_of(prompt),
            new=answer,
            known=answer,
        )
        for index, (prompt, answer) in enumerate(general)
    )


def record_questions(name: str, record: Record) -> Iterator[Question]:
    """The edited question of the record of this name, then its probes."""
    target = record.request.target
    prompt = record.request.prompt
    yield Question(record=name, kind=EDITED, prompt=prompt, key=key_of(prompt), new=target, known=record.old)
    for probe in record.probes:
        given = {"record": name, "kind": probe.kind, "prompt": probe.prompt, "key": key_of(probe.prompt)}
        if probe.aspect == LOCALITY:
            yield Question(**given, new=target, known=probe.answer)
        else:
            yield Question(**given, new=target if probe.answer is None else probe.answer, hops=probe.hops)


def numbers(question: Question, before: Responses, after: Responses) -> Mapping[str, Pair]:
    """Protocol -> the numbers of the two states; those of free generation come first."""
    if question.stays:
        return {**_staying(question, before, after), **_kept(question, before, after)}
    said = [state.generated[question.key] for state in (before, after)]
    found: dict[str, Pair] = {
        EXACT: _pair(float(exact_match(each, question.new)) for each in said),
        VQA: _pair(float(vqa_match(each, question.new)) for each in said),
    }
    if question.kind == EDITED and question.key in before.fluencies and question.key in after.fluencies:
        found[FLUENCY] = _pair(fluency(state.fluencies[question.key].split()) for state in (before, after))
    news = _scores(question, question.new, before, after)
    if news:
        found[TOKENS] = _pair(token_accuracy(score.predicted, score.ids) for score in news)
        found[SEQUENCE] = _pair(sequence_accuracy(score.predicted, score.ids) for score in news)
    olds = _scores(question, question.old(before), before, after)
    if news and olds and question.old(before) != question.new:
        margins = [_probability(new) - _probability(old) for new, old in zip(news, olds, strict=True)]
        found[HIGHER] = _pair(float(margin > 0) for margin in margins)
        found[MARGIN] = _pair(margins)
    return found


def _staying(question: Question, before: Responses, after: Responses) -> dict[str, Pair]:
    """What free generation tells about a question whose answer should stay."""
    said = [state.generated[question.key] for state in (before, after)]
    found: dict[str, Pair] = {}
    if said[0]:  # a model that said nothing had no answer to keep
        found[UNCHANGED] = (1.0, float(exact_match(said[1], said[0])))
    if question.known is not None:
        found[EXACT] = _pair(float(exact_match(each, question.known)) for each in said)
        found[VQA] = _pair(float(vqa_match(each, question.known)) for each in said)
        if UNCHANGED in found and exact_match(said[0], question.known):
            found[UNCHANGED_RIGHT] = found[UNCHANGED]
    if question.kind != GENERAL:
        found[SAYS_NEW] = _pair(float(exact_match(each, question.new)) for each in said)
    return found


def _kept(question: Question, before: Responses, after: Responses) -> dict[str, Pair]:
    """What the answers fed in tell about a question whose answer should stay."""
    name = (question.key, question.old(before))
    if name not in before.ranks or name not in after.ranks:
        return {}
    ranks, count = [before.ranks[name], after.ranks[name]], len(before.scores[name].ids)
    olds, news = (_scores(question, answer, before, after) for answer in (name[1], question.new))
    found: dict[str, Pair] = {}
    if news and name[1] != question.new:
        pairs = zip(olds, news, strict=True)
        found[KEPT_HIGHER] = _pair(float(_probability(old) > _probability(new)) for old, new in pairs)
    return found | {
        TOP1_ANSWER: (1.0, agreement(*(each[-count:, :1] for each in ranks))),
        TOP1_WHOLE: (1.0, agreement(*(each[:, :1] for each in ranks))),
        TOP10_WHOLE: (1.0, agreement(*ranks)),
        KL: (0.0, kl_divergence(before.first[name], after.first[name])),
    }


def _scores(question: Question, answer: str, *states: Responses) -> tuple[AnswerScore, ...]:
    """The answer's score in each state; empty if it was not fed in, or has no tokens."""
    key = question.key, answer
    return tuple(state.scores[key] for state in states) if all(key in state.scores for state in states) else ()


def _probability(score: AnswerScore) -> float:
    return normalised_probability(score.log_probabilities)


def _pair(values: Iterator[float] | Sequence[float]) -> Pair:
    before, after = values
    return before, after
