"""Asks the unedited and the edited model the same questions about edits, and turns both answers into rows of numbers.

`measured` asks checks (`checks.Check`: one question with the answer that it should have) without and with a change and
returns one `ProbeRow` per check. `baseline` measures the unedited model once, for several editors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import from_plain
from ...data.facts import ABILITY, EDITED, ORIGINAL_ENTITY, EditRecord, Question
from ...models import Prompt, VisionLanguageModel
from ...models.errors import whole_number
from ...models.prompts import batches, collate
from ..changes import Change
from ..requests import EDITED as EDITED_STATUS, NOT_GENERATED, EditError, prompt_answers, says_target
from .checks import Check, checks_of, general_checks, names_of
from .metrics import (
    BEGINS,
    CONTAINS,
    EXACT,
    FLUENCY,
    HIGHER,
    KEPT_HIGHER,
    KL,
    MARGIN,
    NOT_NEW,
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
    begins_with_answer,
    contains_answer,
    exact_match,
    fluency,
    kl_divergence,
    normalised_probability,
    sequence_accuracy,
    token_accuracy,
    vqa_match,
)
from .reports import EvaluationSettings, Pair, ProbeRow


def blocks(checks: Iterable[Check], batch_size: int) -> Iterator[list[Check]]:
    """Yield the checks in blocks of a few batches of different questions; those of one question are in one block.

    Raises `ModelError` if the batch size is not a whole number of at least 1.
    """
    size = _BATCHES * whole_number(batch_size, "batch_size", least=1)
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.key, []).append(check)
    keys = list(groups)
    for start in range(0, len(keys), size):
        yield [check for key in keys[start : start + size] for check in groups[key]]


def generate_answers(
    vlm: VisionLanguageModel, prompts: Mapping[str, Prompt], *, max_new_tokens: int, batch_size: int
) -> dict[str, str]:
    """Return the free (greedily generated) answer to each prompt by key, empty if its logits are not finite.

    Prompts of similar length share a batch, which keeps padding small.

    Args:
        vlm: The model, unedited or with an edit in it.
        prompts: The prompts by key of their question.
        max_new_tokens: Maximum length of an answer in tokens.
        batch_size: Number of prompts that run together.
    """
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
    """Add to `responses` how the model predicts given answers, with the tokens of each answer fed in (teacher forcing).

    Log-probabilities are computed in float64. An answer without tokens is left out.

    Args:
        vlm: The model, unedited or with an edit in it.
        prompts: The prompts by key of their question.
        answers: (key, answer) -> whether its rankings are stored too, for comparison with another state of the model.
        responses: Receives the scores (and rankings) in place.
        batch_size: Number of answers that run together.

    Raises:
        ModelError: An answer is empty.
    """
    rows = [(name, prompts[name[0]].with_answer(name[1]), is_kept) for name, is_kept in answers.items()]
    rows = sorted((row for row in rows if row[1].answer_ids), key=lambda row: _place(row[1]))
    for batch in batches([prompt for _, prompt, _ in rows], batch_size):
        chunk = [rows[index] for index in batch]
        inputs, offsets = collate([prompt for _, prompt, _ in chunk], vlm.tokenizer, side="left")
        for logits, offset, (name, prompt, is_kept) in zip(vlm.logits(inputs), offsets, chunk, strict=True):
            _note(responses, name, prompt, logits[offset:], is_kept=is_kept)


def answers_to_feed(checks: Iterable[Check], before: Responses) -> dict[tuple[str, str], bool]:
    """Return (key, answer) -> whether its rankings are compared, for every answer that is fed in."""
    answers: dict[tuple[str, str], bool] = {}
    for check in checks:
        for answer in check.answers(before):
            name = (check.key, answer)
            # two checks may share question and answer; the ranking is kept if either needs it
            answers[name] = answers.get(name, False) or answer == check.reference(before)
    return answers


def _note(responses: Responses, name: tuple[str, str], prompt: Prompt, logits: Tensor, *, is_kept: bool) -> None:
    """Add the logits (token, vocab) of one prompt with its answer to the responses."""
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
    """A sort key that puts prompts of similar length next to each other, text-only prompts first."""
    return bool(prompt.images), prompt.length


def numbers(check: Check, before: Responses, after: Responses) -> Mapping[str, Pair]:
    """Return protocol -> (unedited, edited) of one check; the numbers of free generation come first."""
    if check.stays:
        return {**_staying(check, before, after), **_kept(check, before, after)}
    said = [state.generated[check.key] for state in (before, after)]
    found: dict[str, Pair] = {
        EXACT: _pair(float(exact_match(each, check.new)) for each in said),
        VQA: _pair(float(vqa_match(each, check.new)) for each in said),
        BEGINS: _pair(float(begins_with_answer(each, check.new)) for each in said),
        CONTAINS: _pair(float(contains_answer(each, check.new)) for each in said),
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
    """The numbers from free generation for a question whose answer should stay."""
    said = [state.generated[check.key] for state in (before, after)]
    found: dict[str, Pair] = {}
    if said[0]:  # a model that said nothing had no answer to keep
        found[UNCHANGED] = (1.0, float(exact_match(said[1], said[0])))
    if check.known is not None:
        found[EXACT] = _pair(float(exact_match(each, check.known)) for each in said)
        found[VQA] = _pair(float(vqa_match(each, check.known)) for each in said)
        if UNCHANGED in found and exact_match(said[0], check.known):
            found[UNCHANGED_RIGHT] = found[UNCHANGED]
    if check.kind == ORIGINAL_ENTITY:
        found[NOT_NEW] = _pair(float(not contains_answer(each, check.new)) for each in said)
    if check.aspect != ABILITY:
        found[SAYS_NEW] = _pair(float(exact_match(each, check.new)) for each in said)
    return found


def _kept(check: Check, before: Responses, after: Responses) -> dict[str, Pair]:
    """The teacher-forced numbers for a question whose answer should stay."""
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
    """The score of the answer in each state; empty if it was not fed in."""
    key = check.key, answer
    return tuple(state.scores[key] for state in states) if all(key in state.scores for state in states) else ()


def _probability(score: AnswerScore) -> float:
    return normalised_probability(score.log_probabilities)


def _pair(values: Iterator[float] | Sequence[float]) -> Pair:
    before, after = values
    return before, after


PromptTransform = Callable[[Prompt], Prompt]
"""A function from the prompt of a question to the prompt that the edited model is given."""
_BATCHES = 4
"""Number of batches whose prompts exist at a time; a change is applied and undone once for each such block."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Baseline:
    """The responses of the unedited model to a set of questions, measured once for all editors by `baseline`.

    It holds texts and a few numbers per question, but no tensors: the rankings that some protocols compare are computed
    again by each evaluation.
    """

    model: str
    """Name or path of the model."""
    revision: str | None
    """Revision of the model; None if it has none."""
    settings: EvaluationSettings
    """What was measured."""
    responses: Responses
    """The free answers and the scores of given answers, by key of the question."""

    def __repr__(self) -> str:
        return f"Baseline of {self.model!r}: {len(self.responses.generated)} questions, {self.settings}"

    def as_json(self) -> dict[str, Any]:
        """Return the baseline as plain values, as JSON has them; `from_json` reads them."""
        responses = self.responses
        scores = [[key, answer, asdict(score)] for (key, answer), score in responses.scores.items()]
        own = {"model": self.model, "revision": self.revision, "settings": asdict(self.settings)}
        return {**own, "generated": responses.generated, "fluencies": responses.fluencies, "scores": scores}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the baseline from the plain values that `as_json` gave."""
        scores = {(key, answer): from_plain(AnswerScore, score) for key, answer, score in content["scores"]}
        texts = {name: dict(content[name]) for name in ("generated", "fluencies")}
        own = {name: content[name] for name in ("model", "revision")}
        settings = EvaluationSettings(**content["settings"])
        return cls(**own, settings=settings, responses=Responses(**texts, scores=scores))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return one baseline with the responses of several (at least one) of the same model and settings."""
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
    """Return the responses of the unedited model to all questions of the records; equal questions are asked once.

    Pass the result to several calls of `evaluate`, each of which would otherwise ask the unedited model again. The
    model is left unchanged.

    Args:
        vlm: The unedited model.
        records: The edits, with the questions about them.
        general: Held-out questions with their right answers, which measure general ability; by default none.
        settings: What is measured; None for the defaults of `EvaluationSettings`.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show a progress bar.

    Returns:
        The free answers and the scores of given answers, without tensors.

    Raises:
        EditError: There are no records, two records have the same id, or a held-out question has no answer.
        DataError: The file of a picture cannot be read.
        ModelError: A file is not a picture, pictures of one batch have different sizes after the processor, or the
            batch size is below 1.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import baseline
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro")
        >>> unedited = baseline(vlm, [record], progress=False)
        >>> len(unedited.responses.generated)
        1
        >>> report = mt.evaluate(vlm, [record], mt.MultEdit(layer=5, steps=5), baseline=unedited, progress=False)
        >>> report.rows[0].before == unedited.responses.generated[record.question.key]
        True
    """
    settings, names = settings or EvaluationSettings(), names_of(records)
    checks = [check for name, record in zip(names, records, strict=True) for check in checks_of(name, record)]
    checks += general_checks(general)
    responses = Responses()
    bar = tqdm(total=len(checks), desc="unedited answers", unit="question", disable=not progress, leave=False)
    with bar:
        for block in blocks(checks, batch_size):
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

    Checks are asked in blocks, and of each block only the rows stay in memory. Tensors therefore do not grow with the
    number of checks. The change is in the model while the edited half of a block is asked, and any exit undoes it.

    Args:
        vlm: The unedited model.
        checks: The questions, of one or several records.
        change: The change; None stands for an edit that could not be made, and both halves of a row are then those of
            the unedited model.
        settings: What is measured.
        reference: The responses of the unedited model to all these questions; None to ask it here.
        transform: Turns each prompt into the one that the edited model is given; None for the same prompt.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show a progress bar.

    Returns:
        The rows, each with both free answers and the numbers of both models.

    Raises:
        EditError: The reference lacks a question, or the change does not fit the model.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.evaluation import EXACT, EvaluationSettings, checks_of, measured
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro")
        >>> change = mt.MultEdit(layer=5, steps=25).edit(vlm, [record], progress=False)
        >>> (row,) = measured(vlm, checks_of("a", record), change, settings=EvaluationSettings(), batch_size=8)
        >>> row.numbers[EXACT], row.after
        ((0.0, 1.0), 'Pruro')
    """
    checks = tuple(checks)
    rows: dict[Check, ProbeRow] = {}
    bar = tqdm(total=len(checks), desc="questions", unit="question", disable=not progress, leave=False)
    with bar:
        for block in blocks(checks, batch_size):
            prompts = _prompts(vlm, block)
            before = after = _unedited(vlm, block, prompts, reference, settings, batch_size=batch_size)
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
    transform: PromptTransform | None = None,
    batch_size: int,
) -> tuple[ProbeRow, ...]:
    """Return one row per check, in order: the reference beside the model as it is now, by free generation only.

    Args:
        vlm: The model with the edits that are to be measured; it is left as it is.
        checks: The questions.
        reference: The responses of the unedited model to all these questions.
        settings: What is measured; teacher-forced numbers and fluency are left out whatever it says.
        transform: Turns each prompt into the one that the model is given; None for the same prompt.
        batch_size: Number of questions that are answered together.

    Raises:
        EditError: The reference lacks a question.
    """
    checks, rows = tuple(checks), {}
    free = replace(settings, forced=False, fluency_tokens=0)
    for block in blocks(checks, batch_size):
        _check_known(block, reference)
        prompts = _prompts(vlm, block)
        prompts = prompts if transform is None else {key: transform(each) for key, each in prompts.items()}
        after = _responses(vlm, block, prompts, free, batch_size=batch_size)
        rows |= zip(block, rows_of(block, reference.responses, after), strict=True)
    return tuple(rows[check] for check in checks)


def statuses_of(change: Change, count: int) -> tuple[str, ...]:
    """Return the status of each of `count` requests as the change reports it, "edited" if it reports none."""
    reports = getattr(change, "requests", ())
    reports = reports if len(reports) == count else ({},) * count
    return tuple(report.get("status", EDITED_STATUS) for report in reports)


def seen_statuses(statuses: Mapping[str, str], rows: Iterable[ProbeRow]) -> dict[str, str]:
    """Return the statuses by record, with "not generated" for an edit whose question is not answered with its target.

    A target that a continuing model goes on after with a mark counts as an answer (`says_target`).

    statuses: Record -> status that its change reported. rows: What was measured with the edits in the model.
    """
    silent = {row.record for row in rows if row.kind == EDITED and not says_target(row.after, row.new)}
    is_silent = {name: status == EDITED_STATUS and name in silent for name, status in statuses.items()}
    return {name: NOT_GENERATED if is_silent[name] else status for name, status in statuses.items()}


def transform_of(change: Change | None) -> PromptTransform | None:
    """Return the `prompt_transform` of a change that works in the prompt; None for a change of weights."""
    return getattr(change, "prompt_transform", None)


def rows_of(checks: Iterable[Check], before: Responses, after: Responses) -> Iterator[ProbeRow]:
    """Yield one row per check, with the answers and numbers of both states of the model."""
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
    """Return the responses of the model as it is now.

    before: the responses with the old answers, which are fed in; None for the responses that are returned. is_ranked:
    whether rankings are stored for questions whose answers should stay.
    """
    responses = Responses()
    # free answers come first, since they may be the old answers that are fed in
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


def _unedited(
    vlm: VisionLanguageModel,
    checks: Sequence[Check],
    prompts: Mapping[str, Prompt],
    reference: Baseline | None,
    settings: EvaluationSettings,
    *,
    batch_size: int,
) -> Responses:
    """Return the responses of the unedited model to these checks, with its rankings.

    Free answers and scores are those of the reference. Rankings are computed here, and so are the scores of answers
    that the reference lacks, such as those of another target.
    """
    if reference is None:
        return _responses(vlm, checks, prompts, settings, batch_size=batch_size)
    _check_known(checks, reference)
    known, added = reference.responses, Responses()
    answers = answers_to_feed(checks, known) if settings.forced else {}
    missing = {name: is_kept for name, is_kept in answers.items() if is_kept or name not in known.scores}
    feed(vlm, prompts, missing, added, batch_size=batch_size)
    scores = {**added.scores, **{name: known.scores[name] for name in answers if name in known.scores}}
    return replace(known, scores=scores, ranks=added.ranks, first=added.first)


def _check_known(checks: Iterable[Check], reference: Baseline) -> None:
    for check in checks:
        if check.key not in reference.responses.generated:
            raise EditError(
                f"the baseline does not hold {check.question.text!r} ({check.kind}); "
                "make it with baseline() from the same records and general questions"
            )
