"""The answers around an edit: the questions that check it, how they are marked, and the shares of right ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ... import editing
from ...data.facts import (
    BY_NAME,
    EDITED,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
)

if TYPE_CHECKING:
    from ...data import EditRecord, Question
    from ...editing.evaluation import VerifiedAnswer
    from ...models import VisionLanguageModel

TWO_CONSTRAINTS = "two_constraints"
"""Other questions about the same picture that have a second constraint in the text."""
PROBES: Mapping[str, tuple[str, bool]] = {
    EDITED: ("the edited question and picture (efficacy)", True),
    OTHER_PICTURE: ("other pictures of the same entity (generality)", True),
    REPHRASE: ("other wordings (generality)", True),
    REPHRASE_OTHER_PICTURE: ("other wordings, other pictures (generality)", True),
    BY_NAME: ("asked by name, without a picture (generality)", True),
    SAME_QUESTION_OTHER_PICTURE: ("other entities, same question (locality)", False),
    OTHER_QUESTION_SAME_PICTURE: ("other relations of the entity (locality)", False),
    TWO_CONSTRAINTS: ("two-constraint questions of the entity (locality)", False),
}
"""Kind of question -> (its name in the report, whether its answer should become the target)."""
SUMMARIES: Mapping[str, tuple[str, ...]] = {
    "efficacy": (EDITED,),
    "other pictures": (OTHER_PICTURE,),
    "other wordings": (REPHRASE, REPHRASE_OTHER_PICTURE),
    "other entities": (SAME_QUESTION_OTHER_PICTURE,),
    "other relations": (OTHER_QUESTION_SAME_PICTURE, TWO_CONSTRAINTS),
}
"""Column of the table of all layers -> the kinds of questions that it averages over."""
STATES = ("unedited", "edited", "undone")
"""The states of the model in which every question is answered."""


class Marking:
    """How answers are read and marked: as the model gives them, and right if they are the wanted text."""

    rule = "Greedy free generation, exact match."
    """The rule in words."""

    def answer_in(self, text: str) -> str:
        """Return the answer in what the model generated."""
        return text

    def is_right(self, answer: str, question: VerifiedQuestion) -> bool:
        """Return whether an answer to the question is the one that is right after the edit."""
        wanted = question.answers.wanted
        return wanted is not None and answer == wanted.strip()


@dataclass(frozen=True, kw_only=True)
class VerifiedQuestion:
    """A question of a record, and the answers to it in the three states of the model."""

    kind: str
    """Key of PROBES."""
    question: Question
    answers: VerifiedAnswer
    marking: Marking

    @property
    def moves(self) -> bool:
        """Whether the answer should become the target; otherwise it should stay."""
        return PROBES[self.kind][1]

    def is_right(self, state: str) -> bool:
        """Return whether the answer in this state, one of STATES, is right after the edit."""
        return self.marking.is_right(getattr(self.answers, state), self)


def verified(
    vlm: VisionLanguageModel, delta: editing.Delta, record: EditRecord, marking: Marking | None = None
) -> tuple[VerifiedQuestion, ...]:
    """Return the edited question and the probes of a record, answered before, with and after the edit.

    marking: how answers are read and marked; None for exact matches.
    """
    marking = marking or Marking()
    questions = [record.question, *(probe.question for probe in record.probes)]
    return tuple(
        VerifiedQuestion(
            kind=TWO_CONSTRAINTS if answers.kind == OTHER_QUESTION_SAME_PICTURE and question.spans else answers.kind,
            question=question,
            answers=replace(answers, **{state: marking.answer_in(getattr(answers, state)) for state in STATES}),
            marking=marking,
        )
        for question, answers in zip(questions, editing.verify(vlm, delta, [record]), strict=True)
    )


def answered_again(vlm: VisionLanguageModel, probes: Sequence[VerifiedQuestion]) -> tuple[VerifiedQuestion, ...]:
    """Return the same questions, with the present answers of the model (with another edit) as the edited answers."""
    answers = vlm.answers([vlm.prompt_for(probe.question) for probe in probes], batch_size=32)
    return tuple(
        replace(probe, answers=replace(probe.answers, edited=probe.marking.answer_in(answer)))
        for probe, answer in zip(probes, answers, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Shares of right answers to one kind of question, 0 to 1, and the number of questions."""

    kind: str
    number: int
    unedited: float
    edited: float
    undone: float


def scores(probes: Sequence[VerifiedQuestion]) -> tuple[ProbeScore, ...]:
    """Return one score per kind of question, in the order of PROBES."""
    rows = []
    for kind in PROBES:
        chosen = [probe for probe in probes if probe.kind == kind]
        if chosen:
            shares = {state: sum(probe.is_right(state) for probe in chosen) / len(chosen) for state in STATES}
            rows.append(ProbeScore(kind=kind, number=len(chosen), **shares))
    return tuple(rows)


def summary(probes: Sequence[VerifiedQuestion]) -> Mapping[str, float]:
    """Return name of SUMMARIES -> share of right answers with the edit, 0 to 1; NaN if there is no question.

    Questions whose answers should stay count only if the unedited model answered them correctly: an edit cannot keep
    what was not there.
    """
    shares = {}
    for name, kinds in SUMMARIES.items():
        chosen = [probe for probe in probes if probe.kind in kinds and (probe.moves or probe.is_right("unedited"))]
        right = sum(probe.is_right("edited") for probe in chosen)
        shares[name] = right / len(chosen) if chosen else float("nan")
    return shares
