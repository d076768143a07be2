"""Decoder layers that run again, one by one, repeat the whole run exactly, in true float64 and for every family."""

from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from exact_models import close, load_exact, noisy, span_after, whole
from multrace import VisionLanguageModel, load
from multrace.models import ReplayError, Site, capture, patch
from multrace.models.frame import DecoderInput
from multrace.models.replay import Replay, attention, replaying
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

FAMILIES = ("llava_llama", "llava_phi", "llama", "gpt2")
QUESTION = "Who founded the company in this photo?"


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """Each family, really computing in float64."""
    return load_exact(request.getfixturevalue(f"{request.param}_path"), monkeypatch)


@pytest.fixture
def llava(llava_llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """LLaVA-Llama, with grouped-query heads, really computing in float64."""
    return load_exact(llava_llama_path, monkeypatch)


@pytest.fixture
def embeddings(request: pytest.FixtureRequest, photo) -> Tensor:
    """Of a prompt with a picture, for the model that the test asks for."""
    vlm = request.getfixturevalue("vlm" if "vlm" in request.fixturenames else "llava")
    with torch.no_grad():
        return vlm.embeddings(vlm.prompt(photo if vlm.has_vision else None, QUESTION))


@torch.no_grad()
def test_layers_from_any_one_on_repeat_the_run(vlm, embeddings):
    length = embeddings.shape[1]
    scattered = (2, 3, 5, length - 4, length - 2, length - 1)
    with replaying(vlm) as replay:
        run = whole(replay, noisy(embeddings, (3, 4)))
        other = whole(replay, noisy(embeddings, (1, 2)))
        for positions in (tuple(range(length)), (length - 1,), tuple(range(5, length)), scattered):
            span, astray = span_after(replay, run, positions), span_after(replay, other, positions)
            for start in range(vlm.layers):
                states = run.at(run.states[start], positions)
                for layer in range(start, vlm.layers):
                    states = replay.layer(layer, states, span)
                    assert close(states, run.at(run.states[layer + 1], positions))
                assert close(replay.read(states[:, -1:]), run.logits[:, -1:])
            if len(positions) < length:
                last = replay.layer(vlm.layers - 1, run.at(run.states[-2], positions), astray)
                assert not close(last, run.at(run.states[-1], positions), 1e-6)


@torch.no_grad()
def test_the_recorded_run_is_the_models_own(vlm, embeddings):
    logits = vlm.forward(embeddings, positions=(7, 3))
    assert close(logits, vlm.forward(embeddings)[:, [7, 3]])
    sites = [Site(kind, 1) for kind in ("mlp", "attention")]
    with capture(vlm, [*sites, Site("hidden", 1)]) as written:
        vlm.forward(embeddings)
    with replaying(vlm) as replay:
        run = replay.record(DecoderInput(embeddings=embeddings), kept=(2, 5), read=(7, 3), sites=sites)
        entering = replay.entering(DecoderInput(embeddings=embeddings))
    assert torch.equal(run.logits, logits)
    assert torch.equal(run.states[2], written[Site("hidden", 1)][:, [2, 5]])
    assert torch.equal(run.states[0], entering[:, [2, 5]])
    assert torch.equal(entering, embeddings) == (vlm.family.name != "gpt2")  # which adds positions on the way
    assert {site: torch.equal(run.outputs[site], written[site][:, [2, 5]]) for site in sites} == dict.fromkeys(
        sites, True
    )
    assert len(run.keys) == len(run.values) == vlm.layers == len(run.states) - 1
    assert run.positions == tuple(range(embeddings.shape[1]))


@torch.no_grad()
def test_a_run_that_differs_at_some_positions_is_recorded_from_there(vlm, embeddings):
    length, changed = embeddings.shape[1], noisy(embeddings, (3, 5), rows=3)
    settings = {
        "sites": [Site(kind, layer) for kind in ("mlp", "attention") for layer in (0, 3)],
        "projections": [vlm.attention_projection(2), vlm.down_projection(1)],
    }
    with replaying(vlm) as replay:
        base, expected = whole(replay, embeddings, **settings), whole(replay, changed, **settings)
        positions = replay.masks.reach((3, 5))
        entering = replay.entering(DecoderInput(embeddings=changed))[:, list(positions)]
        found = replay.record_after(base, entering, positions, **settings)
    assert positions == found.positions == found.kept == tuple(range(3, length))
    for name in ("keys", "values"):
        for mine, theirs, old in zip(*(getattr(run, name) for run in (found, expected, base)), strict=True):
            assert close(mine, theirs[:, :, 3:])
            assert not close(mine, old[:, :, 3:].expand_as(mine), 1e-6)
    for mine, theirs in zip(found.states, expected.states, strict=True):
        assert close(mine, theirs[:, 3:])
    assert found.outputs.keys() == expected.outputs.keys()
    assert all(close(found.outputs[key], expected.outputs[key][:, 3:]) for key in found.outputs)
    assert close(found.logits, expected.logits)
    assert not close(found.logits, base.logits.expand_as(found.logits), 1e-6)


@torch.no_grad()
def test_logits_that_a_change_does_not_reach_are_the_bases(llava, embeddings):
    length, changed = embeddings.shape[1], noisy(embeddings, (9,))
    with replaying(llava) as replay:
        base = replay.record(DecoderInput(embeddings=embeddings), kept=(), read=(4, length - 1))
        entering = replay.entering(DecoderInput(embeddings=changed))[:, 9:]
        found = replay.record_after(base, entering, tuple(range(9, length)))
    assert torch.equal(found.logits[:, 0], base.logits[:, 0].expand(2, -1))
    assert close(found.logits, llava.forward(changed, positions=(4, length - 1)))


@pytest.mark.parametrize("offloaded", [False, True])
@torch.no_grad()
def test_the_last_layer_runs_for_read_positions_only(vlm, embeddings, offloaded):
    length, end = embeddings.shape[1], vlm.layers - 1
    positions, shapes = (4, 5, 7, *range(length - 2, length)), []
    with replaying(vlm) as replay:
        run = whole(replay, noisy(embeddings, (3, 4)))
        span, states = span_after(replay, run, positions), run.at(run.states[end], positions)
        everywhere = replay.layer(end, states, span)
        if offloaded:
            add_hook_to_module(vlm.addresses.layers[end], AlignDevicesHook(io_same_device=True))

        def shifted(output: Tensor) -> Tensor:
            shapes.append(output.shape[1])
            return output + torch.arange(output.shape[1], dtype=output.dtype)[:, None]

        for read in ((length - 1,), (5, length - 1), (7, length - 2, length - 1), positions):
            found = replay.last_layer(states, span, read)
            assert close(found, everywhere[:, [positions.index(place) for place in read]])
            with patch(vlm, {Site("mlp", end): shifted}):
                patched = replay.last_layer(states, span, read)
            assert close(patched - found, torch.arange(len(read), dtype=found.dtype)[:, None].expand_as(found))
            assert shapes[-1] == len(read)
    if offloaded:
        remove_hook_from_module(vlm.addresses.layers[end])


@torch.no_grad()
def test_work_is_counted(llava, embeddings):
    length, rows = embeddings.shape[1], 2
    positions = tuple(range(length - 5, length))
    with replaying(llava) as replay:
        run = whole(replay, noisy(embeddings, (3,), rows))
        recorded = replay.work
        assert (recorded.token_layers, recorded.key_value_tokens) == (rows * length * 4, 0)
        assert recorded.pairs == rows * 4 * length * (length + 1) // 2
        assert recorded.read_tokens == rows * 2
        span, states = span_after(replay, run, positions), run.at(run.states[2], positions)
        output = replay.layer(2, states, span)
        assert replay.work.token_layers == rows * length * 4 + rows * 5
        pairs = replay.work.pairs
        last = replay.last_layer(output, span, (length - 1,))
        assert replay.work.token_layers == rows * length * 4 + rows * 5 + rows
        assert replay.work.key_value_tokens == rows * 5
        assert replay.work.pairs == pairs + rows * length
        replay.read(last)
        assert replay.work.read_tokens == rows * 3


def plain_gradient(vlm: VisionLanguageModel, embeddings: Tensor, layer: int, score) -> Tensor:
    """Of a score with respect to what enters a layer (token, hidden), by an ordinary forward pass."""
    with capture(vlm, [Site("hidden", layer - 1)]) as states:
        logits = vlm.forward(embeddings.clone().requires_grad_(), positions=(embeddings.shape[1] - 1,))
    return torch.autograd.grad(score(logits), states[Site("hidden", layer - 1)])[0]


def replayed_gradient(vlm: VisionLanguageModel, embeddings: Tensor, layer: int, score, start: int) -> Tensor:
    positions = tuple(range(start, embeddings.shape[1]))
    with replaying(vlm) as replay:
        with torch.no_grad():
            run = whole(replay, embeddings)
        span = span_after(replay, run, positions)
        states = leaf = run.at(run.states[layer], positions).detach().requires_grad_()
        for number in range(layer, vlm.layers - 1):
            states = replay.layer(number, states, span)
        last = replay.last_layer(states, span, positions[-1:])
        return torch.autograd.grad(score(replay.read(last)), leaf)[0]


def first_logits(logits: Tensor) -> Tensor:
    return (logits[:, 0, 5] - logits[:, 0, 7]).tanh().sum()


@pytest.mark.parametrize("layer", [1, 3])
def test_gradients_are_those_of_the_plain_way(vlm, embeddings, layer):
    rows, start = noisy(embeddings, (3, 4)), embeddings.shape[1] - 6
    expected = plain_gradient(vlm, rows, layer, first_logits)[:, start:]
    assert expected.abs().amax((0, 2)).min() > 1e-6  # every position of the suffix matters
    assert close(replayed_gradient(vlm, rows, layer, first_logits, start), expected, 1e-11)


def test_gradients_through_parts_without_their_sums_are_wrong(llava, embeddings, monkeypatch):
    portable = attention.portable
    rows, start = noisy(embeddings, (3, 4)), embeddings.shape[1] - 6
    expected = plain_gradient(llava, rows, 1, first_logits)[:, start:]

    def detached(*arguments) -> tuple[Tensor, Tensor]:  # as fused kernels give them
        output, total = portable(*arguments)
        return output, total.detach()

    monkeypatch.setattr(attention, "portable", detached)
    assert not close(replayed_gradient(llava, rows, 1, first_logits, start), expected, 1e-5)


def traces_left(vlm: VisionLanguageModel) -> tuple:
    """What a block could leave behind: the attention function's name, hooks, and registered names."""
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in vlm.model.modules()]
    names = [name for each in (AttentionInterface, AttentionMaskInterface) for name in each._global_mapping]
    configs = [part.config._attn_implementation for part in vlm.model.modules() if hasattr(part, "config")]
    return hooks, names, configs


@torch.no_grad()
def test_a_block_leaves_the_model_as_it_was(vlm, embeddings):
    before, logits = traces_left(vlm), vlm.forward(embeddings)
    with replaying(vlm) as replay:
        whole(replay, embeddings)
        assert traces_left(vlm)[1:] != before[1:]
    assert traces_left(vlm) == before
    assert torch.equal(vlm.forward(embeddings), logits)


@torch.no_grad()
def test_an_error_leaves_the_model_as_it_was(vlm, embeddings):
    before, logits = traces_left(vlm), vlm.forward(embeddings)
    bias = -0.5 * torch.ones(1, 1, embeddings.shape[1], embeddings.shape[1]).to(embeddings)
    with pytest.raises(KeyError, match="mine"), replaying(vlm):
        raise KeyError("mine")
    assert traces_left(vlm) == before
    with replaying(vlm) as replay:
        with pytest.raises(ReplayError, match="bias"):
            whole(replay, embeddings, attention_mask=bias)
        run = whole(replay, embeddings)  # it still works after refusing
        span = span_after(replay, run, (3, 4))
        with pytest.raises(RuntimeError):
            replay.layer(1, run.states[1][:, 3:5, :-1], span)
        assert close(replay.layer(1, run.states[1][:, 3:5], span), run.states[2][:, 3:5])
        assert torch.equal(vlm.forward(embeddings), logits)
    assert traces_left(vlm) == before


@torch.no_grad()
def test_the_vision_tower_keeps_its_own_attention(llava, photo, embeddings, monkeypatch):
    prompt, attended = llava.prompt(photo, QUESTION), []
    plain = Replay.attend

    def watched(self: Replay, module: torch.nn.Module, *arguments, **keywords) -> tuple[Tensor, None]:
        attended.append(module)
        return plain(self, module, *arguments, **keywords)

    monkeypatch.setattr(Replay, "attend", watched)
    with replaying(llava):
        assert torch.equal(llava.embeddings(prompt), embeddings)
        assert attended == []
        assert torch.equal(llava.logits(prompt), llava.logits(prompt))
        assert {id(module) for module in attended} == {id(layer.self_attn) for layer in llava.addresses.layers}


@torch.no_grad()
def test_two_models_are_replayed_one_inside_the_others_block(vlm, embeddings, llama_path, monkeypatch):
    second = load_exact(llama_path, monkeypatch)
    other = second.embeddings(second.prompt(None, QUESTION))
    before = traces_left(vlm), traces_left(second)
    with replaying(vlm) as outer:
        run = whole(outer, embeddings)
        with replaying(second) as inner, replaying(vlm) as again:
            for replay, given in ((inner, other), (again, embeddings), (outer, embeddings)):
                if replay is not outer:
                    run = whole(replay, given)
                    states = replay.layer(2, run.states[2][:, 4:6], span_after(replay, run, (4, 5)))
                    assert close(states, run.states[3][:, 4:6])
        run = whole(outer, embeddings)
        assert close(outer.layer(0, run.states[0][:, 4:6], span_after(outer, run, (4, 5))), run.states[1][:, 4:6])
    assert (traces_left(vlm), traces_left(second)) == before


@pytest.mark.parametrize(("options", "tolerance"), [({"attention": "eager"}, 1e-5), ({"dtype": "bfloat16"}, 3e-2)],
                         ids=["eager", "bfloat16"])  # fmt: skip
@torch.no_grad()
def test_other_ways_of_loading(llava_llama_path, photo, monkeypatch, options, tolerance):
    vlm = load(llava_llama_path, **{"dtype": "float32", **options})
    given = vlm.embeddings(vlm.prompt(photo, QUESTION))
    changed, before = noisy(given, (3, 4)), traces_left(vlm)
    slow = vlm.forward(changed, positions=(given.shape[1] - 1,))
    with replaying(vlm) as replay:
        base = whole(replay, given)
        positions = replay.masks.reach((3, 4))
        found = replay.record_after(
            base, replay.entering(DecoderInput(embeddings=changed))[:, list(positions)], positions
        )
    size = float(slow.abs().max())
    assert found.states[-1].dtype == vlm.dtype
    assert close(found.logits[:, -1:], slow, tolerance * size)
    assert not close(base.logits[:, -1:].expand_as(slow), slow, 3 * tolerance * size)
    assert traces_left(vlm) == before
    assert vlm.addresses.decoder.config._attn_implementation == options.get("attention", "sdpa")
