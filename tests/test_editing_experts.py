"""Edits of routed experts: their slices as one linear map, one expert or all, against the weights themselves."""

import json
import re
from dataclasses import replace
from pathlib import Path

import multrace
import pytest
import torch
from multrace import (
    MEMIT,
    ROME,
    Delta,
    EditError,
    EditRequest,
    ModelError,
    MultEdit,
    VisionLanguageModel,
    capture,
    patch,
)
from multrace.editing import RuntimeEdit, save_merged, verify_export, with_adapters
from multrace.models import ExpertProjection, Site
from multrace.models.loading import prove_addresses
from multrace.scripts.main import app
from random_models import make_tokenizer, text_sizes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
STACKS = {
    "mixtral": {},  # slices (hidden, width)
    "gpt_oss": {"initializer_range": 0.1},  # slices (width, hidden), and biases
    "qwen2_moe": {"shared_expert_intermediate_size": 48},  # beside a shared expert
}
LAYER = 2
QUESTIONS, TARGETS = ("Who won the medal?", "Which city is it?", "Who lost the golf?"), ("golf", "medal", "city")


@pytest.fixture(scope="module", params=STACKS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return multrace.load(folder, dtype="float64")


@pytest.fixture(scope="module")
def mixtral_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("mixtral", tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def mixtral(mixtral_path: Path) -> VisionLanguageModel:
    return multrace.load(mixtral_path, dtype="float64")


def built(model_type: str, folder: Path) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {**text_sizes(tokenizer), "num_key_value_heads": 2, **SIZES, **STACKS[model_type]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def requests(vlm: VisionLanguageModel) -> list[EditRequest]:
    asked = zip(QUESTIONS, TARGETS, strict=True)
    return [EditRequest(question=vlm.prompt(None, text), target=target) for text, target in asked]


def read_and_written(vlm: VisionLanguageModel, projection: ExpertProjection) -> tuple[Tensor, Tensor]:
    """What the experts read and write at each token of a prompt, (token, width) and (token, hidden)."""
    prompt = vlm.prompt(None, QUESTIONS[0])
    with capture(vlm, [projection], inputs=True) as read, capture(vlm, [projection]) as written:
        vlm.logits(prompt)
    return read[projection][0], written[projection][0]


def best_expert(vlm: VisionLanguageModel) -> int:
    """The expert to which the last token of the first question goes with the largest weight."""
    return int(vlm.routing(vlm.prompt(None, QUESTIONS[0]), LAYER)[0, -1].argmax())


def test_a_key_is_what_a_change_of_the_slice_acts_on(vlm):
    whole = vlm.expert_projection(LAYER)
    keys, before = read_and_written(vlm, whole)
    generator = torch.Generator().manual_seed(1)
    for number, (name, columns) in enumerate(whole.slices.items()):
        single = vlm.expert_projection(LAYER, number)
        assert (single.name, single.width) == (name, whole.width // 4)
        weight = vlm.weight(name)
        clean, change = weight.clone(), torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight += change  # a view: the parameter changes
        own, after = read_and_written(vlm, single)
        weight.copy_(clean)
        assert torch.equal(own, keys[:, columns])
        oriented = change if vlm.is_transposed(name) else change.T
        torch.testing.assert_close(after - before, keys[:, columns] @ oriented, rtol=0, atol=1e-12)
    assert torch.equal(read_and_written(vlm, whole)[1], before)


def test_keys_are_zero_where_a_token_is_not_routed(vlm):
    prompt, whole = vlm.prompt(None, QUESTIONS[0]), vlm.expert_projection(LAYER)
    keys, weights = read_and_written(vlm, whole)[0], vlm.routing(prompt, LAYER)[0]
    sizes = keys.unflatten(-1, (4, -1)).norm(dim=-1)
    assert weights.shape == sizes.shape == (prompt.length, 4)
    assert torch.equal(sizes > 0, weights > 0) and ((weights > 0).sum(-1) == 2).all()


def test_hooks_on_experts_leave_the_model_as_it_is(vlm):
    prompt, whole = vlm.prompt(None, QUESTIONS[0]), vlm.expert_projection(LAYER)
    source, one = whole.experts.source, vlm.expert_projection(LAYER, 1)
    clean = vlm.logits(prompt)
    with capture(vlm, [whole, one], inputs=True), capture(vlm, [one]), patch(vlm, {whole: lambda output: output + 0}):
        assert torch.equal(vlm.logits(prompt), clean)
    assert not source._forward_hooks and not whole.experts._forward_hooks and not one.experts._forward_pre_hooks
    with multrace.Trace(vlm, whole) as trace:
        vlm.logits(prompt)
    assert trace.output.shape[-1] == vlm.hidden and not source._forward_hooks
    with patch(vlm, {whole: lambda output: output + 1}):
        assert not torch.equal(vlm.logits(prompt), clean)


def test_other_keys_in_their_place_are_what_the_experts_write(vlm):
    one, sites = vlm.expert_projection(LAYER, best_expert(vlm)), [Site("mlp", LAYER)]
    prompt, (keys, _) = vlm.prompt(None, QUESTIONS[0]), read_and_written(vlm, one)
    with capture(vlm, sites) as before:
        vlm.logits(prompt)
    with patch(vlm, {one: lambda states: 0 * states}, inputs=True), capture(vlm, sites) as after:
        vlm.logits(prompt)
    moved = (before[sites[0]] - after[sites[0]])[0]
    torch.testing.assert_close(moved, keys @ one.weight.T, rtol=0, atol=1e-12)
    assert moved.abs().max() > 1e-3


def test_a_joint_edit_is_the_ridge_solution_of_the_stacked_keys(vlm):
    whole, asked = vlm.expert_projection(LAYER), requests(vlm)
    editor = MultEdit(layer=LAYER, expert="routed", steps=30, ridge=0.5)
    values = editor.search(vlm, asked, progress=False)
    delta = editor.edit(vlm, asked, values=values, progress=False)
    results = [result for each in values for result in each.results]
    keys, changes = (torch.cat([getattr(each, part) for each in results]).double() for part in ("keys", "change"))
    wanted = changes.T @ torch.linalg.solve(keys @ keys.T + 0.5 * torch.eye(len(keys)), keys)
    assert wanted.shape == (vlm.hidden, whole.width)
    for name, columns in whole.slices.items():
        change = delta.changes.get(name)
        if change is None:  # no edited token goes there
            assert not keys[:, columns].any()
            continue
        own = change.left.double() @ change.right.double()
        torch.testing.assert_close(own, wanted[:, columns], rtol=0, atol=1e-5 * wanted.abs().max().item())
    # each expert is asked for its part: together for all that was asked for
    asked_for = sum(vector_sum(change.residuals) for change in delta.changes.values())
    torch.testing.assert_close(asked_for, vector_sum(changes), rtol=1e-4, atol=1e-4)


def vector_sum(rows: Tensor) -> Tensor:
    return rows.double().sum(0)


def test_an_edit_makes_the_model_say_the_targets_and_is_undone_bit_by_bit(vlm):
    asked, before = requests(vlm), vlm.weights_digest(progress=False)
    editor = MultEdit(
        layer=LAYER,
        expert="routed" if vlm.has_down_projection(LAYER) else None,
        steps=60,
        ridge_fraction=0.001,
        ending="stop",
    )
    delta = editor.edit(vlm, asked, progress=False)
    prompts = [vlm.prompt_for(each.question) for each in asked]
    assert all(".experts.down_proj[" in name for name in delta.changes) and len(delta.changes) > 1
    unedited = vlm.answers(prompts)
    with delta.applied(vlm):
        assert vlm.answers(prompts) == [*TARGETS] != unedited
        logits = vlm.logits(prompts[0])
    assert vlm.weights_digest(progress=False) == before and vlm.answers(prompts) == unedited
    with RuntimeEdit(delta=delta).applied(vlm):
        torch.testing.assert_close(vlm.logits(prompts[0]), logits, rtol=0, atol=1e-6)
    assert vlm.weights_digest(progress=False) == before
    for name, share in RuntimeEdit(delta=delta).retained(vlm).items():
        torch.testing.assert_close(share, delta.retained(vlm)[name], rtol=0, atol=1e-5)


def test_one_expert_is_edited_and_no_other(mixtral):
    vlm, number = mixtral, best_expert(mixtral)
    editor = MultEdit(layer=LAYER, expert=number, steps=60, answer_keys=False, ending="none")
    (request, *_) = requests(vlm)
    delta = editor.edit(vlm, [request], progress=False)
    assert [*delta.changes] == [f"model.layers.{LAYER}.mlp.experts.down_proj[{number}]"]
    stack = vlm.weight(f"model.layers.{LAYER}.mlp.experts.down_proj")
    clean, prompt = stack.clone(), vlm.prompt(None, QUESTIONS[0], answer=TARGETS[0])
    chance = probability(vlm, prompt)
    with delta.applied(vlm):
        assert [torch.equal(stack[each], clean[each]) for each in range(4)] == [each != number for each in range(4)]
        assert probability(vlm, prompt) > 5 * chance
    assert torch.equal(stack, clean)


def probability(vlm: VisionLanguageModel, prompt: multrace.Prompt) -> float:
    place = prompt.groups["answer"][0] - 1
    return vlm.logits(prompt)[0, place].softmax(-1)[prompt.answer_ids[0]].item()


def test_a_fact_that_does_not_go_to_the_expert_fails_with_the_reason_and_the_others_go_on(mixtral):
    vlm, weights = mixtral, mixtral.routing(mixtral.prompt(None, QUESTIONS[0]), LAYER)[0, -1]
    asked, place = requests(vlm), {"layer": LAYER, "answer_keys": False, "steps": 5}
    with pytest.raises(
        EditError, match=r"of the 1 edited tokens, number 1 is not routed to .*down_proj\[\d\]; .*routing"
    ):
        MultEdit(**place, expert=int(weights.argmin())).edit(vlm, asked[:1], progress=False)
    goes = [
        [bool(vlm.routing(vlm.prompt_for(each.question), LAYER)[0, -1, number]) for each in asked]
        for number in range(4)
    ]
    number = next(number for number in range(4) if len({*goes[number]}) == 2)  # some go there and some do not
    statuses = [each["status"] for each in MultEdit(**place, expert=number).edit(vlm, asked, progress=False).requests]
    assert ["not routed" not in str(status) for status in statuses] == goes[number]


def test_a_question_whose_answer_stays_may_go_to_other_experts(mixtral):
    vlm, number = mixtral, best_expert(mixtral)
    first, second, _ = requests(vlm)
    editor = MultEdit(layer=LAYER, expert=number, steps=5, answer_keys=False)
    request = replace(first, preserve_prompts=(second.question,))
    delta = editor.edit(vlm, [request], progress=False)
    prompt, projection = vlm.prompt_for(second.question), vlm.expert_projection(LAYER, number)
    outputs = []
    for change in (None, delta):
        with change.applied(vlm) if change else capture(vlm, []), capture(vlm, [projection]) as written:
            vlm.logits(prompt)
        outputs.append(written[projection][0, -1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_a_session_keeps_what_earlier_edits_made_experts_say(mixtral):
    vlm, before = mixtral, mixtral.weights_digest(progress=False)
    asked = requests(vlm)
    with MultEdit(layer=LAYER, steps=60, ending="stop").start(vlm) as session:
        for request in asked:
            session.edit([request])
        assert vlm.answers([vlm.prompt_for(each.question) for each in asked]) == [*TARGETS]
    assert vlm.weights_digest(progress=False) == before
    spread = MEMIT(layer=LAYER, spread=2, steps=60, ending="stop", moment_weight=0, ridge_fraction=0.001)
    delta = spread.edit(vlm, asked, progress=False)
    assert {name.split(".")[2] for name in delta.changes} == {"1", "2"}
    with delta.applied(vlm):
        assert vlm.answers([vlm.prompt_for(each.question) for each in asked]) == [*TARGETS]
    assert vlm.weights_digest(progress=False) == before


def test_a_saved_edit_and_both_exports_hold_the_same_change(folder, tmp_path, caplog):
    vlm = multrace.load(folder)
    asked = requests(vlm)[:1]
    prompts = [vlm.prompt_for(each.question) for each in asked]
    delta = MultEdit(layer=1, spread=2, expert="routed", steps=10).edit(vlm, asked, progress=False)
    again = Delta.load(delta.save(tmp_path / "edit.safetensors"))
    assert again.digest == delta.digest
    merged = multrace.load(save_merged(vlm, delta, tmp_path / "merged"))
    assert verify_export(vlm, delta, merged, prompts).holds
    pytest.importorskip("peft")
    adapter = multrace.to_peft(vlm, delta, tmp_path / "adapter")
    assert adapter.outside == () and "which vLLM does not read" in caplog.messages[-1]
    adapted = with_adapters(multrace.load(folder), adapter)
    assert verify_export(vlm, delta, adapted, prompts).holds
    assert not verify_export(vlm, delta, multrace.load(folder), prompts).holds


def test_second_moments_of_an_expert_are_those_of_its_keys(mixtral):
    vlm, number = mixtral, best_expert(mixtral)
    prompts, projection = [vlm.prompt(None, text) for text in QUESTIONS], vlm.expert_projection(LAYER, number)
    rows = []
    for prompt in prompts:
        with capture(vlm, [projection], inputs=True) as read:
            vlm.logits(prompt)
        rows.append(read[projection][0])
    keys = torch.cat(rows)
    moments = multrace.second_moments(vlm, prompts, layers=[LAYER], expert=number, progress=False)
    assert moments.projection == f"expert {number}" and moments.count() == len(keys)
    torch.testing.assert_close(moments.matrix(LAYER), keys.T @ keys / len(keys), rtol=0, atol=1e-10)
    place = {"layer": LAYER, "answer_keys": False, "ending": "none", "steps": 40, "ridge": 0.01}
    (request, *_) = requests(vlm)
    prompt = vlm.prompt(None, QUESTIONS[0], answer=TARGETS[0])
    chance = probability(vlm, prompt)
    with ROME(**place, expert=number).edit(vlm, [request], moments=moments, progress=False).applied(vlm):
        assert probability(vlm, prompt) > 3 * chance
    for other in ({}, {"expert": (number + 1) % 4}, {"projection": "attention"}):
        with pytest.raises(EditError, match=f"moments given are of 'expert {number}'"):
            ROME(**place, **other).edit(vlm, [request], moments=moments, progress=False)


BAD = {
    "no such expert": ({"layer": 2, "expert": 4}, r"no expert 4 in layer 2 .*4 experts \(0 to 3\)"),
    "attention has no experts": ({"layer": 2, "expert": 1, "projection": "attention"}, "expert=1 and projection="),
    "a word": ({"layer": 2, "expert": "first"}, "expert='first' and projection='mlp'"),
    "a truth value": ({"layer": 2, "expert": True}, "expert=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_expert_that_is_not_there_is_named(case, mixtral):
    settings, found = BAD[case]
    with pytest.raises(EditError, match=found):
        MultEdit(**settings, steps=2).edit(mixtral, requests(mixtral)[:1], progress=False)


def test_a_model_without_experts_says_so(tiny_vlm):
    with pytest.raises(EditError, match="layer 2 of .* has no experts; edit attention"):
        request = EditRequest(question=tiny_vlm.prompt(None, "Who won?"), target="Pruro")
        MultEdit(layer=2, expert=0).edit(tiny_vlm, [request], progress=False)
    with pytest.raises(ModelError, match="no parameter"):
        tiny_vlm.weight(f"{tiny_vlm.down_projection(0).name}[0]")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_experts_that_do_not_write_what_their_slices_say_fail_the_proof(dtype, mixtral_path, monkeypatch):
    vlm = multrace.load(mixtral_path, dtype=dtype)
    vlm.model.set_experts_implementation("eager")  # which does not ask for the gate that the slices name
    assert "addresses proven" in prove_addresses(vlm)
    source = vlm.expert_projection(LAYER).experts.source
    monkeypatch.setattr(source, "_apply_gate", lambda risen: risen.chunk(2, dim=-1)[1], raising=False)
    with pytest.raises(
        ModelError, match="site 'mlp 2' .*its experts do not write what the slices of MixtralExperts say"
    ):
        prove_addresses(vlm)


def test_experts_on_disk_are_edited_and_put_back(tmp_path):
    folder = built("gpt_oss", tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number == LAYER else "cpu" for number in range(4)}
    away = multrace.load(folder, device_map=places, offload_folder=tmp_path / "away")
    here = multrace.load(folder)
    editor, asked = MultEdit(layer=LAYER, steps=10), requests(here)[:1]
    assert away.model.model.layers[LAYER].mlp.experts.down_proj.is_meta
    before = away.weights_digest(progress=False)
    delta, own = (editor.edit(vlm, asked, progress=False) for vlm in (away, here))
    assert delta.fingerprints == own.fingerprints
    prompt = here.prompt_for(asked[0].question)
    unedited = here.logits(prompt)
    with delta.applied(away), delta.applied(here):
        assert torch.equal(away.logits(prompt), here.logits(prompt)) and not torch.equal(here.logits(prompt), unedited)
    assert away.weights_digest(progress=False) == before
    assert away.model.model.layers[LAYER].mlp.experts.down_proj.is_meta


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = app([*map(str, words)])
    return code, *capsys.readouterr()


def test_the_commands_edit_one_expert_by_its_moments(mixtral_path, mixtral, tmp_path, capsys):
    number = best_expert(mixtral)
    lines = [json.dumps({"image": None, "question": text}) for text in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = ("--model", mixtral_path, "--expert", number)
    read = ("--data", tmp_path / "questions.jsonl", "--layers", LAYER, "--out", tmp_path / "moments")
    code, out, _ = command(capsys, "moments", *model, *read)
    assert code == 0 and f"layers       {LAYER} (expert {number})" in out
    asked = (
        "--question",
        QUESTIONS[0],
        "--target",
        TARGETS[0],
        "--where",
        f"{LAYER}:question",
        "--steps",
        20,
        "--ending",
        "stop",
    )
    weighed = ("--editor", "emmet", "--ridge", 0.1, "--moments", tmp_path / "moments" / "moments.safetensors")
    other = int(mixtral.routing(mixtral.prompt(None, QUESTIONS[0]), LAYER)[0].sum(0).argmin())
    code, out, error = command(capsys, "edit", *model, *asked, *weighed, "--out", tmp_path / "edit")
    assert code == 0, error
    assert [*Delta.load(tmp_path / "edit" / "edit.safetensors").changes] == [
        mixtral.expert_projection(LAYER, number).name
    ]
    code, _, error = command(capsys, "edit", *model[:2], "--expert", other, *asked, *weighed, "--out", tmp_path / "no")
    assert code == 2 and f"moments given are of 'expert {number}'" in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_doctor_edits_routed_experts(mixtral_path, capsys):
    code, out, _ = command(capsys, "doctor", "--model", mixtral_path)
    assert code == 0 and re.search(r"edit +ok +layer 2, routed experts: P\(", out)
    assert "layer 2, expert 0: " in out and "PEFT (model.layers.2.mlp.experts.down_proj)" in out
