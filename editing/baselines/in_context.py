"""In-context editing: the new facts are written in front of the question, and no weight changes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...artefacts import load_fields, save_fields
from ...data.facts import EditRequest
from ...models import Prompt, VisionLanguageModel
from ..changes import Delta, EditSession, History
from ..moments import MomentSource
from ..requests import EditError, edited_questions, listed_requests, request_text
from .trained_changes import DenseChange, LowRankChange
from .training import check_no_history

_LAYOUT = "multrace {} 1"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class StatedFact:
    """The fact of one request in words."""

    question: str
    """Text of the question of the request."""
    target: str
    """The new answer."""
    questions: tuple[str, ...]
    """Texts of all questions of the request, its contexts and rewrite prompts included."""

    def overlap(self, question: str) -> float:
        """Return the word overlap of a question with the most similar question of the request, 0 to 1.

        It is the Jaccard index of the two sets of words, in lower case.
        """
        words = _words(question)
        return max(len(words & _words(own)) / max(1, len(words | _words(own))) for own in self.questions)


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextChange:
    """Facts that `prompt_transform` writes in front of a question; the model itself never changes."""

    facts: tuple[StatedFact, ...]
    """The facts, in the order of the requests."""
    max_facts: int
    """Largest number of facts in front of a question."""
    fact_wording: str
    """Text of one fact, with the holes {question} and {target}."""
    question_wording: str
    """Text of the question after the facts, with the hole {question}."""
    model: str
    """Name or path of the model that the change was made for."""
    revision: str | None = None
    """Revision of the model; None if it has none."""
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str | float], ...]
    """For each request, its question, target and status as text."""

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        """Yield the model unchanged: the change is in the prompts that `prompt_transform` returns."""
        yield vlm

    def nearest(self, question: str) -> tuple[StatedFact, ...]:
        """Return the `max_facts` facts with the largest word overlap with this question, in increasing order of it.

        If two facts have the same overlap, the one of the earlier request is preferred and comes later.
        """
        ranked = sorted(self.facts, key=lambda fact: -fact.overlap(question))
        return tuple(reversed(ranked[: self.max_facts]))

    def prompt_transform(self, prompt: Prompt) -> Prompt:
        """Return a prompt with the same pictures, template and answer that states the nearest facts first.

        Facts and question together are the question of the new prompt, which has no constraint groups.
        """
        facts = [_filled(self.fact_wording, fact.question, fact.target) for fact in self.nearest(prompt.question)]
        return prompt.asked_anew("\n".join([*facts, _filled(self.question_wording, prompt.question)]))


@dataclass(frozen=True, kw_only=True)
class InContext:
    """In-context editing: the facts of the requests are stated in front of the question (IKE, arXiv 2305.12740).

    Unlike IKE, it gives no demonstrations of when a fact applies. A fact is stated by its question, so that "the person
    in this picture" refers to the picture of the new prompt. Raises `EditError` for a setting that is out of range.

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
    """Largest number of facts in front of a question, at least 1; facts with the largest word overlap are preferred."""
    fact_wording: str = "New fact: {question} {target}"
    """Text of one fact, with the holes {question} and {target}."""
    question_wording: str = "Question: {question}"
    """Text of the question after the facts, with the hole {question}."""

    def __post_init__(self) -> None:
        required = {"fact_wording": ("{question}", "{target}"), "question_wording": ("{question}",)}
        for name, holes in required.items():
            if any(hole not in getattr(self, name) for hole in holes):
                raise EditError(f"InContext got {name}={getattr(self, name)!r}; pass a text with {' and '.join(holes)}")
        if self.max_facts < 1:
            raise EditError(f"InContext got max_facts={self.max_facts}; pass max_facts of at least 1")

    def as_text(self) -> dict[str, str]:
        """Return the name of the editor and its settings as text, for reports."""
        return {"editor": type(self).__name__} | {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def edit(
        self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = False
    ) -> ContextChange:
        """Return a change whose `prompt_transform` states the facts of the requests in front of a question.

        Args:
            vlm: The model that the change is for; it does not run and is not changed.
            requests: At least one request.
            progress: Accepted as by every editor, and not used.

        Raises:
            EditError: There are no requests.
        """
        requests = listed_requests(requests)
        reports = tuple({**request_text(request), "status": "edited"} for request in requests)
        return self.stating(vlm, [_fact(request) for request in requests], reports)

    def start(
        self, vlm: VisionLanguageModel, *, moments: MomentSource = None, history: History | None = None
    ) -> "ContextSession":
        """Return a session whose `prompt_transform` states the facts of all its edits.

        moments: accepted as by every editor, and not used. history: must be None, since a history holds only the
        factors of closed-form edits. Raises `EditError` if there is one.
        """
        check_no_history(self, history)
        return ContextSession(vlm, self)

    def stating(
        self, vlm: VisionLanguageModel, facts: Sequence[StatedFact], requests: Sequence[Mapping[str, str]]
    ) -> ContextChange:
        """Return the change that states these facts. requests: the requests as text, one mapping per fact."""
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
    """A session whose edits are facts: the model stays unchanged, and `prompt_transform` states the facts."""

    def __init__(self, vlm: VisionLanguageModel, editor: InContext) -> None:
        super().__init__(vlm, lambda requests, progress: editor.edit(vlm, requests, progress=progress))
        self._editor = editor
        self._stated: dict[str, tuple[StatedFact, Mapping[str, str]]] = {}
        """Key of the question of a request -> its fact and report; a question that is edited again has only the new
        ones."""

    @property
    def prompt_transform(self) -> Callable[[Prompt], Prompt] | None:
        """The `ContextChange.prompt_transform` for the facts of all edits of the session; None before the first."""
        if not self._stated:
            return None
        facts, requests = zip(*self._stated.values(), strict=True)
        return self._editor.stating(self.vlm, facts, requests).prompt_transform

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> ContextChange:
        """Return the change that states the facts of these requests alone; the session states them with its others.

        Args:
            requests: The facts to state.
            name: Accepted as by every session, and not used.
            progress: Accepted as by every session, and not used.

        Raises:
            EditError: There are no requests, or the session is not inside a `with`.
        """
        self._open_handle()
        requests = listed_requests(requests)  # which may be an iterator, and is read twice
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
    """The wording with all its holes filled in one pass, so that braces in a question are left as they are."""
    values = {"{question}": question, "{target}": target}
    return re.sub(r"\{question\}|\{target\}", lambda hole: values[hole.group()], wording)


CHANGES = (DenseChange, LowRankChange, ContextChange)
"""The classes of changes that baselines make."""


def change_file(change: Any) -> str:
    """Return the name of the file of a change, which says of which kind it is."""
    return f"edit-{type(change).__name__}.safetensors"


def save_change(change: Any, path: Path) -> None:
    """Write a change of any editor or baseline; the file appears all at once."""
    if isinstance(change, Delta):
        change.save(path)
    else:
        save_fields(path, _LAYOUT.format(type(change).__name__), change)


def stored_change(folder: Path) -> Any:
    """Return the change whose `change_file` a folder holds, or None.

    Raises `ArtefactError` or `EditError` if the file is damaged.
    """
    for kind in (Delta, *CHANGES):
        path = folder / f"edit-{kind.__name__}.safetensors"
        if path.is_file():
            return Delta.load(path) if kind is Delta else load_fields(path, _LAYOUT.format(kind.__name__), kind)
    return None
