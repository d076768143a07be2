"""The flows that are timed: which edges each row of the table cuts, and in which layers.

Attention knockout as it is published: the whole model generates one token for each cell.

Nothing is kept from one cell to the next: vision tower and prefill run again in each call. The edges are Python lists
of (target, source) pairs, a deep copy for each layer of the window, and each such layer makes a dense mask of its own
from its list: in one write, and one mask for all heads unless single heads are cut. Zhang et al., arXiv 2411.18620,
section 3.

What dropping the picture half-way through the decoder saves: a prefill whose upper layers run on text only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from ...models import Prompt, Site, VisionLanguageModel
from ...models.guards import quiet_transformers
from ...models.replay.cuts import Cut
from ...tracing.engine.cells import EdgeCell, Measure, Runs
from ...tracing.engine.rows import window_layers
from .machine import now
from .models import Shape, Subject

DROPPED = "image tokens dropped from each layer on, K = 0"
"""The row beside which a truncated prefill is timed."""

_SPEAKING = ("image", "question", "last")


@dataclass(frozen=True, kw_only=True)
class FlowCase:
    """One row of the table."""

    label: str
    cells: tuple[EdgeCell, ...]
    """All different."""
    middle: int | None = None
    """The layer from which on a truncated prefill is run on text alone; None: this row has none."""


def make_flow_cases(shape: Shape, windows: Sequence[int]) -> tuple[FlowCase, ...]:
    """Every row of the table: around each layer a window of each width, the question being the text tokens behind the
    image without the last one.
    """
    image, after = tuple(shape.image_positions), tuple(range(shape.image_positions.stop, shape.tokens))
    question, last = after[:-1], after[-1:]
    paper = {
        "image -> last": _cut(image, last),
        "question -> last": _cut(question, last),
        "image -> question": _cut(image, question),
        "last -> last": _cut(last, last),
    }
    heads = [_cut(image, last, head) for head in range(shape.heads)]
    asked = {
        **{name: [cut] for name, cut in paper.items()},
        "image -> question and last": [_cut(image, after)],
        "image -> last, each head": heads,
        "the three flows to the last token in one call": [paper[f"{name} -> last"] for name in _SPEAKING],
        "the four flows of the paper in one call": list(paper.values()),
    }
    dropped = [
        EdgeCell(cut=_cut(image, after), first=layer, last=shape.layers - 1, is_dropped=True)
        for layer in range(shape.layers)
    ]
    return (
        *(FlowCase(label=label, cells=_cells(cuts, windows, shape.layers)) for label, cuts in asked.items()),
        FlowCase(label=DROPPED, cells=tuple(dropped), middle=shape.layers // 2),
    )


def _cut(sources: Sequence[int], targets: Sequence[int], *heads: int) -> Cut:
    return Cut(sources=frozenset(sources), targets=frozenset(targets), heads=heads)


def _cells(cuts: Sequence[Cut], windows: Sequence[int], layers: int) -> tuple[EdgeCell, ...]:
    """One cell per cut, window and centre; of windows that the decoder's ends make equal, one."""
    spans = [window_layers(centre, window, layers) for window in windows for centre in range(layers)]
    cells = [EdgeCell(cut=cut, first=span[0], last=span[-1]) for cut in cuts for span in spans]
    return tuple(dict.fromkeys(cells))


_Pairs = Sequence[tuple[int, int]]


def published_scores(vlm: VisionLanguageModel, prompt: Prompt, cells: Sequence[EdgeCell], measure: Measure) -> Tensor:
    """(cell, metric) float64 on the CPU: what `plain_scores` gives where only the last token is scored."""
    return torch.stack([_score(vlm, prompt, cell, measure) for cell in cells])


def _score(vlm: VisionLanguageModel, prompt: Prompt, cell: EdgeCell, measure: Measure) -> Tensor:
    inputs = {
        name: value.to(vlm.device, vlm.dtype if value.is_floating_point() else None)
        for name, value in prompt.inputs.items()
    }
    pairs = [(target, source) for target in sorted(cell.cut.targets) for source in sorted(cell.cut.sources)]
    blocked = {layer: copy.deepcopy(pairs) for layer in range(cell.first, cell.last + 1)}
    with torch.no_grad(), quiet_transformers(), _blocking(vlm, blocked, cell.cut.heads):
        made = cast(Any, vlm.model).generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return measure(made.logits[0][:, None].float())[0].double().cpu()


@contextmanager
def _blocking(vlm: VisionLanguageModel, blocked: Mapping[int, _Pairs], heads: Sequence[int]) -> Iterator[None]:
    """A block in which layers lack (target, source) edges, in these heads or, without any, in all."""
    with ExitStack() as stack:
        for layer, pairs in blocked.items():
            attention = vlm.module(Site("attention", layer))
            hook = attention.register_forward_pre_hook(_masked(pairs, heads, vlm.heads), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _masked(pairs: _Pairs, heads: Sequence[int], all_heads: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook by which attention gets an additive mask made from these pairs, causal otherwise."""

    def give(_module: Any, given: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = keywords["hidden_states"]
        tokens = states.shape[1]
        seen = torch.ones(all_heads if heads else 1, tokens, tokens, dtype=torch.bool).tril()
        targets, sources = zip(*pairs, strict=True)
        for head in heads or (0,):
            seen[head, list(targets), list(sources)] = False
        mask = torch.zeros(seen.shape, dtype=states.dtype).masked_fill_(~seen, torch.finfo(states.dtype).min)
        return given, {**keywords, "attention_mask": mask[None].to(states.device)}

    return give


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
