"""Greedy answers by guess and verification: with a right guess, all tokens of all answers cost a single sweep."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ..engine.cells import EdgeCell, Engine, Runs
from ..engine.measure import measure_once

Ids = tuple[int, ...]
Cells = Callable[[int], Sequence[EdgeCell]]
"""The cells of a run with this number of tokens, always equally many and in the same order. Cuts also apply to the
answer's tokens."""
Likeliest = Callable[[Ids, int, Sequence[int]], Tensor]
"""The likeliest token ids (cell, token) int64 of some cells at the places of these ids, from a start on; each id is
predicted from the ids before it."""

_UNKNOWN = 0  # placeholder for a token without a guess; the last id of a line is never read


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of an answer."""

    ends: tuple[int, ...]
    """Ids of the end-of-sequence tokens."""
    tokens: int
    """Largest number of tokens of an answer, including its end-of-sequence token."""

    @classmethod
    def of(cls, vlm: VisionLanguageModel, max_new_tokens: int) -> "Limits":
        """Return limits with the end-of-sequence tokens at which this model's own generation stops."""
        return cls(ends=vlm.end_ids, tokens=max_new_tokens)

    def ended(self, ids: Sequence[int]) -> Ids:
        """Return these ids as a complete answer: at most `tokens` ids, with an end token if there is room."""
        return (*ids, *self.ends[:1])[: self.tokens]

    def is_over(self, ids: Ids) -> bool:
        """Return whether the answer is complete with these ids."""
        return len(ids) >= self.tokens or (len(ids) > 0 and ids[-1] in self.ends)

    def without_end(self, ids: Ids) -> Ids:
        """Return the ids without a final end-of-sequence token."""
        return ids[:-1] if ids and ids[-1] in self.ends else ids


def own_ids(vlm: VisionLanguageModel, embeddings: Tensor, guess: Sequence[int], limits: Limits) -> Ids:
    """Return the model's greedy answer to a prompt with embeddings (1, token, hidden), without any cut."""

    def likeliest(ids: Ids, start: int, _cells: Sequence[int]) -> Tensor:
        last = embeddings.shape[1] - 1
        with torch.no_grad():
            logits = vlm.forward(
                inputs_embeds=vlm.extend(embeddings, ids), positions=range(last + start, last + len(ids))
            )
        return logits.argmax(-1)

    return verified(likeliest, 1, limits.ended(guess), limits)[0]


def greedy_ids(
    vlm: VisionLanguageModel,
    embeddings: Tensor,
    cells: Cells,
    *,
    guess: Sequence[int],
    limits: Limits,
    engine: Engine,
    bar: tqdm | None = None,
) -> list[Ids]:
    """Return the greedy answer of each cell to a prompt with embeddings (1, token, hidden).

    Each step of an answer takes the likeliest token, up to and including an end-of-sequence token or up to the largest
    length. The guess is a likely answer; a wrong guess only costs time. The engine's checks and checkpoint are not
    used.
    """
    last, engine = embeddings.shape[1] - 1, replace(engine, checks=0, checkpoint=None)

    def likeliest(ids: Ids, start: int, numbers: Sequence[int]) -> Tensor:
        runs = Runs.of_one(vlm.extend(embeddings, ids), scored=range(last + start, last + len(ids)))
        if bar is not None:
            bar.total += len(numbers)
        asked = cells(runs.length)
        found = measure_once(vlm, runs, [asked[each] for each in numbers], _argmax, engine=engine, bar=bar)
        return found.scores[..., 0].long()

    return verified(likeliest, len(cells(last + 1)), limits.ended(guess), limits)


def verified(likeliest: Likeliest, count: int, guess: Ids, limits: Limits) -> list[Ids]:
    """Return the greedy answers of `count` cells.

    All cells first follow the guess. Cells that depart from it with the same ids continue together, along the known
    answer of another cell with the same beginning if there is one, otherwise by a single token.
    """
    found: dict[int, Ids] = {}
    known = {guess}
    waiting: dict[Ids, list[int]] = {(): list(range(count))}
    while waiting:
        said = min(waiting, key=len)
        numbers, line = waiting.pop(said), _line(said, known)
        for number, tokens in zip(numbers, likeliest(line, len(said), numbers).tolist(), strict=True):
            answer = _followed(line, len(said), tokens, limits)
            if limits.is_over(answer):
                found[number] = answer
                known.add(answer)
            else:
                waiting.setdefault(answer, []).append(number)
    return [found[number] for number in range(count)]


def _line(said: Ids, known: Collection[Ids]) -> Ids:
    """Return the longest known answer that begins with these ids, otherwise these ids and one placeholder."""
    longer = (each for each in known if len(each) > len(said) and each[: len(said)] == said)
    return max(longer, key=len, default=(*said, _UNKNOWN))


def _followed(line: Ids, start: int, tokens: Sequence[int], limits: Limits) -> Ids:
    """Return the line's ids up to the first one with which the cell disagrees, and then the cell's own id."""
    said = line[:start]
    for place, token in enumerate(tokens, start):
        said = (*line[:place], token)
        if token != line[place] or limits.is_over(said):
            break
    return said


def _argmax(logits: Tensor) -> Tensor:
    """Return the likeliest ids (row, scored position) as float64, from logits (row, scored position, vocab)."""
    return logits.argmax(-1).double()
