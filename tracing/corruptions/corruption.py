"""What every way to damage a prompt has in common: the damaged prompt, and which of its positions may be damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...models import Prompt, VisionLanguageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A prompt after the damage: as many tokens as before, perhaps several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the first decoder layer reads, up to and including the prompt's last token."""
    description: str
    """The damage in words, with what was really put in place."""
    seed: int | None = None
    scale: float | None = None
    """Of noise: its standard deviation in multiples of `deviation`, as used (calibrated if that was asked)."""
    deviation: float | None = None
    """Of noise: the standard deviation that `scale` multiplies."""
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """Where pictures were damaged, the model inputs of each sample without any answer; else empty."""


class Corruption(Protocol):
    """A way to destroy part of a prompt and keep its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """The damaged prompt; neither the model nor the prompt changes."""
