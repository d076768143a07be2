"""What dropping the picture half-way through the decoder saves: a prefill whose upper layers run on text only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...models import Site, VisionLanguageModel
from ...tracing.engine.cells import Runs
from .rates import now
from .subjects import Subject

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A prefill that drops the picture at mid depth, beside one that keeps it."""

    layer: int
    """The first layer that runs on text alone."""
    seconds_full: float
    """Median of three passes of the decoder on all tokens."""
    seconds_truncated: float
    ratio_seconds: float
    ratio_token_layers: float
    """Tokens times layers of the whole pass over those of the truncated one."""
    max_abs_diff: float
    """How far its score is from the cell that only cuts the edges, in probability."""


def measure_saving(subject: Subject, run: Runs, layer: int, expected: Tensor) -> Saving:
    """The saving from this layer on, both passes in turns, after one of each. expected: (metric,), the cell's, the
    probability first.
    """
    vlm = subject.vlm
    image = set(subject.recipe.shape.image_positions)
    text = [place for place in range(run.length) if place not in image]
    seconds: dict[str, list[float]] = {"full": [], "truncated": []}
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            started = now(vlm.device)
            vlm.forward(inputs_embeds=run.base, positions=run.scored)
            between = now(vlm.device)
            found = truncated_logits(vlm, run, layer, text)
            seconds["full"].append(between - started)
            seconds["truncated"].append(now(vlm.device) - between)
    full, truncated = (median(each[1:]) for each in seconds.values())
    whole = run.length * vlm.layers
    return Saving(
        layer=layer,
        seconds_full=full,
        seconds_truncated=truncated,
        ratio_seconds=full / truncated,
        ratio_token_layers=whole / (run.length * layer + len(text) * (vlm.layers - layer)),
        max_abs_diff=abs(float(subject.measure(found)) - float(expected[0])),
    )


def truncated_logits(vlm: VisionLanguageModel, run: Runs, layer: int, text: Sequence[int]) -> Tensor:
    """(1, scored position, vocab): all tokens below the layer, from it on only those of the text (ascending)."""
    places = [list(text).index(place) for place in run.scored]
    with _text_only(vlm, layer, torch.tensor(list(text), device=vlm.device)):
        return vlm.forward(inputs_embeds=run.base, positions=places)


@contextmanager
def _text_only(vlm: VisionLanguageModel, layer: int, text: Tensor) -> Iterator[None]:
    """A block in which the layers from this one on get the text tokens only, which keep their rotary positions."""

    def give(module: Any, given: tuple[Tensor, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = given[0][:, text] if module is entry else given[0]
        angles = tuple(each[:, text] for each in keywords["position_embeddings"])
        return (states, *given[1:]), {**keywords, "position_embeddings": angles}

    entry = vlm.module(Site("hidden", layer))
    with ExitStack() as stack:
        for number in range(layer, vlm.layers):
            hook = vlm.module(Site("hidden", number)).register_forward_pre_hook(give, with_kwargs=True)
            stack.callback(hook.remove)
        yield
