"""Editors that write what one gradient step asks for, in a stream of edits with running normalisation.

One backward pass of the loss of the answers gives, at each token that predicts a token of an answer, what a weight
reads (h) and the gradient at what it writes (g). Both are normalised by their mean and deviation over the whole stream,
and the output is asked to change by v = -eta |h^|^2 g^. The change of the weight is that of the one least-squares
problem (`problem.py`) with the keys h as they are, the residuals v, weights of one and a ridge. Nothing is searched
for, and no subject or key position is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import ModelError, Projection, VisionLanguageModel
from ..changes import Delta, DeltaSession, History, WeightChange
from ..moments import MomentSource
from ..requests import (
    EDITED,
    FAILED,
    EditError,
    answers_where_finite,
    edited_questions,
    listed_requests,
    request_text,
    with_answers_seen,
)
from ..values import AnswerGradients, PlainGoal, answer_gradients
from .cost import build_cost
from .earlier import FACTS, facts_of
from .problem import Problem, check_contradictions, reduced, solve
from .stream import StreamStatistics, WeightStatistics

logger = logging.getLogger("multrace")
WARM_UP = "warm-up"
"""What became of a request of a step that only gathered statistics."""
Rows = Mapping[Projection, AnswerGradients]


@dataclass(frozen=True, kw_only=True)
class GradientEditor:
    """The settings that editors by one gradient step share. Raises `EditError` for a setting out of range.

    One call of a session's `edit` is one step of the stream. The statistics of the stream include the step itself, so
    that the first steps are normalised by little, and an edit of a single fact by its own tokens alone.
    """

    layers: tuple[int, ...]
    """The layers whose projections are changed, negative from the end."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The weight that is changed: "mlp" is the down projection of the MLP, "attention" the output projection."""
    step_size: float = 3.0
    """Norm of what is asked of outputs, on average over the stream and in sum over the layers, as a share of the root
    mean squared norm of the outputs of its first step: it means the same in every model and layer. 0 changes
    nothing."""
    learning_rate: float | None = None
    """The factor eta of the papers, in place of `step_size`; its meaning depends on the width of the model."""
    ridge_fraction: float = 0.02
    """The ridge as a share of the mean squared norm of the keys of a step."""
    ridge: float | None = None
    """The ridge in units of a squared key norm (alpha), in place of `ridge_fraction`."""
    preserve_weight: float = math.inf
    """Weight of the keys of `preserve_prompts`, whose outputs are to stay; inf keeps them exactly."""
    whitened: bool = False
    """Multiply gradients by the inverse root of their covariance, once the stream has more rows than they have
    entries, rather than divide each entry by its deviation."""
    warm_up: int = 0
    """Number of steps at the beginning of a stream that only gather statistics and change nothing."""
    end_of_answer: bool = True
    """Whether the model is also to end its answer after the target, if it has an end-of-sequence token."""
    batch_size: int = 16
    """Number of prompts that run together; it bounds memory and changes the result by rounding only."""

    def __post_init__(self) -> None:
        ranges = {
            "layers of at least one layer, each once": 0 < len(self.layers) == len(set(self.layers)),
            "projection 'mlp' or 'attention'": self.projection in ("mlp", "attention"),
            "step_size of at least 0": 0 <= self.step_size < math.inf,
            "learning_rate of at least 0, or None": self.learning_rate is None or 0 <= self.learning_rate < math.inf,
            "ridge_fraction of at least 0": 0 <= self.ridge_fraction < math.inf,
            "ridge of at least 0, or None": self.ridge is None or 0 <= self.ridge < math.inf,
            "preserve_weight above 0": self.preserve_weight > 0,
            "warm_up of at least 0": self.warm_up >= 0,
            "batch_size of at least 1": self.batch_size >= 1,
        }
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"{type(self).__name__} got {name}={getattr(self, name)!r}; pass {wanted}")

    def start(
        self,
        vlm: VisionLanguageModel,
        *,
        moments: MomentSource = None,
        history: History | None = None,
        statistics: StreamStatistics | None = None,
    ) -> GradientSession:
        """Return a session, in which each edit is a step of one stream and stays in effect.

        Args:
            vlm: The model to edit.
            moments: Accepted as by every editor, and not used.
            history: The edits that the session begins with, to which it adds its own; None for an empty one in memory.
            statistics: Those of the stream so far, `session.statistics` of an earlier session; None to begin anew. A
                history does not hold them.

        Raises:
            EditError: A layer does not exist, or the statistics are of other weights.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> requests = [
            ...     mt.EditRequest(question=mt.Question(text=text), target=target)
            ...     for text, target in {"Who won?": "Pruro", "Who lost?": "Draivo"}.items()
            ... ]
            >>> with mt.editing.UltraEdit(layers=(5,)).start(vlm) as session:
            ...     delta = session.edit(requests)
            ...     session.statistics, session.history.names
            (StreamStatistics(1 steps, 4 rows, 1 weights), ('1',))
        """
        return GradientSession(vlm, self, history=history, statistics=statistics)

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> Delta:
        """Return the change of one step for these requests; the model is left unchanged.

        Every question, context and rewrite prompt of a request asks for its target. A request that leaves the finite
        numbers is "failed: ..." in `Delta.requests`, and the others go on.

        Args:
            vlm: The model to edit.
            requests: The facts to write; a stream of one step is normalised by these alone.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, a layer does not exist, requests contradict each other, or all fail.
        """
        return self.start(vlm).propose(requests, progress=progress)

    def projections(self, vlm: VisionLanguageModel) -> tuple[Projection, ...]:
        """Return the projections that are changed, lowest first. Raises `EditError` for a layer that does not exist."""
        find = vlm.down_projection if self.projection == "mlp" else vlm.attention_projection
        try:
            numbers = sorted({vlm.layer_index(layer) for layer in self.layers})
            return tuple(find(number) for number in numbers)
        except ModelError as error:
            raise EditError(f"cannot edit layers {list(self.layers)}: {error}") from error

    def wanted(self, rows: AnswerGradients, statistics: WeightStatistics) -> Tensor:
        """Return the change of the output that is asked for at each row, (row, hidden) float64: -eta |h^|^2 g^."""
        inputs = statistics.inputs.normalised(rows.inputs)
        normalise = statistics.gradients.whitened if self.whitened else statistics.gradients.normalised
        rate = self.learning_rate
        if rate is None:  # of normalised rows the mean squared norms are their lengths
            share = self.step_size / len(self.layers)
            rate = share * math.sqrt(statistics.output_square / rows.outputs.shape[-1]) / inputs.shape[-1]
        return -rate * inputs.square().sum(-1, keepdim=True) * normalise(rows.gradients)

    def as_text(self) -> dict[str, str]:
        """Return the name of the editor and its settings as text, for the header of a saved edit."""
        return {"editor": type(self).__name__} | {each.name: str(getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class UltraEdit(GradientEditor):
    """UltraEdit (arXiv 2505.14679): one gradient step, normalised over the stream of edits, in closed form.

    Its code keeps one set of statistics for all weights of one shape; here each weight has its own.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path, world_records
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> records = world_records(world, world.edit_cases("outdated", "choose")[:8])
        >>> delta = mt.editing.UltraEdit(layers=(4, 5, 6)).edit(vlm, records, progress=False)
        >>> len(delta.changes), delta.settings["editor"]
        (3, 'UltraEdit')
    """

    @classmethod
    def paper(cls, *, layers: tuple[int, ...]) -> Self:
        """Return the published constants, which are for models of some 7B parameters.

        These are eta 1e-6 and a ridge of 1. Both are absolute, so that their meaning depends on the scale of a model.
        The published layers are 11 to 15 (gate projections) and 18 to 24 (up projections) of Llama-3-8B; here the
        projections of layers that write into the residual stream are changed.
        """
        return cls(layers=layers, learning_rate=1e-6, ridge=1.0, end_of_answer=False)


@dataclass(frozen=True, kw_only=True)
class StableEdit(GradientEditor):
    """StableEdit (ICML 2026): as `UltraEdit`, with gradients whitened by their covariance over the stream.

    Its code divides the scatter by n - hidden - 1 and holds eigenvalues at 1e-6; here the covariance has n - 1, and the
    floor is 1e-6 of the mean eigenvalue, since gradients have no natural unit. The covariance is (hidden, hidden) in
    float64 for each edited weight, and its eigenvectors are computed at each step. A stream needs many more rows than
    a gradient has entries before the covariance says more than noise.
    """

    whitened: bool = True

    @classmethod
    def paper(cls, *, layers: tuple[int, ...], warm_up: int = 20) -> Self:
        """Return the published constants, which are for models of some 7B parameters.

        These are eta 1e-6, a ridge of 10, and 20 steps that only gather statistics. The published down projections are
        those of layers 11, 12, 22, 23 and 28 to 30 of Llama-3-8B. Its code warms up on steps of training data that it
        also writes into the model; `GradientSession.gather` takes such data and writes nothing.
        """
        return cls(layers=layers, learning_rate=1e-6, ridge=10.0, warm_up=warm_up, end_of_answer=False)


GRADIENT_EDITORS: dict[str, type[UltraEdit | StableEdit]] = {"ultraedit": UltraEdit, "stableedit": StableEdit}
"""Editors by one gradient step by the names that commands take."""


class GradientSession(DeltaSession):
    """A session of edits by gradient steps. It holds the statistics of the stream."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        editor: GradientEditor,
        *,
        history: History | None = None,
        statistics: StreamStatistics | None = None,
    ) -> None:
        """Prepare a session; the arguments are those of `GradientEditor.start`."""
        super().__init__(vlm, self._made, history=history)
        self.editor, self.projections = editor, editor.projections(vlm)
        self.statistics = self._checked(statistics)
        """Those of the stream so far."""
        if self.history.names and statistics is None:
            logger.warning(
                "the session begins with %d edits of a history, and the statistics of its stream begin anew; pass "
                "statistics= from the session that made them",
                len(self.history.names),
            )

    def gather(self, requests: Sequence[EditRequest], *, progress: bool = False) -> StreamStatistics:
        """Return the statistics of the stream with these requests as a step that changes nothing, and go on with them.

        Args:
            requests: Facts like those to be written.
            progress: Show a progress bar.

        Raises:
            EditError: There are no requests, or none with finite numbers.
        """
        rows, _ = self._rows(listed_requests(requests), progress)
        self.statistics = self._with(rows)
        return self.statistics

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> Delta:
        """Return the change of the next step; it is in effect until the session ends, and is in the history.

        Args:
            requests: The facts to write.
            name: Name of the edit in the session's history; by default its number.
            progress: Show progress bars.

        Raises:
            EditError: As `GradientEditor.edit`, or if the history cannot be written. The model and the statistics are
                then as they were.
        """
        handle, requests = self._open_handle(), listed_requests(requests)
        rows, failures = self._rows(requests, progress)
        statistics = self._with(rows)
        delta = self._delta(requests, rows, failures, statistics, progress)
        delta = self._kept(handle, with_answers_seen(self.vlm, delta, requests), name)
        self.statistics = statistics
        return delta

    def adopt(self, requests: Sequence[EditRequest], change: Any) -> None:
        """As `EditSession.adopt`; the statistics are gathered again, from the model without the change."""
        rows, _ = self._rows(listed_requests(requests), progress=False)
        super().adopt(requests, change)
        self.statistics = self._with(rows)

    def _made(self, requests: tuple[EditRequest, ...], progress: bool) -> Delta:
        rows, failures = self._rows(requests, progress)
        return self._delta(requests, rows, failures, self._with(rows), progress)

    def _checked(self, statistics: StreamStatistics | None) -> StreamStatistics:
        """The statistics to begin with, on the devices of the weights."""
        editor = self.editor
        own = {
            each.name: WeightStatistics.empty(each.width, each.hidden, covariance=editor.whitened, device=each.device)
            for each in self.projections
        }
        if statistics is None:
            return StreamStatistics(weights=own)
        for projection in self.projections:
            given = statistics.weights.get(projection.name)
            if given is None or not given.fits(own[projection.name]):
                kind = "a covariance of gradients" if editor.whitened else "no covariance"
                raise EditError(
                    f"the statistics of the stream do not fit {projection.name} of '{self.vlm.name}' with {kind}; pass "
                    "those of a session with the same model and settings, or statistics=None to begin anew"
                )
            own[projection.name] = given.on(projection.device)
        return replace(statistics, weights=own)

    def _with(self, rows: Rows) -> StreamStatistics:
        """The statistics with the rows of one more step."""
        weights = {
            each.name: self.statistics.weights[each.name].added(own.inputs, own.gradients, own.outputs)
            for each, own in rows.items()
        }
        return StreamStatistics(steps=self.statistics.steps + 1, weights=weights)

    def _rows(self, requests: Sequence[EditRequest], progress: bool) -> tuple[Rows, set[int]]:
        """The rows of the requests, owned by their indices, and the requests whose numbers are not finite."""
        goals = [PlainGoal(questions=edited_questions(request), target=request.target) for request in requests]
        owners = torch.tensor([owner for owner, goal in enumerate(goals) for _ in goal.questions])
        found = {
            projection: replace(rows, owners=owners[rows.owners])
            for projection, rows in self._gradients(goals, progress).items()
        }
        failures: set[int] = set()
        for rows in found.values():
            finite = rows.losses.isfinite().cpu()
            for states in (rows.inputs, rows.gradients, rows.outputs):
                finite &= states.isfinite().all(-1).cpu()
            failures |= set(rows.owners[~finite].tolist())
        if len(failures) == len(requests):
            raise EditError(
                f"no request could be edited; the gradients of {requests[0].label} hold numbers that are not finite: "
                "load a half-precision model in float32"
            )
        kept = {each: ~torch.isin(rows.owners, torch.tensor([*failures])) for each, rows in found.items()}
        return {each: rows.only(kept[each]) for each, rows in found.items()}, failures

    def _gradients(self, goals: Sequence[PlainGoal], progress: bool) -> Rows:
        options = {"end": self.editor.end_of_answer, "rows_at_once": self.editor.batch_size}
        return answer_gradients(self.vlm, goals, self.projections, progress=progress, **options)

    def _delta(
        self,
        requests: Sequence[EditRequest],
        rows: Rows,
        failures: set[int],
        statistics: StreamStatistics,
        progress: bool,
    ) -> Delta:
        is_warm = statistics.steps > self.editor.warm_up
        if is_warm:
            self._check_contradictions(requests, rows[self.projections[-1]])
            kept = self._preserved([each for index, each in enumerate(requests) if index not in failures], progress)
            changes = {
                each.name: self._change(requests, own, statistics.weights[each.name], kept.get(each))
                for each, own in rows.items()
            }
        else:
            changes = {each.name: _no_change(each) for each in self.projections}
        return Delta(
            changes=changes,
            fingerprints=self.fingerprint(changes),
            model=self.vlm.name,
            revision=self.vlm.revision,
            settings=self.editor.as_text(),
            requests=_reports(requests, rows[self.projections[-1]], EDITED if is_warm else WARM_UP),
        )

    def _change(
        self,
        requests: Sequence[EditRequest],
        rows: AnswerGradients,
        statistics: WeightStatistics,
        kept: Tensor | None,
    ) -> WeightChange:
        """The change of one weight."""
        keys, editor, owners = rows.inputs.double(), self.editor, rows.owners.tolist()
        residuals, weights = editor.wanted(rows, statistics), keys.new_ones(len(keys))
        ridge = editor.ridge
        if ridge is None:
            ridge = editor.ridge_fraction * keys.square().sum(-1).mean().item()
        names = [requests[owner].label for owner in owners]
        if kept is not None:
            keys = torch.cat([keys, kept.double()])
            residuals = torch.cat([residuals, residuals.new_zeros(len(kept), residuals.shape[1])])
            weights = torch.cat([weights, weights.new_full((len(kept),), editor.preserve_weight)])
            names += ["a prompt whose answer stays"] * len(kept)
        problem = Problem(keys=keys, residuals=residuals, weights=weights, names=tuple(names))
        solution = solve(build_cost(keys.shape[1], ridge=ridge), problem)
        return reduced(solution, problem, len(owners), owners)

    def _preserved(self, requests: Sequence[EditRequest], progress: bool) -> dict[Projection, Tensor]:
        """Keys where the answers are predicted that the model gives now to questions whose answers stay."""
        asked = [*{each.key: each for request in requests for each in request.preserve_prompts}.values()]
        if not asked:
            return {}
        answers = answers_where_finite(self.vlm, asked, batch_size=self.editor.batch_size, progress=progress)
        goals = [
            PlainGoal(questions=(each,), target=answer) for each, answer in zip(asked, answers, strict=True) if answer
        ]
        if not goals:
            return {}
        return {each: rows.inputs for each, rows in self._gradients(goals, progress).items()}

    def _check_contradictions(self, requests: Sequence[EditRequest], rows: AnswerGradients) -> None:
        """Raise `EditError` if two requests want different answers where the last of the weights reads the same."""
        owners = rows.owners.tolist()
        edited = sorted(set(owners))
        if len({requests[owner].target for owner in edited}) > 1:
            keys = [rows.inputs[owners.index(owner)] for owner in edited]
            check_contradictions(keys, [requests[owner] for owner in edited])


def _no_change(projection: Projection) -> WeightChange:
    sizes = {"left": (projection.hidden, 0), "right": (0, projection.width)}
    sizes |= {"keys": (0, projection.width), "residuals": (0, projection.hidden)}
    return WeightChange(**{part: torch.zeros(size) for part, size in sizes.items()})


def _reports(requests: Sequence[EditRequest], rows: AnswerGradients, status: str) -> tuple[dict[str, str | float], ...]:
    """Each request as text, with its status and its loss before the edit in nats per label."""
    losses = rows.losses.double().cpu()
    reports: list[dict[str, str | float]] = []
    for index, request in enumerate(requests):
        own = losses[rows.owners == index]
        report: dict[str, str | float] = {**request_text(request), FACTS: " ".join(facts_of(request))}
        if len(own):
            report |= {"status": status, "loss before": f"{own.mean().item():.6g}"}
        else:
            report["status"] = f"{FAILED}: its gradients hold numbers that are not finite"
        reports.append(report)
    return tuple(reports)
