"""Noise on pictures until a model answers a share of its questions wrongly, so that there is failure to predict."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ..models import VisionLanguageModel, open_images
from ..tracing.engine.scoring import same_answer
from .errors import CommandError
from .flow_questions import FlowQuestion

_STEPS = 7
_STRONGEST = 256.0
"""Grey levels of noise at which nothing of a picture is visible."""
_ENOUGH = 0.02
"""How close the share of errors has to be to the requested one."""


def degraded_questions(
    vlm: VisionLanguageModel,
    questions: Sequence[FlowQuestion],
    *,
    share: float = 1 / 3,
    seed: int = 0,
    progress: bool = True,
) -> tuple[tuple[FlowQuestion, ...], str]:
    """The questions with noise on their pictures, so strong that this share of the answers is wrong; and that in words.

    Gaussian noise on every pixel; its deviation is one number, found by bisection, times a factor of each question's
    own between a half and one and a half, so that some pictures suffer more than others. CommandError for questions
    without picture or right answer, and if too many are answered wrongly without any noise.
    """
    if any(each.gold is None or each.image is None for each in questions):
        raise CommandError("only questions with a picture and a right answer can be made harder; leave out --degrade")
    low, high = 0.0, _STRONGEST
    undamaged = _errors(vlm, questions, progress)
    if undamaged > share:
        raise CommandError(
            f"the model errs on {undamaged:.0%} of these questions as they are; leave out --degrade, failures are there"
        )
    for _ in range(_STEPS):
        strength = (low + high) / 2
        damaged = tuple(_noisy(each, strength, seed) for each in questions)
        wrong = _errors(vlm, damaged, progress)
        if abs(wrong - share) <= _ENOUGH:
            break
        low, high = (strength, high) if wrong < share else (low, strength)
    words = f"noise of {strength:.0f} grey levels on average: {wrong:.0%} of {len(damaged)} answers are wrong"
    return damaged, f"{words} ({undamaged:.0%} without)"


def _noisy(question: FlowQuestion, strength: float, seed: int) -> FlowQuestion:
    """The question with noise on its picture; the noise is the same at every strength, only scaled."""
    (image,) = open_images(question.image)
    own = random.Random(f"noise {seed} {question.id}")
    noise = np.random.default_rng(own.randrange(2**32)).standard_normal((*image.size[::-1], 3), dtype=np.float32)
    pixels = np.asarray(image, np.float32) + strength * own.uniform(0.5, 1.5) * noise
    return replace(question, image=Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def _errors(vlm: VisionLanguageModel, questions: Sequence[FlowQuestion], progress: bool) -> float:
    """The share of wrong answers."""
    answers = vlm.answers([each.prompt(vlm) for each in questions], progress=progress)
    right = [same_answer(answer, each.gold) for answer, each in zip(answers, questions, strict=True)]
    return 1 - sum(right) / len(right)
