"""Run `multrace answer`."""

from contextlib import nullcontext

from ..editing import Delta
from ..models import VisionLanguageModel
from .options.answer import Answer


def run(settings: Answer) -> int:
    """Print the answer and, with --score, a probability."""
    settings.check_question()
    delta = None if settings.edit is None else Delta.load(settings.edit)
    vlm = settings.open_model()
    with nullcontext() if delta is None else delta.applied(vlm):
        lines = _lines(vlm, settings)
    print(*lines, sep="\n")
    return 0


def _lines(vlm: VisionLanguageModel, settings: Answer) -> list[str]:
    lines = [vlm.answers([settings.prompt(vlm)], max_new_tokens=settings.max_new_tokens)[0]]
    if settings.score is not None:
        score = vlm.score(settings.image, settings.question, settings.score)
        lines.append(
            f"probability of {settings.score!r}: {score.probability:.4g} (log-probability {score.log_probability:.3f})"
        )
    return lines
