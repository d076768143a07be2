"""In-context editing: no weight changes; the new facts are written in front of the question."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ...data.facts import EditRequest
from ...models import Prompt, VisionLanguageModel
from ..changes import EditSession, History
from ..moments import Moments
from ..requests import EditError, edited_questions, listed_requests, request_text
from .training import DenseChange, LowRankChange, check_no_history

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class StatedFact:
    """The fact of one request, in words."""

    question: str
    target: str
    questions: tuple[str, ...]
    """All questions of the request; the one most like a new question decides how near the fact is to it."""

    def overlap(self, question: str) -> float:
        """Return the share of words in common with the most similar of its questions, 0 to 1 (Jaccard index)."""
        words = _words(question)
        return max(len(words & _words(own)) / max(1, len(words | _words(own))) for own in self.questions)


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextChange:
    """Facts that `prompt_transform` writes in front of a question; the model itself never changes."""

    facts: tuple[StatedFact, ...]
    max_facts: int
    """Number of facts in front of a question, at most."""
    fact_wording: str
    question_wording: str
    model: str
    revision: str | None = None
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str | float], ...]
    """Each request as text, one mapping per request."""

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        """Yield the model unchanged: the change is in the prompts that `prompt_transform` returns."""
        yield vlm

    def nearest(self, question: str) -> tuple[StatedFact, ...]:
        """Return the facts for this question, the one that shares most words with it last.

        Of facts that share equally many words, that of the earlier request is preferred and comes later.
        """
        ranked = sorted(self.facts, key=lambda fact: -fact.overlap(question))
        return tuple(reversed(ranked[: self.max_facts]))

    def prompt_transform(self, prompt: Prompt) -> Prompt:
        """Return the same pictures, template and answer, with the facts stated before the question.

        The question of the new prompt is all of that text, and the new prompt has no constraint groups.
        """
        facts = [_filled(self.fact_wording, fact.question, fact.target) for fact in self.nearest(prompt.question)]
        return prompt.asked_anew("\n".join([*facts, _filled(self.question_wording, prompt.question)]))


@dataclass(frozen=True, kw_only=True)
class InContext:
    """In-context editing: the facts of the requests, in words, in front of the question (IKE, arXiv 2305.12740).

    Unlike IKE, it adds no demonstrations of when to use a fact. A fact is stated by its question, so "the person in
    this picture" refers to the picture of the new prompt. Raises `EditError` for a setting out of range.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import InContext
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?", template="raw")
        >>> change = InContext().edit(vlm, [mt.EditRequest(question=prompt, target="Raner")])
        >>> change.prompt_transform(prompt).text
        'New fact: Who founded Draivo? Raner\\nQuestion: Who founded Draivo?'
    """

    max_facts: int = 4
    """Number of facts in front of a question, at most: those whose questions share most words with it."""
    fact_wording: str = "New fact: {question} {target}"
    """Text of one fact."""
    question_wording: str = "Question: {question}"
    """Text of the question after the facts."""

    def __post_init__(self) -> None:
        required = {"fact_wording": ("{question}", "{target}"), "question_wording": ("{question}",)}
        for name, holes in required.items():
            if any(hole not in getattr(self, name) for hole in holes):
                raise EditError(f"InContext got {name}={getattr(self, name)!r}; pass a text with {' and '.join(holes)}")
        if self.max_facts < 1:
            raise EditError(f"InContext got max_facts={self.max_facts}; pass max_facts of at least 1")

    def as_text(self) -> dict[str, str]:
        """Return the editor's name and its settings as text, for reports."""
        return {"editor": type(self).__name__} | {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def edit(
        self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = False
    ) -> ContextChange:
        """Return a change whose `prompt_transform` states the facts of the requests in front of a question.

        Args:
            vlm: The model that the prompts belong to; nothing is computed with it.
            requests: At least one request.
            progress: Accepted as by every editor; there is nothing to show.

        Raises:
            EditError: There are no requests.
        """
        requests = listed_requests(requests)
        reports = tuple({**request_text(request), "status": "edited"} for request in requests)
        return self.stating(vlm, [_fact(request) for request in requests], reports)

    def start(
        self, vlm: VisionLanguageModel, *, moments: Moments | None = None, history: History | None = None
    ) -> "ContextSession":
        """Return a session whose `prompt_transform` states the facts of all its edits.

        moments: not needed. history: must be None, since a history holds the factors of closed-form edits alone; raises
        `EditError` otherwise.
        """
        check_no_history(self, history)
        return ContextSession(vlm, self)

    def stating(
        self, vlm: VisionLanguageModel, facts: Sequence[StatedFact], requests: Sequence[Mapping[str, str]]
    ) -> ContextChange:
        """Return the change that states these facts. requests: what was asked, as text."""
        return ContextChange(
            facts=tuple(facts),
            max_facts=self.max_facts,
            fact_wording=self.fact_wording,
            question_wording=self.question_wording,
            model=vlm.name,
            revision=vlm.revision,
            settings=self.as_text(),
            requests=tuple(requests),
        )


class ContextSession(EditSession[ContextChange]):
    """A session whose edits are facts to state: the model is unchanged, and `prompt_transform` states all of them."""

    def __init__(self, vlm: VisionLanguageModel, editor: InContext) -> None:
        super().__init__(vlm, lambda requests, progress: editor.edit(vlm, requests, progress=progress))
        self._editor = editor
        self._stated: dict[str, tuple[StatedFact, Mapping[str, str]]] = {}
        """Key of a request's question -> its fact; a question that is edited again has the new fact only."""

    @property
    def prompt_transform(self) -> Callable[[Prompt], Prompt] | None:
        """How the edited model has to be asked: after the facts of all edits of the session."""
        if not self._stated:
            return None
        facts, requests = zip(*self._stated.values(), strict=True)
        return self._editor.stating(self.vlm, facts, requests).prompt_transform

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> ContextChange:
        """Return the change that states these facts alone, and state them with the others from now on."""
        self._open_handle()
        change = self.propose(requests, progress=progress)
        for request, fact, report in zip(requests, change.facts, change.requests, strict=True):
            self._stated.pop(request.question.key, None)
            self._stated[request.question.key] = (fact, report)
        return change

    def _end(self) -> None:
        self._stated = {}
        super()._end()


def _fact(request: EditRequest) -> StatedFact:
    questions = tuple(dict.fromkeys(question.text.strip() for question in edited_questions(request)))
    return StatedFact(question=request.question.text.strip(), target=request.target.strip(), questions=questions)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _filled(wording: str, question: str, target: str = "") -> str:
    """The wording with its holes filled at once, so that braces in a question stay what they are."""
    values = {"{question}": question, "{target}": target}
    return re.sub(r"\{question\}|\{target\}", lambda hole: values[hole.group()], wording)


CHANGES = (DenseChange, LowRankChange, ContextChange)
"""The classes of changes that baselines make; their fields can be written with `artefacts.save_fields`."""
