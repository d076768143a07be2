"""A row for an architecture that no table has, measured on the model itself; loading then proves it like any other.

One forward pass is watched: what every module reads and writes, in which order, and which module attends. From that
follow the decoder layers, the two modules whose outputs add up to what a layer adds to the residual stream, the linear
maps that write these outputs, the final norm, and for pictures the tower, its layers and the projector. A second pass
with another attention output tells whether the MLP of a layer sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, pairwise, takewhile
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AddressError
from ..guards import uninterrupted
from .table import Family, Names

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

_ENTRIES = (32, 256)
"""Number of tokens of a state, and of entries of each, evenly spread, by which it is compared with other states."""
_DEPTH = 3
"""Levels of modules below a decoder layer among which its two parts are looked for, the outermost first."""
_LEAST_SCALE = 1e-3
"""A module that is added at a smaller scale than this is no part of the sum."""
_MLPS = ("mlp", "feed_forward", "ffn", "moe")
"""Parts of the names of MLPs, by which they are told from a third part."""
_MOVED = 2
"""Number of tokens, the last ones, at which attention is changed to see what follows; they are words."""
_NOTICEABLE = 1e-3
"""Share of their size by which states move when something reaches them, rather than by rounding."""
_LEAST_EPS = 2.0**-23
"""Rounding that is forgiven in float64, too, in which norms still compute in float32."""
_TOWERS = ("visual", "vision", "image_tower")
"""Beginnings of the names of vision towers."""
_PROJECTORS = ("projector", "connector", "merger", "aligner", "language_projection")
"""Parts of the names of projectors, for a model that does not put pictures among the words."""
_MOST_OF = 0.5
"""Share of the projector's rows that the text stack reads; a model may leave out those of a tile's padding."""


@dataclass(eq=False)
class _Seen:
    """What one module did in the forward pass; of several calls, the last."""

    path: str
    module: nn.Module
    began: int
    """Number of the event at which it was called."""
    ended: int = -1
    """Number of the event at which it returned."""
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    """Entries of its first input, (token, entry); empty if that is no state."""
    wrote: Tensor = field(default_factory=lambda: torch.empty(0))
    """Entries of its first output, (token, entry); empty if that is no state."""
    shape: tuple[int, ...] = ()
    """The shape of its first output."""
    width: int = 0
    """The length of the vectors that it reads."""

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.module.parameters())

    @property
    def is_norm(self) -> bool:
        return all(parameter.ndim < 2 for parameter in self.module.parameters())

    def below(self, path: str) -> bool:
        """Return whether the module is the one at this path or inside it; every module is inside the model, ""."""
        return not path or self.path == path or self.path.startswith(f"{path}.")


class _Attending(TorchFunctionMode):
    """Calls a function whenever attention is computed: by torch's own function, or by a softmax over scores."""

    def __init__(self, attends: Callable[[], None]) -> None:
        super().__init__()
        self._attends = attends

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, scores = getattr(func, "__name__", ""), args[0] if args else None
        if name == "scaled_dot_product_attention" or (
            name == "softmax" and isinstance(scores, Tensor) and scores.ndim == 4  # (row, head, query, key)
        ):
            self._attends()
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class _Watch:
    """The record of a forward pass."""

    seen: dict[str, _Seen] = field(default_factory=dict)
    events: int = 0
    calls: list[int] = field(default_factory=list)
    """Numbers of the events at which attention was computed."""

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Record every module of the model inside the block."""
        handles: list[RemovableHandle] = []
        try:
            for path, module in model.named_modules():
                if path:
                    handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._after(path), always_call=True))
            with _Attending(self._attends), torch.no_grad():
                yield
        finally:
            uninterrupted(lambda: [handle.remove() for handle in handles])

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.events += 1
            state = _first((*arguments, *_states_first(keywords)))
            seen = _Seen(path=path, module=module, began=self.events)
            if state is not None and state.is_floating_point():
                seen.read, seen.width = _entries(state), state.shape[-1] if state.ndim else 0
            self.seen[path] = seen

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self.events += 1
            seen, state = self.seen[path], _first(output)
            seen.ended = self.events
            if state is not None and state.is_floating_point():
                seen.wrote, seen.shape = _entries(state), tuple(state.shape)

        return hook

    def _attends(self) -> None:
        self.events += 1
        self.calls.append(self.events)

    def ran(self) -> list[_Seen]:
        """Return the modules that wrote states, in the order in which they ended."""
        return sorted((seen for seen in self.seen.values() if seen.shape), key=lambda seen: seen.ended)

    def inside(self, path: str) -> list[_Seen]:
        """Return those inside the module at this path, not the module itself."""
        return [seen for seen in self.ran() if seen.path != path and seen.below(path)]


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of an input or output; None if it holds none."""
    if isinstance(value, Tensor):
        return value
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    )
    return next((state for part in parts if (state := _first(part)) is not None), None)


def _states_first(keywords: dict[str, Any]) -> list[Any]:
    """Return the values of the keywords, those that name states before the others."""
    return [
        keywords[name] for name in sorted(keywords, key=lambda name: name not in ("hidden_states", "inputs_embeds"))
    ]


def _entries(state: Tensor) -> Tensor:
    """Return some entries of a state (token, entry), the same ones for all states with vectors of that length."""
    rows = state.detach().reshape(-1, state.shape[-1]) if state.ndim > 1 else state.detach().reshape(1, -1)
    for axis, most in enumerate(_ENTRIES):
        if (count := rows.shape[axis]) > most:
            rows = rows.index_select(axis, torch.linspace(0, count - 1, most, device=rows.device).round().long())
    return rows.clone()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() > 0 and one.shape == other.shape and bool((one == other.to(one)).all())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One of the two modules that add to the residual stream in a layer; paths are relative to the layer."""

    module: str
    norm: str | None
    """The norm that its output passes before it is added."""
    projection: str | None
    """The linear map that writes its output; None where no single one does."""
    shared: str | None
    """Where no single one does, a map that writes a part of it for every token: that of a shared expert."""
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class _Layer:
    attention: _Part
    mlp: _Part
    beside: str | None
    """The path of a third module whose output the layer adds."""


def discover(model: PreTrainedModel, run: Callable[[], object], *, name: str, has_vision: bool) -> Family:
    """Return a family called "discovered", from what the model's modules do in three forward passes of one prompt.

    Args:
        model: The model, in eval mode.
        run: Runs the model on one prompt, with a picture if it takes pictures.
        name: The name of the model in error messages.
        has_vision: Whether the model takes pictures.

    Returns:
        The family. It holds what was measured on one prompt, so it has to be proven.

    Raises:
        AddressError: The decoder layers, the two parts of one of them, the final norm or the vision tower cannot be
            told.
    """
    watch = _Watch()
    with watch.over(model):
        run()
    layers = _decoder_layers(watch, model, name)
    found = [_layer(watch, path, name) for path in layers]
    norm = _final_norm(watch, model, layers, name)
    holder = layers[0].rpartition(".")[0]
    stack = _common(holder, norm)
    return Family(
        name="discovered",
        model_types=(model.config.model_type,),
        text_types=(model.config.get_text_config().model_type,),
        layers=_relative(holder, stack),
        attention=_names([layer.attention.module for layer in found]),
        attention_norm=_norm([layer.attention.norm for layer in found], name),
        attention_out=_names([_needed(layer.attention, path, name) for layer, path in zip(found, layers, strict=True)]),
        mlp=_names([layer.mlp.module for layer in found]),
        mlp_norm=_norm([layer.mlp.norm for layer in found], name),
        **_down(model, layers, [layer.mlp for layer in found]),
        final_norm=_relative(norm, stack),
        transposed=any(part.transposed for layer in found for part in (layer.attention, layer.mlp)),
        beside=next(filter(None, (layer.beside for layer in found)), None),
        **_effects(model, run, layers, found[len(layers) // 2], has_vision=has_vision),
        **(_vision(watch, model, run, layers, name) if has_vision else {}),
    )


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, candidate in model.named_modules() if candidate is module)


def _relative(path: str, above: str) -> str:
    return path.removeprefix(f"{above}.") if above else path


def _common(one: str, other: str) -> str:
    """Return the path of the innermost module that holds both."""
    steps = takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    return ".".join(step for step, _ in steps)


def _names(values: Sequence[str]) -> Names:
    """Return the one name that all layers have, or the different ones in the order in which they occur."""
    unique = tuple(dict.fromkeys(values))
    return unique[0] if len(unique) == 1 else unique


def _norm(values: Sequence[str | None], name: str) -> str | None:
    if len(set(values)) > 1:
        raise _error(name, f"only some layers have a norm ({', '.join(filter(None, set(values)))}) behind a part")
    return values[0]


def _needed(part: _Part, path: str, name: str) -> str:
    if part.projection is None:
        raise _error(name, f"no linear map writes what the attention {part.module!r} of {path!r} writes")
    return part.projection


def _down(model: nn.Module, layers: Sequence[str], parts: Sequence[_Part]) -> dict[str, Any]:
    """Return the names of the MLPs' maps, and of the experts of layers without one."""
    maps = [part.projection for part in parts if part.projection is not None]
    if len(maps) == len(parts):
        return {"down": _names(maps)}
    modules = [dict(model.get_submodule(layer).named_modules()) for layer in layers]
    with_map, without = ([own for own, part in zip(modules, parts, strict=True) if (part.projection is not None) is has]
                         for has in (True, False))  # fmt: skip
    marks = set[str].intersection(*map(set, without)).difference(*with_map) - {""}

    def rank(path: str) -> tuple[bool, bool, int, str]:
        has_stack = any(weight.ndim == 3 for weight in without[0][path].parameters(recurse=False))
        return not has_stack, "experts" not in path, len(path), path

    experts = {"experts": min(marks, key=rank)} if marks else {}
    shared = [part.shared for part in parts if part.shared is not None]
    return {"down": _names(maps) if maps else None, **experts, **({"shared": _names(shared)} if shared else {})}


def _decoder_layers(watch: _Watch, model: PreTrainedModel, name: str) -> list[str]:
    """Return the paths of the decoder layers: modules of one list, of the configured length, that ran in order."""
    count, lists = getattr(model.config.get_text_config(), "num_hidden_layers", None), []
    decoder = model.get_decoder()
    for path, module in decoder.named_modules(prefix=_path_of(model, decoder)):
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            ran = [watch.seen.get(f"{path}.{index}") for index in range(len(module))]
            layers = [seen for seen in ran if seen is not None and seen.shape]
            if len(layers) == len(module):
                lists.append((len(layers) == count, layers[0].began, [seen.path for seen in layers]))
    if not lists:
        raise _error(name, "no list of decoder layers in its text stack runs as a whole")
    return max(lists)[2]


def _layer(watch: _Watch, path: str, name: str) -> _Layer:
    """Return the parts of a decoder layer: attention is the first to write after attention was computed."""
    sums = _explaining(watch, path)
    if not sums:
        raise _error(
            name,
            f"no two modules of {path!r} write what this decoder layer adds to the residual stream",
            advice="no row serves layers that are not their input, attention and MLP in sum, each at one scale",
        )
    layer = watch.seen[path]
    calls = [event for event in watch.calls if layer.began < event < layer.ended]
    sources = [[_source(watch, path, part) for part in parts] for parts in sums]
    parts = max(sources, key=lambda parts: max(source.ended for source, _ in parts))
    parts.sort(key=lambda part: (bool(calls) and part[0].ended < calls[0], part[0].ended))
    attention, mlp, *others = parts[:1] + sorted(parts[1:], key=lambda part: _likeness(part[0], path), reverse=True)
    beside = [_relative((norm or source).path, path) for source, norm in others]
    return _Layer(
        attention=_part(watch, path, *attention), mlp=_part(watch, path, *mlp), beside=beside[0] if beside else None
    )


def _likeness(seen: _Seen, layer: str) -> tuple[bool, int]:
    """Return how much a module is like an MLP, by its name and its size, for a layer with a third part."""
    is_named = any(word in _relative(seen.path, layer) for word in _MLPS)
    return is_named, sum(parameter.numel() for parameter in seen.module.parameters())


def _explaining(watch: _Watch, path: str) -> list[tuple[_Seen, ...]]:
    """Return the pairs of modules in a layer that, each at a scale of its own, add up to what it adds; else triples.

    The outermost ones are taken; a module whose output another one repeats, such as a dropout, does not count.
    """
    layer = watch.seen[path]
    if layer.read.shape != layer.wrote.shape:
        return []
    for number, depth in (*((2, depth) for depth in range(1, _DEPTH + 1)), (3, 1)):
        parts: list[_Seen] = []
        for seen in sorted(watch.inside(path), key=lambda seen: seen.path.count(".")):
            if seen.path.count(".") - path.count(".") > depth or seen.shape[-1] != layer.shape[-1]:
                continue
            if seen.wrote.shape == layer.wrote.shape and not any(_same(seen.wrote, part.wrote) for part in parts):
                parts.append(seen)
        parts.sort(key=lambda seen: seen.ended)
        sums = [parts for parts in combinations(parts, number) if _adds_up(layer, parts)]
        if sums:
            return sums
    return []


def _adds_up(layer: _Seen, modules: tuple[_Seen, ...]) -> bool:
    """Return whether the layer's output is a sum of its input and these outputs, each at a scale, up to rounding.

    Only the later half of the tokens counts: cross-attention may add nothing to those before the picture.
    """
    states = (layer.read, *(seen.wrote for seen in modules), layer.wrote)
    *parts, written = (state[len(state) // 2 :].double().cpu().flatten() for state in states)
    columns = torch.stack(parts, 1)
    scales = torch.linalg.lstsq(columns, written[:, None]).solution[:, 0]
    terms = columns * scales
    rounding = 8 * max(torch.finfo(layer.wrote.dtype).eps, _LEAST_EPS) * float(terms.norm())
    return bool((scales.abs() > _LEAST_SCALE).all()) and float((terms.sum(1) - written).norm()) <= rounding


def _source(watch: _Watch, layer: str, part: _Seen) -> tuple[_Seen, _Seen | None]:
    """Return the module whose output a part is, and the norm that it passes before, if the part is such a norm."""
    if not part.is_norm:
        return part, None
    before = [
        seen
        for seen in watch.inside(layer)
        if seen.ended < part.began and not seen.is_norm and seen.shape[-1:] == part.shape[-1:]
    ]
    writers = [seen for seen in before if _same(seen.wrote, part.read)] or before[-1:]
    if not writers:
        return part, None
    return min(writers, key=lambda seen: seen.path.count(".")), part


def _part(watch: _Watch, layer: str, source: _Seen, norm: _Seen | None) -> _Part:
    maps = [
        seen
        for seen in watch.ran()
        if seen.below(source.path)
        and getattr(getattr(seen.module, "weight", None), "ndim", 0) == 2
        and seen.shape[-1:] == source.shape[-1:]
        and prod(seen.shape) == prod(source.shape)
    ]
    whole = [seen for seen in maps if _same(seen.wrote, source.wrote)][-1:]
    return _Part(
        module=_relative(source.path, layer),
        norm=None if norm is None else _relative(norm.path, layer),
        projection=_relative(whole[0].path, layer) if whole else None,
        shared=_relative(maps[-1].path, layer) if maps and not whole else None,
        transposed=any(map(_is_transposed, whole)),
    )


def _is_transposed(seen: _Seen) -> bool:
    """Return whether a linear map stores its weight as (input, output), which a square one shows by its class only."""
    weight = cast(Tensor, seen.module.weight)
    sizes = (seen.width, seen.shape[-1])
    return tuple(weight.shape) == sizes and (sizes[0] != sizes[1] or type(seen.module).__name__ == "Conv1D")


def _final_norm(watch: _Watch, model: PreTrainedModel, layers: Sequence[str], name: str) -> str:
    """Return the path of the module of the text stack that reads what the last layer writes."""
    last, stack = watch.seen[layers[-1]], _path_of(model, model.get_decoder())
    after = [seen for seen in watch.inside(stack) if seen.began > last.ended and _same(seen.read, last.wrote)]
    if not after:
        raise _error(name, f"no module of its text stack reads what the last layer {last.path!r} writes")
    return min(after, key=lambda seen: seen.began).path


def _effects(
    model: nn.Module, run: Callable[[], object], layers: Sequence[str], layer: _Layer, *, has_vision: bool
) -> dict[str, Any]:
    """Return what follows when attention in the middle layer writes something else at the last tokens.

    Whether the MLP of the layer writes the same there (parallel), and whether earlier tokens change (prefix).
    """
    path = layers[len(layers) // 2]
    attention, mlp = (model.get_submodule(f"{path}.{part.module}") for part in (layer.attention, layer.mlp))
    written: dict[nn.Module, list[Tensor]] = {mlp: [], model.get_submodule(layers[-1]): []}

    def move(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        moved = cast(Tensor, _first(output)).clone()
        rows = moved.view(-1, moved.shape[-1])
        rows[-_MOVED:] = 1 - rows[-_MOVED:]  # neither a scale nor a shift, which norms would take back
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    def keep(module: nn.Module, _arguments: Any, output: Any) -> None:
        state = cast(Tensor, _first(output)).detach()
        written[module].append(state.reshape(-1, state.shape[-1]).clone())

    handles = [module.register_forward_hook(keep) for module in written]
    try:
        with torch.no_grad():
            run()
            handles.append(attention.register_forward_hook(move))
            run()
    finally:
        uninterrupted(lambda: [handle.remove() for handle in handles])
    (still, moved), (before, after) = written.values()
    earlier = (after - before)[:-_MOVED].norm() > _NOTICEABLE * before[:-_MOVED].norm()
    return {"parallel": torch.equal(still[-_MOVED:], moved[-_MOVED:])} | (
        {"prefix": bool(earlier)} if has_vision else {}
    )


def _vision(
    watch: _Watch, model: PreTrainedModel, run: Callable[[], object], layers: Sequence[str], name: str
) -> dict[str, Any]:
    """Return the names of the vision tower, its layers and the projector."""
    base = getattr(model, model.base_model_prefix, model)
    above = _path_of(model, base)
    towers = [child for child, _ in base.named_children() if child.startswith(_TOWERS)] or _early(
        watch, base, above, layers
    )
    if not towers:
        children = ", ".join(child for child, _ in base.named_children())
        raise _error(name, f"no vision tower is among the children of its base model ({children})")
    tower = f"{above}.{towers[0]}".lstrip(".")
    chain = _tower_layers(watch, model, tower)
    projector = _projector(watch, model, run, tower, layers)
    if projector is None:
        projector = next(
            (
                f"{above}.{child}".lstrip(".")
                for child, _ in base.named_children()
                if any(part in child for part in _PROJECTORS)
            ),
            None,
        )
    return {
        "vision": towers[0],
        "vision_layers": None if chain is None else _relative(chain, tower),
        "projector": None if projector is None else _relative(projector, above),
    }


def _early(watch: _Watch, base: nn.Module, above: str, layers: Sequence[str]) -> list[str]:
    """Return the children with weights that ran before the decoder and are no embeddings, the largest first."""
    sizes = {}
    for child, module in base.named_children():
        seen = watch.seen.get(f"{above}.{child}".lstrip("."))
        if seen is not None and seen.ended < watch.seen[layers[0]].began and not isinstance(module, nn.Embedding):
            sizes[child] = sum(parameter.numel() for parameter in module.parameters())
    return sorted((child for child, size in sizes.items() if size), key=lambda child: -sizes[child])


def _tower_layers(watch: _Watch, model: nn.Module, tower: str) -> str | None:
    """Return the longest list of modules in the tower of which each reads what the one before it wrote."""
    chains = []
    for path, module in model.get_submodule(tower).named_modules(prefix=tower):
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            ran = [seen for child, _ in module.named_children() if (seen := watch.seen.get(f"{path}.{child}"))]
            are_layers = all(seen.has_weights and (seen.width,) == seen.shape[-1:] for seen in ran)
            if (
                are_layers
                and len(ran) == len(module)
                and all(_same(before.wrote, after.read) for before, after in pairwise(ran))
            ):
                chains.append((len(ran), -path.count("."), path))
    return max(chains)[2] if chains else None


def _projector(
    watch: _Watch, model: PreTrainedModel, run: Callable[[], object], tower: str, layers: Sequence[str]
) -> str | None:
    """Return the last module before the text stack most of whose rows the first decoder layer reads."""
    first = watch.seen[layers[0]]
    before = [
        seen
        for seen in watch.ran()
        if seen.ended < first.began
        and seen.shape[-1:] == first.shape[-1:]
        and not (tower.startswith(f"{seen.path}.") or seen.path == tower)
        and not isinstance(seen.module, nn.Embedding)
    ]
    written: dict[nn.Module, Tensor] = {}
    entered: list[Tensor] = []

    def keep(module: nn.Module, _arguments: Any, output: Any) -> None:
        written[module] = cast(Tensor, _first(output))

    readers = (first.module, cast(nn.Module, model.get_decoder()))  # the first layer may read positions, too
    handles = [reader.register_forward_pre_hook(_keep_input(entered), with_kwargs=True) for reader in readers]
    handles += [seen.module.register_forward_hook(keep) for seen in before]
    try:
        with torch.no_grad():
            run()
    finally:
        uninterrupted(lambda: [handle.remove() for handle in handles])
    rows = set().union(*map(_rows, entered))
    for seen in reversed(before):
        own = _rows(written[seen.module])
        if len(own & rows) >= _MOST_OF * len(own):
            return seen.path
    return None


def _rows(states: Tensor) -> set[bytes]:
    flat = states.detach().flatten(0, -2).cpu().contiguous()
    return {bytes(row) for row in flat.view(torch.uint8).numpy()}


def _keep_input(entered: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        state = _first((*arguments, *_states_first(keywords)))
        if state is not None and state.is_floating_point():
            entered.append(state)

    return hook


def _error(
    name: str, failure: str, *, advice: str = "pass load(..., families=(Family(...),)) with its names"
) -> AddressError:
    return AddressError(f"what the parts of {name!r} are cannot be discovered: {failure}; {advice}")
