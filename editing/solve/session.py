"""A session of closed-form edits: keys, wanted values and one solve per layer for each edit, and what edits share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...data.facts import EditRequest, Question
from ...models import Projection, Site, VisionLanguageModel
from ...models.guards import uninterrupted
from ..changes import AppliedDelta, Delta, EditSession, History, HistoryEntry, WeightChange, held, write
from ..moments import Moments
from ..requests import (
    EDITED,
    NOT_GENERATED,
    NOTHING_TO_DO,
    EditError,
    answers_where_finite,
    edited_questions,
    request_text,
    room_for_targets,
)
from ..values import Goals, Lookup, PlainGoal, ValueResult, goals_of, lookups, search_values
from .cost import Cost
from .problem import Rows, check_contradictions, reduced, solve
from .settings import ClosedFormSettings

logger = logging.getLogger("multrace")
_ENOUGH = 0.5  # share of what a request asks for below which preserved keys leave it too little
_KEY = 32  # digits of a question's key
_FACTS = "facts"
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
        self._grams: dict[str, Tensor] = {}
        """(width, width) float64 by parameter name, on the device of the weight."""
        self._entries: dict[str, HistoryEntry] = {}
        self._replaced: dict[str, set[int]] = {}
        """Requests of each edit whose facts were edited again, or that were taken out of the history."""
        self._facts: dict[str, set[tuple[str, int]]] = {}
        """Key of a question -> the edits and requests that gave it its target."""

    def follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        """Add an edit that is now in the model, in place of earlier edits of the same facts.

        delta: the edit itself, if it need not be read from its file.
        """
        edited = {index: facts for index, facts in _edited_facts(entry).items() if index not in entry.gone}
        self._replace({fact for facts in edited.values() for fact in facts})
        self._entries[entry.name], self._replaced[entry.name] = entry, set(entry.gone)
        for index, facts in edited.items():
            for fact in facts:
                self._facts.setdefault(fact, set()).add((entry.name, index))
        for weight in self._grams.keys() & entry.fingerprints.keys():
            self._grams[weight] += self._of_entry(entry.name, weight, like=self._grams[weight], delta=delta)

    def gram(self, weight: Tensor, name: str, facts: Set[str]) -> Tensor | None:
        """Return the matrix of a weight without the keys of these facts, which are edited again; None for no keys."""
        touching = [entry.name for entry in self._entries.values() if name in entry.fingerprints]
        if not touching:
            return None
        if name not in self._grams:
            width = self._entries[touching[0]].delta.changes[name].shape[1]
            self._grams[name] = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
            for entry in touching:
                self._grams[name] += self._of_entry(entry, name, like=self._grams[name])
        gram = self._grams[name]
        for entry, requests in self._places(facts).items():
            if name in self._entries[entry].fingerprints:
                gram = gram - _gram(self._entries[entry].delta, name, lambda owner, own=requests: owner in own).to(gram)
        return gram

    def _of_entry(self, entry: str, name: str, *, like: Tensor, delta: Delta | None = None) -> Tensor:
        replaced = self._replaced[entry]
        delta = self._entries[entry].delta if delta is None else delta
        return _gram(delta, name, lambda owner: owner not in replaced).to(like)

    def _places(self, facts: Set[str]) -> dict[str, set[int]]:
        """The edits and their requests that gave these facts the targets that they have."""
        places: dict[str, set[int]] = {}
        for fact in facts:
            for entry, request in self._facts.get(fact, ()):
                places.setdefault(entry, set()).add(request)
        return {entry: requests - self._replaced[entry] for entry, requests in places.items()}

    def _replace(self, facts: Set[str]) -> None:
        for entry, requests in self._places(facts).items():
            for name in self._grams.keys() & self._entries[entry].fingerprints.keys():
                own = _gram(self._entries[entry].delta, name, lambda owner, own=requests: owner in own)
                self._grams[name] -= own.to(self._grams[name])
            self._replaced[entry] |= requests
        for fact in facts:
            self._facts.pop(fact, None)


class ClosedFormSession(EditSession[Delta]):
    """A session of closed-form edits. It holds what edits share, so that each costs the same.

    That is the factorised cost of each weight, the running Gram matrix of the keys of earlier edits
    (`EarlierKeys`), the hashes of the weights that it wrote, and the history, to which each edit is added.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        choose: Callable[[Sequence[EditRequest]], ClosedFormSettings],
        *,
        moments: Moments | None = None,
        history: History | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Prepare a session. choose: gives the editor of requests that are edited together."""
        super().__init__(vlm, self._made)
        self.checkpoint = checkpoint
        """The folder that keeps the values which were searched for, or None."""
        self.history = History() if history is None else history
        """The edits in effect, those of this session included."""
        self._choose, self._moments = choose, moments
        self._keys = EarlierKeys()
        self._costs: dict[tuple[object, ...], Cost] = {}

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> Delta:
        """As `EditSession.edit`; the edit is added to the history. Raises `EditError` too if that cannot be written."""
        handle = self._open_handle()
        delta = self.propose(requests, progress=progress)
        own = self._put_in(handle, delta)
        try:
            self.history = self.history.added(name or self._free_name(), delta, on_top=bool(self.history.names))
        except BaseException:
            uninterrupted(own.restore)
            raise
        self._keys.follow(self.history.entries[-1], delta)
        return delta

    def cost(self, editor: ClosedFormSettings, layer: int, projection: Projection, ridge: float) -> Cost:
        """Return the cost of a weight, factorised once for all edits that have the same ridge."""
        key = (projection.name, editor.moment_weight, editor.moment_kind, editor.null_threshold, editor.refined)
        cost = self._costs.get(key)
        if cost is None:
            cost = editor.cost(layer, projection, self._moments, ridge)
        elif cost.ridge != ridge:
            cost = replace(cost, ridge=ridge)
        self._costs[key] = cost
        return cost

    def holding(self, cost: Cost, editor: ClosedFormSettings, name: str, facts: Set[str]) -> Cost:
        """Return the cost of a weight with the outputs of earlier edits held, save for those of facts edited again."""
        if editor.earlier_weight is None:
            return cost
        gram = self._keys.gram(self.vlm.weight(name), name, facts)
        return cost if gram is None else cost.holding(gram, editor.earlier_weight)

    def _made(self, requests: tuple[EditRequest, ...], progress: bool) -> Delta:
        editor = self._choose(requests)
        editor.check_moments(self._moments)
        with self.vlm.gradients():
            return _Edit(self, editor, requests, progress=progress).run()

    def _begin(self, handle: AppliedDelta) -> None:
        if not self.history.names:
            return
        self.history.put_in(handle)
        for entry in self.history.entries:
            if entry.dropped is None:
                self._keys.follow(entry)

    def _end(self) -> None:
        super()._end()
        self._keys = EarlierKeys()

    def _free_name(self) -> str:
        taken = {entry.name for entry in self.history.entries}
        number = len(taken) + 1
        while str(number) in taken:
            number += 1
        return str(number)


class _Edit:
    """One edit under way."""

    def __init__(
        self,
        session: ClosedFormSession,
        editor: ClosedFormSettings,
        requests: tuple[EditRequest, ...],
        *,
        progress: bool,
    ) -> None:
        self.session, self.vlm = session, session.vlm
        self.editor, self.requests, self.progress = editor, requests, progress
        self.projections = editor.projections(self.vlm)
        self.last, self.token = max(self.projections), editor.place[1]
        self.statuses = [EDITED for _ in requests]
        self.results: list[ValueResult] = []
        self.goals: list[PlainGoal] = []
        self.owners: list[int] = []
        self.relaxed: set[str] = set()

    @property
    def value_place(self) -> Projection | Site:
        """Where the wanted value is put: the output of the one projection, or of the last of several layers."""
        return self.projections[self.last] if len(self.projections) == 1 else Site("hidden", self.last)

    def run(self) -> Delta:
        fingerprints = self.session.fingerprint([each.name for each in self.projections.values()])
        self._choose()
        self._search()
        kept = self._kept_goals() if self.goals else []
        changes: dict[str, WeightChange] = {}
        with ExitStack() as stack:
            for layer, projection in self.projections.items():
                changes[projection.name] = change = self._change(layer, kept)
                if layer < self.last and change.rank:
                    stack.enter_context(_in_place(self.vlm, projection.name, change))
        for name in sorted(self.relaxed):
            logger.warning(
                "the key of %s cannot be told apart from that of another; both are met as far as they agree", name
            )
        return Delta(
            changes=changes,
            fingerprints=fingerprints,
            model=self.vlm.name,
            revision=self.vlm.revision,
            settings=self.editor.as_text(),
            requests=tuple(map(self._report, range(len(self.requests)))),
        )

    def _choose(self) -> None:
        """Goals of the requests that have something to do. EditError if two of them contradict each other."""
        done = _answered(self.vlm, self.requests, self.progress)
        for index, request in enumerate(self.requests):
            if index in done:
                self.statuses[index] = NOTHING_TO_DO
                continue
            goals = goals_of(request)
            self.goals += goals
            self.owners += [index] * len(goals)
        if len({self.requests[owner].target for owner in self.owners}) > 1:
            found = self._lookups(self.goals, self.last)
            check_contradictions([each.keys[0] for each in found], [self.requests[each] for each in self.owners])

    def _search(self) -> None:
        """Wanted values; requests whose search failed are left out."""
        if not self.goals:
            return
        search = {"projection": self.projections[self.last], "place": self.value_place, "layer": self.last}
        search |= {"token": self.token, "settings": self.editor, "progress": self.progress}
        search["checkpoint"] = self.session.checkpoint
        results = search_values(self.vlm, Goals(self.vlm, self.goals), **search)
        for owner, result in zip(self.owners, results, strict=True):
            if result.failure:
                self.statuses[owner] = f"failed: {result.failure}"
        going = [index for index, owner in enumerate(self.owners) if self.statuses[owner] == EDITED]
        if not going:
            reasons = [f"{each.label}: {status}" for each, status in zip(self.requests, self.statuses, strict=True)]
            raise EditError(f"no request could be edited; {'; '.join(dict.fromkeys(reasons))}")
        self.goals, self.owners = [self.goals[each] for each in going], [self.owners[each] for each in going]
        self.results = [results[each] for each in going]

    def _kept_goals(self) -> list[tuple[str, PlainGoal]]:
        """The questions whose answers stay, each once, with the answers the model gives now."""
        questions: dict[str, Question] = {}
        for owner in dict.fromkeys(self.owners):
            questions |= {question.key: question for question in self.requests[owner].preserve_prompts}
        asked = list(questions.values())
        options = {"batch_size": self.editor.rows_at_once, "progress": self.progress}
        answers = answers_where_finite(self.vlm, asked, **options) if asked else []
        return [
            (f"{question.text!r} (kept as {answer!r})", PlainGoal(questions=(question,), target=answer or None))
            for question, answer in zip(asked, answers, strict=True)
        ]

    def _lookups(self, goals: Sequence[PlainGoal], layer: int) -> list[Lookup]:
        projection = self.projections[layer]
        ends = {"end": self.editor.end_of_answer, "every": self.editor.answer_keys}
        rows = self.editor.rows_at_once
        place = self.value_place
        return lookups(self.vlm, Goals(self.vlm, goals), self.token, [(projection, place)], rows_at_once=rows, **ends)[
            projection
        ]

    def _change(self, layer: int, kept: Sequence[tuple[str, PlainGoal]]) -> WeightChange:
        """The change of one layer's weight, given the model as it is with the layers below changed."""
        projection, editor = self.projections[layer], self.editor
        if not self.goals:
            sizes = {"left": (projection.hidden, 0), "right": (0, projection.width)}
            sizes |= {"keys": (0, projection.width), "residuals": (0, projection.hidden)}
            return WeightChange(**{part: torch.zeros(size) for part, size in sizes.items()})
        found = self.results if len(self.projections) == 1 else self._lookups(self.goals, layer)
        share = self.last - layer + 1
        residuals = [(wanted.values - now.before) / share for wanted, now in zip(self.results, found, strict=True)]
        preserved = [(name, each.keys) for (name, _), each in zip(kept, self._kept_lookups(kept, layer), strict=True)]
        kind = {"weight": editor.weight, "two_keys": editor.two_keys}
        rows = Rows.of([self.requests[owner].label for owner in self.owners], found, residuals, **kind)
        rows.add(preserved, editor.preserve_weight)
        cost = self._cost(layer, rows)
        problem = rows.problem()
        solution = solve(cost, problem)
        self.relaxed |= set(solution.relaxed)
        owners = [owner for owner, each in zip(self.owners, found, strict=True) for _ in each.keys]
        change = reduced(solution, problem, len(owners), owners)
        self._check_shares(change, preserved)
        return change

    def _kept_lookups(self, kept: Sequence[tuple[str, PlainGoal]], layer: int) -> list[Lookup]:
        return self._lookups([goal for _, goal in kept], layer) if kept else []

    def _cost(self, layer: int, rows: Rows) -> Cost:
        editor, projection = self.editor, self.projections[layer]
        ridge = editor.ridge_fraction * rows.mean_square if editor.ridge is None else editor.ridge
        cost = self.session.cost(editor, layer, projection, ridge)
        facts = {fact for owner in self.owners for fact in _facts_of(self.requests[owner])}
        return self.session.holding(cost, editor, projection.name, facts)

    def _check_shares(self, change: WeightChange, preserved: Sequence[tuple[str, Tensor]]) -> None:
        """Warns of requests that what is to stay leaves little room for, and names what is nearest."""
        if not preserved:
            return
        residuals = change.residuals.double()
        met = (change.moved(change.keys) * residuals).sum(-1)
        kept = torch.cat([keys for _, keys in preserved]).double().cpu()
        names = [name for name, keys in preserved for _ in keys]
        for owner in change.owners.unique().tolist():
            own = change.owners == owner
            asked = residuals[own].square().sum().item()
            if not asked or met[own].sum().item() >= _ENOUGH * asked:
                continue
            likeness = torch.nn.functional.cosine_similarity(change.keys[own].double()[:, None], kept[None], dim=-1)
            logger.warning(
                "only %.0f%% of what %s asks for is left by what is to stay; its key is nearest to that of %s; "
                "a later layer tells them apart better, or pass a finite preserve_weight",
                *(100 * met[own].sum().item() / asked, self.requests[owner].label, names[likeness.amax(0).argmax()]),
            )

    def _report(self, index: int) -> dict[str, str | float]:
        request, status = self.requests[index], self.statuses[index]
        report: dict[str, str | float] = {
            **request_text(request),
            _FACTS: " ".join(_facts_of(request)),
            "status": status,
        }
        results = [each for owner, each in zip(self.owners, self.results, strict=True) if owner == index]
        if results:
            worst = min(results, key=lambda result: result.probability)
            report |= {"loss": f"{worst.loss:.6g}", "probability": worst.probability}
            report["steps"] = str(max(result.steps for result in results))
            silent = [each for each in results if each.loss > self.editor.stop_loss and not each.says_target]
            if silent and self.editor.steps:
                logger.warning(
                    "even with the value that was found, the model does not say %r: after %d steps its tokens have a "
                    "mean probability of %.2g; more steps, another layer or another token may help",
                    *(request.target, silent[0].steps, silent[0].token_probability),
                )
        return report


def _answered(vlm: VisionLanguageModel, requests: Sequence[EditRequest], progress: bool) -> set[int]:
    """Indices of the requests all of whose prompts are answered with their targets already."""
    longest = room_for_targets(vlm, requests)
    asked = [request.question for request in requests]
    answers = answers_where_finite(vlm, asked, max_new_tokens=longest, progress=progress)
    equal = [index for index, request in enumerate(requests) if answers[index] == request.target.strip()]
    done = set(equal)
    for index in equal:
        rest = edited_questions(requests[index])[1:]
        if rest and set(answers_where_finite(vlm, rest, max_new_tokens=longest, progress=False)) != {
            requests[index].target.strip()
        }:
            done.discard(index)
    return done


def _in_place(vlm: VisionLanguageModel, name: str, change: WeightChange) -> AbstractContextManager[VisionLanguageModel]:
    """A block in which the model has the change of one weight."""
    return held(vlm, lambda handle: handle.put_in([name], lambda: write(vlm, name, change)))


def _facts_of(request: EditRequest) -> tuple[str, ...]:
    """Short keys of the questions that are to get the target."""
    return tuple(dict.fromkeys(question.key[:_KEY] for question in edited_questions(request)))


def _edited_facts(entry: HistoryEntry) -> dict[int, list[str]]:
    """The keys of the questions of each request that was edited."""
    return {
        index: str(request.get(_FACTS, "")).split()
        for index, request in enumerate(entry.requests)
        if request.get("status", EDITED) in (EDITED, NOT_GENERATED)
    }


def _gram(delta: Delta, name: str, is_counted: Callable[[int], bool]) -> Tensor:
    """K^T K (width, width) float64 of the keys in a delta whose requests count."""
    change = delta.changes[name]
    keys = change.keys[[is_counted(owner) for owner in change.owners.tolist()]].double()
    return keys.T @ keys
