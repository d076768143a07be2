"""Keys whose outputs stay: those that requests ask to keep and those of siblings, and what an edit leaks to others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...data.facts import EditRequest, Question
from ...models import VisionLanguageModel
from ..changes import WeightChange
from ..requests import EditError, answers_where_finite
from ..siblings import SiblingSet
from ..values import Lookup, PlainGoal, key_positions, prompt_end
from .settings import ClosedFormSettings

logger = logging.getLogger("multrace")
_INF = float("inf")
_LOWER = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Weights that are tried where exact constraints leave a request too little."""
HELD_OUT = 4
"""One sibling in so many is not kept: the change at its key says what unseen siblings will see."""
OTHERS, OWN = "leak", "leak_own"
"""Entries of a request's report: the leak to the same question about others, and to others about the same subject."""


@dataclass(frozen=True, kw_only=True)
class KeptQuestion:
    """A question whose output is to stay."""

    name: str
    """What messages call it."""
    goal: PlainGoal
    """Its prompt, with the present answer where an answer's tokens are edited."""
    owner: int | None = None
    """The request whose sibling it is; None for a question that a request asks to keep."""
    kind: str = ""
    """Of a sibling: OTHERS or OWN."""
    held_out: bool = False
    """Whether it only measures the leak, and is not kept."""
    also: tuple[tuple[int, str], ...] = ()
    """If it is held out, the other requests whose sibling it is, and its kind to them."""
    averaged: bool = False
    """Whether the mean key of its request's siblings of this kind is kept in place of each."""


class KeptFinder:
    """Finds the questions whose outputs stay when requests are edited."""

    def __init__(self, vlm: VisionLanguageModel, editor: ClosedFormSettings, *, progress: bool) -> None:
        self.vlm, self.editor, self.progress = vlm, editor, progress
        self.token = editor.place[1]

    def find(
        self, requests: Mapping[int, EditRequest], siblings: Mapping[int, SiblingSet], *, keys: int
    ) -> list[KeptQuestion]:
        """Return the questions, each once: those that the requests ask to keep, then siblings.

        Args:
            requests: The requests by their index.
            siblings: The siblings of each of them; empty for none.
            keys: The largest number of keys of an edit: one for each answer position where these are edited.
        """
        asked = {question.key: question for request in requests.values() for question in request.preserve_prompts}
        kept = self._asked_for(list(asked.values()))
        if self.editor.siblings is None or not siblings:
            return kept
        found = kept_siblings(
            {index: siblings[index] for index in requests},
            without=asked.keys(),
            own=self.is_last(next(iter(requests.values())).question),
            mean=self.editor.siblings.mean,
            has_token=self.has_token,
        )
        return kept + (found if keys == 1 else self._with_answers(found, keys))

    def _with_answers(self, siblings: Sequence[KeptQuestion], tokens: int) -> list[KeptQuestion]:
        """The siblings with as many tokens of their present answers as are edited."""
        questions = [each.goal.questions[0] for each in siblings]
        answers = self._answers(questions, max_new_tokens=tokens)
        return [
            replace(each, goal=replace(each.goal, target=answer or None))
            for each, answer in zip(siblings, answers, strict=True)
        ]

    def _asked_for(self, questions: Sequence[Question]) -> list[KeptQuestion]:
        """The questions that requests ask to keep; what the model answers matters at an answer's tokens alone."""
        if not questions:
            return []
        if not self.editor.answer_keys or not self.is_last(questions[0]):
            goals = (PlainGoal(questions=(question,), target=None) for question in questions)
            return [KeptQuestion(name=repr(goal.questions[0].text), goal=goal) for goal in goals]
        return [
            KeptQuestion(
                name=f"{question.text!r} (kept as {answer!r})",
                goal=PlainGoal(questions=(question,), target=answer or None),
            )
            for question, answer in zip(questions, self._answers(questions), strict=True)
        ]

    def _answers(self, questions: Sequence[Question], *, max_new_tokens: int = 16) -> list[str | None]:
        if not questions:
            return []
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": self.editor.rows_at_once}
        return answers_where_finite(self.vlm, questions, **sizes, progress=self.progress)

    def is_last(self, question: Question) -> bool:
        """Whether the edited token is the last one of the question's prompt, as `is_last_token`."""
        return is_last_token(self.vlm, question, self.token)

    def has_token(self, question: Question) -> bool:
        """Whether the question's prompt has the edited token."""
        try:
            key_positions(self.vlm.prompt_for(question), self.token, end=False, every=False)
        except EditError:
            return False
        return True


def is_last_token(vlm: VisionLanguageModel, question: Question, token: str | int) -> bool:
    """Return whether a token is the last one of the question's prompt, after which answers begin."""
    prompt = vlm.prompt_for(question)
    return key_positions(prompt, token, end=False, every=False)[0] == prompt_end(prompt) - 1


def kept_siblings(
    sets: Mapping[int, SiblingSet],
    *,
    without: Collection[str],
    own: bool,
    mean: bool,
    has_token: Callable[[Question], bool],
) -> list[KeptQuestion]:
    """Return the siblings of requests as kept questions, each question once.

    Args:
        sets: The siblings of each request by its index.
        without: Keys of questions that are kept anyway.
        own: Whether other questions about the same subject are kept, too. Their keys at the subject itself are nearly
            the request's own.
        mean: Whether mean keys are kept.
        has_token: Whether a question has the edited token.
    """
    found: dict[str, KeptQuestion] = {}
    for owner, each in sets.items():
        for kind, questions in ((OTHERS, each.others), (OWN, each.own if own else ())):
            usable = [question for question in questions if has_token(question)]
            for number, question in enumerate(usable):
                if known := found.get(question.key):
                    also = (*known.also, (owner, kind)) if known.held_out else ()
                    found[question.key] = replace(known, also=also)
                elif question.key not in without:
                    is_held_out = number % HELD_OUT == HELD_OUT - 1
                    goal = PlainGoal(questions=(question,), target=None)
                    shape = {"owner": owner, "kind": kind, "held_out": is_held_out}
                    found[question.key] = KeptQuestion(name=repr(question.text), goal=goal, averaged=mean, **shape)
    return list(found.values())


def kept_weights(asked: int, siblings: int) -> list[tuple[float, float]]:
    """Return the weights to try, those of questions to keep and those of siblings, the most exact first."""
    lower = [(_INF, weight) for weight in _LOWER] if siblings else []
    last = lower[-1][1] if lower else _INF
    return [(_INF, _INF), *lower, *([(weight, last) for weight in _LOWER] if asked else [])]


def shares(change: WeightChange) -> dict[int, float]:
    """Return how much of what it asks for the change gives each request, by its index: 1 for all of it."""
    residuals = change.residuals.double()
    met = (change.moved(change.keys) * residuals).sum(-1)
    asked = residuals.square().sum(-1)
    owners = [owner for owner in change.owners.unique().tolist() if asked[change.owners == owner].sum() > 0]
    return {owner: (met[change.owners == owner].sum() / asked[change.owners == owner].sum()).item() for owner in owners}


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptKeys:
    """The keys of kept questions in one layer."""

    asked: list[tuple[str, Tensor]]
    """Name and keys (key, width) of each question that requests ask to keep."""
    siblings: list[tuple[str, Tensor]]
    """Name and keys of each sibling, or of their means."""
    held_out: Mapping[tuple[int, str], Tensor]
    """Request and kind of siblings -> keys (sibling, width) that are not kept."""

    @classmethod
    def of(cls, kept: Sequence[KeptQuestion], found: Sequence[Lookup]) -> KeptKeys:
        """Return the keys of these questions, from one lookup for each."""
        asked, siblings = [], []
        groups: dict[tuple[int, str, bool], list[Tensor]] = {}
        held: dict[tuple[int, str], list[Tensor]] = {}
        for question, lookup in zip(kept, found, strict=True):
            if question.owner is None:
                asked.append((question.name, lookup.keys))
            elif not torch.isfinite(lookup.keys).all():
                continue  # nobody asked for it, and a model that overflows there keeps nothing
            elif question.held_out:
                for group in ((question.owner, question.kind), *question.also):
                    held.setdefault(group, []).append(lookup.keys[:1])
            elif question.averaged:
                for is_first, keys in ((True, lookup.keys[:1]), (False, lookup.keys[1:])):
                    groups.setdefault((question.owner, question.kind, is_first), []).append(keys)
            else:
                siblings.append((question.name, lookup.keys))
        means = [
            (f"the mean of {len(keys)} siblings", torch.cat(keys).mean(0, keepdim=True))
            for keys in groups.values()
            if any(map(len, keys))  # a sibling has later keys only where an answer's tokens are edited
        ]
        return cls(
            asked=asked, siblings=siblings + means, held_out={group: torch.cat(keys) for group, keys in held.items()}
        )

    def leaks(self, change: WeightChange, owner: int) -> dict[str, float]:
        """Return how much of a request's change reaches its siblings that are not kept, by kind of siblings.

        It is the mean length of the change of output there, as a share of that at the request's own first key.
        """
        first = change.residuals.double()[change.owners == owner][:1]
        size = first.norm().item()
        return {
            kind: change.moved(keys.cpu()).norm(dim=-1).mean().item() / size
            for (own, kind), keys in self.held_out.items()
            if own == owner and size
        }


def leak_in_words(report: Mapping[str, Any]) -> str:
    """Return how much of a request's change is predicted to reach what it should leave alone; empty where unknown.

    report: an entry of `Delta.requests`.
    """
    others = {OTHERS: "the same question about others", OWN: "other questions about the subject"}
    return ", ".join(f"{float(report[kind]):.0%} at {words}" for kind, words in others.items() if kind in report)


def warn_of_little(change: WeightChange, keys: KeptKeys, labels: Sequence[str], *, least: float) -> None:
    """Warn of requests that what is to stay leaves less than a share of what they ask for, and name what is nearest."""
    kept = [*keys.asked, *keys.siblings]
    if not kept:
        return
    stacked = torch.cat([own for _, own in kept]).double().cpu()
    names = [name for name, own in kept for _ in own]
    for owner, share in shares(change).items():
        if share >= least:
            continue
        own = change.keys[change.owners == owner].double()
        likeness = torch.nn.functional.cosine_similarity(own[:, None], stacked[None], dim=-1)
        logger.warning(
            "only %.0f%% of what %s asks for is left by what is to stay; its key is nearest to that of %s; "
            "a later layer tells them apart better, or pass a smaller preserve_weight",
            *(100 * share, labels[owner], names[likeness.amax(0).argmax()]),
        )
