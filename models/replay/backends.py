"""Attention functions of our own in place of a text model's, for the length of a `with`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import ReplayError
from ..vlm import VisionLanguageModel


@contextmanager
def attention_function(vlm: VisionLanguageModel, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """A block in which the text model attends through this function; afterwards, also after errors, as before.

    attend: called as transformers calls its own (module, query, key, value, mask, scaling=..., dropout=..., ...), with
    boolean masks or None. ReplayError if the text model does not let its attention function be replaced.
    """
    decoder = vlm.decoder
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ReplayError(f"{type(decoder).__name__} does not let its attention function be replaced")
    name = f"multrace_{id(attend)}"
    with vlm.running():
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)  # without one of this name, transformers makes no masks at all
        before, decoder.config._attn_implementation = decoder.config._attn_implementation, name
        try:
            yield
        finally:
            decoder.config._attn_implementation = before
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)
