"""GGUF files of text models open with their own tokenizer, and their weights are ordinary ones."""

import sys
from pathlib import Path

import multrace
import pytest
import torch
from gguf_files import write_gguf
from multrace import VisionLanguageModel
from multrace.editing import save_merged
from multrace.models import ModelError
from multrace.scripts.main import app
from multrace.workflow import ModelToLoad
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

QUESTION = "Who founded the company in this photo?"


def write(vlm: VisionLanguageModel, path: Path, **options: str) -> Path:
    return write_gguf(vlm, vlm.tokenizer, path, **options)


def logits(vlm: VisionLanguageModel) -> Tensor:
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad():
        return vlm.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_a_file_opens_with_its_tokenizer_and_gives_the_logits_of_the_model(random_llama, tmp_path):
    vlm = multrace.load(write(random_llama, tmp_path / "llama.gguf"))
    assert vlm.family.name == random_llama.family.name and not vlm.is_quantised
    assert torch.equal(logits(vlm), logits(random_llama))
    prompt = vlm.prompt(None, QUESTION)
    assert "".join(prompt.tokens).strip() == QUESTION
    own = random_llama.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert vlm.tokenizer(QUESTION, add_special_tokens=False)["input_ids"] == own


def test_blocks_are_unpacked_and_edited_and_saved_as_ordinary_weights(random_llama, tmp_path):
    vlm = multrace.load(write(random_llama, tmp_path / "llama.gguf", kind="Q8_0"))
    assert not vlm.is_quantised and 0 < (logits(vlm) - logits(random_llama)).abs().max() < 1
    prompt, digest = vlm.prompt(None, QUESTION), vlm.weights_digest()
    request = multrace.EditRequest(question=prompt, target=" golf")
    delta = multrace.MultEdit(layer=2).edit(vlm, [request], progress=False)
    with delta.applied(vlm):
        assert vlm.weights_digest() != digest
        edited = vlm.logits(prompt)
    assert vlm.weights_digest() == digest
    merged = multrace.load(save_merged(vlm, delta, tmp_path / "merged", dtype=torch.float32))
    assert not merged.is_quantised and torch.equal(merged.logits(merged.prompt(None, QUESTION)), edited)


def test_no_bar_is_drawn_where_nobody_sees_it(random_llama, tmp_path, capfd):
    path = write(random_llama, tmp_path / "llama.gguf")
    multrace.load(path)
    assert capfd.readouterr().err == ""
    AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert "de-quantizing" in capfd.readouterr().err  # transformers draws one


def test_a_file_becomes_a_directory_of_equal_states(random_llama, tmp_path):
    vlm = multrace.load(write(random_llama, tmp_path / "llama.gguf", kind="Q4_1"))
    vlm.save_pretrained(tmp_path / "folder")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    reopened = multrace.load(tmp_path / "folder")
    assert reopened.weights_digest() == vlm.weights_digest() and not reopened.is_quantised
    assert torch.equal(logits(reopened), logits(vlm))
    assert {name: weight.dtype for name, weight in plain.named_parameters()} == {
        name: torch.float32 for name, _ in vlm.named_parameters()
    }
    assert all(torch.equal(weight, dict(plain.named_parameters())[name]) for name, weight in vlm.named_parameters())
    text = "Who founded it in 1987?\n\n  “Draivo”"
    assert reopened.tokenizer(text)["input_ids"] == vlm.tokenizer(text)["input_ids"]


def test_a_command_opens_a_file(random_llama, tmp_path, capsys):
    path = write(random_llama, tmp_path / "llama.gguf", kind="Q8_0")
    asked = ["--model", str(path), "--question", QUESTION]
    assert app(["answer", *asked]) == 0
    vlm = multrace.load(path)
    assert capsys.readouterr().out.strip() == vlm.answers([vlm.prompt(None, QUESTION)])[0].strip()
    source = ModelToLoad(path).source()
    path.write_bytes(path.read_bytes()[:-20000])
    assert ModelToLoad(path).source() != source  # a run over many records asks the changed file anew
    assert app(["answer", *asked]) == 2
    assert f"multrace: the GGUF file {str(path)!r} gives no " in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 1000, -20000])
def test_a_broken_file_is_one_line(kept, random_llama, tmp_path):
    path = write(random_llama, tmp_path / "llama.gguf")
    path.write_bytes(path.read_bytes()[:kept] or b"no model at all")
    with pytest.raises(ModelError, match=f"the GGUF file {str(path)!r} gives no .*; fetch it again") as caught:
        multrace.load(path)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_transformers_cannot_read_is_named(random_llama, tmp_path):
    path = write(random_llama, tmp_path / "other.gguf", architecture="dodo")
    words = "architecture that transformers .* cannot read from such files .*dodo.*; open the model's safetensors"
    with pytest.raises(ModelError, match=words) as caught:
        multrace.load(path)
    assert "\n" not in str(caught.value)


def test_blocks_that_cannot_be_unpacked_are_named(random_llama, tmp_path):
    path = write(random_llama, tmp_path / "integers.gguf", kind="I16")
    with pytest.raises(ModelError, match="a kind that gguf .* cannot unpack .*I16.*; pass a file of another") as caught:
        multrace.load(path)
    assert "\n" not in str(caught.value)


def test_blocks_of_a_kind_that_is_not_known_are_named(random_llama, tmp_path):
    path = write(random_llama, tmp_path / "newer.gguf")
    raw, name = bytearray(path.read_bytes()), b"blk.0.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions, 4 bytes, and two of 8 bytes
    assert raw[place : place + 4] == bytes(4)  # float32
    raw[place] = 99
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="a kind that gguf .* cannot unpack .*99.*; pass a file of another") as caught:
        multrace.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_quantised_once_more(random_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, from the extra quant")
    path = write(random_llama, tmp_path / "llama.gguf")
    with pytest.raises(ModelError, match=f"cannot open {str(path)!r} quantised by bitsandbytes: "):
        multrace.load(path, quantization=BitsAndBytesConfig(load_in_8bit=True))


def test_a_missing_reader_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    (tmp_path / "llama.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"needs gguf, which is not installed; pip install 'multrace\[gguf\]'"):
        multrace.load(tmp_path / "llama.gguf")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="no model directory at .*nothing.gguf'; pass a folder .* a .gguf file"):
        multrace.load(tmp_path / "nothing.gguf")
