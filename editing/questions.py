"""All that is asked about records, in one list, and the numbers that two states of a model give for each question."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..models import Prompt
from .metrics import (
    EXACT,
    FLUENCY,
    HIGHER,
    KEPT_HIGHER,
    KL,
    MARGIN,
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
from .probes import ABILITY, EDITED, GENERAL, KINDS, LOCALITY, Record, names_of
from .requests import key_of
from .responses import AnswerFeed, AnswerScore, Responses

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
