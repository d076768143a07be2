"""Where a model's parts come from: a directory, the local cache, or the hub; safetensors only."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)

from ..errors import ModelError, gist
from ..families.table import Family
from .quiet import quiet_transformers

logger = logging.getLogger("multrace")

_NEXT_STEPS = {
    "configuration": "pass a folder with a whole config.json",
    "tokenizer": "put one there with tokenizer.save_pretrained(folder)",
    "processor": "put one there with processor.save_pretrained(folder)",
    "safetensors weights": "fetch the model again, or pass other options to load",
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a safetensors header calls the dtypes that a model computes in; packed (quantised) ones are none of them."""


class Source:
    """Where a model comes from: a directory, the local cache, or the hub; every part is opened with the same care."""

    def __init__(self, name: str, *, revision: str | None, trust_remote_code: bool) -> None:
        self.name = name
        self.folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else None
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 and "/" in name
        if self.folder is None and (looks_like_path or Path(name).exists()):
            raise ModelError(
                f"no model directory at {name!r}; pass a folder with a config.json, or a hub id such as 'org/model'"
            )
        self.options = {"revision": revision, "trust_remote_code": trust_remote_code}

    def open(self, part: str, opener: Any, **options: Any) -> Any:
        """opener(...) from this machine, else from the hub. ModelError says which part is not there."""
        with quiet_transformers():
            return self._open(part, opener, options)

    def check_weights(self) -> None:
        """ModelError if the directory has no safetensors, or one whose header or length is wrong."""
        if self.folder is None:
            return
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickled = ", ".join(path.name for path in sorted(self.folder.glob("*.bin")))
            found = f"only {pickled}, and pickled weights can run code" if pickled else "no weights"
            raise ModelError(
                f"{self.name!r} has {found}; save it once with save_pretrained of a trusted copy, as safetensors"
            )
        for path in files:
            _check_file(path)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = set(json.loads(index.read_text())["weight_map"].values())
            if missing := sorted(listed - {path.name for path in files}):
                raise ModelError(f"{self.name!r} lacks the weight files {', '.join(missing)} that its index lists")

    def stored_dtype(self, config: PretrainedConfig) -> torch.dtype | None:
        """The dtype of most tensors in the files, else the one that the configuration names, else None."""
        if self.folder is None:
            written = config.dtype or config.get_text_config().dtype
            return getattr(torch, written.removeprefix("torch.")) if isinstance(written, str) else written
        counts: Counter[str] = Counter()
        for path in self.folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as opened:
                counts.update(opened.get_slice(name).get_dtype() for name in opened.keys())
        return next((_DTYPES[code] for code, _ in counts.most_common() if code in _DTYPES), None)

    def processor(self, family: Family) -> Any:
        """The processor (a tokenizer for a text-only family). ModelError if the directory has none."""
        if family.vision is None:
            return self.open("tokenizer", AutoTokenizer.from_pretrained)
        processor = self.open("processor", AutoProcessor.from_pretrained)
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise ModelError(
                f"{self.name!r} has no processor, only a {type(processor).__name__}; "
                "put its processor there with processor.save_pretrained(folder)"
            )
        return processor

    def model(self, family: Family, options: dict[str, Any]) -> nn.Module:
        """The weights, every one of them from the file. ModelError lists those that the file lacks."""
        kind = AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText
        reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported here, not guessed around
        try:
            model, report = self.open(
                "safetensors weights", kind.from_pretrained, use_safetensors=True, **reporting, **options
            )
        except SafetensorError as error:
            raise ModelError(f"the weights of {self.name!r} are not whole: {error}; fetch them again") from error
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
            return opener(where, local_files_only=True, **self.options, **options)
        except (OSError, ValueError) as error:
            if self.folder is not None:
                raise ModelError(f"no usable {part} in {self.name!r}: {gist(error)}; {_NEXT_STEPS[part]}") from error
            if constants.HF_HUB_OFFLINE:
                raise ModelError(
                    f"no {part} of {self.name!r}: it is no directory, it is not in the local cache, and the hub is "
                    "switched off (HF_HUB_OFFLINE)"
                ) from error
        try:
            return opener(where, **self.options, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no {part} of {self.name!r}: it is no directory, it is not in the local cache, and the hub says: "
                f"{gist(error)}"
            ) from error


def _check_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weight file {str(path)!r} is not a whole safetensors file ({error}); fetch it again"
        ) from error
