"""Attention knockout as it is published: the whole model generates one token for each cell.

Nothing is kept from one cell to the next: vision tower and prefill run again in each call. The edges are Python lists
of (target, source) pairs, a deep copy for each layer of the window, and each such layer makes a dense mask of its own
from its list: in one write, and one mask for all heads unless single heads are cut. Zhang et al., arXiv 2411.18620,
section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ...models import Prompt, Site, VisionLanguageModel
from ...models.quiet import quiet_transformers
from ...tracing.engine.cells import EdgeCell, Measure

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
