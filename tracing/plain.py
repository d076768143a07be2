"""The plain way to trace: one forward pass of the whole decoder for each cell, with hooks that restore clean states.

Slow and obvious on purpose. The vision tower runs once; everything after it starts from the merged embeddings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..models import Prompt, Site, VisionLanguageModel, capture, patch
from .corruption import embed


def answer_probabilities(
    vlm: VisionLanguageModel, embeddings: Tensor, answer: int | Sequence[int], *, attention_mask: Tensor | None = None
) -> Tensor:
    """(sample,) float64 on the CPU: the answer's probability after these embeddings (sample, token, hidden).

    answer: one token, or several; all but the last of several then stand at the end of the embeddings (teacher
    forcing), and the probability is the product over them.
    attention_mask: None for the decoder's own causal one, or booleans (1, 1, query token, key token), True where seen.
    """
    ids = (answer,) if isinstance(answer, int) else tuple(answer)
    distributions = _distributions(vlm, embeddings, len(ids), attention_mask)
    return torch.stack([distributions[:, index, token] for index, token in enumerate(ids)]).prod(0)


def next_token_probabilities(
    vlm: VisionLanguageModel, embeddings: Tensor, *, attention_mask: Tensor | None = None
) -> Tensor:
    """(sample, vocab) float64 on the CPU: the model's distribution over the token after the last one."""
    return _distributions(vlm, embeddings, 1, attention_mask)[:, -1]


def _distributions(vlm: VisionLanguageModel, embeddings: Tensor, count: int, attention_mask: Tensor | None) -> Tensor:
    """(sample, count, vocab) float64 on the CPU: the distributions over what follows each of the last tokens."""
    with torch.no_grad():
        logits = vlm.forward(inputs_embeds=embeddings, attention_mask=attention_mask)
    return logits[:, -count:].double().softmax(-1).cpu()


def clean_states(vlm: VisionLanguageModel, embeddings: Tensor, kind: str) -> dict[Site, Tensor]:
    """Every layer's output of this kind, (sample, token, hidden), for these embeddings.

    Pass as many equal samples as the corrupted run has: matrix products of another size round otherwise, and restoring
    a state that the corruption never touched would no longer be exactly without effect.
    """
    sites = [Site(kind, layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites, clone=True) as states:
        vlm.forward(inputs_embeds=embeddings)
    return dict(states)


def restored_probability(
    vlm: VisionLanguageModel,
    corrupted: Tensor,
    states: Mapping[Site, Tensor],
    positions: Sequence[int],
    *,
    answer: int | Sequence[int],
) -> Tensor:
    """(sample,) float64: the answer's probability in the corrupted run with these states put back at these positions.

    answer: as in `answer_probabilities`. corrupted and every state: (sample, token, hidden). An empty mapping or no
    position gives the corrupted probability.
    """
    with patch(vlm, {site: _restore(state, list(positions)) for site, state in states.items()}):
        return answer_probabilities(vlm, corrupted, answer)


def _restore(clean: Tensor, positions: list[int]) -> Callable[[Tensor], Tensor]:
    """A patch that writes clean states at some positions and leaves the others."""

    def restore(output: Tensor) -> Tensor:
        restored = output.clone()
        restored[:, positions] = clean[:, positions]
        return restored

    return restore


def knockout_probability(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    sources: str | int | Iterable[int],
    targets: str | int | Iterable[int],
    *,
    answer_id: int | None = None,
) -> float:
    """The answer's probability when no target token may attend to a source token, in any layer.

    sources, targets: group names or positions; a token always sees itself, so overlapping groups are fine.
    answer_id: the scored token; None for the one that the untouched model finds likeliest. Compare with no sources.
    Attention knockout as in arXiv 2411.18620, over all layers at once.
    """
    embeddings = embed(vlm, prompt)
    if answer_id is None:
        answer_id = int(next_token_probabilities(vlm, embeddings).argmax())
    length = embeddings.shape[1]
    sources = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, sources, length), True)
    targets = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, targets, length), True)
    cut = targets[:, None] & sources[None, :] & ~torch.eye(length, dtype=torch.bool)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ~cut
    return float(answer_probabilities(vlm, embeddings, answer_id, attention_mask=mask[None, None].to(vlm.device)))


def _indices(prompt: Prompt, group: str | int | Iterable[int], length: int) -> Tensor:
    """Positions of the group among the prompt's first `length`; those of an answer after it play no part."""
    group = group if isinstance(group, (str, int)) else tuple(group)
    return torch.tensor([position for position in prompt.positions(group) if position < length], dtype=torch.long)
