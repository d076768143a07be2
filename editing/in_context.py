"""In-context editing: no weight is changed, the new facts are told to the model before the question."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ..models import Prompt, VisionLanguageModel
from .errors import EditError
from .requests import EditRequest

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class ToldFact:
    """A fact in words."""

    question: str
    target: str
    questions: tuple[str, ...]
    """All wordings of the request, by which the fact is found."""

    def overlap(self, question: str) -> float:
        """The share of words in common with the nearest of its wordings, 0 to 1 (Jaccard index)."""
        asked = _words(question)
        return max(len(asked & _words(own)) / max(1, len(asked | _words(own))) for own in self.questions)


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextChange:
    """New facts that are told before a question; `prompt_transform` does it, the model itself is never changed."""

    facts: tuple[ToldFact, ...]
    told: int
    """How many facts are told at most."""
    fact_wording: str
    question_wording: str
    model: str
    revision: str | None = None
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str], ...]
    """What was asked, as text, one mapping per request."""

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        """The model, as it is: the change is in the prompts that `prompt_transform` gives."""
        yield vlm

    def nearest(self, question: str) -> tuple[ToldFact, ...]:
        """The facts told before this question, the one that shares most words with it last, nearest to it.

        Among equals the earlier request is taken, and stands nearer to the question.
        """
        ranked = sorted(self.facts, key=lambda fact: -fact.overlap(question))
        return tuple(reversed(ranked[: self.told]))

    def prompt_transform(self, prompt: Prompt) -> Prompt:
        """Return the same pictures, template and answer, with the facts stated before the question.

        The question of the new prompt is all of that text, and the new prompt has no constraint groups.
        """
        facts = [_filled(self.fact_wording, fact.question, fact.target) for fact in self.nearest(prompt.question)]
        return prompt.asked_anew("\n".join([*facts, _filled(self.question_wording, prompt.question)]))


@dataclass(frozen=True, kw_only=True)
class InContext:
    """In-context editing: the requests' facts, in words, before the question (after IKE, arXiv 2305.12740).

    Only the facts are told, without demonstrations of when to use them. A fact is told by its question, so "the
    person in this picture" then points at the picture that is asked about. EditError for a setting out of range.
    """

    told: int = 4
    """At most so many facts before a question, those whose questions share most words with it."""
    fact_wording: str = "New fact: {question} {target}"
    """How a fact is told."""
    question_wording: str = "Question: {question}"
    """How the question follows."""

    def __post_init__(self) -> None:
        wanted = {"fact_wording": ("{question}", "{target}"), "question_wording": ("{question}",)}
        for name, holes in wanted.items():
            if any(hole not in getattr(self, name) for hole in holes):
                raise EditError(f"InContext got {name}={getattr(self, name)!r}; pass a text with {' and '.join(holes)}")
        if self.told < 1:
            raise EditError(f"InContext got told={self.told}; pass told of at least 1")

    def as_text(self) -> dict[str, str]:
        """The editor's name and its settings, for reports."""
        return {"editor": type(self).__name__} | {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def edit(
        self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = False
    ) -> ContextChange:
        """The change whose `prompt_transform` tells a prompt the requests' facts. EditError for no requests.

        Nothing is computed, so that progress shows nothing.
        """
        requests = tuple(requests)
        if not requests:
            raise EditError("no requests to edit; pass at least one EditRequest")
        return ContextChange(
            facts=tuple(_fact(request) for request in requests),
            told=self.told,
            fact_wording=self.fact_wording,
            question_wording=self.question_wording,
            model=vlm.name,
            revision=vlm.revision,
            settings=self.as_text(),
            requests=tuple({**request.summary(), "status": "edited"} for request in requests),
        )


def _fact(request: EditRequest) -> ToldFact:
    prompts = (request.prompt, *request.contexts, *request.rewrite_prompts)
    questions = tuple(dict.fromkeys(prompt.question for prompt in prompts))
    return ToldFact(question=request.prompt.question, target=request.target.strip(), questions=questions)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _filled(wording: str, question: str, target: str = "") -> str:
    """The wording with its holes filled at once, so that braces in a question stay what they are."""
    values = {"{question}": question, "{target}": target}
    return re.sub(r"\{question\}|\{target\}", lambda hole: values[hole.group()], wording)
