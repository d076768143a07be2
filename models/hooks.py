"""Read and replace what modules compute for the length of a `with` block.

A module may pass on a tensor or a tuple, and take its states as a positional or as a keyword argument; hooks keep
everything else in the tuple or call. `capture` and `patch` are the plain way; `Trace` and `TraceDict` do the same with
the names and the behaviour that code written for baukit expects.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError
from .families import Key, Projection, RoutedExperts
from .guards import ModelLock, uninterrupted

AnyKey = TypeVar("AnyKey", bound=Key)


class Addressed(Protocol):
    """The interface that `capture` and `patch` need; `VisionLanguageModel` implements it."""

    @property
    def lock(self) -> ModelLock:
        """The lock that a thread holds while it hooks the model."""

    def module(self, key: Key) -> nn.Module:
        """Return the module of a site, projection or dotted path, or the module itself."""

    def layer_around(self, key: Key) -> nn.Module | None:
        """Return the decoder layer around an MLP or attention site or a projection; None for every other key."""


@contextmanager
def capture(
    vlm: Addressed, keys: Iterable[AnyKey], *, inputs: bool = False, clone: bool = False
) -> Iterator[dict[AnyKey, Tensor]]:
    """Yield a dict that fills with each module's output (or input) at every forward pass inside the block.

    A later pass overwrites an earlier one. The states include a `patch` that was entered before this block, but not one
    entered after it. Other threads wait until the block ends. On exit exactly the hooks placed here are removed.

    Args:
        vlm: The model.
        keys: Sites, projections, dotted module paths or modules; the dict has the same keys.
        inputs: Whether to capture the modules' inputs instead of their outputs (default False).
        clone: Whether to copy the tensors, which later code could otherwise modify (default False).

    Yields:
        The dict from key to tensor (batch, token, width), in the model's dtype and still in the autograd graph.

    Raises:
        ModelError: Before any hook is placed, for a key that names no module; from the forward pass, for a module
            whose first output (or input) is no tensor.

    Source: the hooks of baukit (davidbau/baukit, nethook.py).

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.models import Site
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> with mt.capture(vlm, [Site("mlp", 3), vlm.down_projection(3)]) as states:
        ...     logits = vlm.logits(prompt)
        >>> states[Site("mlp", 3)].shape == (1, prompt.length, vlm.hidden)
        True
    """
    modules = {key: vlm.module(key) for key in keys}
    captured: dict[AnyKey, Tensor] = {}

    def recorder(key: AnyKey) -> Callable[[Tensor], None]:
        def record(value: Tensor) -> None:
            captured[key] = value.clone() if clone else value

        return record

    visits = [_Visit(module, recorder(key), str(key), vlm.layer_around(key)) for key, module in modules.items()]
    with vlm.lock, _placed(visits, inputs=inputs):
        yield captured


@contextmanager
def patch(
    vlm: Addressed,
    functions: Mapping[AnyKey, Callable[[Tensor], Tensor]],
    *,
    inputs: bool = False,
    ahead: bool = False,
) -> Iterator[None]:
    """Replace each module's output (or input) by a function of it inside the block.

    The rest of the tuple or call is unchanged. Other threads wait until the block ends. On exit,
    also after an error, exactly the hooks placed here are removed.

    Args:
        vlm: The model.
        functions: From a site, projection, dotted module path or module to the function that replaces its tensor. A
            function receives (batch, token, width), must not write into it, and returns a tensor of the same shape.
        inputs: Whether to replace the modules' inputs instead of their outputs (default False).
        ahead: Whether to act before all existing hooks (default False). The layers of a vision tower
            need this: transformers collects their outputs with its own hooks, and the projector reads from those.

    Yields:
        None.

    Raises:
        ModelError: Before any hook is placed, for a key that names no module; from the forward pass, for a function
            that writes into its argument or returns anything but a tensor of the same shape.

    Source: activation patching, as in ROME (arXiv 2202.05262, section 2.1).

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.models import Site
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> clean = vlm.logits(prompt)
        >>> with mt.patch(vlm, {Site("mlp", 3): lambda output: 0 * output}):
        ...     patched = vlm.logits(prompt)
        >>> bool((patched != clean).any()), bool((vlm.logits(prompt) == clean).all())
        (True, True)
    """
    visits = [
        _Visit(vlm.module(key), _checked(key, function), str(key), vlm.layer_around(key))
        for key, function in functions.items()
    ]
    with vlm.lock, _placed(visits, inputs=inputs, ahead=ahead):
        yield


class StopForward(Exception):
    """Ends a forward pass on purpose. The block that placed the hook catches it."""


@contextmanager
def first_input(vlm: Addressed, module: nn.Module, label: str) -> Iterator[list[Tensor]]:
    """Yield a list that receives the module's main input; the forward pass and the block end there.

    label: the module's name in error messages.
    """
    entered: list[Tensor] = []

    def stop(value: Tensor) -> None:
        entered.append(value)
        raise StopForward

    with vlm.lock, _placed([_Visit(module, stop, label)], inputs=True):
        try:
            yield entered
        except StopForward:
            pass


@contextmanager
def first_call(vlm: Addressed, module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield a dict that receives the module's arguments by name; the forward pass and the block end there."""
    arguments: dict[str, Any] = {}

    def stop(_module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        arguments.update(named_arguments(module.forward, given, keywords))
        raise StopForward

    with vlm.lock:
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield arguments
        except StopForward:
            pass
        finally:
            uninterrupted(handle.remove)


def named_arguments(
    function: Callable[..., Any], given: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a function's call by the names in its signature, in that order."""
    bound = inspect.signature(function).bind(*given, **keywords)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if is_rest else {name: value}
    return named


def _checked(key: Key, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function with checks that its result fits and that it does not modify its argument."""

    def replace(value: Tensor) -> Tensor:
        version = None if value.is_inference() else value._version
        result = function(value)
        if version is not None and value._version != version:
            raise ModelError(f"the patch at {key!s} wrote into the tensor it was given; let it work on a clone")
        if not isinstance(result, Tensor) or result.shape != value.shape:
            returned = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ModelError(
                f"the patch at {key!s} must return a tensor of shape {tuple(value.shape)}; it returned {returned}"
            )
        return result

    return replace


@dataclass(frozen=True, eq=False)
class _Visit:
    """A function that sees, and may replace, the main tensor of a module."""

    module: nn.Module
    function: Callable[[Tensor], Tensor | None]
    label: str
    """The module's name in error messages."""
    layer: nn.Module | None = None
    """The decoder layer around the module; None for a module whose tensors are passed on in their own shape."""


@contextmanager
def _placed(visits: Sequence[_Visit], *, inputs: bool, ahead: bool = False) -> Iterator[None]:
    """Pass each module's main tensor to its visitor inside the block, and replace it by the returned tensor.

    Some modules of a decoder layer work on (row x token, width); their visitors receive (row, token, width) all the
    same, with as many rows as the layer was given last.
    """
    handles: list[RemovableHandle] = []
    leaving = ExitStack()
    rows: dict[nn.Module, int] = {}

    def count(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states = arguments[0] if arguments else keywords[main_keyword(keywords, "a decoder layer")]
        rows[layer] = len(states)

    try:
        for layer in {visit.layer: None for visit in visits if visit.layer is not None}:
            handles.append(layer.register_forward_pre_hook(count, with_kwargs=True, prepend=True))
        for visit in visits:
            if isinstance(visit.module, RoutedExperts):
                leaving.callback(visit.module.attach())
            if inputs:
                hook = _input_hook(_in_rows(visit, rows), visit.label)
                handles.append(visit.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=ahead))
            else:
                hook = _output_hook(_in_rows(visit, rows), visit.label)
                handles.append(visit.module.register_forward_hook(hook, prepend=ahead))
        yield
    finally:
        uninterrupted(lambda: [leaving.close(), *(handle.remove() for handle in handles)])


def _in_rows(visit: _Visit, rows: Mapping[nn.Module, int]) -> Callable[[Tensor], Tensor | None]:
    """Return the visitor's function with flat tensors (row x token, width) given, and taken back, by row and token."""

    def function(value: Tensor) -> Tensor | None:
        if value.ndim != 2 or visit.layer is None:
            return visit.function(value)
        result = visit.function(value.view(rows[visit.layer], -1, value.shape[-1]))
        return None if result is None else result.reshape(value.shape)

    return function


def _output_hook(visit: Callable[[Tensor], Tensor | None], label: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        result = visit(main_tensor(output, label))
        return None if result is None else replace_main(output, result)

    return hook


def _input_hook(visit: Callable[[Tensor], Tensor | None], label: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            result = visit(main_tensor(arguments, label))
            return None if result is None else (replace_main(arguments, result), keywords)
        name = main_keyword(keywords, label)
        result = visit(keywords[name])
        return None if result is None else (arguments, {**keywords, name: result})

    return hook


def main_keyword(keywords: Mapping[str, Any], label: str) -> str:
    """Return the name of the argument that holds the states: `hidden_states`, `inputs_embeds`, else the first tensor.

    Raises `ModelError` if no argument is a tensor.
    """
    tensors = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    for name in ("hidden_states", "inputs_embeds", *tensors):
        if name in tensors:
            return name
    raise ModelError(f"{label} was called without a tensor (keywords: {', '.join(keywords) or 'none'})")


def main_tensor(value: Any, label: str) -> Tensor:
    """Return the tensor itself, or the first entry of a tuple, list or Hugging Face output.

    Raises `ModelError` if that is not a tensor.
    """
    first = value
    if isinstance(value, Mapping):
        first = next(iter(value.values()), None)
    elif isinstance(value, (tuple, list)) and value:
        first = value[0]
    if not isinstance(first, Tensor):
        raise ModelError(
            f"{label} gave {type(value).__name__} whose first entry is no tensor; nothing to read or replace"
        )
    return first


def replace_main(value: Any, tensor: Tensor) -> Any:
    """Return a new container of the same kind with its main tensor replaced; the given value is unchanged."""
    if isinstance(value, Mapping):
        return type(value)(**{**value, next(iter(value)): tensor})
    if isinstance(value, tuple) and hasattr(value, "_replace") and hasattr(value, "_fields"):
        return value._replace(**{value._fields[0]: tensor})
    if isinstance(value, (tuple, list)):
        return type(value)([tensor, *value[1:]])
    return tensor


class _Stopping:
    """A context that closes itself on exit, and in which a forward pass that it stopped itself is no error."""

    stop: bool

    def close(self) -> None:
        """Remove the hooks."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.close()
        return self.stop and isinstance(error, StopForward)


class Trace(_Stopping):
    """Record or edit one module's output while the block runs; `.output` and `.input` stay afterwards.

    Recorded values are complete: a tuple stays a tuple, a single positional input is unwrapped, and without positional
    inputs the keyword argument that holds the states is recorded (baukit records nothing). Other differences from
    baukit: the module is looked up on construction but hooked on entry, so that nothing leaks, and a stop=True block
    may end without the module having run. On a `VisionLanguageModel` other threads wait until the block ends.

    Args:
        module: A `VisionLanguageModel` or any `nn.Module`.
        layer: For a `VisionLanguageModel` a site, projection, dotted path or module; for an `nn.Module` a dotted path
            or module, or None for the module itself (default).
        retain_output: Whether to keep the module's output in `.output` (default True).
        retain_input: Whether to keep the module's input in `.input` (default False).
        clone: Whether to keep copies (default False).
        detach: Whether to detach the recorded values from the autograd graph (default False).
        retain_grad: Whether the kept output receives `.grad` in a backward pass (default False).
        edit_output: A function of (output), (output, layer) or (output, layer, inputs) whose result the module returns
            instead of its output (default None).
        stop: Whether to end the forward pass after this module (default False).

    Raises:
        ModelError: If there is no such module, or no layer is given for a `VisionLanguageModel`.

    Source: davidbau/baukit, nethook.py.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.models import Site
        >>> vlm = mt.load(tiny_vlm_path())
        >>> with mt.Trace(vlm, Site("mlp", 3)) as trace:
        ...     logits = vlm.logits(vlm.prompt(None, "What colour is this?"))
        >>> trace.output.shape[-1] == vlm.hidden
        True
    """

    def __init__(
        self,
        module: Addressed | nn.Module,
        layer: Key | None = None,
        *,
        retain_output: bool = True,
        retain_input: bool = False,
        clone: bool = False,
        detach: bool = False,
        retain_grad: bool = False,
        edit_output: Callable[..., Any] | None = None,
        stop: bool = False,
    ) -> None:
        self.layer = layer
        self.module = _resolve(module, layer)
        self.output: Any = None
        self.input: Any = None
        self.stop = stop
        self._retains = (retain_output, retain_input)
        self._copy = {"clone": clone, "detach": detach}
        self._retain_grad = retain_grad
        self._edit = None if edit_output is None else _with_accepted_arguments(edit_output)
        self._handle: RemovableHandle | None = None
        self._leaving = ExitStack()
        self._lock = nullcontext() if isinstance(module, nn.Module) else module.lock

    def __enter__(self) -> Self:
        self._lock.__enter__()
        self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)
        if isinstance(self.module, RoutedExperts):
            self._leaving.callback(self.module.attach())
        return self

    def close(self) -> None:
        """Remove the hook if it is placed; the recorded values stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._leaving.close()
            self._lock.__exit__(None, None, None)

    def _hook(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        retain_output, retain_input = self._retains
        inputs = arguments
        if not inputs and (retain_input or self._edit is not None):
            inputs = (keywords[main_keyword(keywords, str(self.layer))],)
        if retain_input:
            self.input = _copied(inputs[0] if len(inputs) == 1 else inputs, **self._copy)
        if self._edit is not None:
            output = self._edit(output, self.layer, inputs)
        if retain_output:
            self.output = _copied(output, **self._copy, retain_grad=self._retain_grad)
            if self._retain_grad:
                # Pass on a copy, so that in-place code cannot change the recorded node.
                output = _copied(self.output, clone=True)
        if self.stop:
            raise StopForward
        return output


class TraceDict(_Stopping, dict[Any, Trace]):
    """Several `Trace`s on one model, in a dict by layer.

    All layers are looked up before any hook is placed, and every hook is removed on exit, also after an error.

    Args:
        module: A `VisionLanguageModel` or any `nn.Module`, as in `Trace`.
        layers: The layers to trace, as in `Trace`; a repeated one counts once.
        stop: Whether to end the forward pass after the last layer listed (default False).
        **settings: Passed on to every `Trace`.

    Raises:
        ModelError: If there is no such module.

    Source: davidbau/baukit, nethook.py.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.models import Site
        >>> vlm = mt.load(tiny_vlm_path())
        >>> with mt.TraceDict(vlm, [Site("hidden", 1), Site("hidden", 2)], stop=True) as traces:
        ...     logits = vlm.logits(vlm.prompt(None, "What colour is this?"))
        >>> [str(site) for site in traces]
        ['hidden 1', 'hidden 2']
    """

    def __init__(
        self, module: Addressed | nn.Module, layers: Iterable[Key], *, stop: bool = False, **settings: Any
    ) -> None:
        unique = list(dict.fromkeys(layers))
        super().__init__(
            (layer, Trace(module, layer, stop=stop and index == len(unique) - 1, **settings))
            for index, layer in enumerate(unique)
        )
        self.stop = stop

    def __enter__(self) -> Self:
        try:
            for trace in self.values():
                trace.__enter__()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Remove all hooks placed here; the recorded values stay."""
        for trace in self.values():
            trace.close()


def _resolve(module: Addressed | nn.Module, layer: Key | None) -> nn.Module:
    if not isinstance(module, nn.Module):
        if layer is None:
            raise ModelError(
                "a trace on a loaded model needs a layer; pass a site such as Site('mlp', 3) or a module path"
            )
        return module.module(layer)
    if layer is None:
        return module
    if isinstance(layer, nn.Module):
        return layer
    if isinstance(layer, Projection):
        return layer.module
    try:
        return module.get_submodule(str(layer))
    except AttributeError as error:
        raise ModelError(f"no module {str(layer)!r} in {type(module).__name__}: {error}") from error


def _with_accepted_arguments(edit: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """Return the edit as a function of (output, layer, inputs) that passes on only the arguments it accepts."""
    parameters = list(inspect.signature(edit).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return edit
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name for p in parameters} & {"layer", "inputs"}

    def call(output: Any, layer: Any, inputs: Any) -> Any:
        if named:
            return edit(
                output, **{name: value for name, value in (("layer", layer), ("inputs", inputs)) if name in named}
            )
        return edit(*(output, layer, inputs)[: max(1, len([p for p in positional if p.default is p.empty]))])

    return call


def _copied(value: Any, *, clone: bool = False, detach: bool = False, retain_grad: bool = False) -> Any:
    """Return the value with each tensor in its tuples, lists and dicts detached, cloned or set to keep its gradient."""
    if isinstance(value, Tensor):
        if detach and not retain_grad:
            value = value.detach()
        if clone:
            value = value.clone()
        if retain_grad and value.is_floating_point():
            value = value if value.requires_grad else value.detach().requires_grad_()
            value.retain_grad()
        return value
    if isinstance(value, dict):
        return type(value)(
            **{name: _copied(part, clone=clone, detach=detach, retain_grad=retain_grad) for name, part in value.items()}
        )
    if isinstance(value, (tuple, list)):
        return type(value)([_copied(part, clone=clone, detach=detach, retain_grad=retain_grad) for part in value])
    return value
