"""One call of one decoder layer in a replay: how its attention is done, and what calls have cost so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .attention import Segment


@dataclass
class Work:
    """What the decoder layers had to do; the counts grow with every call."""

    token_layers: int = 0
    """Tokens whose output of one decoder layer was computed."""
    key_value_tokens: int = 0
    """Tokens of which one layer computed keys and values only."""
    pairs: int = 0
    """Query-key pairs of attention in one layer, in each of its heads."""
    read_tokens: int = 0
    """Tokens that went through the output head."""


def causal(keys: Tensor, values: Tensor) -> tuple[Segment]:
    """Keys and values of the queries themselves, each of which sees those up to its own."""
    return (Segment(keys=keys, values=values, causal=True),)


@dataclass(kw_only=True, eq=False)
class Job:
    """How attention is done in one call of one decoder layer."""

    segments: Sequence[Segment] = ()
    """Keys and values from elsewhere."""
    own: Callable[[Tensor, Tensor], Sequence[Segment]] = causal
    """The keys and values computed in this call as segments: how its queries see them."""
    given: tuple[Tensor, Tensor] | None = None
    """Keys and values to use instead of the call's own."""
    is_stopped: bool = False
    """End the forward pass once keys and values are known."""
    found: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    """Keys and values that the call computed."""
