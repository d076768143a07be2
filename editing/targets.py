"""Prompts followed by their target answers, as one padded batch whose unchanging part is run only once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models import ModelError, Prompt, VisionLanguageModel
from ..models.replay.padded import PaddedBatch
from ..models.texts import plain_number
from .errors import EditError


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One fact in several contexts, which share their keys and values."""

    prompts: tuple[Prompt, ...]
    """The contexts; each carries the target as its answer, and keys and losses are averaged over them."""
    essence: tuple[Prompt, ...] = ()
    """Prompts whose next token should stay as it is; they get the first key's change and no target."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """Prompts of many facts with their targets, padded so that the first edited token has the same column in all rows.

    A change at that column leaves everything before it as it is, so the prefix (with the picture) is run once and kept
    as attention keys and values. Columns are counted from the first edited token.
    """

    inputs: PaddedBatch
    """The columns from the first edited token on."""
    goals: Tensor
    """(row,), the goal that a row belongs to."""
    essence: Tensor
    """(row,), True for rows without a target."""
    key_columns: Tensor
    """(row, key), edited tokens; 0 where a goal has fewer keys."""
    key_mask: Tensor
    """(row, key), True for real keys."""
    label_columns: Tensor
    """(row, label), tokens that predict the target (the one that predicts the next token, in rows without a target)."""
    labels: Tensor
    """(row, label), ids of the target's tokens and of the end of the answer if it is asked for."""
    label_mask: Tensor
    """(row, label), True for real labels."""

    def logits(self, vlm: VisionLanguageModel) -> Tensor:
        """The model's prediction of every label, (row, label, vocab), float32 or wider, with the target fed in."""
        return self.inputs.logits(vlm, self.label_columns)

    def rows(self, rows: Tensor) -> "TargetBatch":
        """The batch of only some rows, (row,) indices in ascending order."""
        names = ("goals", "essence", "key_columns", "key_mask", "label_columns", "labels", "label_mask")
        return replace(self, inputs=self.inputs.rows(rows), **{name: getattr(self, name)[rows] for name in names})


@torch.no_grad()
def target_batch(
    vlm: VisionLanguageModel, goals: Sequence[Goal], token: str | int, *, end: bool = True, every: bool = True
) -> TargetBatch:
    """Return the batch for these goals, to be edited at the token.

    Args:
        vlm: The model.
        goals: The goals, whose prompts carry their targets as answers.
        token: The token that is edited, as in `key_positions`.
        end: Whether the end-of-sequence token has to be predicted, too (default True).
        every: As in `key_positions`.

    Raises:
        EditError: As `key_positions`, and if the target of a goal has different numbers of tokens in its contexts.
    """
    rows = [(index, prompt, False) for index, goal in enumerate(goals) for prompt in goal.prompts]
    rows += [(index, prompt.with_answer(None), True) for index, goal in enumerate(goals) for prompt in goal.essence]
    ending = end_ids(vlm) if end else ()
    keys = [key_positions(prompt, token, end=bool(ending), every=every and not bare) for _, prompt, bare in rows]
    _check_contexts(rows, keys, token)
    embedded = [vlm.embeddings(prompt.inputs)[0] for _, prompt, _ in rows]
    start = max(each[0] for each in keys)
    shifts = [start - each[0] for each in keys]
    embeddings, mask = _aligned(embedded, shifts)
    labels, label_mask = _padded([() if bare else (*prompt.answer_ids, *ending) for _, prompt, bare in rows])
    key_columns, key_mask = _padded([[position - each[0] for position in each] for each in keys])
    first = torch.tensor([prompt_end(prompt) - 1 - each[0] for (_, prompt, _), each in zip(rows, keys, strict=True)])
    counted = torch.where(label_mask, torch.arange(labels.shape[1]), 0)
    return TargetBatch(
        inputs=PaddedBatch.after_prefix(vlm, embeddings, mask, start),
        goals=torch.tensor([index for index, _, _ in rows]),
        essence=torch.tensor([bare for _, _, bare in rows]),
        key_columns=key_columns,
        key_mask=key_mask,
        label_columns=first[:, None] + counted,
        labels=labels,
        label_mask=label_mask,
    )


def key_positions(prompt: Prompt, token: str | int, *, end: bool = True, every: bool = True) -> tuple[int, ...]:
    """Return the positions to edit in a prompt that carries its target as answer.

    At the prompt's last token there is one position per answer position, since the later tokens of an answer are
    produced where the first key never occurs. Anywhere else there is one position.

    Args:
        prompt: The prompt, with its target as answer.
        token: The name of a token group (its last position counts) or a position in the prompt, negative from its end.
        end: Whether the last target token counts as well, which predicts that the answer is over (default True).
        every: Whether the answer's positions are edited at all (default True); False leaves one position.

    Raises:
        EditError: For a token that the prompt lacks.
    """
    length, token = prompt_end(prompt), plain_number(token)
    try:
        positions = prompt.positions(token + length if isinstance(token, int) and token < 0 else token)
    except ModelError:
        positions = ()
    if not positions or not 0 <= max(positions) < length:
        named = ", ".join(name for name, found in prompt.groups.items() if found and max(found) < length)
        raise EditError(
            f"cannot edit at token {token!r} of {prompt.question!r}: the prompt has positions 0 to {length - 1} and "
            f"groups {named}; pass one of these, or make the prompt with constraint='the phrase that names the thing'"
        )
    position = max(positions)
    is_answer = every and position == length - 1
    return tuple(range(position, position + max(1, len(prompt.answer_ids) + end))) if is_answer else (position,)


def prompt_end(prompt: Prompt) -> int:
    """The number of tokens before the answer."""
    return prompt.positions("last")[-1] + 1


def end_ids(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """The id that ends an answer (the first of several), or nothing for a model without one."""
    return vlm.end_ids[:1]


def _check_contexts(
    rows: Sequence[tuple[int, Prompt, bool]], keys: Sequence[tuple[int, ...]], token: str | int
) -> None:
    found: dict[int, set[tuple[int, int]]] = {}
    for (index, prompt, bare), each in zip(rows, keys, strict=True):
        if not bare:
            found.setdefault(index, set()).add((len(prompt.answer_ids), len(each)))
    for index, sizes in found.items():
        if len(sizes) > 1:
            question = next(prompt.question for at, prompt, _ in rows if at == index)
            raise EditError(
                f"the contexts of {question!r} disagree on the number of target tokens "
                f"({sorted({tokens for tokens, _ in sizes})}) or on whether {token!r} is the last token; "
                "use one template for all, or pass them as `rewrite_prompts`, with keys of their own"
            )


def _aligned(embedded: Sequence[Tensor], shifts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows moved to the right by their shifts, (row, token, hidden), and their mask (row, token)."""
    width = max(shift + len(row) for shift, row in zip(shifts, embedded, strict=True))
    embeddings = embedded[0].new_zeros(len(embedded), width, embedded[0].shape[-1])
    mask = torch.zeros(len(embedded), width, dtype=torch.long, device=embeddings.device)
    for index, (shift, row) in enumerate(zip(shifts, embedded, strict=True)):
        embeddings[index, shift : shift + len(row)] = row
        mask[index, shift : shift + len(row)] = 1
    return embeddings, mask


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The numbers with zeros after those of each row, (row, longest), and the mask that is True for real ones."""
    longest = max(1, *(len(row) for row in rows))
    numbers = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return numbers, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
