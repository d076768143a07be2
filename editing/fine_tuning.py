"""Fine-tuning of one projection, free or held within a bound: the plain baseline of the closed-form editors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.func import functional_call

from ..models import ModelError, VisionLanguageModel
from .errors import EditError
from .requests import EditRequest
from .training import TrainedChange, TrainingSettings, answer_batches, summed, train


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DenseChange(TrainedChange):
    """A change of whole weight matrices."""

    differences: Mapping[str, Tensor]
    """What is added to each parameter: float32 on the CPU, in the layout in which the model stores it."""

    def difference(self, name: str) -> Tensor:
        """What is added to the parameter of this name."""
        return self.differences[name]


@dataclass(frozen=True, kw_only=True)
class FineTune(TrainingSettings):
    """Fine-tuning of one projection by Adam on the target tokens, as ROME and MEMIT use it as their baseline.

    Unlike theirs it asks for the end of the answer too, and each step has the gradient of all requests. EditError for
    a setting out of range.
    """

    layer: int
    """The layer whose projection is trained, negative from the end."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The map that writes the layer's MLP, or its attention, into the residual stream."""
    weight_decay: float = 0.0
    """Times the weight itself, added to its gradient (Adam's L2 penalty)."""
    entry_bound: float | None = None
    """Largest change of any entry of the weight, put back into the bound after each step; None: any."""

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
        """Unconstrained, as published for GPT-2 XL (ROME, arXiv 2202.05262): layer 1, 25 steps of Adam at 5e-4.

        Without end of the answer; the layer was found for that model and is no advice for another.
        """
        return cls(layer=layer, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False)

    @classmethod
    def constrained(cls, *, layer: int = 0, entry_bound: float = 5e-4) -> Self:
        """As published for GPT-2 XL with each entry held within 5e-4 of what it was (5e-5 was used for GPT-J).

        Layer 0, 25 steps of Adam at 5e-4, without end of the answer (ROME, arXiv 2202.05262; MEMIT, arXiv 2210.07229).
        """
        return cls(
            layer=layer, entry_bound=entry_bound, steps=25, learning_rate=5e-4, stop_loss=1e-2, end_of_answer=False
        )

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> DenseChange:
        """The change after which the requests' prompts, contexts and `rewrite_prompts` prompts get their targets.

        Trained in float32 whatever the model's dtype; the model is left as it is. EditError for no requests, a layer
        that does not exist, pictures that do not fit into one batch, or a loss that stops being finite.
        """
        requests = tuple(requests)
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
