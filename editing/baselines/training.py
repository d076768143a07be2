"""Training on the targets of requests by Adam: the settings, the loop, and the course that a training took."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import repeat

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.facts import EditRequest
from ...models import VisionLanguageModel
from ..changes import Change, EditSession, History
from ..moments import MomentSource
from ..requests import EditError, request_text
from .answer_batches import AnswerBatch, AnswerBatches, Forward
from .breadth_first import BreadthFirst, check_ranges


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ABC):
    """Settings of a training on the targets of requests. Raises `EditError` for a setting that is out of range.

    The loss is the mean over prompts of the mean negative log-probability of their labels, with the target fed in
    (teacher forcing). Every step of Adam uses its gradient over all prompts of all requests, or over one mini-batch
    of them with a `BreadthFirst` order. Prompts run in batches of `batch_size`; up to 512 MiB of prompts stay on the
    device of the model, and those beyond are made again in every pass. Memory for prompts therefore does not grow with
    the number of requests.
    """

    steps: int = 25
    """Largest number of steps; 0 changes nothing. With an order, its `epochs` count instead."""
    learning_rate: float = 5e-4
    """Learning rate of Adam."""
    stop_loss: float = 1e-2
    """Training ends as soon as the loss, in nats per label, is at most this."""
    batch_size: int = 16
    """Number of prompts that run together; it bounds memory and changes the result by rounding only."""
    end_of_answer: bool = True
    """Whether the model is also trained to end its answer after the target, if it has an end-of-sequence token."""
    order: BreadthFirst | None = None
    """Epochs over mini-batches of the prompts, with early stopping; None for steps over all prompts at once."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "steps of at least 0": self.steps >= 0,
                "learning_rate above 0": 0 < self.learning_rate < math.inf,
                "stop_loss of at least 0": self.stop_loss >= 0,
                "batch_size of at least 1": self.batch_size >= 1,
                "steps without an order, or the epochs of the order": self.order is None
                or self.steps == type(self).steps,
            },
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

    def _answers(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest]) -> AnswerBatches:
        """Return the prompts of the requests with their targets, in batches of these settings."""
        return AnswerBatches(vlm, requests, batch_size=self.batch_size, end_of_answer=self.end_of_answer)


def check_no_history(editor: object, history: History | None) -> None:
    """Raise `EditError` if a history is given, since it cannot hold the changes of this editor."""
    if history is not None:
        raise EditError(
            f"a history holds the edits of closed-form editors, not those of {type(editor).__name__}; leave history out"
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """The course of a training."""

    losses: tuple[float, ...]
    """Mean loss of the trained prompts in each epoch, and after the training, as in `TrainedChange`."""
    held_out_losses: tuple[float, ...]
    """Mean loss of the held-out prompts, before the training and after each epoch; empty without any."""
    requests: tuple[float, ...]
    """The mean loss over all prompts of each request, after the training."""
    steps: int
    """Number of steps that were taken."""

    def reports(self, requests: Sequence[EditRequest]) -> tuple[dict[str, str], ...]:
        """Return each request as text, with its status, its loss after the training and the number of steps."""
        return tuple(
            {**request_text(request), "status": "edited", "loss": f"{loss:.6g}", "steps": str(self.steps)}
            for request, loss in zip(requests, self.requests, strict=True)
        )


@torch.enable_grad()
def train(
    forward: Forward,
    answers: AnswerBatches,
    parameters: Sequence[Tensor],
    *,
    settings: TrainingSettings,
    pull: Callable[[], Sequence[Tensor]] | None = None,
    bound: Callable[[], None] | None = None,
    progress: bool = False,
) -> Training:
    """Train parameters in place by Adam (arXiv 1412.6980), and return the course of the training.

    Besides the parameters it holds their gradients and two moments of the same size, one copy more if prompts are held
    out, and the activations of one batch.

    Args:
        forward: The model as a function of its inputs, which has to depend on the parameters.
        answers: The prompts with the labels that they have to predict.
        parameters: The leaf tensors to train, which are changed in place.
        settings: The order, the number of steps, the learning rate and the loss at which to stop.
        pull: Returns what is added to the gradient of each parameter in each step; None to add nothing.
        bound: Moves the parameters back into their bounds in place after each step; None for no bounds.
        progress: Show a progress bar.

    Returns:
        The losses of the epochs, and the last loss of each request.

    Raises:
        EditError: The loss stops being finite.
    """
    course = _Course(forward, answers, parameters, settings)
    rows, held_out = torch.arange(len(answers)), torch.arange(0)
    epochs: Iterable[Sequence[Tensor]] = repeat([rows], settings.steps)
    most = settings.steps
    if settings.order is not None:
        rows, held_out = settings.order.split(answers.owners)
        epochs, most = settings.order.mini_batches(rows), settings.order.steps(rows)
    kept = _Kept(parameters, settings.order.patience) if settings.order is not None and len(held_out) else None
    if kept is not None:
        kept.note(course.measured(held_out).mean().item())
    with tqdm(total=most, desc="training", unit="step", disable=not progress, leave=False) as bar:
        for epoch in epochs:
            before = course.steps
            is_over = course.epoch(epoch, pull, bound, bar)
            if kept is not None and course.steps > before:
                kept.note(course.measured(held_out).mean().item())
            if is_over or (kept is not None and kept.is_over):
                break
    if kept is not None:
        kept.put_back()
        course.forget()
    losses = course.measured(torch.arange(len(answers)))
    return Training(
        losses=(*course.losses, losses[rows].mean().item()),
        held_out_losses=() if kept is None else tuple(kept.losses),
        requests=tuple(losses[answers.owners == owner].mean().item() for owner in answers.owners.unique()),
        steps=course.steps,
    )


class _Course:
    """A training under way: the steps of Adam, and the loss of each prompt at the present parameters."""

    def __init__(
        self, forward: Forward, answers: AnswerBatches, parameters: Sequence[Tensor], settings: TrainingSettings
    ) -> None:
        self.losses: list[float] = []
        """Mean loss of each epoch that took a step."""
        self.steps = 0
        self._forward, self._answers, self._parameters = forward, answers, list(parameters)
        self._stop_loss = settings.stop_loss
        self._optimiser = torch.optim.Adam(self._parameters, lr=settings.learning_rate)
        self._losses = torch.zeros(len(answers), dtype=torch.float64)
        self._is_present = torch.zeros(len(answers), dtype=torch.bool)

    def epoch(
        self,
        mini_batches: Sequence[Tensor],
        pull: Callable[[], Sequence[Tensor]] | None,
        bound: Callable[[], None] | None,
        bar: tqdm,
    ) -> bool:
        """Take a step for each mini-batch whose loss is above the one to stop at; return whether this was the last."""
        before, rows = self.steps, torch.cat([*mini_batches])
        for mini_batch in mini_batches:
            loss = self._gradient(mini_batch)
            if loss > self._stop_loss:
                for parameter, added in zip(self._parameters, pull() if pull else (), strict=False):
                    parameter.grad += added
                self._optimiser.step()
                if bound:
                    bound()
                self.steps += 1
                self.forget()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
        if self.steps == before:
            return True
        self.losses.append(self._losses[rows].mean().item())
        return self.losses[-1] <= self._stop_loss

    @torch.no_grad()
    def measured(self, rows: Tensor) -> Tensor:
        """Return the losses of prompts at the present parameters, (row,) float64; those that are known do not run."""
        for batch in self._answers.of(rows[~self._is_present[rows]]):
            self._note(batch, batch.losses(self._forward))
        self._check(rows)
        return self._losses[rows]

    def forget(self) -> None:
        """Drop the losses, since the parameters have changed."""
        self._is_present[:] = False

    def _gradient(self, rows: Tensor) -> float:
        """Set the gradient of the mean loss of prompts, and return that loss."""
        self._optimiser.zero_grad()
        for batch in self._answers.of(rows):
            losses = batch.losses(self._forward)
            self._note(batch, losses)
            (losses.sum() / len(rows)).backward(inputs=self._parameters)
        self._check(rows)
        return self._losses[rows].mean().item()

    def _note(self, batch: AnswerBatch, losses: Tensor) -> None:
        self._losses[batch.rows] = losses.detach().double().cpu()
        self._is_present[batch.rows] = True

    def _check(self, rows: Tensor) -> None:
        if not torch.isfinite(self._losses[rows]).all():
            raise EditError(
                f"the training left the finite numbers at step {self.steps}; "
                "lower learning_rate, or load a half-precision model in float32"
            )


class _Kept:
    """The loss of held-out prompts by epoch, and a copy of the parameters where it was lowest."""

    def __init__(self, parameters: Sequence[Tensor], patience: int) -> None:
        self.losses: list[float] = []
        self._parameters, self._patience = parameters, patience
        self._copies: list[Tensor] = []

    @property
    def is_over(self) -> bool:
        """Whether the loss has not been lower for as many epochs as there is patience."""
        return len(self.losses) - 1 - self._best >= self._patience

    @property
    def _best(self) -> int:
        return self.losses.index(min(self.losses))

    def note(self, loss: float) -> None:
        """Take note of the loss at the present parameters."""
        self.losses.append(loss)
        if self._best == len(self.losses) - 1:
            self._copies = []  # freed before the new ones are made
            self._copies = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the parameters the values at which the loss was lowest."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
