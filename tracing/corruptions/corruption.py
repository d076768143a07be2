"""A corrupted prompt, and the protocol of all corruptions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...models import Prompt, VisionLanguageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A corrupted prompt, which has as many tokens as before and may have several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the first decoder layer reads, up to and including the prompt's last token."""
    description: str
    """The corruption in words, including the replacement."""
    seed: int | None = None
    """Random seed of noise; None if the corruption is not random."""
    scale: float | None = None
    """Standard deviation of noise in multiples of `deviation`, after any calibration."""
    deviation: float | None = None
    """The standard deviation that `scale` multiplies."""
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """Model inputs of each sample without any answer if pictures were corrupted; else empty."""


class Corruption(Protocol):
    """A method that destroys part of a prompt and keeps its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """Return the corrupted prompt; neither the model nor the prompt changes."""
