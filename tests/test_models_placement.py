"""Weights that are elsewhere than in their modules: on disk, beside an accelerator, on several devices."""

import json
from pathlib import Path

import multrace
import pytest
import torch
from multrace import Delta, EditRequest, MultEdit, VisionLanguageModel, attention_knockout, causal_trace, logit_lens
from multrace.data import tiny_vlm_path
from multrace.editing import FineTune, Lora, RuntimeEdit, save_merged, to_peft, verify_export
from multrace.models import ModelError, Site
from multrace.models.placement import Elsewhere
from multrace.scripts.main import app, make_app
from multrace.tracing import Engine

DOWN = "model.language_model.layers.5.mlp.down_proj.weight"
QUESTION = "Who founded the company in this photo?"
EDITOR = MultEdit(layer=5, steps=20)


STACK = "model.language_model"
ENDS = {f"{STACK}.embed_tokens": "disk", "lm_head": "disk", f"{STACK}.norm": "disk", f"{STACK}.rotary_emb": "cpu"}
LAYERS = {f"{STACK}.layers.{number}": "disk" if number in (2, 5) else "cpu" for number in range(8)}
ON_DISK = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"} | ENDS | LAYERS
"""The embedded model with its tower, both ends of its text stack and two of the layers between on disk."""


@pytest.fixture(scope="module")
def offloaded() -> VisionLanguageModel:
    """The embedded model with weights on disk; that such a model is proven is seen below, with a GPT-2."""
    return multrace.load(tiny_vlm_path(), device_map=ON_DISK, verify=False)


@pytest.fixture(scope="module")
def delta(tiny_vlm: VisionLanguageModel) -> Delta:
    """An edit of a layer that the maps leave on disk, made in memory."""
    request = EditRequest(question=tiny_vlm.prompt(None, "Who won?"), target="Pruro")
    return EDITOR.edit(tiny_vlm, [request], progress=False)


def empty(vlm: VisionLanguageModel) -> list[str]:
    """Names of the parameters that have no values in memory."""
    return [name for name, weight in vlm.named_parameters() if weight.is_meta]


def test_weights_on_disk_have_no_values_in_memory_and_are_read_all_the_same(offloaded, tiny_vlm, photo):
    prompt = tiny_vlm.prompt(photo, QUESTION)
    assert DOWN in empty(offloaded) and not empty(tiny_vlm)
    assert offloaded.device == torch.device("cpu") and offloaded.dtype is torch.float32
    assert torch.equal(offloaded.weight(DOWN), tiny_vlm.weight(DOWN))
    assert offloaded.fingerprint([DOWN]) == tiny_vlm.fingerprint([DOWN])
    assert offloaded.weights_digest() == tiny_vlm.weights_digest()
    assert torch.equal(offloaded.logits(prompt), tiny_vlm.logits(prompt))
    assert offloaded.answers([prompt]) == tiny_vlm.answers([prompt])


def test_a_digest_reads_each_weight_on_disk_once(offloaded, monkeypatch):
    digest = offloaded.weights_digest()
    monkeypatch.setattr(Elsewhere, "read", lambda weight: pytest.fail(f"read {weight.leaf} again"))
    assert offloaded.weights_digest() == digest


def test_traces_are_those_of_the_model_in_memory(offloaded, tiny_vlm, photo, other_photo):
    def traced(vlm: VisionLanguageModel, name: str) -> multrace.CausalTrace:
        prompt = vlm.prompt(photo, QUESTION, constraint="the company in this photo")
        swap, rows = multrace.SwapImage(other_photo), ("image", "constraint_last", "last")
        return causal_trace(
            vlm,
            prompt,
            corruption=swap,
            sites=("hidden", "mlp"),
            positions=rows,
            engine=Engine(name=name),
            progress=False,
        )

    wanted, fast, plain = traced(tiny_vlm, "replay"), traced(offloaded, "replay"), traced(offloaded, "plain")
    assert fast.engine.engine == "replay" and plain.engine.engine == "plain"
    for kind, samples in wanted.samples.items():
        assert torch.equal(fast.samples[kind], samples)
        torch.testing.assert_close(plain.samples[kind], samples, atol=1e-5, rtol=0)
    assert DOWN in empty(offloaded)  # no run that was stopped half-way leaves weights behind


def test_knockout_and_lens_are_those_of_the_model_in_memory(offloaded, tiny_vlm, photo):
    prompts = [vlm.prompt(photo, QUESTION) for vlm in (offloaded, tiny_vlm)]
    one, other = (
        attention_knockout(vlm, prompt, flows=["image -> last"], windows=[3], progress=False)
        for vlm, prompt in zip((offloaded, tiny_vlm), prompts, strict=True)
    )
    assert torch.equal(one.probabilities, other.probabilities)
    lenses = [logit_lens(vlm, prompt) for vlm, prompt in zip((offloaded, tiny_vlm), prompts, strict=True)]
    assert torch.equal(*(lens.probabilities for lens in lenses))


def test_an_edit_of_a_weight_on_disk_is_that_of_the_weight_in_memory(offloaded, delta, tiny_vlm):
    prompt = offloaded.prompt(None, "Who won?")
    made = EDITOR.edit(offloaded, [EditRequest(question=prompt, target="Pruro")], progress=False)
    for one, other in zip(made.factors[DOWN], delta.factors[DOWN], strict=True):
        assert torch.equal(one, other)
    digest = offloaded.weights_digest()
    with delta.applied(tiny_vlm):
        wanted = tiny_vlm.logits(prompt)
    with delta.applied(offloaded):
        assert torch.equal(offloaded.logits(prompt), wanted) and offloaded.answers([prompt]) == ["Pruro"]
        assert DOWN not in empty(offloaded) and offloaded.weights_digest() != digest
    assert DOWN in empty(offloaded) and offloaded.weights_digest() == digest
    handle = delta.apply(offloaded)
    assert offloaded.answers([prompt]) == ["Pruro"]
    handle.undo()
    assert offloaded.weights_digest() == digest and offloaded.answers([prompt]) != ["Pruro"]


@pytest.mark.slow
def test_edits_on_top_of_each_other_and_a_runtime_edit(offloaded, delta):
    first, second = (offloaded.prompt(None, text) for text in ("Who won?", "Who lost?"))
    digest = offloaded.weights_digest()
    with MultEdit(layer=5).start(offloaded) as session:
        session.edit([EditRequest(question=first, target="Pruro")])
        session.edit([EditRequest(question=second, target="Draivo")])
        assert offloaded.answers([first, second]) == ["Pruro", "Draivo"]
    assert offloaded.weights_digest() == digest
    with RuntimeEdit(delta=delta).applied(offloaded):
        assert offloaded.answers([first]) == ["Pruro"] and DOWN in empty(offloaded)
    with RuntimeEdit(delta=delta).applied(offloaded), delta.applied(offloaded):  # hooks outlive the opened weight
        twice = offloaded.logits(first)
    with delta.applied(offloaded):
        assert not torch.allclose(twice, offloaded.logits(first))


def test_training_of_a_weight_on_disk_is_that_of_the_weight_in_memory(offloaded, tiny_vlm):
    request = EditRequest(question=offloaded.prompt(None, "Who won?"), target="Pruro")
    changes = [FineTune(layer=5, steps=3).edit(vlm, [request], progress=False) for vlm in (offloaded, tiny_vlm)]
    assert torch.equal(*(change.difference(DOWN) for change in changes)) and changes[0].difference(DOWN).any()
    losses = [Lora(layers=(5,), steps=2).edit(vlm, [request], progress=False).losses for vlm in (offloaded, tiny_vlm)]
    assert losses[0] == losses[1]
    assert DOWN in empty(offloaded)


def test_exports_of_a_model_on_disk(offloaded, delta, tmp_path: Path):
    prompts = [offloaded.prompt(None, "Who won?")]
    merged = multrace.load(save_merged(offloaded, delta, tmp_path / "merged", dtype=torch.float32), verify=False)
    assert verify_export(offloaded, delta, merged, prompts).holds
    assert to_peft(offloaded, delta, tmp_path / "adapter").folder.is_dir()
    offloaded.save_pretrained(tmp_path / "same", dtype=torch.float32)
    assert multrace.load(tmp_path / "same", verify=False).weights_digest() == offloaded.weights_digest()


def test_nothing_of_an_edit_reaches_the_files_of_the_model(offloaded, delta):
    before = {path.name: path.read_bytes() for path in tiny_vlm_path().iterdir() if path.is_file()}
    with delta.applied(offloaded):
        pass
    assert {path.name: path.read_bytes() for path in tiny_vlm_path().iterdir() if path.is_file()} == before


def test_tied_weights_on_disk_are_one_weight(random_gpt2, tmp_path):
    layers = {f"transformer.h.{number}": "cpu" for number in range(4)}
    device_map = {"transformer.wte": "disk", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "disk"}
    vlm = multrace.load(random_gpt2.name, device_map=device_map | layers)
    assert empty(vlm) and vlm.weights_digest() == random_gpt2.weights_digest()
    prompt = vlm.prompt(None, "What is the capital?")
    assert torch.equal(vlm.logits(prompt), random_gpt2.logits(prompt))
    vlm.save_pretrained(tmp_path / "saved")
    assert multrace.load(tmp_path / "saved").weights_digest() == random_gpt2.weights_digest()


def test_a_stopped_run_leaves_no_weights_in_memory(offloaded, photo):
    before = empty(offloaded)
    with multrace.Trace(offloaded, Site("attention", 3), stop=True):
        offloaded.logits(offloaded.prompt(photo, QUESTION))
    assert empty(offloaded) == before


def test_a_folder_for_weights_on_disk_is_taken(llava_llama_path, tmp_path):
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head", "model.language_model"]
    device_map = dict.fromkeys(parts, "cpu") | {"lm_head": "disk"}
    vlm = multrace.load(llava_llama_path, device_map=device_map, offload_folder=tmp_path, dtype="bfloat16")
    assert empty(vlm) == ["lm_head.weight"] and vlm.weight("lm_head.weight").dtype is torch.bfloat16


def test_all_of_a_model_on_disk_is_refused():
    with pytest.raises(ModelError, match="nothing is computed on a disk; give at least one module a device"):
        multrace.load(tiny_vlm_path(), device_map={"": "disk"})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_trace_and_edit_as_one(tiny_vlm, photo, other_photo, delta):
    device_map = {part: int(part.rpartition(".")[2]) % 2 if ".layers." in part else 0 for part in ON_DISK}
    vlm = multrace.load(tiny_vlm_path(), device_map=device_map, dtype="float32")
    prompt = vlm.prompt(photo, QUESTION)
    swap, rows = multrace.SwapImage(other_photo), ("image", "question", "last")
    one, other = (
        causal_trace(vlm, prompt, corruption=swap, positions=rows, engine=Engine(name=name), progress=False)
        for name in ("replay", "plain")
    )
    for kind, samples in one.samples.items():
        torch.testing.assert_close(samples, other.samples[kind], atol=1e-4, rtol=0)
    digest = vlm.weights_digest()
    with delta.applied(vlm):
        assert vlm.answers([vlm.prompt(None, "Who won?")]) == ["Pruro"]
    assert vlm.weights_digest() == digest == tiny_vlm.weights_digest()


def test_a_command_places_modules_one_by_one(tiny_vlm, tmp_path, capsys):
    (tmp_path / "map.json").write_text(json.dumps(ON_DISK))
    assert app(["answer", "--question", "Who won?", "--device-map", str(tmp_path / "map.json")]) == 0
    assert capsys.readouterr().out.strip() == tiny_vlm.answers([tiny_vlm.prompt(None, "Who won?")])[0]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "map.json' is not JSON: "),
        ("[1]", "map.json' does not map modules to devices; write {"),
        ('{"": "moon"}', "'moon' cannot be used here (torch knows no such device)"),
        (None, "map.json': No such file or directory; check that it is there"),
    ],
)
def test_a_bad_map_is_one_line_of_a_command(written, said, tmp_path, capsys):
    if written is not None:
        (tmp_path / "map.json").write_text(written)
    assert app(["answer", "--question", "Who won?", "--device-map", str(tmp_path / "map.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("command", ["answer", "trace", "flow", "edit", "evaluate", "moments", "doctor", "export"])
def test_each_command_that_opens_a_model_can_place_and_pack_it(command):
    arguments = make_app(command)[command].assemble_argument_collection()
    names = {name for argument in arguments for name in argument.names}
    assert {"--device-map", "--offload-folder", "--quantization", "--dtype"} <= names
