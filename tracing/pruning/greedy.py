"""Greedy answers by guessing and verifying: along a right guess, all tokens of all answers cost a single sweep."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import VisionLanguageModel
from ..engine.cells import EdgeCell, Runs
from ..engine.measure import measure_once
from ..engine.settings import Engine

Ids = tuple[int, ...]
Cells = Callable[[int], Sequence[EdgeCell]]
"""Cells in a run of so many tokens, always as many in the same order; what is cut holds for an answer's tokens, too."""
Likeliest = Callable[[Ids, int, Sequence[int]], Tensor]
"""(cell, token) int64: what each of some cells finds likeliest in place of these ids, from a place on, after the ids
before it."""

_UNKNOWN = 0  # stands where a token is asked for and none is guessed; the last id of a line is never read


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an answer is over."""

    ends: tuple[int, ...]
    """The end-of-sequence tokens."""
    tokens: int
    """The most tokens that an answer has, its end included."""

    @classmethod
    def of(cls, vlm: VisionLanguageModel, max_new_tokens: int) -> "Limits":
        """With the end-of-sequence tokens by which this model's own generation stops."""
        return cls(ends=vlm.end_ids, tokens=max_new_tokens)

    def ended(self, ids: Sequence[int]) -> Ids:
        """These ids as a whole answer: as many as it may have, with an end if there is room for it."""
        return (*ids, *self.ends[:1])[: self.tokens]

    def is_over(self, ids: Ids) -> bool:
        """Nothing follows these ids."""
        return len(ids) >= self.tokens or (len(ids) > 0 and ids[-1] in self.ends)

    def without_end(self, ids: Ids) -> Ids:
        """The ids without an end-of-sequence token at their end."""
        return ids[:-1] if ids and ids[-1] in self.ends else ids


def own_ids(vlm: VisionLanguageModel, embeddings: Tensor, guess: Sequence[int], limits: Limits) -> Ids:
    """What the model says after a prompt, embeddings (1, token, hidden), with nothing cut; as `greedy_ids`."""

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
    """Per cell what the model says after a prompt, embeddings (1, token, hidden), with the cell's edges cut.

    The likeliest token each time, up to and including an end-of-sequence token or as many as an answer may have.
    guess: a likely answer; a wrong one costs time only. The engine's checks are left out: ids have no distance.
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
    """The greedy answers of so many cells.

    All go along the guess at first. One that says something else goes on from there, together with those that have said
    the same, along the answer of another cell where one is known that begins like this, else by a single token.
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
    """The longest known answer that goes on from what was said, or what was said and one token more."""
    longer = (each for each in known if len(each) > len(said) and each[: len(said)] == said)
    return max(longer, key=len, default=(*said, _UNKNOWN))


def _followed(line: Ids, start: int, tokens: Sequence[int], limits: Limits) -> Ids:
    """The line's ids as far as a cell agrees with them, and its own next one."""
    said = line[:start]
    for place, token in enumerate(tokens, start):
        said = (*line[:place], token)
        if token != line[place] or limits.is_over(said):
            break
    return said


def _argmax(logits: Tensor) -> Tensor:
    """(row, scored position) float64 holding ids, from logits (row, scored position, vocab)."""
    return logits.argmax(-1).double()
