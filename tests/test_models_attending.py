"""Recording what attention did: weights and values at some queries, the pass itself unchanged."""

from collections.abc import Callable, Sequence
from typing import Any

import multrace
import pytest
import torch
import transformers
from exact_models import LENGTH, SIZES, assemble, close, make_runs
from multrace import ModelError, VisionLanguageModel
from multrace.models import Prompt, ReplayError, collate
from multrace.models.families import Family
from multrace.models.replay import Attention, attending, attention_function, masking
from other_families import NO_PLAIN_SOFTMAX, make
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

QUESTION, QUERIES = "Who founded the company in this photo?", (-1, 3, -4)


def prompt_of(vlm: VisionLanguageModel, photo: Image.Image) -> Prompt:
    return vlm.prompt(photo if vlm.has_vision else None, QUESTION)


def record(vlm: VisionLanguageModel, prompt: Prompt, queries: Sequence[int]) -> tuple[list[Attention], Tensor]:
    with torch.no_grad(), attending(vlm, queries) as seen:
        logits = vlm.logits(prompt)
    return seen, logits


def traces_left(vlm: VisionLanguageModel) -> tuple[Any, ...]:
    """What a block may leave behind: hooks, names of attention functions, and what each part attends with."""
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in vlm.model.modules()]
    names = [set(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    return hooks, names, [part.config._attn_implementation for part in vlm.model.modules() if hasattr(part, "config")]


@pytest.fixture(scope="session", params=["llava_llama", "llava_phi", "llama", "gpt2"])
def eager_vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """Each family in turn, loaded with transformers' own eager attention."""
    return multrace.load(request.getfixturevalue(f"{request.param}_path"), attention="eager", verify=False)


def test_weights_are_those_of_transformers_own_eager_attention(eager_vlm, photo):
    vlm = multrace.load(eager_vlm.name, verify=False)
    prompt = prompt_of(vlm, photo)
    with torch.no_grad():
        expected = eager_vlm.model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    for model in (vlm, eager_vlm):  # whatever backend it was loaded with
        seen, _ = record(model, prompt, range(prompt.length))
        assert len(seen) == len(expected) == vlm.layers
        assert all(close(each.weights, weights, 2e-6) for each, weights in zip(seen, expected, strict=True))
        few, _ = record(model, prompt, QUERIES)
        assert all(
            close(each.weights, weights[:, :, list(QUERIES)], 2e-6) for each, weights in zip(few, expected, strict=True)
        )
    assert not close(expected[1], expected[2], 1e-2)  # a wrong layer would be noticed


def test_the_pass_is_the_same_as_without_the_block(exact_vlm, photo):
    prompt = prompt_of(exact_vlm, photo)
    with torch.no_grad():
        plain = exact_vlm.logits(prompt)  # transformers places hooks of its own in a model's first pass
    before = traces_left(exact_vlm)
    for queries in (QUERIES, range(prompt.length), range(prompt.length - 1, -1, -1)):
        seen, logits = record(exact_vlm, prompt, queries)
        assert close(logits, plain, 1e-12)
        assert all(close(each.weights.sum(-1), torch.ones(()).double(), 1e-14) for each in seen)
        where = [query % prompt.length for query in queries]
        later = torch.arange(prompt.length) > torch.tensor(where)[:, None]
        assert all(float(each.weights[..., later].abs().max()) == 0 for each in seen)  # nothing looks ahead
        sizes = exact_vlm.heads, len(queries), prompt.length
        assert all(each.weights.shape == (1, *sizes) and each.weights.dtype == torch.float64 for each in seen)
    assert traces_left(exact_vlm) == before


@torch.no_grad()
def test_a_later_pass_writes_the_list_anew(random_vlm, photo):
    first, other = prompt_of(random_vlm, photo), random_vlm.prompt(None, "What colour?")
    with attending(random_vlm, [-1]) as seen:
        random_vlm.logits(first)
        assert seen[0].weights.shape[-1] == first.length
        random_vlm.logits(other)
        assert len(seen) == random_vlm.layers and seen[0].weights.shape[-1] == other.length
    random_vlm.logits(first)
    assert seen[0].weights.shape[-1] == other.length  # after the block nothing is recorded


def nudging(layer: nn.Module, place: tuple[int, ...], amount: float) -> Callable[..., tuple[Tensor, None]]:
    """An attention function in plain words, which in one layer adds an amount to one weight."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * given["scaling"]
        weights = scores.masked_fill(hidden if mask is None else ~mask, -torch.inf).softmax(-1)
        if any(module is part for part in layer.modules()):
            weights[place] += amount
        return torch.einsum("bhqk,bhkd->bqhd", weights, value), None

    return attend


@pytest.mark.parametrize("number", [0, 2])
def test_gradients_by_weights_are_finite_differences(exact_vlm, photo, number):
    prompt, head, key, token = prompt_of(exact_vlm, photo), 3, 5, 7
    query = prompt.length - 1
    with attending(exact_vlm, [3, query]) as seen:
        score = exact_vlm.logits(prompt)[0, -1, token]
    gradients = torch.autograd.grad(score, [each.weights for each in seen])
    assert all(float(each[:, :, 1].abs().max()) > 1e-6 for each in gradients)
    step, scores = 1e-5, []
    for amount in (step, -step):
        attend = nudging(exact_vlm.addresses.layers[number], (0, head, query, key), amount)
        with torch.no_grad(), attention_function(exact_vlm, attend):
            scores.append(exact_vlm.logits(prompt)[0, -1, token])
    slope = float(scores[0] - scores[1]) / (2 * step)
    assert float(gradients[number][0, head, 1, key]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert slope != pytest.approx(float(gradients[number][0, head, 1, key - 1]), rel=1e-3)


@torch.no_grad()
def test_without_gradients_nothing_is_kept_for_them(random_llama):
    seen, _ = record(random_llama, random_llama.prompt(None, QUESTION), [-1])
    assert not any(each.weights.requires_grad for each in seen)


@torch.no_grad()
def test_rows_of_a_padded_batch_are_those_of_each_prompt_alone(random_vlm):
    prompts = [random_vlm.prompt(None, text) for text in (QUESTION, "What colour?")]
    inputs, offsets = collate(prompts, random_vlm.tokenizer)
    with attending(random_vlm, [-1, -2]) as seen:
        random_vlm.logits(inputs)
    for row, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
        alone, _ = record(random_vlm, prompt, [-1, -2])
        for batched, single in zip(seen, alone, strict=True):
            assert close(batched.weights[row, ..., offset:], single.weights[0], 1e-5)
            assert float(batched.weights[row, ..., :offset].abs().sum()) == 0
    assert offsets[1] > 0
    with attending(random_vlm, [0]), pytest.raises(ReplayError, match="may attend to nothing at all; leave out pad"):
        random_vlm.logits(inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_of_one_s_own_are_kept(llava_llama_path, attention):
    vlm = multrace.load(llava_llama_path, attention=attention, verify=False)
    embeddings = torch.randn(1, LENGTH, vlm.hidden, generator=torch.Generator().manual_seed(1))
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-4)
    plain = vlm.forward(embeddings, attention_mask=window)
    with attending(vlm, [LENGTH - 1, 2]) as seen:
        found = vlm.forward(embeddings, attention_mask=window)
        weights = seen[1].weights
        wide = vlm.forward(embeddings, attention_mask=causal)
    assert close(found, plain, 1e-4)
    assert not close(wide, plain, 1e-2)
    assert float(weights[:, :, 0, : LENGTH - 4].abs().sum()) == 0
    assert float(weights[:, :, 0, LENGTH - 4 :].min()) > 0


def test_half_precision_is_weighed_in_single(llava_llama_path, photo):
    vlm = multrace.load(llava_llama_path, dtype="bfloat16", verify=False)
    prompt = vlm.prompt(photo, QUESTION)
    with torch.no_grad():
        plain = vlm.logits(prompt)
    seen, logits = record(vlm, prompt, range(prompt.length))
    assert seen[0].weights.dtype == torch.float32 and seen[0].values.dtype == torch.bfloat16
    assert close(seen[0].weights.sum(-1), torch.ones(()), 1e-6)
    assert close(logits, plain, 5e-2 * float(plain.abs().max()))


def test_errors_leave_the_model_as_it_was(random_llava, photo):
    prompt, before = random_llava.prompt(photo, QUESTION), traces_left(random_llava)
    with pytest.raises(KeyError, match="mine"), attending(random_llava, [-1]):
        assert traces_left(random_llava) != before
        raise KeyError("mine")
    assert traces_left(random_llava) == before
    for queries, text in (((), "at least one"), ((3, 3), "each only once")):
        with pytest.raises(ModelError, match=text), attending(random_llava, queries):
            pass
    for queries, text in (((500,), "no query 500 in a pass over"), ((-1, prompt.length - 1), "a query twice")):
        with pytest.raises(ModelError, match=text):
            record(random_llava, prompt, queries)
    assert traces_left(random_llava) == before


def build(name: str, names: dict[str, str] | None = None, **settings: Any) -> VisionLanguageModel:
    """A tiny model of transformers with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return assemble(model, Family(name=name, model_types=(), text_types=(), **(names or {})))


REFUSED = {
    "an attention function of its own": (
        "FalconModel does not let its attention function be replaced",
        lambda: build("Falcon", {"layers": "h", "attention": "self_attention", "final_norm": "ln_f"}),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_attention_that_is_no_plain_softmax_is_refused(name):
    text, build_it = REFUSED[name]
    vlm = build_it()
    embeddings = make_runs(vlm).base
    with pytest.raises(ReplayError, match=text), attending(vlm, [-1]):
        vlm.forward(embeddings)
    vlm.forward(embeddings)


@pytest.mark.parametrize("name", NO_PLAIN_SOFTMAX)
@torch.no_grad()
def test_caps_sinks_and_values_of_another_size_are_recorded(name, monkeypatch):
    vlm = make(name, monkeypatch)
    vlm.decoder.config._attn_implementation = "eager"  # transformers hands out the weights of no other
    embeddings, weights = make_runs(vlm).source, []
    for layer in vlm.decoder_layers:
        layer.self_attn.register_forward_hook(lambda _module, _arguments, output: weights.append(output[1]))
    plain, expected = vlm.forward(embeddings), [*weights]
    for queries in ([-1, 3], range(LENGTH)):
        with attending(vlm, queries) as seen:
            assert close(vlm.forward(embeddings), plain)
        assert len(seen) == len(expected) == vlm.layers
        assert all(close(each.weights, own[:, :, queries]) for each, own in zip(seen, expected, strict=True))
    left = 1 - torch.stack([each.weights.sum(-1) for each in seen])
    assert (float(left.max()) > 0.1) == ("sinks" in name) and float(left.min()) > -1e-12


@pytest.mark.parametrize("name", ["GPT-J, a method for attention", "GPT-Neo, a method with windows"])
@torch.no_grad()
def test_a_method_that_attends_is_replaced_and_put_back(name, monkeypatch):
    vlm = make(name, monkeypatch)
    embeddings, weights = make_runs(vlm).source, []
    inside = [part for layer in vlm.decoder_layers for part in layer.modules() if hasattr(part, "_attn")]
    for part in inside:
        part.register_forward_hook(lambda _module, _arguments, output: weights.append(output[1]))
    plain, expected = vlm.forward(embeddings), [*weights]
    with attending(vlm, range(LENGTH)) as seen:
        assert close(vlm.forward(embeddings), plain)
    assert all(close(each.weights, own) for each, own in zip(seen, expected, strict=True))
    assert len(seen) == len(inside) == vlm.layers and not any("_attn" in vars(part) for part in inside)
    hidden = torch.zeros(1, LENGTH, LENGTH, dtype=torch.bool)
    hidden[:, -1, 3] = True
    with masking(vlm, {1: hidden}), attending(vlm, [-1]):
        masked = vlm.forward(embeddings)
    assert close(masked, plain)  # the block inside attends anew
    with masking(vlm, {2: hidden}):
        masked = vlm.forward(embeddings)
    assert close(masked[:, :-1], plain[:, :-1]) and not close(masked[:, -1], plain[:, -1], 1e-4)


def test_a_method_that_is_no_softmax_is_refused(monkeypatch):
    vlm = make("GPT-J, a method for attention", monkeypatch)
    kind = type(vlm.decoder_layers[0].attn)
    own = kind._attn
    monkeypatch.setattr(kind, "_attn", lambda self, *given: tuple(part * 1.1 for part in own(self, *given)))
    for text in ("the attention of GPTJAttention is no softmax", "GPTJAttention cannot be called by itself"):
        with pytest.raises(ReplayError, match=text), attending(vlm, [-1]):
            vlm.forward(make_runs(vlm).base)
        monkeypatch.setattr(kind, "_attn", lambda self, query: query)


@torch.no_grad()
def test_cached_keys_layers_that_do_not_attend_and_dropout_are_refused(llama_path):
    vlm = multrace.load(llama_path, verify=False)
    prompt = vlm.prompt(None, QUESTION)
    with attending(vlm, [-1]), pytest.raises(ReplayError, match="run it without a cache"):
        vlm.model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    vlm.model.config.attention_dropout = 0.5
    for layer in vlm.addresses.layers:
        layer.self_attn.attention_dropout = 0.5
    vlm.model.train()
    with attending(vlm, [-1]) as seen:
        vlm.logits(prompt)  # runs in eval mode all the same
        assert len(seen) == vlm.layers
        vlm.model.train()
        with pytest.raises(ReplayError, match="drops attention weights at random"):
            vlm.model(**prompt.inputs)  # a call past the model's face, in train mode
    vlm.model.eval()
    vlm.addresses.layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with attending(vlm, [-1]), pytest.raises(ReplayError, match="attends out of turn"):
        vlm.logits(prompt)
    vlm.addresses.layers[3].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with attending(vlm, [-1]), pytest.raises(ReplayError, match="not every decoder layer runs and attends"):
        vlm.logits(prompt)
