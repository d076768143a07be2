"""The keys of the edits that are in a model, which later edits leave as they are: one matrix for each weight."""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ..changes import Delta, HistoryEntry
from ..requests import EDITED, NOT_GENERATED, edited_questions
from .cost import SPANNED, Cost
from .recursive import RunningCost, RunningInverse

_KEY = 32  # digits of a question's key
FACTS = "facts"
"""The entry of a request's text that holds the keys of its questions."""


class EarlierKeys:
    """The keys of the edits that are in a model, as one running Gram matrix K^T K for each weight.

    Where the outputs of earlier edits are to stay, their keys count only through this matrix (`Cost.holding`), so that
    an edit costs the same however many came before it. A matrix is made when it is first needed, and then follows.

    A fact that is edited again gets its new target: the keys of its earlier edits are subtracted from the matrix, since
    they would hold the outputs at the old target just where the new one is wanted. The earlier change stays in the
    weights, and the new one is measured from there. Two requests are of one fact if they share a question, with its
    picture, that is to get the target.
    """

    def __init__(self) -> None:
        self.edits = 0
        """Number of requests that were edited, those whose facts were edited again included."""
        self._grams: dict[str, Tensor] = {}
        """(width, width) float64 by parameter name, on the device of the weight."""
        self._counts: dict[str, int] = {}
        """Number of keys in each Gram matrix."""
        self._entries: dict[str, HistoryEntry] = {}
        self._replaced: dict[str, set[int]] = {}
        """Requests of each edit whose facts were edited again, or that were taken out of the history."""
        self._facts: dict[str, set[tuple[str, int]]] = {}
        """Key of a question -> the edits and requests that gave it its target."""
        self._asked: dict[str, tuple[Cost, float]] = {}
        """The cost and the weight of earlier keys with which each weight was last asked for."""
        self._running: dict[str, RunningInverse] = {}

    def follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        """Add an edit that is now in the model, in place of earlier edits of the same facts.

        delta: the edit itself, if it need not be read from its file.
        """
        every = _edited_facts(entry)
        edited = {index: facts for index, facts in every.items() if index not in entry.gone}
        self._replace({fact for facts in edited.values() for fact in facts})
        self._entries[entry.name], self._replaced[entry.name] = entry, set(entry.gone)
        self.edits += len(every)
        for index, facts in edited.items():
            for fact in facts:
                self._facts.setdefault(fact, set()).add((entry.name, index))
        for weight in self._grams.keys() & entry.fingerprints.keys():
            self._add(entry.name, weight, delta=delta)

    def gram(self, weight: Tensor, name: str, facts: Set[str]) -> Tensor | None:
        """Return the matrix of a weight without the keys of these facts, which are edited again; None for no keys."""
        touching = [entry.name for entry in self._entries.values() if name in entry.fingerprints]
        if not touching:
            return None
        if name not in self._grams:
            width = self._entries[touching[0]].delta.changes[name].shape[1]
            self._grams[name] = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
            self._counts[name] = 0
            for entry in touching:
                self._add(entry, name)
        gram = self._grams[name]
        for own in self._superseded(name, facts):
            gram = _without_keys(gram, own)
        return gram if gram.any() else None

    def held(self, cost: Cost, earlier_weight: float, weight: Tensor, name: str, facts: Set[str]) -> Cost:
        """Return the cost of a weight with the outputs at the keys of earlier edits held, `Cost.holding`.

        Where one cost is asked for again, its inverse is kept from then on and follows the keys (`RunningInverse`).

        Args:
            cost: The cost without earlier keys; the same object for as long as nothing in it changes.
            earlier_weight: Weight of the earlier keys, above 0.
            weight: The weight that is edited.
            name: Its parameter name.
            facts: Facts that are edited again, whose earlier keys are not held.

        Raises:
            EditError: As `Cost.holding`.
        """
        before, self._asked[name] = self._asked.get(name), (cost, earlier_weight)
        gram = self.gram(weight, name, facts)
        if gram is None:
            return cost
        is_repeated = before is not None and before[0] is cost and before[1] == earlier_weight
        if not is_repeated or cost.is_free or earlier_weight == float("inf"):
            self._running.pop(name, None)
            return cost.holding(gram, earlier_weight)
        whole, running = self._grams[name], self._running.get(name)
        if running is None or running.is_stale:
            running = self._running[name] = RunningInverse(cost.holding(whole, earlier_weight))
        gone = self._superseded(name, facts)
        return RunningCost.of(cost, running, gram=whole, gone=torch.cat([whole[:0], *gone]), weight=earlier_weight)

    def mean(self, weight: Tensor, name: str, edits: int) -> Tensor | None:
        """Return the mean of k k^T over the keys held when this many requests had been edited; None for no keys."""
        held, entries = EarlierKeys(), iter(self._entries.values())
        if edits <= self.edits - len(_edited_facts([*self._entries.values()][-1])):
            while held.edits < edits:
                held.follow(next(entries))
        else:
            held = self
        gram = held.gram(weight, name, set())
        return None if gram is None else gram / held._counts[name]

    def _add(self, entry: str, name: str, *, delta: Delta | None = None) -> None:
        replaced, gram = self._replaced[entry], self._grams[name]
        delta = self._entries[entry].delta if delta is None else delta
        keys = _keys(delta, name, lambda owner: owner not in replaced).to(gram)
        gram += keys.T @ keys
        self._counts[name] += len(keys)
        if name in self._running:
            self._running[name].add(keys, self._asked[name][1])

    def _superseded(self, name: str, facts: Set[str]) -> list[Tensor]:
        """The keys of a weight that gave these facts the targets that they have, edit by edit."""
        return [
            _keys(self._entries[entry].delta, name, lambda owner, own=requests: owner in own).to(self._grams[name])
            for entry, requests in self._places(facts).items()
            if name in self._entries[entry].fingerprints
        ]

    def _places(self, facts: Set[str]) -> dict[str, set[int]]:
        """The edits and their requests that gave these facts the targets that they have."""
        places: dict[str, set[int]] = {}
        for fact in facts:
            for entry, request in self._facts.get(fact, ()):
                places.setdefault(entry, set()).add(request)
        return {entry: requests - self._replaced[entry] for entry, requests in places.items()}

    def _replace(self, facts: Set[str]) -> None:
        for name in self._grams:
            for own in self._superseded(name, facts):
                self._grams[name] = _without_keys(self._grams[name], own)
                self._counts[name] -= len(own)
                if name in self._running:
                    self._running[name].add(own, -self._asked[name][1])
        for entry, requests in self._places(facts).items():
            self._replaced[entry] |= requests
        for fact in facts:
            self._facts.pop(fact, None)


def _without_keys(gram: Tensor, own: Tensor) -> Tensor:
    """Return a Gram matrix without some of its keys: exactly zero, and no rounding, if they are all of its keys.

    What rounding leaves would span arbitrary directions, in which an infinite weight lets nothing be changed.
    """
    rest = gram - own.T @ own
    return torch.zeros_like(gram) if rest.trace() <= SPANNED * gram.trace() else rest


def facts_of(request: EditRequest) -> tuple[str, ...]:
    """Return short keys of the questions that are to get the target."""
    return tuple(dict.fromkeys(question.key[:_KEY] for question in edited_questions(request)))


def _edited_facts(entry: HistoryEntry) -> dict[int, list[str]]:
    """The keys of the questions of each request that was edited."""
    return {
        index: str(request.get(FACTS, "")).split()
        for index, request in enumerate(entry.requests)
        if request.get("status", EDITED) in (EDITED, NOT_GENERATED)
    }


def _keys(delta: Delta, name: str, is_counted: Callable[[int], bool]) -> Tensor:
    """The keys (n, width), float64, in a delta whose requests count."""
    change = delta.changes[name]
    return change.keys[[is_counted(owner) for owner in change.owners.tolist()]].double()
