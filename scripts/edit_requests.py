"""What `multrace edit` is asked for: one request from options or all those of a file, and the place to edit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import Parameter

from .. import artefacts, data, editing, models, tracing
from ..data import spans
from .errors import CommandError
from .options.asking import CorruptionOptions, FileOptions

_PLACE = re.compile(r"(?P<first>-?\d+)(?:-(?P<last>\d+))?(?::(?P<token>.+))?")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The (last) layer and the token to edit, and why."""

    layer: int
    token: str | int
    reason: str
    spread: int | None = None
    """How many layers share the change, if --where says so."""

    def __str__(self) -> str:
        first = self.layer if self.spread is None else self.layer - self.spread + 1
        layers = f"layer {self.layer}" if first == self.layer else f"layers {first} to {self.layer}"
        return f"{layers}, token {self.token!r}: {self.reason}"


def parse_place(where: str) -> Place:
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
    return Place(
        layer=first if last is None else last,
        token=int(token) if _NUMBER.fullmatch(token) else token,
        spread=None if last is None else last - first + 1,
        reason="as asked",
    )


def place_of(site: tracing.EditSite) -> Place:
    """Return the place that a trace chose."""
    return Place(layer=site.layer, token=site.token, reason=site.reason)


def load_traces(paths: Sequence[Path]) -> tuple[tracing.CausalTrace, ...] | tracing.AverageTrace:
    """Return the traces in these files, one for each request, or an average for all of them.

    TraceError if a file is missing, damaged or no trace; CommandError for an average beside other files.
    """
    found = [_load(path) for path in paths]
    averages = [trace for trace in found if isinstance(trace, tracing.AverageTrace)]
    traces = [trace for trace in found if isinstance(trace, tracing.CausalTrace)]
    if averages and len(found) > 1:
        raise CommandError("--trace takes one trace for each request, or one average for all of them, not both")
    return averages[0] if averages else tuple(traces)


def _load(path: Path) -> tracing.CausalTrace | tracing.AverageTrace:
    try:
        return tracing.CausalTrace.load(path)
    except (tracing.TraceError, artefacts.ArtefactError) as error:
        try:
            return tracing.AverageTrace.load(path)
        except (tracing.TraceError, artefacts.ArtefactError):
            raise error from None


@dataclass(frozen=True, kw_only=True)
class RequestOptions(CorruptionOptions, FileOptions):
    """One request (the fact, its other phrasings, and what must stay), or a file of requests."""

    data: Annotated[
        Path | None,
        Parameter(
            help="edit every line of this file instead, in one edit; the format is described below, and --corrupt "
            "swap:next replaces each picture by the next record's",
            metavar="FILE",
        ),
    ] = None
    limit: Annotated[int | None, Parameter(help="edit only the first N lines of --data", metavar="N")] = None
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
        if self.limit is not None and (self.data is None or self.limit < 1):
            raise CommandError(f"--limit {self.limit}: pass at least 1, together with --data")
        if self.augment < 0 or (self.augment and self.data is None and self.image is None):
            raise CommandError(f"--augment {self.augment} needs a picture and a number of at least 0")

    def check_question(self) -> None:
        """Raises `ModelError` also for another picture that cannot be read."""
        super().check_question()
        for path in (*self.context_image, *self.also_image, *self.keep_image):
            models.open_images(path)


NEXT = "swap:next"
"""What --corrupt spells for the picture of another record."""
_OF_ONE = ("image", "constraint", "target", "context_image", "also_image", "also_question", "also_text")
_OF_ONE += ("keep_image", "keep_question")


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedEdit:
    """One edit as it is known before the model is opened."""

    make: Callable[[models.VisionLanguageModel], data.EditRequest]
    """Function that makes the request for a model."""
    corruption: tracing.Corruption | None = None
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


def _request(options: RequestOptions, vlm: models.VisionLanguageModel) -> data.EditRequest:
    """The request of the options. Errors as `VisionLanguageModel.prompt` and `EditRequest`."""
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


def _prompt(
    options: RequestOptions, vlm: models.VisionLanguageModel, image: str | None, question: str | None = None
) -> data.Question:
    """Another picture or another question; its constraint is marked where the question says the same words once."""
    text = options.question if question is None else question
    is_said = options.constraint is not None and spans.says_once(text, options.constraint)
    return vlm.prompt(image, text, constraint=options.constraint if is_said else None).as_question()


def _augmented(
    options: RequestOptions,
    make: Callable[[models.VisionLanguageModel], data.EditRequest],
    vlm: models.VisionLanguageModel,
) -> data.EditRequest:
    """The request, with variants of its picture if it has one."""
    request = make(vlm)
    if not options.augment or not request.question.images:
        return request
    crops, jitters, shifts = ((options.augment + rest) // 3 for rest in (2, 1, 0))
    return editing.Augmentation(crops=crops, jitters=jitters, shifts=shifts).of(request)


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


def _of_entry(entry: data.EditRecord, _vlm: models.VisionLanguageModel) -> data.EditRequest:
    return entry


def read_edits(path: Path, *, format: str | None = None, images: Path | None = None) -> tuple[data.EditRecord, ...]:
    """Return the edits of a data file; all rows are checked, with their spans and the headers of their pictures.

    Raises `CommandError` for the first row that cannot be used, which says how many others there are.
    """
    edits = _usable(path, data.EditRecord, "no 'target'; add the new answer", format=format, images=images)
    return tuple(cast(data.EditRecord, edit) for edit in edits)


def read_general(path: Path, *, format: str | None = None, images: Path | None = None) -> tuple[data.Question, ...]:
    """Return held-out questions with their right answers. Raises `CommandError` as `read_edits`."""
    questions = _usable(
        path, data.Question, "a 'target'; held-out questions have an 'answer'", format=format, images=images
    )
    return tuple(cast(data.Question, question) for question in questions)


def _usable(path: Path, kind: type, other: str, **where: Any) -> list[data.Question | data.EditRecord]:
    """The records of a file, all of this kind."""
    records: list[data.Question | data.EditRecord] = []
    problems: list[str] = []
    for row, record in data.read_data(path, **where):
        try:
            if isinstance(record, data.DataError):
                raise record
            if not isinstance(record, kind):
                raise data.DataError(f"it has {other}")
            _check(record)
            records.append(record if record.id else replace(record, id=f"line_{row}"))
        except data.DataError as error:
            message = str(error)
            problems.append(message if f"{str(path)!r}: " in message else f"line {row} of {str(path)!r}: {message}")
    if problems:
        rows = len(problems) + len(records)
        more = f" ({len(problems) - 1} more of {rows} lines are wrong)" if len(problems) > 1 else ""
        raise CommandError(f"{problems[0]}{more}; multrace data check lists all, and --fix leaves them out")
    return records


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


def _corruptions(options: RequestOptions, entries: Sequence[data.EditRecord]) -> list[tracing.Corruption | None]:
    """What corrupts each entry's picture or constraint; None for an entry that has none."""
    if options.corrupt == NEXT:
        return [swapped(entries, index) for index in range(len(entries))]
    # what is wrong with the option itself is found on an entry that has everything
    replace(options, image="any", constraint="any", data=None).corruption()
    corruptions: list[tracing.Corruption | None] = []
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
