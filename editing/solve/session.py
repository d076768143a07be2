"""A session of closed-form edits: keys, wanted values and one solve per layer for each edit, and what edits share."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ...data.facts import EditRequest, Question
from ...models import ExpertProjection, Projection, Site, VisionLanguageModel
from ..changes import Delta, DeltaSession, History, HistoryEntry, WeightChange, held, write
from ..moments import Moments
from ..requests import (
    EDITED,
    FAILED,
    NOTHING_TO_DO,
    EditError,
    answers_where_finite,
    edited_questions,
    listed_requests,
    request_text,
    room_for_targets,
    with_answers_seen,
)
from ..values import (
    Goals,
    Lookup,
    PlainGoal,
    RequestValues,
    ValueResult,
    check_goals,
    goals_of,
    lookups,
    search_values,
)
from .cost import FACTS, Cost, EarlierKeys, StackedCost, facts_of
from .problem import Rows, check_contradictions, reduced, solve
from .settings import ClosedFormSettings

logger = logging.getLogger("multrace")
_ENOUGH = 0.5  # share of what a request asks for below which preserved keys leave it too little


class ClosedFormSession(DeltaSession):
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
    ) -> None:
        """Prepare a session. choose: gives the editor of requests that are edited together."""
        super().__init__(vlm, self._made, history=history)
        self._choose, self._moments = choose, moments
        self._keys = EarlierKeys()
        self._costs: dict[tuple[object, ...], Cost] = {}

    def search(
        self,
        requests: Sequence[EditRequest],
        *,
        check: bool = False,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> tuple[RequestValues, ...]:
        """Return what the value search finds for each request in the model as it is now.

        It is most of the work of an edit; `propose` and `edit` take its result as `values`.

        Args:
            requests: The facts to write.
            check: Look first whether requests contradict each other (default False).
            checkpoint: As in `search_values`: where finished batches are kept for a later call with the same model.
            progress: Show progress bars (default False).

        Raises:
            EditError: Requests contradict each other, a token does not exist in a prompt, or contexts disagree.
        """
        requests = listed_requests(requests)
        with self.vlm.gradients():
            edit = _Edit(self, self._choose(requests), requests, progress=progress)
            return edit.search(check=check, checkpoint=checkpoint)

    def check(self, request: EditRequest) -> None:
        """Raise the error that an edit of a request would raise because of its prompts, without running the model.

        A question whose answer is to stay needs as much room as the target, since its answer is not known yet.
        """
        editor = self._choose((request,))
        ends = {"end": editor.end_of_answer, "every": editor.answer_keys}
        kept = [PlainGoal(questions=(question,), target=request.target) for question in request.preserve_prompts]
        check_goals(self.vlm, Goals(self.vlm, [*goals_of(request), *kept]), editor.place[1], **ends)

    def propose(
        self,
        requests: Sequence[EditRequest],
        *,
        values: Sequence[RequestValues] | None = None,
        progress: bool = False,
    ) -> Delta:
        """Return the change that would make these edits in the model as it is now, and leave the model unchanged.

        Args:
            requests: The facts to write.
            values: What `search` found for each request; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, or no edit can be made.
        """
        requests = listed_requests(requests)
        return with_answers_seen(self.vlm, self._made(requests, progress, values), requests)

    def edit(
        self,
        requests: Sequence[EditRequest],
        *,
        name: str = "",
        values: Sequence[RequestValues] | None = None,
        progress: bool = False,
    ) -> Delta:
        """Return the change that makes these edits; it is in effect until the session ends, and is in the history.

        Args:
            requests: The facts to write.
            name: Name of the edit in the session's history; by default its number.
            values: What `search` found for each request; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: As `EditSession.edit`, or if the history cannot be written.
        """
        handle = self._open_handle()
        delta = self._kept(handle, self.propose(requests, values=values, progress=progress), name)
        _give_back_memory()
        return delta

    def adopt(self, requests: Sequence[EditRequest], change: Delta) -> None:
        """As `EditSession.adopt`; the edit is added to the history."""
        if self._choose(requests).earlier_weight is not None:
            for name, own in change.changes.items():
                if own.rank:  # a Gram matrix is made when it is first needed, and its bits depend on when that was
                    self._keys.gram(self.vlm.weight(name), name, set())
        super().adopt(requests, change)
        _give_back_memory()

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

    @property
    def is_changed(self) -> bool:
        """Whether the model has edits of this session at the moment."""
        return self._handle is not None and bool(self._handle.touched)

    def _made(
        self, requests: tuple[EditRequest, ...], progress: bool, values: Sequence[RequestValues] | None = None
    ) -> Delta:
        editor = self._choose(requests)
        editor.check_moments(self._moments)
        edit = _Edit(self, editor, requests, progress=progress)
        editor.check_moments(self._moments, edit.projections.values())
        with self.vlm.gradients():
            return edit.run(values)

    def _follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        self._keys.follow(entry, delta)

    def _end(self) -> None:
        super()._end()
        self._keys = EarlierKeys()


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
        self.is_current = True
        """Whether the outputs in `results` are those of the model as it is now."""

    @property
    def value_place(self) -> Projection | Site:
        """Where the wanted value is put: the output of the one projection, or of the last of several layers."""
        return self.projections[self.last] if len(self.projections) == 1 else Site("hidden", self.last)

    def run(self, values: Sequence[RequestValues] | None = None) -> Delta:
        """Return the change that puts these values, or those of a new search, at the keys of the requests."""
        names = [name for each in self.projections.values() if len(each.slices) == 1 for name in each.slices]
        fingerprints = self.session.fingerprint(names)
        # outputs that were looked up before other edits of the session are not those of now
        self.is_current = values is None or not self.session.is_changed
        self._take(self.search(check=True) if values is None else values)
        kept = self._kept_goals() if self.goals else []
        changes: dict[str, WeightChange] = {}
        with ExitStack() as stack:
            for layer, projection in self.projections.items():
                own = _by_weight(projection, self._change(layer, kept))
                changes |= own
                for name, change in own.items():
                    if layer < self.last and change.rank:
                        stack.enter_context(_in_place(self.vlm, name, change))
        fingerprints |= self.session.fingerprint([name for name in changes if name not in fingerprints])
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

    def search(self, *, check: bool = False, checkpoint: str | Path | None = None) -> tuple[RequestValues, ...]:
        """Return the wanted values of each request; the arguments are those of `ClosedFormSession.search`."""
        done = _answered(self.vlm, self.requests, self.progress)
        own = {index: goals_of(request) for index, request in enumerate(self.requests) if index not in done}
        goals = [goal for each in own.values() for goal in each]
        owners = [index for index, each in own.items() for _ in each]
        failures = self._unrouted(goals, owners)
        goals = [goal for goal, owner in zip(goals, owners, strict=True) if owner not in failures]
        owners = [owner for owner in owners if owner not in failures]
        if check and len({self.requests[owner].target for owner in owners}) > 1:
            found = self._lookups(goals, self.last)
            check_contradictions([each.keys[0] for each in found], [self.requests[each] for each in owners])
        results: dict[int, list[ValueResult]] = {}
        if goals:
            searched = search_values(
                self.vlm,
                Goals(self.vlm, goals),
                projection=self.projections[self.last],
                place=self.value_place,
                layer=self.last,
                token=self.token,
                settings=self.editor,
                checkpoint=checkpoint,
                progress=self.progress,
            )
            for owner, result in zip(owners, searched, strict=True):
                results.setdefault(owner, []).append(result)
        return tuple(
            RequestValues(status=f"{FAILED}: {failures[index]}")
            if index in failures
            else _values_of(results.get(index))
            for index in range(len(self.requests))
        )

    def _unrouted(self, goals: Sequence[PlainGoal], owners: Sequence[int]) -> dict[int, str]:
        """The requests whose edited tokens do not all go to the one expert that is edited, and which do not."""
        projection = self.projections[self.last]
        if not isinstance(projection, ExpertProjection) or len(projection.slices) > 1 or not goals:
            return {}
        reasons: dict[int, str] = {}
        for owner, lookup in zip(owners, self._lookups(goals, self.last), strict=True):
            if zeros := (~lookup.keys.any(-1)).nonzero().flatten().tolist():
                reasons[owner] = (
                    f"of the {len(lookup.keys)} edited tokens, number {', '.join(str(each + 1) for each in zeros)} is "
                    f"not routed to {projection}; pass expert='routed', or an expert of all these tokens "
                    "(vlm.routing shows them)"
                )
        return reasons

    def _take(self, values: Sequence[RequestValues]) -> None:
        """Take the goals with wanted values; requests whose search failed, or that have nothing to do, have none."""
        if len(values) != len(self.requests):
            raise EditError(f"{len(values)} values for {len(self.requests)} requests; pass one for each request")
        device = self.projections[self.last].device
        for index, own in enumerate(values):
            self.statuses[index] = own.status
            if own.status != EDITED:
                continue
            goals = goals_of(self.requests[index])
            if len(goals) != len(own.results):
                raise EditError(
                    f"{len(own.results)} values for the {len(goals)} goals of {self.requests[index].label}; search for "
                    "the values of this request again"
                )
            self.goals += goals
            self.owners += [index] * len(goals)
            self.results += own.on(device).results
        if not self.goals and set(self.statuses) != {NOTHING_TO_DO}:
            reasons = [f"{each.label}: {status}" for each, status in zip(self.requests, self.statuses, strict=True)]
            raise EditError(f"no request could be edited; {'; '.join(dict.fromkeys(reasons))}")
        if len({self.requests[owner].target for owner in self.owners}) > 1:
            keys = [result.keys[0] for result in self.results]
            check_contradictions(keys, [self.requests[each] for each in self.owners])

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
        is_known = len(self.projections) == 1 and self.is_current
        found = self.results if is_known else self._lookups(self.goals, layer)
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

    def _cost(self, layer: int, rows: Rows) -> Cost | StackedCost:
        editor, projection = self.editor, self.projections[layer]
        ridge = editor.ridge_fraction * rows.mean_square if editor.ridge is None else editor.ridge
        facts = {fact for owner in self.owners for fact in facts_of(self.requests[owner])}

        def of(single: Projection) -> Cost:
            cost = self.session.cost(editor, layer, single, ridge)
            return self.session.holding(cost, editor, single.name, facts)

        if len(projection.slices) == 1:
            return of(projection)
        experts = cast(ExpertProjection, projection).experts.numbers
        read = torch.stack([keys.any(0) for keys in rows.keys]).any(0)
        blocks = [
            (columns, of(self.vlm.expert_projection(layer, number)))
            for number, columns in zip(experts, projection.slices.values(), strict=True)
            if read[columns].any()
        ]
        return StackedCost(blocks=tuple(blocks))

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
            FACTS: " ".join(facts_of(request)),
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


def _by_weight(projection: Projection, change: WeightChange) -> dict[str, WeightChange]:
    """The change of each weight of a projection by name, with the keys that the weight reads.

    Several experts share what is asked for at a key: each is asked for what it adds, and for as much of what the ridge
    leaves undone as its part of the key's squared length.
    """
    if len(projection.slices) == 1:
        return {projection.name: change}
    undone = change.residuals.double() - change.moved(change.keys)
    squared = change.keys.double().square()
    changes: dict[str, WeightChange] = {}
    for name, columns in projection.slices.items():
        reads = change.right[:, columns].any(-1)
        if not reads.any() and (change.rank or changes):
            continue
        own = change.only(reads)
        own = replace(own, right=own.right[:, columns].contiguous(), keys=own.keys[:, columns].contiguous())
        share = squared[reads][:, columns].sum(-1, keepdim=True) / squared[reads].sum(-1, keepdim=True)
        changes[name] = replace(own, residuals=(own.moved(own.keys) + share * undone[reads]).float())
    return changes


def _values_of(results: Sequence[ValueResult] | None) -> RequestValues:
    """What a search says of one request; None: the model gives its target already."""
    if results is None:
        return RequestValues(status=NOTHING_TO_DO)
    failures = [result.failure for result in results if result.failure]
    if failures:
        return RequestValues(status=f"{FAILED}: {failures[-1]}")
    return RequestValues(status=EDITED, results=tuple(results))


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


def _give_back_memory() -> None:
    """Let the C library give the memory that an edit has freed back to the system, where it is glibc.

    Each edit makes matrices as wide as its keys are long. If they are of at most 32 MiB, glibc keeps what is freed for
    later, but the factors of the edit, which stay, may lie in between: the process would then grow by one such matrix
    with every edit.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _in_place(vlm: VisionLanguageModel, name: str, change: WeightChange) -> AbstractContextManager[VisionLanguageModel]:
    """A block in which the model has the change of one weight."""
    return held(vlm, lambda handle: handle.put_in([name], lambda: write(vlm, name, change)))
