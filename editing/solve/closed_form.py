"""How every closed-form editor works: keys, wanted values, one solve per layer, a delta; the model stays as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from ...data.facts import EditRequest, Question
from ...models import ModelError, Projection, Site, VisionLanguageModel
from ..changes import Delta, WeightChange
from ..errors import EditError
from ..moments import Moments
from ..requests import answers_where_finite, edited_questions, request_text, room_for_targets
from ..values import Goals, Lookup, PlainGoal, ValueResult, ValueSettings, goals_of, lookups, search_values
from .cost import Cost, build_cost, null_space
from .problem import Rows, check_contradictions, reduced, solve

logger = logging.getLogger("multrace")
_ENOUGH = 0.5  # share of what a request asks for below which preserved keys leave it too little
_EDITED = "edited"
_NOTHING = "nothing to do"


class EditPlace(Protocol):
    """Anything that names a layer and a token to edit, such as the choice a causal trace makes."""

    @property
    def layer(self) -> int:
        """The layer whose projection is changed."""

    @property
    def token(self) -> str | int:
        """The name of a token group, or a position."""


@dataclass(frozen=True, kw_only=True)
class ClosedFormEditor(ValueSettings):
    """The settings that closed-form editors share: where to edit, and what a change of the weights costs.

    EditError for a setting out of range, or for both or neither of layer and where.
    """

    layer: int | None = None
    """The (last) layer that is changed, negative from the end; take it from a causal trace."""
    spread: int = 1
    """How many layers share the work, `layer` being the last of them (MEMIT); values then are whole layer outputs."""
    token: str | int = "last"
    """The token that is edited: a group name (its last position counts) or a position, the same in all contexts."""
    where: EditPlace | None = None
    """A choice of layer and token made elsewhere, in place of `layer` and `token`."""
    projection: Literal["mlp", "attention"] = "mlp"
    """Which weight is changed: the down projection of the MLP, or the output projection of attention."""
    weight: float = 1.0
    """Of each key in the least-squares problem, inf for exact."""
    preserve_weight: float = float("inf")
    """Of the keys of the requests' `preserve_prompts` prompts, inf for exact: how firmly their outputs stay."""
    earlier_weight: float | None = None
    """Of the keys of edits made before, in a sequence; None leaves them out."""
    ridge_fraction: float = 0.02
    """The ridge as a share of the mean squared key norm: that of one key differs by a factor of 25 between layers."""
    ridge: float | None = None
    """An absolute ridge in place of ridge_fraction."""
    moment_weight: float = 0.0
    """How many old keys the second moment of keys stands for; 0 does without one."""
    moment_kind: str = "all"
    """Which tokens' second moment: all, image, question, template or text."""
    null_threshold: float | None = None
    """Directions of the second moment above it are not touched, as a share of its mean eigenvalue; None touches all."""
    two_keys: bool = False
    """ROME: the direction of the change is the mean key over contexts, its size is set at the prompt's own key."""
    refined: bool = False
    """Factorise the second moment in float32 and refine, for devices with slow float64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if (self.layer is None) == (self.where is None):
            raise EditError(
                f"{name} got layer={self.layer} and where={self.where}; "
                "pass one of them: layer=5, or where=the site that a trace chose"
            )
        if self.ridge_fraction < 0 or (self.ridge is not None and self.ridge < 0):
            raise EditError(
                f"{name} got ridge_fraction={self.ridge_fraction} and ridge={self.ridge}; pass numbers of at least 0"
            )
        if self.spread < 1 or self.projection not in ("mlp", "attention"):
            raise EditError(
                f"{name} got spread={self.spread} and projection={self.projection!r}; "
                "pass a spread of at least 1, and 'mlp' or 'attention'"
            )
        for field in ("weight", "preserve_weight", "earlier_weight", "null_threshold"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise EditError(f"{name} got {field}={value}; pass a number above 0")

    @property
    def place(self) -> tuple[int, str | int]:
        """The (last) layer and the token to edit."""
        return (cast(int, self.layer), self.token) if self.where is None else (self.where.layer, self.where.token)

    @property
    def needs_moments(self) -> bool:
        """Whether its cost or its null space are made of second moments of keys."""
        return self.moment_weight > 0 or self.null_threshold is not None

    @property
    def has_fixed_cost(self) -> bool:
        """Whether `costs` saves work that would otherwise be done anew in each edit."""
        return self.needs_moments and not (self.moment_weight and self._ridge_is_relative)

    @property
    def _ridge_is_relative(self) -> bool:
        return self.ridge is None and self.ridge_fraction > 0

    def projections(self, vlm: VisionLanguageModel) -> dict[int, Projection]:
        """The projections that are changed by their layers (from 0), lowest first. EditError for layers not there."""
        last = self.place[0]
        find = vlm.down_projection if self.projection == "mlp" else vlm.attention_projection
        try:
            number = vlm.layer_index(last)
            found = {layer: find(layer) for layer in range(number - self.spread + 1, number + 1) if layer >= 0}
        except ModelError as error:
            raise EditError(f"cannot edit layer {last}: {error}") from error
        if len(found) < self.spread:
            raise EditError(f"{self.spread} layers up to layer {number} do not exist; pass a smaller spread")
        return found

    def costs(self, vlm: VisionLanguageModel, moments: Moments | None) -> dict[str, Cost]:
        """What a change of each weight costs, by parameter name, apart from a ridge that edits take from their keys.

        Factorises each second moment once: make them once and pass them to every `edit`. EditError without the moments
        that the settings need, or where a factorisation would depend on the keys of each edit (`has_fixed_cost`).
        """
        if self.moment_weight and self._ridge_is_relative:
            raise EditError(
                f"{type(self).__name__} adds a ridge from the keys of each edit (ridge_fraction={self.ridge_fraction}) "
                "to its second moment, so that no cost can be made before; pass an absolute ridge="
            )
        return {each.name: self.cost(layer, each, moments) for layer, each in self.projections(vlm).items()}

    def cost(self, layer: int, projection: Projection, moments: Moments | None, ridge: float | None = None) -> Cost:
        """The cost of one layer; ridge stands in for a relative one."""
        ridge = (self.ridge or 0.0) if ridge is None else ridge
        if not self.needs_moments:
            return build_cost(projection.width, ridge=ridge)
        if moments is None:
            raise EditError(
                f"{type(self).__name__} weighs old keys by their second moment, and none is given; "
                "collect them with second_moments(vlm, prompts) or `multrace moments`, or set moment_weight=0"
            )
        matrix = moments.matrix(layer, self.moment_kind)
        protected = None
        if self.null_threshold is not None:
            protected = null_space(matrix, self.null_threshold * matrix.diagonal().mean().item())
        kept = {"moment": matrix, "moment_weight": self.moment_weight} if self.moment_weight else {}
        return build_cost(projection.width, ridge=ridge, protected=protected, refined=self.refined, **kept)

    def edit(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        *,
        moments: Moments | None = None,
        costs: Mapping[str, Cost] | None = None,
        earlier: Sequence[Delta] = (),
        progress: bool = True,
    ) -> Delta:
        """Return the change after which the model answers each request's prompts with its target.

        The model is left unchanged; `Delta.applied` puts the change into it. `Delta.requests` says what became of each
        request: "edited", "nothing to do" if the model gives the target already, or "failed: ..." if its value search
        left the finite numbers, while the others go on. A target that the model does not say even with its value, and
        keys that cannot be told apart, are logged as warnings.

        Args:
            vlm: The model to edit.
            requests: The facts to write, all in one solve.
            moments: Second moments of keys, for editors that weigh old keys by them.
            costs: The factorised costs that `costs` made of the moments, to share them between edits.
            earlier: Edits that are in the model now, whose keys are preserved with `earlier_weight`.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, a layer or token does not exist, contexts disagree, requests contradict
                each other, moments are missing, or every request fails.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "Who won?")
            >>> request = mt.EditRequest(question=prompt, target="Pruro")
            >>> delta = mt.MultEdit(layer=5).edit(vlm, [request], progress=False)
            >>> with delta.applied(vlm):
            ...     vlm.answers([prompt])
            ['Pruro']
        """
        requests = tuple(requests)
        if not requests:
            raise EditError("no requests to edit; pass at least one EditRequest")
        with vlm.gradients():
            return _Work(self, vlm, requests, progress=progress).run(moments, costs, earlier)

    def as_text(self) -> dict[str, str]:
        """The settings as text, for the header of a saved edit."""
        layer, token = self.place
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "where"}
        settings |= {"editor": type(self).__name__, "layer": layer, "token": token}
        return {name: str(value) for name, value in settings.items()}


class _Work:
    """One edit under way."""

    def __init__(
        self,
        editor: ClosedFormEditor,
        vlm: VisionLanguageModel,
        requests: tuple[EditRequest, ...],
        *,
        progress: bool,
    ) -> None:
        self.editor, self.vlm, self.requests, self.progress = editor, vlm, requests, progress
        self.projections = editor.projections(vlm)
        self.last, self.token = max(self.projections), editor.place[1]
        self.statuses = [_EDITED for _ in requests]
        self.results: list[ValueResult] = []
        self.goals: list[PlainGoal] = []
        self.owners: list[int] = []
        self.relaxed: set[str] = set()

    @property
    def value_place(self) -> Projection | Site:
        """Where the wanted value is put: the output of the one projection, or of the last of several layers."""
        return self.projections[self.last] if len(self.projections) == 1 else Site("hidden", self.last)

    def run(self, moments: Moments | None, costs: Mapping[str, Cost] | None, earlier: Sequence[Delta]) -> Delta:
        if self.editor.needs_moments and moments is None and costs is None:
            self.editor.cost(self.last, self.projections[self.last], None)  # says what is missing, before any work
        fingerprints = self.vlm.fingerprint([each.name for each in self.projections.values()])
        self._choose()
        self._search()
        kept = self._kept_goals() if self.goals else []
        changes: dict[str, WeightChange] = {}
        with ExitStack() as stack:
            for layer, projection in self.projections.items():
                change = self._change(layer, kept, moments, costs, earlier)
                changes[projection.name] = change
                if layer < self.last and change.rank:
                    stack.enter_context(self._delta({projection.name: change}).applied(self.vlm))
        for name in sorted(self.relaxed):
            logger.warning(
                "the key of %s cannot be told apart from that of another; both are met as far as they agree", name
            )
        return self._delta(changes, fingerprints)

    def _choose(self) -> None:
        """Goals of the requests that have something to do. EditError if two of them contradict each other."""
        done = _answered(self.vlm, self.requests, self.progress)
        for index, request in enumerate(self.requests):
            if index in done:
                self.statuses[index] = _NOTHING
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
        results = search_values(self.vlm, Goals(self.vlm, self.goals), **search)
        for owner, result in zip(self.owners, results, strict=True):
            if result.failure:
                self.statuses[owner] = f"failed: {result.failure}"
        going = [index for index, owner in enumerate(self.owners) if self.statuses[owner] == _EDITED]
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

    def _change(
        self,
        layer: int,
        kept: Sequence[tuple[str, PlainGoal]],
        moments: Moments | None,
        costs: Mapping[str, Cost] | None,
        earlier: Sequence[Delta],
    ) -> WeightChange:
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
        if editor.earlier_weight is not None:
            before = [delta.changes[projection.name] for delta in earlier if projection.name in delta.changes]
            rows.add([("an earlier edit", each.keys) for each in before if each.rank], editor.earlier_weight)
        cost = self._cost(layer, rows, moments, costs)
        problem = rows.problem()
        solution = solve(cost, problem)
        self.relaxed |= set(solution.relaxed)
        owners = [owner for owner, each in zip(self.owners, found, strict=True) for _ in each.keys]
        change = reduced(solution, problem, len(owners), owners)
        self._check_shares(change, preserved)
        return change

    def _kept_lookups(self, kept: Sequence[tuple[str, PlainGoal]], layer: int) -> list[Lookup]:
        return self._lookups([goal for _, goal in kept], layer) if kept else []

    def _cost(self, layer: int, rows: Rows, moments: Moments | None, costs: Mapping[str, Cost] | None) -> Cost:
        relative = self.editor.ridge_fraction * rows.mean_square
        ridge = relative if self.editor.ridge is None else self.editor.ridge
        if costs is None:
            return self.editor.cost(layer, self.projections[layer], moments, ridge)
        made = costs[self.projections[layer].name]
        return made if made.ridge == ridge else replace(made, ridge=ridge)

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

    def _delta(self, changes: Mapping[str, WeightChange], fingerprints: Mapping[str, str] | None = None) -> Delta:
        prints = self.vlm.fingerprint(list(changes)) if fingerprints is None else fingerprints
        origin = {"model": self.vlm.name, "revision": self.vlm.revision, "settings": self.editor.as_text()}
        reports = tuple(self._report(index, final=fingerprints is not None) for index in range(len(self.requests)))
        return Delta(changes=changes, fingerprints=prints, requests=reports, **origin)

    def _report(self, index: int, *, final: bool) -> dict[str, str]:
        request, status = self.requests[index], self.statuses[index]
        report = {**request_text(request), "status": status}
        results = [each for owner, each in zip(self.owners, self.results, strict=True) if owner == index]
        if results:
            worst = min(results, key=lambda result: result.probability)
            report |= {"loss": f"{worst.loss:.6g}", "probability": f"{worst.probability:.6g}"}
            report["steps"] = str(max(result.steps for result in results))
            silent = [each for each in results if each.loss > self.editor.stop_loss and not each.says_target]
            if final and silent and self.editor.steps:
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
