"""LoRA through PEFT, trained on the targets by Adam."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import ModelError, Projection, VisionLanguageModel
from ...models.errors import gist
from ...models.guards import uninterrupted
from ...models.placement import is_packed
from ..requests import EditError, listed_requests
from .breadth_first import BreadthFirst, check_ranges
from .trained_changes import LowRankChange
from .training import TrainingSettings, train

_ADAPTER = "multrace"
_PROJECTIONS = ("mlp", "attention")


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
        check_ranges(
            self,
            {
                "rank of at least 1": self.rank >= 1,
                "alpha above 0": self.alpha > 0,
                "layers of at least one layer, or None": self.layers is None or len(self.layers) > 0,
                f"projections among {_PROJECTIONS}": len(self.projections) > 0
                and set(self.projections) <= set(_PROJECTIONS),
            },
        )

    @classmethod
    def breadth_first(cls, *, layers: tuple[int, ...] | None = None, order: BreadthFirst | None = None) -> Self:
        """Return LoRA in epochs over mini-batches of the requests, with early stopping (`BreadthFirst`).

        No constants are published for it: the learning rate is the default.

        Args:
            layers: Decoder layers that get adapters, negative from the end; None for all.
            order: The order; None for `BreadthFirst()`.
        """
        return cls(layers=layers, order=order or BreadthFirst())

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
            parameters = [
                factor.weight for adapter in adapters for factor in (adapter.lora_A[_ADAPTER], adapter.lora_B[_ADAPTER])
            ]
            training = train(vlm.model, self._answers(vlm, requests), parameters, settings=self, progress=progress)
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
            held_out_losses=training.held_out_losses,
            steps=training.steps,
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
