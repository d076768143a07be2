"""Search by gradients for the outputs with which a layer states new facts, many facts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...artefacts import ArtefactError, load_fields, save_fields
from ...artefacts.files import digest
from ...models import Projection, VisionLanguageModel, patch
from ...models.replay.upper import PaddedBatch, UpperLayers
from ..requests import EditError
from .keys import (
    Goal,
    Goals,
    Lookup,
    Place,
    TargetBatch,
    chunks,
    end_ids,
    key_positions,
    prompt_end,
    split,
    target_batch,
    watched,
)

_SAME_RUN = {torch.float64: 1e-5, torch.float32: 2e-2}
"""Differences of log-probabilities, in shares of their size if that is above 1, that rounding can explain between a
padded batch and single prompts; half in half precision."""
_LIKELY = math.log(2)
"""Negative log-probability in nats of what is as probable as all else together."""
_LAYOUT, _BATCH_LAYOUT = "multrace values 2", "multrace batch of values 1"


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """Settings of the value search. Raises `EditError` for a setting out of range.

    ROME's code (arXiv 2202.05262) has v_lr, v_num_grad_steps, v_weight_decay, clamp_norm_factor, kl_factor.
    """

    learning_rate: float = 0.3
    """Learning rate of Adam."""
    steps: int = 200
    """Maximum number of steps; 0 leaves every output as it is."""
    stop_loss: float = 0.005
    """The search for a goal ends when its loss is at most this: the mean negative log-probability per target token in
    nats, with the penalty on the essence."""
    weight_decay: float = 1e-3
    """Weight of the penalty |change|^2 / |current output|^2."""
    squared_decay: bool = True
    """Whether |change| is squared in the penalty; it is not in the published ROME, MEMIT and MultEdit."""
    clamp: float | None = 10.0
    """Largest norm of a key's change, as a multiple of the current output's norm (ROME 4, MEMIT 0.75); None for any."""
    essence_weight: float = 0.0625
    """Weight of the penalty KL(edited || unedited), in nats, on the next token of a request's essence prompts."""
    ending: Literal["own", "stop", "none"] = "own"
    """What is asked for after the target: "own" what the model says after its present answer (its end of sequence, full
    stop or line end), with a key of its own only where the model would not say it after the target by itself; "stop"
    the end of sequence, with a key of its own; "none" nothing, as in the published methods."""
    answer_keys: bool = True
    """Whether an edit at the prompt's last token has a key at each answer position instead of at the first alone."""
    rows_at_once: int = 64
    """Number of prompts that are searched together; fewer need less memory."""

    def __post_init__(self) -> None:
        ranges = {
            "ending of 'own', 'stop' or 'none'": self.ending in ("own", "stop", "none"),
            "learning_rate above 0": self.learning_rate > 0,
            "steps of at least 0": self.steps >= 0,
            "weight_decay of at least 0": self.weight_decay >= 0,
            "essence_weight of at least 0": self.essence_weight >= 0,
            "clamp above 0, or None": self.clamp is None or self.clamp > 0,
            "rows_at_once of at least 1": self.rows_at_once >= 1,
        }
        for requirement, holds in ranges.items():
            if not holds:
                name = requirement.split()[0]
                raise EditError(f"{type(self).__name__} got {name}={getattr(self, name)!r}; pass {requirement}")

    @property
    def stops(self) -> bool:
        """Whether the end of sequence is asked for after every target."""
        return self.ending == "stop"


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueResult(Lookup):
    """The change of output found for one goal, and how well it works if an edit realises it in full."""

    change: Tensor
    """(key, hidden) float32, the change to add to the output, from the step with the lowest loss."""
    losses: tuple[float, ...]
    """Mean negative log-probability in nats per label and context, with the penalty on the essence, before each step
    and after the last. Of an ending that log 2 counts which it lacks to being more probable than all else together."""
    probability: float
    """Probability of the whole target (with what is to follow it) given the change: geometric mean over contexts."""
    token_probability: float
    """Geometric mean of the probabilities of the target's tokens given the change, over tokens and contexts."""
    says_target: bool
    """Whether every token of the target is the most probable one in its place, in all contexts, given the change."""
    failure: str = ""
    """Why there is no usable change; empty if there is one."""

    @property
    def values(self) -> Tensor:
        """(key, hidden), the wanted output."""
        return self.before + self.change

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return len(self.losses) - 1

    @property
    def loss(self) -> float:
        """The lowest loss, which is the loss of `change`."""
        return min(self.losses)


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestValues:
    """What the value search found for one request, so that the solve can be made later, with other requests."""

    status: str
    """"edited", "nothing to do" if the model gives the target already, or "failed: " and why."""
    results: tuple[ValueResult, ...] = ()
    """One result for each goal of the request; empty unless the status is "edited"."""
    ending: tuple[int, ...] = ()
    """Ids of what the model is to say after the target."""
    ending_key: bool = False
    """Whether the last token of the target has a key for the ending."""

    def save(self, path: str | Path) -> Path:
        """Write the values as a safetensors file and return the path."""
        return save_fields(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return values that `save` wrote, on the CPU. Raises `ArtefactError` for a missing or damaged file."""
        return load_fields(path, _LAYOUT, cls)

    def on(self, device: torch.device) -> Self:
        """Return the values on a device."""
        tensors = ("keys", "plain_keys", "before", "change")
        moved = [{name: getattr(result, name).to(device) for name in tensors} for result in self.results]
        results = tuple(replace(result, **own) for result, own in zip(self.results, moved, strict=True))
        return replace(self, results=results)


def search_values(
    vlm: VisionLanguageModel,
    goals: Sequence[Goal] | Goals,
    *,
    projection: Projection,
    place: Place,
    layer: int,
    token: str | int,
    settings: ValueSettings,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> list[ValueResult]:
    """Return for each goal the change of output with which the model answers with the goal's target.

    The same change per key is added in all contexts of a goal. The loss is the mean over contexts of the mean negative
    log-probability of all target tokens, plus the penalties on the essence and on the change. Goals do not influence
    each other: a batch gives what they give one by one. A goal whose loss stops being finite gets a `failure`, and the
    others go on. The model is left as it is; other threads wait for it.

    Args:
        vlm: The model.
        goals: What to search for: prompts that carry their target as answer.
        projection: The projection whose inputs are the keys.
        place: The projection or site to whose output the change is added.
        layer: The layer that holds both; layers below it are not run again.
        token: The token that is edited, as in `key_positions`.
        settings: The settings of the search.
        checkpoint: Path without suffix, after which the files of finished batches of goals are named: a later call with
            the same goals, settings and model takes their results from there (default: nothing is kept).
        progress: Whether to show a progress bar (default False).

    Returns:
        One `ValueResult` per goal, in order.

    Raises:
        EditError: For a token that a prompt lacks, or contexts of a goal that disagree on the number of target tokens;
            also if the model itself gives a target another probability than the search did.
        ModelError: If the model's attention has no gradients on this device.
        ArtefactError: If a file of the checkpoint cannot be written.

    Source: ROME, arXiv 2202.05262, equation 4.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> goal = Goal(prompts=(vlm.prompt(None, "What colour is this?", answer="Pruro"),))
        >>> projection = vlm.down_projection(4)
        >>> options = {"projection": projection, "place": projection, "layer": 4, "token": "last"}
        >>> (result,) = search_values(vlm, [goal], **options, settings=ValueSettings(steps=5))
        >>> result.loss < result.losses[0]
        True
    """
    results: dict[int, ValueResult] = {}
    number = vlm.layer_index(layer)
    model = "" if checkpoint is None else vlm.weights_digest(progress=progress)
    bar = tqdm(total=len(goals), desc=f"values at layer {number}", disable=not progress, leave=False)
    with vlm.gradients(), bar:
        for position, chunk in enumerate(chunks(goals, settings.rows_at_once)):
            search = _BatchSearch([goals[index] for index in chunk], projection, place, number, token, settings)
            if checkpoint is None:
                found = search.run(vlm, bar)
            else:
                found = search.resume(vlm, model, Path(f"{checkpoint}-{position}.safetensors"), bar)
            results.update(zip(chunk, found, strict=True))
    return [results[index] for index in range(len(goals))]


@dataclass(frozen=True, kw_only=True, eq=False)
class _KeptBatch:
    """The results of one batch of goals in a file of a checkpoint."""

    key: str
    """SHA-256 of all that the results depend on."""
    results: tuple[ValueResult, ...]


@dataclass(frozen=True, eq=False)
class _BatchSearch:
    """The search for one batch of goals; the fields are the arguments of `search_values`."""

    goals: Sequence[Goal]
    projection: Projection
    place: Place
    layer: int
    token: str | int
    settings: ValueSettings

    def run(self, vlm: VisionLanguageModel, bar: tqdm) -> list[ValueResult]:
        """Return one result per goal; the bar advances with each."""
        with torch.no_grad():
            options = {"end": self.settings.stops, "every": self.settings.answer_keys}
            batch = target_batch(vlm, self.goals, self.token, **options)
            inputs = PaddedBatch.after_prefix(vlm, batch.entering, batch.start)
            with watched(vlm, [(self.projection, self.place)]) as captured:
                upper, logits = UpperLayers.record(vlm, inputs, batch.label_columns, first=self.layer)
            lookups = split(batch, *captured(self.projection, self.place))
            upper = upper.checked(logits, batch.label_mask)
        results = _Search(upper, batch, lookups, logits, self.place, self.settings).run(bar)
        self.check_run(vlm, results)
        return results

    @torch.no_grad()
    def check_run(self, vlm: VisionLanguageModel, results: Sequence[ValueResult]) -> None:
        """Raise `EditError` if the model itself gives the first goal's target another probability than the search did.

        The changes are put into the model's own runs of the goal's prompts, one by one and whole.
        """
        number = next((index for index, result in enumerate(results) if not result.failure), None)
        if number is None:
            return
        goal, change, logs = self.goals[number], results[number].change, []
        ending = end_ids(vlm) if self.settings.stops else ()
        for prompt in goal.prompts:
            ends = bool(ending) or goal.ending_key
            where = key_positions(prompt, self.token, end=ends, every=self.settings.answer_keys)
            with patch(vlm, {self.place: partial(_moved, where=where, change=change)}):
                logits = vlm.logits(prompt)[0, prompt_end(prompt) - 1 :].double().log_softmax(-1)
            ids = (*prompt.answer_ids, *(ending or goal.ending))
            logs.append(logits[range(len(ids)), list(ids)].sum().item())
        least = math.log(torch.finfo(torch.float32).tiny)  # probabilities below this are 0 in the search
        own = max(sum(logs) / len(logs), least)
        believed = math.log(max(results[number].probability, math.exp(least)))
        if not abs(own - believed) <= _SAME_RUN.get(vlm.dtype, 0.5) * max(1.0, abs(believed)):
            raise EditError(
                f"the value search gives {goal.prompts[0].answer!r} the probability {math.exp(believed):.3g} after "
                f"{goal.prompts[0].question!r}, and the model itself gives it {math.exp(own):.3g} with the same "
                "change: the search does not run what the model runs, so nothing is edited; report this model"
            )

    def resume(self, vlm: VisionLanguageModel, model: str, path: Path, bar: tqdm) -> Sequence[ValueResult]:
        """Return the results that the file holds, or run the search and write them there.

        model: the digest of all weights.
        """
        key = self._key(model)
        try:
            kept = load_fields(path, _BATCH_LAYOUT, _KeptBatch) if path.is_file() else None
        except ArtefactError:  # damaged
            kept = None
        if kept is not None and kept.key == key:
            bar.update(len(kept.results))
            return kept.results
        results = tuple(self.run(vlm, bar))
        save_fields(path, _BATCH_LAYOUT, _KeptBatch(key=key, results=results))
        return results

    def _key(self, model: str) -> str:
        place = self.projection.name, self.place.name if isinstance(self.place, Projection) else self.place
        parts: list[str | Tensor] = [model, repr((self.settings, place, self.layer, self.token))]
        for goal in self.goals:
            for prompt in (*goal.prompts, *goal.essence):
                parts += [
                    repr((prompt.answer_ids, goal.ending, goal.ending_key, prompt.groups)),
                    *(prompt.inputs[name] for name in sorted(prompt.inputs)),
                ]
        return digest(*parts)


class _Search:
    """The search for the goals of one batch, all in step; the rows of goals that are done leave the batch."""

    def __init__(
        self,
        upper: UpperLayers,
        batch: TargetBatch,
        lookups: Sequence[Lookup],
        logits: Tensor,
        place: Place,
        settings: ValueSettings,
    ) -> None:
        self.upper, self.batch, self.lookups, self.place, self.settings = upper, batch, lookups, place, settings
        longest = batch.key_mask.shape[1]
        self.before = torch.stack([_filled(each.before, longest) for each in lookups])
        self.change = torch.zeros_like(self.before, requires_grad=True)
        self.best = self.change.detach().clone()
        self.losses: list[list[float]] = [[] for _ in lookups]
        self.likelihood = [0.0 for _ in lookups]
        self.says_target = [False for _ in lookups]
        self.is_first = torch.zeros(len(lookups), dtype=torch.bool)  # goals whose target is most probable right now
        self.failures = ["" for _ in lookups]
        self.active = torch.ones(len(lookups), dtype=torch.bool)
        self.scale = self.before.square().sum((1, 2)).clamp(min=torch.finfo(self.before.dtype).tiny)
        self.essence = logits[batch.essence.to(logits.device), 0].log_softmax(-1)
        first = [int(((batch.goals == goal) & ~batch.essence).nonzero()[0]) for goal in range(len(lookups))]
        self.labels = batch.label_mask[first].sum(-1).tolist()
        self.essence_of = batch.essence.cumsum(0) - 1  # the row of `essence` that belongs to a row of the batch

    @torch.enable_grad()
    def run(self, bar: tqdm) -> list[ValueResult]:
        """The results, one per goal in order; the bar advances by one for each goal that is done."""
        optimiser = torch.optim.Adam([self.change], lr=self.settings.learning_rate)
        remaining = torch.arange(len(self.batch.goals))  # rows of the first batch that are still in this one
        for step in range(self.settings.steps + 1):
            nll, wanting, essence = self._losses(remaining)
            self._note(wanting.detach() + essence.detach(), nll.detach(), step, bar)
            if not self.active.any() or step == self.settings.steps:
                break
            rows = self.active[self.batch.goals]
            loss = (wanting + essence + self._decay())[self.active.to(nll.device)].sum()
            (self.change.grad,) = torch.autograd.grad(loss, [self.change])
            self.change.grad[~self.active.to(self.change.device)] = 0
            optimiser.step()
            self._clamp()
            if 2 * int(rows.sum()) <= len(rows):
                index = rows.nonzero().flatten()
                self.upper, self.batch, remaining = self.upper.rows(index), self.batch.rows(index), remaining[index]
        bar.update(int(self.active.sum()))
        return [self._result(goal) for goal in range(len(self.lookups))]

    def _losses(self, remaining: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean negative log-probability, the part of it that is wanting, and penalty on the essence, (goal,) each.

        All are 0 for goals that left the batch. An ending that is more probable than all else together wants nothing.
        """
        batch = self.batch
        with patch(self.upper.vlm, {self.place: lambda output: _added(output, self.change, batch)}):
            logits = self.upper.logits()
        goals, bare = batch.goals.to(logits.device), batch.essence.to(logits.device)
        mask = batch.label_mask.to(logits)
        losses = cross_entropy(logits.flatten(0, 1), batch.labels.to(logits.device).flatten(), reduction="none")
        losses, counts = losses.view_as(mask) * mask, mask.sum(-1).clamp(min=1)
        wanting = torch.where(batch.ending_mask.to(mask.device), (losses - _LIKELY).relu(), losses)
        nll, wanting = (
            _mean_per_goal((each.sum(-1) / counts)[~bare], goals[~bare], len(self.lookups))
            for each in (losses, wanting)
        )
        missed = ((logits.argmax(-1) != batch.labels.to(logits.device)) & (mask > 0)).any(-1)
        self.is_first = _mean_per_goal(missed[~bare].float(), goals[~bare], len(self.lookups)).cpu() == 0
        if not bool(bare.any()):
            return nll, wanting, torch.zeros_like(nll)
        now = logits[bare, 0].log_softmax(-1)
        was = self.essence[self.essence_of[remaining][batch.essence].to(logits.device)]
        divergence = (now.exp() * (now - was)).sum(-1)
        return nll, wanting, self.settings.essence_weight * _mean_per_goal(divergence, goals[bare], len(self.lookups))

    def _decay(self) -> Tensor:
        squared = self.change.square().sum((1, 2))
        root = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()  # differentiable at zero, too
        return self.settings.weight_decay * (squared if self.settings.squared_decay else root) / self.scale

    @torch.no_grad()
    def _note(self, losses: Tensor, nll: Tensor, step: int, bar: tqdm) -> None:
        """Record the loss of each goal, its best change so far, and whether it is done."""
        for goal in self.active.nonzero().flatten().tolist():
            loss = losses[goal].item()
            if not torch.isfinite(losses[goal]):
                self.failures[goal] = (
                    f"the search left the finite numbers at step {step}; "
                    "lower learning_rate, or load a half-precision model in float32"
                )
            else:
                self.losses[goal].append(loss)
                if loss <= min(self.losses[goal]):
                    self.best[goal], self.likelihood[goal] = self.change[goal], -nll[goal].item()
                    self.says_target[goal] = bool(self.is_first[goal])
            if self.failures[goal] or loss <= self.settings.stop_loss:
                self.active[goal] = False
                self.change[goal] = torch.nan_to_num(self.best[goal])  # no trace of a failure in later steps
                bar.update()

    @torch.no_grad()
    def _clamp(self) -> None:
        """Shorten the change at each key to at most `clamp` times the norm of the current output there."""
        if self.settings.clamp is not None:
            allowed = self.settings.clamp * self.before.norm(dim=-1, keepdim=True)
            length = self.change.norm(dim=-1, keepdim=True)
            self.change.mul_(torch.where(length > allowed, allowed / length, 1.0))

    def _result(self, goal: int) -> ValueResult:
        lookup = self.lookups[goal]
        return ValueResult(
            keys=lookup.keys,
            plain_keys=lookup.plain_keys,
            before=lookup.before,
            change=self.best[goal, : len(lookup.keys)],
            losses=tuple(self.losses[goal]) or (float("inf"),),
            probability=torch.tensor(self.likelihood[goal] * self.labels[goal]).exp().item(),
            token_probability=torch.tensor(self.likelihood[goal]).exp().item(),
            says_target=self.says_target[goal],
            failure=self.failures[goal],
        )


def _moved(output: Tensor, *, where: Sequence[int], change: Tensor) -> Tensor:
    """Return the output (1, token, hidden) with a change (key, hidden) added at some positions."""
    moved = output.clone()
    moved[:, list(where)] += change[: len(where)].to(moved)
    return moved


def _added(output: Tensor, change: Tensor, batch: TargetBatch) -> Tensor:
    """A copy of a place's output (row, column, hidden) with each goal's change added at its key columns."""
    device = output.device
    rows = torch.arange(len(output), device=device)[:, None]
    changes = change.to(device)[batch.goals.to(device)][:, : batch.key_columns.shape[1]]
    changes = changes * batch.key_mask.to(changes)[..., None]
    return output.index_put((rows, batch.key_columns.to(device)), changes.to(output.dtype), accumulate=True)


def _mean_per_goal(values: Tensor, goals: Tensor, count: int) -> Tensor:
    """The mean over each goal's rows, (goal,); 0 for goals without rows."""
    sums = values.new_zeros(count).index_add(0, goals, values)
    return sums / torch.bincount(goals, minlength=count).clamp(min=1).to(sums)


def _filled(values: Tensor, length: int) -> Tensor:
    """The values with zeros after them, (length, hidden)."""
    return torch.cat([values, values.new_zeros(length - len(values), values.shape[1])])
