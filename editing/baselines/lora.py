"""LoRA through PEFT: low-rank adapters trained on the answers wanted, then taken out of the model again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.facts import EditRequest
from ...models import ModelError, Projection, VisionLanguageModel
from ...models.guards import uninterrupted
from ..errors import EditError
from ..requests import listed_requests
from .training import TrainedChange, TrainingSettings, answer_batches, train

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
            lora_alpha=self.alpha,
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
