"""One edit of a session under way: wanted values, what stays, and one solve per layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import Continuation, ExpertProjection, Projection, Site, VisionLanguageModel
from ..changes import Delta, EditSession, WeightChange, held, write
from ..requests import (
    EDITED,
    FAILED,
    NOTHING_TO_DO,
    EditError,
    answers_where_finite,
    continuations_where_finite,
    edited_questions,
    request_text,
    room_for_targets,
    says_target,
)
from ..siblings import SiblingSet
from ..values import (
    LONGEST_ANSWER,
    Goals,
    Lookup,
    PlainGoal,
    RequestValues,
    ValueResult,
    ending_of,
    ends_by_itself,
    goals_of,
    lookups,
    search_values,
)
from .anchor import anchor_report, anchored_result, norms_by_request, too_large
from .cost import Cost, StackedCost
from .earlier import FACTS, facts_of
from .kept import KeptFinder, KeptKeys, KeptQuestion, kept_weights, shares, warn_of_little
from .problem import Rows, Solution, changes_by_weight, check_contradictions, reduced, solve, unrouted
from .settings import ClosedFormSettings
from .shared import Shared

logger = logging.getLogger("multrace")
_ENOUGH = 0.5  # share of what a request asks for below which kept keys leave it too little
_ROOM = 4  # kept siblings take at most one direction in so many of those of a key


class EditUnderWay:
    """One edit under way."""

    def __init__(
        self,
        session: EditSession[Delta],
        shared: Shared,
        editor: ClosedFormSettings,
        requests: tuple[EditRequest, ...],
        *,
        progress: bool,
    ) -> None:
        self.session, self.shared, self.vlm = session, shared, session.vlm
        self.editor, self.requests, self.progress = editor, requests, progress
        self.projections = editor.projections(self.vlm)
        self.last, self.token = max(self.projections), editor.place[1]
        self.statuses = [EDITED for _ in requests]
        self.results: list[ValueResult] = []
        self.goals: list[PlainGoal] = []
        self.owners: list[int] = []
        self.finder = KeptFinder(self.vlm, editor, progress=progress)
        self.relaxed: set[str] = set()
        self.kept: dict[int, dict[str, float]] = {}
        """What is reported of each request's kept keys: the share left, their weight, the leak to others."""
        self.is_current = True
        """Whether the outputs in `results` are those of the model as it is now."""
        self.norms: dict[int, float] = {}
        """Request -> norm of its wanted output at the first key, where the editor has a norm anchor."""
        self.anchor: float | None = None

    @property
    def value_place(self) -> Projection | Site:
        """Where the wanted value is put: the output of the one projection, or of the last of several layers."""
        return self.projections[self.last] if len(self.projections) == 1 else Site("hidden", self.last)

    @property
    def place_name(self) -> str:
        """Name of the projection whose wanted outputs have an anchor, that of the last layer."""
        return self.projections[self.last].name

    def run(self, values: Sequence[RequestValues] | None = None) -> Delta:
        """Return the change that puts these values, or those of a new search, at the keys of the requests."""
        names = [name for each in self.projections.values() if len(each.slices) == 1 for name in each.slices]
        fingerprints = self.session.fingerprint(names)
        # outputs that were looked up before other edits of the session are not those of now
        self.is_current = values is None or not self.session.is_changed
        self._take(self.search(check=True) if values is None else values)
        if self.editor.norm_anchor is not None and self.goals:
            self._scale_to_anchor()
        kept = self._kept_questions() if self.goals else []
        changes: dict[str, WeightChange] = {}
        with ExitStack() as stack:
            for layer, projection in self.projections.items():
                own = changes_by_weight(projection, self._change(layer, kept))
                self.shared.check_limits(self.editor, own)
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
        present, done = _answered(self.vlm, self.requests, self.progress)
        endings = self._endings(present, done)
        own = {index: goals_of(self._searched(index), **ending) for index, ending in endings.items()}
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
            else _values_of(results.get(index), endings.get(index, {}))
            for index in range(len(self.requests))
        )

    def _endings(self, present: Sequence[Continuation | None], done: Set[int]) -> dict[int, dict[str, Any]]:
        """The ending of each request that is not done, and whether it has a key, as `goals_of` takes them."""
        todo = [index for index in range(len(self.requests)) if index not in done]
        if self.editor.ending != "own" or not todo:
            return {index: {} for index in todo}
        found = {index: ending_of(self.vlm, self.requests[index], present[index]) for index in todo}
        if not self.editor.answer_keys or not self.finder.is_last(self.requests[todo[0]].question):
            return {index: {"ending": ending} for index, ending in found.items()}
        firsts = [goals_of(self.requests[index], ending=ending)[0] for index, ending in found.items()]
        natural = ends_by_itself(self.vlm, Goals(self.vlm, firsts), self.token, rows_at_once=self.editor.rows_at_once)
        return {
            index: {} if itself else {"ending": ending, "ending_key": True}
            for (index, ending), itself in zip(found.items(), natural, strict=True)
        }

    def _unrouted(self, goals: Sequence[PlainGoal], owners: Sequence[int]) -> dict[int, str]:
        """The requests whose edited tokens do not all go to the one expert that is edited, and which do not."""
        projection = self.projections[self.last]
        if not isinstance(projection, ExpertProjection) or len(projection.slices) > 1 or not goals:
            return {}
        return unrouted(projection, zip(owners, self._lookups(goals, self.last), strict=True))

    def _take(self, values: Sequence[RequestValues]) -> None:
        """Take the goals with wanted values; requests whose search failed, or that have nothing to do, have none."""
        if len(values) != len(self.requests):
            raise EditError(f"{len(values)} values for {len(self.requests)} requests; pass one for each request")
        device = self.projections[self.last].device
        for index, own in enumerate(values):
            self.statuses[index] = own.status
            if own.status != EDITED:
                continue
            goals = goals_of(self.requests[index], ending=own.ending, ending_key=own.ending_key)
            if len(goals) != len(own.results):
                raise EditError(
                    f"{len(own.results)} values for the {len(goals)} goals of {self.requests[index].label}; search for "
                    "the values of this request again"
                )
            self.goals += goals
            self.owners += [index] * len(goals)
            self.results += own.on(device).results
        self._check_left()
        if len({self.requests[owner].target for owner in self.owners}) > 1:
            keys = [result.keys[0] for result in self.results]
            check_contradictions(keys, [self.requests[each] for each in self.owners])

    def _check_left(self) -> None:
        """Raises `EditError` if every request that has something to do failed."""
        if not self.goals and set(self.statuses) != {NOTHING_TO_DO}:
            reasons = [f"{each.label}: {status}" for each, status in zip(self.requests, self.statuses, strict=True)]
            raise EditError(f"no request could be edited; {'; '.join(dict.fromkeys(reasons))}")

    def wanted_norms(self, values: Sequence[RequestValues] | None) -> list[float]:
        """Return the norm of the wanted output at the first key of each request that has any."""
        self.is_current = values is None or not self.session.is_changed
        self._take(self.search() if values is None else values)
        if not self.goals:
            raise EditError("the model gives all targets already, so no norm can be measured; pass other requests")
        return [*norms_by_request(self._wanted_outputs(), self.owners).values()]

    def _wanted_outputs(self) -> list[Tensor]:
        """What the last projection is to put out at the keys of each goal, (key, hidden).

        Where the value is that of the whole layer, the projection has to give what it gives now and the change.
        """
        if len(self.projections) == 1:
            return [result.values for result in self.results]
        now = self._lookups(self.goals, self.last, self.projections[self.last])
        return [each.before + result.change for each, result in zip(now, self.results, strict=True)]

    def _scale_to_anchor(self) -> None:
        """Scale the wanted outputs to the norm anchor; a request that asks for far more than it fails."""
        outputs = self._wanted_outputs()
        self.norms = norms_by_request(outputs, self.owners)
        self.anchor = self.shared.anchors.of(self.editor, self.place_name)
        if self.anchor is None:
            return
        for owner, reason in too_large(outputs, self.owners, self.anchor).items():
            self.statuses[owner] = f"{FAILED}: {reason}"
        left = [number for number, owner in enumerate(self.owners) if self.statuses[owner] == EDITED]
        self.results = [anchored_result(self.results[number], outputs[number], self.anchor) for number in left]
        self.goals, self.owners = [self.goals[number] for number in left], [self.owners[number] for number in left]
        self._check_left()

    def _kept_questions(self) -> list[KeptQuestion]:
        """The questions whose outputs stay."""
        own = {owner: self.requests[owner] for owner in self.owners}
        keys = max(len(result.keys) for result in self.results)
        return self.finder.find(own, self._siblings, keys=keys)

    @cached_property
    def _siblings(self) -> dict[int, SiblingSet]:
        """The siblings of each request by its index; empty if the editor keeps none."""
        if self.editor.siblings is None:
            return {}
        room = self.projections[self.last].width // _ROOM
        return dict(enumerate(self.shared.siblings.find(self.requests, self.editor.siblings, room=room)))

    def _searched(self, index: int) -> EditRequest:
        """A request with the KL prompts of its value search: its own, or else other questions about its subject.

        Where the edited token is the last one, these questions have keys of their own, which are kept instead.
        """
        request = self.requests[index]
        if request.essence or not self._siblings or self.finder.is_last(request.question):
            return request
        return replace(request, essence=tuple(filter(self.finder.has_token, self._siblings[index].own)))

    def _lookups(self, goals: Sequence[PlainGoal], layer: int, at: Projection | None = None) -> list[Lookup]:
        projection = self.projections[layer]
        ends = {"end": self.editor.stops, "every": self.editor.answer_keys}
        rows = self.editor.rows_at_once
        place = self.value_place if at is None else at
        return lookups(self.vlm, Goals(self.vlm, goals), self.token, [(projection, place)], rows_at_once=rows, **ends)[
            projection
        ]

    def _change(self, layer: int, kept: Sequence[KeptQuestion]) -> WeightChange:
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
        keys = KeptKeys.of(kept, self._lookups([each.goal for each in kept], layer) if kept else [])
        kind = {"weight": editor.weight, "two_keys": editor.two_keys}
        rows = Rows.of([self.requests[owner].label for owner in self.owners], found, residuals, **kind)
        for part in (keys.asked, keys.siblings):
            rows.add(part, float("inf"))
        owners = [owner for owner, each in zip(self.owners, found, strict=True) for _ in each.keys]
        change = self._solved(layer, rows, owners, keys)
        for owner, share_left in shares(change).items():
            report = self.kept.setdefault(owner, {})
            report["share"] = min(share_left, float(report.get("share", 1.0)))
            report |= keys.leaks(change, owner)
        return change

    def _solved(self, layer: int, rows: Rows, owners: Sequence[int], keys: KeptKeys) -> WeightChange:
        """The change with the kept keys at their weights, or at the largest ones that leave requests enough."""
        weight = self.editor.preserve_weight
        asked, others = (sum(int(own.any(-1).sum()) for _, own in part) for part in (keys.asked, keys.siblings))
        tried = [(weight, weight)] if weight is not None else kept_weights(asked, others)
        for number, (of_asked, of_others) in enumerate(tried):
            weighted = rows.with_weights([of_asked] * asked + [of_others] * others)
            solution, change = self._solution(layer, weighted, owners)
            if number == len(tried) - 1 or self._leaves_enough(layer, rows, owners, change):
                break
        self.relaxed |= set(solution.relaxed)
        if number:
            logger.info(
                "what is to stay would leave a request too little: siblings are kept with the weight %g, and what was "
                "asked to be kept with the weight %g",
                *(of_others, of_asked),
            )
            for owner in set(owners):
                self.kept.setdefault(owner, {})["kept_weight"] = of_others if others else of_asked
        warn_of_little(change, keys, [request.label for request in self.requests], least=_ENOUGH)
        return change

    def _solution(self, layer: int, rows: Rows, owners: Sequence[int]) -> tuple[Solution, WeightChange]:
        problem = rows.problem()
        solution = solve(self._cost(layer, rows), problem)
        return solution, reduced(solution, problem, len(owners), owners)

    def _leaves_enough(self, layer: int, rows: Rows, owners: Sequence[int], change: WeightChange) -> bool:
        """Whether the kept keys leave each request at least half of what it would be given without them.

        What a large ridge or a large cost of old keys takes is no reason to keep less.
        """
        given = shares(change)
        if min(given.values(), default=1.0) >= _ENOUGH:
            return True
        free = shares(self._solution(layer, rows.own, owners)[1])
        return all(share >= _ENOUGH * free[owner] for owner, share in given.items())

    def _cost(self, layer: int, rows: Rows) -> Cost | StackedCost:
        editor, projection = self.editor, self.projections[layer]
        ridge = rows.ridge(editor.ridge_fraction) if editor.ridge is None else editor.ridge
        facts = {fact for owner in self.owners for fact in facts_of(self.requests[owner])}

        def of(single: Projection) -> Cost:
            cost = self.shared.cost(editor, layer, single, ridge)
            return self.shared.holding(cost, editor, single.name, facts)

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

    def _report(self, index: int) -> dict[str, str | float]:
        request, status = self.requests[index], self.statuses[index]
        report: dict[str, str | float] = {
            **request_text(request),
            FACTS: " ".join(facts_of(request)),
            "status": status,
            **self.kept.get(index, {}),
        }
        if self.statuses[index] == EDITED and index in self.norms:
            report |= anchor_report(self.place_name, self.norms[index], self.anchor)
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


def _values_of(results: Sequence[ValueResult] | None, ending: Mapping[str, Any]) -> RequestValues:
    """What a search says of one request; None: the model gives its target already."""
    if results is None:
        return RequestValues(status=NOTHING_TO_DO)
    failures = [result.failure for result in results if result.failure]
    if failures:
        return RequestValues(status=f"{FAILED}: {failures[-1]}")
    return RequestValues(status=EDITED, results=tuple(results), **ending)


def _answered(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], progress: bool
) -> tuple[list[Continuation | None], set[int]]:
    """What the model says now to each request's question, and the requests all of whose questions have their target."""
    longest = max(room_for_targets(vlm, requests), LONGEST_ANSWER)
    asked = [request.question for request in requests]
    found = continuations_where_finite(vlm, asked, max_new_tokens=longest, progress=progress)
    done = set()
    for index, (request, present) in enumerate(zip(requests, found, strict=True)):
        if present is None or not says_target(present.text, request.target):
            continue
        rest = edited_questions(request)[1:]
        answers = answers_where_finite(vlm, rest, max_new_tokens=longest, progress=False) if rest else []
        if all(answer is not None and says_target(answer, request.target) for answer in answers):
            done.add(index)
    return found, done


def _in_place(vlm: VisionLanguageModel, name: str, change: WeightChange) -> AbstractContextManager[VisionLanguageModel]:
    """A block in which the model has the change of one weight."""
    return held(vlm, lambda handle: handle.put_in([name], lambda: write(vlm, name, change)))
