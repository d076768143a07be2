"""`Trace` and `TraceDict` with the names and the behaviour that code written for baukit expects."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError
from .families.addresses import Key, Projection
from .hooks import Addressed, StopForward, main_keyword


class Trace:
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
        >>> vlm = mt.load(tiny_vlm_path())
        >>> with mt.Trace(vlm, mt.Site("mlp", 3)) as trace:
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
        self._lock = nullcontext() if isinstance(module, nn.Module) else module.lock

    def __enter__(self) -> Self:
        self._lock.__enter__()
        self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.close()
        return self.stop and isinstance(error, StopForward)

    def close(self) -> None:
        """Remove the hook if it is placed; the recorded values stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
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


class TraceDict(dict[Any, Trace]):
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
        >>> vlm = mt.load(tiny_vlm_path())
        >>> with mt.TraceDict(vlm, [mt.Site("hidden", 1), mt.Site("hidden", 2)], stop=True) as traces:
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.close()
        return self.stop and isinstance(error, StopForward)

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
