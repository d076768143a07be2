"""The noise that a question needs: the smallest of a ladder of scales that halves the answer's probability."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError
from .corruption import Corrupted, Corruption
from .noise import Noise

LADDER = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0)
"""Scales that calibration tries, in standard deviations."""


def calibrate(
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, score: Callable[[Tensor], float]
) -> Corrupted:
    """The prompt under the smallest scale of `LADDER` whose score is at most half of the clean one.

    score: the answer's mean probability for embeddings (sample, token, hidden). If no scale suffices, the one with the
    lowest score. The same random numbers are scaled at every step. A corruption that has its scale, or that knows none,
    is applied as it is and never scored. TraceError where a score is not a number.
    """
    if not isinstance(corruption, Noise) or corruption.scale is not None:
        return corruption.corrupt(vlm, prompt)
    half = _finite(score(vlm.embed(prompt)), "the clean prompt") / 2
    noised = corruption.draw(vlm, prompt)
    lowest, best = math.inf, None
    for scale in LADDER:
        corrupted = noised(scale)
        found = _finite(score(corrupted.embeddings), f"noise of scale {scale:g}")
        if found <= half:
            return _described(corrupted, "calibrated")
        if found < lowest:
            lowest, best = found, corrupted
    return _described(best, "calibrated (no scale tried halves the score)")


def _described(corrupted: Corrupted, found: str) -> Corrupted:
    return replace(corrupted, description=f"{corrupted.description}, {found}")


def _finite(score: float, what: str) -> float:
    """The score as a number."""
    if not math.isfinite(score):
        raise TraceError(
            f"the score of {what} is {score}, so no noise can be calibrated by it; load the model with dtype='float32' "
            "or pass a scale"
        )
    return float(score)
