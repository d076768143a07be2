"""Saved models reopen through plain transformers, bit for bit, whole or not at all; digests tell models apart."""

import copy
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import multrace
import pytest
import torch
from multrace import ModelError
from multrace.editing import Delta, WeightChange
from multrace.models import weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

QUESTION = "Who founded the company in this photo?"


def reopened(vlm, folder):
    if vlm.has_vision:
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_saved_model_gives_bit_equal_logits_through_plain_transformers(random_vlm, photo, tmp_path):
    random_vlm.save_pretrained(tmp_path / "saved")
    model, processor = reopened(random_vlm, tmp_path / "saved")
    image = photo if random_vlm.has_vision else None
    prompt = random_vlm.prompt(image, QUESTION)
    if image is not None:
        inputs = processor(images=image, text=prompt.text, return_tensors="pt")
    else:
        inputs = processor(prompt.text, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, random_vlm.logits(prompt))
    assert multrace.load(tmp_path / "saved").answers([prompt]) == random_vlm.answers([prompt])
    assert sorted(os.listdir(tmp_path)) == ["saved"]  # no temporary folder stays


def test_a_changed_weight_is_saved_and_a_fingerprint_tells(random_llava_llama, llava_llama_path, photo, tmp_path):
    vlm = multrace.load(llava_llama_path, verify=False)
    name = vlm.down_projection(1).name
    before = vlm.fingerprint([name, "lm_head.weight"])
    with torch.no_grad():
        vlm.weight(name)[0, 0] += 1
    after = vlm.fingerprint([name, "lm_head.weight"])
    assert after[name] != before[name] and after["lm_head.weight"] == before["lm_head.weight"]
    assert random_llava_llama.fingerprint([name]) == {name: before[name]}
    vlm.save_pretrained(tmp_path / "changed")
    again = multrace.load(tmp_path / "changed", verify=False)
    assert again.fingerprint([name, "lm_head.weight"]) == after
    prompt = vlm.prompt(photo, QUESTION)
    assert torch.equal(again.logits(prompt), vlm.logits(prompt))
    assert not torch.equal(again.logits(prompt), random_llava_llama.logits(prompt))


ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "ia3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a projector trained whole": lambda peft: peft.LoraConfig(
        r=2, target_modules=["v_proj"], modules_to_save=["multi_modal_projector"]
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what PEFT calls of transformers
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_that_carries_adapters_is_not_saved_until_they_are_merged(kind, llava_llama_path, photo, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    vlm = multrace.load(llava_llama_path, verify=False)
    wrapped = peft.get_peft_model(vlm.model, ADAPTERS[kind](peft)).eval()
    with pytest.raises(ModelError, match=r"its modules were replaced.*merge the adapters first"):
        vlm.save_pretrained(tmp_path / "saved")
    assert os.listdir(tmp_path) == []
    wrapped.merge_and_unload()
    vlm.save_pretrained(tmp_path / "saved")
    prompt = vlm.prompt(photo, QUESTION)
    assert torch.equal(multrace.load(tmp_path / "saved", verify=False).logits(prompt), vlm.logits(prompt))


def test_a_model_with_parametrized_weights_is_not_saved(llava_llama_path, tmp_path):
    vlm = multrace.load(llava_llama_path, verify=False)
    torch.nn.utils.parametrizations.weight_norm(vlm.module(vlm.down_projection(1).path))
    with pytest.raises(ModelError, match=r"its modules were replaced.*parametrizations"):
        vlm.save_pretrained(tmp_path / "saved")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_a_half_precision_file_stays_one(stored, random_llava_phi, tmp_path):
    dtype = getattr(torch, stored)
    random_llava_phi.save_pretrained(tmp_path / "half", dtype=dtype)
    vlm = multrace.load(tmp_path / "half", verify=False)
    assert vlm.dtype == torch.float32
    vlm.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    assert {value.dtype for value in again.values()} == {dtype}
    assert all(torch.equal(first[name], again[name]) for name in first)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == stored
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "again").dtype == dtype
    assert vlm.model.config.dtype in ("float32", torch.float32)  # the open model is left as it was
    vlm.save_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert multrace.load(tmp_path / "wide", verify=False).stored_dtype == torch.float32


def test_tied_weights_stay_tied(random_gpt2, tmp_path):
    assert random_gpt2.weight("lm_head.weight") is random_gpt2.weight("transformer.wte.weight")
    random_gpt2.save_pretrained(tmp_path / "tied", dtype=torch.float16)
    again = multrace.load(tmp_path / "tied", verify=False)
    assert again.weight("lm_head.weight") is again.weight("transformer.wte.weight")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_folders_that_are_in_use(random_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    random_llama.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not empty; pass another one, or overwrite=True"):
        random_llama.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "notes.txt").read_text() == "mine"
    random_llama.save_pretrained(tmp_path / "empty", overwrite=True)
    assert not (tmp_path / "empty" / "notes.txt").exists()
    assert multrace.load(tmp_path / "empty", verify=False).layers == 4
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/below"):
        with pytest.raises(ModelError, match="cannot save a model to"):
            random_llama.save_pretrained(tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_on_the_way_leaves_everything_as_it_was(random_llama, tmp_path, monkeypatch, existing):
    target = tmp_path / "model"
    if existing:
        target.mkdir()
        (target / "old.txt").write_text("old")

    def full_disk(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(random_llama.tokenizer), "save_pretrained", full_disk)
    with pytest.raises(ModelError, match="No space left"):
        random_llama.save_pretrained(target, overwrite=True)
    assert os.listdir(tmp_path) == (["model"] if existing else [])
    assert not existing or (target / "old.txt").read_text() == "old"


def test_a_failed_rename_puts_the_old_folder_back(random_llama, tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def refuse_new(self, to):
        if self.name == "new":
            raise OSError("refused")
        return rename(self, to)

    monkeypatch.setattr("multrace.artefacts.folders._exchanged", lambda *_: False)  # as on other systems than Linux
    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(ModelError, match="refused"):
        random_llama.save_pretrained(target, overwrite=True)
    assert (target / "old.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


@pytest.fixture
def full_disk():
    """No file can grow beyond 50 kB, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_error_and_leaves_the_old_model(random_llama, tmp_path, full_disk):
    with pytest.raises(SafetensorError):  # what the library raises by itself is no OSError
        save_file({"weight": torch.zeros(100_000)}, tmp_path / "weights.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with pytest.raises(ModelError, match="cannot save a model to .*; pass a folder on a disk with room for it"):
        random_llama.save_pretrained(tmp_path / "model", overwrite=True)
    assert os.listdir(tmp_path / "model") == ["old.txt"]
    assert {name for name in os.listdir(tmp_path) if name.startswith(".model")} == set()


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_written_files_have_the_permissions_of_the_umask(mask, file, folder, random_llama, tmp_path):
    before = os.umask(mask)
    try:
        random_llama.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {file} and "model.safetensors" in modes
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder


def test_saving_draws_no_bar_where_there_is_no_terminal(random_llama, tmp_path, capsys):
    random_llama.save_pretrained(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    random_llama.model.save_pretrained(tmp_path / "loud")
    assert "Writing model shards" in capsys.readouterr().err


# ---- the digest of a model ----


def test_copies_of_a_model_have_one_digest(random_vlm, tmp_path):
    random_vlm.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    digests = {multrace.load(tmp_path / name, verify=False).weights_digest() for name in ("saved", "copy")}
    assert digests == {random_vlm.weights_digest()}
    (tmp_path / "copy" / "README.md").write_text("other words")
    assert multrace.load(tmp_path / "copy", attention="eager", verify=False).weights_digest() in digests


def test_an_edit_changes_the_digest_while_it_is_applied_and_after_it_is_saved(llava_llama_path, tmp_path):
    vlm = multrace.load(llava_llama_path, verify=False)
    projection, digest = vlm.down_projection(1), vlm.weights_digest()
    left, right = torch.randn(projection.hidden, 1), torch.randn(1, projection.width)
    change = WeightChange(left=left, right=right, keys=right, residuals=(left @ (right @ right.T)).T)
    delta = Delta(
        changes={projection.name: change},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        requests=(),
    )
    with delta.applied(vlm):
        edited = vlm.weights_digest()
        vlm.save_pretrained(tmp_path / "edited")
    assert edited != digest == vlm.weights_digest()
    assert multrace.load(tmp_path / "edited", verify=False).weights_digest() == edited


def test_every_weight_counts_and_is_read_once(llava_llama_path, monkeypatch):
    vlm, read = multrace.load(llava_llama_path, verify=False), []
    compute = weights.digest_weight
    monkeypatch.setattr(weights, "digest_weight", lambda weight: read.append(id(weight)) or compute(weight))
    digest = vlm.weights_digest()
    stored = {id(value) for value in vlm.model.state_dict(keep_vars=True).values()}
    assert len(read) == len(stored) and set(read) == stored
    read.clear()
    assert vlm.weights_digest() == digest and not read
    for name, weight in vlm.named_parameters():
        before = weight.flatten()[-1].clone()
        with torch.no_grad():
            weight.view(-1)[-1] += 1
        assert vlm.weights_digest() != digest, name
        assert read == [id(weight)]
        with torch.inference_mode():
            weight.view(-1)[-1].copy_(before)
        assert vlm.weights_digest() == digest, name
        read.clear()
    name, weight = vlm.down_projection(0).name, vlm.down_projection(0).weight
    weight.data = weight.data * 2
    assert vlm.weights_digest() != digest
    assert vlm.weights_digest() == copy.deepcopy(vlm).weights_digest()
    assert vlm.weight(name) is weight


def test_what_else_decides_the_answers_is_in_the_digest(llava_llama_path, tmp_path):
    digest = multrace.load(llava_llama_path, verify=False).weights_digest()
    changes = {
        "config.json": lambda content: content["text_config"]["rope_parameters"].update(rope_theta=5000.0),
        "generation_config.json": lambda content: content.update(eos_token_id=7),
        "processor_config.json": lambda content: content["image_processor"].update(image_mean=[0.1, 0.2, 0.3]),
    }
    others = {multrace.load(llava_llama_path, dtype="float64", verify=False).weights_digest()}
    for file, change in changes.items():
        folder = Path(shutil.copytree(llava_llama_path, tmp_path / file))
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        others.add(multrace.load(folder, verify=False).weights_digest())
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "template"))
    (folder / "chat_template.jinja").write_text("{{ '<image> Question: ' + messages[0]['content'][-1]['text'] }}")
    others.add(multrace.load(folder, verify=False).weights_digest())
    assert len(others) == 5 and digest not in others
