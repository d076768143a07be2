"""Prompts followed by their wanted answer, as one padded batch whose unchanging part is run only once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache

from ..models import ModelError, Prompt, VisionLanguageModel
from .errors import EditError


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """Contexts of one fact, each followed by the target, padded so that the first edited token has one column in all.

    A change at that column leaves everything before it as it was, so the prefix (with the picture) is run once and kept
    as attention keys and values; logits() runs the columns from the first edited token on.
    """

    embeddings: Tensor
    """(context, token, hidden), pictures merged in; zeros where padded."""
    attention_mask: Tensor
    """(context, token), 0 where padded."""
    position_ids: Tensor
    """(context, token)"""
    prefix: Cache
    """Attention keys and values of the columns before `start`."""
    start: int
    """The column of the first edited token."""
    key_columns: Tensor
    """(context, key), edited tokens, counted from `start`."""
    label_columns: Tensor
    """(context, label), tokens that predict the target, counted from `start`."""
    labels: Tensor
    """(context, label), ids of the target's tokens and of the end of the answer where that is asked for."""

    def logits(self, vlm: VisionLanguageModel) -> Tensor:
        """(context, label, vocab) in float32, the model's prediction of every label, with the target fed in."""
        logits = vlm.model(
            inputs_embeds=self.embeddings[:, self.start :],
            attention_mask=self.attention_mask,
            position_ids=self.position_ids[:, self.start :],
            past_key_values=_reusable(self.prefix),
            use_cache=True,
        ).logits
        return self.at(logits, self.label_columns).float()

    def losses(self, vlm: VisionLanguageModel) -> Tensor:
        """(context, label), negative log-probability in nats of each label."""
        logits = self.logits(vlm)
        labels = self.labels.to(logits.device)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").unflatten(0, labels.shape)

    @staticmethod
    def at(states: Tensor, columns: Tensor) -> Tensor:
        """(context, column, ...) the entries of (context, token, ...) at the given columns of each context."""
        columns = columns.to(states.device)
        return states[torch.arange(len(columns), device=states.device)[:, None], columns]


@torch.no_grad()
def target_batch(
    vlm: VisionLanguageModel, prompts: Sequence[Prompt], token: str | int, *, end: bool = True
) -> TargetBatch:
    """The batch for prompts that carry the target as their answer (Prompt.with_answer), to be edited at the token.

    end adds the end-of-sequence token to what has to be predicted. EditError as key_positions, and if the target has
    another number of tokens in another context.
    """
    positions = [key_positions(prompt, token) for prompt in prompts]
    lengths = sorted({len(prompt.answer_ids) for prompt in prompts})
    if len(lengths) > 1 or len({len(keys) for keys in positions}) > 1:
        raise EditError(
            f"the contexts of an edit disagree on the number of target tokens ({lengths}) or on whether {token!r} is "
            "the last token; use one template for all, or make one request each"
        )
    rows = [vlm.embeddings(prompt.inputs)[0] for prompt in prompts]
    start = max(keys[0] for keys in positions)
    shifts = [start - keys[0] for keys in positions]
    width = max(shift + len(row) for shift, row in zip(shifts, rows, strict=True))
    embeddings = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=embeddings.device)
    for index, (shift, row) in enumerate(zip(shifts, rows, strict=True)):
        embeddings[index, shift : shift + len(row)] = row
        mask[index, shift : shift + len(row)] = 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    ending = _end_ids(vlm) if end else ()
    labels = torch.tensor([(*prompt.answer_ids, *ending) for prompt in prompts])
    first_labels = torch.tensor([[prompt_end(prompt) - 1] for prompt in prompts])
    shift = torch.tensor(shifts)[:, None] - start
    return TargetBatch(
        embeddings=embeddings,
        attention_mask=mask,
        position_ids=position_ids,
        prefix=_prefix(vlm, embeddings[:, :start], mask[:, :start], position_ids[:, :start]),
        start=start,
        key_columns=torch.tensor(positions) + shift,
        label_columns=first_labels + torch.arange(labels.shape[1]) + shift,
        labels=labels,
    )


def key_positions(prompt: Prompt, token: str | int) -> tuple[int, ...]:
    """The positions to edit in a prompt that carries its target as answer, for the token asked for.

    token is the name of a token group (its last position counts) or a position in the prompt, negative from its end.
    At the prompt's last token there is one position per target token: that one and the target tokens that predict the
    next, since one changed state cannot spell several tokens. Anywhere else it is one position. EditError for a token
    that the prompt lacks.
    """
    end = prompt_end(prompt)
    try:
        positions = prompt.positions(token + end if isinstance(token, int) and token < 0 else token)
    except ModelError:
        positions = ()
    if not positions or not 0 <= max(positions) < end:
        named = ", ".join(name for name, found in prompt.groups.items() if found and max(found) < end)
        raise EditError(
            f"cannot edit at token {token!r} of {prompt.question!r}: the prompt has positions 0 to {end - 1} and "
            f"groups {named}; pass one of these, or make the prompt with constraint='the phrase that names the thing'"
        )
    position = max(positions)
    return tuple(range(position, position + len(prompt.answer_ids))) if position == end - 1 else (position,)


def prompt_end(prompt: Prompt) -> int:
    """The number of tokens before the answer."""
    return prompt.positions("last")[-1] + 1


def _end_ids(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """The id that ends an answer (the first, where several do), or nothing for a model that has none."""
    ends = vlm.model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    end = vlm.tokenizer.eos_token_id if end is None else end
    return () if end is None else (end,)


def _prefix(vlm: VisionLanguageModel, embeddings: Tensor, mask: Tensor, position_ids: Tensor) -> Cache:
    cache = DynamicCache(config=vlm.model.config.get_text_config(decoder=True))
    if embeddings.shape[1]:
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": position_ids}
        vlm.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _reusable(cache: Cache) -> Cache:
    """A cache that may grow without the given one growing; tensors are shared, as growing replaces them."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh
