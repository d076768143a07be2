"""Opening a model from a directory or the hub, and verifying its addresses before they are used."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from inspect import signature
from os import PathLike, fspath
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from ..errors import AddressError, ModelError, gist, reason
from ..families import Addresses, Family, Row, Site, discover, family_of, has_front, has_rows, resolved
from ..frontend import Frontend, position_limit
from ..guards import without_panics
from ..placement import absent, has_packed, input_device, together
from ..vlm import VisionLanguageModel
from .processors import (
    complete_processor,
    find_image_token,
    probe_prompt,
    with_answer_fills,
    with_picture_kind,
)
from .proof import prove_addresses, proving
from .quantised import check_quantiser, chosen, open_quantised
from .sharing import begin_sharing, sharing_options
from .sources import ModelSource, out_of_memory, without_values

logger = logging.getLogger("multrace")

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names by which transformers chooses the devices itself."""


@torch.inference_mode(False)  # otherwise gradients could never flow through its weights
def load(
    path_or_id: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    tp_plan: Literal["auto"] | Mapping[str, str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload_folder: str | PathLike[str] | None = None,
    quantization: Any = None,
    attention: str | None = None,
    verify: bool = True,
    families: Sequence[Row] | Literal["discover"] = (),
) -> VisionLanguageModel:
    """Return the model at a directory or hub id, in eval mode, without gradients and with verified addresses.

    Searches this machine first and the hub only for an id that is not here. Opens safetensors only. Logs one line
    (logger "multrace"); hides transformers' warnings, and its progress bars too if stderr is not a terminal.

    Args:
        path_or_id: a directory in Hugging Face's layout, a hub id such as "org/model", or a GGUF file of a text model,
            whose weights are unpacked (extra `gguf`).
        dtype: a torch dtype or its name. The default "auto" takes the file's on an accelerator (a device_map other
            than the CPU), and float32 for half-precision files on the CPU, where half precision is slow and coarse.
        device_map: where the weights go, as in transformers: a device, "auto", or module path -> device, "cpu" or
            "disk". The default None is the CPU. Weights beside an accelerator ("cpu", "disk") come to it for each call.
        tp_plan: "auto" to share the weights out among the processes that `torchrun` started, by the model's own
            tensor-parallel plan, or further rules of such a plan (module path with * for numbers -> style). Each
            process then makes the same calls in the same order, and gets whole states and whole results. The default
            None opens the whole model in this process.
        offload_folder: a folder for weights on "disk" that are not in the model's own files in the form in which they
            are needed; None as long as all of them are.
        revision: a branch, tag or commit of the hub; None for its newest.
        trust_remote_code: run Python code that comes with the model. The default False refuses such models.
        quantization: "8bit" or "4bit" (bitsandbytes), "int8" (torchao), both from the extra `quant`, or a quantization
            config of transformers; "none" to unpack weights that are quantised in the files. The default None leaves
            weights as the files have them, except fp8 and mxfp4 on the CPU, which are unpacked.
        attention: "sdpa", "eager", or another implementation that transformers has here; None for the model's own.
        verify: prove that every module is where the family row says, and that every weight is finite (default). Takes
            ten forward passes and one pass over the weights. False skips it, for a model that was proven before.
        families: further rows, tried before those of the tables: `TextStack`, `PictureFront`, or `Family` for both; or
            "discover" to measure where the parts of the model are instead. An architecture without a row is measured
            if it is not built as usual; one more line of the log then says what was found.

    Returns:
        The model, ready for `prompt`, `answer`, tracing and editing.

    Raises:
        ModelError: what is missing or broken, with its file, or the site that fails its proof.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> vlm.layers, vlm.hidden, vlm.dtype, vlm.stored_dtype
        (8, 128, torch.float32, torch.float16)
    """
    name = fspath(path_or_id) if isinstance(path_or_id, PathLike) else str(path_or_id)
    source = ModelSource(name, revision=revision, trust_remote_code=trust_remote_code)
    check_device_map(device_map, name)
    others = {"device_map": device_map, "quantization": quantization, "trust_remote_code": trust_remote_code}
    processes = begin_sharing(tp_plan, others | {"a GGUF file": source.is_gguf}, name)
    rows = () if families == "discover" else families
    with together(processes):
        config = source.open("configuration", AutoConfig.from_pretrained)
        settings = chosen(quantization, config, name)
        quantiser = check_quantiser(settings, config, name)
        family = family_of(config, rows)
        source.check_files(config, family, attention)
        processor = source.processor(family)
        stored = source.stored_dtype()
        device = torch.accelerator.current_accelerator() if processes > 1 else device_map
        options = {"dtype": _compute_dtype(dtype, stored, device, name)}
        given = {"device_map": device_map, "quantization_config": settings, "attn_implementation": attention}
        given["offload_folder"] = None if offload_folder is None else fspath(offload_folder)
        options |= {option: value for option, value in given.items() if value is not None}
        if processes > 1:
            options |= sharing_options(without_values(config, family, attention), tp_plan, processes, quantiser, name)
        if quantiser is None:
            model = source.model(family, options)
        else:
            choice = {"unpack": quantization == "none", "exact": dtype != "auto"}
            model = open_quantised(source, family, options, quantiser, **choice)
        if source.is_gguf and not has_packed(model):  # its weights were unpacked as they were read
            cast(Any, model).hf_quantizer.remove_quantization_config(model)
        check_in_memory(model, device_map, name)
        source.check_special_tokens(model.generation_config.to_dict(), model.config)
    vars(model.config).pop("distributed_config", None)  # says how it runs here, and not what it is
    is_known = has_front(config, rows)
    opened = _Opened(
        model=model, processor=processor, name=name, revision=revision, stored=stored, is_front_known=is_known
    )
    with _first_use(name):
        if families == "discover":
            vlm, proof = _discovered(replace(opened, is_front_known=False), family, verify=verify)
        else:
            vlm, proof = _served(opened, family, verify=verify, is_known=has_rows(config, rows))
    where = str(vlm.device) if processes == 1 else f"{vlm.device}, weights shared out among {processes} processes"
    logger.info(
        "%s: %s, %d layers, hidden %d, mlp %d, %d heads, %s on %s; %s",
        *(name, vlm.family.name, vlm.layers, vlm.hidden, vlm.mlp, vlm.heads, str(vlm.dtype), where, proof),
    )
    return vlm


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The parts of a model before it is known where in it what is."""

    model: PreTrainedModel
    processor: Any
    name: str
    revision: str | None
    stored: torch.dtype | None
    is_front_known: bool
    """Whether a row says what its pictures are to the text stack, or there are none."""


def _served(opened: _Opened, family: Family, *, verify: bool, is_known: bool) -> tuple[VisionLanguageModel, str]:
    """Return the model with this family, and its proof; of an architecture without a row, measured if that fails."""
    try:
        vlm, unknown = _assemble(opened, resolved(opened.model, family, opened.name)), ()
        if not opened.is_front_known:
            with proving("image", vlm):
                vlm, unknown = with_picture_kind(vlm)
        vlm, proof = _ready(vlm, verify=verify)
    except AddressError as error:
        if is_known:
            raise
        unusual = error
    else:
        if unknown or not opened.is_front_known and (vlm.family.attended or not vlm.family.places):
            _log_discovered(vlm, unknown)
        return vlm, proof
    try:
        return _discovered(opened, family, verify=verify)
    except AddressError as error:
        raise ModelError(f"{gist(error)} (no row serves it, and with the usual names, {gist(unusual)})") from error


def _discovered(opened: _Opened, family: Family, *, verify: bool) -> tuple[VisionLanguageModel, str]:
    """Return the model with a family that was measured on it, and its proof.

    family: One for this configuration, of which only counts what cannot be measured.
    """
    vlm = _assemble(opened, family)
    complete_processor(vlm)
    prompt = probe_prompt(vlm)
    row = discover(opened.model, lambda: vlm.logits(prompt), name=opened.name, has_vision=family.vision is not None)
    row = replace(row, **{part: getattr(family, part) for part in ("dropped_inputs", "attended", "places")})
    vlm, unknown = _assemble(opened, row), ()
    if not opened.is_front_known:
        vlm, unknown = with_picture_kind(vlm)
    _log_discovered(vlm, unknown)
    return _ready(vlm, verify=verify)


_UNNAMED = {"vision_layers": "the layers of the vision tower", "projector": "the projector"}


def _log_discovered(vlm: VisionLanguageModel, unknown: Sequence[str]) -> None:
    """Log in one line what was measured on a model, and in words what could not be."""
    row = vlm.family
    found = {part.name: getattr(row, part.name) for part in fields(row) if getattr(row, part.name) != part.default}
    names = ", ".join(f"{part}={value!r}" for part, value in found.items() if not part.endswith(("name", "types")))
    missing = [words for part, words in _UNNAMED.items() if vlm.has_vision and getattr(row, part) is None]
    left = "; not found: " + ", ".join((*missing, *unknown)) if (*missing, *unknown) else ""
    logger.info("%s: discovered, not in the tables of families: %s%s", vlm.name, names or "the usual names", left)


def _ready(vlm: VisionLanguageModel, *, verify: bool) -> tuple[VisionLanguageModel, str]:
    """Return an assembled model with what its processor lacks, and one line on what is proven."""
    complete_processor(vlm)
    vlm = with_answer_fills(vlm)
    _ = vlm.after_head, vlm.first_position  # measured now, since passes would disturb hooks that are placed later
    if verify:
        return vlm, prove_addresses(vlm)
    _check_names(vlm)
    return vlm, "addresses not proven (verify=False)"


def _check_names(vlm: VisionLanguageModel) -> None:
    """Raise `AddressError` if the model lacks a module of its text stack that the family names."""
    for layer in range(vlm.layers):
        for kind in ("mlp", "attention"):
            vlm.module(Site(kind, layer))
        vlm.attention_projection(layer)
        if vlm.has_down_projection(layer):
            vlm.down_projection(layer)
    _ = vlm.final_norm


def _assemble(opened: _Opened, family: Family) -> VisionLanguageModel:
    model, processor, name = opened.model, opened.processor, opened.name
    model.eval()
    model.requires_grad_(False)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped product of float64 matrices
    vision = family.vision is not None
    tokenizer = processor.tokenizer if vision else processor
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of {name!r} gives no character offsets; save it once as a fast tokenizer (tokenizer.json)"
        )
    frontend = Frontend(
        processor=processor,
        tokenizer=tokenizer,
        image_token_id=find_image_token(processor, model.config, name) if vision else None,
        patch_size=_patch_size(model) if vision else None,
        dropped_inputs=family.dropped_inputs,
        accepted=_accepted_inputs(model),
        attended=family.attended,
        places=family.places,
        device=input_device(model),
        dtype=model.dtype,
        limit=position_limit(model.config),
        vocab=model.config.get_text_config().vocab_size,
    )
    return VisionLanguageModel(
        model=model,
        frontend=frontend,
        addresses=Addresses(model=model, family=family, name=name),
        family=family,
        name=name,
        revision=opened.revision,
        stored_dtype=opened.stored or model.dtype,
    )


def _patch_size(model: PreTrainedModel) -> int | None:
    """Return the side of a vision patch in pixels; None if the configuration has none or patches are no squares."""
    size = getattr(getattr(model.config, "vision_config", None), "patch_size", None)
    if isinstance(size, list | tuple):
        return size[0] if len(set(size)) == 1 else None
    return size


def _accepted_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the model's inputs; others would be lost in the keywords of its attention function."""
    return frozenset(signature(type(model).forward).parameters) - {"self", "args", "kwargs"}


@contextmanager
def _first_use(name: str) -> Iterator[None]:
    """Turn every library error inside the block, the first use of an opened model, into a `ModelError`."""
    try:
        with without_panics():
            yield
    except ModelError:
        raise
    except Exception as error:  # valid files that do not fit together can fail anywhere in the libraries
        if out_of_memory(error):
            raise ModelError(
                f"one question to {name!r} does not fit into memory ({gist(error)}); pass a smaller dtype or "
                "another device_map"
            ) from error
        raise ModelError(
            f"{name!r} was opened, and cannot be asked a question: {reason(error)}; its configuration, processor and "
            "weights do not fit together, so fetch them again from one place"
        ) from error


def _compute_dtype(
    asked: str | torch.dtype, stored: torch.dtype | None, device_map: Any, name: str
) -> str | torch.dtype:
    if asked != "auto":
        return _torch_dtype(asked, name)
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map or "cpu"]
    on_cpu = all(str(device) in ("cpu", "disk") for device in devices)
    if on_cpu and stored in (torch.float16, torch.bfloat16):
        return torch.float32  # slow and coarse in half precision on most CPUs
    return stored or "auto"


def _torch_dtype(dtype: str | torch.dtype, name: str) -> torch.dtype:
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ModelError(f"cannot open {name!r} in dtype {dtype!r}; pass 'auto', 'float32', 'bfloat16' or 'float16'")
    return named


def check_device_map(device_map: Any, name: str) -> None:
    """Raise `ModelError` if the map names something that is not a device, or a device that torch or this machine lacks.

    device_map: None, one of transformers' strategies, a device, or a mapping from module paths to devices.
    """
    if device_map is None or (isinstance(device_map, str) and device_map in _STRATEGIES):
        return
    devices = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    computing = [device for device in devices if device != "disk"]
    reasons = [
        f"{device!r} cannot be used here ({reason})" for device in computing or devices if (reason := _why_not(device))
    ]
    if not devices or reasons:
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), "auto"]
        raise ModelError(
            f"cannot open {name!r} with device_map={device_map!r}: {reasons[0] if reasons else 'it names no device'}; "
            f"pass one of {', '.join(map(repr, usable))}, or leave device_map out for the CPU"
        )


def check_in_memory(model: PreTrainedModel, device_map: Any, name: str) -> None:
    """Raise `ModelError` if a weight has no values and accelerate fetches none for it."""
    if lost := absent(model):
        raise ModelError(
            f"device_map={device_map!r} leaves {len(lost)} weights of {name!r} without values in memory, first "
            f"{lost[0]!r}; pass a device with room for all of them, a smaller dtype, or device_map=None for the CPU"
        )


def _why_not(device: Any) -> str | None:
    """Return the reason why no tensor can be made on the device; None if one can."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return f"a device cannot be of type {type(device).__name__}"
    if str(device) == "meta":
        return "weights there cannot be read or changed"
    if device == "disk":
        return "nothing is computed on a disk; give at least one module a device"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        return "torch knows no such device" if isinstance(device, str) else _first_sentence(error)
    try:
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend raises its own error if it is absent
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    """Return the error's message without torch's advice about its own build."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
