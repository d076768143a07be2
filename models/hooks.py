"""Reading and replacing what modules compute, for the length of a `with`: tensor or tuple, positional or keyword."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError
from .families.addresses import Key
from .lock import ModelLock


class Addressed(Protocol):
    """Anything that knows its modules by site, projection, path or module: a `VisionLanguageModel`."""

    lock: ModelLock
    """Held by the thread that hooks the model."""

    def module(self, key: Key) -> nn.Module:
        """The module at this address."""


@contextmanager
def capture(
    vlm: Addressed, keys: Iterable[Key], *, inputs: bool = False, clone: bool = False
) -> Iterator[dict[Key, Tensor]]:
    """A dict that fills, at every forward pass, with each module's output (or input) under the key it was asked by.

    Values are (batch, token, width), as computed: still in the autograd graph, and not copied unless `clone`.
    A later pass overwrites an earlier one. All keys are resolved before any hook is placed (ModelError); only hooks
    placed here are removed on exit. A `patch` entered before this one is seen, one entered after it is not.
    """
    modules = {key: vlm.module(key) for key in keys}
    captured: dict[Key, Tensor] = {}

    def recorder(key: Key) -> Callable[[Tensor], None]:
        def record(value: Tensor) -> None:
            captured[key] = value.clone() if clone else value

        return record

    visits = [(module, recorder(key), str(key)) for key, module in modules.items()]
    with vlm.lock, _placed(visits, inputs=inputs):
        yield captured


@contextmanager
def patch(
    vlm: Addressed,
    functions: Mapping[Key, Callable[[Tensor], Tensor]],
    *,
    inputs: bool = False,
    ahead: bool = False,
) -> Iterator[None]:
    """A block in which each module's output (or input) is replaced by function(output).

    ahead: before all hooks that are there already. Layers of a vision tower need it: transformers collects their
    outputs by hooks of its own, and the projector reads what those have seen.

    A function gets the tensor (batch, token, width), must not write into it, and returns one of the same shape; what
    stood around the tensor (a tuple, keywords) is kept. ModelError for an unknown key (before any hook is placed), a
    written tensor or another shape. Only hooks placed here are removed on exit, also after an error.
    """
    edits = [(vlm.module(key), _checked(key, function), str(key)) for key, function in functions.items()]
    with vlm.lock, _placed(edits, inputs=inputs, ahead=ahead):
        yield


class StopForward(Exception):
    """Ends a forward pass on purpose; the block that placed the hook swallows it."""


@contextmanager
def first_input(vlm: Addressed, module: nn.Module, label: str) -> Iterator[list[Tensor]]:
    """A list that gets the module's main input; the forward pass ends there, and the block with it.

    label: how errors call the module.
    """
    entered: list[Tensor] = []

    def stop(value: Tensor) -> None:
        entered.append(value)
        raise StopForward

    with vlm.lock, _placed([(module, stop, label)], inputs=True):
        try:
            yield entered
        except StopForward:
            pass


def _checked(key: Key, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, refusing results that are no replacement and writes that would reach back into cached states."""

    def replace(value: Tensor) -> Tensor:
        version = None if value.is_inference() else value._version
        result = function(value)
        if version is not None and value._version != version:
            raise ModelError(f"the patch at {key!s} wrote into the tensor it was given; let it work on a clone")
        if not isinstance(result, Tensor) or result.shape != value.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ModelError(
                f"the patch at {key!s} must return a tensor of shape {tuple(value.shape)}; it returned {found}"
            )
        return result

    return replace


@contextmanager
def _placed(
    visits: list[tuple[nn.Module, Callable[[Tensor], Tensor | None], str]], *, inputs: bool, ahead: bool = False
) -> Iterator[None]:
    """A block in which each visitor sees its module's main tensor and may return another in its place."""
    handles: list[RemovableHandle] = []
    try:
        for module, visit, label in visits:
            if inputs:
                hook = _input_hook(visit, label)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=ahead))
            else:
                handles.append(module.register_forward_hook(_output_hook(visit, label), prepend=ahead))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """The name of the keyword that carries the states: `hidden_states`, `inputs_embeds`, else the first tensor."""
    tensors = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    for name in ("hidden_states", "inputs_embeds", *tensors):
        if name in tensors:
            return name
    raise ModelError(f"{label} was called without a tensor (keywords: {', '.join(keywords) or 'none'})")


def main_tensor(value: Any, label: str) -> Tensor:
    """The tensor itself, or the first entry of a tuple, list or Hugging Face output; ModelError if it is no tensor."""
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
    """The value with its main tensor replaced; a new container of the same kind, the given one is left as it was."""
    if isinstance(value, Mapping):
        return type(value)(**{**value, next(iter(value)): tensor})
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return value._replace(**{value._fields[0]: tensor})
    if isinstance(value, (tuple, list)):
        return type(value)([tensor, *value[1:]])
    return tensor
