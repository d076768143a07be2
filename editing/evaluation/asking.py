"""The questions about edits, which both states of a model are asked in the same way, and the rows that this gives."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import from_plain
from ...data.facts import ABILITY, EDITED, GENERAL, KINDS, LOCALITY, EditRecord, Question
from ...models import Prompt, VisionLanguageModel
from ...models.prompts import collate
from ..changes import Change
from ..requests import EDITED as EDITED_STATUS, NOT_GENERATED, EditError, edited_questions, prompt_answers
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
    AnswerScore,
    Responses,
    agreement,
    exact_match,
    fluency,
    kl_divergence,
    normalised_probability,
    sequence_accuracy,
    token_accuracy,
    vqa_match,
)
from .reports import EvaluationSettings, LeftOut, Pair, ProbeRow


def names_of(records: Sequence[EditRecord]) -> tuple[str, ...]:
    """Return the ids of the records in order; a record without one is called by its place in the sequence.

    Raises `EditError` if there are no records, if something else stands among them, or if two of them have the same id.
    """
    if not isinstance(records, Sequence):  # a generator would be used up after the first look at it
        raise EditError(f"the records are of type {type(records).__name__}; pass a list of EditRecord")
    if foreign := [record for record in records if not isinstance(record, EditRecord)]:
        raise EditError(f"among the records is one of type {type(foreign[0]).__name__}; pass a list of EditRecord")
    if not records:
        raise EditError("no records to evaluate; pass at least one EditRecord")
    names = tuple(record.id or str(index) for index, record in enumerate(records))
    counts = Counter(names)
    for name in names:
        if counts[name] > 1:
            raise EditError(f"{counts[name]} records have the id {name!r}; give each one its own, or none an id")
    return names


@dataclass(frozen=True, kw_only=True, eq=False)
class Check:
    """One question of one record, and what its answer should be."""

    record: str
    """The record's id."""
    kind: str
    """One of KINDS."""
    question: Question
    new: str
    """The answer that it should have after the edit; where it should stay, the one that must not leak into it."""
    known: str | None = None
    """The present answer as the caller knows it."""
    hops: int | None = None
    needs: tuple[str, ...] = ()
    """Ids of other records whose edits the answer needs too."""

    @property
    def key(self) -> str:
        """What tells the question apart from all others, as a model sees it."""
        return self.question.key

    @property
    def aspect(self) -> str:
        """What it measures."""
        return KINDS[self.kind][0]

    @property
    def stays(self) -> bool:
        """Whether its answer should be the same after the edit."""
        return self.aspect in (LOCALITY, ABILITY)

    def old(self, before: "Responses") -> str:
        """Return the present answer: as the caller knows it, else what the unedited model says."""
        return before.generated[self.key] if self.known is None else self.known

    def answers(self, before: "Responses") -> tuple[str, ...]:
        """Return the answers to feed in: the new and the old one."""
        return () if self.kind == GENERAL else tuple(dict.fromkeys((self.new, self.old(before))))

    def reference(self, before: "Responses") -> str | None:
        """Return the answer under which whole rankings are compared; None where the answer should move."""
        return self.old(before) if self.stays and self.kind != GENERAL else None


def checks_of(name: str, record: EditRecord) -> Iterator[Check]:
    """Yield the edited question of the record of this name, then its probes."""
    target = record.target
    yield Check(record=name, kind=EDITED, question=record.question, new=target, known=record.old)
    for probe in record.probes:
        shared = {"record": name, "kind": probe.kind, "question": probe.question, "needs": probe.needs}
        if probe.stays:
            yield Check(**shared, new=target, known=probe.answer)
        else:
            yield Check(**shared, new=target if probe.answer is None else probe.answer, hops=probe.hops)


def general_checks(general: Sequence[Question], record: str | None = None) -> tuple[Check, ...]:
    """Return held-out questions as questions of this record, or each on its own.

    Raises `EditError` for a question without an answer.
    """
    for question in general:
        if question.answer is None:
            raise EditError(f"the held-out question {question.text!r} has no answer; pass Question(..., answer=...)")
    return tuple(
        Check(
            record=record or f"general {index}",
            kind=GENERAL,
            question=question,
            new=question.answer or "",
            known=question.answer,
        )
        for index, question in enumerate(general)
    )


def asked_together(
    checks: Iterable[Check], records: Mapping[str, EditRecord], edited: Iterable[str]
) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
    """Return the checks that mean something while several edits are in the model at once, and those left out.

    Left out are questions that should stay for one record, but whose answer another record is meant to change, and
    questions that need an edit that is not in the model. A record is meant to change its question, contexts and rewrite
    prompts, and whatever asks whether it generalises; a question is the same only with the same picture and words.

    Args:
        checks: The questions of the records.
        records: The records by id.
        edited: Ids of the records whose edits are in the model.
    """
    checks, present = tuple(checks), set(edited)
    changing: dict[str, set[str]] = {}
    for name, record in records.items():
        for question in edited_questions(record):
            changing.setdefault(question.key, set()).add(name)
    for check in checks:
        if not check.stays:
            changing.setdefault(check.key, set()).add(check.record)
    chosen, rest = [], []
    for check in checks:
        others = changing.get(check.key, set()) - {check.record} if check.stays else set()
        if others:
            rest.append(_left_out(check, f"the edit of {min(others)!r} is meant to change its answer"))
        elif missing := lacking(check, present):
            rest.append(missing)
        else:
            chosen.append(check)
    return tuple(chosen), tuple(rest)


def lacking(check: Check, edited: Iterable[str]) -> LeftOut | None:
    """Return why the check has to be left out if its answer needs an edit that is not in the model, else None."""
    missing = [name for name in check.needs if name not in edited]
    if not missing:
        return None
    return _left_out(check, f"its answer needs the edit of {missing[0]!r} too, which is not in the model")


def _left_out(check: Check, reason: str) -> LeftOut:
    return LeftOut(record=check.record, kind=check.kind, question=check.question.text, reason=reason)


def blocks(checks: Iterable[Check], size: int) -> Iterator[list[Check]]:
    """Yield the checks in blocks of so many different questions; checks that ask the same are in one block."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.key, []).append(check)
    keys = list(groups)
    for start in range(0, len(keys), size):
        yield [check for key in keys[start : start + size] for check in groups[key]]


def generate_answers(
    vlm: VisionLanguageModel, prompts: Mapping[str, Prompt], *, max_new_tokens: int, batch_size: int
) -> dict[str, str]:
    """Return the free answer to each prompt by key; prompts of similar length share a batch."""
    ordered = dict(sorted(prompts.items(), key=lambda pair: _place(pair[1])))
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = prompt_answers(vlm, list(ordered.values()), **options) if ordered else []
    return {key: answer or "" for key, answer in zip(ordered, answers, strict=True)}


@torch.no_grad()
def feed(
    vlm: VisionLanguageModel,
    prompts: Mapping[str, Prompt],
    answers: Mapping[tuple[str, str], bool],
    responses: Responses,
    *,
    batch_size: int,
) -> None:
    """Add the model's predictions of given answers to the responses; an answer without tokens is left out.

    Args:
        vlm: The model.
        prompts: Key of a question -> its prompt.
        answers: (key, answer) -> whether the whole ranking is kept, for comparison with another state of the model.
        responses: What the predictions are added to.
        batch_size: Number of answers that are fed in together.
    """
    rows = [(name, prompts[name[0]].with_answer(name[1]), is_kept) for name, is_kept in answers.items()]
    rows = sorted((row for row in rows if row[1].answer_ids), key=lambda row: _place(row[1]))
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        inputs, offsets = collate([prompt for _, prompt, _ in chunk], vlm.tokenizer, side="left")
        for logits, offset, (name, prompt, is_kept) in zip(vlm.logits(inputs), offsets, chunk, strict=True):
            _note(responses, name, prompt, logits[offset:], is_kept=is_kept)


def answers_to_feed(checks: Iterable[Check], before: Responses) -> dict[tuple[str, str], bool]:
    """Return (key, answer) -> whether its ranking is kept, for every answer that is fed in."""
    answers: dict[tuple[str, str], bool] = {}
    for check in checks:
        for answer in check.answers(before):
            name = (check.key, answer)
            # two checks may share question and answer; the ranking is kept if either needs it
            answers[name] = answers.get(name, False) or answer == check.reference(before)
    return answers


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
        responses.first[name] = predicting[0].to("cpu", torch.float32, copy=True)  # a view would keep all logits


def _place(prompt: Prompt) -> tuple[bool, int]:
    """Sort key that keeps the padding of batches small."""
    return bool(prompt.images), prompt.length


def numbers(check: Check, before: Responses, after: Responses) -> Mapping[str, Pair]:
    """Protocol -> the numbers of the two states; those of free generation come first."""
    if check.stays:
        return {**_staying(check, before, after), **_kept(check, before, after)}
    said = [state.generated[check.key] for state in (before, after)]
    found: dict[str, Pair] = {
        EXACT: _pair(float(exact_match(each, check.new)) for each in said),
        VQA: _pair(float(vqa_match(each, check.new)) for each in said),
    }
    if check.kind == EDITED and check.key in before.fluencies and check.key in after.fluencies:
        found[FLUENCY] = _pair(fluency(state.fluencies[check.key].split()) for state in (before, after))
    news = _scores(check, check.new, before, after)
    if news:
        found[TOKENS] = _pair(token_accuracy(score.predicted, score.ids) for score in news)
        found[SEQUENCE] = _pair(sequence_accuracy(score.predicted, score.ids) for score in news)
    olds = _scores(check, check.old(before), before, after)
    if news and olds and check.old(before) != check.new:
        margins = [_probability(new) - _probability(old) for new, old in zip(news, olds, strict=True)]
        found[HIGHER] = _pair(float(margin > 0) for margin in margins)
        found[MARGIN] = _pair(margins)
    return found


def _staying(check: Check, before: Responses, after: Responses) -> dict[str, Pair]:
    """What free generation tells about a question whose answer should stay."""
    said = [state.generated[check.key] for state in (before, after)]
    found: dict[str, Pair] = {}
    if said[0]:  # a model that said nothing had no answer to keep
        found[UNCHANGED] = (1.0, float(exact_match(said[1], said[0])))
    if check.known is not None:
        found[EXACT] = _pair(float(exact_match(each, check.known)) for each in said)
        found[VQA] = _pair(float(vqa_match(each, check.known)) for each in said)
        if UNCHANGED in found and exact_match(said[0], check.known):
            found[UNCHANGED_RIGHT] = found[UNCHANGED]
    if check.kind != GENERAL:
        found[SAYS_NEW] = _pair(float(exact_match(each, check.new)) for each in said)
    return found


def _kept(check: Check, before: Responses, after: Responses) -> dict[str, Pair]:
    """What the answers fed in tell about a question whose answer should stay."""
    name = (check.key, check.old(before))
    if name not in before.ranks or name not in after.ranks:
        return {}
    ranks, count = [before.ranks[name], after.ranks[name]], len(before.scores[name].ids)
    olds, news = (_scores(check, answer, before, after) for answer in (name[1], check.new))
    found: dict[str, Pair] = {}
    if news and name[1] != check.new:
        pairs = zip(olds, news, strict=True)
        found[KEPT_HIGHER] = _pair(float(_probability(old) > _probability(new)) for old, new in pairs)
    return found | {
        TOP1_ANSWER: (1.0, agreement(*(each[-count:, :1] for each in ranks))),
        TOP1_WHOLE: (1.0, agreement(*(each[:, :1] for each in ranks))),
        TOP10_WHOLE: (1.0, agreement(*ranks)),
        KL: (0.0, kl_divergence(before.first[name], after.first[name])),
    }


def _scores(check: Check, answer: str, *states: Responses) -> tuple[AnswerScore, ...]:
    """The answer's score in each state; empty if it was not fed in, or has no tokens."""
    key = check.key, answer
    return tuple(state.scores[key] for state in states) if all(key in state.scores for state in states) else ()


def _probability(score: AnswerScore) -> float:
    return normalised_probability(score.log_probabilities)


def _pair(values: Iterator[float] | Sequence[float]) -> Pair:
    before, after = values
    return before, after


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

    def as_json(self) -> dict[str, Any]:
        """Return the responses as plain values, from which `from_json` makes them again."""
        responses = self.responses
        scores = [[key, answer, asdict(score)] for (key, answer), score in responses.scores.items()]
        texts = {"generated": responses.generated, "fluencies": responses.fluencies}
        own = {"model": self.model, "revision": self.revision, "settings": asdict(self.settings)}
        return {**own, **texts, "scores": scores}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the responses that `as_json` gave."""
        scores = {(key, answer): from_plain(AnswerScore, score) for key, answer, score in content["scores"]}
        texts = {name: dict(content[name]) for name in ("generated", "fluencies")}
        own = {name: content[name] for name in ("model", "revision")}
        settings = EvaluationSettings(**content["settings"])
        return cls(**own, settings=settings, responses=Responses(**texts, scores=scores))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the responses of several baselines of one model together."""
        responses = Responses()
        for part in parts:
            responses.add(part.responses)
        return replace(parts[0], responses=responses)


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
            responses.add(found)
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
            pictures=check.question.picture_names,
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
