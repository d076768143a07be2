"""Opening a model from a directory or the hub, and proving its addresses before anybody trusts them."""

import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..errors import ModelError
from ..families.addresses import Addresses
from ..families.table import FAMILIES, Family, family_of
from ..frontend import Frontend
from ..vlm import VisionLanguageModel
from .devices import check_device_map, check_in_memory
from .proof import prove_addresses
from .sources import Source

logger = logging.getLogger("multrace")


@torch.inference_mode(False)  # or its weights could never be differentiated through
def load(
    path_or_id: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
    attention: str | None = None,
    verify: bool = True,
    families: Sequence[Family] = FAMILIES,
) -> VisionLanguageModel:
    """The model at a directory or hub id, in eval mode and without gradients, its addresses proven.

    dtype: "auto" takes the file's on an accelerator (device_map given, not "cpu") and float32 for half-precision
    files on the CPU. quantization: a transformers quantization config. attention: "sdpa" or "eager". verify=False
    skips the proof. families: the rows to choose from; add one with (*FAMILIES, Family(...)). Looks on this machine
    first and asks the hub only for an id that is not here. Safetensors only; code shipped with a model runs only with
    trust_remote_code=True. Logs one line (logger "multrace"); transformers' warnings are held back, and its bars too
    where stderr is no terminal. ModelError says what is missing or broken, and names the site that fails its proof.
    """
    name = str(path_or_id)
    source = Source(name, revision=revision, trust_remote_code=trust_remote_code)
    check_device_map(device_map, name)
    config = source.open("configuration", AutoConfig.from_pretrained)
    family = family_of(config, families)
    source.check_weights()
    processor = source.processor(family)
    stored = source.stored_dtype(config)
    options = {"dtype": _compute_dtype(dtype, stored, device_map, name)}
    given = {"device_map": device_map, "quantization_config": quantization, "attn_implementation": attention}
    options |= {option: value for option, value in given.items() if value is not None}
    model = source.model(family, options)
    check_in_memory(model, device_map, name)
    vlm = _assemble(model, processor, family=family, name=name, revision=revision, stored=stored)
    proof = prove_addresses(vlm) if verify else "addresses not proven (verify=False)"
    logger.info(
        "%s: %s, %d layers, hidden %d, mlp %d, %d heads, %s on %s; %s",
        *(name, family.name, vlm.layers, vlm.hidden, vlm.mlp, vlm.heads, str(vlm.dtype), vlm.device, proof),
    )
    return vlm


def _assemble(
    model: nn.Module, processor: Any, *, family: Family, name: str, revision: str | None, stored: torch.dtype | None
) -> VisionLanguageModel:
    model.eval()
    model.requires_grad_(False)
    vision = family.vision is not None
    frontend = Frontend(
        processor=processor,
        tokenizer=processor.tokenizer if vision else processor,
        image_token_id=model.config.image_token_id if vision else None,
        patch_size=getattr(model.config.vision_config, "patch_size", None) if vision else None,
        dropped_inputs=family.dropped_inputs,
        device=model.device,
        dtype=model.dtype,
    )
    if not frontend.tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name!r} gives no character offsets; save it once as a fast tokenizer (tokenizer.json)"
        )
    return VisionLanguageModel(
        model=model,
        frontend=frontend,
        addresses=Addresses(model=model, family=family, name=name),
        family=family,
        name=name,
        revision=revision,
        stored_dtype=stored or model.dtype,
    )


def _compute_dtype(
    asked: str | torch.dtype, stored: torch.dtype | None, device_map: Any, name: str
) -> str | torch.dtype:
    if asked != "auto":
        return _torch_dtype(asked, name)
    on_cpu = device_map in (None, "cpu") or device_map == torch.device("cpu")
    if on_cpu and stored in (torch.float16, torch.bfloat16):
        return torch.float32  # slow and coarse in half precision on most CPUs
    return stored or "auto"


def _torch_dtype(dtype: str | torch.dtype, name: str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"cannot open {name!r} in dtype {dtype!r}; pass 'auto', 'float32', 'bfloat16' or 'float16'")
    return found
