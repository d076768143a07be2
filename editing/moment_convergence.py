"""Whether second moments still move as prompts are added, read from matrices small enough to keep for all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from .errors import EditError

PROBES = 64
"""Random directions per layer; at least so many as a layer is wide make a reading exact."""


@dataclass(frozen=True, kw_only=True)
class ConvergencePoint:
    """How far the moments still moved after so many prompts: relative Frobenius norms, one per layer, 0 is converged.

    Estimated from 64 random directions; exact where the layer is no wider than that.
    """

    prompts: int
    change: tuple[float, ...]
    """Of the mean since the reading before, as a share of the mean; infinite in the first."""
    halves: tuple[float, ...]
    """Between the means of two halves of the prompts so far, as a share of the mean; about twice the mean's error."""

    @property
    def worst(self) -> float:
        """The largest of all these numbers."""
        return max(*self.change, *self.halves)


class Watch:
    """How much the means still move, from products with random signs, which are small enough to keep for all layers.

    With p columns S of random signs / sqrt(p), |D S|^2 is on average the squared Frobenius norm |D|^2 of a difference D
    of moments, and |D S| is rarely off by more than a tenth for p = 64. S is the identity where a layer is that narrow.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.readings: list[ConvergencePoint] = []
        self._tokens = torch.zeros(2, dtype=torch.long)
        """In each half."""
        self._halves: dict[int, Tensor] = {}
        """(half, width, probe) float64 sums of k (k^T S) per layer."""
        self._before: dict[int, Tensor] = {}
        """(width, probe), the mean at the last reading."""
        self._probes: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def add(self, layer: int, states: Tensor, types: Tensor, half: int) -> None:
        """Adds all tokens of states (batch, token, width) to a half."""
        rows = wide(states[types.to(states.device) > 0])
        probes = self._probes_for(rows)
        if layer not in self._halves:
            self._halves[layer] = rows.new_zeros(2, *probes.shape, dtype=torch.float64)
        self._halves[layer] = self._halves[layer].to(rows.device)
        self._halves[layer][half] += rows.T @ (rows @ probes)
        if layer == self.layers[-1]:
            self._tokens[half] += len(rows)

    def read(self, prompts: int) -> None:
        """Appends a reading. EditError if a layer reads numbers that are not finite."""
        change, halves = [], []
        for layer in self.layers:
            first, second = self._halves[layer]
            mean = (first + second) / int(self._tokens.sum())
            scale = mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
            apart = first / int(self._tokens[0]) - second / int(self._tokens[1])
            halves.append((apart.norm() / scale).item())
            before = self._before.get(layer)
            change.append(inf if before is None else ((mean - before.to(mean.device)).norm() / scale).item())
            self._before[layer] = mean
            if not isfinite(halves[-1]):
                raise EditError(
                    f"what the projection of layer {layer} reads holds numbers that are not finite, among the first "
                    f"{prompts} prompts; load a float16 model in float32 or bfloat16, or fetch damaged weights again"
                )
        self.readings.append(ConvergencePoint(prompts=prompts, change=tuple(change), halves=tuple(halves)))

    def is_calm(self, tolerance: float | None) -> bool:
        """Whether all numbers of the last reading are below the tolerance."""
        return bool(tolerance and self.readings) and self.readings[-1].worst < tolerance

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it knows, for `restore`."""
        kept = {f"halves:{layer}": each for layer, each in self._halves.items()}
        kept |= {f"before:{layer}": each for layer, each in self._before.items()}
        return kept | {"tokens": self._tokens} | curve_tensors(self.readings)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` returned."""
        for layer in self.layers:
            self._halves[layer] = tensors[f"halves:{layer}"].clone()
            if f"before:{layer}" in tensors:
                self._before[layer] = tensors[f"before:{layer}"]
        self._tokens = tensors["tokens"].clone()
        self.readings = list(curve_of(tensors))

    def _probes_for(self, rows: Tensor) -> Tensor:
        key = rows.shape[1], rows.device, rows.dtype
        if key not in self._probes:
            width = rows.shape[1]
            generator = torch.Generator().manual_seed(width)
            signs = torch.randint(0, 2, (width, PROBES), generator=generator).mul(2).sub(1)
            probes = torch.eye(width) if width <= PROBES else signs / PROBES**0.5
            self._probes[key] = probes.to(rows)
        return self._probes[key]


def curve_tensors(readings: Sequence[ConvergencePoint]) -> dict[str, Tensor]:
    """Readings as tensors: prompts (reading,) int64, change and halves (reading, layer) float64; nothing for none."""
    if not readings:
        return {}
    numbers = {
        name: torch.tensor([getattr(each, name) for each in readings], dtype=torch.float64)
        for name in ("change", "halves")
    }
    return {"curve:prompts": torch.tensor([each.prompts for each in readings])} | {
        f"curve:{name}": values for name, values in numbers.items()
    }


def curve_of(tensors: Mapping[str, Tensor]) -> tuple[ConvergencePoint, ...]:
    """The readings that `curve_tensors` wrote. KeyError or ValueError if they are not whole."""
    if "curve:prompts" not in tensors:
        return ()
    rows = (tensors[f"curve:{name}"].tolist() for name in ("prompts", "change", "halves"))
    return tuple(
        ConvergencePoint(prompts=int(prompts), change=tuple(change), halves=tuple(halves))
        for prompts, change, halves in zip(*rows, strict=True)
    )


def wide(states: Tensor) -> Tensor:
    """The states in float32, or in their own dtype where that is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
