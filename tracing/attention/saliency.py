"""Attention x gradient saliency: which edges of attention the answer's loss rests on, to first order."""

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import attending
from ..groups import group_positions
from ..lens.following import Positions, read_positions
from .answering import answered, predicting_logits, read_fields
from .saliency_result import AttentionSaliency
from .shares import text_parts


def attention_saliency(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: Positions = ("question", "last"),
    answer: str | None = None,
    whole_answer: bool = False,
) -> AttentionSaliency:
    """|sum over heads of A dL/dA| for every edge into the queries, in every decoder layer.

    A: attention weights after the softmax; L: minus the log probability of the answer's first token, or with
    whole_answer of all of them (teacher-forced). One forward and one backward pass. "Label words are anchors", arXiv
    2305.14160, equation 1.
    queries: the tokens whose attention is looked at, none of an answer. answer: None for the model's own greedy one.
    TraceError for a prompt without a picture or a group of queries without tokens; ModelError for an unknown one.
    """
    group_positions(prompt, "image")
    told = answered(vlm, prompt, answer)
    last = told.groups["last"][0]
    groups = text_parts(told, last) | {"last": (last,)}
    rows = tuple(sorted(read_positions(prompt.with_answer(None), queries)))
    ids = told.answer_ids if whole_answer else told.answer_ids[:1]
    with torch.no_grad():
        embeddings = vlm.embeddings(told)[:, : last + len(ids)]
    with torch.enable_grad(), attending(vlm, rows) as attention:
        logits = predicting_logits(vlm, told, embeddings.requires_grad_(), len(ids))[0].double()
        loss = -logits.log_softmax(-1)[range(len(ids)), list(ids)].sum()
        weights = [each.weights for each in attention]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    pairs = zip(weights, gradients, strict=True)
    return AttentionSaliency(
        answer=vlm.decode(list(ids)).strip(),
        answer_ids=ids,
        layers=tuple(range(vlm.layers)),
        tokens=told.tokens[: last + 1],
        loss=loss.item(),
        queries=rows,
        groups=groups,
        saliency=torch.stack([_saliency(*pair)[:, : last + 1] for pair in pairs]),
        **read_fields(vlm, told),
    )


def _saliency(weights: Tensor, gradients: Tensor) -> Tensor:
    """(query, source) float64 on the CPU, from weights and gradients (1, head, query, source)."""
    return (weights.detach().double() * gradients.double())[0].sum(0).abs().cpu()
