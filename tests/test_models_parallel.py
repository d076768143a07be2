"""A model that several processes hold together: each sees whole states, and finds what one process finds."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import multrace
import pytest
import shared_out
import torch
from families.folders import write
from families.table import RECIPES
from model_fixtures import draw_photo
from multrace import Delta, VisionLanguageModel
from multrace.data import Question, World, tiny_vlm_path
from multrace.editing import with_adapters
from multrace.models import ModelError
from multrace.workflow import ModelToLoad, RunError, TraceRun, run
from shared_out import LAYER, PROJECTIONS, QUESTION, Findings, in_processes

COUNT = 2
PHOTOS = draw_photo(1), draw_photo(2)
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
FUSED, EXPERTS, SINKS = "phi3", "mixtral", "gpt_oss"
ATTENTION = "model.layers.*.self_attn"
DOWN = f"model.language_model.layers.{LAYER}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(llava_llama_path: Path) -> VisionLanguageModel:
    """The model in this process alone."""
    return multrace.load(llava_llama_path, dtype="float64", verify=False)


@pytest.fixture(scope="module")
def deltas(whole: VisionLanguageModel) -> dict[str, Delta]:
    """Edits that this process makes, by projection."""
    return {projection: shared_out.edited(whole, PHOTOS[0], projection) for projection in PROJECTIONS}


@pytest.fixture(scope="module")
def found(llava_llama_path, gpt2_path, deltas, tmp_path_factory) -> list[Findings]:
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("shared_out")
    return in_processes(COUNT, shared_out.everything, folder, llava_llama_path, gpt2_path, *PHOTOS, deltas)


def close(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Assert that what was computed in float64 is equal but for the order of sums."""
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0, msg=lambda words: f"{name}: {words}")


def test_every_process_finds_what_one_process_finds(found, whole):
    wanted = shared_out.experiments(whole, *PHOTOS)
    answers = wanted.pop("answers")
    assert whole.processes == 1 and len(wanted) == 9
    for each in found:
        assert each["processes"] == COUNT and each["answers"] == answers
        for name, value in wanted.items():
            close(each[name], value, name)
    assert all(torch.equal(found[0][name], found[1][name]) for name in wanted)


def test_each_process_holds_a_share_of_the_weights_of_every_layer(found, whole):
    shares = found[0]["shares"]
    assert shares[DOWN] == (whole.hidden, whole.mlp // COUNT)
    layers = {name for name, _ in whole.named_parameters() if ".language_model.layers." in name and "norm" not in name}
    assert layers | {"lm_head.weight", "model.language_model.embed_tokens.weight"} == shares.keys()


def test_without_what_the_other_process_adds_the_logits_differ(found):
    for each in found:
        assert (each["logits without sums"] - each["logits"]).abs().max() > 1e-3


def test_under_the_plan_of_transformers_itself_a_process_sees_a_share_of_the_keys(found, whole):
    assert found[0]["keys of mlp"].shape[-1] == whole.mlp
    assert found[0]["keys of transformers' own plan"][-1] == whole.mlp // COUNT


def test_an_edit_that_all_make_together_is_that_of_one_process(found, deltas):
    for each in found:
        (made,), (wanted,) = each["factors"].values(), deltas["mlp"].factors.values()
        assert [factor.shape for factor in made] == [factor.shape for factor in wanted]
        change = wanted[0] @ wanted[1]
        torch.testing.assert_close(made[0] @ made[1], change, atol=1e-6 * float(change.abs().max()), rtol=0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_edit_of_one_process_changes_the_same_and_is_undone_bit_by_bit(found, whole, deltas, projection):
    prompt = whole.prompt(PHOTOS[0], QUESTION)
    with deltas[projection].applied(whole):
        wanted, digest = whole.logits(prompt), whole.weights_digest(progress=False)
    assert (wanted - whole.logits(prompt)).abs().max() > 1e-3
    for each in found:
        close(each[f"logits after {projection}"], wanted, projection)
        torch.testing.assert_close(each[f"logits beside {projection}"], wanted, atol=1e-5, rtol=0)
        assert each[f"digest after {projection}"] == digest != whole.weights_digest(progress=False)
        assert each["digest"] == each["digest at the end"] == whole.weights_digest(progress=False)


def test_one_process_writes_the_files_of_all(found, whole, deltas, llava_llama_path):
    prompt = whole.prompt(PHOTOS[0], QUESTION)
    with deltas["mlp"].applied(whole):
        wanted, digest = whole.logits(prompt), whole.weights_digest(progress=False)
    merged = multrace.load(found[0]["merged"], verify=False)
    assert merged.weights_digest(progress=False) == digest and torch.equal(merged.logits(prompt), wanted)
    assert "distributed" not in (found[0]["merged"] / "config.json").read_text()
    adapted = with_adapters(multrace.load(llava_llama_path, dtype="float64", verify=False), found[1]["adapter"])
    torch.testing.assert_close(adapted.logits(prompt), wanted, atol=1e-5, rtol=0)


def test_what_is_refused_is_refused_in_every_process(found):
    first, second = (each["errors"] for each in found)
    assert len(first) == len(second) == 8
    for errors in (first, second):
        assert "(GPT2LMHeadModel) has no tensor-parallel plan in transformers" in errors["no plan"]
        assert "names 'model.layers.*.nothing', which is no module of it" in errors["no module"]
        assert "with tp_plan and device_map" in errors["device_map"]
        assert (
            "of type Embedding is shared out among processes, and only linear maps are made whole"
            in errors["no linear map"]
        )
        assert errors["no memory"].startswith("TraceError: memory ran out in one of the processes that hold the model")
        assert "is not empty; pass another one, or overwrite=True" in errors["not empty"]
        assert errors["run"].startswith("RunError: the processes of a run compute records of their own")
    assert "is not a whole safetensors file" in second["broken"]
    assert "process 1 of 2, which hold the model together, stopped" in first["broken"]
    assert "is not a whole safetensors file" in first["broken"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp_plan": "auto"}, "this process has no others to share the weights with; start the script with torchrun"),
        ({"tp_plan": "column"}, "tp_plan='column'; pass 'auto', or leave it out"),
        ({"tp_plan": "auto", "device_map": "cpu"}, "with tp_plan and device_map"),
        ({"tp_plan": "auto", "quantization": object()}, "with tp_plan and quantization"),
        ({"tp_plan": "auto", "trust_remote_code": True}, "with tp_plan and trust_remote_code"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], words: str):
    with pytest.raises(ModelError, match=words) as raised:
        multrace.load(tiny_vlm_path(), **options)
    assert "\n" not in str(raised.value)


def test_a_run_opens_no_shared_model(tmp_path):
    model = ModelToLoad(tiny_vlm_path(), {"tp_plan": "auto"})
    rows = enumerate([Question(text=QUESTION, constraint="the company")], 1)
    with pytest.raises(RunError, match="load the model without tp_plan"):
        run(model, TraceRun(corrupt="blank"), rows, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dtype", "tolerance"), [(2, "float32", 1e-5), (3, "float64", 1e-10)])
def test_any_number_of_processes_holds_any_model(
    count: int, dtype: str, tolerance: float, tmp_path: Path, llava_llama_path: Path
):
    paths = [llava_llama_path, *(write(RECIPES[name], tmp_path / name) for name in (FUSED, EXPERTS, SINKS))]
    found = in_processes(count, shared_out.opened, tmp_path, paths, dtype)
    for path in paths:
        whole = multrace.load(path, dtype=dtype)
        wanted = shared_out.traced(whole)
        for each in found:
            for name in ("logits", "trace"):
                torch.testing.assert_close(each[path.name][name], wanted[name], atol=tolerance, rtol=0)
            assert each[path.name]["engine"] == wanted["engine"]
            assert each[path.name]["digest"] == whole.weights_digest(progress=False)
    shared = {path.name: found[0][path.name]["shared"] for path in paths}
    assert "model.layers.0.mlp.gate_up_proj.weight" in shared[FUSED]
    assert "model.layers.0.mlp.experts.down_proj" in shared[EXPERTS]
    assert not any(name.endswith("sinks") for name in shared[SINKS])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rules", "shared"),
    [
        ("opt", {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"}, "fc2.weight"),
        (SINKS, dict.fromkeys((ATTENTION, f"{ATTENTION}.q_proj", f"{ATTENTION}.sinks"), "colwise"), "q_proj.bias"),
    ],
)
def test_rules_share_out_what_no_plan_does_and_leave_sinks_whole(name, rules, shared, tmp_path: Path):
    path = write(RECIPES[name], tmp_path / name)
    found = in_processes(COUNT, shared_out.opened, tmp_path, [path], "float64", rules)
    wanted = shared_out.traced(multrace.load(path, dtype="float64"))
    for each in found:
        close(each[name]["logits"], wanted["logits"], "logits")
        names = each[name]["shared"]
        assert any(leaf.endswith(shared) for leaf in names) and not any(leaf.endswith("sinks") for leaf in names)


@pytest.mark.slow
def test_the_script_of_the_page_runs_as_the_page_says(tmp_path: Path):
    text = PAGE.read_text(encoding="utf-8")
    script, options = re.search(r"`ask.py`:\n\n```python\n(.*?)```\n\n```bash\ntorchrun (.*?)\n", text, re.S).groups()
    (tmp_path / "ask.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "2 processes: ['Pruro']\n"
    vlm, world = multrace.load(tiny_vlm_path(), verify=False), World()
    prompt = vlm.prompt(world.picture(world.entities[0], 0).image, QUESTION)
    with Delta.load(tmp_path / "edit.safetensors").applied(vlm):
        assert vlm.answers([prompt]) == ["Pruro"]
