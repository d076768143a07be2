"""Read and replace what modules compute for the length of a `with` block.

A module may pass on a tensor or a tuple, and take its states as a positional or as a keyword argument; hooks keep
everything else in the tuple or call.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError
from .families.addresses import Key
from .guards import ModelLock, uninterrupted

AnyKey = TypeVar("AnyKey", bound=Key)


class Addressed(Protocol):
    """The interface that `capture` and `patch` need; `VisionLanguageModel` implements it."""

    @property
    def lock(self) -> ModelLock:
        """The lock that a thread holds while it hooks the model."""

    def module(self, key: Key) -> nn.Module:
        """Return the module of a site, projection or dotted path, or the module itself."""


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
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> with mt.capture(vlm, [mt.Site("mlp", 3), vlm.down_projection(3)]) as states:
        ...     logits = vlm.logits(prompt)
        >>> states[mt.Site("mlp", 3)].shape == (1, prompt.length, vlm.hidden)
        True
    """
    modules = {key: vlm.module(key) for key in keys}
    captured: dict[AnyKey, Tensor] = {}

    def recorder(key: AnyKey) -> Callable[[Tensor], None]:
        def record(value: Tensor) -> None:
            captured[key] = value.clone() if clone else value

        return record

    visits = [(module, recorder(key), str(key)) for key, module in modules.items()]
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
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?")
        >>> clean = vlm.logits(prompt)
        >>> with mt.patch(vlm, {mt.Site("mlp", 3): lambda output: 0 * output}):
        ...     patched = vlm.logits(prompt)
        >>> bool((patched != clean).any()), bool((vlm.logits(prompt) == clean).all())
        (True, True)
    """
    edits = [(vlm.module(key), _checked(key, function), str(key)) for key, function in functions.items()]
    with vlm.lock, _placed(edits, inputs=inputs, ahead=ahead):
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

    with vlm.lock, _placed([(module, stop, label)], inputs=True):
        try:
            yield entered
        except StopForward:
            pass


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


@contextmanager
def _placed(
    visits: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None], str]], *, inputs: bool, ahead: bool = False
) -> Iterator[None]:
    """Pass each module's main tensor to its visitor inside the block, and replace it by the returned tensor."""
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
        uninterrupted(lambda: [handle.remove() for handle in handles])


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
