"""Layers with a running state in place of attention: linear attention, state-space models, short convolutions.

The output of such a layer at a position depends on all earlier inputs, through a state of fixed size. To replay it at
some positions, the module that mixes positions (the mixer) goes on from its state before the first of them. The layer's
own cache holds that state after a run over the inputs of earlier positions, which come from recordings as the keys and
values of attention do. Everything else in the layer runs at the computed positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import ReplayError
from ..families import Projection
from ..guards import uninterrupted
from ..hooks import StopForward, main_tensor, named_arguments
from ..vlm import VisionLanguageModel
from .attention import Job
from .recording import Queries, Recording, Source, places

if TYPE_CHECKING:
    from transformers import Cache

_Chain = tuple[tuple[Recording, int], ...]
"""Recordings that hold the inputs of positions from 0 on, each with the end of its positions."""


class Running:
    """The continued mixers of one model, and their states after the positions that recordings hold."""

    def __init__(self, vlm: VisionLanguageModel, mixers: Mapping[int, nn.Module]) -> None:
        self.mixers = mixers
        """The modules that mix positions in layers without attention, by layer."""
        self._config = vlm.config.get_text_config(decoder=True)
        self._states: dict[int, dict[_Chain, Cache]] = {}

    def check(self, projections: Collection[Projection]) -> None:
        """Raise `ReplayError` if the input of one of these lies inside a mixer, where other positions run as well."""
        inside = {id(part): number for number, mixer in self.mixers.items() for part in mixer.modules()}
        layers = [inside[id(each.module)] for each in projections if id(each.module) in inside]
        if layers:
            raise ReplayError(f"decoder layer {layers[0]} keeps a running state, so its heads are not attention heads")

    @contextmanager
    def continued(self, number: int, queries: Queries, job: Job, read: Sequence[int] | None) -> Iterator[None]:
        """Let the layer's mixer, if it has one, run at the positions of `queries` only, until the block ends.

        Its inputs there are put into `job.computed`. With `read`, its outputs are those at these positions.
        """
        mixer = self.mixers.get(number)
        if mixer is None:
            yield
            return
        call = _Mixer(number, mixer, self._config)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return self._forward(call.bound(arguments, keywords), queries, job, read)

        with call.replaced(forward):
            yield

    def _forward(self, call: _Mixer, queries: Queries, job: Job, read: Sequence[int] | None) -> Any:
        job.computed = call.inputs[:, None], call.inputs[:, None]
        if job.is_stopped:
            raise StopForward
        inputs = call.inputs if job.given is None else job.given[0][:, 0]
        chosen = queries.positions if read is None else tuple(read)
        first, end = queries.positions[0], chosen[-1] + 1
        held = _held(queries.sources, end, set(queries.positions))
        whole = inputs.new_empty(len(inputs), end - first, inputs.shape[-1])
        within = [place for place in queries.positions if place < end]
        span = range(first, end)
        whole[:, places(span, within, whole.device)] = inputs[:, : len(within)]
        for run, positions in _pieces(held, first, end):
            whole[:, places(span, positions, whole.device)] = _recorded(call.number, run, positions, whole)
        cache = self._before(call, _pieces(held, 0, first), whole)
        output = call(whole, cache)
        picked = main_tensor(output, "a mixer")[:, places(span, chosen, whole.device)]
        return (picked, *output[1:]) if isinstance(output, tuple) else picked

    def _before(self, call: _Mixer, pieces: Sequence[tuple[Recording, tuple[int, ...]]], whole: Tensor) -> Cache | None:
        """Return a cache that holds the mixer's state after these pieces in every row of `whole`; None for no pieces.

        States on the way are kept for the next call with the same pieces.
        """
        if not pieces:
            return call.fresh()
        chain: _Chain = tuple((run, positions[-1] + 1) for run, positions in pieces)
        kept = self._states.get(call.number, {})
        states = {chain[: end + 1]: kept.get(chain[: end + 1]) for end in range(len(chain))}
        cache, rows = call.fresh(), 1
        for (part, known), (run, positions) in zip(states.items(), pieces, strict=True):
            if known is None:
                inputs = run.keys[call.number][:, 0, places(run.positions, positions, whole.device)]
                count = max(rows, len(inputs))
                known = _copied(cache, count // rows)
                call(inputs.to(whole.device).repeat_interleave(count // len(inputs), 0), known)
                states[part] = known
            cache, rows = known, max(rows, len(run.keys[call.number]))
        self._states[call.number] = cast(dict[_Chain, Any], states)
        return _copied(cache, len(whole) // rows)


class _Mixer:
    """One call of a mixer: its inputs, its other arguments and where they take a cache."""

    def __init__(self, number: int, module: nn.Module, config: Any) -> None:
        self.number = number
        self.inputs = torch.empty(0)
        self._module, self._config = module, config
        self._forward: Callable[..., Any] = module.forward
        self._arguments: dict[str, Any] = {}
        self._input, *others = signature(module.forward).parameters
        caches = [name for name in others if name.startswith(("cache_params", "past_key_value"))]
        self._cache = caches[0] if caches else None

    def bound(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Mixer:
        """Take the arguments of a call and return this object."""
        self._arguments = named_arguments(self._forward, arguments, keywords)
        self.inputs = self._arguments.pop(self._input)
        return self

    def __call__(self, inputs: Tensor, cache: Cache | None) -> Any:
        arguments = self._arguments if self._cache is None else {**self._arguments, self._cache: cache}
        return self._forward(inputs, **arguments)

    def fresh(self) -> Cache:
        """Return an empty cache. Raises `ReplayError` if the mixer takes none."""
        from transformers import DynamicCache

        if self._cache is None:
            raise ReplayError(f"what mixes positions in decoder layer {self.number} takes no cache to go on from")
        return DynamicCache(config=self._config)

    @contextmanager
    def replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace the module's forward function until the block ends."""
        own = vars(self._module).get("forward")
        try:
            vars(self._module)["forward"] = forward
            yield
        finally:
            uninterrupted(lambda: _put_back(self._module, own))


def _put_back(module: nn.Module, own: Callable[..., Any] | None) -> None:
    vars(module).pop("forward", None)
    if own is not None:
        vars(module)["forward"] = own


def _held(sources: Sequence[Source], end: int, computed: set[int]) -> dict[int, Recording]:
    """Return the recording of each position before `end` that is not computed, in ascending order."""
    run_of = {place: source.run for source in sources for place in source.positions}
    return {place: run_of[place] for place in range(end) if place not in computed}


def _pieces(held: Mapping[int, Recording], first: int, end: int) -> list[tuple[Recording, tuple[int, ...]]]:
    """Return the held positions from `first` to before `end`, with those in a row from one recording together."""
    pieces: list[tuple[Recording, list[int]]] = []
    for place, run in held.items():
        if first <= place < end:
            if not pieces or pieces[-1][0] is not run:
                pieces.append((run, []))
            pieces[-1][1].append(place)
    return [(run, tuple(positions)) for run, positions in pieces]


def _recorded(number: int, run: Recording, positions: Sequence[int], whole: Tensor) -> Tensor:
    """Return a mixer's recorded inputs at some positions, for the rows of `whole`."""
    inputs = run.keys[number][:, 0, places(run.positions, positions, whole.device)].to(whole)
    return inputs.repeat_interleave(len(whole) // len(inputs), 0)


def _copied(cache: Cache, repeats: int) -> Cache:
    """Return a cache with copies of all tensors, each row as often as asked."""
    return _changed(cache, lambda value: value.repeat_interleave(repeats, 0))


def growing(cache: Cache) -> Cache:
    """Return a copy that can grow while the given cache does not.

    Keys and values are shared, since growing replaces them; running states are copied, since they are written into.
    """
    return _changed(cache, lambda value: value, torch.clone)


def of_rows(cache: Cache, rows: Tensor) -> Cache:
    """Return a copy with only some rows, (row,) indices."""
    return _changed(cache, lambda value: value[rows.to(value.device)] if value.numel() else value)


def _changed(
    cache: Cache, change: Callable[[Tensor], Tensor], change_state: Callable[[Tensor], Tensor] | None = None
) -> Cache:
    """Return a copy whose keys, values and running states are changed ones; the states lie in dictionaries."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fresh.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor) and value.ndim:
                vars(layer)[name] = change(value)
            elif isinstance(value, dict):
                of_state = change_state or change
                vars(layer)[name] = {
                    key: of_state(part) if isinstance(part, Tensor) else part for key, part in value.items()
                }
        if hasattr(layer, "recurrent_states"):
            vars(layer)["update_recurrent_state"] = partial(_replaced, layer)
    return fresh


def _replaced(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """Put a running state in place of the last one of a cache, which gradients need as it was."""
    layer.recurrent_states[state_idx] = recurrent_states
    layer.is_recurrent_states_initialized[state_idx] = True
    return recurrent_states
