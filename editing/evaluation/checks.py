"""The questions about edits: a `Check` is one question of one record with the answer that it should have."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...data.facts import ABILITY, EDITED, GENERAL, KINDS, LOCALITY, EditRecord, Question
from ..requests import EditError, edited_questions
from .metrics import (
    Responses,
)
from .reports import LeftOut


def names_of(records: Sequence[EditRecord]) -> tuple[str, ...]:
    """Return the ids of the records in order; the id of a record without one is its index in the sequence, from 0.

    Raises `EditError` if there are no records, if they are not a sequence of `EditRecord`, or if two of them have the
    same id.
    """
    if not isinstance(records, Sequence):  # a generator could be read only once
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
    """One question of one record, and the answer that it should have."""

    record: str
    """Id of the record."""
    kind: str
    """Kind of question, one of `data.facts.KINDS`."""
    question: Question
    """The question that is asked."""
    new: str
    """The answer that should come with the edit. If the answer should stay, the target, which must not replace it."""
    known: str | None = None
    """The present answer according to the caller; None stands for the free answer of the unedited model."""
    hops: int | None = None
    """For portability, the number of steps from the edited fact to the answer; None if it is not known."""
    needs: tuple[str, ...] = ()
    """Ids of other records whose edits the answer depends on as well."""

    @property
    def key(self) -> str:
        """The key of the question: questions that look the same to a model have equal keys."""
        return self.question.key

    @property
    def aspect(self) -> str:
        """The property of an edit that the question measures, one of `data.facts.ASPECTS`."""
        return KINDS[self.kind][0]

    @property
    def stays(self) -> bool:
        """Whether its answer should be the same after the edit."""
        return self.aspect in (LOCALITY, ABILITY)

    def old(self, before: Responses) -> str:
        """Return the present answer: `known` if the caller gave it, else the free answer of the unedited model."""
        return before.generated[self.key] if self.known is None else self.known

    def answers(self, before: Responses) -> tuple[str, ...]:
        """Return the answers to feed in: the new and the old one, or no answers for a held-out question.

        Empty answers are left out: if the unedited model says nothing, its answer has no tokens to predict.
        """
        answers = () if self.aspect == ABILITY else dict.fromkeys((self.new, self.old(before)))
        return tuple(answer for answer in answers if answer.strip())

    def reference(self, before: Responses) -> str | None:
        """Return the answer under which the rankings of both models are compared; None if the answer should change."""
        return self.old(before) if self.aspect == LOCALITY else None


def checks_of(name: str, record: EditRecord) -> Iterator[Check]:
    """Yield the check of the record's own question, then those of its probes; `name` is the id of the record."""
    target = record.target
    yield Check(record=name, kind=EDITED, question=record.question, new=target, known=record.old)
    for probe in record.probes:
        shared = {"record": name, "kind": probe.kind, "question": probe.question, "needs": probe.needs}
        if probe.stays:
            yield Check(**shared, new=target, known=probe.answer)
        else:
            yield Check(**shared, new=target if probe.answer is None else probe.answer, hops=probe.hops)


def general_checks(general: Sequence[Question], record: str | None = None) -> tuple[Check, ...]:
    """Return the checks of held-out questions, which measure general ability.

    They belong to the record of this id, or, if it is None, to "general 0", "general 1" and so on. Raises `EditError`
    for a question without an answer.
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
    """Return the checks that can be judged while several edits are in the model at once, and those that cannot.

    A check is left out if its answer should stay for one record while another record is meant to change it, or if its
    answer needs an edit that is not in the model. A record is meant to change the answers to its question, contexts and
    rewrite prompts, and to its probes of generality and portability. Two questions are the same if a model is shown the
    same words, pictures and template.

    Args:
        checks: The questions of the records, in order.
        records: The records by id, those whose edits failed included.
        edited: Ids of the records whose edits are in the model.

    Returns:
        The checks to ask, and the others with the reason why each is left out; both in order.
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
    """Return the check as one that is left out if its answer needs an edit that is not in the model, else None."""
    missing = [name for name in check.needs if name not in edited]
    if not missing:
        return None
    return _left_out(check, f"its answer needs the edit of {missing[0]!r} too, which is not in the model")


def _left_out(check: Check, reason: str) -> LeftOut:
    return LeftOut(record=check.record, kind=check.kind, question=check.question.text, reason=reason)
