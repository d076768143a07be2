"""How fast this machine multiplies matrices, and what a model's layers cost in floating-point operations."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from ...models import Projection, Site, VisionLanguageModel
from ...models.replay.replay import Work

_ROWS = 4096
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Floating-point operations of one decoder layer (the first), of its keys and values, and of the output head."""

    token: float
    """Per token, its linear maps; attention is counted apart."""
    key_values: float
    """Per token of which only keys and values are computed."""
    pair: float
    """Per query-key pair, over all heads: scores and weighted values."""
    read: float
    """Per token that goes through the output head."""


def layer_cost(vlm: VisionLanguageModel) -> LayerCost:
    """Two operations per weight and token."""
    layer = vlm.module(Site("hidden", 0))
    attention = vlm.module(Site("attention", 0))
    written = vlm.attention_projection(0)
    mixed = sum(each.weight.numel() for each in attention.modules() if isinstance(each, nn.Linear))
    return LayerCost(
        token=2.0 * sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear)),
        key_values=2.0 * (mixed - written.weight.numel() - written.width * written.hidden),
        pair=4.0 * written.width,
        read=2.0 * vlm.output_head.weight.numel(),
    )


def counted_flops(vlm: VisionLanguageModel, work: Work) -> float:
    """Floating-point operations of what was counted: linear maps, attention and output head."""
    cost = layer_cost(vlm)
    return (
        cost.token * work.token_layers
        + cost.key_values * work.key_value_tokens
        + cost.pair * work.pairs
        + cost.read * work.read_tokens
    )


def matrix_rate(projection: Projection) -> float:
    """Operations per second of a linear map like this one (shape, dtype, device), on 4096 rows; the best of ten."""
    weight = projection.weight
    rows = torch.randn(_ROWS, weight.shape[1], device=weight.device).to(weight.dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            started = now(weight.device)
            nn.functional.linear(rows, weight)
            seconds.append(now(weight.device) - started)
    return 2.0 * _ROWS * weight.numel() / min(seconds[1:])  # the first call also sets things up


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device is done with all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
