"""The requests of `multrace edit`: one from options, or all those of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..data import DataError, EditRecord, EditRequest, Question, find_spans, inspect_picture, questions_of, read_data
from ..data.spans import says_once
from ..editing.augment import Augmentation
from ..models import VisionLanguageModel
from ..tracing import Corruption, SwapImage
from .errors import CommandError
from .options.edit import RequestOptions

NEXT = "swap:next"
"""What --corrupt spells for the picture of another record."""
_OF_ONE = ("image", "constraint", "target", "context_image", "also_image", "also_question", "also_text")
_OF_ONE += ("keep_image", "keep_question")


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedEdit:
    """One edit as it is known before the model is opened."""

    make: Callable[[VisionLanguageModel], EditRequest]
    """Function that makes the request for a model."""
    corruption: Corruption | None = None
    """What a trace of it corrupts; None if it has no picture or constraint to corrupt, or if nothing is traced."""


def asked_edits(options: RequestOptions, *, traced: bool) -> tuple[AskedEdit, ...]:
    """Return what is to be edited, checked as far as that goes without the model.

    Args:
        options: The request, or the file of requests.
        traced: Whether each request is to be traced, under --corrupt.

    Raises:
        CommandError: Options that do not fit together.
        ModelError: A picture that cannot be read, or words that are not in the question.
    """
    options.check_request()
    if options.data is not None:
        return _from_file(options, traced)
    options.check_question()
    if options.target is None or not options.target.strip():
        raise CommandError(f"the target of the edit is {options.target!r}; pass the new answer, as --target Paris")
    make = partial(_augmented, options, partial(_request, options))
    return (AskedEdit(make=make, corruption=options.corruption() if traced else None),)


def _request(options: RequestOptions, vlm: VisionLanguageModel) -> EditRequest:
    """The request of the options. Errors as `VisionLanguageModel.prompt` and `EditRequest`."""
    image, prompt = options.image, partial(_prompt, options, vlm)
    question = options.prompt(vlm).as_question()
    also = [prompt(path) for path in options.also_image]
    also += [prompt(image, text) for text in options.also_question]
    also += [prompt(None, text) for text in options.also_text]
    keep = [prompt(path) for path in options.keep_image]
    keep += [prompt(image, text) for text in options.keep_question]
    return EditRequest(
        question=question,
        target=options.target,
        contexts=tuple(prompt(path) for path in options.context_image),
        rewrite_prompts=tuple(also),
        preserve_prompts=tuple(keep),
    )


def _prompt(
    options: RequestOptions, vlm: VisionLanguageModel, image: str | None, question: str | None = None
) -> Question:
    """Another picture or another question; its constraint is marked where the question says the same words once."""
    text = options.question if question is None else question
    is_said = options.constraint is not None and says_once(text, options.constraint)
    return vlm.prompt(image, text, constraint=options.constraint if is_said else None).as_question()


def _augmented(
    options: RequestOptions, make: Callable[[VisionLanguageModel], EditRequest], vlm: VisionLanguageModel
) -> EditRequest:
    """The request, with variants of its picture if it has one."""
    request = make(vlm)
    if not options.augment or not request.question.images:
        return request
    crops, jitters, shifts = ((options.augment + rest) // 3 for rest in (2, 1, 0))
    return Augmentation(crops=crops, jitters=jitters, shifts=shifts).of(request)


def _from_file(options: RequestOptions, traced: bool) -> tuple[AskedEdit, ...]:
    if given := [name for name in _OF_ONE if getattr(options, name)]:
        raise CommandError(
            f"--{given[0].replace('_', '-')} belongs to one request; with --data, write it into each line"
        )
    entries = read_edits(options.data, format=options.format, images=options.images)[: options.limit]
    corruptions = _corruptions(options, entries) if traced else [None] * len(entries)
    return tuple(
        AskedEdit(make=partial(_augmented, options, partial(_of_entry, entry)), corruption=corruption)
        for entry, corruption in zip(entries, corruptions, strict=True)
    )


def _of_entry(entry: EditRecord, _vlm: VisionLanguageModel) -> EditRequest:
    return entry


def read_edits(path: Path, *, format: str | None = None, images: Path | None = None) -> tuple[EditRecord, ...]:
    """Return the edits of a data file; all rows are checked, with their spans and the headers of their pictures.

    Raises `CommandError` for the first row that cannot be used, which says how many others there are.
    """
    edits = _usable(path, EditRecord, "no 'target'; add the new answer", format=format, images=images)
    return tuple(cast(EditRecord, edit) for edit in edits)


def read_general(path: Path, *, format: str | None = None, images: Path | None = None) -> tuple[Question, ...]:
    """Return held-out questions with their right answers. Raises `CommandError` as `read_edits`."""
    questions = _usable(path, Question, "a 'target'; held-out questions have an 'answer'", format=format, images=images)
    return tuple(cast(Question, question) for question in questions)


def _usable(path: Path, kind: type, other: str, **where: Any) -> list[Question | EditRecord]:
    """The records of a file, all of this kind."""
    records: list[Question | EditRecord] = []
    problems: list[str] = []
    for row, record in read_data(path, **where):
        try:
            if isinstance(record, DataError):
                raise record
            if not isinstance(record, kind):
                raise DataError(f"it has {other}")
            _check(record)
            records.append(record if record.id else replace(record, id=f"line_{row}"))
        except DataError as error:
            message = str(error)
            problems.append(message if f"{str(path)!r}: " in message else f"line {row} of {str(path)!r}: {message}")
    if problems:
        rows = len(problems) + len(records)
        more = f" ({len(problems) - 1} more of {rows} lines are wrong)" if len(problems) > 1 else ""
        raise CommandError(f"{problems[0]}{more}; multrace data check lists all, and --fix leaves them out")
    return records


def _check(record: Question | EditRecord) -> None:
    """Raises `DataError` for what no model could use."""
    if isinstance(record, Question) and record.answer is None:
        raise DataError(f"no 'answer' to {record.text!r}; add the right one")
    for _, question in questions_of(record):
        for image in question.images:
            if isinstance(image, Path) and (problem := inspect_picture(image).problem):
                raise DataError(problem)
        for words in question.words.values():
            find_spans(question.text, words)


def _corruptions(options: RequestOptions, entries: Sequence[EditRecord]) -> list[Corruption | None]:
    """What corrupts each entry's picture or constraint; None for an entry that has none."""
    if options.corrupt == NEXT:
        return [swapped(entries, index) for index in range(len(entries))]
    # what is wrong with the option itself is found on an entry that has everything
    replace(options, image="any", constraint="any", data=None).corruption()
    corruptions: list[Corruption | None] = []
    for entry in entries:
        image = str(entry.question.images[0]) if entry.question.images else None
        words = entry.question.constraint
        constraint = words[0] if isinstance(words, tuple) else words
        try:
            corruptions.append(replace(options, image=image, constraint=constraint).corruption())
        except CommandError:
            corruptions.append(None)
    if not any(corruptions):
        raise CommandError(f"no record in {str(options.data)!r} has what --corrupt {options.corrupt} corrupts")
    return corruptions


def swapped(entries: Sequence[EditRecord], index: int) -> SwapImage | None:
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
    return SwapImage(next((other for other in shown if other.text == own.text), shown[0]).images[0])
