"""The linear maps that write into the residual stream: single matrices, and the routed experts of a layer as one map.

An expert e with the activation k_e and the routing weight g_e adds g_e W_e k_e to the output of the experts, W_e being
its slice of their three-dimensional weight. That is linear in g_e k_e, so that the experts together are one map
[W_1 ... W_n] of the stacked key [g_1 k_1 ... g_n k_n], which is zero for experts that a token is not routed to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..placement import compute_device, fetched, is_plain, map_shape


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map that writes into the residual stream: an MLP's down projection or attention's output projection."""

    module: nn.Module
    """The linear module itself."""
    path: str
    """The dotted path of the module in the model."""
    transposed: bool
    """True if the weight is stored as (width, hidden) instead of (hidden, width)."""

    @property
    def name(self) -> str:
        """The name of the weight in `model.named_parameters()`."""
        return f"{self.path}.weight"

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of the map that each of its weights has, by name; a single matrix has all of them."""
        return {self.name: slice(None)}

    @property
    def weight(self) -> Tensor:
        """The weight: (hidden, width), or (width, hidden) if transposed, or packed; the parameter itself, not a copy.

        Of an offloaded weight these are the values that are fetched for each call.
        """
        return cast(Tensor, fetched(self.module, "weight"))

    @property
    def bias(self) -> Tensor | None:
        """The bias, (hidden,); None for a map without one."""
        return fetched(self.module, "bias")

    @property
    def hidden(self) -> int:
        """The length of the vectors that the map writes."""
        return map_shape(self.module, transposed=self.transposed)[0]

    @property
    def width(self) -> int:
        """The length of the vectors that the map reads; for a down projection, the width of the MLP."""
        return map_shape(self.module, transposed=self.transposed)[1]

    @property
    def device(self) -> torch.device:
        """The device on which the map is computed; an offloaded weight is there only while it is."""
        return compute_device(self.module)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class ExpertProjection(Projection):
    """Some or all of a layer's routed experts as one linear map; its `module` is a `RoutedExperts`.

    What it reads are the stacked keys, each times its routing weight; its output is the output of all experts together,
    to which the map adds, so that a change of the output is a change of what these experts write.
    """

    @property
    def experts(self) -> RoutedExperts:
        """The module."""
        return cast(RoutedExperts, self.module)

    @property
    def name(self) -> str:
        """The name of the weight: that of the parameter, with the number of the expert if it is a single one."""
        return self.path

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of the map that each expert's slice has, by the name of the slice."""
        stem, width = self.path.partition("[")[0], self.experts.width
        return {
            slice_name(stem, number): slice(place * width, (place + 1) * width)
            for place, number in enumerate(self.experts.numbers)
        }

    @property
    def weight(self) -> Tensor:
        """The weights side by side, (hidden, width): a copy, or a view of the parameter if it is a single expert's."""
        return self.experts.weight

    @property
    def bias(self) -> Tensor | None:
        """None: the output is that of all experts, whose biases are no part of the map."""
        return None

    @property
    def hidden(self) -> int:
        """The length of the vectors that the map writes."""
        return self.experts.hidden

    @property
    def width(self) -> int:
        """The length of a stacked key: the width of one expert times the number of experts."""
        return self.experts.width * len(self.experts.numbers)

    @property
    def device(self) -> torch.device:
        """The device on which the experts are computed."""
        return compute_device(self.experts.source)


def slice_name(name: str, number: int) -> str:
    """Return the name of one slice of a three-dimensional parameter, such as "experts.down_proj[3]"."""
    return f"{name}[{number}]"


class RoutedExperts(nn.Module):
    """A view of some experts of a module that keeps its weights as (expert, ...), as all of transformers 5 do.

    It is no part of the model. While it is attached, every run of the experts calls it with the keys that they compute
    for these experts and with the output of all, which it returns: so hooks on it read and replace both. Called with
    keys alone, it returns what its experts make of them, without biases.
    """

    def __init__(self, source: nn.Module, numbers: Sequence[int]) -> None:
        """Prepare a view. source: the experts' module, for which `is_stack` is true. numbers: experts, from 0."""
        super().__init__()
        self._source = (source,)  # in a tuple, so that it is not a child whose hooks and mode follow this view's
        self.numbers = tuple(numbers)
        self._users = 0
        self._relay: RemovableHandle | None = None

    @property
    def source(self) -> Any:
        """The experts' module."""
        return self._source[0]

    @property
    def transposed(self) -> bool:
        """True if a slice is stored as (width, hidden) instead of (hidden, width)."""
        return bool(self.source.is_transposed)

    @property
    def hidden(self) -> int:
        """The length of what an expert writes."""
        return self.source.down_proj.shape[2 if self.transposed else 1]

    @property
    def width(self) -> int:
        """The length of one expert's activation."""
        return self.source.down_proj.shape[1 if self.transposed else 2]

    @property
    def weight(self) -> Tensor:
        """The matrices of these experts side by side, (hidden, width times their number)."""
        whole = self._fetched("down_proj")
        oriented = [whole[number].T if self.transposed else whole[number] for number in self.numbers]
        return oriented[0] if len(oriented) == 1 else torch.cat(oriented, dim=1)

    def attach(self) -> Callable[[], None]:
        """Take part in the runs of the experts until the returned function was called as often as this one."""
        if self._relay is None:
            self._relay = self.source.register_forward_hook(self._pass_on, with_kwargs=True)
        self._users += 1
        return self._detach

    def forward(self, keys: Tensor, output: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Return what these experts write for keys (..., width times their number), or the output of a run of all.

        output: that output, to which what other keys than those of `before` add is added.
        """
        if output is None:
            return self._written(keys)
        if before is None or keys.data_ptr() == before.data_ptr():
            return output
        return output + self._written(keys - before).to(output.dtype).view_as(output)

    def _written(self, keys: Tensor) -> Tensor:
        whole = self._fetched("down_proj")
        parts = zip(keys.split(self.width, dim=-1), self.numbers, strict=True)
        matrices = ((own, whole[number] if self.transposed else whole[number].T) for own, number in parts)
        return cast(Tensor, sum(own @ matrix.to(own) for own, matrix in matrices))

    def keys(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the activations of these experts times their routing weights, side by side.

        Args:
            states: What the experts read, (token, hidden).
            index: The experts that each token is routed to, (token, choice).
            weights: Their routing weights, (token, choice).

        Returns:
            Keys (token, width times the number of experts), float32 or wider; zeros for experts not routed to.
        """
        wide = torch.promote_types(states.dtype, torch.float32)
        names = ["gate_up_proj" if self.source.has_gate else "up_proj"]
        names += [f"{names[0]}_bias"] if self.source.has_bias else []
        matrices, *biases = [self._fetched(name) for name in names]  # once, since an offloaded one is read from a file
        columns = []
        for number in self.numbers:
            token, choice = torch.where(index == number)
            matrix = matrices[number].T if self.transposed else matrices[number]
            risen = functional.linear(states[token], matrix, *(bias[number] for bias in biases))
            active = self.source._apply_gate(risen) if self.source.has_gate else self.source.act_fn(risen)
            own = active.to(wide) * weights[token, choice, None].to(wide)
            columns.append(own.new_zeros(len(states), self.width).index_add(0, token, own))
        return torch.cat(columns, dim=-1)

    def biases(self, index: Tensor, weights: Tensor) -> Tensor | float:
        """Return what the biases of all experts add for each token, (token, hidden); 0 for experts without any."""
        if not self.source.has_bias:
            return 0.0
        return (self._fetched("down_proj_bias")[index] * weights[..., None]).sum(1)

    def arguments(self, given: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, index and weights, as `keys` takes them, from a call of the experts."""
        bound = inspect.signature(self.source.forward).bind(*given, **keywords)
        states, index, weights = [*bound.arguments.values()][:3]
        tokens = states.reshape(-1, states.shape[-1])
        return tokens, index.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)

    def _pass_on(self, _source: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
        if not self._forward_pre_hooks:  # nobody reads the keys
            return self(output.new_zeros(0), output)
        keys = self.keys(*self.arguments(given, keywords))
        return self(keys, output, keys)

    def _detach(self) -> None:
        self._users -= 1
        if not self._users and self._relay is not None:
            self._relay.remove()
            self._relay = None

    def _fetched(self, name: str) -> Tensor:
        return cast(Tensor, fetched(self.source, name)).to(compute_device(self.source))


def is_stack(experts: nn.Module) -> bool:
    """Return whether a module keeps its experts in ordinary three-dimensional weights and says how it reads them.

    The marks are those that transformers gives every class of experts that its fused kernels can replace.
    """
    marks = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_apply_gate")
    if not all(hasattr(experts, mark) for mark in marks) or cast(Any, experts).has_post_expert_norm:
        return False
    weight = getattr(experts, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and (weight.is_meta or is_plain(weight))
