"""Baselines that train a model on the targets by Adam: fine-tuning of one projection, and LoRA through PEFT."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...data.facts import EditRequest, Question, counted
from ...models import ModelError, Projection, Prompt, VisionLanguageModel, collate
from ...models.errors import gist
from ...models.guards import uninterrupted
from ...models.placement import is_packed
from ...models.prompts import batches as fitting_batches
from ..changes import AppliedDelta, Change, EditSession, History, held, overwrite, requests_line
from ..moments import MomentSource
from ..requests import EditError, edited_questions, listed_requests, request_text
from ..values import end_ids, prompt_end

_NO_LABEL = -100
_HELD_MIB = 512
"""Batches of prompts stay in memory up to this size in all; those beyond it are made again in every step."""

Forward = Callable[..., Any]
"""A function that takes model inputs by keyword and returns the output of the model, which has `logits`."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainedChange(ABC):
    """A change of weights that training made; it can be applied only to the weights on which it was trained."""

    fingerprints: Mapping[str, str]
    """Parameter name -> hash of the weight before the change."""
    model: str
    """Name or path of the model that was trained."""
    revision: str | None = None
    """Revision of the model; None if it has none."""
    settings: Mapping[str, str]
    """The editor and its settings, as text."""
    requests: tuple[Mapping[str, str | float], ...]
    """For each request, its question, target and status, and the "loss" after the last step in nats per label."""
    losses: tuple[float, ...]
    """Mean over prompts of the mean negative log-probability per label, in nats, before each step and after the last.
    """

    def __repr__(self) -> str:
        editor = self.settings.get("editor", "hand")
        line = f"{type(self).__name__} of {self.model!r} by {editor}: {counted(len(self.fingerprints), 'weight')}"
        return f"{line}, {counted(len(self.losses) - 1, 'step')}\n{requests_line(self.requests)}"

    @abstractmethod
    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, float32 on the CPU, in the layout of the model."""

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with this change in its weights; on any exit every touched weight is bit-equal to before.

        Sums are computed in float32 or wider and rounded once to the dtype of the weight. Raises `EditError`, with
        nothing changed, if the model lacks a weight, if a weight is not the one that was trained, or if a changed
        weight would overflow.
        """
        return held(vlm, self._put_in)

    def write(self, vlm: VisionLanguageModel) -> None:
        """Write the change into the model's weights in place; the caller keeps what undoes it.

        Raises `EditError` in the same cases as `applied`.
        """
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
                    f"({vlm.dtype}) it has {found[name][:12]}: another model, precision or "
                    "quantisation, or an edit is applied; "
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
    """Settings of a training on the targets of requests. Raises `EditError` for a setting that is out of range.

    The loss is the mean over all prompts of the mean negative log-probability of their labels, with the target fed in
    (teacher forcing). Every step of Adam uses its gradient over all requests. Prompts run in batches of `batch_size`;
    batches of up to 512 MiB together stay on the device of the model, and those beyond are made again in every step.
    Memory for prompts therefore does not grow with the number of requests.
    """

    steps: int = 25
    """Largest number of steps; 0 changes nothing."""
    learning_rate: float = 5e-4
    """Learning rate of Adam."""
    stop_loss: float = 1e-2
    """Training ends as soon as the loss, in nats per label, is at most this."""
    batch_size: int = 16
    """Number of prompts that run together; it bounds memory and changes the result by rounding only."""
    end_of_answer: bool = True
    """Whether the model is also trained to end its answer after the target, if it has an end-of-sequence token."""

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
        self, vlm: VisionLanguageModel, *, moments: MomentSource = None, history: History | None = None
    ) -> EditSession:
        """Return a session in which each change is trained on top of the earlier ones and stays in effect.

        moments: accepted as by every editor, and not used. history: must be None, since a history holds only the
        factors of closed-form edits. Raises `EditError` if there is one.
        """
        check_no_history(self, history)
        return EditSession(vlm, lambda requests, progress: self.edit(vlm, requests, progress=progress))

    @abstractmethod
    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> Change:
        """Return the change after which the requests' questions get their targets; the model is left unchanged."""

    def as_text(self) -> dict[str, str]:
        """Return the name of the editor and its settings as text, for reports."""
        settings = {field.name: str(getattr(self, field.name)) for field in fields(self)}
        return {"editor": type(self).__name__} | settings

    def _check(self, ranges: Mapping[str, bool]) -> None:
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"{type(self).__name__} got {name}={getattr(self, name)!r}; pass {wanted}")


def check_no_history(editor: object, history: History | None) -> None:
    """Raise `EditError` if a history is given, since it cannot hold the changes of this editor."""
    if history is not None:
        raise EditError(
            f"a history holds the edits of closed-form editors, not those of {type(editor).__name__}; leave history out"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerBatch:
    """Prompts with their targets after them, padded on the right, and the labels that they have to predict."""

    inputs: Mapping[str, Tensor]
    """Model inputs, among them input_ids and attention_mask (row, token)."""
    labels: Tensor
    """(row, column) int64: the id that each of the last columns has to predict; -100 where nothing has to be."""

    @property
    def mib(self) -> float:
        """Size of its tensors in MiB."""
        return sum(each.nbytes for each in (*self.inputs.values(), self.labels)) / 2**20

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
    """Mean over prompts of the mean negative log-probability per label, in nats, before each step and after the last.
    """
    requests: tuple[float, ...]
    """The same mean over the prompts of each request, after the last step."""

    @property
    def steps(self) -> int:
        """Number of steps that were taken."""
        return len(self.losses) - 1

    def reports(self, requests: Sequence[EditRequest]) -> tuple[dict[str, str], ...]:
        """Return each request as text, with its status, its loss after the last step and the number of steps."""
        return tuple(
            {**request_text(request), "status": "edited", "loss": f"{loss:.6g}", "steps": str(self.steps)}
            for request, loss in zip(requests, self.requests, strict=True)
        )


class AnswerBatches:
    """All prompts of requests, with contexts and rewrite prompts, and their targets, in batches that are made lazily.

    Each iteration yields the same batches. The first of them, up to a limit in memory, are made once and stay; the
    others are made again in every iteration.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        settings: TrainingSettings,
        *,
        held_mib: float = _HELD_MIB,
    ) -> None:
        """Prepare the batches without making any. held_mib: size in MiB up to which batches stay in memory."""
        rows = [(question, request.target) for request in requests for question in edited_questions(request)]
        self.owners = torch.tensor([owner for owner, each in enumerate(requests) for _ in edited_questions(each)])
        """(prompt,) int64: for each prompt, in order of the batches, the index of its request."""
        self._rows = [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
        self._vlm, self._ending = vlm, end_ids(vlm) if settings.end_of_answer else ()
        self._held: list[list[AnswerBatch]] = []
        self._room = held_mib

    def __iter__(self) -> Iterator[AnswerBatch]:
        """Yield the batches in order; prompts whose pictures do not fit together go into batches of their own."""
        for index, rows in enumerate(self._rows):
            if index < len(self._held):
                yield from self._held[index]
                continue
            parts = [_batch(self._vlm, prompts, self._ending) for prompts in _fitting(self._vlm, rows)]
            size = sum(part.mib for part in parts)
            if index == len(self._held) and size <= self._room:
                self._held.append(parts)
                self._room -= size
            yield from parts


@torch.enable_grad()
def train(
    forward: Forward,
    batches: AnswerBatches,
    parameters: Sequence[Tensor],
    *,
    settings: TrainingSettings,
    pull: Callable[[], Sequence[Tensor]] | None = None,
    bound: Callable[[], None] | None = None,
    progress: bool = False,
) -> Training:
    """Train parameters in place by Adam (arXiv 1412.6980), and return the course of the training.

    The loss is the mean over prompts of the mean negative log-probability per label. Besides the parameters it holds
    their gradients and two moments of the same size, and the activations of one batch.

    Args:
        forward: The model as a function of its inputs, which has to depend on the parameters.
        batches: The prompts with the labels that they have to predict.
        parameters: The leaf tensors to train, which are changed in place.
        settings: Number of steps, learning rate and loss at which to stop.
        pull: Returns what is added to the gradient of each parameter in each step; None to add nothing.
        bound: Moves the parameters back into their bounds in place after each step; None for no bounds.
        progress: Show a progress bar.

    Returns:
        The loss before each step and after the last, and the last loss of each request.

    Raises:
        EditError: The loss stops being finite.
    """
    count = len(batches.owners)
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
                del found  # after the last step its graph is not freed by a backward pass
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
    owners = batches.owners
    means = [torch.cat(rows)[owners == owner].mean().item() for owner in owners.unique()]
    return Training(losses=tuple(losses), requests=tuple(means))


def _fitting(vlm: VisionLanguageModel, rows: Sequence[tuple[Question, str]]) -> list[list[Prompt]]:
    """Return the prompts of (question, target) rows, in order, in runs that fit into one batch."""
    runs: list[list[Prompt]] = []
    for question, target in rows:
        prompt = vlm.prompt_for(question).with_answer(target)
        if runs and len(fitting_batches([*runs[-1], prompt], len(rows))) == 1:
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    return runs


def _batch(vlm: VisionLanguageModel, prompts: Sequence[Prompt], ending: tuple[int, ...]) -> AnswerBatch:
    """Return the batch of prompts with their targets."""
    inputs, _ = collate(prompts, vlm.tokenizer, side="right")
    width = inputs["input_ids"].shape[1]
    labels = torch.full((len(prompts), width), _NO_LABEL)
    for row, prompt in zip(labels, prompts, strict=True):
        wanted = torch.tensor((*prompt.answer_ids, *ending))
        first = prompt_end(prompt) - 1
        row[first : first + len(wanted)] = wanted
    kept = min(prompt_end(prompt) for prompt in prompts) - 1
    return AnswerBatch(inputs=inputs, labels=labels[:, kept:])


def summed(weight: Tensor, difference: Tensor) -> Tensor:
    """Return weight plus difference in the dtype and on the device of the weight; gradients flow to the difference.

    The sum is computed in float32, or in the dtype of the weight if that is wider.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + difference.to(wide.device)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DenseChange(TrainedChange):
    """A change of whole weight matrices. Made by `FineTune.edit`."""

    differences: Mapping[str, Tensor]
    """Parameter name -> what is added to it, float32 on the CPU, in the shape in which the model stores it."""

    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, float32 on the CPU."""
        return self.differences[name]


@dataclass(frozen=True, kw_only=True)
class FineTune(TrainingSettings):
    """Fine-tuning of one projection by Adam on the target tokens, a baseline of ROME and MEMIT.

    The papers are arXiv 2202.05262 and 2210.07229. The code of ROME predicts every token of the target from the end of
    the question, takes one step per batch of requests, and trains the bias of the projection too. Here, by contrast,
    the earlier tokens of the target are fed in, the end of the answer is trained by default, every step uses the
    gradient over all requests, and only the weight changes.

    The change, its gradient and the two moments of Adam take 16 bytes per entry of the weight. Raises `EditError` for a
    setting that is out of range.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import FineTune
        >>> vlm = mt.load(tiny_vlm_path())
        >>> question = mt.Question(text="Who won?")
        >>> editor = FineTune(layer=5, learning_rate=5e-3, stop_loss=0.1)
        >>> change = editor.edit(vlm, [mt.EditRequest(question=question, target="Pruro")], progress=False)
        >>> with change.applied(vlm):
        ...     vlm.answers([vlm.prompt_for(question)])
        ['Pruro']
    """

    layer: int
    """The decoder layer whose projection is trained, negative from the end."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The weight that is trained: "mlp" is the down projection of the MLP, "attention" the output projection."""
    weight_decay: float = 0.0
    """The changed weight times this factor is added to its gradient (L2 penalty), at least 0."""
    entry_bound: float | None = None
    """Largest absolute change of any entry of the weight, enforced after each step; None for no bound."""

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
        """Return unconstrained fine-tuning with the settings published for GPT-2 XL (ROME, arXiv 2202.05262).

        These are layer 1, and 25 steps of Adam at a learning rate of 5e-4; the end of the answer is not trained. The
        layer was chosen for that model and is not a recommendation for another.
        """
        return cls(layer=layer, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False)

    @classmethod
    def constrained(cls, *, layer: int = 0, entry_bound: float = 5e-4) -> Self:
        """Return constrained fine-tuning with the settings published for GPT-2 XL (ROME, arXiv 2202.05262).

        These are layer 0, 25 steps of Adam at a learning rate of 5e-4, and entries that change by at most 5e-4; the
        published bound for GPT-J is 5e-5 (MEMIT, arXiv 2210.07229). The end of the answer is not trained.
        """
        return cls(
            layer=layer, entry_bound=entry_bound, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False
        )

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> DenseChange:
        """Return the change after which the questions, contexts and rewrite prompts of the requests get their targets.

        It is trained in float32 whatever the dtype of the model, which is left unchanged.

        Args:
            vlm: The model.
            requests: At least one request.
            progress: Show a progress bar.

        Raises:
            EditError: There are no requests, the layer does not exist, or the loss stops being finite.
        """
        requests = listed_requests(requests)
        name = self._name(vlm)

        def forward(**inputs: Any) -> Any:
            return functional_call(vlm.model, {name: summed(weight, change)}, kwargs=inputs)

        with vlm.gradients(), vlm.opened_weight(name) as weight:
            batches = AnswerBatches(vlm, requests, self)
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
    """A change of weights by trained low-rank factors. Made by `Lora.edit`."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Parameter name -> (left, right): float32 (hidden, rank) and (rank, width) on the CPU, oriented as in y = W x. The
    scale of the adapter, alpha / rank, is included in left."""
    transposed: bool
    """Whether the model stores its weights as (width, hidden)."""

    def difference(self, name: str) -> Tensor:
        """Return left @ right of the parameter of this name, in the shape in which the model stores it."""
        left, right = self.factors[name]
        return (left @ right).T if self.transposed else left @ right


@dataclass(frozen=True, kw_only=True)
class Lora(TrainingSettings):
    """LoRA (arXiv 2106.09685) through PEFT, trained by Adam on the target tokens.

    A weight W becomes W + (alpha / rank) B A with trained factors B and A (section 4.1 of the paper). By default the
    down projection of the MLP and the output projection of attention get an adapter in every decoder layer. It needs
    the extra `multrace[peft]`. Raises `EditError` for a setting that is out of range.
    """

    steps: int = 60
    """Largest number of steps; 0 changes nothing."""
    learning_rate: float = 5e-3
    """Learning rate of Adam."""
    rank: int = 8
    """Rank of each adapter, at least 1."""
    alpha: float = 16.0
    """The product of the factors of an adapter is multiplied by alpha / rank; above 0."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that get adapters, negative from the end; None for all."""
    projections: tuple[str, ...] = _PROJECTIONS
    """The projections that get adapters: "mlp" is the down projection of the MLP, "attention" the output projection."""
    seed: int = 0
    """Random seed of the initial adapters; the global random generator is left as it was."""

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

        The adapters are trained in float32 whatever the dtype of the model. PEFT puts its modules into the model for
        the length of the training; the model ends with the modules, flags and weights that it had, also after an error.

        Args:
            vlm: The model.
            requests: At least one request.
            progress: Show a progress bar.

        Raises:
            EditError: PEFT is not installed, the model has PEFT adapters already, there are no requests, a layer does
                not exist, or the loss stops being finite.
        """
        requests = listed_requests(requests)
        projections = self._projections(vlm)
        with ExitStack() as stack:
            for projection in projections:
                if not is_packed(projection.module):  # PEFT has modules of its own around packed weights
                    stack.enter_context(vlm.opened_weight(projection.name))
            stack.enter_context(vlm.gradients())
            adapters = stack.enter_context(self._adapted(vlm, projections))
            batches = AnswerBatches(vlm, requests, self)
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
        """Yield PEFT's modules, which replace the projections; on any exit the model has its own modules again.

        The modules are put back here because PEFT's own unloading would not run after an error while adapters are
        added, and because it leaves its configuration on the model and changed flags on all parameters.
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
        except ImportError as error:  # PEFT may not fit the quantiser that is here
            raise EditError(f"PEFT cannot adapt '{vlm.name}': {gist(error)}; load it without quantization=") from error
        finally:
            uninterrupted(put_back)


def _factors(adapter: Any) -> tuple[Tensor, Tensor]:
    """The factors (left, right) of an adapter of PEFT as `LowRankChange` holds them."""
    left, right = (getattr(adapter, part)[_ADAPTER].weight.detach().float().cpu() for part in ("lora_B", "lora_A"))
    return left * adapter.scaling[_ADAPTER], right
