"""What `multrace edit` is asked for: one request from options or all those of a file, and the place to edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .. import data, editing, models, tracing, workflow
from ..data import spans
from .options import CommandError, CorruptionOptions, RunOptions

_PLACE = re.compile(r"(?P<first>-?\d+)(?:-(?P<last>\d+))?(?::(?P<token>.+))?")
_NUMBER = re.compile(r"-?\d+")


def parse_place(where: str) -> workflow.Place:
    """Return the place that LAYER, LAYER:TOKEN, FIRST-LAST or FIRST-LAST:TOKEN spells; the default token is the last.

    CommandError for anything else.
    """
    found = _PLACE.fullmatch(where)
    first, last = (int(found[name]) if found and found[name] else None for name in ("first", "last"))
    if first is None or (last is not None and not 0 <= first <= last):
        raise CommandError(
            f"no place {where!r}; write --where trace, --where 4, --where 4:constraint_last or --where 3-5:last"
        )
    token = found["token"] or "last"
    return workflow.Place(
        layer=first if last is None else last,
        token=int(token) if _NUMBER.fullmatch(token) else token,
        spread=None if last is None else last - first + 1,
        reason="as asked",
    )


@dataclass(frozen=True, kw_only=True)
class RequestOptions(CorruptionOptions, RunOptions):
    """One request (the fact, its other phrasings, and what must stay), or a file of requests."""

    # pyrefly: ignore[bad-override] -- not needed where records are given
    question: Annotated[str | None, Parameter(help="question to ask")] = None
    target: Annotated[str | None, Parameter(help="new answer")] = None
    context_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="other pictures of the same thing; keys are averaged over them, and the new answer must hold for all",
            metavar="FILE",
        ),
    ] = ()
    also_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="pictures for which --question must get the new answer too, with keys of their own", metavar="FILE"
        ),
    ] = ()
    also_question: Annotated[
        tuple[str, ...], Parameter(help="other wordings about --image that must get the new answer too", metavar="TEXT")
    ] = ()
    also_text: Annotated[
        tuple[str, ...],
        Parameter(
            help="questions without a picture, for example by name, that must get the new answer too", metavar="TEXT"
        ),
    ] = ()
    keep_image: Annotated[
        tuple[str, ...], Parameter(help="pictures for which --question must keep its present answer", metavar="FILE")
    ] = ()
    keep_question: Annotated[
        tuple[str, ...], Parameter(help="other questions about --image whose answers must stay", metavar="TEXT")
    ] = ()
    augment: Annotated[
        int,
        Parameter(
            help="number of variants of each picture (crops, jitters, shifts) that keys are averaged over as well",
            metavar="N",
        ),
    ] = 0

    def check_request(self) -> None:
        """Raises `CommandError` for options that do not fit together."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question with --target, or --data FILE.jsonl")
        if self.data is None and (wrong := self.given(_OF_MANY)):
            raise CommandError(f"{wrong[0]} belongs to --data FILE")
        if self.data is not None and (wrong := self.given(_OF_ONE)):
            raise CommandError(f"{wrong[0]} belongs to one request; with --data, write it into each line")
        if self.augment < 0 or (self.augment and self.data is None and self.image is None):
            raise CommandError(f"--augment {self.augment} needs a picture and a number of at least 0")
        self.check_run()

    def check_target(self) -> None:
        """Raises `CommandError` for a request without a target."""
        if self.target is None or not self.target.strip():
            raise CommandError(f"the target of the edit is {self.target!r}; pass the new answer, as --target Paris")

    def check_question(self) -> None:
        """Raises `ModelError` also for another picture that cannot be read."""
        super().check_question()
        for path in (*self.context_image, *self.also_image, *self.keep_image):
            models.open_images(path)


NEXT = "swap:next"
"""What --corrupt spells for the picture of another record."""
_OF_ONE = ("image", "constraint", "target", "context_image", "also_image", "also_question", "also_text")
_OF_ONE += ("keep_image", "keep_question")
_OF_MANY = ("format", "images", "limit", "shard", "retry_failed")


def request_of(options: RequestOptions, vlm: models.VisionLanguageModel) -> data.EditRequest:
    """Return the one request of the options. Errors as `VisionLanguageModel.prompt` and `EditRequest`."""
    image, prompt = options.image, partial(_prompt, options, vlm)
    question = options.prompt(vlm).as_question()
    also = [prompt(path) for path in options.also_image]
    also += [prompt(image, text) for text in options.also_question]
    also += [prompt(None, text) for text in options.also_text]
    keep = [prompt(path) for path in options.keep_image]
    keep += [prompt(image, text) for text in options.keep_question]
    return data.EditRequest(
        question=question,
        target=options.target,
        contexts=tuple(prompt(path) for path in options.context_image),
        rewrite_prompts=tuple(also),
        preserve_prompts=tuple(keep),
    )


def variants(count: int) -> editing.Augmentation | None:
    """Return an augmentation with so many variants of a picture, or None for none."""
    crops, jitters, shifts = ((count + rest) // 3 for rest in (2, 1, 0))
    return editing.Augmentation(crops=crops, jitters=jitters, shifts=shifts) if count else None


def edit_rows(options: RequestOptions, *, traced: bool) -> tuple[tuple[int, Any], ...]:
    """Return the records of --data with their rows; a row that cannot be edited has its `DataError` instead.

    traced: whether each record is traced, so that it needs a corruption; --corrupt swap:next gives it the next one's
    picture.

    Raises `CommandError` if no record names a corruption and --corrupt is missing, or if all have one picture.
    """
    rows = [(row, _usable_edit(record)) for row, record in options.records()]
    edits = [record for _, record in rows if isinstance(record, data.EditRecord)]
    if not traced:
        return tuple(rows)
    if options.corrupt is None and edits and not any(edit.question.corrupt for edit in edits):
        options.corruption()
    if options.corrupt != NEXT:
        return tuple(rows)
    next_pictures = {id(edit): swapped(edits, index) for index, edit in enumerate(edits)}
    return tuple((row, _under(record, next_pictures.get(id(record)))) for row, record in rows)


def _usable_edit(record: Any) -> Any:
    """The record, or the error that says why it cannot be edited."""
    try:
        if isinstance(record, data.Question):
            raise data.DataError(f"{record.text!r} has no 'target'; add the new answer")
        if isinstance(record, data.EditRecord):
            _check(record)
    except data.DataError as error:
        return error
    return record


def _under(record: Any, corruption: tracing.SwapImage | None) -> Any:
    """The record with a corruption of its question, unless it names one of its own."""
    if corruption is None or record.question.corrupt is not None:
        return record
    return replace(record, question=replace(record.question, corrupt=f"swap:{corruption.image}"))


def _prompt(
    options: RequestOptions, vlm: models.VisionLanguageModel, image: str | None, question: str | None = None
) -> data.Question:
    """Another picture or another question; its constraint is marked where the question says the same words once."""
    text = options.question if question is None else question
    is_said = options.constraint is not None and spans.says_once(text, options.constraint)
    return vlm.prompt(image, text, constraint=options.constraint if is_said else None).as_question()


def read_general(path: Path, *, format: str | None = None, images: Path | None = None) -> tuple[data.Question, ...]:
    """Return held-out questions with their right answers, with the headers of their pictures checked.

    Raises `CommandError` for the first row that cannot be used, which says how many others there are.
    """
    questions: list[data.Question] = []
    problems: list[str] = []
    for row, record in data.read_data(path, format=format, images=images):
        try:
            if isinstance(record, data.DataError):
                raise record
            if not isinstance(record, data.Question):
                raise data.DataError("it has a 'target'; held-out questions have an 'answer'")
            _check(record)
            questions.append(record if record.id else replace(record, id=f"line_{row}"))
        except data.DataError as error:
            message = str(error)
            problems.append(message if f"{str(path)!r}: " in message else f"line {row} of {str(path)!r}: {message}")
    if problems:
        rows = len(problems) + len(questions)
        more = f" ({len(problems) - 1} more of {rows} lines are wrong)" if len(problems) > 1 else ""
        raise CommandError(f"{problems[0]}{more}; multrace data check lists all, and --fix leaves them out")
    return tuple(questions)


def _check(record: data.Question | data.EditRecord) -> None:
    """Raises `DataError` for what no model could use."""
    if isinstance(record, data.Question) and record.answer is None:
        raise data.DataError(f"no 'answer' to {record.text!r}; add the right one")
    for _, question in data.questions_of(record):
        for image in question.images:
            if isinstance(image, Path) and (problem := data.inspect_picture(image).problem):
                raise data.DataError(problem)
        for words in question.words.values():
            data.find_spans(question.text, words)


def swapped(entries: Sequence[data.EditRecord], index: int) -> tracing.SwapImage | None:
    """Return the picture of the next entry with another picture, with the same question if possible.

    A picture of another kind of thing would also corrupt the kind, which the words of the question reveal early. Raises
    `CommandError` if all entries have the same picture.
    """
    own = entries[index].question
    if own.image is None:
        return None
    others = [entry.question for entry in (*entries[index + 1 :], *entries[:index])]
    shown = [other for other in others if other.images and other.image != own.image]
    if not shown:
        raise CommandError(
            "a trace under the next record's picture needs records with different pictures; all have "
            f"{str(own.images[0])!r}; add records, or name the place by --where LAYER:TOKEN"
        )
    return tracing.SwapImage(next((other for other in shown if other.text == own.text), shown[0]).images[0])
