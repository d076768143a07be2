"""`Trace` and `TraceDict`: baukit's names and meaning, for code written against it."""

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
    """One module's input and output, recorded or edited while the block runs; `.output` and `.input` stay afterwards.

    module: a `VisionLanguageModel` (layer: a site, path, projection or module) or any nn.Module (layer: a dotted
    path, or None for the module itself). retain_output / retain_input keep what the module gave / got, whole: a tuple
    stays a tuple, a single positional input comes bare, and where there is none the keyword that carries the states
    is kept (baukit keeps nothing there). clone and detach apply to what is kept; retain_grad makes the kept output a
    node that gets `.grad`. edit_output(output[, layer[, inputs]]) returns what the module gives instead. stop ends
    the forward pass here. Differences from baukit: the lookup is done on construction but the hook is placed on
    entry, so that nothing leaks, and leaving a stop=True block in which the stop never fired is fine. Modelled on
    davidbau/baukit, nethook.py.
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
        self._edit = None if edit_output is None else _with_wanted_arguments(edit_output)
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
        """Removes the hook, if it is there; what was recorded stays."""
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
                output = _copied(
                    self.output, clone=True
                )  # a copy goes on, so that in-place code cannot touch the kept node
        if self.stop:
            raise StopForward
        return output


class TraceDict(dict[Any, Trace]):
    """Several `Trace`s on one model, by layer; with stop=True the pass ends at the last layer listed.

    All layers are looked up before any hook is placed, and every hook is removed on exit, also after an error.
    """

    def __init__(
        self, module: Addressed | nn.Module, layers: Iterable[Key], *, stop: bool = False, **settings: Any
    ) -> None:
        wanted = list(dict.fromkeys(layers))
        super().__init__(
            (layer, Trace(module, layer, stop=stop and index == len(wanted) - 1, **settings))
            for index, layer in enumerate(wanted)
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
        """Removes all hooks placed here; what was recorded stays."""
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


def _with_wanted_arguments(edit: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """The edit as a function of (output, layer, inputs), given only those it takes."""
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
    """The value with every tensor in it (tuples, lists, dicts) detached, cloned or made to keep its gradient."""
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
            **{name: _copied(each, clone=clone, detach=detach, retain_grad=retain_grad) for name, each in value.items()}
        )
    if isinstance(value, (tuple, list)):
        return type(value)([_copied(each, clone=clone, detach=detach, retain_grad=retain_grad) for each in value])
    return value
