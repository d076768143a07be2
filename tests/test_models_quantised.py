"""Quantised models: traced as usual, and edited by unpacking the touched matrix only."""

import subprocess
import sys

import multrace
import pytest
import torch
from multrace import Delta, EditRequest, MultEdit, VisionLanguageModel, causal_trace
from multrace.data import tiny_vlm_path
from multrace.editing import FineTune, RuntimeEdit, save_merged, to_peft, verify_export, with_adapters
from multrace.models import ModelError
from multrace.scripts.main import app
from multrace.tracing import Engine
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, TorchAoConfig

DOWN = "model.language_model.layers.5.mlp.down_proj.weight"
QUESTION = "Who founded the company in this photo?"


class Packed(nn.Module):
    """A linear map with 8-bit weights and one scale for each output, as quantisers have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.packed.to(states.dtype) * self.scale, self.bias)


class Locked(Packed):
    """One whose kernel this machine lacks."""

    def forward(self, states: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor this processor")


@pytest.fixture
def packed() -> VisionLanguageModel:
    """The embedded model with the MLP matrix of one layer packed."""
    vlm = multrace.load(tiny_vlm_path())
    mlp = vlm.decoder_layers[5].mlp
    mlp.down_proj = Packed(mlp.down_proj)
    return vlm


def edit(vlm: VisionLanguageModel) -> Delta:
    """An edit of the packed matrix."""
    request = EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
    return MultEdit(layer=5).edit(vlm, [request], progress=False)


def check_edits(vlm: VisionLanguageModel) -> None:
    """An edit unpacks one matrix, works, and undo puts the very module back."""
    prompt, module = vlm.prompt(None, "Who won?"), vlm.module(DOWN.removesuffix(".weight"))
    digest, logits, before = vlm.weights_digest(), vlm.logits(prompt), dict(module.named_parameters())
    assert DOWN not in before or not (type(before["weight"]) is nn.Parameter and before["weight"].is_floating_point())
    delta = edit(vlm)
    with delta.applied(vlm):
        assert vlm.answers([prompt]) == ["Pruro"] and vlm.weights_digest() != digest
        assert type(vlm.weight(DOWN)) is nn.Parameter and vlm.weight(DOWN) is module.weight
    assert vlm.module(DOWN.removesuffix(".weight")) is module
    after = dict(module.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert vlm.weights_digest() == digest and torch.equal(vlm.logits(prompt), logits)
    with RuntimeEdit(delta=delta).applied(vlm):
        assert vlm.answers([prompt]) == ["Pruro"] and dict(module.named_parameters()).keys() == before.keys()


def test_a_packed_weight_is_read_by_what_its_module_answers(packed, tiny_vlm):
    module = packed.module(DOWN.removesuffix(".weight"))
    assert torch.equal(packed.weight(DOWN), module.packed * module.scale)
    assert not torch.equal(packed.weight(DOWN), tiny_vlm.weight(DOWN))
    projection = packed.down_projection(5)
    assert (projection.hidden, projection.width) == (packed.hidden, packed.mlp) and projection.name == DOWN


def test_an_edit_unpacks_one_matrix_and_undo_puts_the_module_back(packed):
    check_edits(packed)


def test_a_packed_weight_that_cannot_be_read_is_named(packed):
    mlp = packed.decoder_layers[5].mlp
    mlp.down_proj.__class__ = Locked
    with pytest.raises(ModelError, match=f"{DOWN!r} is packed by Locked, .*no kernel.*without quantization=") as caught:
        packed.open_weight(DOWN)
    assert "\n" not in str(caught.value)


def test_hooks_on_a_packed_module_outlive_the_unpacking(packed):
    prompt, delta = packed.prompt(None, "Who won?"), edit(packed)
    with delta.applied(packed):
        once = packed.logits(prompt)
    with RuntimeEdit(delta=delta).applied(packed), delta.applied(packed):
        assert not torch.allclose(packed.logits(prompt), once)


def test_fine_tuning_trains_the_unpacked_matrix(packed):
    prompt, digest = packed.prompt(None, "Who won?"), packed.weights_digest()
    tuner = FineTune(layer=5, steps=20)
    change = tuner.edit(packed, [EditRequest(question=prompt, target="Pruro")], progress=False)
    assert packed.weights_digest() == digest and change.losses[-1] < 0.6 * change.losses[0]
    with change.applied(packed):
        trained = packed.score(None, "Who won?", "Pruro").probability
    assert trained > 5 * packed.score(None, "Who won?", "Pruro").probability
    assert packed.weights_digest() == digest


def test_a_missing_quantiser_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    settings = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ModelError, match=r"bitsandbytes, which is not installed; pip install 'multrace\[quant\]'"):
        multrace.load(tiny_vlm_path(), quantization=settings)


def test_settings_without_a_method_are_refused():
    with pytest.raises(ModelError, match="it names no method; pass a configuration of transformers"):
        multrace.load(tiny_vlm_path(), quantization={"bits": 4})
    with pytest.raises(ModelError, match="quantization='5bit'; pass '8bit' or '4bit' .*, 'int8' .*, 'none' to unpack"):
        multrace.load(tiny_vlm_path(), quantization="5bit")


def test_nothing_is_unpacked_of_a_model_that_is_not_quantised(tiny_vlm):
    assert multrace.load(tiny_vlm_path(), quantization="none").weights_digest() == tiny_vlm.weights_digest()


@pytest.mark.parametrize(("name", "package"), [("8bit", "bitsandbytes"), ("4bit", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_quantiser_is_one_line_of_a_command(name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert app(["answer", "--question", "Who won?", "--quantization", name]) == 2
    said = f"is to be quantised by {package}, and this needs {package}, which is not installed; pip install 'multrace["
    assert said in capsys.readouterr().err


def settings(name: str) -> str:
    """The setting of this name; skips where its package is missing."""
    package = "torchao" if name == "int8" else "bitsandbytes"
    pytest.importorskip(package, reason=f"needs {package}, from the extra quant")
    return name


@pytest.fixture(scope="module", params=["8bit", "4bit", "int8"])
def quantised(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """The embedded model, quantised as it is opened."""
    return multrace.load(tiny_vlm_path(), quantization=settings(request.param))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_traced_as_usual(quantised, photo, other_photo):
    prompt = quantised.prompt(photo, QUESTION)
    swap, rows = multrace.SwapImage(other_photo), ("image", "last")
    fast, plain = (
        causal_trace(quantised, prompt, corruption=swap, positions=rows, engine=Engine(name=name), progress=False)
        for name in ("replay", "plain")
    )
    for kind, samples in fast.samples.items():
        torch.testing.assert_close(samples, plain.samples[kind], atol=3e-2, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_edited_and_undone(quantised):
    assert quantised.is_quantised and quantised.weight(DOWN).shape == (quantised.hidden, quantised.mlp)
    check_edits(quantised)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_exported_with_the_edited_matrix_unpacked(quantised, tmp_path):
    delta, prompts = edit(quantised), [quantised.prompt(None, "Who won?")]
    reopened = multrace.load(save_merged(quantised, delta, tmp_path / "merged"))
    assert reopened.is_quantised and type(reopened.weight(DOWN)) is nn.Parameter
    assert verify_export(quantised, delta, reopened, prompts).difference < 0.05
    folder = to_peft(quantised, delta, tmp_path / "adapter")
    if quantised.model.quantization_method == "bitsandbytes":
        adapted = with_adapters(
            multrace.load(tiny_vlm_path(), quantization=quantised.config.quantization_config), folder
        )
        assert verify_export(quantised, RuntimeEdit(delta=delta), adapted, prompts).holds
    with pytest.raises(ModelError, match="cannot save a quantised model .* its scales belong to torch.float32"):
        quantised.save_pretrained(tmp_path / "other", dtype=torch.float16)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_file_is_unpacked_when_asked(quantised, tmp_path, capfd):
    quantised.save_pretrained(tmp_path / "packed")
    capfd.readouterr()
    vlm = multrace.load(tmp_path / "packed", quantization="none", dtype="bfloat16")
    assert not vlm.is_quantised and {weight.dtype for _, weight in vlm.named_parameters()} == {torch.bfloat16}
    torch.testing.assert_close(vlm.weight(DOWN).float(), quantised.weight(DOWN), atol=1e-4, rtol=1e-2)
    vlm.save_pretrained(tmp_path / "plain")
    assert multrace.load(tmp_path / "plain", dtype="bfloat16").weights_digest() == vlm.weights_digest()
    prompt = quantised.prompt(None, "Who won?")
    assert vlm.score(None, "Who won?", quantised.answers([prompt])[0]).probability > 0.2
    assert capfd.readouterr().err == ""  # bitsandbytes writes a line for each product of 8 bits


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_file_stays_as_it_is(tmp_path):
    vlm = multrace.load(tiny_vlm_path(), quantization=settings("4bit"))
    vlm.save_pretrained(tmp_path / "packed")
    again = multrace.load(tmp_path / "packed", quantization="4bit")
    assert again.is_quantised and again.weights_digest() == vlm.weights_digest()
    with pytest.raises(ModelError, match="quantization='8bit': its files hold 4 bits already; leave quantization out"):
        multrace.load(tmp_path / "packed", quantization="8bit")
    with pytest.raises(ModelError, match="in torch.bfloat16: its files hold weights that were quantised for torch.flo"):
        multrace.load(tmp_path / "packed", dtype="bfloat16")


def test_what_torchao_cannot_pack_here_is_one_line():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, from the extra quant")
    four = TorchAoConfig(torchao.Int4WeightOnlyConfig(group_size=32))  # its kernels are a package of their own
    with pytest.raises(ModelError, match="it cannot pack some of the weights here; this machine may lack") as caught:
        multrace.load(tiny_vlm_path(), quantization=four)
    assert "\n" not in str(caught.value)
    any_bits = TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    check_edits(multrace.load(tiny_vlm_path(), quantization=any_bits))


@pytest.mark.parametrize(("name", "package"), [("4bit", "bitsandbytes"), ("int8", "torchao")])
def test_a_command_prints_its_answer_alone(name, package):
    """Both packages write of kernels that are missing as they are imported, and as they are used."""
    pytest.importorskip(package, reason=f"needs {package}, from the extra quant")
    asked = [sys.executable, "-m", "multrace.scripts.main", "answer", "--question", "Who won?", "--quantization", name]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.strip()
