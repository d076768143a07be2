"""Fine-tuning of projections on the targets by Adam."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.func import functional_call

from ...data.facts import EditRequest
from ...models import ModelError, VisionLanguageModel
from ..requests import EditError, listed_requests
from .breadth_first import BreadthFirst, check_ranges
from .trained_changes import DenseChange, summed
from .training import TrainingSettings, train


@dataclass(frozen=True, kw_only=True)
class FineTune(TrainingSettings):
    """Fine-tuning of projections by Adam on the target tokens, a baseline of ROME and MEMIT.

    The papers are arXiv 2202.05262 and 2210.07229. The code of ROME predicts every token of the target from the end of
    the question, takes one step per batch of requests, and trains the bias of the projection too. Here, by contrast,
    the earlier tokens of the target are fed in, the end of the answer is trained by default, every step uses the
    gradient over all requests, and only the weight changes. `breadth_first` and `locft` train epochs over mini-batches
    of the requests instead, which is stronger where there are many (LocFT-BF, arXiv 2509.22072).

    The change, its gradient and the two moments of Adam take 16 bytes per entry of the weights. Raises `EditError` for
    a setting that is out of range.

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

    layer: int | None = None
    """The decoder layer whose projection is trained, negative from the end; None where `layers` names several."""
    layers: tuple[int, ...] | None = None
    """Decoder layers whose projections are trained together, negative from the end, in place of `layer`."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The weight that is trained: "mlp" is the down projection of the MLP, "attention" the output projection."""
    weight_decay: float = 0.0
    """The changed weight times this factor is added to its gradient (L2 penalty), at least 0."""
    entry_bound: float | None = None
    """Largest absolute change of any entry of the weight, enforced after each step; None for no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            {
                "layer or layers, one of the two": (self.layer is None) != (self.layers is None),
                "layers of at least one layer, or None": self.layers is None or len(self.layers) > 0,
                "projection 'mlp' or 'attention'": self.projection in ("mlp", "attention"),
                "weight_decay of at least 0": self.weight_decay >= 0,
                "entry_bound above 0, or None": self.entry_bound is None or self.entry_bound > 0,
            },
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

    @classmethod
    def breadth_first(
        cls,
        *,
        layer: int | None = None,
        layers: tuple[int, ...] | None = None,
        learning_rate: float = 5e-3,
        order: BreadthFirst | None = None,
    ) -> Self:
        """Return fine-tuning in epochs over mini-batches, with a learning rate for small models and early stopping.

        Late layers preserve most: of the down projections of 32 layers, the publication (LocFT-BF, arXiv 2509.22072)
        trains that of layer 22.

        Args:
            layer: The decoder layer that is trained, negative from the end.
            layers: Several such layers, in place of `layer`.
            learning_rate: Learning rate of Adam, ten times the published one of models of 7 to 8 billion parameters.
            order: The order; None for `BreadthFirst()`.
        """
        return cls(layer=layer, layers=layers, learning_rate=learning_rate, order=order or BreadthFirst())

    @classmethod
    def locft(cls, *, layer: int = 22) -> Self:
        """Return LocFT-BF with the settings published for Llama 3 8B (arXiv 2509.22072).

        These are layer 22 of 32, and at most 25 epochs over mini-batches of 100 requests at a learning rate of 5e-4;
        mini-batches take no step, and epochs are the last, at a loss of 0.01. Nothing is held out. The layer was chosen
        for that model; the code that was published with it has layer 6 of 28 for Qwen 2.5 7B.
        """
        order = BreadthFirst(epochs=25, mini_batch=100, held_out=0.0)
        return cls(layer=layer, learning_rate=5e-4, stop_loss=1e-2, order=order)

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
        names = self._names(vlm)
        with vlm.gradients(), ExitStack() as stack:
            weights = {name: stack.enter_context(vlm.opened_weight(name)) for name in names}
            changes = {
                name: torch.zeros_like(weight, dtype=torch.float32, requires_grad=True)
                for name, weight in weights.items()
            }

            def forward(**inputs: Any) -> Any:
                changed = {name: summed(weight, changes[name]) for name, weight in weights.items()}
                return functional_call(vlm.model, changed, kwargs=inputs)

            def pull() -> list[Tensor]:
                return [self.weight_decay * (weights[name].detach().float() + changes[name].detach()) for name in names]

            training = train(
                forward,
                self._answers(vlm, requests),
                [*changes.values()],
                settings=self,
                pull=pull if self.weight_decay else None,
                bound=None if self.entry_bound is None else lambda: self._bound(changes.values()),
                progress=progress,
            )
        return DenseChange(
            differences={name: change.detach().cpu() for name, change in changes.items()},
            fingerprints=vlm.fingerprint(names),
            model=vlm.name,
            revision=vlm.revision,
            settings=self.as_text(),
            requests=training.reports(requests),
            losses=training.losses,
            held_out_losses=training.held_out_losses,
            steps=training.steps,
        )

    def _names(self, vlm: VisionLanguageModel) -> list[str]:
        find = vlm.down_projection if self.projection == "mlp" else vlm.attention_projection
        layers = (self.layer,) if self.layers is None else self.layers
        try:
            return list(dict.fromkeys(find(layer).name for layer in layers if layer is not None))
        except ModelError as error:
            named = f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"
            raise EditError(f"cannot fine-tune {named}: {error}") from error

    @torch.no_grad()
    def _bound(self, changes: Iterable[Tensor]) -> None:
        if self.entry_bound is not None:
            for change in changes:
                change.clamp_(-self.entry_bound, self.entry_bound)
