"""The prompts of requests with their targets after them, in batches with the labels that they have to predict."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.facts import EditRequest
from ...models import Prompt, VisionLanguageModel, collate
from ...models.prompts import batches as fitting_batches
from ..requests import edited_questions
from ..values import end_ids, prompt_end

_NO_LABEL = -100
_HELD_MIB = 512
"""Prompts stay in memory up to this size in all; those beyond it are made again in every pass."""

Forward = Callable[..., Any]
"""A function that takes model inputs by keyword and returns the output of the model, which has `logits`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerBatch:
    """Prompts with their targets after them, padded on the right, and the labels that they have to predict."""

    rows: Tensor
    """(row,) int64: for each prompt of the batch, its number among all prompts of the requests."""
    inputs: Mapping[str, Tensor]
    """Model inputs, among them input_ids and attention_mask (row, token)."""
    labels: Tensor
    """(row, column) int64: the id that each of the last columns has to predict; -100 where nothing has to be."""

    def losses(self, forward: Forward) -> Tensor:
        """Return the mean negative log-probability per label with the target fed in: (row,), float32 or wider."""
        logits = forward(**self.inputs, use_cache=False, logits_to_keep=self.labels.shape[1]).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = self.labels.to(logits.device)
        spread = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_NO_LABEL, reduction="none")
        return spread.sum(-1) / (labels != _NO_LABEL).sum(-1)


class AnswerBatches:
    """All prompts of requests, with contexts and rewrite prompts, and their targets, in batches that are made lazily.

    The first prompts that are asked for stay, up to a limit in memory; the others are made again whenever they are
    asked for.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        *,
        batch_size: int,
        end_of_answer: bool = True,
        held_mib: float = _HELD_MIB,
    ) -> None:
        """Prepare the batches without making any prompt.

        Args:
            vlm: The model that the prompts are for.
            requests: The requests; each gives its question, its contexts and its rewrite prompts, in this order.
            batch_size: Largest number of prompts of a batch.
            end_of_answer: Whether the end of the answer is among the labels, if the model has a token for it.
            held_mib: Size in MiB up to which prompts stay in memory.
        """
        self._targets = [(question, request.target) for request in requests for question in edited_questions(request)]
        self.owners = torch.tensor([owner for owner, each in enumerate(requests) for _ in edited_questions(each)])
        """(prompt,) int64: for each prompt, the index of its request."""
        self._vlm, self._ending = vlm, end_ids(vlm) if end_of_answer else ()
        self._batch_size, self._room = batch_size, held_mib
        self.held: dict[int, Prompt] = {}
        """The prompts that stay in memory, by number."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._targets)

    def of(self, rows: Tensor) -> Iterator[AnswerBatch]:
        """Yield batches of the prompts with these numbers, (row,) int64.

        They are in order, except that prompts whose pictures do not fit together go into batches of their own.
        """
        for some in rows.split(self._batch_size):
            prompts = [self._prompt(row) for row in some.tolist()]
            for members in fitting_batches(prompts, self._batch_size):
                yield _batch(self._vlm, some[members], [prompts[member] for member in members], self._ending)

    def _prompt(self, row: int) -> Prompt:
        if row in self.held:
            return self.held[row]
        question, target = self._targets[row]
        prompt = self._vlm.prompt_for(question).with_answer(target)
        prompt = replace(prompt, images=(), sources=())  # the inputs hold all that the model reads
        size = sum(value.nbytes for value in prompt.inputs.values()) / 2**20
        if size <= self._room:
            self.held[row] = prompt
            self._room -= size
        return prompt


def _batch(vlm: VisionLanguageModel, rows: Tensor, prompts: Sequence[Prompt], ending: tuple[int, ...]) -> AnswerBatch:
    """Return the batch of prompts with their targets."""
    inputs, _ = collate(prompts, vlm.tokenizer, side="right")
    width = inputs["input_ids"].shape[1]
    labels = torch.full((len(prompts), width), _NO_LABEL)
    for row, prompt in zip(labels, prompts, strict=True):
        wanted = torch.tensor((*prompt.answer_ids, *ending))
        first = prompt_end(prompt) - 1
        row[first : first + len(wanted)] = wanted
    kept = min(prompt_end(prompt) for prompt in prompts) - 1
    return AnswerBatch(rows=rows, inputs=inputs, labels=labels[:, kept:])
