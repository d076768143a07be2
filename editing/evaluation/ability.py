"""General ability under edits: the model's perplexity of texts, and cloze questions about facts that no edit touches.

Both are asked of the unedited model once, before the first edit, and are cheap enough to be asked again at every point
of a sequence. Texts are by default sampled from the unedited model: their perplexity is as low as the model can make it
and needs no corpus, and it rises as soon as edits change what the model would say by itself. It is measured per text,
and means are means over texts.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ...artefacts import from_plain
from ...data.facts import CLOZE, GIVEN_TEXT, OWN_TEXT, EditRecord, Question
from ...models import VisionLanguageModel
from ..changes import Change
from ..requests import EditError, edited_questions
from .asking import Baseline, PromptTransform, generate_answers, measured_now, transform_of
from .checks import Check
from .metrics import PERPLEXITY, Responses, perplexity, vqa_match
from .reports import EvaluationSettings, ProbeRow

logger = logging.getLogger("multrace")
_ATTEMPTS = 4
"""So many times the wanted number of texts are sampled at most, since some are too short."""
_ROWS = 8
"""Maximum number of texts that run together: each of their positions has a distribution over the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ReferenceText:
    """A text with its perplexity under the unedited model."""

    ids: tuple[int, ...]
    """Its token ids, as they were sampled: other tokens may spell the same text."""
    text: str
    """The text."""
    kind: str
    """"own_text" if the unedited model sampled it, "given_text" if the caller gave it."""
    perplexity: float
    """Its perplexity under the unedited model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AbilityTests:
    """What shows whether general ability stays, with the values of the unedited model. Made by `ability_tests`."""

    texts: tuple[ReferenceText, ...] = ()
    """Texts whose perplexity is measured."""
    cloze: tuple[Check, ...] = ()
    """Questions that the unedited model answers rightly."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Key of a cloze question -> the free answer of the unedited model."""
    settings: EvaluationSettings
    """How the cloze questions are asked."""
    batch_size: int = 32
    """Number of questions that are answered together."""

    def __bool__(self) -> bool:
        return bool(self.texts or self.cloze)

    def rows(
        self, vlm: VisionLanguageModel, *, record: str | None = None, transform: PromptTransform | None = None
    ) -> tuple[ProbeRow, ...]:
        """Return one row per text and cloze question: the unedited model beside the model as it is now.

        They belong to the record of this id, or, if it is None, to "text 0", "cloze 0" and so on. transform: what
        turns each prompt into the one that the model is given; None for the same prompt. Texts are no prompts.
        """
        after = text_perplexities(vlm, [each.ids for each in self.texts], batch_size=self.batch_size)
        pairs = zip(self.texts, after, strict=True)
        texts = [_text_row(record or f"text {index}", *pair) for index, pair in enumerate(pairs)]
        reference = Baseline(
            model=vlm.name,
            revision=vlm.revision,
            settings=self.settings,
            responses=Responses(generated=dict(self.answers)),
        )
        checks = self.cloze if record is None else [replace(check, record=record) for check in self.cloze]
        options = {"settings": self.settings, "transform": transform, "batch_size": self.batch_size}
        return (*texts, *measured_now(vlm, checks, reference, **options))

    def rows_with(
        self, vlm: VisionLanguageModel, change: Change | None, *, record: str | None = None
    ) -> tuple[ProbeRow, ...]:
        """Return the rows while the change is in the model; None stands for the unedited model."""
        if not self:
            return ()
        if change is None:
            return self.rows(vlm, record=record)
        with change.applied(vlm):
            return self.rows(vlm, record=record, transform=transform_of(change))

    def beside(self, records: Iterable[EditRecord]) -> Self:
        """Return the tests without the cloze questions whose answers one of the records is meant to change."""
        touched: set[str] = set()
        for record in records:
            touched.update(question.key for question in edited_questions(record))
            touched.update(probe.question.key for probe in record.probes if not probe.stays)
        return replace(self, cloze=tuple(check for check in self.cloze if check.key not in touched))

    def as_json(self) -> dict[str, Any]:
        """Return the texts and the answers as plain values; `from_json` reads them."""
        return {
            "texts": [{**asdict(each), "ids": list(each.ids)} for each in self.texts],
            "answers": dict(self.answers),
        }

    @classmethod
    def from_json(
        cls, content: Mapping[str, Any], cloze: Sequence[Question], settings: EvaluationSettings, *, batch_size: int
    ) -> Self:
        """Return the tests from the plain values that `as_json` gave and the cloze questions that it was made with.

        Args:
            content: The plain values.
            cloze: The cloze questions; those that the unedited model did not answer rightly are left out again.
            settings: What is measured.
            batch_size: Number of questions that are answered together.
        """
        answers = dict(content["answers"])
        return cls(
            texts=tuple(from_plain(ReferenceText, each) for each in content["texts"]),
            cloze=tuple(check for check in _cloze_checks(cloze) if check.key in answers),
            answers=answers,
            settings=settings,
            batch_size=batch_size,
        )


def ability_tests(
    vlm: VisionLanguageModel,
    *,
    texts: Sequence[str] = (),
    cloze: Sequence[Question] = (),
    settings: EvaluationSettings | None = None,
    batch_size: int = 32,
) -> AbilityTests:
    """Return the tests of general ability with what the unedited model says to them.

    Args:
        vlm: The unedited model.
        texts: Texts whose perplexity is measured, besides those that the settings let the model sample.
        cloze: Questions with right answers about facts that no edit touches. Those that the unedited model does not
            answer rightly (normalised for VQA) are left out: an edit cannot spoil them.
        settings: How many texts are sampled, and how questions are asked; None for the defaults of
            `EvaluationSettings`, which sample none.
        batch_size: Number of questions that are answered together; it bounds memory.

    Returns:
        The tests; they are empty, and false, if there is nothing to ask.

    Raises:
        EditError: A cloze question has no answer, a text has no two tokens, or the model has no token to begin with.
        ModelError: A text is longer than the model has positions, or holds a special token.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path, untouched_facts
        >>> from multrace.editing.evaluation import EvaluationSettings, ability_tests
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> facts = untouched_facts(world, world.edit_cases("outdated", "choose"), 4)
        >>> tests = ability_tests(vlm, cloze=facts, settings=EvaluationSettings(perplexity_texts=2))
        >>> len(tests.texts), len(tests.cloze) <= 4
        (2, True)
    """
    settings = settings or EvaluationSettings()
    given = dict.fromkeys((_tokens(vlm, text) for text in texts), GIVEN_TEXT)
    kinds = given | dict.fromkeys(sampled_texts(vlm, settings), OWN_TEXT)
    before = text_perplexities(vlm, list(kinds), batch_size=batch_size)
    checks = list(_cloze_checks(cloze))
    prompts = {check.key: vlm.prompt_for(check.question) for check in checks}
    said = generate_answers(vlm, prompts, max_new_tokens=settings.max_new_tokens, batch_size=batch_size)
    known = [check for check in checks if _is_right(check.question, said[check.key])]
    if len(known) < len(checks):
        logger.info(
            "%d of %d cloze questions are asked: the unedited model answers the others wrongly", len(known), len(checks)
        )
    return AbilityTests(
        texts=tuple(
            ReferenceText(
                ids=ids, text=vlm.tokenizer.decode(ids, skip_special_tokens=True), kind=kind, perplexity=value
            )
            for (ids, kind), value in zip(kinds.items(), before, strict=True)
        ),
        cloze=tuple(known),
        answers={check.key: said[check.key] for check in known},
        settings=settings,
        batch_size=batch_size,
    )


def cloze_questions(records: Iterable[EditRecord]) -> tuple[Question, ...]:
    """Return cloze questions about the facts of records that are not edited.

    They are the records' own questions, with their present answers, and those of their probes whose answers should
    stay. Questions whose answers the records do not know are left out, and equal ones are asked once.

    Example:
        >>> import multrace as mt
        >>> from multrace.editing.evaluation import cloze_questions
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro", old="Draivo")
        >>> cloze_questions([record])
        (Question('Who won?' -> 'Draivo', no picture),)
    """
    found: dict[str, Question] = {}
    for record in records:
        own = record.old if record.old is not None else record.question.answer
        pairs = [(record.question, own), *((each.question, each.answer) for each in record.probes if each.stays)]
        for question, answer in pairs:
            if answer is not None and answer.strip():
                asked = question if answer in question.answers else question.with_answer(answer)
                found.setdefault(question.key, replace(asked, answer=answer))
    return tuple(found.values())


@torch.no_grad()
def sampled_texts(vlm: VisionLanguageModel, settings: EvaluationSettings) -> tuple[tuple[int, ...], ...]:
    """Return different texts, as token ids, that the model samples by itself at temperature 1 from its first token on.

    Their number and length are those of the settings, whose seed decides them. A text ends where the model ends it.
    Fewer texts come back if the model keeps saying the same few. Raises `EditError` if the model has no token to begin
    with.
    """
    wanted, generator = settings.perplexity_texts, torch.Generator().manual_seed(settings.seed)
    texts: dict[tuple[int, ...], None] = {}
    for _ in range(_ATTEMPTS * -(-wanted // _ROWS)):
        texts |= dict.fromkeys(_sampled(vlm, settings.perplexity_tokens, generator))
        if len(texts) >= wanted:
            break
    return tuple(texts)[:wanted]


def _sampled(vlm: VisionLanguageModel, length: int, generator: torch.Generator) -> Iterator[tuple[int, ...]]:
    """Yield some texts of at least two tokens, from the model's first token up to the end that it gives them."""
    ids, ends = torch.full((_ROWS, 1), _first_token(vlm)), torch.tensor(vlm.end_ids, dtype=torch.long)
    banned = sorted({token for token in vlm.tokenizer.all_special_ids if token < vlm.vocab} - {*vlm.end_ids})
    length = length if vlm.positions is None else min(length, vlm.positions)
    is_done = torch.zeros(_ROWS, dtype=torch.bool)
    while ids.shape[1] < length and not is_done.all():
        logits = vlm.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1].double().cpu()
        logits[:, banned] = -torch.inf
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids, is_done = torch.cat([ids, new], dim=1), is_done | torch.isin(new[:, 0], ends)
    for row in ids.tolist():
        end = next((place for place, token in enumerate(row[1:], start=1) if token in vlm.end_ids), len(row))
        yield tuple(row[: end + 1])


def _first_token(vlm: VisionLanguageModel) -> int:
    """The token with which the model's texts begin: its own, or the end of the text before."""
    first = vlm.tokenizer.bos_token_id
    if first is None and not vlm.end_ids:
        raise EditError(
            f"{vlm.name!r} has no token to begin a text with, so it samples none; pass texts=, and perplexity_texts=0"
        )
    return vlm.end_ids[0] if first is None else first


def _tokens(vlm: VisionLanguageModel, text: str) -> tuple[int, ...]:
    """The token ids of a text as the model reads it without a template."""
    return tuple(vlm.prompt(None, text, template="raw").inputs["input_ids"][0].tolist())


@torch.no_grad()
def text_perplexities(
    vlm: VisionLanguageModel, texts: Sequence[str | Sequence[int]], *, batch_size: int = 32
) -> list[float]:
    """Return the perplexity of each text under the model as it is now, in float64.

    Every token but the first is predicted from those before it.

    Args:
        vlm: The model.
        texts: The texts, which the model reads without a template, or their token ids.
        batch_size: Maximum number of texts that run together; it bounds memory.

    Raises:
        EditError: A text has no two tokens.
        ModelError: A text is longer than the model has positions, or holds a special token.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.evaluation import text_perplexities
        >>> vlm = mt.load(tiny_vlm_path())
        >>> name, shuffled = text_perplexities(vlm, ["Namo Fludez", "Fludez Namo"])
        >>> name < shuffled
        True
    """
    rows = [_tokens(vlm, text) if isinstance(text, str) else tuple(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    size, found = min(batch_size, _ROWS), [0.0] * len(rows)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = max(len(rows[index]) for index in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # padded on the right, where no token looks
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
        for index, logits in zip(batch, vlm.logits({"input_ids": ids, "attention_mask": mask}), strict=True):
            found[index] = perplexity(_log_probabilities(logits, rows[index]))
    return found


def _log_probabilities(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token but the first, row by row: the vocabulary may be large."""
    return [row.double().log_softmax(-1)[token].item() for row, token in zip(logits, ids[1:], strict=False)]


def _text_row(record: str, text: ReferenceText, after: float) -> ProbeRow:
    words = {"new": "", "old": "", "before": "", "after": ""}
    numbers = {PERPLEXITY: (text.perplexity, after)}
    return ProbeRow(record=record, kind=text.kind, hops=None, question=text.text, pictures=(), **words, numbers=numbers)


def _cloze_checks(questions: Sequence[Question]) -> Iterator[Check]:
    """Yield the check of each cloze question. Raises `EditError` for one without an answer."""
    for index, question in enumerate(questions):
        if not question.answer:
            raise EditError(f"the cloze question {question.text!r} has no answer; pass Question(..., answer=...)")
        yield Check(record=f"cloze {index}", kind=CLOZE, question=question, new=question.answer, known=question.answer)


def _is_right(question: Question, said: str) -> bool:
    """Whether an answer is one of those that count as right."""
    return any(vqa_match(said, answer) for answer in dict.fromkeys((question.answer or "", *question.answers)))
