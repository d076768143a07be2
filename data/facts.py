"""Facts as plain values: questions about pictures, edits of their answers, and the questions that check an edit.

Nothing here knows a model: a question holds words, spans of words, boxes, and the path of a picture (or the picture
itself). Prompts with tensors are made from it where they are needed, batch by batch (`VisionLanguageModel.prompt_for`).
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, Self, cast, runtime_checkable

from PIL import Image

from .errors import DataError, quoted

PixelBox = tuple[int, int, int, int]
"""Left, top, right and bottom of a rectangle in pixels of the original picture; right and bottom are exclusive."""
_DIGITS = 16
"""Number of hexadecimal digits of a picture's digest that tell it from others."""
PictureSource = Image.Image | Path
"""A picture in memory, or the path of a picture that is opened when a prompt needs it."""
Words = str | tuple[str, int | Literal["all"]]
"""Words of a question; if the question repeats them, with the number of the occurrence from 0, or with "all"."""

EDITED, PORTABILITY, GENERAL, CLOZE = "edited", "portability", "general", "cloze"
OWN_TEXT, GIVEN_TEXT = "own_text", "given_text"
REPHRASE, OTHER_PICTURE, REPHRASE_OTHER_PICTURE = "rephrase", "other_picture", "rephrase_other_picture"
BY_NAME, ORIGINAL_ENTITY = "by_name", "original_entity"
RELATED_TEXT, RELATED_PICTURE = "related_text", "related_picture"
SAME_QUESTION_OTHER_PICTURE = "same_question_other_picture"
OTHER_QUESTION_SAME_PICTURE = "other_question_same_picture"
OTHER_SUBJECT = "other_subject"
NO_PICTURE, UNRELATED, UNRELATED_TEXT = "no_picture", "unrelated", "unrelated_text"

EFFICACY, GENERALITY, LOCALITY, ABILITY = "efficacy", "generality", "locality", "general ability"
ASPECTS = (EFFICACY, GENERALITY, PORTABILITY, LOCALITY, ABILITY)
"""What the questions about an edit measure."""
KINDS: Mapping[str, tuple[str, str]] = {
    EDITED: (EFFICACY, "the edited question and picture"),
    REPHRASE: (GENERALITY, "other wordings"),
    OTHER_PICTURE: (GENERALITY, "other pictures of the same thing"),
    REPHRASE_OTHER_PICTURE: (GENERALITY, "other wordings, other pictures"),
    BY_NAME: (GENERALITY, "asked by name"),
    RELATED_TEXT: (PORTABILITY, "questions on the edited knowledge, no picture"),
    RELATED_PICTURE: (PORTABILITY, "questions on the edited knowledge, with its picture"),
    PORTABILITY: (PORTABILITY, "questions that need the new fact"),
    SAME_QUESTION_OTHER_PICTURE: (LOCALITY, "same question, pictures of other things"),
    OTHER_QUESTION_SAME_PICTURE: (LOCALITY, "other questions, same picture"),
    OTHER_SUBJECT: (LOCALITY, "same relation, other subjects"),
    ORIGINAL_ENTITY: (LOCALITY, "the original entity asked in text"),
    NO_PICTURE: (LOCALITY, "same question, no picture"),
    UNRELATED: (LOCALITY, "unrelated questions"),
    UNRELATED_TEXT: (LOCALITY, "unrelated questions, no picture"),
    GENERAL: (ABILITY, "held-out questions"),
    CLOZE: (ABILITY, "untouched facts that the unedited model knows"),
    OWN_TEXT: (ABILITY, "texts that the unedited model sampled"),
    GIVEN_TEXT: (ABILITY, "texts of the caller"),
}
"""Kind of question -> (what it measures, its name for people)."""
PROBE_KINDS = tuple(kind for kind, (aspect, _) in KINDS.items() if aspect not in (EFFICACY, ABILITY))
"""The kinds that a probe may have."""
LISTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")
"""Fields of an edit that hold lists of questions, besides its probes."""
_ANSWERED = (PORTABILITY, RELATED_TEXT, RELATED_PICTURE)
"""Kinds whose answer follows from the target but is not the target."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Question:
    """One question, its picture, and what is known about both. It needs no model and no torch.

    A picture may be named by its path as text, and lists become tuples. Raises `DataError` if the question is empty, if
    a box is, or if a value is of another type than its field.

    Example:
        >>> from multrace.data import Question
        >>> Question(text="Who founded the company in this photo?", constraint="the company in this photo")
        Question('Who founded the company in this photo?', no picture)
    """

    text: str
    """The question in words; in a file the key "question"."""
    image: PictureSource | tuple[PictureSource, ...] | None = field(default=None, hash=False)
    """The picture, several pictures in order, or None for a question without a picture."""
    id: str = ""
    """Name of the question in reports and folders; unique within a file."""
    constraint: Words | None = None
    """The words that point at the thing asked about, in the picture or, by name, in the world (arXiv 2406.04236)."""
    spans: Mapping[str, Words] = field(default_factory=dict, hash=False)
    """More words of the question by name, such as "text" (a second constraint), "object", "true_option"."""
    replacement: str | None = None
    """A phrase that names something else of the kind, which takes the constraint's place in a text corruption."""
    answer: str | None = None
    """The right answer, where it is known."""
    answers: tuple[str, ...] = ()
    """All answers that count as right, such as those of several annotators."""
    foil: str | None = None
    """A wrong answer to compare with, such as the other one of two offered options."""
    boxes: tuple[PixelBox, ...] = ()
    """Where the thing asked about is, in pixels of the picture."""
    corrupt: str | None = None
    """The corruption that a trace of this question uses, as the command line writes it, such as "swap:other.jpg"."""
    template: str | None = None
    """The template of the prompt, as `VisionLanguageModel.prompt` takes it; None for the model's own."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Whatever else a file says about the question, as JSON values."""

    def __post_init__(self) -> None:
        _check_texts(self, "text", "id")
        _check_texts(self, "replacement", "answer", "foil", "corrupt", "template", or_none=True)
        _check_texts(self, "answers", several=True)
        _check_mappings(self, "spans", "extra")
        if not self.text.strip():
            raise DataError("the question is empty; write what to ask" + (f" (id {self.id!r})" if self.id else ""))
        for name, words in self.words.items():
            if not (isinstance(words, str) or isinstance(words, tuple | list) and words and isinstance(words[0], str)):
                _refuse(self, name, words, 'the words of the question as text, or (words, number or "all")')
        _strip(self, "text", "answer", "answers", "foil", "replacement")
        object.__setattr__(self, "image", _picture_sources(self))
        object.__setattr__(self, "boxes", tuple(_box(self, box) for box in _items(self, "boxes")))
        for left, top, right, bottom in self.boxes:
            if not (0 <= left < right and 0 <= top < bottom):
                raise DataError(
                    f"the box {[left, top, right, bottom]} of the question {self.text!r} is empty or outside the "
                    "picture; give 0 <= left < right and 0 <= top < bottom"
                )

    def __repr__(self) -> str:
        count = len(self.images)
        pictures = "no picture" if not count else "1 picture" if count == 1 else f"{count} pictures"
        answer = "" if self.answer is None else f" -> {shortened(self.answer)}"
        return f"Question({shortened(self.text)}{answer}, {pictures})"

    @property
    def images(self) -> tuple[PictureSource, ...]:
        """The pictures in order; empty for a question without one."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def words(self) -> dict[str, Words]:
        """The constraint and the other spans by name, as `VisionLanguageModel.prompt` takes them."""
        own = {} if self.constraint is None else {"constraint": self.constraint}
        return own | dict(self.spans)

    @cached_property
    def key(self) -> str:
        """A SHA-256 of all that a model is shown (words, pictures' content, template), answers and spans aside.

        Raises `DataError` if the file of a picture cannot be read.
        """
        digest = hashlib.sha256(repr((self.text, self.template)).encode())
        for image in self.images:
            digest.update(_content(image))
        return digest.hexdigest()

    @property
    def picture_names(self) -> tuple[str, ...]:
        """The name of each picture's file, if it has one, with the start of the SHA-256 of its content.

        Raises `DataError` if a file cannot be read.
        """
        digests = (f"sha256:{_content(image).hex()[:_DIGITS]}" for image in self.images)
        files = ("" if isinstance(image, Image.Image) else f"{Path(image).name} " for image in self.images)
        return tuple(f"{file}{digest}" for file, digest in zip(files, digests, strict=True))

    def with_image(self, image: PictureSource | tuple[PictureSource, ...] | None) -> Self:
        """Return the same question about another picture; boxes of the old picture are dropped."""
        return replace(self, image=image, boxes=())

    def with_answer(self, answer: str | None) -> Self:
        """Return the same question with another answer."""
        return replace(self, answer=answer, answers=())


@runtime_checkable
class AsksQuestion(Protocol):
    """Something that can be put as a plain question, such as a prompt of a model."""

    def as_question(self) -> Question:
        """Return the plain question."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class EditRequest:
    """One fact to write: after the edit, the model should answer the question, and questions like it, with the target.

    Where a question is expected, a prompt can be passed too: the request keeps its plain question
    (`Prompt.as_question`), so that requests hold no tensors. Raises `DataError` if the target is empty,
    or if a value is of another type than its field.

    Example:
        >>> from multrace.data import EditRequest, Question
        >>> EditRequest(question=Question(text="Who won?"), target="Pruro")
        EditRequest('Who won?' -> 'Pruro', no picture)
    """

    question: Question
    """The question (and picture) whose answer is to change."""
    target: str
    """The new answer, of any number of tokens."""
    contexts: tuple[Question, ...] = ()
    """More pictures or wordings of the fact. Keys are averaged over them, and the value has to work in all of them."""
    rewrite_prompts: tuple[Question, ...] = ()
    """Questions that must get the target too, each with keys and values of its own, such as the question by name."""
    preserve_prompts: tuple[Question, ...] = ()
    """Questions whose present answers must stay, such as the same question about other pictures."""
    essence: tuple[Question, ...] = ()
    """Questions about the same thing whose next token should stay as it is during the value search (ROME)."""
    id: str = ""
    """Name of the request in reports and files; unique within a file."""

    def __post_init__(self) -> None:
        _check_texts(self, "id")
        object.__setattr__(self, "question", question_of(self.question))
        for part in LISTS:
            object.__setattr__(self, part, tuple(question_of(value) for value in _items(self, part)))
        if not isinstance(self.target, str) or not self.target.strip():
            raise DataError(
                f"the target of the edit of {self.question.text!r} is {self.target!r}; "
                "pass the new answer as text, for example target='Paris'"
            )
        _strip(self, "target")

    def __repr__(self) -> str:
        nouns = ("context", "rewrite prompt", "preserve prompt", "essence prompt")
        lists = (self.contexts, self.rewrite_prompts, self.preserve_prompts, self.essence)
        more = "".join(f", {counted(len(part), noun)}" for part, noun in zip(lists, nouns, strict=True) if part)
        picture = "" if self.question.images else ", no picture"
        words = f"{shortened(self.question.text)} -> {shortened(self.target)}"
        return f"{type(self).__name__}({words}{picture}{more}{self._more()})"

    def _more(self) -> str:
        return ""

    @property
    def label(self) -> str:
        """Its id, or its question and target."""
        return self.id or f"{self.question.text} -> {self.target}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Probe:
    """One question that checks an edit.

    The expected answer is the probe's. That of its question is moved to the probe if the edit is not to decide it, and
    otherwise left out. Raises `DataError` for an unknown kind, for a kind whose answer follows from the target if there
    is no answer, and for a value of another type than its field.
    """

    kind: str
    """One of PROBE_KINDS."""
    question: Question
    answer: str | None = None
    """If the answer should move: the answer after the edit, by default the target. If it should stay: the right one."""
    hops: int | None = None
    """Of portability: how many facts away from the edited one."""
    needs: tuple[str, ...] = ()
    """Ids of other records whose edits the answer needs too (compositional questions)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", question_of(self.question))
        _check_texts(self, "answer", or_none=True)
        _check_texts(self, "needs", several=True)
        _strip(self, "answer")
        if self.kind not in PROBE_KINDS:
            kinds = "; ".join(f"{name} ({KINDS[name][1]})" for name in PROBE_KINDS)
            raise DataError(f"no kind of probe {self.kind!r}; use one of: {kinds}")
        if self.answer is None and (self.stays or self.kind in _ANSWERED):
            object.__setattr__(self, "answer", self.question.answer)
        if self.question.answer is not None:
            object.__setattr__(self, "question", replace(self.question, answer=None))
        if self.hops is not None and (type(self.hops) is not int or self.hops < 1):
            raise DataError(
                f"the hops of a {self.kind} probe are {quoted(self.hops)}; give a whole number of at least 1"
            )
        if self.kind in _ANSWERED and self.answer is None:
            raise DataError(
                f"the {self.kind} probe {self.question.text!r} has no answer; add the answer that follows from the "
                "new fact"
            )

    def __repr__(self) -> str:
        return f"Probe({self.kind}, {self.question!r})"

    @property
    def aspect(self) -> str:
        """What it measures: generality, portability or locality."""
        return KINDS[self.kind][0]

    @property
    def stays(self) -> bool:
        """Whether the answer should be the same after the edit."""
        return self.aspect == LOCALITY


@dataclass(frozen=True, kw_only=True, repr=False)
class EditRecord(EditRequest):
    """One edit to make, and the questions that check it: one line of a file of corrections or row of a benchmark."""

    probes: tuple[Probe, ...] = ()
    old: str | None = None
    """The present answer as the file knows it; None: what the unedited model says."""
    group: str = ""
    """Records that belong together, such as the visual and the textual edit of one row."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Whatever else the file says, as JSON values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(self, "old", or_none=True)
        _check_texts(self, "group")
        _check_mappings(self, "extra")
        _strip(self, "old")
        object.__setattr__(self, "probes", tuple(_items(self, "probes")))
        for probe in self.probes:
            if not isinstance(probe, Probe):
                _refuse(self, "probes", probe, "a tuple of Probe(kind=..., question=...)")

    def _more(self) -> str:
        return f", {counted(len(self.probes), 'probe')}" if self.probes else ""


def question_of(value: Question | AsksQuestion) -> Question:
    """Return a question as it is, and the plain question of a prompt."""
    if isinstance(value, Question):
        return value
    if isinstance(value, AsksQuestion):
        return value.as_question()
    raise DataError(f"a question is of type {type(value).__name__}; pass a Question, or a prompt of a model")


def questions_of(record: Question | EditRecord) -> Iterator[tuple[tuple[str, int] | None, Question]]:
    """Yield every question of a record with its list and index; None for the record's own."""
    if isinstance(record, Question):
        yield None, record
        return
    yield None, record.question
    for name in LISTS:
        yield from (((name, index), question) for index, question in enumerate(getattr(record, name)))
    yield from ((("probes", index), probe.question) for index, probe in enumerate(record.probes))


def with_questions(
    record: Question | EditRecord, questions: Mapping[tuple[str, int] | None, Question]
) -> Question | EditRecord:
    """Return the record with these questions, by their places in `questions_of`; those without a place are left out."""
    if isinstance(record, Question):
        return questions[None]
    lists: dict[str, Any] = {
        name: tuple(questions[name, index] for index in range(len(getattr(record, name))) if (name, index) in questions)
        for name in LISTS
    }
    probes = tuple(
        replace(probe, question=questions["probes", index])
        for index, probe in enumerate(record.probes)
        if ("probes", index) in questions
    )
    return replace(record, question=questions[None], probes=probes, **lists)


def with_template(record: EditRecord, template: str) -> EditRecord:
    """Return the record with this template for each of its questions that has none.

    Example:
        >>> from multrace.data import EditRecord, Question, with_template
        >>> record = EditRecord(question=Question(text="The capital of Australia is"), target="Canberra")
        >>> with_template(record, "raw").question.template
        'raw'
    """
    told = {place: replace(each, template=each.template or template) for place, each in questions_of(record)}
    return cast(EditRecord, with_questions(record, told))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 request" or "2 requests"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, length: int = 60) -> str:
    """Return the text in quotes, cut to so many characters, for lines that describe values."""
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")


def _refuse(owner: object, name: str, value: object, advice: str) -> NoReturn:
    """Raise the error of a field that holds a value of another type."""
    raise DataError(
        f"{type(owner).__name__}.{name} cannot be {quoted(value)}, of type {type(value).__name__}; pass {advice}"
    )


def _check_texts(owner: object, *names: str, or_none: bool = False, several: bool = False) -> None:
    """Raise `DataError` unless these fields hold texts, None where that is allowed, or several texts."""
    for name in names:
        if several:
            object.__setattr__(owner, name, tuple(_items(owner, name)))
        for text in getattr(owner, name) if several else (getattr(owner, name),):
            if not isinstance(text, str) and not (or_none and text is None):
                _refuse(owner, name, text, "a tuple of texts" if several else "a text" + " or None" * or_none)


def _check_mappings(owner: object, *names: str) -> None:
    """Raise `DataError` unless these fields hold dictionaries by name."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            _refuse(owner, name, value, "a dictionary whose keys are texts")


def _items(owner: object, name: str) -> Iterable[Any]:
    """Return the field, which holds a list, a tuple or another iterable of values that is no value itself."""
    value = getattr(owner, name)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        _refuse(owner, name, value, "a tuple, also for one value")
    return value


def _picture_sources(question: Question) -> PictureSource | tuple[PictureSource, ...] | None:
    """Return the picture or pictures of a question, with paths that are texts as paths."""
    image = question.image
    if image is None or isinstance(image, Image.Image | Path):
        return image
    several = isinstance(image, list | tuple)
    sources = []
    for each in image if several else (image,):
        if isinstance(each, str | os.PathLike):
            each = Path(each)
        elif not isinstance(each, Image.Image):
            _refuse(question, "image", each, "a path, a PIL image, a tuple of these, or None")
        sources.append(each)
    return tuple(sources) if several else sources[0]


def _box(question: Question, box: Any) -> PixelBox:
    """Return a box as whole numbers."""
    try:
        left, top, right, bottom = map(operator.index, box)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for a tensor of several numbers
        _refuse(question, "boxes", box, "boxes (left, top, right, bottom), in whole pixels")
    return left, top, right, bottom


def _strip(value: object, *names: str) -> None:
    """Remove the blanks around these texts of a value, which no model is shown: with and without, they are one text."""
    for name in names:
        text = getattr(value, name)
        if isinstance(text, str):
            object.__setattr__(value, name, text.strip())
        elif text is not None:
            object.__setattr__(value, name, tuple(each.strip() if isinstance(each, str) else each for each in text))


def _content(image: PictureSource) -> bytes:
    """A digest of a picture: of the bytes of its file, or of its pixels in memory."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()
    try:
        with Path(image).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"cannot read the picture {str(image)!r}: {error.strerror or error}") from error
