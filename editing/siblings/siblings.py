"""The questions that an edit is to leave as they are, found without asking for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ...data.facts import EditRequest, PictureSource, Question
from ...models import VisionLanguageModel
from ..requests import EditError, answers_where_finite, edited_questions
from .names import other_subjects, overlap

TEMPLATES = (
    "{} is known for",
    "The population of {} is about",
    "The history of {} begins",
    "A friend of mine has heard of {} and",
    "The name of {} comes from",
    "{} is one of the",
    "People say that {} has",
    "In the year 2000, {} was",
)
"""Beginnings of sentences about a subject of any kind, whose next words an edit of another fact should not change."""
_ENOUGH = 4
"""Number of other subjects among the requests at hand from which on the model is not asked for names."""


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """Where the questions come from that an edit leaves as they are, and how many of them.

    Siblings of a request are the same question about other subjects or pictures, and other questions about the same
    subject or picture. Other requests at hand supply both. Raises `EditError` for a setting out of range.
    """

    names: tuple[str, ...] = ()
    """Names of other subjects. Without any, the model is asked for names (`other_subjects`)."""
    pictures: tuple[PictureSource, ...] = field(default=(), hash=False)
    """Pictures of other things, about which the question of a picture is asked too."""
    templates: tuple[str, ...] = TEMPLATES
    """Other questions about the same subject, with {} in its place. Those that the model answers as it answers the
    request, or with the request's target, count as wordings of the request and are left out."""
    others: int = 20
    """Maximum number of the same question about other subjects or pictures, for each request."""
    own: int = 6
    """Maximum number of other questions about the same subject or picture, for each request."""
    mean: bool = False
    """Whether the mean key of the others is kept instead of each: one constraint, which removes most of the leak."""

    def __post_init__(self) -> None:
        for name in ("names", "pictures", "templates"):
            value = getattr(self, name)
            if isinstance(value, str | Path | Image.Image):
                raise EditError(f"Siblings got {name}={value!r}; pass a tuple of them")
            object.__setattr__(self, name, tuple(value))
        for name in ("others", "own"):
            if getattr(self, name) < 0:
                raise EditError(f"Siblings got {name}={getattr(self, name)}; pass a number of at least 0")
        for template in self.templates:
            if template.count("{}") != 1:
                raise EditError(
                    f"a template of Siblings is {template!r}; write {{}} once, where the subject's name stands"
                )


@dataclass(frozen=True, kw_only=True)
class SiblingSet:
    """The siblings of one request."""

    others: tuple[Question, ...] = ()
    """The same question about other subjects or pictures."""
    own: tuple[Question, ...] = ()
    """Other questions about the same subject or picture."""

    @property
    def questions(self) -> tuple[Question, ...]:
        """All of them."""
        return (*self.others, *self.own)


class SiblingFinder:
    """Finds the siblings of requests, and keeps the names that a model has given for the requests that follow."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self._names: dict[tuple[str, str, int], tuple[str, ...]] = {}

    def find(
        self,
        requests: Sequence[EditRequest],
        settings: Siblings,
        *,
        only: Sequence[int] | None = None,
        room: int | None = None,
    ) -> tuple[SiblingSet, ...]:
        """Return the siblings of each request; no question that is to change for any of them is among them.

        The model is run to name other subjects, and once for each other question about the same subject.

        Args:
            requests: The requests that are edited together.
            settings: Where siblings come from, and how many of them.
            only: The indices of the requests whose siblings are wanted (default: all); the others supply subjects.
            room: Maximum number of siblings in all (default: any). Requests get equal parts of it; where there are more
                requests than room, only some of them have a sibling.
        """
        others, own = settings.others, settings.own
        wanted = range(len(requests)) if only is None else only
        if room is not None:
            others, own = _parts(room // max(1, len(wanted)), settings)
            every = max(1, -(-len(wanted) // max(1, room)))
        else:
            every = 1
        edited = {question.key for request in requests for question in edited_questions(request)}
        found = []
        for place, index in enumerate(wanted):
            request = requests[index]
            if place % every:
                found.append(SiblingSet())
                continue
            same = (each for each in self._others(request, requests, settings, others) if each.key not in edited)
            about = (each for each in self._own(request, requests, settings) if each.key not in edited)
            apart = self._without_wordings(request, _first(about, 2 * own))
            found.append(SiblingSet(others=_first(same, others), own=_first(apart, own)))
        return tuple(found)

    def _others(
        self, request: EditRequest, requests: Sequence[EditRequest], settings: Siblings, number: int
    ) -> Iterator[Question]:
        question = request.question
        if question.images:
            if len(question.images) == 1:
                at_hand = (other.question.images for other in requests if len(other.question.images) == 1)
                pictures = [*settings.pictures, *(image for images in at_hand for image in images)]
                yield from (question.with_image(picture) for picture in pictures)
            return
        subject, frame = question.constraint, _frame(question)
        if frame is None:
            return
        at_hand = [str(other.question.constraint) for other in requests if _frame(other.question) == frame]
        names = [*settings.names, *(name for name in at_hand if name != subject)]
        if not settings.names and len(names) < _ENOUGH:
            names += self._named(question, frame, number)
        yield from (_filled(frame, name, question.template) for name in dict.fromkeys(names) if name != subject)

    def _named(self, question: Question, frame: str, number: int) -> tuple[str, ...]:
        """Names that the model gives."""
        key = (frame, str(question.constraint), number)
        if key not in self._names:
            self._names[key] = other_subjects(self.vlm, question, number=2 * number) if number else ()
        return tuple(name for name in self._names[key] if not overlap(name, str(question.constraint)))

    def _own(self, request: EditRequest, requests: Sequence[EditRequest], settings: Siblings) -> Iterator[Question]:
        question, subject = request.question, request.question.constraint
        if question.images:
            for other in requests:
                if len(other.question.images) == len(question.images):
                    yield replace(other.question.with_image(question.image), answer=None, answers=(), id="")
        elif isinstance(subject, str):
            frames = [(each, question.template) for each in settings.templates]
            frames += [(frame, other.question.template) for other in requests if (frame := _frame(other.question))]
            for frame, template in dict.fromkeys(frames):
                yield _filled(frame, subject, template)

    def _without_wordings(self, request: EditRequest, own: Sequence[Question]) -> list[Question]:
        """The questions that the model answers neither as it answers the request nor with its target."""
        if not own:
            return []
        said, *answers = answers_where_finite(self.vlm, [request.question, *own], max_new_tokens=2)
        target = request.target.casefold()
        return [
            question
            for question, answer in zip(own, answers, strict=True)
            if answer and answer != said and not target.startswith(answer.casefold())
        ]


def _frame(question: Question) -> str | None:
    """The question with {} in place of its subject; None if it has a picture or does not say its subject just once."""
    subject = question.constraint
    if question.images or not isinstance(subject, str) or question.text.count(subject) != 1 or "{}" in question.text:
        return None
    return question.text.replace(subject, "{}")


def _filled(frame: str, subject: str, template: str | None) -> Question:
    text = frame.replace("{}", subject)
    if frame.startswith("{}"):  # a sentence begins with a capital letter: "The Netherlands has"
        text, subject = text[:1].upper() + text[1:], subject[:1].upper() + subject[1:]
    return Question(text=text, constraint=subject if text.count(subject) == 1 else None, template=template)


def _first(questions: Iterable[Question], number: int) -> tuple[Question, ...]:
    """The first different questions."""
    found: dict[str, Question] = {}
    for question in questions if number else ():
        found[question.key] = question
        if len(found) == number:
            break
    return tuple(found.values())


def _parts(room: int, settings: Siblings) -> tuple[int, int]:
    """The numbers of other subjects and of other questions about a subject that fit into a request's room."""
    if settings.others + settings.own <= room:
        return settings.others, settings.own
    own = min(settings.own, room // 4)
    return max(1, min(settings.others, room - own)) if settings.others else 0, own
