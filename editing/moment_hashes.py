"""What second moments depend on: the types of the prompts' tokens, and hashes of weights, prompts and settings."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import Prompt, VisionLanguageModel

KINDS = ("image", "question", "template")
"""Types of tokens that are counted apart."""


def hash_of_weights(vlm: VisionLanguageModel, highest: int, *, progress: bool = False) -> str:
    """Hex sha256 of all that turns a prompt into what layers up to the highest read, the highest one included.

    Every parameter and buffer (dtype, shape, bytes) except those of later layers, of the final norm and of an output
    head that is not also the input embedding; the configuration without names and versions; the way of attending.
    All bytes are read, so it takes a moment for a large model (about a second per GB).
    """
    later = [*vlm.decoder_layers[highest + 1 :], vlm.final_norm, vlm.output_head]
    embedding = {id(weight) for weight in vlm.input_embeddings.parameters()}
    unused = {
        id(tensor)
        for module in later
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in embedding
    }
    names = [name for name, weight in vlm.named_parameters() if id(weight) not in unused]
    whole = hashlib.sha256(_setup(vlm).encode())
    for name in tqdm(names, desc="hashing weights", unit="weight", disable=not progress, leave=False):
        whole.update(f"{name} {vlm.fingerprint([name])[name]} ".encode())
    for name, buffer in vlm.named_buffers():
        if id(buffer) not in unused:
            _add(whole, name, buffer)
    return whole.hexdigest()


def hash_of_corpus(prompts: Sequence[Prompt], *, progress: bool = False) -> tuple[tuple[str, ...], str]:
    """The types of token that occur, and a hex sha256 of the prompts in their order.

    Names, dtypes, shapes and bytes of all inputs, and the type of every token: the processor is in it by everything
    that it does. Each prompt is looked at once.
    """
    whole, present = hashlib.sha256(), set()
    for index in tqdm(range(len(prompts)), desc="hashing prompts", unit="prompt", disable=not progress, leave=False):
        prompt = prompts[index]
        types = token_types(prompt)
        for name, value in sorted(prompt.inputs.items()):
            _add(whole, name, value)
        _add(whole, "types", types)
        present |= set(types.tolist())
    return tuple(kind for number, kind in enumerate(KINDS, start=1) if number in present), whole.hexdigest()


def token_types(prompt: Prompt) -> Tensor:
    """(token,) uint8: the number in KINDS, from 1, of each token's type."""
    types = torch.full((prompt.length,), 1 + KINDS.index("template"), dtype=torch.uint8)
    for kind in ("question", "image"):
        types[list(prompt.groups[kind])] = 1 + KINDS.index(kind)
    return types


def hash_of_settings(**settings: str | float | Sequence[object] | None) -> str:
    """Hex sha256 of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _setup(vlm: VisionLanguageModel) -> str:
    left_out = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in vlm.config.to_dict().items() if name not in left_out}
    return json.dumps([config, vlm.config._attn_implementation], sort_keys=True, default=str)


def _add(whole: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    raw = tensor.detach().cpu().contiguous()
    whole.update(f"{name} {raw.dtype} {tuple(raw.shape)} ".encode())
    whole.update(raw.flatten().view(torch.uint8).numpy().tobytes())
