"""Where the values of a weight are while no layer runs: in the module, elsewhere, packed, or shared out.

An ordinary weight is a floating-point parameter. Accelerate leaves a parameter without values in a module that it
offloads (to main memory or disk), and fetches the values for each call; a quantiser packs them into fewer bits; a
tensor-parallel plan gives each process a share of them. `values` reads a weight wherever it is, and `opened` makes it
an ordinary parameter until it is closed.

What reads a weight of which every process has a share waits for all of them, so all must read it in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from .errors import ModelError, gist

_UNITS_AT_ONCE = 512
"""Number of columns of a packed weight that are read by one call of its module."""
_REPLACED = ("forward", "_old_forward", "_hf_hook")
"""The attributes of a module that decide what a call of it does: accelerate sets all of them, a quantiser none, and a
tensor-parallel plan the first."""
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that need no scale beside them."""


def is_plain(weight: Tensor | None) -> bool:
    """Return whether a parameter holds its own values as floating-point numbers that a model computes in."""
    return weight is not None and not weight.is_meta and _is_ordinary(weight)


def _is_ordinary(weight: Tensor | None) -> bool:
    """Return whether a weight is no packed one, wherever its values are."""
    return type(weight) in (Tensor, nn.Parameter) and cast(Tensor, weight).dtype in _PLAIN


def is_shared(weight: Tensor | None) -> bool:
    """Return whether each process has only a share of the values."""
    return hasattr(weight, "full_tensor")


def processes_of(model: nn.Module) -> int:
    """Return the number of processes that hold the model together; 1 for a model that is whole in this process."""
    return next((cast(Any, weight).device_mesh.size() for weight in model.parameters() if is_shared(weight)), 1)


@contextmanager
def together(processes: int) -> Iterator[bool]:
    """Yield whether this process is the first of those that hold a model together; an error of one becomes one of all.

    They wait for each other at the end of the block. In the block, none may wait for another.

    processes: Their number; a model of one process shares nothing, and its errors pass unchanged.
    """
    if processes == 1:
        yield True
        return
    own: Exception | None = None
    try:
        yield distributed.get_rank() == 0
    except Exception as error:  # raised below, when the others know of it
        own = error
    failures: list[str | None] = [None] * processes
    distributed.all_gather_object(failures, None if own is None else gist(own))
    if own is not None:
        raise own
    for number, failure in enumerate(failures):
        if failure is not None:
            raise ModelError(f"process {number} of {processes}, which hold the model together, stopped: {failure}")


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model's inputs are moved to; the one it computes on if its weights are elsewhere."""
    return next(compute_device(module) for module in model.modules() if any(True for _ in module.parameters(False)))


def compute_device(module: nn.Module) -> torch.device:
    """Return the device on which the module's own weights are while it runs."""
    if hook := _offloading(module):
        return torch.device(hook.execution_device)
    return next(chain(module.parameters(recurse=False), module.parameters(), module.buffers())).device


def keep_packing(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew when they first run on a CPU with AVX-512.

    The new packing has no gradients, and a weight that changes when it is used has no digest.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def map_shape(module: nn.Module, *, transposed: bool) -> tuple[int, int]:
    """Return (hidden, width) of a linear map, whatever the shape in which its weight is packed."""
    if isinstance(getattr(module, "out_features", None), int):
        return cast(Any, module).out_features, cast(Any, module).in_features
    shape = cast(Tensor, module.weight).shape
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def absent(model: nn.Module) -> list[str]:
    """Return the names of the parameters that have no values in memory and that accelerate does not fetch either."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, weight in named if weight.is_meta and _elsewhere(*_owner(model, name)) is None]


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A weight that accelerate reads from a file for each call, or of which each process has a share."""

    source: Mapping[str, Tensor] = field(repr=False)
    """Accelerate's map from the names of a module's parameters to their values, or the module's own parameters."""
    leaf: str
    nbytes: int
    mark: tuple[Any, ...]
    """What changes with the values: the file and the time of its last change, or what torch counts of a share."""

    @property
    def is_shared(self) -> bool:
        """Whether all processes must read it together."""
        return isinstance(self.source, dict)

    def read(self) -> Tensor:
        """Return the values, which are a copy."""
        return _whole(self.source[self.leaf]).detach()


def stored_weights(model: nn.Module) -> dict[str, Tensor | Elsewhere]:
    """Return every parameter by name, as a tensor in memory or as the place it is read from; a tied one once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored: dict[str, Tensor | Elsewhere] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name in tied:
            continue  # each of its modules has an empty parameter of its own
        is_here = not parameter.is_meta and not is_shared(parameter)
        found = parameter if is_here else _elsewhere(*_owner(model, name))
        if found is None:
            raise ModelError(
                f"the weight {name!r} has no values in memory; load the model with a device_map that has room for it"
            )
        stored[name] = found
    return stored


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the parameter of this name, and the parameter's name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def has_weight(model: nn.Module, name: str) -> bool:
    """Return whether a weight has this name, without a look at all the others."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module | None = model
    for part in filter(None, path.split(".")):
        module = None if module is None else module._modules.get(part)
    if module is None:
        return False
    return module._parameters.get(leaf) is not None or (leaf == "weight" and is_packed(module))


def weight_names(model: nn.Module) -> set[str]:
    """Return the names of all weights: of every parameter, a tied one's too, and of every packed linear map."""
    packed = {f"{path}.weight" for path, module in model.named_modules() if is_packed(module)}
    return packed | {name for name, _ in model.named_parameters(remove_duplicate=False)}


def parameter_of(name: str) -> tuple[str, int | None]:
    """Return the parameter's name and the number of the slice that a name such as "experts.down_proj[3]" adds to it."""
    stem, bracket, number = name.removesuffix("]").rpartition("[")
    return (stem, int(number)) if bracket and name.endswith("]") and number.isdigit() else (name, None)


def _offloading(module: nn.Module) -> Any | None:
    """Return accelerate's hook on the module that fetches its parameters for each call; None without one."""
    hook = module.__dict__.get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)


def _elsewhere(module: nn.Module, leaf: str) -> Tensor | Elsewhere | None:
    """Return the tensor in main memory, or the place in a file or in all processes, from which a parameter comes."""
    parameter = cast(Tensor, module._parameters[leaf])
    if is_shared(parameter):
        share = cast(Any, parameter).to_local()
        mark = ("share", share.data_ptr(), parameter._version, share._version)
        return Elsewhere(source=cast(Any, module._parameters), leaf=leaf, nbytes=parameter.nbytes, mark=mark)
    hook = _offloading(module)
    source = None if hook is None else hook.weights_map
    if source is None:
        return None
    loader, key = getattr(source, "dataset", source), f"{getattr(source, 'prefix', '')}{leaf}"
    entry = getattr(loader, "index", {}).get(key)
    if entry is None or key in loader.state_dict:
        return source[leaf].detach() if key in loader else None
    file = Path(entry.get("safetensors_file") or Path(loader.save_folder, f"{key}.dat"))
    mark = (str(file), file.stat().st_mtime_ns, key, *map(str, entry.items()))
    return Elsewhere(source=source, leaf=leaf, nbytes=parameter.nbytes, mark=mark)


def _whole(weight: Tensor) -> Tensor:
    """Return a weight; of one of which each process has a share, all its values, which are a copy."""
    return cast(Any, weight).full_tensor() if is_shared(weight) else weight


def fetched(module: nn.Module, leaf: str) -> Tensor | None:
    """Return a parameter of a module itself, or its values from wherever they are fetched; None for none."""
    parameter = cast(Tensor | None, getattr(module, leaf, None))
    if parameter is None or not parameter.is_meta:
        return None if parameter is None else _whole(parameter)
    found = _elsewhere(module, leaf)
    return found.read() if isinstance(found, Elsewhere) else found


def packed_parts(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors inside a tensor subclass, such as torchao's, by name; of any other tensor, itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return {"": weight.detach()}
    names, _ = cast(Any, weight).__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    return {f"{name}.{part}": value for name, each in inner.items() for part, value in packed_parts(each).items()}


def stored_beside(model: nn.Module) -> dict[str, Tensor]:
    """Return what is stored beside the parameters, by name: persistent buffers, and the scales of packed weights."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name not in parameters and isinstance(value, Tensor)}


def is_packed(module: nn.Module) -> bool:
    """Return whether a linear module has no ordinary weight, and can be read by what it answers to unit vectors."""
    weight = cast(Tensor | None, getattr(module, "weight", None))
    return _is_sized(module) and not is_shared(weight) and not _is_ordinary(weight)


def _is_sized(module: nn.Module) -> bool:
    """Return whether a module is a linear map, which says how many numbers it reads and writes."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def has_packed(model: nn.Module) -> bool:
    """Return whether a linear module of the model has a packed weight."""
    return any(is_packed(module) for module in model.modules())


@torch.no_grad()
def values(model: nn.Module, name: str, *, transposed: bool) -> Tensor:
    """Return a weight: the parameter itself (or a view of its slice) if it is an ordinary one, else its values.

    A packed matrix is read through its own module, which answers the unit vectors with its columns, so that every
    quantiser is read alike. transposed: the model stores its projections as (width, hidden).

    Raises `ModelError`, which names the weight, if its values cannot be read.
    """
    parameter, number = parameter_of(name)
    module, leaf = _owner(model, parameter)
    stored = fetched(module, leaf)
    if stored is not None and is_plain(stored):
        return stored if number is None else stored[number]
    if leaf != "weight" or not is_packed(module):
        raise ModelError(
            f"the weight {name!r} is packed in a {type(module).__name__}, which does not say how it is read; load the "
            "model without quantization="
        )
    columns = _columns(model, module, name)
    return columns if transposed else columns.T.contiguous()


def _columns(model: nn.Module, module: nn.Module, name: str) -> Tensor:
    """Return what a linear module answers to each unit vector, without its bias, (width, hidden)."""
    width, device, columns = cast(int, module.in_features), compute_device(module), []
    dtype = next((each.dtype for each in model.parameters() if each.dtype in _PLAIN), torch.float32)
    try:
        bias = module.forward(torch.zeros(1, width, dtype=dtype, device=device))  # hooks of torch do not see this
        for start in range(0, width, _UNITS_AT_ONCE):
            count = min(_UNITS_AT_ONCE, width - start)
            units = torch.zeros(count, width, dtype=dtype, device=device)
            units[torch.arange(count), start + torch.arange(count)] = 1
            columns.append(module.forward(units) - bias)
    except Exception as error:  # quantisers raise whatever their kernels raise
        raise ModelError(
            f"the weight {name!r} is packed by {type(module).__name__}, which cannot be run here ({gist(error)}); "
            "load the model without quantization="
        ) from error
    return torch.cat(columns)


@dataclass(kw_only=True, eq=False)
class OpenedWeight:
    """A weight that is an ordinary parameter in memory until `close`, which puts the module back as it was."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter | None]
    """The module's own parameters before."""
    attributes: Mapping[str, Any]
    """Those of the attributes that were replaced, before; one that is missing was not set."""

    def close(self) -> None:
        """Put the very parameters and the way they were used back; a second time changes nothing."""
        for name in [*self.module._parameters]:
            if name not in self.parameters:
                del self.module._parameters[name]
        self.module._parameters.update(self.parameters)
        for name in _REPLACED:
            if name in self.attributes:
                self.module.__dict__[name] = self.attributes[name]
            else:
                self.module.__dict__.pop(name, None)


@torch.no_grad()
def opened(model: nn.Module, name: str, *, transposed: bool) -> OpenedWeight | None:
    """Make a weight an ordinary parameter, and return the way back; None for a weight that is one already.

    The module stays the same object, so that hooks on it stay in effect. The parameters of an offloaded module stay on
    the device that it computes on. A packed one computes with the unpacked weight, in the dtype of the model; one of
    which each process has a share computes with all of it in every process.

    Raises `ModelError`, which names the weight, if its values cannot be read, or if processes share it out in a module
    that is no linear map.
    """
    name, _ = parameter_of(name)  # a slice is opened with the whole of its parameter
    module, leaf = _owner(model, name)
    if is_plain(module._parameters.get(leaf)):
        return None
    is_whole = not is_shared(module._parameters.get(leaf))
    if not is_whole and not _is_sized(module):
        raise ModelError(
            f"the weight {name!r} of type {type(module).__name__} is shared out among processes, and only linear maps "
            "are made whole to be changed; load the model without tp_plan"
        )
    device = compute_device(module)
    ready = {leaf: values(model, name, transposed=transposed).to(device, copy=True)}
    for part, parameter in module.named_parameters(recurse=False):
        if part != leaf and (parameter.is_meta or is_shared(parameter)):
            ready[part] = cast(Tensor, fetched(module, part)).to(device)
    attributes = {part: module.__dict__[part] for part in _REPLACED if part in module.__dict__}
    back = OpenedWeight(module=module, parameters=dict(module._parameters), attributes=attributes)
    if is_packed(module) or not is_whole:
        plain = _PlainForward(module=module, transposed=transposed)
        setattr(module, "_old_forward" if "_old_forward" in attributes else "forward", plain)
    if hook := _offloading(module):
        cast(Any, module)._hf_hook = type(hook)(execution_device=hook.execution_device, skip_keys=hook.skip_keys)
    module._parameters.update({part: nn.Parameter(value, requires_grad=False) for part, value in ready.items()})
    return back


@dataclass(frozen=True, kw_only=True, eq=False)
class _PlainForward:
    """The function of an ordinary linear module, with the parameters that a module has when it is called."""

    module: nn.Module
    transposed: bool

    def __call__(self, states: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self.module.weight), cast(Tensor | None, self.module.bias)
        bias = None if bias is None else bias.to(weight.dtype)
        output = functional.linear(states.to(weight.dtype), weight.T if self.transposed else weight, bias)
        return output.to(states.dtype)


def unpacked_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules whose packed weight is opened now."""
    replaced = ((path, module.__dict__.get(name)) for path, module in model.named_modules() for name in _REPLACED)
    return [path for path, function in replaced if isinstance(function, _PlainForward)]
