"""Baselines that are trained on the targets by Adam: fine-tuning of one projection, and LoRA through PEFT."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...data.facts import EditRequest, Question, counted
from ...models import ModelError, Projection, VisionLanguageModel, collate
from ...models.guards import uninterrupted
from ..changes import AppliedDelta, Change, EditSession, History, held, overwrite, requests_line
from ..moments import Moments
from ..requests import EditError, edited_questions, listed_requests, request_text
from ..values import end_ids, prompt_end

_NO_LABEL = -100

Forward = Callable[..., Any]
"""A function from model inputs by keyword to the output of the model with its logits."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainedChange(ABC):
    """What training changed in a model, per weight; it is put only into the weights on which it was trained."""

    fingerprints: Mapping[str, str]
    """Hash of each touched weight before the change, per parameter name."""
    model: str
    """Name or path of the model that was trained."""
    revision: str | None = None
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str | float], ...]
    """For each request: what was asked, as text, and the loss that was reached, in nats per label."""
    losses: tuple[float, ...]
    """Mean negative log-probability in nats per label and prompt, before each step and after the last."""

    def __repr__(self) -> str:
        editor = self.settings.get("editor", "hand")
        line = f"{type(self).__name__} of {self.model!r} by {editor}: {counted(len(self.fingerprints), 'weight')}"
        return f"{line}, {counted(len(self.losses) - 1, 'step')}\n{requests_line(self.requests)}"

    @abstractmethod
    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, float32 in the layout in which the model stores it."""

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Sums are taken in float32 or wider and rounded once to the dtype of the weight. Raises `EditError`, with nothing
        changed, if the model lacks a weight, if a weight is not the one that was trained, or if it would overflow.
        """
        return held(vlm, self._put_in)

    def write(self, vlm: VisionLanguageModel) -> None:
        """Write the change into the model's weights; the caller holds the way back. Raises as `applied`."""
        overwrite(vlm, self._changed(vlm))

    def _put_in(self, handle: AppliedDelta) -> None:
        changed = self._changed(handle.vlm)
        handle.put_in(changed, lambda: overwrite(handle.vlm, changed))

    def _changed(self, vlm: VisionLanguageModel) -> dict[str, Tensor]:
        try:
            found = vlm.fingerprint(self.fingerprints)
        except ModelError as error:
            raise EditError(f"a change of '{self.model}' does not fit '{vlm.name}': {error}") from error
        changed = {}
        for name, wanted in self.fingerprints.items():
            if found[name] != wanted:
                raise EditError(
                    f"this change was trained on '{self.model}', where {name} has hash {wanted[:12]}; in '{vlm.name}' "
                    f"({vlm.dtype}) it has {found[name][:12]}: another model or precision, or an edit is applied; "
                    "go back to the weights that it was trained on, or train again on these"
                )
            changed[name] = summed(vlm.weight(name), self.difference(name))
            if not torch.isfinite(changed[name]).all():
                raise EditError(
                    f"the changed {name} overflows {changed[name].dtype}; train less, or load a half-precision model "
                    "in float32"
                )
        return changed


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ABC):
    """How something is trained on the targets. Raises `EditError` for a setting out of range."""

    steps: int = 25
    """Largest number of steps, each with the gradient of all requests; 0 changes nothing."""
    learning_rate: float = 5e-4
    """Learning rate of Adam."""
    stop_loss: float = 1e-2
    """Training ends when the mean negative log-probability per label, in nats, is at most this."""
    batch_size: int = 16
    """Number of prompts that run together; it bounds memory and does not change the result beyond rounding."""
    end_of_answer: bool = True
    """Whether the end-of-sequence token after the target is trained too, in models that have one."""

    def __post_init__(self) -> None:
        self._check(
            {
                "steps of at least 0": self.steps >= 0,
                "learning_rate above 0": 0 < self.learning_rate < math.inf,
                "stop_loss of at least 0": self.stop_loss >= 0,
                "batch_size of at least 1": self.batch_size >= 1,
            }
        )

    def start(
        self, vlm: VisionLanguageModel, *, moments: Moments | None = None, history: History | None = None
    ) -> EditSession:
        """Return a session, in which each change is trained on top of the earlier ones and stays in effect.

        moments: not needed. history: must be None, since a history holds the factors of closed-form edits alone; raises
        `EditError` otherwise.
        """
        check_no_history(self, history)
        return EditSession(vlm, lambda requests, progress: self.edit(vlm, requests, progress=progress))

    @abstractmethod
    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> Change:
        """Return the change after which the requests' questions get their targets; the model is left unchanged."""

    def as_text(self) -> dict[str, str]:
        """The editor's name and its settings, for reports."""
        settings = {field.name: str(getattr(self, field.name)) for field in fields(self)}
        return {"editor": type(self).__name__} | settings

    def _check(self, ranges: Mapping[str, bool]) -> None:
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"{type(self).__name__} got {name}={getattr(self, name)!r}; pass {wanted}")


def check_no_history(editor: object, history: History | None) -> None:
    """Raise `EditError` if there is a history, which cannot hold the changes of this editor."""
    if history is not None:
        raise EditError(
            f"a history holds the edits of closed-form editors, not those of {type(editor).__name__}; leave history out"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerBatch:
    """Prompts followed by their targets, padded on the right, and what has to be predicted in them."""

    inputs: Mapping[str, Tensor]
    """Model inputs, among them input_ids and attention_mask (row, token)."""
    labels: Tensor
    """(row, column) int64, the id that each of the last columns has to predict; -100 for no target."""
    owners: Tensor
    """(row,) int64, the index of the request that a row belongs to."""

    def losses(self, forward: Forward) -> Tensor:
        """Return the mean negative log-probability per label with the target fed in, in nats, (row,) float32."""
        logits = forward(**self.inputs, use_cache=False, logits_to_keep=self.labels.shape[1]).logits.float()
        labels = self.labels.to(logits.device)
        spread = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_NO_LABEL, reduction="none")
        return spread.sum(-1) / (labels != _NO_LABEL).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The course of a training."""

    losses: tuple[float, ...]
    """Mean negative log-probability in nats per label and prompt, before each step and after the last."""
    requests: tuple[float, ...]
    """Mean negative log-probability in nats per label of each request, after the last step."""

    @property
    def steps(self) -> int:
        """Number of steps that were taken."""
        return len(self.losses) - 1

    def reports(self, requests: Sequence[EditRequest]) -> tuple[dict[str, str], ...]:
        """Return what was asked and the loss that was reached, as text, one mapping per request."""
        return tuple(
            {**request_text(request), "status": "edited", "loss": f"{loss:.6g}", "steps": str(self.steps)}
            for request, loss in zip(requests, self.requests, strict=True)
        )


def answer_batches(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], settings: TrainingSettings
) -> tuple[AnswerBatch, ...]:
    """Return all prompts of the requests, contexts and rewrite prompts too, with their targets in batches.

    EditError for pictures that do not fit into one batch.
    """
    ending = end_ids(vlm) if settings.end_of_answer else ()
    rows = [
        (owner, question, request.target)
        for owner, request in enumerate(requests)
        for question in edited_questions(request)
    ]
    starts = range(0, len(rows), settings.batch_size)
    return tuple(_batch(vlm, rows[start : start + settings.batch_size], ending) for start in starts)


@torch.enable_grad()
def train(
    forward: Forward,
    batches: Sequence[AnswerBatch],
    parameters: Sequence[Tensor],
    *,
    settings: TrainingSettings,
    pull: Callable[[], Sequence[Tensor]] | None = None,
    bound: Callable[[], None] | None = None,
    progress: bool = False,
) -> Training:
    """Train parameters in place by Adam, and return how it went.

    The loss is the mean over prompts of the mean negative log-probability per label.

    Args:
        forward: The model as a function of its inputs, which has to depend on the parameters.
        batches: What has to be predicted.
        parameters: The tensors to train.
        settings: Number of steps, learning rate and so on.
        pull: Gives what is added to the gradient of each parameter in each step; None adds nothing.
        bound: Puts the parameters back into their bounds after each step; None for no bounds.
        progress: Show a progress bar.

    Raises:
        EditError: The loss stops being finite.
    """
    count = sum(len(batch.owners) for batch in batches)
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    losses: list[float] = []
    with tqdm(total=settings.steps, desc="training", disable=not progress, leave=False) as bar:
        for step in range(settings.steps + 1):
            optimiser.zero_grad()
            rows = []
            for batch in batches:
                found = batch.losses(forward)
                rows.append(found.detach().cpu())
                if step < settings.steps:
                    (found.sum() / count).backward(inputs=list(parameters))
            losses.append(torch.cat(rows).mean().item())
            if not math.isfinite(losses[-1]):
                raise EditError(
                    f"the training left the finite numbers at step {step}; "
                    "lower learning_rate, or load a half-precision model in float32"
                )
            if losses[-1] <= settings.stop_loss or step == settings.steps:
                break
            for parameter, added in zip(parameters, pull() if pull else (), strict=False):
                parameter.grad += added
            optimiser.step()
            if bound:
                bound()
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    owners = torch.cat([batch.owners for batch in batches])
    means = [torch.cat(rows)[owners == owner].mean().item() for owner in owners.unique()]
    return Training(losses=tuple(losses), requests=tuple(means))


def _batch(vlm: VisionLanguageModel, rows: Sequence[tuple[int, Question, str]], ending: tuple[int, ...]) -> AnswerBatch:
    """The batch of (owner, question, target) rows."""
    prompts = [vlm.prompt_for(question).with_answer(target) for _, question, target in rows]
    try:
        inputs, _ = collate(prompts, vlm.tokenizer, side="right")
    except ModelError as error:
        raise EditError(f"cannot train on these requests together: {error}") from error
    width = inputs["input_ids"].shape[1]
    labels = torch.full((len(prompts), width), _NO_LABEL)
    for row, prompt in zip(labels, prompts, strict=True):
        wanted = torch.tensor((*prompt.answer_ids, *ending))
        first = prompt_end(prompt) - 1
        row[first : first + len(wanted)] = wanted
    kept = min(prompt_end(prompt) for prompt in prompts) - 1
    return AnswerBatch(inputs=inputs, labels=labels[:, kept:], owners=torch.tensor([owner for owner, _, _ in rows]))


def summed(weight: Tensor, difference: Tensor) -> Tensor:
    """Return weight plus difference in the dtype and on the device of the weight; gradients reach the difference."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + difference.to(wide.device)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DenseChange(TrainedChange):
    """A change of whole weight matrices."""

    differences: Mapping[str, Tensor]
    """What is added to each parameter, float32 on the CPU, in the layout in which the model stores it."""

    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name."""
        return self.differences[name]


@dataclass(frozen=True, kw_only=True)
class FineTune(TrainingSettings):
    """Fine-tuning of one projection by Adam on the target tokens, as ROME and MEMIT use it as their baseline.

    Unlike theirs it trains the end of the answer too, and each step has the gradient of all requests. Raises
    `EditError` for a setting out of range.
    """

    layer: int
    """The layer whose projection is trained, negative from the end."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The weight that is trained: "mlp" is the down projection of the MLP, "attention" the output projection."""
    weight_decay: float = 0.0
    """Factor with which the weight itself is added to its gradient (the L2 penalty of Adam)."""
    entry_bound: float | None = None
    """Largest change of any entry of the weight, enforced after each step; None for no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            {
                "projection 'mlp' or 'attention'": self.projection in ("mlp", "attention"),
                "weight_decay of at least 0": self.weight_decay >= 0,
                "entry_bound above 0, or None": self.entry_bound is None or self.entry_bound > 0,
            }
        )

    @classmethod
    def paper(cls, *, layer: int = 1) -> Self:
        """Return unconstrained fine-tuning as published for GPT-2 XL (ROME, arXiv 2202.05262).

        Layer 1, 25 steps of Adam at 5e-4.

        Without end of the answer; the layer was found for that model and is no advice for another.
        """
        return cls(layer=layer, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False)

    @classmethod
    def constrained(cls, *, layer: int = 0, entry_bound: float = 5e-4) -> Self:
        """Return fine-tuning as published for GPT-2 XL, each entry within 5e-4 of what it was (5e-5 for GPT-J).

        Layer 0, 25 steps of Adam at 5e-4, without end of the answer (ROME, arXiv 2202.05262; MEMIT, arXiv 2210.07229).
        """
        return cls(
            layer=layer, entry_bound=entry_bound, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False
        )

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> DenseChange:
        """Return the change after which the questions, contexts and rewrite prompts of the requests get their targets.

        It is trained in float32 whatever the dtype of the model, which is left unchanged. Raises `EditError` for no
        requests, a layer that does not exist, pictures that do not fit into one batch, or a loss that stops being
        finite.
        """
        requests = listed_requests(requests)
        name = self._name(vlm)
        weight = vlm.weight(name)

        def forward(**inputs: Any) -> Any:
            return functional_call(vlm.model, {name: summed(weight, change)}, kwargs=inputs)

        with vlm.gradients():
            batches = answer_batches(vlm, requests, self)
            change = torch.zeros_like(weight, dtype=torch.float32, requires_grad=True)
            training = train(
                forward,
                batches,
                [change],
                settings=self,
                pull=lambda: [self.weight_decay * (weight.detach().float() + change.detach())],
                bound=lambda: self._bound(change),
                progress=progress,
            )
        return DenseChange(
            differences={name: change.detach().cpu()},
            fingerprints=vlm.fingerprint([name]),
            model=vlm.name,
            revision=vlm.revision,
            settings=self.as_text(),
            requests=training.reports(requests),
            losses=training.losses,
        )

    def _name(self, vlm: VisionLanguageModel) -> str:
        try:
            find = vlm.down_projection if self.projection == "mlp" else vlm.attention_projection
            return find(self.layer).name
        except ModelError as error:
            raise EditError(f"cannot fine-tune layer {self.layer}: {error}") from error

    @torch.no_grad()
    def _bound(self, change: Tensor) -> None:
        if self.entry_bound is not None:
            change.clamp_(-self.entry_bound, self.entry_bound)


_ADAPTER = "multrace"
_PROJECTIONS = ("mlp", "attention")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LowRankChange(TrainedChange):
    """A change of weights as trained low-rank factors."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """(left, right) per parameter name: float32 (hidden, rank) and (rank, width) on the CPU, oriented as in y = W x.
    The scale of the adapter is in left."""
    transposed: bool
    """Whether the model stores its weights as (width, hidden)."""

    def difference(self, name: str) -> Tensor:
        """Return left @ right of the parameter of this name, in the layout in which the model stores it."""
        left, right = self.factors[name]
        return (left @ right).T if self.transposed else left @ right


@dataclass(frozen=True, kw_only=True)
class Lora(TrainingSettings):
    """LoRA (arXiv 2106.09685) through PEFT, trained by Adam on the target tokens.

    By default the down projection and the output projection of attention of every decoder layer get adapters. Raises
    `EditError` for a setting out of range.
    """

    steps: int = 60
    """Largest number of steps, each with the gradient of all requests; 0 changes nothing."""
    learning_rate: float = 5e-3
    """Learning rate of Adam."""
    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 16.0
    """The product of an adapter is scaled by alpha / rank."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that get adapters, negative from the end; None for all."""
    projections: tuple[str, ...] = _PROJECTIONS
    """The projections that get adapters: "mlp" is the down projection of the MLP, "attention" the output projection."""
    seed: int = 0
    """Random seed of the initial adapters; the global generator is not touched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            {
                "rank of at least 1": self.rank >= 1,
                "alpha above 0": self.alpha > 0,
                "layers of at least one layer, or None": self.layers is None or len(self.layers) > 0,
                f"projections among {_PROJECTIONS}": len(self.projections) > 0
                and set(self.projections) <= set(_PROJECTIONS),
            }
        )

    def edit(
        self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True
    ) -> LowRankChange:
        """Return the change after which the questions, contexts and rewrite prompts of the requests get their targets.

        The adapters are float32 whatever the dtype of the model, which ends with the modules, flags and weights that it
        had, also after an error. Raises `EditError` if PEFT is not installed, and for no requests, a layer that
        does not exist, pictures that do not fit into one batch, or a loss that stops being finite.
        """
        requests = listed_requests(requests)
        projections = self._projections(vlm)
        with vlm.gradients(), self._adapted(vlm, projections) as adapters:
            batches = answer_batches(vlm, requests, self)
            parameters = [
                factor.weight for adapter in adapters for factor in (adapter.lora_A[_ADAPTER], adapter.lora_B[_ADAPTER])
            ]
            training = train(vlm.model, batches, parameters, settings=self, progress=progress)
            factors = {
                projection.name: _factors(adapter) for projection, adapter in zip(projections, adapters, strict=True)
            }
        return LowRankChange(
            factors=factors,
            transposed=vlm.stores_transposed,
            fingerprints=vlm.fingerprint(factors),
            model=vlm.name,
            revision=vlm.revision,
            settings=self.as_text(),
            requests=training.reports(requests),
            losses=training.losses,
        )

    def _projections(self, vlm: VisionLanguageModel) -> tuple[Projection, ...]:
        finders = {"mlp": vlm.down_projection, "attention": vlm.attention_projection}
        layers = range(vlm.layers) if self.layers is None else self.layers
        try:
            found = [finders[projection](layer) for layer in layers for projection in self.projections]
        except ModelError as error:
            raise EditError(f"cannot train adapters in layers {list(layers)}: {error}") from error
        return tuple({projection.path: projection for projection in found}.values())

    @contextmanager
    def _adapted(self, vlm: VisionLanguageModel, projections: Sequence[Projection]) -> Iterator[list[Any]]:
        """PEFT's modules in the places of the projections; on exit the model is made of its own modules again.

        The modules are put back here, since PEFT's own unloading is not reached by an error half-way, and leaves its
        configuration on the model and the flags of all parameters changed.
        """
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:  # the extra `peft` is not installed
            raise EditError("LoRA needs PEFT, which is not installed; pip install 'multrace[peft]'") from error
        if hasattr(vlm.model, "peft_config"):
            raise EditError(f"'{vlm.name}' carries PEFT adapters already; merge or unload them first")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),  # PEFT divides it by the rank, whatever its type
            lora_dropout=0.0,
            target_modules=[projection.path for projection in projections],
            fan_in_fan_out=vlm.stores_transposed,
        )
        flags = [(parameter, parameter.requires_grad) for _, parameter in vlm.named_parameters()]

        def put_back() -> None:
            for projection in projections:
                above, _, leaf = projection.path.rpartition(".")
                setattr(vlm.model.get_submodule(above), leaf, projection.module)
            vars(vlm.model).pop("peft_config", None)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

        devices = [vlm.device] if vlm.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed)
                LoraModel(vlm.model, config, _ADAPTER)
            yield [vlm.module(projection.path) for projection in projections]
        finally:
            uninterrupted(put_back)


def _factors(adapter: Any) -> tuple[Tensor, Tensor]:
    left, right = (getattr(adapter, part)[_ADAPTER].weight.detach().float().cpu() for part in ("lora_B", "lora_A"))
    return left * adapter.scaling[_ADAPTER], right
