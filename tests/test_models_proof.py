"""The load-time proof: right rows pass, every kind of wrong row or dead model fails with the name of the site."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import multrace
import pytest
import torch
from families.folders import write
from families.table import RECIPES
from model_fixtures import draw_photo
from multrace import EditError, EditRequest, ModelError, MultEdit, VisionLanguageModel, capture, patch
from multrace.models import Family, ReplayError, Site, collate
from multrace.models.loading import prove_addresses
from multrace.tracing import TextNoise
from PIL import Image
from random_models import make_tokenizer, text_sizes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}


def with_row(vlm: VisionLanguageModel, family: Family) -> VisionLanguageModel:
    return replace(vlm, family=family, addresses=replace(vlm.addresses, family=family))


def test_every_family_proves_its_addresses(random_vlm):
    sites = 3 * random_vlm.layers
    assert f"{sites} sites" in prove_addresses(random_vlm)


def test_loading_says_so_in_one_line(llava_llama_path, caplog):
    with caplog.at_level(logging.INFO, logger="multrace"):
        multrace.load(llava_llama_path)
    (record,) = [record for record in caplog.records if record.name == "multrace"]
    assert "addresses proven (12 sites" in record.getMessage()
    assert "16 image tokens hold image features" in record.getMessage()
    assert "llava_llama, 4 layers, hidden 32, mlp 64, 4 heads" in record.getMessage()


def test_verify_false_says_that_nothing_was_proven(llava_llama_path, caplog):
    with caplog.at_level(logging.INFO, logger="multrace"):
        multrace.load(llava_llama_path, verify=False)
    assert "addresses not proven" in caplog.text


BROKEN = {
    "no such MLP": ("llava_llama", {"mlp": "feed_forward"}, "site 'mlp 0'"),
    "no such attention": ("llava_llama", {"attention": "attn"}, "site 'attention 0'"),
    "no such down projection": ("llava_llama", {"down": "mlp.fc2"}, "projection of site 'mlp 0'"),
    "no such attention projection": (
        "llava_phi",
        {"attention_out": "self_attn.o_proj"},
        "projection of site 'attention 0'",
    ),
    "no such layers": ("llava_llama", {"layers": "h"}, "no 'h'"),
    "no such final norm": ("llava_phi", {"final_norm": "norm"}, "no 'norm'"),
    "another final norm": ("llava_llama", {"final_norm": "layers.0.input_layernorm"}, "'hidden 3'.*final norm"),
    "no such vision tower": ("llava_llama", {"vision": "vision_model"}, "vision_model"),
    "a norm for the MLP": ("llava_llama", {"mlp": "input_layernorm"}, "'mlp 0'"),
    "the MLP for attention": ("llava_llama", {"attention": "mlp"}, "'attention 0'"),
    "attention for the MLP": ("llava_phi", {"mlp": "self_attn"}, "'mlp 0'"),
    "the up projection for the down projection": ("llava_llama", {"down": "mlp.up_proj"}, "'mlp 0'"),
    "a query for the attention projection": ("llava_llama", {"attention_out": "self_attn.q_proj"}, "'attention 0'"),
    "an activation for the down projection": ("llava_llama", {"down": "mlp.act_fn"}, "'mlp 0'"),
    "a transposed weight that is not": ("llava_llama", {"transposed": True}, "'mlp 0'"),
    "a weight that is transposed": ("gpt2", {"transposed": False}, "'mlp 0'"),
    "parallel layers that are not": ("llava_llama", {"parallel": True}, "'attention 2'"),
    "sequential layers that are parallel": ("llava_phi", {"parallel": False}, "'attention 2'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_row_is_refused_with_the_site(case, request):
    name, changes, found = BROKEN[case]
    vlm = request.getfixturevalue(f"random_{name}")
    with pytest.raises(ModelError, match=found):
        prove_addresses(with_row(vlm, replace(vlm.family, **changes)))


def test_a_square_weight_cannot_hide_its_orientation(random_gpt2):
    # The attention projection of GPT-2 is square, so its shape says nothing about its orientation.
    projection = random_gpt2.attention_projection(0)
    assert projection.width == projection.hidden
    vlm = random_gpt2

    class Turned(type(vlm.addresses)):
        def attention_projection(self, layer):
            return replace(super().attention_projection(layer), transposed=False)

    addresses = Turned(model=vlm.model, family=vlm.family, name=vlm.name)
    with pytest.raises(ModelError, match="'attention 0'.*other way round"):
        prove_addresses(replace(vlm, addresses=addresses))


def break_and_load(path: Path, target: Path, damage: Callable[[nn.Module], None]) -> VisionLanguageModel:
    model = AutoModelForImageTextToText.from_pretrained(path)
    with torch.no_grad():
        damage(model)
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(path).save_pretrained(target)
    return multrace.load(target)


def deaf_head(model: nn.Module) -> None:
    model.lm_head.weight.zero_()


def last_layers_deaf_to_others(model: nn.Module) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.v_proj.weight.zero_()


def blind_projector(model: nn.Module) -> None:
    model.model.multi_modal_projector.linear_2.weight.zero_()


def overflow(model: nn.Module) -> None:
    model.lm_head.weight.fill_(float("inf"))


DEAD = {
    "patches never reach the logits": (deaf_head, "site 'hidden 2'.*no effect on the logits there"),
    "patches never reach later positions": (last_layers_deaf_to_others, "site 'hidden 2'.*later positions"),
    "pictures all look the same": (blind_projector, "site 'image'.*another picture"),
    "logits are not finite": (overflow, "not finite"),
}


@pytest.mark.parametrize("case", DEAD)
def test_a_model_on_which_patches_have_no_effect_is_refused(case, llava_llama_path, tmp_path):
    damage, found = DEAD[case]
    with pytest.raises(ModelError, match=found):
        break_and_load(llava_llama_path, tmp_path / "broken", damage)


def test_the_same_route_without_damage_loads(llava_llama_path, tmp_path):
    assert break_and_load(llava_llama_path, tmp_path / "whole", lambda model: None).layers == 4


def test_a_model_whose_pictures_never_arrive_is_refused(random_llava):
    # An image id that is not the one the processor writes: the features have nowhere to go.
    vlm = random_llava
    frontend = replace(vlm.frontend, image_token_id=vlm.tokenizer.convert_tokens_to_ids("?"))
    with pytest.raises(ModelError):
        prove_addresses(replace(vlm, frontend=frontend))


def test_an_error_of_the_libraries_is_an_error_of_the_site(random_llava, monkeypatch):
    def fail(*_arguments, **_keywords):
        raise TypeError("unexpected keyword argument 'pixels'")

    with monkeypatch.context() as patched:
        patched.setattr(type(random_llava.model), "get_image_features", fail)
        patched.setattr(type(random_llava.model.model), "get_image_features", fail)
        with pytest.raises(ModelError, match="site 'image' of .* fails its proof: TypeError: unexpected keyword"):
            prove_addresses(random_llava)
    prove_addresses(random_llava)


def test_the_proof_leaves_no_hook(random_vlm):
    def hooks():
        return [
            list(hooks)
            for module in random_vlm.model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    random_vlm.embeddings(random_vlm.prompt(None, "Who?"))  # transformers places hooks of its own at the first pass
    before = hooks()
    prove_addresses(random_vlm)
    assert hooks() == before


STACKS = {
    "norms behind both parts": ("gemma2", GEMMA, {}, {"mlp_norm": None}, "'attention 0' and 'mlp 0'.*at any scale"),
    "other norms behind both parts": ("glm4", {"head_dim": 8}, {}, {"attention_norm": None}, "at any scale"),
    "a norm that is not behind the part": (
        "gemma2", GEMMA, {}, {"mlp_norm": "pre_feedforward_layernorm"}, "'attention 0' and 'mlp 0'"
    ),
    "parts added at a scale": ("granite", {"residual_multiplier": 0.22}, {"residual_multiplier": 0.0}, {}, "any scale"),
    "logits with a divisor": ("granite", {"logits_scaling": 8.0}, {}, {"final_norm": "layers.0.mlp"}, "'hidden 3'"),
    "flat tensors": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {}, {"mlp": "fc1"}, "'mlp 0'.*shape"),
    "layers with different names": (
        "qwen3_5_text",
        {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
        {}, {"attention": "self_attn"}, "no site 'attention 0'",
    ),
    "experts": (
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {}, {"experts": "mlp.none"},
        "no projection of site 'mlp 0'",
    ),
}  # fmt: skip
"""A text type, settings, others with which it fails, a row that does not serve it, and the error."""


def stack(model_type: str, folder: Path, **settings: object) -> VisionLanguageModel:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {**text_sizes(tokenizer), "num_key_value_heads": 2, **settings}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return multrace.load(folder)


@pytest.mark.parametrize("case", STACKS)
def test_what_a_text_stack_adds_to_the_residual_stream_is_proven(case, tmp_path):
    model_type, settings, damage, wrong, found = STACKS[case]
    vlm = stack(model_type, tmp_path / "whole", **settings)
    with pytest.raises(ModelError, match=found):
        if damage:
            stack(model_type, tmp_path / "damaged", **{**settings, **damage})
        prove_addresses(with_row(vlm, replace(vlm.family, **wrong)))


def test_a_site_behind_a_norm_is_what_the_layer_adds(tmp_path):
    vlm = stack("gemma2", tmp_path, **GEMMA)
    layer, sites = Site("hidden", 1), [Site("attention", 1), Site("mlp", 1)]
    prompt, projection = vlm.prompt(None, "Who?"), vlm.down_projection(1)
    with capture(vlm, [layer], inputs=True) as entered, capture(vlm, [layer, *sites, projection]) as states:
        vlm.logits(prompt)
    torch.testing.assert_close(entered[layer] + states[sites[0]] + states[sites[1]], states[layer])
    norm = vlm.model.model.layers[1].post_feedforward_layernorm
    assert vlm.module(sites[1]) is norm
    assert torch.equal(norm(states[projection]), states[sites[1]])


def test_experts_have_no_projection_and_all_else_works(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="multrace"):
        vlm = stack("mixtral", tmp_path, num_local_experts=4, num_experts_per_tok=2)
    assert "mixtral, 4 layers, hidden 32, mlp 64, 4 heads" in caplog.text and "addresses proven" in caplog.text
    assert not vlm.has_down_projection(0) and vlm.attention_projection(0).hidden == vlm.hidden
    with pytest.raises(ModelError, match=r"layer 3 of .* has experts, so no single matrix.*\(expert_projection\)"):
        vlm.down_projection(-1)
    with capture(vlm, [Site("mlp", 3)]) as states:
        vlm.logits(vlm.prompt(None, "Who?"))
    assert states[Site("mlp", 3)].shape[-1] == vlm.hidden


def test_experts_are_proven_in_float64_and_beside_dense_layers(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    single = stack("qwen3_moe", tmp_path, **sizes, mlp_only_layers=[0, 2])
    assert [single.has_down_projection(layer) for layer in range(4)] == [True, False, True, False]
    double = multrace.load(tmp_path, dtype="float64")
    logits = [vlm.logits(vlm.prompt(None, "Who won the medal?")) for vlm in (single, double)]
    assert logits[1].dtype == torch.float64 and (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize("parallel", [True, False])
def test_layers_are_parallel_if_the_configuration_says_so(parallel, tmp_path):
    assert stack("gpt_neox", tmp_path, use_parallel_residual=parallel).family.parallel == parallel


def test_a_running_state_is_restored_as_attention(tmp_path):
    vlm = stack("qwen3_5_text", tmp_path, **STACKS["layers with different names"][1])
    prompt, noise = vlm.prompt(None, "Who won the medal?", constraint="medal"), TextNoise(scale=3.0)
    options = {"corruption": noise, "answer": "golf", "positions": "last", "even_if_weak": True, "progress": False}
    assert vlm.layers in multrace.causal_trace(vlm, prompt, sites="attention", **options).samples["attention"].shape


def test_a_window_of_heads_leaves_out_layers_without_heads(tmp_path):
    vlm = stack("qwen3_5_text", tmp_path, **STACKS["layers with different names"][1])
    prompt, corruption = vlm.prompt(None, "Who won the medal?", constraint="medal"), multrace.ReplaceText("match")
    corrupted = corruption.corrupt(vlm, prompt).embeddings
    settings = {"corruption": corruption, "sites": "heads", "window": 4, "positions": "last", "answer": "golf"}
    with pytest.warns(UserWarning, match="heads in decoder layers 0, 2 of .*; the cells there are nan"):
        trace = multrace.causal_trace(vlm, prompt, even_if_weak=True, progress=False, **settings)
    projections, size = [vlm.attention_projection(layer) for layer in (1, 3)], vlm.hidden // vlm.heads
    with multrace.capture(vlm, projections, inputs=True, clone=True) as clean:
        vlm.logits(prompt)
    for head in range(vlm.heads):
        part = slice(head * size, (head + 1) * size)

        def put(states, projection, part=part):
            states = states.clone()
            states[:, -1, part] = clean[projection][:, -1, part]
            return states

        with multrace.patch(vlm, {each: partial(put, projection=each) for each in projections}, inputs=True):
            expected = vlm.forward(corrupted)[0, -1].softmax(-1)[trace.answer_ids[0]]
        values = trace.samples[f"head {head}"][0, 0, :, 0]
        assert values.isnan().tolist() == [True, False, True, False]
        assert abs(float(values[3] - expected)) < 1e-6


def test_layers_that_attend_to_pictures_are_left_out_without_one(tmp_path):
    vlm = multrace.load(write(RECIPES["mllama"], tmp_path / "mllama"), dtype="float64", verify=False)
    prompt = vlm.prompt(None, "Who founded the company?", constraint="the company")
    assert vlm.skipped_layers(prompt) == (1, 3) and not vlm.skipped_layers(vlm.prompt(draw_photo(1), "Who?"))
    skipped = "decoder layers 1, 3 of .* did not run, since the prompt has no picture to attend to"
    options = {"corruption": TextNoise(samples=2, scale=3.0), "even_if_weak": True, "progress": False}
    with pytest.warns(UserWarning, match=f"{skipped}; the cells there are nan"):
        trace = multrace.causal_trace(vlm, prompt, positions="constraint", window=1, **options)
    for kind, values in trace.samples.items():
        assert values[0, 0, :, 0].isnan().tolist() == [False, True, False, True, False, False], kind
        assert (values[0, 0, [0, 2, 4], 0] - trace.corrupted[0]).abs().min() > 1e-9, kind
    assert multrace.average([trace, trace]).means["mlp"].count[0, 0].tolist() == [2, 0, 2, 0, 2, 2]
    with pytest.warns(UserWarning, match=f"{skipped}; the states there are those of the layer before"):
        lens = multrace.logit_lens(vlm, prompt, answer="Paris", progress=False).probability("Paris")
    assert lens[2] == lens[1] != lens[3] == lens[4] and len(lens) == vlm.layers + 1
    with pytest.warns(UserWarning, match=f"{skipped}; nothing is cut there"):
        knockout = multrace.attention_knockout(vlm, prompt, flows=["constraint -> last"], windows=(1,), progress=False)
    moves = (knockout.probabilities[0, 0, 0] - knockout.clean[0]).abs()
    assert moves[[1, 3]].max() < 1e-12 and moves[[0, 2, 4]].min() > 1e-9
    with pytest.raises(ReplayError, match="decoder layer 1 attends out of turn, or not at all in this pass"):
        multrace.tracing.attention_contributions(vlm, prompt, progress=False)
    request = EditRequest(question=prompt, target="Paris")
    with pytest.raises(EditError, match="down_proj' does not run for these prompts.*pass requests with a picture"):
        MultEdit(layer=1, token="last", steps=3).edit(vlm, [request], progress=False)
    assert vlm.answers([prompt])


def test_a_shared_expert_is_an_mlp_that_can_be_edited(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vlm = stack("qwen2_moe", tmp_path / "shared", **sizes, shared_expert_intermediate_size=48)
    assert (vlm.down_projection(1).path, vlm.mlp) == ("model.layers.1.mlp.shared_expert.down_proj", 48)
    editor, prompt = MultEdit(layer=1, steps=20), vlm.prompt(None, "Who won the medal?", answer="golf")
    request = EditRequest(question=prompt.with_answer(None), target="golf")
    clean, weights = vlm.logits(prompt), vlm.weights_digest(progress=False)
    delta = editor.edit(vlm, [request], progress=False)
    with delta.applied(vlm):
        edited = vlm.logits(prompt)
    token, place = prompt.answer_ids[0], prompt.groups["answer"][0] - 1
    before, after = (logits[0, place].softmax(-1)[token] for logits in (clean, edited))
    assert after > 5 * before and vlm.weights_digest(progress=False) == weights
    assert vlm.down_projection(1).name in delta.changes


def test_flat_tensors_are_seen_and_replaced_by_row_and_token(tmp_path):
    vlm = stack("opt", tmp_path, ffn_dim=64, word_embed_proj_dim=32)
    prompts = [vlm.prompt(None, question) for question in ("Who founded it?", "Which city?")]
    inputs, _ = collate(prompts, vlm.tokenizer, side="left")
    site, projection = Site("mlp", 2), vlm.down_projection(2)
    raw: list[torch.Tensor] = []
    with projection.module.register_forward_hook(lambda _m, _i, output: raw.append(output)):
        with capture(vlm, [site]) as written, capture(vlm, [projection], inputs=True) as read:
            clean = vlm.logits(inputs)
    rows, tokens = inputs["input_ids"].shape
    assert raw[0].shape == (rows * tokens, vlm.hidden) and torch.equal(written[site].flatten(0, 1), raw[0])
    assert read[projection].shape == (rows, tokens, vlm.mlp)
    second = torch.tensor([0.0, 1.0])[:, None, None]
    for key, is_input in ((site, False), (projection, True)):
        with patch(vlm, {key: lambda value: value + second}, inputs=is_input):
            patched = vlm.logits(inputs)
        assert torch.equal(patched[0], clean[0]) and not torch.equal(patched[1], clean[1])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model of each of these families, proven by opening it."""
    folder = tmp_path_factory.mktemp("families")
    with warnings.catch_warnings():  # of transformers' own processors
        warnings.simplefilter("ignore")
        return {
            name: multrace.load(write(RECIPES[name], folder / name), dtype="float64")
            for name in ("paligemma", "gemma3")
        }


def with_frontend(vlm, **changes):
    return replace(vlm, frontend=replace(vlm.frontend, **changes))


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_an_answer_that_changes_what_precedes_it_is_noticed(opened):
    """PaliGemma's type 0 is the part of a prompt that sees itself whole, so a question sees an answer of that type."""
    vlm = opened["paligemma"]
    assert vlm.frontend.answer_fills == {"token_type_ids": 1}
    prompt = vlm.prompt(Image.new("RGB", (40, 40), "red"), "Who is this?")
    answered = prompt.with_answer("Ada")
    bare, after = vlm.logits(prompt), vlm.logits(answered)[:, : prompt.length]
    torch.testing.assert_close(after, bare, rtol=1e-5, atol=1e-5)
    leaking = with_frontend(vlm, answer_fills={})
    leaked = leaking.logits(replace(prompt, frontend=leaking.frontend).with_answer("Ada"))[:, : prompt.length]
    assert (leaked - bare).abs().max() > 0.1
    with pytest.raises(ModelError, match="site 'answer' .* an answer moves the logits before it"):
        prove_addresses(leaking)


def test_an_input_that_no_prompt_passes_on_is_noticed(opened):
    """Gemma 3 reads from token_type_ids which tokens are one picture and see one another."""
    vlm = opened["gemma3"]
    assert "token_type_ids" in vlm.prompt(Image.new("RGB", (40, 40)), "Who?").inputs
    deaf = with_frontend(vlm, accepted=vlm.frontend.accepted - {"token_type_ids"})
    assert "token_type_ids" not in deaf.prompt(Image.new("RGB", (40, 40)), "Who?").inputs
    with pytest.raises(ModelError, match="site 'inputs' .* 'token_type_ids' changes the logits"):
        prove_addresses(deaf)
