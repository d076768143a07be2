"""The gradient search for the output that makes a layer's MLP say the new fact."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import VisionLanguageModel, patch
from .errors import EditError
from .keys import batch_keys_and_values
from .requests import EditRequest
from .targets import TargetBatch, target_batch


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """How the wanted output is searched for. EditError for a setting out of range."""

    learning_rate: float = 0.3
    """Step of Adam."""
    steps: int = 80
    """At most so many; 0 asks for no change."""
    stop_loss: float = 0.005
    """Enough when the mean negative log-probability per target token, in nats, is at most this."""
    weight_decay: float = 1e-3
    """Price of |change|^2 / |current output|^2."""
    clamp: float | None = None
    """Longest change allowed at a key, as a multiple of the current output's norm (ROME 4, MEMIT 0.75); None: any."""
    end_of_answer: bool = True
    """Also ask for the end-of-sequence token after the target, in models that have one: the answer stops there."""

    def __post_init__(self) -> None:
        ranges = {
            "learning_rate above 0": self.learning_rate > 0,
            "steps of at least 0": self.steps >= 0,
            "weight_decay of at least 0": self.weight_decay >= 0,
            "clamp above 0, or None": self.clamp is None or self.clamp > 0,
        }
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"{type(self).__name__} got {name}={getattr(self, name)}; pass {wanted}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueResult:
    """The change of output found for one request, and how well it works if it is met in full."""

    keys: Tensor
    """(key, mlp) float32, mean over contexts."""
    before: Tensor
    """(key, hidden) float32, current output, mean over contexts."""
    change: Tensor
    """(key, hidden) float32, to be added to the output; from the step with the lowest loss."""
    losses: tuple[float, ...]
    """Mean negative log-probability in nats per label and context, before each step and after the last."""
    probability: float
    """Of the whole target (with its end, where asked for) given the change; geometric mean over contexts, 0 to 1."""

    @property
    def values(self) -> Tensor:
        """(key, hidden), the wanted output."""
        return self.before + self.change

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.losses) - 1

    @property
    def loss(self) -> float:
        """The lowest loss, which belongs to the change."""
        return min(self.losses)


@torch.enable_grad()
def optimise_values(
    vlm: VisionLanguageModel,
    request: EditRequest,
    *,
    layer: int,
    token: str | int,
    settings: ValueSettings,
    progress: bool = False,
) -> ValueResult:
    """The change of the down projection's output at the token after which the target is the answer.

    One change per key is added in all contexts; the loss is the mean over contexts of the mean negative
    log-probability of all target tokens, plus weight decay (ROME, arXiv 2202.05262, without its essence term). The
    model is left as it is. EditError as key_positions, and if the loss stops being finite.
    """
    batch = target_batch(vlm, request.prompts, token, end=settings.end_of_answer)
    keys, before = batch_keys_and_values(vlm, batch, layer)
    change = torch.zeros_like(before, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.learning_rate)
    scale = before.square().sum().clamp(min=torch.finfo(before.dtype).tiny)
    best, losses = change.detach().clone(), []
    with tqdm(total=settings.steps, desc=f"value for {request.target!r}", disable=not progress, leave=False) as bar:
        for step in range(settings.steps + 1):
            loss = _loss(vlm, batch, layer, change)
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise EditError(
                    f"the search for {request.target!r} left the finite numbers at step {step}; "
                    "lower learning_rate, or load the model in float32"
                )
            if losses[-1] <= min(losses):
                best = change.detach().clone()
            if losses[-1] <= settings.stop_loss or step == settings.steps:
                break
            decay = settings.weight_decay * change.square().sum() / scale
            (change.grad,) = torch.autograd.grad(loss + decay, [change])
            optimiser.step()
            _clamp(change, before, settings.clamp)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    probability = torch.tensor(-min(losses) * batch.labels.shape[1]).exp().item()
    return ValueResult(keys=keys, before=before, change=best, losses=tuple(losses), probability=probability)


def _loss(vlm: VisionLanguageModel, batch: TargetBatch, layer: int, change: Tensor) -> Tensor:
    def add(output: Tensor) -> Tensor:
        contexts = torch.arange(len(batch.key_columns), device=output.device)[:, None]
        added = change.to(output).expand(len(contexts), -1, -1)
        return output.index_put((contexts, batch.key_columns.to(output.device)), added, accumulate=True)

    with patch(vlm, {vlm.down_projection(layer): add}):
        return batch.losses(vlm).mean()


@torch.no_grad()
def _clamp(change: Tensor, before: Tensor, factor: float | None) -> None:
    """Shortens the change at each key to at most factor times the norm of the current output there."""
    if factor is not None:
        allowed, length = (factor * before.norm(dim=-1, keepdim=True), change.norm(dim=-1, keepdim=True))
        change.mul_(torch.where(length > allowed, allowed / length, 1.0))
