"""Questions for `multrace flow`: from a file of records, from the study's CSV files, or from the embedded world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image

from .. import data
from ..artefacts.folders import ArtefactError
from ..data import DataError
from ..data.gqa_flow import FlowRecord, read_gqa_flow
from ..data.spans import find_span
from ..models import Prompt, VisionLanguageModel, open_images
from ..models.errors import ModelError, gist
from ..tracing import Box, TraceError
from .errors import CommandError
from .json_lines import read_object, read_texts

_SPANS = ("constraint", "object", "true_option", "false_option")
_TEXTS = ("id", "image", "question", "answer", *_SPANS)
_KEYS = (*_TEXTS, "boxes")


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowQuestion:
    """A question with everything that the analyses of information flow can use."""

    id: str
    question: str
    image: Image.Image | Path | None = None
    spans: Mapping[str, str] = field(default_factory=dict)
    """Words of the question by name: "constraint", "object", "true_option", "false_option"."""
    boxes: tuple[Box, ...] = ()
    """Where the object asked about is, in pixels of the picture."""
    gold: str | None = None
    """The right answer."""
    foil: str | None = None
    """A wrong answer that the question offers."""

    def prompt(self, vlm: VisionLanguageModel) -> Prompt:
        """Return the question as a prompt of this model, with its spans as token groups."""
        return vlm.prompt(self.image, self.question, constraint=dict(self.spans) or None)

    def check(self) -> None:
        """Raises `ModelError` for a picture that cannot be read, or for words that are not in the question."""
        open_images(self.image)
        for words in self.spans.values():
            find_span(self.question, words)


def read_questions(path: Path, *, images: Path | None = None) -> tuple[tuple[FlowQuestion, ...], tuple[str, ...]]:
    """Return the questions of a file, and what is wrong with the lines that were left out.

    A .csv file or a folder: those of arXiv 2411.18620 (`read_gqa_flow`), whose pictures lie in the folder `images`. Any
    other file: one JSON object per line with "question" and, as far as they are known, "id", "image" (a path from the
    file's own folder, or from `images`), "answer" (the right one), "constraint", "object", "true_option",
    "false_option" (words of the question) and "boxes" ([[left, top, right, bottom], ...] in pixels). CommandError if
    there is nothing to ask.
    """
    problems: list[str] = []
    if path.is_dir() or path.suffix.lower() == ".csv":
        found = [_from_record(record) for record in _gqa(path, images, problems)]
    else:
        found = list(_from_lines(path, images or path.parent, problems))
    if not found:
        first = f"; {problems[0]}" if problems else "; it is empty"
        raise CommandError(f"no questions in {str(path)!r}{first}")
    return tuple(found), tuple(problems)


def world_questions(count: int, *, seed: int = 0) -> tuple[FlowQuestion, ...]:
    """Return questions about facts of the embedded model's world, each with a held-out picture.

    See `data.world_questions`.
    """
    return tuple(
        FlowQuestion(
            id=question.id,
            question=question.text,
            image=cast(Image.Image, question.image),
            spans=question.words,
            boxes=tuple(Box(*box) for box in question.boxes),
            gold=question.answer,
        )
        for question in data.world_questions(count, seed=seed)
    )


def _gqa(path: Path, images: Path | None, problems: list[str]) -> tuple[FlowRecord, ...]:
    if images is None:
        raise CommandError(f"the pictures of {str(path)!r} are files of their own; pass --images with their folder")
    try:
        return read_gqa_flow(path, images=images, problems=problems)
    except DataError as error:
        raise CommandError(str(error)) from error


def _from_record(record: FlowRecord) -> FlowQuestion:
    return FlowQuestion(
        id=record.id,
        question=record.question,
        image=record.image,
        spans=record.spans,
        boxes=tuple(Box(*box) for box in record.boxes),
        gold=record.answer,
        foil=record.false_option,
    )


def _from_lines(path: Path, images: Path, problems: list[str]) -> Iterator[FlowQuestion]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CommandError(
            f"cannot read the records {str(path)!r}: {error.strerror or error}; pass a file with a JSON object per "
            "line, one of the study's CSV files, or a folder of them"
        ) from error
    known: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = _from_line(line, number, images)
            if question.id in known:
                raise CommandError(f"the id {question.id!r} has come before; give each line its own")
            known.add(question.id)
            yield question
        except (CommandError, DataError, ModelError, TraceError, ArtefactError) as error:
            problems.append(f"line {number}: {gist(error)}")


def _from_line(line: bytes, number: int, images: Path) -> FlowQuestion:
    """The question of one line. CommandError for anything but an object with a question and the known keys."""
    found = read_object(line, _KEYS)
    words = read_texts(found, _TEXTS)
    if not words["question"].strip():
        raise CommandError("the question is empty; write what to ask")
    return FlowQuestion(
        id=words.get("id", f"line_{number:04d}"),
        question=words["question"],
        image=images / words["image"] if "image" in words else None,
        spans={name: words[name] for name in _SPANS if name in words},
        boxes=_boxes(found.get("boxes") or []),
        gold=words.get("answer"),
        foil=words.get("false_option"),
    )


def _boxes(found: Any) -> tuple[Box, ...]:
    is_list = isinstance(found, list) and all(isinstance(box, list) and len(box) == 4 for box in found)
    if not is_list or not all(isinstance(edge, int) and not isinstance(edge, bool) for box in found for edge in box):
        raise CommandError(f"'boxes' is {found!r}; write [[left, top, right, bottom], ...] in pixels, whole numbers")
    return tuple(Box(*box) for box in found)
