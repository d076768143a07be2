"""The layers from the edited one up, run again and again on the columns from the first edited token on.

Layers below the edit and columns before it cannot change while a value is searched for: their work is done once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..models import VisionLanguageModel
from ..models.hooks import main_keyword, main_tensor
from .targets import TargetBatch, reusable, wide

_TOLERANCE = 1e-3  # in logits; a wrong head or a lost scale is off by far more, another summation order by far less


@dataclass(frozen=True, kw_only=True, eq=False)
class Suffix:
    """One recorded run of a batch, from which its upper layers can be run again; gradients go right through."""

    vlm: VisionLanguageModel
    batch: TargetBatch
    first: int
    """The first layer that is run again, from 0."""
    entering: Tensor
    """(row, column, hidden), what that layer reads."""
    calls: tuple[Call, ...]
    """What each layer from `first` on is given beside its states."""
    is_partial: bool
    """The upper layers alone give the model's own logits; otherwise the whole model is run each time."""

    def logits(self) -> Tensor:
        """(row, label, vocab), float32 or wider, under whatever patches are on the upper layers."""
        if not self.is_partial:
            return self.batch.logits(self.vlm)
        cache, states = reusable(self.batch.prefix), self.entering
        for layer, call in zip(self.vlm.decoder_layers[self.first :], self.calls, strict=True):
            states = main_tensor(call.on(layer, states, cache), "a decoder layer")
        states = self.batch.at(states, self.batch.label_columns)
        return wide(self.vlm.unembed(self.vlm.final_norm(states)))

    def of(self, rows: Tensor) -> Suffix:
        """The same for only some rows, (row,) indices in ascending order."""
        rows = rows.to(self.entering.device)
        calls = tuple(call.of(rows, len(self.entering)) for call in self.calls)
        return replace(self, batch=_batch_of(self.batch, rows), entering=self.entering[rows], calls=calls)


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a decoder layer was called."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def on(self, layer: nn.Module, states: Tensor, cache: Cache) -> Any:
        """The layer's output for these states, with this cache to read and to grow."""

        def current(value: Any) -> Any:
            return cache if isinstance(value, Cache) else value

        arguments = [current(value) for value in self.arguments]
        keywords = {name: current(value) for name, value in self.keywords.items()}
        if arguments:
            arguments[0] = states
        else:
            keywords[main_keyword(keywords, "a decoder layer")] = states
        return layer(*arguments, **keywords)

    def of(self, rows: Tensor, count: int) -> Call:
        """The call for only some of its `count` rows."""
        picked = {name: _rows_of(value, rows, count) for name, value in self.keywords.items()}
        return Call(arguments=tuple(_rows_of(value, rows, count) for value in self.arguments), keywords=picked)


@torch.no_grad()
def record(vlm: VisionLanguageModel, batch: TargetBatch, *, first: int) -> tuple[Suffix, Tensor]:
    """The suffix of a batch from layer `first` on, and the model's own logits (row, label, vocab).

    Hooks of `models.capture` around this call see every layer once, at the columns from `start` on, before the check
    that running the upper layers alone gives the same logits runs them a second time.
    """
    calls: list[Call] = []
    entering: list[Tensor] = []

    def note(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not calls:
            entering.append(arguments[0] if arguments else keywords[main_keyword(keywords, "a decoder layer")])
        calls.append(Call(arguments=arguments, keywords=dict(keywords)))

    with ExitStack() as stack:
        for layer in vlm.decoder_layers[first:]:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        logits = batch.logits(vlm)
    suffix = Suffix(
        vlm=vlm,
        batch=batch,
        first=first,
        entering=entering[0],
        calls=tuple(calls),
        is_partial=len(calls) == vlm.layers - first,
    )
    return suffix, logits


@torch.no_grad()
def faithful(suffix: Suffix, logits: Tensor) -> Suffix:
    """The suffix, set to run the whole model if its upper layers alone do not give these logits.

    Where they do, the prefix forgets the layers below, which nothing reads any more.
    """
    if not suffix.is_partial:
        return suffix
    real = suffix.batch.label_mask.to(logits.device)
    apart = (suffix.logits() - logits)[real].abs().amax().item() if bool(real.any()) else 0.0
    coarseness = max(1.0, torch.finfo(suffix.vlm.dtype).eps * 1e4)  # of half precision, beside float32
    if not apart <= _TOLERANCE * coarseness * max(1.0, logits.abs().max().item()):
        return replace(suffix, is_partial=False)
    return replace(suffix, batch=replace(suffix.batch, prefix=_without(suffix.batch.prefix, suffix.first)))


def _without(cache: Cache, first: int) -> Cache:
    """The cache with the layers below `first` emptied, which frees their memory."""
    slim = reusable(cache)
    for layer in slim.layers[:first]:
        layer.keys = layer.values = None
    return slim


def _cache_of(cache: Cache, rows: Tensor) -> Cache:
    picked = reusable(cache)
    for layer in picked.layers:
        if layer.keys is not None and layer.keys.numel():
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return picked


def _batch_of(batch: TargetBatch, rows: Tensor) -> TargetBatch:
    def pick(value: Tensor) -> Tensor:
        return value[rows.to(value.device)]

    names = ("embeddings", "attention_mask", "position_ids", "goals", "essence")
    names += ("key_columns", "key_mask", "label_columns", "labels", "label_mask")
    picked = {name: pick(getattr(batch, name)) for name in names}
    return replace(batch, prefix=_cache_of(batch.prefix, rows), **picked)


def _rows_of(value: Any, rows: Tensor, count: int) -> Any:
    """The part of an argument that belongs to some rows; what has no row of its own is left as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and len(value) == count and count > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(each, rows, count) for each in value)
    return value
