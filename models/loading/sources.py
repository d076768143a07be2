"""Reading a model's parts from a directory, the local cache or the hub; safetensors only."""

import copy
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils.logging import tqdm as quietable_bar

from ..errors import ModelError, gist, quoted, reason
from ..families import Family
from ..guards import quiet_transformers, without_panics
from .processors import open_processor

logger = logging.getLogger("multrace")

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_FILES = {
    "configuration": ("config.json",),
    "tokenizer": _TOKENIZER_FILES,
    "processor": ("processor_config.json", "preprocessor_config.json", *_TOKENIZER_FILES),
    "safetensors weights": ("generation_config.json",),
}
"""The JSON files that a part is read from, so that an error can name the one that is broken."""
_GGUF = ".gguf"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEXT_STEPS = {
    "configuration": "pass a folder with a whole config.json",
    "tokenizer": "put one there with tokenizer.save_pretrained(folder)",
    "processor": "put one there with processor.save_pretrained(folder)",
    "safetensors weights": "fetch the model again, or pass other options to load",
}
_OTHER_HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
"""Ends of the names of architectures that do not continue texts."""
_SHOWN = 5
"""Number of files of a folder that an error lists."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The safetensors names of the dtypes that a model computes in; packed (quantised) dtypes are excluded."""
_VISION, _INSTALL_VISION = ("torchvision", "timm", "num2words"), "pip install 'multrace[vision]'"
"""The packages that the extra `vision` brings, and how."""
_TOO_LARGE = 2
"""A configuration that describes this many times the weights of the files is damaged, not merely short of weights."""


def out_of_memory(error: Exception) -> bool:
    """Return whether the error means that memory ran out, on this machine or on an accelerator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def _without_configuration(folder: Path) -> str:
    """Return what a folder without a config.json is, and what to pass instead."""
    names = sorted(path.name for path in folder.iterdir())
    if (adapter := folder / "adapter_config.json").is_file():
        base = quoted(_json_object(adapter).get("base_model_name_or_path"))
        return (
            f"it is a PEFT adapter of {base} and no model; pass its base model, or merge both once (peft's "
            "merge_and_unload) and pass the folder in which that is saved"
        )
    if files := [name for name in names if name.endswith(_GGUF)]:
        return f"it has no config.json; pass its file {files[0]!r} itself"
    found = f"only {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}" if names else "and is empty"
    return f"it has no config.json, {found}; {_NEXT_STEPS['configuration']}"


class ModelSource:
    """The source of a model: a directory, the local cache or the hub. All parts have the same error handling.

    Third-party model files can be damaged in many ways, and the libraries that read them raise many errors. Whatever
    they raise leaves this class as a `ModelError` that names the part, with the library's error as its cause.
    """

    def __init__(self, name: str, *, revision: str | None, trust_remote_code: bool) -> None:
        self.name = name
        folder = os.path.expanduser(name)
        self.options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.is_gguf = name.endswith(_GGUF) and os.path.isfile(folder)
        if self.is_gguf:
            if find_spec("gguf") is None:
                raise ModelError(f"reading {name!r} needs gguf, which is not installed; pip install 'multrace[gguf]'")
            folder, self.options["gguf_file"] = os.path.split(os.path.abspath(folder))
        self.folder = Path(folder) if os.path.isdir(folder) else None
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 and "/" in name
        if self.folder is None and (looks_like_path or os.path.exists(name)):
            file = ", which is a file" if os.path.isfile(os.path.expanduser(name)) else ""
            raise ModelError(
                f"no model directory at {name!r}{file}; pass a folder with a config.json, a {_GGUF} file, or a hub id "
                "such as 'org/model'"
            )

    def open(self, part: str, opener: Any, **options: Any) -> Any:
        """Return opener(...) from this machine, else from the hub. Raise `ModelError` if the part is missing."""
        if self.folder is not None and not self.is_gguf and not (self.folder / "config.json").is_file():
            raise ModelError(f"no usable configuration in {self.name!r}: {_without_configuration(self.folder)}")
        with quiet_transformers(), _quiet_unpacking() if self.is_gguf else nullcontext():
            return self._open(part, opener, options)

    def check_files(self, config: PretrainedConfig, family: Family, attention: str | None) -> None:
        """Raise `ModelError` if weight files, configuration or generation settings are damaged or do not fit."""
        self._check_weights()
        self._check_configuration(config, family, attention)
        self._check_generation_settings(config)

    def _check_weights(self) -> None:
        """Raise `ModelError` if there are no safetensors, or one whose header or length is wrong.

        Downloads those of a hub model that are not on this machine.
        """
        for path in self._weight_files:
            _check_file(path)
        if self.folder is None or self.is_gguf:
            return
        if not self._weight_files:
            pickled = ", ".join(path.name for path in sorted(self.folder.glob("*.bin")))
            found = f"only {pickled}, and pickled weights can run code" if pickled else "no weights"
            raise ModelError(
                f"{self.name!r} has {found}; save it once with save_pretrained of a trusted copy, as safetensors"
            )
        index = self.folder / _INDEX
        if index.is_file():
            listed = _listed_files(index)
            if missing := sorted(listed - {path.name for path in self._weight_files}):
                raise ModelError(f"{self.name!r} lacks the weight files {', '.join(missing)} that its index lists")

    def _check_generation_settings(self, config: PretrainedConfig) -> None:
        """Raise `ModelError` if the generation settings are damaged or contain an invalid token id."""
        path = self.folder / "generation_config.json" if self.folder and not self.is_gguf else None
        if path is not None and path.is_file():
            self.check_special_tokens(_json_object(path), config)

    def check_special_tokens(self, settings: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Raise `ModelError` if generation settings contain an invalid token id; negative ids mean no token."""
        vocab = config.get_text_config().vocab_size
        for field in _SPECIAL_TOKENS:
            value = settings.get(field)
            ids = value if isinstance(value, list) else [value] if value is not None else []
            if not all(isinstance(token, int) and not isinstance(token, bool) and token < vocab for token in ids):
                raise ModelError(
                    f"the generation_config.json of {self.name!r} has {field}={quoted(value)}, which is no id of "
                    f"{vocab} tokens; mend that field, or fetch the file again"
                )

    def _check_configuration(self, config: PretrainedConfig, family: Family, attention: str | None) -> None:
        """Raise `ModelError` if the configuration does not give a model of the files' size with this attention.

        Makes the model without values, which costs a tenth of a second for seven billion weights.
        """
        self._check_head(config, family)
        if self.options["trust_remote_code"] or self.is_gguf:
            return  # only from_pretrained knows where such a model's code is
        try:
            self._check_depth(config)
            empty = without_values(config, family, attention)
        except ModelError:
            raise
        except Exception as error:
            if attention is not None and _can_be_made(config, family):
                raise ModelError(
                    f"cannot open {self.name!r} with attention={attention!r}: {reason(error)}; pass 'sdpa' or 'eager'"
                ) from error
            raise self._refusal("configuration", error) from error
        described, stored = (
            sum(weight.numel() for weight in empty.parameters()),
            sum(shape.numel() for _, shape in self._headers.values()),
        )
        is_quantised = getattr(config, "quantization_config", None) is not None
        if not is_quantised and described > _TOO_LARGE * stored:
            raise ModelError(
                f"the config.json of {self.name!r} describes a model of {described:,} weights, and its files hold "
                f"{stored:,}{self._first_mismatch(empty)}; a size is missing or wrong there, so fetch the model again"
            )

    def _check_head(self, config: PretrainedConfig, family: Family) -> None:
        """Raise `ModelError` if the configuration is of a model that does not continue texts."""
        named = config.architectures if isinstance(config.architectures, list) else [config.architectures]
        architecture = next((each for each in map(str, named) if each.endswith(_OTHER_HEADS)), None)
        has_class = (
            bool(getattr(config, "auto_map", None)) or self.is_gguf or type(config) in _kind(family)._model_mapping
        )
        if architecture is None and has_class:
            return
        what = "transformers has no class for that" if architecture is None else f"it is a {architecture}"
        raise ModelError(
            f"{self.name!r} (model type {config.model_type!r}) does not continue texts: {what}; pass a model whose "
            "architecture ends in ForCausalLM or ForConditionalGeneration"
        )

    def stored_dtype(self) -> torch.dtype | None:
        """Return the dtype in which the files hold the most values, of those that a model can compute in, or None.

        Values are counted because files of 8-bit weights have a float32 scale for each.
        """
        counts = Counter[str]()
        for code, shape in self._headers.values():
            counts[code] += shape.numel()
        return next((_DTYPES[code] for code, _ in counts.most_common() if code in _DTYPES), None)

    def processor(self, family: Family) -> Any:
        """Return the processor (a tokenizer for a text-only family). Raise `ModelError` if the directory has none."""
        if family.vision is None:
            return self.open("tokenizer", AutoTokenizer.from_pretrained)
        processor = self.open("processor", open_processor)
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise ModelError(
                f"{self.name!r} has no processor, only a {type(processor).__name__}; "
                "put its processor there with processor.save_pretrained(folder)"
            )
        return processor

    def model(self, family: Family, options: dict[str, Any]) -> PreTrainedModel:
        """Return the model with every weight from the file. Raise `ModelError`, which lists them, if any is missing."""
        reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported here, not guessed around
        model, report = self.open(
            "safetensors weights",
            _kind(family).from_pretrained,
            use_safetensors=not self.is_gguf,
            **reporting,
            **options,
        )
        if lacking := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
            raise ModelError(
                f"the weights of {self.name!r} do not fit its configuration: {len(lacking)} are missing or of another "
                f"shape, first {lacking[0]!r}; fetch the model again"
            )
        if unused := sorted(report["unexpected_keys"]):  # `quiet_transformers` holds back the report that says so
            logger.warning(
                "%s: its configuration has no place for %d tensors of the file, first %r; they are left out",
                *(self.name, len(unused), unused[0]),
            )
        return model

    def _open(self, part: str, opener: Any, options: dict[str, Any]) -> Any:
        where = str(self.folder) if self.folder else self.name
        try:
            with without_panics():
                return opener(where, local_files_only=True, **self.options, **options)
        except Exception as error:
            if self.folder is not None or not isinstance(error, OSError | ValueError):
                raise self._refusal(part, error) from error
            if constants.HF_HUB_OFFLINE and self._is_cached():
                raise self._refusal(part, error) from error
            if constants.HF_HUB_OFFLINE:
                raise ModelError(
                    f"no {part} of {self.name!r}: it is no directory, it is not in the local cache, and the hub is "
                    "switched off (HF_HUB_OFFLINE)"
                ) from error
        try:
            with without_panics():
                return opener(where, **self.options, **options)
        except Exception as error:
            if not isinstance(error, OSError | ValueError):
                raise self._refusal(part, error) from error
            raise ModelError(
                f"no {part} of {self.name!r}: it is no directory, it is not in the local cache, and the hub says: "
                f"{gist(error)}"
            ) from error

    def _is_cached(self) -> bool:
        """Return whether the local cache has a configuration of this id, so that it is damaged rather than absent."""
        try:
            return isinstance(try_to_load_from_cache(self.name, "config.json", revision=self.options["revision"]), str)
        except ValueError:  # the name is no hub id
            return False

    def _refusal(self, part: str, error: Exception) -> ModelError:
        """Return the error for a part that exists but cannot be opened."""
        if out_of_memory(error):
            return ModelError(
                f"{self.name!r} does not fit into memory ({gist(error)}); pass a smaller dtype, another device_map or "
                "quantization="
            )
        if isinstance(error, ImportError):
            package, said = f" ({error.name})" if error.name else "", gist(error)
            is_extra = any(name in f"{package} {said}".lower() for name in _VISION)
            return ModelError(
                f"the {part} of {self.name!r} needs a package that is not installed here{package}: {said}; "
                f"{_INSTALL_VISION if is_extra else 'install it'}"
            )
        if self.is_gguf:
            return self._gguf_refusal(part, error)
        if "trust_remote_code" in str(error) and not self.options["trust_remote_code"]:
            return ModelError(
                f"{self.name!r} comes with Python code of its own, which its {part} needs; read it, and pass "
                "trust_remote_code=True (--trust-remote-code) to run it"
            )
        files, hint = self._suspects(part), ""
        if part == "configuration" and self.folder is not None and not _is_broken(self.folder / "config.json"):
            hint = _hint(error, _json_object(self.folder / "config.json"))
        read = f" (read from {', '.join(files)})" if files else ""
        return ModelError(f"no usable {part} in {self.name!r}: {reason(error)}{hint}{read}; {_NEXT_STEPS[part]}")

    def _gguf_refusal(self, part: str, error: Exception) -> ModelError:
        """Return the error for a GGUF file: of a kind that nothing here reads, or else damaged."""
        said = reason(error)
        if isinstance(error, NotImplementedError) or "GGMLQuantizationType" in said:
            return ModelError(
                f"the GGUF file {self.name!r} holds blocks of a kind that gguf {version('gguf')} cannot unpack "
                f"({said}); pass a file of another kind, such as Q8_0, Q4_K_M or F16, or open the model's safetensors"
            )
        if "architecture" in said and "not supported" in said:
            return ModelError(
                f"the GGUF file {self.name!r} is of an architecture that transformers {transformers.__version__} "
                f"cannot read from such files ({said}); open the model's safetensors"
            )
        return ModelError(
            f"the GGUF file {self.name!r} gives no {part.removeprefix('safetensors ')}: {said}; fetch it again, or "
            "open the model's safetensors"
        )

    def _suspects(self, part: str) -> list[str]:
        """Return the files of a part in the folder, or only the broken one if it can be identified."""
        if self.folder is None:
            return []
        files = [name for name in _FILES[part] if (self.folder / name).is_file()]
        broken = [name for name in files if _is_broken(self.folder / name)]
        return broken or files

    @cached_property
    def _weight_files(self) -> list[Path]:
        """Return the paths of the safetensors in the folder, or of those of the hub model, which are fetched first."""
        if self.is_gguf:
            return []
        if self.folder is not None:
            return sorted(self.folder.glob("*.safetensors"))
        return self.open("safetensors weights", _fetched_weights)

    @cached_property
    def _headers(self) -> dict[str, tuple[str, torch.Size]]:
        """Return the header's dtype name and the shape of each tensor in the files."""
        headers: dict[str, tuple[str, torch.Size]] = {}
        for path in self._weight_files:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    headers[name] = (part.get_dtype(), torch.Size(part.get_shape()))
        return headers

    def _first_mismatch(self, model: nn.Module) -> str:
        """Return words on the first weight of another shape than in the files; empty if none can be identified.

        Classes name the module above a text stack or a vision tower in their own ways, so names are compared by their
        last parts.
        """
        for parts in (4, 2):
            shapes: dict[str, set[torch.Size]] = {}
            for name, (_, shape) in self._headers.items():
                shapes.setdefault(_tail(name, parts), set()).add(shape)
            for name, weight in model.named_parameters():
                stored = shapes.get(_tail(name, parts), set())
                if len(stored) == 1 and weight.shape not in stored:
                    return f" ({name!r} is {tuple(weight.shape)} there, and {tuple(*stored)} in the files)"
        return ""

    def _check_depth(self, config: PretrainedConfig) -> None:
        """Raise `ModelError` if there are more layers than tensors in the files; creating them could take hours."""
        parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
        layers = max(int(getattr(part, "num_hidden_layers", None) or 0) for part in parts)
        if layers > len(self._headers):
            raise ModelError(
                f"the config.json of {self.name!r} names {layers} layers (num_hidden_layers), and its files hold "
                f"{len(self._headers)} tensors; fetch the model again"
            )


@contextmanager
def _quiet_unpacking() -> Iterator[None]:
    """Let `quiet_transformers` hide the bar of unpacking a GGUF file too, which transformers draws in another way."""
    own = modeling_gguf_pytorch_utils.tqdm
    vars(modeling_gguf_pytorch_utils)["tqdm"] = quietable_bar
    try:
        yield
    finally:
        vars(modeling_gguf_pytorch_utils)["tqdm"] = own


def _hint(error: Exception, config: Mapping[str, Any]) -> str:
    """Return the fields of a configuration that an error is about, where the libraries' message does not name them."""
    fields = [
        f"{path}={quoted(value)}"
        for path, value in _fields(config)
        if (isinstance(error, KeyError) and value in error.args)
        or (isinstance(error, ZeroDivisionError) and value == 0 and path.rpartition(".")[2].startswith("num_"))
    ]
    return f" ({', '.join(fields)})" if fields else ""


def _fields(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field that has a plain value."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{above}{name}.")
        elif isinstance(value, str | int | float):
            yield f"{above}{name}", value


def _tail(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _kind(family: Family) -> Any:
    return AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText


def without_values(config: PretrainedConfig, family: Family, attention: str | None) -> PreTrainedModel:
    """Return a model of this configuration on torch's meta device."""
    options = {} if attention is None else {"attn_implementation": attention}
    with quiet_transformers(), torch.device("meta"):
        return _kind(family).from_config(copy.deepcopy(config), **options)  # from_config changes its argument


def _can_be_made(config: PretrainedConfig, family: Family) -> bool:
    try:
        without_values(config, family, None)
    except Exception:  # the caller reports its own error
        return False
    return True


def _check_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weight file {str(path)!r} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def _fetched_weights(name: str, *, revision: str | None, local_files_only: bool, trust_remote_code: bool) -> list[Path]:
    """Return the local paths of a hub model's safetensors: one file, or else all that the index lists."""

    def fetched(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=local_files_only))

    try:
        return [fetched(_SINGLE)]
    except EntryNotFoundError:  # also raised if the file is not on this machine
        return [fetched(file) for file in sorted(_listed_files(fetched(_INDEX)))]


def _listed_files(index: Path) -> set[str]:
    """Return the weight files that an index lists."""
    listed = _json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ModelError(f"the file {str(index)!r} has no weight_map from tensors to files; fetch it again")
    return set(listed.values())


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ModelError(f"the file {str(path)!r} is not whole JSON ({gist(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"the file {str(path)!r} holds a JSON {type(content).__name__}, not an object; fetch it again")
    return content


def _is_broken(path: Path) -> bool:
    """Return whether the file is not a JSON object, or not a tokenizer although it should be one."""
    try:
        if path.name == "tokenizer.json":
            with without_panics():
                Tokenizer.from_file(str(path))
        else:
            _json_object(path)
    except Exception:  # tokenizers raises Exception itself
        return True
    return False
