"""The layers above a change, run again and again for a batch of rows of different lengths, after one run below it.

`Replay` cannot do this exactly: its rows share one mask and one set of positions, where padded rows have their own, and
its merged attention rounds otherwise than the model's. `UpperLayers` attends through the model's own attention
function, so that logits and gradients are bit-identical to those of the whole model. How a layer was called, and
whether a run of single layers would repeat it, is observed by the same `Witness` for both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import ReplayError
from ..frame import DecoderInput
from ..hooks import main_tensor
from ..vlm import VisionLanguageModel
from .observe import LayerCall, Witness
from .replay import TOLERANCE
from .running import growing, of_rows

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedBatch:
    """The columns of a padded batch from one on, and the attention keys and values of all columns before it."""

    entering: DecoderInput
    """The columns, which also attend to the tokens before them; embeddings are zero where padded."""
    prefix: Cache
    """Keys and values (row, head, token, size) per layer of the tokens before."""

    @classmethod
    @torch.no_grad()
    def after_prefix(cls, vlm: VisionLanguageModel, entering: DecoderInput, start: int) -> PaddedBatch:
        """Run the columns of a padded batch before `start` and return the batch of the others."""
        prefix = _empty_cache(vlm)
        if start:
            vlm.forward(entering.part(0, start), positions=[start - 1], past_key_values=prefix)
        return cls(entering=entering.part(start, entering.length), prefix=prefix)

    def logits(self, vlm: VisionLanguageModel, columns: Tensor) -> Tensor:
        """Return the whole model's logits at columns (row, label), (row, label, vocab), float32 or wider."""
        return at_columns(vlm.forward(self.entering, past_key_values=growing(self.prefix)), columns)

    def rows(self, rows: Tensor) -> PaddedBatch:
        """Return the batch of only some rows, (row,) indices."""
        prefix = of_rows(self.prefix, rows)
        return replace(self, prefix=prefix, entering=self.entering.of_rows(rows.tolist()))


@dataclass(frozen=True, kw_only=True, eq=False)
class UpperLayers:
    """The layers from a given one on, as a run of a padded batch called them, ready to be rerun with gradients."""

    vlm: VisionLanguageModel
    batch: PaddedBatch
    columns: Tensor
    """(row, label), the columns whose logits are requested."""
    first: int
    """The first layer that is run again, from 0."""
    entering: Tensor | None = None
    """(row, column, hidden), the input of that layer; None if the whole model has to be run each time."""
    calls: tuple[LayerCall, ...] = ()
    """The recorded call of each layer from `first` on."""
    shared: MutableMapping[str, tuple[Tensor, ...]] | None = None
    """Keys and values of lower layers to which some of these layers attend (Gemma 4), by name; None for most models."""

    @property
    def between(self) -> Mapping[int, Tensor]:
        """What the text stack adds to the states (row, column, hidden) that enter a layer, by number from `first`."""
        added = self.batch.entering.frame.between_layers
        return {number - self.first: each for number, each in added.items() if number > self.first}

    @property
    def is_partial(self) -> bool:
        """True if the upper layers alone give the model's own logits; otherwise the whole model is run each time."""
        return self.entering is not None

    @classmethod
    @torch.no_grad()
    def record(
        cls, vlm: VisionLanguageModel, batch: PaddedBatch, columns: Tensor, *, first: int
    ) -> tuple[UpperLayers, Tensor]:
        """Run the model and return its layers from `first` on, and its own logits (row, label, vocab).

        Hooks around this call see every layer's states at the columns of the batch. Do not trust the layers before
        they are `checked`.

        Args:
            vlm: The model.
            batch: The batch to run.
            columns: (row, label), the columns whose logits are requested.
            first: The first layer that will be run again, from 0.
        """
        upper = cls(vlm=vlm, batch=batch, columns=columns, first=first)
        witness = Witness(vlm.decoder_layers[first:], between=upper.between, is_padded=True)
        try:
            with witness.watching():
                logits = batch.logits(vlm, columns)
        except ReplayError:
            return upper, batch.logits(vlm, columns)
        shared = witness.calls[0].shared
        return replace(upper, entering=witness.states[0], calls=tuple(witness.calls), shared=shared), logits

    @torch.no_grad()
    def checked(self, logits: Tensor, mask: Tensor) -> UpperLayers:
        """Return these layers if they reproduce the logits where the mask (row, label) is True, else the whole model.

        Layers that pass discard the keys and values of the layers below, which are no longer needed.
        """
        if not self.is_partial:
            return self
        real = mask.to(logits.device)
        difference = (self.logits() - logits)[real].abs().amax().item() if bool(real.any()) else 0.0
        coarseness = max(1.0, torch.finfo(self.vlm.dtype).eps * 1e4)  # of half precision, beside float32
        if not difference <= TOLERANCE * coarseness * max(1.0, logits.abs().max().item()):
            return replace(self, entering=None, calls=())
        prefix = growing(self.batch.prefix)
        for layer in cast(list[Any], prefix.layers)[: self.first]:
            keys = getattr(layer, "keys", None)  # a thin part still says of how many tokens they are (MPT asks)
            thin = keys[:, :1, :, :1].clone() if isinstance(keys, Tensor) and keys.ndim == 4 else None
            layer.keys = layer.values = thin
        return replace(self, batch=replace(self.batch, prefix=prefix))

    def logits(self) -> Tensor:
        """Return logits (row, label, vocab), float32 or wider, under all patches on the upper layers."""
        if self.entering is None:
            return self.batch.logits(self.vlm, self.columns)
        cache, states, between = growing(self.batch.prefix), self.entering, self.between
        shared = copy.copy(self.shared)
        for number, (layer, call) in enumerate(zip(self.vlm.decoder_layers[self.first :], self.calls, strict=True)):
            states = states + between[number].to(states) if number in between else states
            states = main_tensor(layer(states, **call.using(cache, shared)), "a decoder layer")
        return self.vlm.readout(self.vlm.final_norm(at_columns(states, self.columns)))

    def rows(self, rows: Tensor) -> UpperLayers:
        """Return the layers for only some rows, (row,) indices in ascending order."""
        smaller = replace(self, batch=self.batch.rows(rows), columns=self.columns[rows.to(self.columns.device)])
        if self.entering is None:
            return smaller
        rows = rows.to(self.entering.device)
        calls = tuple(call.rows(rows, len(self.entering)) for call in self.calls)
        shared = copy.copy(self.shared)
        for name, pair in (shared or {}).items():
            cast(MutableMapping[str, tuple[Tensor, ...]], shared)[name] = tuple(
                part[rows.to(part.device)] for part in pair
            )
        return replace(smaller, entering=self.entering[rows], calls=calls, shared=shared)


def at_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Return the entries (row, column, ...) of states (row, token, ...) at columns (row, column) of each row."""
    columns = columns.to(states.device)
    return states[torch.arange(len(columns), device=states.device)[:, None], columns]


def _empty_cache(vlm: VisionLanguageModel) -> Cache:
    """Return a cache that keeps the keys of all tokens, those behind a sliding window included.

    A mask of pairs hides those keys; a cache that drops them would no longer fit it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=vlm.config.get_text_config(decoder=True))
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    return cache
