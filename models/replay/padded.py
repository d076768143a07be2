"""Batches of rows of different lengths: the part before a change runs once, the layers above it run repeatedly.

`Replay` cannot do this exactly: its rows share one mask and one set of positions, where padded rows have their own, and
its merged attention rounds otherwise than the model's. Here the layers attend through the model's own attention
function, so that logits and gradients are bit-identical to those of the whole model. How a layer was called, and
whether a run of single layers would repeat it, is observed by the same `Witness` for both.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..errors import ReplayError
from ..vlm import VisionLanguageModel
from .witness import LayerCall, Witness

_TOLERANCE = 1e-3  # in logits; a wrong head or a lost scale is off by far more, another summation order by far less


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedBatch:
    """The columns of a padded batch from one on, and the attention keys and values of all columns before it."""

    embeddings: Tensor
    """(row, column, hidden), zeros where padded."""
    attention_mask: Tensor
    """(row, token), 0 where padded; the columns of the prefix come first."""
    position_ids: Tensor
    """(row, column)"""
    prefix: Cache
    """Keys and values (row, head, token, size) per layer of the tokens before."""

    @classmethod
    @torch.no_grad()
    def after_prefix(cls, vlm: VisionLanguageModel, embeddings: Tensor, mask: Tensor, start: int) -> "PaddedBatch":
        """Run the columns before `start` and return the batch of the others.

        embeddings: (row, token, hidden), zeros where padded; mask: (row, token), 0 where padded.
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        prefix = DynamicCache(config=vlm.config.get_text_config(decoder=True))
        if start:
            vlm.forward(
                inputs_embeds=embeddings[:, :start],
                attention_mask=mask[:, :start],
                position_ids=positions[:, :start],
                positions=[start - 1],
                past_key_values=prefix,
            )
        return cls(
            embeddings=embeddings[:, start:], attention_mask=mask, position_ids=positions[:, start:], prefix=prefix
        )

    def logits(self, vlm: VisionLanguageModel, columns: Tensor) -> Tensor:
        """Return the whole model's logits at columns (row, label), (row, label, vocab), float32 or wider."""
        logits = vlm.forward(
            inputs_embeds=self.embeddings,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=_growing(self.prefix),
        )
        return at_columns(logits, columns)

    def rows(self, rows: Tensor) -> "PaddedBatch":
        """Return the batch of only some rows, (row,) indices."""
        prefix = _growing(self.prefix)
        for layer in cast(list[Any], prefix.layers):
            if layer.keys is not None and layer.keys.numel():
                layer.keys, layer.values = (value[rows.to(value.device)] for value in (layer.keys, layer.values))
        parts = {name: getattr(self, name) for name in ("embeddings", "attention_mask", "position_ids")}
        return replace(self, prefix=prefix, **{name: part[rows.to(part.device)] for name, part in parts.items()})


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

    @property
    def is_partial(self) -> bool:
        """True if the upper layers alone give the model's own logits; otherwise the whole model is run each time."""
        return self.entering is not None

    @classmethod
    @torch.no_grad()
    def record(
        cls, vlm: VisionLanguageModel, batch: PaddedBatch, columns: Tensor, *, first: int
    ) -> tuple["UpperLayers", Tensor]:
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
        witness = Witness(vlm.decoder_layers[first:], is_padded=True)
        try:
            with witness.watching():
                logits = batch.logits(vlm, columns)
        except ReplayError:
            return upper, batch.logits(vlm, columns)
        return replace(upper, entering=witness.states[0], calls=tuple(witness.calls)), logits

    @torch.no_grad()
    def checked(self, logits: Tensor, mask: Tensor) -> "UpperLayers":
        """Return these layers if they reproduce the logits where the mask (row, label) is True, else the whole model.

        Layers that pass discard the keys and values of the layers below, which are no longer needed.
        """
        if not self.is_partial:
            return self
        real = mask.to(logits.device)
        difference = (self.logits() - logits)[real].abs().amax().item() if bool(real.any()) else 0.0
        coarseness = max(1.0, torch.finfo(self.vlm.dtype).eps * 1e4)  # of half precision, beside float32
        if not difference <= _TOLERANCE * coarseness * max(1.0, logits.abs().max().item()):
            return replace(self, entering=None, calls=())
        prefix = _growing(self.batch.prefix)
        for layer in cast(list[Any], prefix.layers)[: self.first]:
            layer.keys = layer.values = None
        return replace(self, batch=replace(self.batch, prefix=prefix))

    def logits(self) -> Tensor:
        """Return logits (row, label, vocab), float32 or wider, under all patches on the upper layers."""
        if self.entering is None:
            return self.batch.logits(self.vlm, self.columns)
        cache, states = _growing(self.batch.prefix), self.entering
        for layer, call in zip(self.vlm.decoder_layers[self.first :], self.calls, strict=True):
            states = call.again(layer, states, cache)
        logits = self.vlm.unembed(self.vlm.final_norm(at_columns(states, self.columns)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def rows(self, rows: Tensor) -> "UpperLayers":
        """Return the layers for only some rows, (row,) indices in ascending order."""
        smaller = replace(self, batch=self.batch.rows(rows), columns=self.columns[rows.to(self.columns.device)])
        if self.entering is None:
            return smaller
        rows = rows.to(self.entering.device)
        calls = tuple(call.rows(rows, len(self.entering)) for call in self.calls)
        return replace(smaller, entering=self.entering[rows], calls=calls)


def at_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Return the entries (row, column, ...) of states (row, token, ...) at columns (row, column) of each row."""
    columns = columns.to(states.device)
    return states[torch.arange(len(columns), device=states.device)[:, None], columns]


def _growing(cache: Cache) -> Cache:
    """Return a copy that can grow while the given cache does not; tensors are shared, since growing replaces them."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh
