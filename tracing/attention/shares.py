"""Attention shares: how much of a token's attention goes to the picture, and how much to each part of the text."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import attending
from ..errors import TraceError
from ..groups import group_positions
from ..lens.following import Positions, read_positions
from .shares_result import AttentionShare


def attention_share(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: Positions = "last",
    parts: Mapping[str, str | int | Sequence[int]] | None = None,
) -> AttentionShare:
    """The share of the queries' attention that each part of the prompt gets, by decoder layer and head.

    Mean over the queries; in each head the shares sum to one. arXiv 2406.06579, section 3 (lambda_img, lambda_sys,
    lambda_usr; there of the last token, and after layer 3 the image's is below 2 % in LLaVA-1.5).
    queries: the tokens that attend. parts: name -> positions, no position in two of them; "other" is what they leave of
    the tokens up to the last query. None: "image"; "system", all before the first picture; "question", all else.
    TraceError for a prompt without a picture where no parts are given, and for parts that overlap or hold nothing that
    a query can see; ModelError for positions that the prompt does not have.
    """
    rows = tuple(sorted(read_positions(prompt, queries)))
    end = max(rows) + 1
    members = text_parts(prompt, end) if parts is None else _given_parts(prompt, parts, end)
    with torch.no_grad():
        embeddings = vlm.embeddings(prompt)[:, :end]
        with attending(vlm, rows) as attention:
            vlm.forward(inputs_embeds=embeddings, positions=[end - 1])
    return AttentionShare(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[:end],
        queries=rows,
        parts=members,
        heads=torch.stack([_shares(each.weights[0], members) for each in attention]),
    )


def text_parts(prompt: Prompt, end: int) -> dict[str, tuple[int, ...]]:
    """The first `end` positions as "system" (before the first picture), "image" and "question" (all other text).

    A part that has none of them holds nothing. TraceError for a prompt without a picture.
    """
    image = group_positions(prompt, "image")
    members = {"system": range(min(image)), "image": image, "question": set(range(min(image), end)) - set(image)}
    return {name: tuple(each for each in sorted(found) if each < end) for name, found in members.items()}


def _given_parts(
    prompt: Prompt, parts: Mapping[str, str | int | Sequence[int]], end: int
) -> dict[str, tuple[int, ...]]:
    """The asked parts cut to the first `end` positions, and what is left of these."""
    members: dict[str, tuple[int, ...]] = {}
    free = set(range(end))
    for name, asked in parts.items():
        found = sorted({position for position in prompt.positions(asked) if position < end})
        if not found:
            raise TraceError(f"part {name!r} ({asked!r}) holds no token that a query can see; leave it out")
        if not free.issuperset(found):
            twice = sorted(set(found) - free)
            raise TraceError(
                f"part {name!r} shares the positions {twice} with another part; give each position to one part, "
                "such as list(set(prompt.groups[...]) - set(...))"
            )
        free -= set(found)
        members[name] = tuple(found)
    if free and "other" in members:
        raise TraceError(f"a part is called 'other', which is what parts leave ({sorted(free)}); give it another name")
    return members | ({"other": tuple(sorted(free))} if free else {})


def _shares(weights: Tensor, members: Mapping[str, Sequence[int]]) -> Tensor:
    """(head, part) float64 on the CPU: mean over queries of weights (head, query, key), summed over each part."""
    mean = weights.double().mean(1).cpu()
    return torch.stack([mean[:, list(positions)].sum(-1) for positions in members.values()], dim=-1)
