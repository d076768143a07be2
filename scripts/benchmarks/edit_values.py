"""The parts of an edit that need a model, the value search and second moments, with multrace and in the usual way.

The usual value search is that of the code of ROME and its descendants: prompt and target pass through the whole model,
with the vision tower, a hook adds the change to the output of the edited MLP, Adam takes a step, and the facts follow
one another. multrace searches all facts together and runs only what can change: the layers from the edited one up, on
the tokens from the edited one on. Early stopping is off, so both take the same number of steps.

Second moments are those of the inputs of all down projections: in one pass for all layers, and in one early-stopped
pass for each layer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...editing.moments import second_moments
from ...editing.values import Goal, ValueSettings, end_ids, key_positions, prompt_end, search_values
from ...models import Prompt, VisionLanguageModel, collate
from ...models.hooks import StopForward
from .machine import EditRow, TokenLayers, apart, counted_token_layers, now
from .models import Subject, prompt_template, prompt_words

_TARGET_WORDS = 2
"""Number of words of an answer; most answers have several tokens."""


def make_goals(subject: Subject, count: int) -> tuple[Goal, ...]:
    """Return `count` facts with one prompt each and answers of two tokens; all prompts have the length of the shape."""
    shape = subject.recipe.shape
    longer = replace(shape, after=shape.after + _TARGET_WORDS)
    goals = []
    for index in range(count):
        seed = subject.recipe.seed + 1 + index
        before, words = prompt_words(longer, seed=seed)
        question, target = words[:-_TARGET_WORDS], words[-_TARGET_WORDS:]
        prompt = subject.vlm.prompt(
            _noise(shape.image, seed),
            " ".join(question),
            constraint=" ".join(question[: shape.constraint]),
            answer=" ".join(target),
            template=prompt_template(shape, before),
        )
        goals.append(Goal(prompts=(prompt,)))
    return tuple(goals)


def make_prompts(subject: Subject, count: int) -> Sequence[Prompt]:
    """Return the prompts of `count` facts, without their answers."""
    return [goal.prompts[0].with_answer(None) for goal in make_goals(subject, count)]


def _noise(side: int, seed: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


MOMENT_TOLERANCE = 1e-5
"""Largest difference of the moments; both take products in float32 and sums in float64."""


@dataclass(frozen=True, kw_only=True)
class MomentCase:
    """A row of the table: second moments over a number of prompts."""

    needs_model: ClassVar[bool] = True

    label: str
    prompts: int
    batch_size: int

    def measure(self, subject: Subject) -> EditRow:
        """Return the row. The usual way runs half before multrace and half after, so that a busy machine slows both."""
        vlm, prompts = subject.vlm, make_prompts(subject, self.prompts)
        layers = range(vlm.layers)
        usual_moment(vlm, prompts[:1], layer=0, batch_size=1)  # the set-up of a first pass does not count
        usual, seconds = {}, 0.0
        with tqdm(total=2 * vlm.layers, desc=self.label, unit="layer", leave=False) as bar:
            with counted_token_layers(vlm) as work_usual:
                seconds += self._usual(vlm, prompts, layers[::2], usual, bar)
            with counted_token_layers(vlm) as work:
                started = now(vlm.device)
                moments = second_moments(vlm, prompts, batch_size=self.batch_size)
                mine = now(vlm.device) - started
            bar.update(vlm.layers)
            with counted_token_layers(vlm) as rest:
                seconds += self._usual(vlm, prompts, layers[1::2], usual, bar)
        differences = [
            apart(moments.matrix(layer), usual[layer], tolerance=MOMENT_TOLERANCE, label=f"{self.label}, layer {layer}")
            for layer in layers
        ]
        return EditRow(
            label=self.label,
            seconds=mine,
            seconds_usual=seconds,
            unit="token-layers",
            work=work.total,
            work_usual=work_usual.total + rest.total,
            difference=max(differences),
            tolerance=MOMENT_TOLERANCE,
            details={
                "layers": vlm.layers,
                "prompts": self.prompts,
                "tokens": moments.count(),
                "width": vlm.mlp,
                "seconds_per_layer": mine / vlm.layers,
                "seconds_per_layer_usual": seconds / vlm.layers,
            },
        )

    def _usual(
        self,
        vlm: VisionLanguageModel,
        prompts: Sequence[Prompt],
        layers: Sequence[int],
        found: dict[int, Tensor],
        bar: tqdm,
    ) -> float:
        """Return the seconds, and put the moments of these layers into `found`, on the CPU."""
        seconds = 0.0
        for layer in layers:
            started = now(vlm.device)
            moment = usual_moment(vlm, prompts, layer=layer, batch_size=self.batch_size)
            seconds += now(vlm.device) - started
            found[layer] = moment.cpu()
            bar.update()
        return seconds


@torch.no_grad()
def usual_moment(vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, layer: int, batch_size: int) -> Tensor:
    """Return the mean of k k^T (width, width) float64 over all tokens, by passes that end at this down projection.

    The statistics of ROME and MEMIT are collected in this way, one layer at a time (arXiv 2202.05262, 2210.07229).
    """
    projection = vlm.down_projection(layer)
    total = torch.zeros(projection.width, projection.width, dtype=torch.float64, device=projection.weight.device)
    count = 0
    for start in range(0, len(prompts), batch_size):
        inputs, _ = collate(prompts[start : start + batch_size], vlm.tokenizer)
        kept = inputs["attention_mask"].bool()

        def read(_module: nn.Module, arguments: tuple[Any, ...], kept: Tensor = kept) -> None:
            keys = arguments[0][kept.to(arguments[0].device)]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            total.add_(keys.T @ keys)
            raise StopForward

        handle = projection.module.register_forward_pre_hook(read)
        try:
            with suppress(StopForward):
                vlm.logits(inputs)
        finally:
            handle.remove()
        count += int(kept.sum())
    return total / count


TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.5, "float16": 0.5}
"""Largest difference of the changes by dtype: each step of Adam divides by the gradient, with its rounding."""


def search_settings(steps: int) -> ValueSettings:
    """Return the settings of both searches: a fixed number of steps, with the clamp of ROME and the default decay."""
    return ValueSettings(learning_rate=0.05, steps=steps, stop_loss=-1.0, clamp=4.0, ending="stop")


@dataclass(frozen=True, kw_only=True)
class ValueCase:
    """A row of the table: value searches at one place."""

    needs_model: ClassVar[bool] = True

    label: str
    layer: int
    token: str
    """A token group."""
    facts: int
    """Number of facts that multrace searches together."""
    timed_facts: int
    """Number of these facts that the usual way searches."""
    steps: int

    def measure(self, subject: Subject) -> EditRow:
        """Return the row. The usual way runs before and after multrace, so that a busy machine slows both."""
        vlm, settings, goals = subject.vlm, search_settings(self.steps), make_goals(subject, self.facts)
        self._usual(vlm, goals[:1], search_settings(1), None)  # the set-up of a first backward pass does not count
        early = (self.timed_facts + 1) // 2
        with tqdm(total=self.timed_facts + self.facts, desc=self.label, unit="fact", leave=False) as bar:
            usual = self._usual(vlm, goals[:early], settings, bar)
            ours = self._ours(vlm, goals, settings)
            bar.update(self.facts)
            usual += self._usual(vlm, goals[early : self.timed_facts], settings, bar)
        tolerance = TOLERANCE[str(vlm.dtype).removeprefix("torch.")]
        differences = [
            apart(mine, theirs.changes[0], tolerance=tolerance, label=f"{self.label}, fact {index}")
            for index, (mine, theirs) in enumerate(zip(ours.changes, usual, strict=False))
        ]
        work = self.facts * usual[0].work.total
        return EditRow(
            label=self.label,
            seconds=ours.seconds,
            seconds_usual=self.facts * median(each.seconds for each in usual),
            unit="token-layers",
            work=ours.work.total,
            work_usual=work,
            difference=max(differences),
            tolerance=tolerance,
            details={
                "layer": self.layer,
                "token": self.token,
                "facts": self.facts,
                "timed_facts": len(usual),
                "steps": self.steps,
                "seconds_per_fact": ours.seconds / self.facts,
                "seconds_per_fact_usual": median(each.seconds for each in usual),
                "forward": ours.work.forward,
                "backward": ours.work.backward,
                "forward_usual": self.facts * usual[0].work.forward,
                "backward_usual": self.facts * usual[0].work.backward,
                "loss_before": ours.losses[0],
                "loss_after": ours.losses[1],
            },
        )

    def _ours(self, vlm: VisionLanguageModel, goals: Sequence[Goal], settings: ValueSettings) -> _Searched:
        projection = vlm.down_projection(self.layer)
        place = {"projection": projection, "place": projection, "layer": self.layer, "token": self.token}
        with counted_token_layers(vlm) as work:
            started = now(vlm.device)
            results = search_values(vlm, goals, settings=settings, **place)
            seconds = now(vlm.device) - started
        losses = (results[0].losses[0], results[0].loss)
        return _Searched(changes=[each.change for each in results], losses=losses, seconds=seconds, work=work)

    def _usual(
        self, vlm: VisionLanguageModel, goals: Sequence[Goal], settings: ValueSettings, bar: tqdm | None
    ) -> list[_Searched]:
        """Return the searches of the facts, one by one."""
        found = []
        for goal in goals:
            with counted_token_layers(vlm) as work:
                started = now(vlm.device)
                change, losses = usual_search(vlm, goal.prompts[0], layer=self.layer, token=self.token, how=settings)
                seconds = now(vlm.device) - started
            found.append(_Searched(changes=[change], losses=(losses[0], min(losses)), seconds=seconds, work=work))
            if bar is not None:
                bar.update()
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Searched:
    """The searches of some facts in one way."""

    changes: Sequence[Tensor]
    """(key, hidden) of each fact."""
    losses: tuple[float, float]
    """The loss of the first fact before the first step, and its lowest loss."""
    seconds: float
    work: TokenLayers


@torch.enable_grad()
def usual_search(
    vlm: VisionLanguageModel, prompt: Prompt, *, layer: int, token: str, how: ValueSettings
) -> tuple[Tensor, list[float]]:
    """Return the best change (key, hidden) of the output of the MLP, and the loss before each step and after the last.

    The loss is that of `search_values`, for a fact without contexts or essence; `how.stop_loss` is ignored.

    Args:
        vlm: The model.
        prompt: The prompt, with the target as its answer.
        layer: The layer of the MLP.
        token: The token group at which its output changes.
        how: The settings of the search.
    """
    labels = torch.tensor([*prompt.answer_ids, *end_ids(vlm)], device=vlm.device)
    positions = list(key_positions(prompt, token))
    first = prompt_end(prompt) - 1
    dtype = torch.promote_types(vlm.dtype, torch.float32)
    adding = _Adding(positions, torch.zeros(len(positions), vlm.hidden, dtype=dtype, device=vlm.device))
    optimiser = torch.optim.Adam([adding.change], lr=how.learning_rate)
    losses: list[float] = []
    best = adding.change.detach().clone()
    with adding.to(vlm.down_projection(layer).module):
        for step in range(how.steps + 1):
            loss = cross_entropy(vlm.logits(prompt)[0, first : first + len(labels)], labels)
            losses.append(loss.item())
            if losses[-1] <= min(losses):
                best = adding.change.detach().clone()
            if step == how.steps:
                break
            decay = how.weight_decay * adding.change.square().sum() / adding.before.square().sum()
            optimiser.zero_grad()
            (loss + decay).backward()
            optimiser.step()
            adding.clamp(how.clamp)
    return best, losses


class _Adding:
    """A change that a hook adds to the output of a module at some positions, in a batch of one."""

    def __init__(self, positions: list[int], change: Tensor) -> None:
        self.positions, self.change = positions, change.requires_grad_()
        self.before = torch.empty(0, 0)

    @contextmanager
    def to(self, module: nn.Module) -> Iterator[None]:
        """Add the change to the output of this module inside the block."""
        handle = module.register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def clamp(self, most: float) -> None:
        """Shorten the change to at most this multiple of the norm of the unchanged output."""
        allowed = most * self.before.norm(dim=-1, keepdim=True)
        length = self.change.norm(dim=-1, keepdim=True)
        self.change.mul_(torch.where(length > allowed, allowed / length, 1.0))

    def _add(self, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        if not self.before.numel():
            self.before = output[0, self.positions].detach().to(self.change.dtype)
        changed = output.clone()
        changed[0, self.positions] = changed[0, self.positions] + self.change.to(output.dtype)
        return changed
