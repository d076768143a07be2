"""Whom multrace flow asks what: one question of the command line, or many of a file or of the embedded world."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..models.images import open_images
from ..tracing import Box
from .errors import CommandError
from .flow_questions import FlowQuestion, read_questions, world_questions
from .options import ModelOptions, option

OF_ONE = ("image", "constraint", "answer", "foil", "box")
OF_MANY = ("images", "limit", "degrade", "all")


def _box(text: str) -> Box:
    """A rectangle of the picture."""
    edges = [int(each) for each in text.split(",") if each.strip().isdecimal()]
    if len(edges) != 4 or text.count(",") != 3:
        raise argparse.ArgumentTypeError(f"{text!r}: write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,50,50")
    return Box(*edges)


@dataclass(frozen=True, kw_only=True)
class AskingOptions(ModelOptions):
    """Which model is asked what."""

    question: str | None = option("what to ask", default=None)
    image: Path | None = option("picture in front of the question", default=None, type=Path)
    constraint: str | None = option("the words of the question that name its subject", default=None, metavar="WORDS")
    answer: str | None = option("the right answer, if it is known", default=None)
    foil: str | None = option("a wrong answer that the lens follows too", default=None, metavar="ANSWER")
    box: tuple[Box, ...] | None = option(
        "where the object asked about is, in pixels of the picture; once for each rectangle",
        default=None,
        action="append",
        type=_box,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
    )
    records: Path | None = option(
        "ask every question of a file: a JSON object per line with question and, as needed, id, image, constraint, "
        "answer, boxes, object, true_option, false_option; or GQA subsets of arXiv 2411.18620, a CSV or a folder",
        default=None,
        type=Path,
        metavar="FILE_OR_FOLDER",
    )
    images: Path | None = option("folder of the records' pictures", default=None, type=Path, metavar="FOLDER")
    limit: int | None = option("only the first records", default=None, type=int, metavar="N")
    world: int | None = option(
        "ask N questions of the world that the embedded model was made for, with pictures that training never showed "
        "(for that model and edited copies of it)",
        default=None,
        type=int,
        metavar="N",
    )
    degrade: bool = option(
        "with --contributions: damage all pictures with noise until a third of the answers is wrong, so that there is "
        "failure to predict",
        default=False,
        action="store_true",
    )
    all: bool = option("do not leave out questions that the model answers wrongly", default=False, action="store_true")
    seed: int = option("of the noise, and of the world's order (default 0)", default=0, type=int)

    @property
    def is_one(self) -> bool:
        """Whether a single question is asked."""
        return self.question is not None

    def one_question(self) -> FlowQuestion:
        """The question of the command line. ModelError or CommandError if it cannot be asked."""
        if not self.question.strip():
            raise CommandError("the question is empty; pass what the model should answer")
        question = FlowQuestion(
            id="question",
            question=self.question,
            image=self.image,
            spans={} if self.constraint is None else {"constraint": self.constraint},
            boxes=self.box or (),
            gold=self.answer,
            foil=self.foil,
        )
        check_question(question)
        return question

    def many_questions(self) -> tuple[tuple[FlowQuestion, ...], tuple[str, ...]]:
        """The questions of a file or of the world, and what is wrong with lines that were left out."""
        if self.world is not None:
            return world_questions(self.world, seed=self.seed), ()
        questions, problems = read_questions(self.records, images=self.images)
        return questions[: self.limit], problems


def check_question(question: FlowQuestion) -> None:
    """ModelError or CommandError for a picture, words or boxes that cannot be used; found before a model is opened."""
    question.check()
    for box in question.boxes:
        pictures = open_images(question.image)
        if not pictures:
            raise CommandError(f"{box.label} is of no picture; pass --image, or 'image' in the record")
        width, height = pictures[0].size
        if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
            raise CommandError(
                f"{box.label} is empty or leaves the picture of {width} x {height} pixels; "
                f"write 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
            )
