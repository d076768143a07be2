"""Quantised models: choices by name, the packages that pack and unpack weights, and errors where they are missing."""

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..errors import ModelError, reason
from ..families import Family
from ..guards import quiet_transformers
from ..placement import has_packed, is_packed, is_plain, keep_packing, values
from .sources import ModelSource, out_of_memory

logger = logging.getLogger("multrace")

QUANTIZATIONS = ("8bit", "4bit", "int8", "none")
"""The settings of `quantization=` that have a name."""
_EXTRA = ("bitsandbytes", "torchao")
"""The packages that the extra `quant` brings."""
_PACKAGES: Mapping[str, Mapping[str, str]] = {
    **{name: {name: name} for name in (*_EXTRA, "hqq", "aqlm", "vptq")},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "auto-round": {"auto_round": "auto-round"},
    "quanto": {"optimum": "optimum-quanto"},
    "quark": {"quark": "amd-quark"},
    "eetq": {"kernels": "kernels"},
}
"""Method -> the modules that transformers imports for it -> the name by which pip knows each."""
_OTHERWISE = "open the model's weights before quantisation, or its GGUF file"


def chosen(quantization: Any, config: PretrainedConfig, name: str) -> Any:
    """Return the settings of transformers for what `load` was given, or None for those in the model's configuration.

    Raises `ModelError` for an unknown name, or settings of another method than that of the file.
    """
    own = getattr(config, "quantization_config", None)
    if not isinstance(quantization, str):
        is_unpacked_anyway = quantization is None and own is not None and _method(own) == "compressed-tensors"
        settings = _unpacking(own) if is_unpacked_anyway else quantization  # its library does so in the first pass
    elif quantization not in QUANTIZATIONS:
        raise ModelError(
            f"cannot open {name!r} with quantization={quantization!r}; pass '8bit' or '4bit' (bitsandbytes), 'int8' "
            "(torchao), 'none' to unpack weights that are quantised in the files, or a configuration of transformers"
        )
    elif quantization == "none":
        return None if own is None else _unpacking(own)
    else:
        settings = _named(quantization, name)
    if settings is not None and own is not None and _method(settings) != _method(own):
        raise ModelError(
            f"cannot open {name!r} with quantization={quantization!r}: its files are quantised by {_method(own)} "
            "already; leave quantization out, or pass 'none' to unpack them"
        )
    if own is None or not isinstance(quantization, str):
        return settings
    bits = [_bits(each) for each in (own, settings)]
    if bits[0] != bits[1]:
        raise ModelError(
            f"cannot open {name!r} with quantization={quantization!r}: its files hold {bits[0]} bits already; leave "
            "quantization out, or pass 'none' to unpack them"
        )
    return None  # as the files are


def _named(quantization: str, name: str) -> BitsAndBytesConfig | TorchAoConfig:
    """Return the settings that a name stands for."""
    if quantization == "int8":
        _check_packages("torchao", f"{name!r} is to be quantised by torchao")
        from torchao.quantization import Int8WeightOnlyConfig  # pyrefly: ignore[missing-import] -- the extra quant

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _unpacking(own: Any) -> Any:
    """Return the file's own settings with the request to unpack its weights as they are read, if they take it."""
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method(own) or "")
    plain = dict(own) if isinstance(own, Mapping) else own.to_dict()
    if kind is None or not _packages_are_here(_method(own)):
        return None
    settings = cast(Any, kind).from_dict(plain)
    if not hasattr(settings, "dequantize"):
        return None
    settings.dequantize = True
    return settings


def _method(settings: Any) -> str | None:
    """Return the method of settings, which are those of transformers or a configuration file's."""
    plain = settings if isinstance(settings, Mapping) else vars(settings) if hasattr(settings, "__dict__") else {}
    if plain.get("load_in_8bit") or plain.get("load_in_4bit"):  # older files name no method
        return "bitsandbytes"
    method = plain.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _bits(settings: Any) -> int:
    """Return the bits that settings of bitsandbytes or of a name ask for."""
    plain = settings if isinstance(settings, Mapping) else vars(settings)
    return 4 if plain.get("load_in_4bit") or plain.get("_load_in_4bit") else 8


def check_quantiser(quantization: Any, config: PretrainedConfig, name: str) -> str | None:
    """Return the method by which the weights are quantised, or None. Raise `ModelError` if its package is missing."""
    own = getattr(config, "quantization_config", None)
    if quantization is None and own is None:
        return None
    method = _method(own if quantization is None else quantization)
    if method is None and quantization is not None:
        raise ModelError(
            f"cannot open {name!r} with quantization={quantization!r}: it names no method; pass a configuration of "
            "transformers, such as BitsAndBytesConfig(load_in_4bit=True)"
        )
    if method is None:
        raise ModelError(
            f"the config.json of {name!r} has a quantization_config without a quant_method; fetch the model again"
        )
    where = "" if own is None else " (quantization_config in its config.json)"
    _check_packages(method, f"{name!r} is {'to be ' if own is None else ''}quantised by {method}{where}")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise ModelError(
            f"{name!r} is quantised by {method}{where}, which transformers {transformers.__version__} does not know; "
            f"{_OTHERWISE}"
        )
    return method


def _packages_are_here(method: str | None) -> bool:
    return all(find_spec(module) is not None for module in _PACKAGES.get(method or "", {}))


def _check_packages(method: str, what: str) -> None:
    """Raise `ModelError` if a package of a method is missing. what: the start of the message."""
    lacking = [package for module, package in _PACKAGES.get(method, {}).items() if find_spec(module) is None]
    if lacking:
        names, install = " and ".join(lacking), " ".join(lacking)
        verb = "is" if len(lacking) == 1 else "are"
        way = "'multrace[quant]'" if method in _EXTRA else f"{install}, or {_OTHERWISE}"
        raise ModelError(f"{what}, and this needs {names}, which {verb} not installed; pip install {way}")


def open_quantised(
    source: ModelSource, family: Family, options: dict[str, Any], method: str, *, unpack: bool, exact: bool
) -> PreTrainedModel:
    """Return the model with packed weights, or with ordinary ones if they are unpacked as they are read.

    unpack: unpack them in any case. exact: no other dtype than that of the options will do.

    Raises `ModelError` if the quantiser cannot make, read or unpack them here.
    """
    try:
        with warnings.catch_warnings():  # that settings were passed for packed files too, as they are to be unpacked
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = source.model(family, options)
        if unpack and has_packed(model):
            _unpack(model, options["dtype"])
    except ModelError as error:
        if error.__cause__ is None or out_of_memory(cast(Exception, error.__cause__)):
            raise
        raise _refusal(source, options, method, cast(Exception, error.__cause__)) from error
    except NotImplementedError as error:
        raise ModelError(
            f"transformers cannot unpack the weights of {source.name!r}, which are quantised by {method}; leave out "
            f"quantization='none', or {_OTHERWISE}"
        ) from error
    if has_packed(model):
        if exact and (other := _other_dtype(model, options["dtype"])):
            raise ModelError(
                f"cannot open {source.name!r} in {options['dtype']}: its files hold weights that were quantised for "
                f"{other}; leave dtype out, or pass quantization='none' to unpack them"
            )
        keep_packing(model)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    else:
        _settle(model, options["dtype"])
        logger.info("%s: its weights, quantised by %s, were unpacked as they were read", source.name, method)
    return model


def _other_dtype(model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of an ordinary weight of a quantised model, scales aside, that has another one than this."""
    kept = tuple(model._keep_in_fp32_modules or ())
    named = ((name, weight) for name, weight in model.named_parameters() if not any(part in name for part in kept))
    ordinary = (weight for name, weight in named if name.endswith((".weight", ".bias")) and is_plain(weight))
    return next((weight.dtype for weight in ordinary if weight.dtype != dtype), None)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message of bitsandbytes is another than that of each product of 8 bits on each call."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Unpack the weights of a model. Raises `NotImplementedError` if nobody knows how."""
    try:
        with quiet_transformers():
            cast(Any, model).dequantize(dtype)
        return
    except NotImplementedError:
        packed = {path: module for path, module in model.named_modules() if is_packed(module)}
        if any(type(module) is not nn.Linear for module in packed.values()):
            raise
    for path, module in packed.items():  # a tensor of its own kind in an ordinary module
        module.weight = nn.Parameter(values(model, f"{path}.weight", transposed=False), requires_grad=False)
    cast(Any, model).hf_quantizer.remove_quantization_config(model)


def _settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make an unpacked model an ordinary one, of one dtype, that is saved without packing its weights again."""
    kept = tuple(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)  # transformers converts only those that it has unpacked
    cast(Any, model)._weight_conversions = None  # those of the reading, by which saving would pack them
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)


def _refusal(source: ModelSource, options: Mapping[str, Any], method: str, error: Exception) -> ModelError:
    """Return the error for weights that a quantiser cannot make or read."""
    own = "quantization_config" not in options
    way = _OTHERWISE if own else "pass other settings, or leave out quantization="
    said = reason(error)
    if "above report" in said:  # which `quiet_transformers` holds back, and which names each weight
        said = f"it cannot {'read' if own else 'pack'} some of the weights here"
    return ModelError(
        f"cannot open {source.name!r} quantised by {method}: {said}; this machine may lack its kernels, so {way}"
    )
