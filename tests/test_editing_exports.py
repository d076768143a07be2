"""Exports: adapters and merged directories, opened by PEFT and plain transformers, say what the edited model says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.editing import Delta, EditError, WeightChange
from multrace.editing.changes import Verification, compose, save_merged, to_peft, verify_export, with_adapters
from multrace.models import ModelError, Prompt, VisionLanguageModel, load
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
# PEFT reads an attribute that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def made(vlm: VisionLanguageModel, layer: int, *, rank: int = 2, seed: int = 0, size: float = 0.05) -> Delta:
    """A delta with random factors on one down projection."""
    projection, generator = vlm.down_projection(layer), torch.Generator().manual_seed(seed)
    left = size * torch.randn(projection.hidden, rank, generator=generator)
    right = torch.randn(rank, projection.width, generator=generator)
    change = WeightChange(left=left, right=right, keys=right, residuals=(left @ (right @ right.T)).T)
    return Delta(changes={projection.name: change}, fingerprints=vlm.fingerprint([projection.name]), model=vlm.name)


def asked(vlm: VisionLanguageModel, photo=None) -> Prompt:
    return vlm.prompt(photo if vlm.has_vision else None, "What is this?")


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    return model(**prompt.inputs, use_cache=False).logits


def plain(vlm: VisionLanguageModel, folder: Path | str) -> PreTrainedModel:
    """What transformers opens by itself."""
    kind = AutoModelForImageTextToText if vlm.has_vision else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


def test_an_adapter_on_the_plain_model_has_the_logits_of_the_edited_model(vlm, tmp_path, photo):
    delta = compose(made(vlm, 1), made(vlm, 2, rank=3))
    prompt = asked(vlm, photo)
    unedited = logits(vlm.model, prompt)
    with delta.applied(vlm):
        edited = logits(vlm.model, prompt)
    folder = to_peft(vlm, delta, tmp_path / "new" / "adapter").folder
    adapted = peft.PeftModel.from_pretrained(plain(vlm, vlm.name), str(folder))
    torch.testing.assert_close(logits(adapted, prompt), edited, **CLOSE)
    assert (edited - unedited).abs().max() > 0.01
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, prompt), unedited, **CLOSE)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, prompt), edited, **CLOSE)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]


def test_a_scale_that_is_not_one_would_show(random_llava_llama, tmp_path, photo):
    vlm = random_llava_llama
    delta, prompt = compose(made(vlm, 1), made(vlm, 2, rank=3)), asked(vlm, photo)
    with delta.applied(vlm):
        edited = logits(vlm.model, prompt)
    config = to_peft(vlm, delta, tmp_path / "adapter").folder / "adapter_config.json"
    words = json.loads(config.read_text())
    assert sorted(words["rank_pattern"].values()) == sorted(words["alpha_pattern"].values()) == [2, 3]
    config.write_text(json.dumps(words | {"alpha_pattern": {}}))
    adapted = peft.PeftModel.from_pretrained(plain(vlm, vlm.name), str(config.parent))
    assert (logits(adapted, prompt) - edited).abs().max() > 1e-3


def test_several_adapters_stack_in_three_ways(random_llava_llama, tmp_path, photo):
    vlm = random_llava_llama
    prompt, parts = asked(vlm, photo), [made(vlm, 1), made(vlm, 1, rank=1, seed=1), made(vlm, 2, seed=2)]
    with compose(*parts).applied(vlm):
        edited = logits(vlm.model, prompt)
    with parts[0].applied(vlm):
        first = logits(vlm.model, prompt)
    names = ["a", "b", "c"]
    folders = [to_peft(vlm, part, tmp_path / name).folder for name, part in zip(names, parts, strict=True)]
    adapted = peft.PeftModel.from_pretrained(plain(vlm, vlm.name), str(folders[0]), adapter_name="a")
    torch.testing.assert_close(logits(adapted, prompt), first, **CLOSE)
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(str(folder), adapter_name=name)
    adapted.base_model.set_adapter(names)
    torch.testing.assert_close(logits(adapted, prompt), edited, **CLOSE)
    adapted.base_model.add_weighted_adapter(names, [1.0] * 3, "all", combination_type="cat")
    adapted.set_adapter("all")
    torch.testing.assert_close(logits(adapted, prompt), edited, **CLOSE)
    reopened = with_adapters(load(vlm.name, verify=False), *folders)
    torch.testing.assert_close(reopened.logits(prompt), edited, **CLOSE)
    assert (edited - first).abs().max() > 1e-3


def test_a_merged_directory_is_a_plain_model_and_ours_is_left_unedited(vlm, tmp_path, photo):
    delta, prompt = made(vlm, 1), asked(vlm, photo)
    unedited = logits(vlm.model, prompt)
    with delta.applied(vlm):
        edited = logits(vlm.model, prompt)
    folder = save_merged(vlm, delta, tmp_path / "merged")
    assert torch.equal(logits(vlm.model, prompt), unedited)
    assert torch.equal(logits(plain(vlm, folder), prompt), edited)
    found = verify_export(vlm, delta, load(folder, verify=False), [prompt])
    assert found.holds and found.difference == 0 and found.effect > 0.01
    assert str(found).endswith("1 of 1 answers are the same")
    with pytest.raises(ModelError, match="not empty"):
        save_merged(vlm, delta, folder)


def test_verification_fails_for_an_export_of_something_else(random_llava_llama, tmp_path, photo):
    vlm = random_llava_llama
    delta, prompt = made(vlm, 1), asked(vlm, photo)
    assert verify_export(
        vlm, delta, with_adapters(load(vlm.name, verify=False), to_peft(vlm, delta, tmp_path / "a")), [prompt]
    ).holds
    other = to_peft(vlm, made(vlm, 1, seed=5), tmp_path / "b")
    assert not verify_export(vlm, delta, with_adapters(load(vlm.name, verify=False), other), [prompt]).holds
    assert not verify_export(vlm, delta, load(vlm.name, verify=False), [prompt]).holds
    assert not Verification(difference=0.0, effect=1.0, answers=(("red", "blue"),)).holds
    with pytest.raises(EditError, match="at least one"):
        verify_export(vlm, delta, load(vlm.name, verify=False), [])


def test_in_bfloat16_the_adapter_keeps_what_the_merged_weights_round_away(random_llava_llama, tmp_path, photo):
    vlm = load(random_llava_llama.name, dtype="bfloat16", verify=False)
    delta = made(vlm, 1, size=1e-3)
    folder = to_peft(vlm, delta, tmp_path / "adapter").folder
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    adapted = with_adapters(load(vlm.name, dtype="bfloat16", verify=False), folder)
    module, (change,) = adapted.module(vlm.down_projection(1).path), delta.changes.values()
    keys = 30 * change.keys.bfloat16()
    with torch.no_grad():
        before = vlm.down_projection(1).module(keys).double()
        beside = change.share((module(keys).double() - before) / 30)
        with delta.applied(vlm):
            inside = change.share((vlm.down_projection(1).module(keys).double() - before) / 30)
    assert (beside - 1).abs().max() < 0.1
    assert (inside - 1).abs().max() > (beside - 1).abs().max()


def test_what_cannot_be_exported_is_an_error_and_leaves_nothing(random_llava_llama, random_gpt2, tmp_path):
    vlm, delta = random_llava_llama, made(random_llava_llama, 1)
    ((name, change),) = delta.changes.items()
    nothing = replace(delta, changes={name: change.only(torch.zeros(2, dtype=torch.bool))})
    slim = replace(change, right=change.right[:, 1:], keys=change.keys[:, 1:])
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("taken")
    before = sorted(tmp_path.rglob("*"))
    for wrong, model, folder, message in (
        (delta, vlm, "taken", "it exists"),
        (delta, vlm, "file/adapter", "cannot write the adapter"),
        (delta, random_gpt2, "new", "does not fit"),
        (replace(delta, changes={name: slim}), vlm, "new", "of shape"),
        (nothing, vlm, "new", "changes nothing"),
    ):
        with pytest.raises(EditError, match=message):
            to_peft(model, wrong, tmp_path / folder)
    with pytest.raises(EditError, match="PEFT cannot open"):
        with_adapters(load(vlm.name, verify=False), tmp_path / "taken")
    with pytest.raises(EditError, match="at least one folder"):
        with_adapters(vlm)
    assert sorted(tmp_path.rglob("*")) == before
