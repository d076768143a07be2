"""Trace and TraceDict keep baukit's meaning, without its leaks."""

import importlib
import importlib.util

import pytest
import torch
from multrace import ModelError, Trace, TraceDict
from multrace.models import Site
from torch import nn

QUESTION = "Who founded the company in this photo?"


@pytest.fixture
def prompt(random_llama):
    return random_llama.prompt(None, QUESTION)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def hooks(model):
    return [list(module._forward_hooks) for module in model.modules()]


def test_a_trace_keeps_output_and_input(network):
    value = torch.randn(5, 3)
    with Trace(network, "0", retain_input=True) as trace:
        result = network(value)
    assert trace.input is value
    assert torch.equal(network[2](network[1](trace.output)), result)
    with Trace(network[0]) as whole, Trace(network, "2", retain_output=False) as none:
        network(value)
    assert torch.equal(whole.output, trace.output)
    assert none.output is None and none.input is None


def test_a_trace_on_a_loaded_model_takes_sites_and_keyword_inputs(random_llama, prompt):
    site = Site("attention", 1)
    random_llama.logits(prompt)
    before = hooks(random_llama.model)
    with Trace(random_llama, site, retain_input=True) as trace:
        random_llama.logits(prompt)
    assert isinstance(trace.output, tuple)  # whole, as baukit keeps it
    assert trace.input.shape == (
        1,
        prompt.length,
        random_llama.hidden,
    )  # baukit keeps nothing where inputs are keywords
    by_path = Trace(random_llama.model, random_llama.path(site))
    with by_path:
        random_llama.logits(prompt)
    assert torch.equal(by_path.output[0], trace.output[0])
    with Trace(random_llama, random_llama.down_projection(1)) as projection:
        random_llama.logits(prompt)
    assert projection.output.shape == (1, prompt.length, random_llama.hidden)
    assert hooks(random_llama.model) == before


EDITS = {
    "output": lambda output: output * 0,
    "output and layer": lambda output, layer: output * (0 if layer == "0" else 1),
    "output, layer, inputs": lambda output, layer, inputs: (
        torch.zeros_like(inputs[0][:, :1]).expand(-1, 4) * len(layer)
    ),
    "inputs by name": lambda output, inputs: output * 0 * inputs[0].sum(),
    "layer with a default": lambda output, layer=None: output * (0 if layer == "0" else 1),
    "everything": lambda *arguments: arguments[0] * 0 if arguments[1] == "0" else arguments[0],
}


@pytest.mark.parametrize("case", EDITS)
def test_edit_output(case, network):
    value = torch.randn(5, 3)
    with Trace(network, "0", edit_output=EDITS[case]) as trace:
        result = network(value)
    assert torch.equal(trace.output, torch.zeros(5, 4))
    assert torch.equal(result, network[2](torch.zeros(5, 4)))
    assert not torch.equal(network(value), result)


def test_clone_detach_and_retain_grad(network):
    value = torch.randn(5, 3)
    with Trace(network, "0", detach=True) as detached, Trace(network, "0", clone=True) as cloned:
        network(value)
    assert not detached.output.requires_grad
    assert cloned.output.requires_grad
    assert cloned.output.data_ptr() != detached.output.data_ptr()
    for options in ({"retain_grad": True}, {"retain_grad": True, "clone": True, "detach": True}):
        with Trace(network, "0", **options) as kept:
            network(value).sum().backward()
        assert kept.output.grad.shape == (5, 4)
        assert kept.output.grad.abs().sum() > 0


def test_retain_grad_where_no_parameter_wants_one(random_llama, prompt):
    with Trace(random_llama, Site("hidden", 1), retain_grad=True) as kept:
        random_llama.logits(prompt)[0, -1, 3].backward()
    assert kept.output.grad.abs().sum() > 0


def test_stop_ends_the_pass(random_llama, prompt):
    random_llama.logits(prompt)
    before = hooks(random_llama.model)
    after = []
    with Trace(random_llama, Site("hidden", 2)) as later, Trace(random_llama, Site("hidden", 1), stop=True) as stopped:
        random_llama.logits(prompt)
        after.append("reached")
    assert stopped.output is not None and later.output is None and not after
    with Trace(random_llama, Site("hidden", 1), stop=True):
        pass  # the stop never fires; baukit raises a TypeError here
    assert hooks(random_llama.model) == before


def test_trace_dict(random_llama, prompt):
    layers = [random_llama.path(Site("mlp", layer)) for layer in (0, 1, 2)]
    with TraceDict(random_llama.model, layers, retain_input=True) as traces:
        logits = random_llama.logits(prompt)
    assert list(traces) == layers
    assert all(traces[layer].output.shape == traces[layer].input.shape for layer in layers)
    with TraceDict(
        random_llama, [Site("mlp", 0), Site("mlp", 2)], edit_output=lambda output, layer: output * layer.layer
    ):
        assert not torch.equal(random_llama.logits(prompt), logits)
    with TraceDict(random_llama, layers, stop=True) as traces, Trace(random_llama, Site("hidden", 2)) as later:
        random_llama.logits(prompt)
    assert all(traces[layer].output is not None for layer in layers)
    assert later.output is None


def test_failed_lookups_and_errors_leave_no_hook(random_llama, prompt):
    random_llama.logits(prompt)
    before = hooks(random_llama.model)
    with pytest.raises(ModelError, match="no module 'model.layers.0.mpl'"):
        TraceDict(random_llama.model, ["model.layers.0.mlp", "model.layers.0.mpl"])
    with pytest.raises(ModelError, match="needs a layer"):
        Trace(random_llama)

    def explode(output):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        with TraceDict(random_llama, [Site("mlp", 0), Site("mlp", 1)], edit_output=explode):
            random_llama.logits(prompt)
    with pytest.raises(KeyError):
        with Trace(random_llama, Site("mlp", 0), stop=True):
            raise KeyError("an error of the block's own is not swallowed")
    assert hooks(random_llama.model) == before


def test_paths_are_baukits(random_llama, prompt):
    if importlib.util.find_spec("baukit") is None:
        pytest.skip("baukit is not installed (it comes from a git repository and needs torchvision)")
    baukit = importlib.import_module("baukit")
    path = random_llama.path(Site("mlp", 1))
    with baukit.Trace(random_llama.model, path) as theirs, Trace(random_llama.model, path) as ours:
        random_llama.logits(prompt)
    assert torch.equal(theirs.output, ours.output)
