"""Capture and patch: what they see and replace, and that nothing of theirs stays behind."""

import multrace
import pytest
import torch
from multrace import ModelError, capture, patch
from multrace.models import Site
from multrace.models.hooks import main_tensor, replace_main
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

QUESTION = "Who founded the company in this photo?"


@pytest.fixture
def prompt(random_vlm, photo):
    return random_vlm.prompt(photo if random_vlm.has_vision else None, QUESTION)


def hook_ids(vlm):
    return [
        list(hooks) for module in vlm.model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]


def test_sites_name_modules(random_vlm):
    for kind in ("hidden", "mlp", "attention"):
        site = Site(kind, 1)
        assert random_vlm.model.get_submodule(random_vlm.path(site)) is random_vlm.module(site)
        assert random_vlm.path(random_vlm.module(site)) == random_vlm.path(site)
        assert random_vlm.module(Site(kind, -1)) is random_vlm.module(Site(kind, random_vlm.layers - 1))
    assert str(Site("mlp", 3)) == "mlp 3"
    assert sorted([Site("mlp", 1), Site("hidden", 2), Site("mlp", 0)])[0] == Site("hidden", 2)


def test_projections_name_weights(random_vlm):
    for layer in (0, -1):
        projection = random_vlm.down_projection(layer)
        assert random_vlm.weight(projection.name) is projection.weight
        assert projection.width == random_vlm.mlp
        assert projection.hidden == random_vlm.hidden
        assert projection.transposed == (projection.weight.shape == (random_vlm.mlp, random_vlm.hidden))
        output = random_vlm.attention_projection(layer)
        assert (output.hidden, output.width) == (random_vlm.hidden, random_vlm.hidden)


def test_bad_addresses_say_what_exists(random_llava_llama):
    vlm = random_llava_llama
    with pytest.raises(ModelError, match=r"no layer 40 in .*: its decoder has 4 layers \(0 to 3\); pass layer=-1"):
        vlm.module(Site("mlp", 40))
    with pytest.raises(ModelError, match="no layer -5"):
        vlm.down_projection(-5)
    with pytest.raises(ModelError, match="kinds are hidden, mlp, attention"):
        Site("heads", 0)
    with pytest.raises(ModelError, match=r"nearest module is 'model.language_model.layers.0.mlp'"):
        vlm.module("model.language_model.layers.0.mpl")
    with pytest.raises(ModelError, match="nearest is 'model.language_model.layers.0.mlp.down_proj.weight'"):
        vlm.weight("model.language_model.layers.0.mlp.down.weight")
    with pytest.raises(ModelError, match="Linear is not a module"):
        vlm.path(nn.Linear(1, 1))


def test_capture_sees_tensors_and_tuples(random_vlm, prompt):
    hidden, mlp, attention = (Site(kind, 1) for kind in ("hidden", "mlp", "attention"))
    raw = {}
    handles = [
        random_vlm.module(site).register_forward_hook(lambda _m, _i, output, site=site: raw.__setitem__(site, output))
        for site in (hidden, mlp, attention)
    ]
    with capture(random_vlm, [hidden, mlp, attention]) as seen:
        random_vlm.logits(prompt)
    for handle in handles:
        handle.remove()
    assert isinstance(raw[hidden], torch.Tensor) and isinstance(raw[attention], tuple)
    assert seen[hidden] is raw[hidden]
    assert seen[mlp] is raw[mlp]
    assert seen[attention] is raw[attention][0]
    assert all(state.shape == (1, prompt.length, random_vlm.hidden) for state in seen.values())


def test_capture_sees_positional_and_keyword_inputs(random_vlm, prompt):
    block, attention = Site("hidden", 1), Site("attention", 1)
    projection = random_vlm.down_projection(1)
    with capture(random_vlm, [block, attention, projection], inputs=True) as read:
        with capture(random_vlm, [Site("hidden", 0), projection]) as written:
            random_vlm.logits(prompt)
    assert torch.equal(read[block], written[Site("hidden", 0)])
    assert read[attention].shape == (1, prompt.length, random_vlm.hidden)  # a keyword in Llama and Phi
    assert read[projection].shape == (1, prompt.length, random_vlm.mlp)
    weight = projection.weight if projection.transposed else projection.weight.T
    bias = getattr(projection.module, "bias", None)
    computed = read[projection] @ weight + (0 if bias is None else bias)
    assert torch.allclose(computed, written[projection], atol=1e-5)


def test_capture_takes_paths_and_modules(random_llama):
    path = random_llama.path(Site("mlp", 2))
    module = random_llama.module(path)
    with capture(random_llama, [path, module, Site("mlp", 2)]) as seen:
        random_llama.logits(random_llama.prompt(None, QUESTION))
    assert len(seen) == 3
    assert seen[path] is seen[module] is seen[Site("mlp", 2)]


def test_capture_keeps_the_graph_and_clones_on_request(random_llama):
    prompt = random_llama.prompt(None, QUESTION)
    site, later = Site("hidden", 1), Site("hidden", 3)
    embeddings = random_llama.embeddings(prompt).requires_grad_()
    with capture(random_llama, [site]) as seen, capture(random_llama, [site], clone=True) as cloned:
        with capture(random_llama, [later]) as last:
            logits = random_llama.forward(embeddings)
    assert cloned[site] is not seen[site] and torch.equal(cloned[site], seen[site])
    (gradient,) = torch.autograd.grad(logits[0, -1, 5], seen[site], retain_graph=True)
    assert gradient.abs().sum() > 0
    assert last[later].requires_grad


def test_a_patch_replaces_the_output_and_restoring_it_restores_everything(random_vlm, prompt):
    clean = random_vlm.logits(prompt)
    for kind in ("hidden", "mlp", "attention"):
        site = Site(kind, 1)
        with capture(random_vlm, [site]) as seen:
            random_vlm.logits(prompt)
        with patch(random_vlm, {site: torch.zeros_like}):
            damaged = random_vlm.logits(prompt)
        assert not torch.equal(damaged, clean)
        with (
            patch(random_vlm, {site: torch.zeros_like}),
            patch(random_vlm, {site: lambda _value, seen=seen, site=site: seen[site]}),
        ):
            assert torch.equal(random_vlm.logits(prompt), clean)
        assert torch.equal(random_vlm.logits(prompt), clean)


def test_a_patch_replaces_positional_and_keyword_inputs(random_vlm, prompt):
    clean = random_vlm.logits(prompt)
    for key in (Site("hidden", 1), Site("attention", 1), Site("mlp", 1), random_vlm.down_projection(1)):
        with capture(random_vlm, [key], inputs=True) as seen:
            random_vlm.logits(prompt)
        with patch(random_vlm, {key: lambda value: value + 1}, inputs=True):
            with capture(random_vlm, [key], inputs=True) as moved:
                assert not torch.equal(random_vlm.logits(prompt), clean)
        assert torch.equal(moved[key], seen[key] + 1)
        with patch(random_vlm, {key: torch.clone}, inputs=True):
            assert torch.equal(random_vlm.logits(prompt), clean)


def test_patches_may_not_write_or_change_the_shape(random_vlm, prompt):
    clean = random_vlm.logits(prompt)
    site = Site("hidden", 1)
    bad = {
        "wrote into the tensor": lambda value: value.mul_(2),
        r"must return a tensor of shape .*; it returned \(1, 1": lambda value: value[:, :1],
        "it returned NoneType": lambda value: None,
    }
    for found, function in bad.items():
        for inputs in (False, True):
            with pytest.raises(ModelError, match=f"patch at hidden 1 {found}" if "wrote" in found else found):
                with torch.no_grad(), patch(random_vlm, {site: function}, inputs=inputs):
                    random_vlm.logits(prompt)
    assert torch.equal(random_vlm.logits(prompt), clean)


def test_no_hook_stays_after_an_error_and_foreign_hooks_stay(random_vlm, prompt):
    calls = []
    foreign = random_vlm.module(Site("mlp", 1)).register_forward_hook(lambda *_: calls.append(1))
    random_vlm.logits(prompt)
    before, count = hook_ids(random_vlm), len(calls)

    def explode(value):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        with capture(random_vlm, [Site("mlp", 1)]), patch(random_vlm, {Site("mlp", 1): explode}):
            assert hook_ids(random_vlm) != before
            random_vlm.logits(prompt)
    assert hook_ids(random_vlm) == before
    for setup in (
        lambda: capture(random_vlm, [Site("mlp", 1), Site("mlp", 9)]),
        lambda: patch(random_vlm, {Site("mlp", 1): torch.clone, "no.such.module": torch.clone}),
    ):
        with pytest.raises(ModelError):
            with setup():
                random_vlm.logits(prompt)
        assert hook_ids(random_vlm) == before
    random_vlm.logits(prompt)
    assert len(calls) > count
    foreign.remove()


def test_embeddings_end_the_pass_before_the_first_layer(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    before = hook_ids(random_llava)
    with capture(random_llava, [Site("hidden", 0), random_llava.vision_tower]) as seen:
        embeddings = random_llava.embeddings(prompt)
    assert list(seen) == [random_llava.vision_tower]
    assert embeddings.shape == (1, prompt.length, random_llava.hidden)
    assert torch.equal(embeddings[0, list(prompt.positions("image"))], random_llava.image_features(prompt))
    assert hook_ids(random_llava) == before


def test_main_tensors_of_every_container():
    first, second, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    output = BaseModelOutput(last_hidden_state=first, attentions=(second,))
    for value in (first, (first, None), [first, second], output):
        assert main_tensor(value, "here") is first
        replaced = replace_main(value, new)
        assert type(replaced) is type(value)
        assert main_tensor(replaced, "here") is new
        assert main_tensor(value, "here") is first  # the given container is left as it was
    assert replace_main(output, new).attentions == (second,)
    for value in (None, (), (None, first), "text"):
        with pytest.raises(ModelError, match="no tensor"):
            main_tensor(value, "here")


def test_names_are_exported():
    assert all(hasattr(multrace, name) for name in multrace.__all__)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_patch_ahead_is_seen_by_hooks_that_were_there_before(random_llama, ahead):
    site, seen = Site("mlp", 1), []
    handle = random_llama.module(site).register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        with torch.no_grad(), patch(random_llama, {site: torch.zeros_like}, ahead=ahead):
            random_llama.logits(random_llama.prompt(None, "Who founded the company?"))
    finally:
        handle.remove()
    assert bool(seen[0].any()) != ahead


def test_only_a_patch_ahead_of_transformers_own_hooks_reaches_the_projector(random_llava, photo):
    prompt, layer = random_llava.prompt(photo, "Who founded the company?"), random_llava.vision_layers[-1]
    with torch.no_grad():
        clean = random_llava.embeddings(prompt)
        with patch(random_llava, {layer: torch.zeros_like}, ahead=True):
            assert not torch.equal(random_llava.embeddings(prompt), clean)
        assert torch.equal(random_llava.embeddings(prompt), clean)
