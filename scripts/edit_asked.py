"""What multrace edit is asked to change: one request from options, or all those of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..editing.augment import Augmentation
from ..editing.requests import EditRequest
from ..models import ModelError, Prompt, VisionLanguageModel
from ..models.images import open_images
from ..models.spans import find_span
from ..tracing import Corruption, SwapImage
from .edit_records import EditEntry, read_edit_records
from .errors import CommandError
from .options import CorruptionOptions, option

NEXT = "swap:next"
"""What --corrupt spells for the picture of another record."""
_OF_ONE = ("image", "constraint", "target", "context_image", "also_image", "also_question", "also_text")
_OF_ONE += ("keep_image", "keep_question")


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedEdit:
    """One edit as it is known before the model is opened."""

    make: Callable[[VisionLanguageModel], EditRequest]
    """The request, as this model sees it."""
    corruption: Corruption | None = None
    """What a trace of it destroys; None where it has no picture or constraint to destroy, or nothing is traced."""


def _prompts(help: str, metavar: str) -> tuple[str, ...]:
    return option(help, default=(), nargs="+", metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class RequestOptions(CorruptionOptions):
    """One request (the fact, what states it otherwise, and what must stay), or a file of them."""

    data: Path | None = option(
        "edit every line of this file instead, in one edit; the lines are described below, and --corrupt swap:next "
        "destroys each picture by the next record's",
        default=None,
        type=Path,
        metavar="FILE.jsonl",
    )
    question: str | None = option("what to ask", default=None)
    target: str | None = option("the new answer", default=None)
    context_image: tuple[str, ...] = _prompts(
        "other pictures of the same thing: keys are averaged over them, and the new answer has to work in all", "FILE"
    )
    also_image: tuple[str, ...] = _prompts(
        "pictures in front of which --question must get the new answer too, with keys of their own", "FILE"
    )
    also_question: tuple[str, ...] = _prompts("other wordings, about --image, that must get the new answer too", "TEXT")
    also_text: tuple[str, ...] = _prompts(
        "questions without a picture, by name say, that must get the new answer too", "TEXT"
    )
    keep_image: tuple[str, ...] = _prompts(
        "pictures in front of which --question must keep the answer that it gets now", "FILE"
    )
    keep_question: tuple[str, ...] = _prompts("other questions about --image whose answers must stay", "TEXT")

    augment: int = option(
        "make so many variants of each picture (crops, jitters, shifts) and average the keys over them, too (default "
        "0)",
        default=0,
        type=int,
        metavar="N",
    )

    def asked(self, *, traced: bool) -> tuple[AskedEdit, ...]:
        """What is to be edited, checked as far as that goes without the model.

        traced: each is to be traced, under --corrupt. CommandError for options that do not fit together, ModelError for
        pictures that cannot be read and words that the question does not say.
        """
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question with --target, or --data FILE.jsonl")
        if self.augment < 0 or (self.augment and self.data is None and self.image is None):
            raise CommandError(f"--augment {self.augment} needs a picture and a number of at least 0")
        if self.data is not None:
            return self._from_file(traced)
        self.check_question()
        if self.target is None or not self.target.strip():
            raise CommandError(f"the target of the edit is {self.target!r}; pass the new answer, as --target Paris")
        return (AskedEdit(make=partial(self._made, self.request), corruption=self.corruption() if traced else None),)

    def check_question(self) -> None:
        """Also a ModelError for another picture that cannot be read."""
        super().check_question()
        for path in (*self.context_image, *self.also_image, *self.keep_image):
            open_images(path)

    def request(self, vlm: VisionLanguageModel) -> EditRequest:
        """The request as this model sees it. Errors as `VisionLanguageModel.prompt` and `EditRequest`."""
        also = [self._asked(vlm, path) for path in self.also_image]
        also += [self._asked(vlm, self.image, text) for text in self.also_question]
        also += [self._asked(vlm, None, text) for text in self.also_text]
        keep = [self._asked(vlm, path) for path in self.keep_image]
        keep += [self._asked(vlm, self.image, text) for text in self.keep_question]
        return EditRequest(
            prompt=self.prompt(vlm),
            target=self.target,
            contexts=tuple(self._asked(vlm, path) for path in self.context_image),
            also=tuple(also),
            keep=tuple(keep),
        )

    def _made(self, make: Callable[[VisionLanguageModel], EditRequest], vlm: VisionLanguageModel) -> EditRequest:
        """The request, with variants of its picture if there is one."""
        request = make(vlm)
        if not self.augment or not request.prompt.images:
            return request
        crops, jitters, shifts = ((self.augment + rest) // 3 for rest in (2, 1, 0))
        return Augmentation(crops=crops, jitters=jitters, shifts=shifts).of(request)

    def _from_file(self, traced: bool) -> tuple[AskedEdit, ...]:
        given = [name for name in _OF_ONE if getattr(self, name)]
        if given:
            flag = given[0].replace("_", "-")
            raise CommandError(f"--{flag} belongs to one request; with --data, write it into each line")
        entries = read_edit_records(self.data)
        corruptions = self._corruptions(entries) if traced else [None] * len(entries)
        return tuple(
            AskedEdit(make=partial(self._made, entry.request), corruption=corruption)
            for entry, corruption in zip(entries, corruptions, strict=True)
        )

    def _corruptions(self, entries: Sequence[EditEntry]) -> list[Corruption | None]:
        """What destroys each entry's picture or constraint; None for an entry that has none."""
        if self.corrupt == NEXT:
            return [swapped(entries, index) for index in range(len(entries))]
        # what is wrong with the option itself is found on an entry that has everything
        replace(self, image="any", constraint="any", data=None).corruption()
        found: list[Corruption | None] = []
        for entry in entries:
            image = None if entry.words.image is None else str(entry.words.image)
            try:
                found.append(replace(self, image=image, constraint=entry.words.constraint).corruption())
            except CommandError:
                found.append(None)
        if not any(found):
            raise CommandError(f"no record in {str(self.data)!r} has what --corrupt {self.corrupt} destroys")
        return found

    def _asked(self, vlm: VisionLanguageModel, image: str | None, question: str | None = None) -> Prompt:
        """Another picture or another question; its constraint is marked where the question says the same words."""
        text = self.question if question is None else question
        return vlm.prompt(image, text, constraint=self.constraint if _says(text, self.constraint) else None)


def swapped(entries: Sequence[EditEntry], index: int) -> SwapImage | None:
    """The picture of the next entry that has another one, with the same question if any; CommandError if none has.

    A picture of another kind of thing would destroy what kind it is, too, which the question's words tell early.
    """
    own = entries[index].words
    if own.image is None:
        return None
    others = [entry.words for entry in (*entries[index + 1 :], *entries[:index])]
    shown = [words for words in others if words.image not in (None, own.image)]
    if not shown:
        raise CommandError(
            "a trace under the next record's picture needs records with different pictures; all have "
            f"{str(own.image)!r}; add records, or name the place by --where LAYER:TOKEN"
        )
    return SwapImage(next((words for words in shown if words.question == own.question), shown[0]).image)


def _says(question: str, words: str | None) -> bool:
    try:
        return words is not None and bool(find_span(question, words))
    except ModelError:
        return False
