"""Observation of forward passes: how the layers are called, and what their attention reads.

A `Witness` observes one run of decoder layers and checks that calling the layers one by one would repeat it. With a
replaced attention function (`attention_function`), a pass hides keys from queries (`masking`). Scores may be capped or
have sinks; any other attention than a softmax over scaled products raises `ReplayError`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError, ReplayError
from ..families import Site
from ..frame import ATTENDED, PER_QUERY
from ..guards import uninterrupted
from ..hooks import main_tensor, named_arguments
from ..vlm import VisionLanguageModel
from .attention import AttentionMethod, Softmax, masked, whole_attention
from .crossing import Attended, crossing_layers, without_edges
from .recording import Index

if TYPE_CHECKING:
    from transformers import Cache

_HARMLESS = {"position_ids", "use_cache", "sliding_window", "logits_to_keep", "cache_position", "is_causal"}
"""Keywords of attention functions that change nothing beyond the mask, which is captured whole."""
SHARED = "shared_kv_states"
"""The argument of layers that holds keys and values which other layers left there (Gemma 4)."""
LAYER_INPUT = "per_layer_input"
"""The argument of a layer that it is given beside its states, (row, token, size)."""
_SOFTMAX = {"softcap", "s_aux"}
"""Keywords of attention functions that `Softmax` computes."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The arguments of a decoder layer other than its input states."""

    keywords: Mapping[str, Any]
    """All these arguments by their names in the layer's signature, including positional ones."""

    def at(self, index: Index) -> dict[str, Any]:
        """Return the keywords for only some positions, the same in all rows; masks and caches are left out.

        Rotary positions must be those of one row. Raises `ReplayError` for an argument that cannot be cut to positions.
        """
        return {name: _at_positions(name, value, index) for name, value in self.keywords.items()}

    def rows(self, rows: Tensor, count: int) -> LayerCall:
        """Return the call for only some of its `count` rows."""
        return LayerCall(keywords={name: _of_rows(name, value, rows, count) for name, value in self.keywords.items()})

    def using(self, cache: Cache, shared: MutableMapping[str, Any] | None) -> dict[str, Any]:
        """Return the keywords of a call that reads and extends this cache instead of the recorded one.

        shared: takes the place of the mapping in which layers find keys and values of other layers, if there is one.
        """
        from transformers import Cache

        keywords = {name: cache if isinstance(value, Cache) else value for name, value in self.keywords.items()}
        return keywords if self.shared is None else {**keywords, SHARED: shared}

    @property
    def shared(self) -> MutableMapping[str, tuple[Tensor, ...]] | None:
        """The mapping in which layers leave keys and values for others, by name; None for most models."""
        value = self.keywords.get(SHARED)
        return value if isinstance(value, MutableMapping) else None


class Witness:
    """An observer of one run of decoder layers that raises `ReplayError` if a replay would not reproduce it.

    Layers are replayed at single positions, with one mask for all rows, or for a padded batch as a whole.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        between: Mapping[int, Tensor] | None = None,
        mixers: Mapping[int, nn.Module] | None = None,
        crossing: Collection[int] = (),
        skipped: Collection[int] = (),
        is_padded: bool = False,
    ) -> None:
        self.states: list[Tensor] = []
        """The input of the first layer and the output of each; for a padded batch, only the input of the first."""
        self.calls: list[LayerCall] = []
        """The other arguments of each layer's call."""
        self._layers = list(layers)
        self._between = between or {}  # what the text stack adds to the states that enter a layer, by its number here
        self._is_padded = is_padded
        self._mixers = mixers or {}  # what mixes positions in layers without attention, by layer
        self._mixed: dict[int, Tensor] = {}
        self._crossing, self._skipped = crossing, skipped  # layers that attend to pictures, and those that do not run
        self.pictures: dict[int, Attended] = {}
        """Keys and values of pictures and the mask, by layer that attends to pictures."""
        self._number_of = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}
        self._attended: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.borrowed: dict[int, int] = {}
        """The layers that attend to the keys of another layer, with that layer."""
        self._everything: Tensor | None = None  # one mask for all layers that are neither masked nor causal

    @property
    def attended(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return each layer's keys, values and mask; of one in `running`, the inputs of its mixer as keys and values.

        A layer that attends to pictures, or does not run, has those of a layer in which no token reads another.
        Raises `ReplayError` unless each layer ran once, and attended or mixed positions once.
        """
        attended = {
            number: (self._mixed[number][:, None], self._mixed[number][:, None], None) for number in self.running
        }
        attended |= self._attended
        if lonely := {*self.pictures, *self._skipped}:
            attended |= dict.fromkeys(lonely, without_edges(self.states[0]))
        if len(self.calls) != len(self._layers) or len(attended) != len(self._layers):
            raise ReplayError("not every decoder layer runs and attends exactly once")
        for number in self.running:
            mask = self.calls[number].keywords.get("attention_mask")
            if mask is not None and not bool((mask != 0).all()):
                raise ReplayError(f"padding is hidden from decoder layer {number}, which has a running state")
        return [attended[number] for number in range(len(self._layers))]

    @property
    def running(self) -> dict[int, nn.Module]:
        """Return the mixers that ran in layers without attention, by layer."""
        return {number: self._mixers[number] for number in sorted(set(self._mixed) - set(self._attended))}

    def attends(
        self, module: nn.Module, given: tuple[Tensor, Tensor, Tensor | None], keywords: dict[str, Any]
    ) -> tuple[int, Tensor | None]:
        """Return the number of the layer that attends and its mask, None if causal; store keys, values and mask.

        given: the keys, values and mask that an attention function received; keywords: what else it received.
        """
        number = self._number_of.get(id(module))
        if number is None or number in self._attended or number in self.pictures:
            raise ReplayError("a decoder layer attends more than once, or something else attends in between")
        known = _HARMLESS | _SOFTMAX
        unknown = [name for name, value in keywords.items() if name not in known and not _is_unset(value)]
        if unknown:
            raise ReplayError(f"the attention of decoder layer {number} is given {', '.join(unknown)}")
        key, value, mask = given
        owner = next((other for other, (known, _, _) in self._attended.items() if key is known), None)
        if owner is not None:
            self.borrowed[number] = self.borrowed.get(owner, owner)
        if number in self._crossing:
            if mask is None and _is_causal(module, keywords):
                raise ReplayError(f"decoder layer {number} attends to pictures without a mask, as if they were tokens")
            self.pictures[number] = given
            return number, mask
        if mask is None and not _is_causal(module, keywords):
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
        written: list[Tensor] = []

        def pass_over(states: Tensor) -> None:  # layers that do not run leave the states as they are
            while len(self.calls) in self._skipped:
                self.calls.append(LayerCall(keywords={}))
                self.states.append(states)

        def follow(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
            named = named_arguments(layer.forward, arguments, keywords)
            states = named.pop(next(iter(named)))
            pass_over(states)
            added = self._between.get(len(self.calls))
            if added is not None and written and last and last[0][0] is written[0]:
                last[:] = [(written[0] + added.to(written[0]), None)]
            if last and not _is_unchanged(*last[0], states):  # a hook on a layer would act again when it is replayed
                raise ReplayError(f"something changes the states that enter decoder layer {len(self.calls)}")
            last[:] = [(states, _version(states))]
            return named

        def first(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            follow(layer, arguments, keywords)

        def before(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call = LayerCall(keywords=follow(layer, arguments, keywords))
            if not self._is_padded:  # rows are compared here, since each replayed call would wait for the device
                call = LayerCall(keywords={name: _of_alike_rows(name, value) for name, value in call.keywords.items()})
                call.at(slice(0, 1))  # raises for arguments that cannot be cut to positions
            if not (self._is_padded and self.states):
                self.states.append(written[0] if written else last[0][0])
            self.calls.append(call)

        def after(_layer: nn.Module, _arguments: Any, result: Any) -> None:
            output = main_tensor(result, "a decoder layer")
            last[:], written[:] = [(output, _version(output))], [output]

        def mixing(number: int, mixer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if number in self._mixed:
                raise ReplayError(f"what mixes positions in decoder layer {number} runs more than once")
            self._mixed[number] = next(iter(named_arguments(mixer.forward, arguments, keywords).values()))

        with ExitStack() as stack:
            for number, mixer in self._mixers.items():
                hook = mixer.register_forward_pre_hook(partial(mixing, number), with_kwargs=True)
                stack.callback(hook.remove)
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(first, with_kwargs=True, prepend=True).remove)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            yield
        if last:
            pass_over(last[0][0])
        if len(self.calls) != len(self._layers):
            raise ReplayError("not every decoder layer runs and attends exactly once")
        if not self._is_padded:
            self.states.extend(states for states, _ in last)


def _at_positions(name: str, value: Any, index: Index) -> Any:
    """Return a layer's keyword for only some positions. Raises `ReplayError` for a tensor of unknown meaning."""
    if name in ("attention_mask", "layer_past", SHARED, LAYER_INPUT) or name.startswith("past_key_value"):
        return None  # visibility is captured where attention is computed, and the others belong to one run
    if name == ATTENDED and value is not None:
        return value[:1, :1]  # a layer attends to keys that are kept elsewhere
    if name in PER_QUERY and value is not None:
        return value[:, :, index]
    if name.startswith("position_embeddings") and value is not None:
        return tuple(part[..., index, :] for part in value) if isinstance(value, tuple) else value[..., index, :]
    if name in ("position_ids", "cache_position") and value is not None:
        return value[..., index]
    if value is None or isinstance(value, (bool, int, float, str)) or name == "logits_to_keep":  # the head's, passed on
        return value
    raise ReplayError(f"decoder layers are given {name!r}, which cannot be cut to single positions")


def _of_alike_rows(name: str, value: Any) -> Any:
    """Return rotary positions of one row, any other argument unchanged; `ReplayError` if rows have different ones.

    What tokens see of pictures is reduced to one row as well.
    """
    if name in PER_QUERY and isinstance(value, Tensor):
        if not torch.equal(value, value[:1].expand_as(value)):
            raise ReplayError("rows see different parts of their pictures")
        return value[:1]
    if not name.startswith("position_embeddings") or value is None:
        return value
    parts = value if isinstance(value, (tuple, list)) else (value,)
    row = 1 if parts[0].ndim == _WITH_AXES["position_embeddings"] else 0
    firsts = tuple(part.narrow(row, 0, 1) for part in parts)
    several = [(part, first) for part, first in zip(parts, firsts, strict=True) if part.shape[row] > 1]
    if not all(torch.equal(part, first.expand_as(part)) for part, first in several):
        raise ReplayError("rows have different positions")
    return firsts if isinstance(value, (tuple, list)) else firsts[0]


_WITH_AXES = {"position_ids": 3, "position_embeddings": 4}
"""Numbers of dimensions of positions on several axes (mrope), which lead with the axis."""


def _of_rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    """Return the part of an argument that belongs to some rows; an argument without rows is unchanged."""
    if isinstance(value, Tensor):
        if value.ndim == _WITH_AXES.get(name):
            return value[:, rows]
        return value[rows] if value.ndim > 1 and len(value) == count and count > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(name, part, rows, count) for part in value)
    return value


def _is_unset(value: Any) -> bool:
    return not isinstance(value, Tensor) and value in (None, False)


def _version(value: Tensor) -> int | None:
    """Return the tensor's count of in-place writes; None for tensors of inference mode."""
    return None if value.is_inference() else value._version


def _is_unchanged(before: Tensor, version: int | None, now: Tensor) -> bool:
    return version == _version(now) if before is now else torch.equal(before, now)


@contextmanager
def attention_function(vlm: VisionLanguageModel, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Replace the text model's attention function inside the block; restore it on exit, also after errors.

    Other threads wait until the block ends.

    Args:
        vlm: The model.
        attend: Called as transformers calls its own functions (module, query, key, value, mask, scaling=...,
            dropout=..., ...), with boolean masks or None; returns (row, query, head, size) and weights or None.

    Raises:
        ReplayError: If the text model does not let its attention function be replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config: Any = vlm.decoder.config
    name = f"multrace_{id(attend)}"
    with vlm.running():
        methods = _methods(vlm, attend)
        outer = {module: vars(module).get("_attn") for module in methods}  # of a block around this one
        before = config._attn_implementation

        def put_back() -> None:
            config._attn_implementation = before
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)
            for module, method in outer.items():
                vars(module).pop("_attn", None)
                vars(module).update({} if method is None else {"_attn": method})

        try:
            AttentionInterface.register(name, attend)
            AttentionMaskInterface.register(name, _mask_function(before))
            config._attn_implementation = name
            for module, method in methods.items():
                vars(module)["_attn"] = method
            yield
        finally:
            uninterrupted(put_back)


def _methods(
    vlm: VisionLanguageModel, attend: Callable[..., tuple[Tensor, Tensor | None]]
) -> dict[nn.Module, AttentionMethod]:
    """Return what replaces the methods `_attn` of attention modules; empty if they call an attention function by name.

    Raises `ReplayError` if they do neither: they would attend as before, but with the masks of another function.
    """
    modules = [part for layer in vlm.decoder_layers for part in layer.modules()]
    methods = {part: AttentionMethod(part, attend) for part in modules if _has_method(part)}
    if not getattr(vlm.decoder, "_supports_attention_backend", False) and not any(
        map(asks_for_attention, vlm.decoder_layers)
    ):
        raise ReplayError(f"{type(vlm.decoder).__name__} does not let its attention function be replaced")
    return methods


def asks_for_attention(layer: nn.Module) -> bool:
    """Return whether some part of a decoder layer calls an attention function that can be replaced."""
    return any(_has_method(part) or _calls_by_name(part) for part in layer.modules())


def mixers_of(vlm: VisionLanguageModel) -> dict[int, nn.Module]:
    """Return the modules that mix positions in layers without attention, by layer; empty for most models."""
    mixers = {}
    for number, layer in enumerate(vlm.decoder_layers):
        if not asks_for_attention(layer):
            try:
                mixers[number] = vlm.module(Site("attention", number))
            except ModelError:  # the recording says that this layer does not attend
                continue
    return mixers


def layers_without_attention(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """Return the layers that keep a running state in place of attention; empty for most models."""
    return tuple(mixers_of(vlm))


def _has_method(module: nn.Module) -> bool:
    return callable(getattr(type(module), "_attn", None))


def _calls_by_name(module: nn.Module) -> bool:
    """Return whether a module's class looks its attention function up in transformers' table, whatever it declares."""
    forwards = (unwrap(vars(kind)["forward"]) for kind in type(module).__mro__ if "forward" in vars(kind))
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _mask_function(implementation: str) -> Callable[..., Tensor | None]:
    """Return what makes boolean masks in place of those of an attention implementation; without one, none are made.

    Transformers' eager attention is causal by its mask alone, so the mask must not be left out there: the module may
    not say that it is causal (PaliGemma 2).
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    known: dict[str, Any] = AttentionMaskInterface._global_mapping
    if implementation.startswith("multrace_") and implementation in known:
        return known[implementation]
    return partial(_without_skip, sdpa_mask) if implementation == "eager" else sdpa_mask


def _without_skip(make: Callable[..., Tensor | None], *arguments: Any, **keywords: Any) -> Tensor | None:
    """Return a mask, also where a causal one could be left out."""
    return make(*arguments, **{**keywords, "allow_is_causal_skip": False})


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' own sdpa function returns for these arguments of an attention function.

    Capped scores and sinks, of which that function refuses or ignores the keyword, are computed by `whole_attention`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softmax = Softmax.of(query, scaling, keywords)
    if softmax.is_plain:
        tensors = query, key, value, attention_mask
        return cast(Any, sdpa_attention_forward)(module, *tensors, scaling=scaling, dropout=dropout, **keywords)
    if dropout:
        raise ReplayError("attention weights are dropped at random; put the model in eval mode")
    causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, keywords)
    output = whole_attention(query, key, value, softmax=softmax, causal=causal, mask=attention_mask)
    return output.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, keywords: Mapping[str, Any]) -> bool:
    """Return whether a call of an attention function without a mask is causal."""
    setting = keywords.get("is_causal")
    return bool(getattr(module, "is_causal", True) if setting is None else setting)


@contextmanager
def masking(vlm: VisionLanguageModel, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """Hide keys from queries in single layers of the text model until the block ends.

    The text model attends through transformers' sdpa function meanwhile (where scores are capped or have sinks, through
    matrix products), whatever its own is. Other threads wait until the block ends.

    Args:
        vlm: The model.
        hidden: From a decoder layer to booleans (head or 1, query, key), True where the query must not see the key.
            Passes in the block need as many queries and keys. A query from which everything is hidden has no
            meaningful output, unless a sink remains.

    Raises:
        ReplayError: If the text model does not let its attention function be replaced.

    Source: attention knockout, arXiv 2304.14767, section 4.1.

    Example:
        >>> import multrace as mt
        >>> import torch
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> clean = vlm.logits(prompt)
        >>> hidden = torch.zeros(1, prompt.length, prompt.length, dtype=torch.bool)
        >>> hidden[:, -1, 0] = True  # the last token must not see the first
        >>> with masking(vlm, {4: hidden}):
        ...     masked = vlm.logits(prompt)
        >>> bool((masked != clean)[0, -1].any()), bool((masked != clean)[0, :-1].any())
        (True, False)
    """
    layers = {id(part): number for number, layer in enumerate(vlm.decoder_layers) for part in layer.modules()}
    crossing = crossing_layers(vlm)  # their keys are states of pictures, at no position
    hidden = {number: cut for number, cut in hidden.items() if number not in crossing}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, None]:
        cut = hidden.get(layers[id(module)])
        if cut is not None:
            is_causal = _is_causal(module, keywords)
            attention_mask = masked(attention_mask, cut.to(query.device), is_causal=is_causal)
        return exact_attention(module, query, key, value, attention_mask, **keywords)

    with attention_function(vlm, attend):
        yield
