"""Observation of one run of decoder layers, and a check that calling the layers one by one would repeat it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import ReplayError
from ..hooks import main_tensor
from .recording import Index

_HARMLESS = {"position_ids", "use_cache", "sliding_window", "logits_to_keep", "cache_position", "is_causal"}
"""Keywords of attention functions that change nothing beyond the mask, which is captured whole."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The arguments of a decoder layer other than its input states."""

    keywords: Mapping[str, Any]
    """All these arguments by their names in the layer's signature, including positional ones."""

    def at(self, index: Index) -> dict[str, Any]:
        """Return the keywords for only some positions, the same in all rows; masks and caches are left out.

        Raises `ReplayError` for rows that differ in their positions, and for an argument that cannot be cut to
        positions.
        """
        return {name: _at_positions(name, value, index) for name, value in self.keywords.items()}

    def rows(self, rows: Tensor, count: int) -> "LayerCall":
        """Return the call for only some of its `count` rows."""
        return LayerCall(keywords={name: _of_rows(value, rows, count) for name, value in self.keywords.items()})

    def again(self, layer: nn.Module, states: Tensor, cache: Cache) -> Tensor:
        """Return the layer's output for these states, which reads and extends this cache."""
        keywords = {name: cache if isinstance(value, Cache) else value for name, value in self.keywords.items()}
        return main_tensor(layer(states, **keywords), "a decoder layer")


class Witness:
    """An observer of one run of decoder layers that raises `ReplayError` if a replay would not reproduce it.

    Layers are replayed at single positions, with one mask for all rows, or for a padded batch as a whole.
    """

    def __init__(self, layers: Sequence[nn.Module], *, is_padded: bool = False) -> None:
        self.states: list[Tensor] = []
        """The input of each layer and the output of the last; for a padded batch, only the input of the first."""
        self.calls: list[LayerCall] = []
        """The other arguments of each layer's call."""
        self._layers = list(layers)
        self._is_padded = is_padded
        self._number_of = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}
        self._attended: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._everything: Tensor | None = None  # one mask for all layers that are neither masked nor causal

    @property
    def attended(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return each layer's keys, values and mask. Raises `ReplayError` unless each layer ran and attended once."""
        if len(self.calls) != len(self._layers) or len(self._attended) != len(self._layers):
            raise ReplayError("not every decoder layer runs and attends exactly once")
        return [self._attended[number] for number in range(len(self._layers))]

    def attends(
        self, module: nn.Module, given: tuple[Tensor, Tensor, Tensor | None], keywords: dict[str, Any]
    ) -> tuple[int, Tensor | None]:
        """Return the number of the layer that attends and its mask, None if causal; store keys, values and mask.

        given: the keys, values and mask that an attention function received; keywords: what else it received.
        """
        number = self._number_of.get(id(module))
        if number is None or number in self._attended:
            raise ReplayError("a decoder layer attends more than once, or something else attends in between")
        unknown = [name for name, value in keywords.items() if name not in _HARMLESS and not _is_unset(value)]
        if unknown:
            raise ReplayError(f"the attention of decoder layer {number} is given {', '.join(unknown)}")
        key, value, mask = given
        if value.shape[-1] != key.shape[-1]:
            raise ReplayError(f"keys and values of decoder layer {number} have different sizes")
        setting = keywords.get("is_causal")
        if mask is None and not (getattr(module, "is_causal", True) if setting is None else setting):
            if self._everything is None:
                self._everything = torch.ones(1, 1, key.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            mask = self._everything
        self._attended[number] = key, value, mask
        return number, mask

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the layers, which must run once and in order inside the block.

        Raises `ReplayError` from the run if anything but a layer changes the states between two layers, and after it
        if not every layer ran exactly once.
        """
        last: list[tuple[Tensor, int | None]] = []

        def follow(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
            named = _named(layer, arguments, keywords)
            states = named.pop(next(iter(named)))
            if last and not _is_unchanged(*last[0], states):  # a hook on a layer would act again when it is replayed
                raise ReplayError(f"something changes the states that enter decoder layer {len(self.calls)}")
            last[:] = [(states, _version(states))]
            return named

        def first(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            follow(layer, arguments, keywords)

        def before(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call = LayerCall(keywords=follow(layer, arguments, keywords))
            if not self._is_padded:
                call.at(slice(0, 1))  # raises for arguments that cannot be cut to positions
            if not (self._is_padded and self.states):
                self.states.append(last[0][0])
            self.calls.append(call)

        def after(_layer: nn.Module, _arguments: Any, result: Any) -> None:
            output = main_tensor(result, "a decoder layer")
            last[:] = [(output, _version(output))]

        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(first, with_kwargs=True, prepend=True).remove)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            yield
        if len(self.calls) != len(self._layers):
            raise ReplayError("not every decoder layer runs and attends exactly once")
        if not self._is_padded:
            self.states.extend(states for states, _ in last)


def _at_positions(name: str, value: Any, index: Index) -> Any:
    """Return a layer's keyword for only some positions. Raises `ReplayError` for a tensor of unknown meaning."""
    if name == "attention_mask" or name.startswith("past_key_value"):
        return None  # visibility is captured where attention is computed
    if name.startswith("position_embeddings") and value is not None:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if any(part.shape[0] != 1 and not torch.equal(part, part[:1].expand_as(part)) for part in parts):
            raise ReplayError("rows have different positions")
        picked = tuple(part[:1][..., index, :] for part in parts)
        return picked if isinstance(value, (tuple, list)) else picked[0]
    if name in ("position_ids", "cache_position") and value is not None:
        return value[..., index]
    if value is None or isinstance(value, (bool, int, float, str)) or name == "logits_to_keep":  # the head's, passed on
        return value
    raise ReplayError(f"decoder layers are given {name!r}, which cannot be cut to single positions")


def _of_rows(value: Any, rows: Tensor, count: int) -> Any:
    """Return the part of an argument that belongs to some rows; an argument without rows is unchanged."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and len(value) == count and count > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(part, rows, count) for part in value)
    return value


def for_rows(rows: int, keywords: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Return masks and positions of a model call for this many rows. Raises `ReplayError` if rows differ in them."""
    given = {name: value for name, value in keywords.items() if value is not None}
    for name, value in given.items():
        if value.ndim % 2 == 0:  # positions on three axes lead with the axis
            if not torch.equal(value, value[:1].expand_as(value)):
                raise ReplayError(f"{name} differs from row to row")
            given[name] = value[:1].expand(rows, *value.shape[1:])
    return given


def _is_unset(value: Any) -> bool:
    return not isinstance(value, Tensor) and value in (None, False)


def _version(value: Tensor) -> int | None:
    """Return the tensor's count of in-place writes; None for tensors of inference mode."""
    return None if value.is_inference() else value._version


def _is_unchanged(before: Tensor, version: int | None, now: Tensor) -> bool:
    return version == _version(now) if before is now else torch.equal(before, now)


def _named(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, the hidden states first."""
    bound = signature(layer.forward).bind(*arguments, **keywords)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = bound.signature.parameters[name].kind is Parameter.VAR_KEYWORD
        named |= value if is_rest else {name: value}
    return named
