"""A damaged prompt, and the protocol of everything that damages one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...models import Prompt, VisionLanguageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A prompt after the damage: with as many tokens as before, perhaps in several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the first decoder layer reads, up to and including the prompt's last token."""
    description: str
    """The damage in words, with what was put in place."""
    seed: int | None = None
    """Random seed of noise."""
    scale: float | None = None
    """Standard deviation of noise in multiples of `deviation`; the calibrated one if it was calibrated."""
    deviation: float | None = None
    """The standard deviation that `scale` multiplies."""
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """Model inputs of each sample without any answer, if pictures were damaged; else empty."""


class Corruption(Protocol):
    """A way to destroy part of a prompt and keep its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return the damaged prompt; neither the model nor the prompt changes."""
