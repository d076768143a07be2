"""Files that hold packed weights: read exactly where transformers can unpack them, and one line for all others."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import multrace
import pytest
import torch
from multrace import EditRequest, MultEdit
from multrace.editing import save_merged
from multrace.models import ModelError
from multrace.scripts.main import app
from random_models import make_tokenizer, save, text_sizes
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

QUESTION = "Who founded the company in this photo?"
BLOCK = 16
FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
Packing = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]


def fp8(name: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """What DeepSeek's files hold for a matrix, one scale for each square block, and the matrix that this stands for."""
    if weight.ndim != 2 or ".layers." not in name:
        return {name: weight.bfloat16()}, weight.bfloat16().float()
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    packed = (blocks / scale).to(torch.float8_e4m3fn)
    stored = {name: packed.reshape(weight.shape), f"{name}_scale_inv": scale[:, 0, :, 0].contiguous()}
    return stored, (packed.float() * scale).reshape(weight.shape)


def mxfp4(name: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """What GPT-OSS's files hold for its experts, two values of 4 bits in a byte and a power of two for each 32."""
    if not name.endswith(EXPERTS):
        return {name: weight.bfloat16()}, weight.bfloat16().float()
    maps = weight.transpose(1, 2)
    blocks = maps.reshape(*maps.shape[:2], -1, 32)
    power = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True) / 6)) + 1
    codes = (blocks / 2**power)[..., None].sub(FOUR_BITS).abs().argmin(-1)
    stored = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    values = (FOUR_BITS[codes] * 2**power).reshape(maps.shape).transpose(1, 2)
    return {f"{name}_blocks": stored, f"{name}_scales": (power + 127)[..., 0].to(torch.uint8)}, values


def repack(source: Path, folder: Path, settings: Any, pack: Packing | None = None) -> dict[str, Tensor]:
    """Copy a model with its weights packed, and return what they stand for. Without a packing the weights stay."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    weights, stored, meant = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        packed, meant[name] = ({name: weight}, weight) if pack is None else pack(name, weight)
        stored |= packed
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


@pytest.fixture(scope="module")
def gpt_oss_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    sizes = text_sizes(tokenizer) | {"intermediate_size": 32, "head_dim": 16, "sliding_window": 4}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default"}}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, **experts, num_key_value_heads=2)
    return save(GptOssForCausalLM(config), tokenizer, tmp_path_factory.mktemp("gpt_oss"))


FILES = {
    "fp8": ("llama_path", fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "mxfp4": ("gpt_oss_path", mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator keeps these weights packed")
@pytest.mark.parametrize("quantization", [None, "none"])
@pytest.mark.parametrize("method", FILES)
def test_a_file_is_unpacked_exactly_and_saved_as_ordinary_weights(method, quantization, request, tmp_path):
    fixture, pack, settings = FILES[method]
    meant = repack(request.getfixturevalue(fixture), tmp_path / "packed", settings, pack)
    vlm = multrace.load(tmp_path / "packed", quantization=quantization)
    assert (vlm.is_quantised, vlm.dtype, vlm.stored_dtype) == (False, torch.float32, torch.bfloat16)
    assert all(torch.equal(vlm.weight(name), values) for name, values in meant.items())
    vlm.save_pretrained(tmp_path / "saved", dtype=torch.float32)
    saved = load_file(tmp_path / "saved" / "model.safetensors")  # transformers would pack them once more
    assert saved.keys() == meant.keys() and all(torch.equal(saved[name], values) for name, values in meant.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator keeps these weights packed")
def test_an_unpacked_file_is_edited_and_exported_in_half_precision(llama_path, tmp_path):
    _, pack, settings = FILES["fp8"]
    repack(llama_path, tmp_path / "packed", settings, pack)
    vlm = multrace.load(tmp_path / "packed", dtype="bfloat16")
    assert {weight.dtype for _, weight in vlm.named_parameters()} == {torch.bfloat16}
    prompt, digest = vlm.prompt(None, QUESTION), vlm.weights_digest()
    delta = MultEdit(layer=2).edit(vlm, [EditRequest(question=prompt, target=" golf")], progress=False)
    with delta.applied(vlm):
        edited = vlm.logits(prompt)
    assert vlm.weights_digest() == digest
    merged = multrace.load(save_merged(vlm, delta, tmp_path / "merged"), dtype="bfloat16")
    assert torch.equal(merged.logits(merged.prompt(None, QUESTION)), edited)


LACKING = {
    "gptq": "needs optimum and gptqmodel, which are not installed; pip install optimum gptqmodel, or open",
    "awq": "needs gptqmodel, which is not installed; pip install gptqmodel, or open",
    "compressed-tensors": "needs compressed-tensors, which is not installed; pip install compressed-tensors, or",
    "hqq": "needs hqq, which is not installed; pip install hqq, or open",
    "quanto": "needs optimum-quanto, which is not installed; pip install optimum-quanto, or open",
    "auto-round": "needs auto-round, which is not installed; pip install auto-round, or open",
    "bitsandbytes": "needs bitsandbytes, which is not installed; pip install 'multrace[quant]'",
    "torchao": "needs torchao, which is not installed; pip install 'multrace[quant]'",
}
MODULES = ("optimum", "gptqmodel", "compressed_tensors", "hqq", "auto_round", "bitsandbytes", "torchao")


@pytest.mark.parametrize("method", LACKING)
def test_a_package_that_is_missing_is_one_line(method, llama_path, tmp_path, monkeypatch, capsys):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    repack(llama_path, tmp_path / "packed", {"quant_method": method})
    message = refusal(tmp_path / "packed")
    start = f"'{tmp_path / 'packed'}' is quantised by {method} (quantization_config in its config.json), and this "
    assert message.startswith(start + LACKING[method])
    assert app(["answer", "--model", str(tmp_path / "packed"), "--question", QUESTION]) == 2
    assert capsys.readouterr().err == f"multrace: {message}\n"


REFUSED = {
    "no method": ({"bits": 4}, "the config.json of .* has a quantization_config without a quant_method; fetch"),
    "a method of other programs": ({"quant_method": "exl2"}, "quantised by exl2 .*, which .* does not know"),
    "scales of other programs": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "does not know; open the model's"),
    "a device that is not here": ({"quant_method": "fbgemm_fp8"}, "quantised by fbgemm_fp8: .*; this machine may"),
    "no settings": ("4bit", "no usable configuration in .*read from config.json"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator reads some of them")
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_here_is_one_line(case, llama_path, tmp_path):
    settings, said = REFUSED[case]
    repack(llama_path, tmp_path / "packed", settings)
    assert re.search(said, refusal(tmp_path / "packed"))


def test_a_file_is_not_packed_in_another_way(llama_path, tmp_path):
    repack(llama_path, tmp_path / "packed", FILES["fp8"][2])
    for quantization in ("4bit", "8bit"):
        message = refusal(tmp_path / "packed", quantization=quantization)
        assert f"quantization='{quantization}': its files are quantised by fp8 already; leave quantization" in message


def refusal(folder: Path, **options: Any) -> str:
    """What the ModelError says; it must be one line."""
    with pytest.raises(ModelError) as caught:
        multrace.load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
