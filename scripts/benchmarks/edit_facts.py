"""Facts to be edited into a model of random weights: each has a picture, a question and an answer of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from ...editing.values import Goal
from ...models import Prompt
from .shapes import prompt_words
from .subjects import Subject

_TARGET_WORDS = 2
"""An answer of several tokens, as most are."""


def make_goals(subject: Subject, count: int) -> tuple[Goal, ...]:
    """So many facts, one prompt each, whose answers have two tokens; all prompts are as long as the shape says."""
    shape = subject.recipe.shape
    longer = replace(shape, after=shape.after + _TARGET_WORDS)
    goals = []
    for index in range(count):
        seed = subject.recipe.seed + 1 + index
        before, words = prompt_words(longer, seed=seed)
        question, target = words[: shape.after], words[shape.after :]
        prompt = subject.vlm.prompt(
            _noise(shape.image, seed),
            " ".join(question),
            constraint=" ".join(question[: shape.constraint]),
            answer=" ".join(target),
            template=" ".join([*before, "{image}", "{question}"]),
        )
        goals.append(Goal(prompts=(prompt,)))
    return tuple(goals)


def make_prompts(subject: Subject, count: int) -> Sequence[Prompt]:
    """The prompts of so many facts, without their answers."""
    return [goal.prompts[0].with_answer(None) for goal in make_goals(subject, count)]


def _noise(side: int, seed: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
