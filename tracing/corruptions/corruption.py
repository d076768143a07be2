"""What every way to damage a prompt has in common: the damaged prompt, and which of its positions may be damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError


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


def embed(vlm: VisionLanguageModel, prompt: Prompt, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """(1, token, hidden): what the first decoder layer reads for these inputs (default: the prompt's own).

    Ends with the prompt's last token: an answer after it cannot act on the score, since attention is causal.
    """
    with torch.no_grad():
        return vlm.embeddings(dict(inputs or prompt.inputs))[:, : prompt.groups["last"][0] + 1]


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Positions of a group that must hold something, and nothing of the answer. TraceError lists the groups."""
    positions = prompt.groups.get(group, ())
    if not positions:
        found = ", ".join(name for name, members in prompt.groups.items() if members)
        hints = {"image": "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {found}{hint}")
    last = prompt.groups["last"][0]
    if max(positions) > last:
        raise TraceError(
            f"group {group!r} reaches beyond the prompt's last token (position {last}) into the answer; "
            "ask for a group of the prompt"
        )
    return positions
