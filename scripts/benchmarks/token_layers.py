"""Token-layers that were really computed, counted by hooks on the decoder layers, forward and backward apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...models import VisionLanguageModel
from ...models.hooks import main_keyword, main_tensor

_LAYER = "a decoder layer"


@dataclass(eq=False)
class TokenLayers:
    """Tokens times decoder layers; the tokens of all rows of a batch count, padded ones too."""

    forward: int = 0
    """Of layers that were entered, also if the pass ended inside one of them."""
    backward: int = 0
    """Of layers that a gradient came back to; one that ends inside a layer counts as a whole one."""

    @property
    def total(self) -> int:
        """Both. With frozen weights a layer's backward pass has as many products as its forward pass."""
        return self.forward + self.backward


@contextmanager
def counted_token_layers(vlm: VisionLanguageModel) -> Iterator[TokenLayers]:
    """What the model's decoder layers compute in the block, however they are called."""
    count = TokenLayers()

    def enter(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        count.forward += _tokens(arguments[0] if arguments else keywords[main_keyword(keywords, _LAYER)])

    def leave(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        states = main_tensor(output, _LAYER)
        if states.requires_grad:
            states.register_hook(come_back)

    def come_back(gradient: Tensor) -> None:
        count.backward += _tokens(gradient)

    with ExitStack() as stack:
        for layer in vlm.decoder_layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        yield count


def _tokens(states: Tensor) -> int:
    return states.shape[0] * states.shape[1]
