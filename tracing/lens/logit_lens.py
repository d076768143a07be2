"""Answer emergence: what the output head makes of the residual stream after every layer (logit lens)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture
from ..errors import TraceError
from .followed import FollowedTokens
from .following import Positions, follow, read_positions
from .result import LogitLens

_AT_ONCE = 64
"""Positions whose logits over the whole vocabulary are held at the same time."""
_WIDE_ROUNDING, _NARROW_ROUNDING = 1000, 4
"""Rounding steps, of the largest logit, that a product of another size may differ by: float32 or wider, narrower."""


def logit_lens(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    positions: Positions = "last",
    answer: str | None = None,
    foil: str | None = None,
    words: str | int | Sequence[str | int] = (),
    top: int = 10,
    progress: bool = True,
) -> LogitLens:
    """How likely the answer's first token is at each position after the embedding and after every decoder layer.

    One forward pass. Each of the layers + 1 states of the residual stream goes through the output head, with the
    model's final norm before it and without. The published script (arXiv 2411.18620) leaves the norm out, so its
    probabilities are not comparable with the model's own. The last state here is the one before the norm, while
    transformers' `hidden_states` end with the normed one. Softmax in float64.

    positions: groups, positions or both; also those of an answer that the prompt carries. answer: None for the model's
    own greedy one, which has to be generated first. Answer and foil (the false option) are followed by the first token
    of their lower-case and of their capitalised spelling, words by the first token that they have as continuations of
    this prompt, or given as token ids. Some tokenizers begin a rare spelling with a lone blank, which then is the
    followed token: look at `.followed.texts`. top: how many of the likeliest tokens are kept (the script: 50).

    TraceError where norm and head do not give the model's own logits (it caps or scales them), where logits overflow
    the model's dtype, and for what does not fit the prompt.
    """
    places = read_positions(prompt, positions)
    is_own = answer is None
    if answer is None and not (answer := vlm.answers([prompt])[0]):
        raise TraceError(f"the model's own answer to {prompt.question!r} is empty; pass answer= to follow another")
    followed = follow(vlm, prompt, answer=answer, foil=foil, words=words)
    _check_top(vlm, top)
    states, logits = _residual_stream(vlm, prompt, list(places))
    _check_head(vlm, states[-1], logits)
    bar = tqdm(states, desc="reading layers", unit="state", disable=not progress)
    read = [_read_state(vlm, state, followed, top) for state in bar]
    probabilities, ranks, top_ids, top_probabilities = (torch.stack(each, 2).cpu() for each in zip(*read, strict=True))
    known = sorted({*followed.ids, *top_ids.flatten().tolist()})
    return LogitLens(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens,
        positions=tuple(places),
        position_roles=tuple(places.values()),
        answer=answer,
        is_own_answer=is_own,
        foil=foil,
        followed=followed,
        probabilities=probabilities,
        ranks=ranks,
        top_ids=top_ids,
        top_probabilities=top_probabilities,
        texts={str(token): vlm.tokenizer.decode([token]) for token in known},
    )


def _residual_stream(vlm: VisionLanguageModel, prompt: Prompt, positions: list[int]) -> tuple[list[Tensor], Tensor]:
    """States (position, hidden) after the embedding and each layer, and the pass's own logits (position, vocab)."""
    first, *_ = sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites, clone=True) as left:
        with capture(vlm, [first], inputs=True, clone=True) as entered:
            logits = vlm.logits(prompt)
    states = [entered[first], *(left[site] for site in sites)]
    return [state[0, positions] for state in states], logits[0, positions]


def _lens(vlm: VisionLanguageModel, states: Tensor) -> Tensor:
    """Logits (norm, position, vocab) float64 of states (position, hidden): with the final norm first, then without."""
    with torch.no_grad():
        return torch.stack([_head(vlm, vlm.final_norm(states)), _head(vlm, states)])


def _head(vlm: VisionLanguageModel, states: Tensor) -> Tensor:
    """(position, vocab) float64: logits of states (position, hidden)."""
    return vlm.unembed(states).double()


def _read_state(
    vlm: VisionLanguageModel, states: Tensor, followed: FollowedTokens, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norm, position, token): probabilities and ranks of followed tokens, ids and probabilities of the top ones."""
    parts = [_read_logits(vlm, _lens(vlm, part), list(followed.ids), top) for part in states.split(_AT_ONCE)]
    probabilities, ranks, top_ids, top_probabilities = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return probabilities, ranks, top_ids, top_probabilities


def _read_logits(
    vlm: VisionLanguageModel, logits: Tensor, ids: list[int], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_read_state`, from logits (norm, position, vocab). Ranks compare logits: softmax may round to ties."""
    if not logits.isfinite().all():
        raise TraceError(
            f"states of {vlm.name!r} overflow {vlm.dtype} at its output head; "
            "load it with dtype='float32' or 'bfloat16'"
        )
    probabilities = logits.softmax(-1)
    ranks = torch.stack([(logits > logits[..., token, None]).sum(-1) + 1 for token in ids], -1)
    likeliest = logits.topk(top).indices
    return probabilities[..., ids], ranks, likeliest, probabilities.gather(-1, likeliest)


def _check_top(vlm: VisionLanguageModel, top: int) -> None:
    size = vlm.vocab
    if not 1 <= top <= size:
        raise TraceError(f"cannot keep the {top} likeliest of {size} tokens; pass top from 1 to {size}")


def _check_head(vlm: VisionLanguageModel, states: Tensor, logits: Tensor) -> None:
    """TraceError unless final norm and head turn the last states (position, hidden) into these logits."""
    steps = _WIDE_ROUNDING if vlm.dtype in (torch.float32, torch.float64) else _NARROW_ROUNDING
    own = logits.double()
    with torch.no_grad():
        found = torch.cat([_head(vlm, vlm.final_norm(part)) for part in states.split(_AT_ONCE)]).to(own.device)
    difference, largest = float((found - own).abs().max()), float(own.abs().max())
    if not difference <= steps * torch.finfo(vlm.dtype).eps * largest:
        raise TraceError(
            f"final norm and output head of {vlm.name!r} do not give its own logits (off by {difference:.3g}, the "
            f"largest being {largest:.3g}): it changes them afterwards, by soft-capping or a scale, so what they say "
            "in earlier layers would not be comparable with its answers; read a model without that"
        )
