"""One question about a picture, with the spans that select its answer, and one with the objects it is about."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from PIL import Image

from .errors import DataError

PixelBox = tuple[int, int, int, int]
"""Left, top, right and bottom of a rectangle in pixels of the original picture; right and bottom are excluded."""


@dataclass(frozen=True, kw_only=True)
class VQARecord:
    """A question, its answer and its constraint spans (Basu et al., arXiv 2406.04236, section 3).

    DataError if a text is empty or a constraint is not part of the question.
    """

    id: str
    question: str
    answer: str
    constraint: str | None = None
    """The span that points at something: in the picture (visual constraint) or, by name, in the world."""
    text_constraint: str | None = None
    """The span with the extra condition of a two-constraint question."""
    replacement: str | None = None
    """A phrase that names something else of the kind, to take the constraint's place in text corruption."""
    image: Image.Image | Path | None = None

    def __post_init__(self) -> None:
        for field in ("question", "answer"):
            if not getattr(self, field).strip():
                raise DataError(f"record {self.id!r} has an empty {field}; give it one or drop the record")
        for field in ("constraint", "text_constraint"):
            span = getattr(self, field)
            if span is not None and (not span.strip() or _plain(span) not in _plain(self.question)):
                raise DataError(
                    f"record {self.id!r}: the {field} {span!r} does not occur in the question {self.question!r}"
                )
        if self.replacement is not None and self.constraint is None:
            raise DataError(f"record {self.id!r} has a replacement {self.replacement!r} but no constraint to replace")

    @property
    def constraints(self) -> dict[str, str]:
        """The spans by name: "visual" for the constraint and "text" for the textual one, where there are any."""
        spans = {"visual": self.constraint, "text": self.text_constraint}
        return {name: span for name, span in spans.items() if span is not None}

    def with_image(self, image: Image.Image | Path | None) -> Self:
        """The same question in front of another picture."""
        return replace(self, image=image)

    def with_answer(self, answer: str) -> Self:
        """The same question with another answer."""
        return replace(self, answer=answer)


@dataclass(frozen=True, kw_only=True)
class FlowRecord(VQARecord):
    """A question about objects whose boxes in the picture are known (Zhang et al., arXiv 2411.18620, on GQA).

    DataError, besides a `VQARecord`'s, if an object's words do not stand in the question or a box leaves the picture.
    """

    task: str
    """ChooseAttr, ChooseCat, ChooseRel, CompareAttr, LogicalObj or QueryAttr."""
    true_option: str | None = None
    """The right one of two offered answers, as annotated: the question may word it differently."""
    false_option: str | None = None
    objects: tuple[str | None, ...] = ()
    """For each object that the question is about, its name as it stands in the question; None if it says another word,
    such as the plural."""
    boxes: tuple[PixelBox, ...] = ()
    """Where these objects are, in the same order; one that is not in the picture has no box."""
    image_size: tuple[int, int] | None = None
    """Width and height of the picture, in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for words in self.objects:
            if words is not None and not occurrences(self.question, words):
                raise DataError(
                    f"record {self.id!r}: the object {words!r} does not stand in the question {self.question!r}"
                )
        for box in self.boxes:
            self._check_box(box)

    @property
    def spans(self) -> dict[str, str]:
        """Words of the question by name, ready for `vlm.prompt(..., constraint=...)`, the object first.

        "object" is the first object, "object2" the second, "true_option" and "false_option" the offered answers, each
        as the question writes it. Left out is what the question does not say as whole words (case ignored), and what it
        says more than once: "the picture" may be an object in the picture or the picture itself.
        """
        names = {f"object{number}" if number > 1 else "object": words for number, words in enumerate(self.objects, 1)}
        names |= {"true_option": self.true_option, "false_option": self.false_option}
        found = {name: occurrences(self.question, words) for name, words in names.items() if words}
        return {name: places[0] for name, places in found.items() if len(places) == 1}

    def _check_box(self, box: PixelBox) -> None:
        left, top, right, bottom = box
        width, height = self.image_size or (right, bottom)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(
                f"record {self.id!r}: the box {box} is empty or leaves the picture of {width} x {height} pixels; "
                f"give 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
            )


def occurrences(question: str, words: str) -> list[str]:
    """Every place where the question says these words, as it writes them: whole words, any case, any blanks between."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    return re.findall(rf"(?<!\w){pattern}(?!\w)", question, re.IGNORECASE) if pattern else []


def _plain(text: str) -> str:
    """The text without case, with one form of accents and one blank for each run of blanks."""
    return " ".join(unicodedata.normalize("NFKD", text).casefold().split())
