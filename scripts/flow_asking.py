"""The questions that `multrace flow` asks: one of the command line, or many of a file or of the embedded world."""

from ..models import open_images
from .errors import CommandError
from .flow_questions import FlowQuestion, read_questions, world_questions
from .options.flow import FlowOptions


def one_question(settings: FlowOptions) -> FlowQuestion:
    """Return the question of the command line. Raises `ModelError` or `CommandError` if it cannot be asked."""
    if not (settings.question or "").strip():
        raise CommandError("the question is empty; pass what the model should answer")
    question = FlowQuestion(
        id="question",
        question=settings.question,
        image=settings.image,
        spans={} if settings.constraint is None else {"constraint": settings.constraint},
        boxes=settings.box or (),
        gold=settings.answer,
        foil=settings.foil,
    )
    check_question(question)
    return question


def many_questions(settings: FlowOptions) -> tuple[tuple[FlowQuestion, ...], tuple[str, ...]]:
    """Return the questions of a file or of the world, and what is wrong with lines that were left out."""
    if settings.world:
        return world_questions(settings.limit, seed=settings.seed), ()
    questions, problems = read_questions(settings.data, images=settings.images)
    return questions[: settings.limit], problems


def check_question(question: FlowQuestion) -> None:
    """Raises `ModelError` or `CommandError` for a picture, words or boxes that cannot be used; needs no model."""
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
