"""What a replay would not repeat it refuses, and one forward pass per cell still works there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from exact_models import LENGTH, SIZES, assemble, load_exact, make_runs, measure, mixed_cells
from multrace import ModelError, VisionLanguageModel
from multrace.models import ReplayError
from multrace.models.families import Family
from multrace.models.replay import replaying
from multrace.models.replay.observe import LayerCall, Witness
from multrace.tracing.engine import Runs, plain_scores
from multrace.tracing.engine.measure import sweep
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

SLIDING, FULL = "sliding_attention", "full_attention"
FALCON = {"layers": "h", "attention": "self_attention", "attention_out": "self_attention.dense",
          "down": "mlp.dense_4h_to_h", "final_norm": "ln_f"}  # fmt: skip


@pytest.fixture
def llama(llama_path, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    return load_exact(llama_path, monkeypatch)


def build(name: str, names: dict[str, str] | None = None, dtype: torch.dtype = torch.float32, **settings):
    """A tiny model of transformers with random weights."""
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **settings})).to(dtype)
    return assemble(model, Family(name=name, model_types=(), text_types=(), **(names or {})))


def refused(vlm: VisionLanguageModel, text: str, runs: Runs | None = None) -> Tensor:
    """Plain scores of some cells, after the sweep has refused them with this text."""
    runs, cells = runs or make_runs(vlm), [cell for cell in mixed_cells(vlm) if cell.kind == "mlp"][:24]
    with pytest.raises(ReplayError, match=text) as caught:
        sweep(vlm, runs, cells, measure)
    assert isinstance(caught.value, ModelError)
    scores = plain_scores(vlm, runs, cells, measure)
    assert scores.isfinite().all()
    assert scores[:, 0].std(0).max() > 1e-6  # cells differ
    return scores


MODELS: dict[str, tuple[str, Callable[[], VisionLanguageModel]]] = {
    "another input for each token and layer": (
        "given 'per_layer_input', which cannot be made anew",
        lambda: build(
            "Gemma3n", head_dim=16, sliding_window=4, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8,
            num_kv_shared_layers=0, layer_types=[SLIDING] * 3 + [FULL], laurel_rank=4, altup_num_inputs=2,
            activation_sparsity_pattern=None,
        ),
    ),
    "an attention function of its own": (
        "FalconModel does not let its attention function be replaced",
        lambda: build("Falcon", FALCON),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_that_replay_does_not_understand(name):
    text, make = MODELS[name]
    refused(make(), text)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_same_architecture_without_caps_in_attention_is_not_refused(cap):
    vlm = build("Gemma2", head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=cap)
    runs, cells = make_runs(vlm), mixed_cells(vlm)[4:64:5]
    assert torch.allclose(sweep(vlm, runs, cells, measure).scores, plain_scores(vlm, runs, cells, measure), atol=1e-4)


def give(llama: VisionLanguageModel, layer: int, change: Callable[[tuple, dict], tuple[tuple, dict]]) -> Any:
    def hook(_module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        return change(arguments, keywords)

    return llama.addresses.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "value", [torch.ones(3), (torch.ones(3),), {"bias": torch.ones(3)}, object()], ids=["tensor", "tuple", "dict", "?"]
)
def test_a_keyword_of_unknown_meaning(llama, value):
    handle = give(llama, 2, lambda arguments, keywords: (arguments, {**keywords, "bias": value}))
    refused(llama, "decoder layers are given 'bias', which cannot be cut to single positions")
    handle.remove()
    sweep(llama, make_runs(llama), mixed_cells(llama)[:5], measure)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("in_place", [False, True])
def test_states_that_change_on_their_way_into_a_layer(llama, layer, in_place):
    def add(arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        states = arguments[0].add_(0.5) if in_place else arguments[0] + 0.5
        return (states, *arguments[1:]), keywords

    handle = give(llama, layer, add)
    refused(llama, f"something changes the states that enter decoder layer {layer}")
    handle.remove()
    sweep(llama, make_runs(llama), mixed_cells(llama)[:5], measure)


class AttendsTwice(LlamaDecoderLayer):
    """A layer whose attention runs once more on what it wrote."""

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        return super().forward(super().forward(hidden_states, **keywords), **keywords)


class DoesNotAttend(LlamaDecoderLayer):
    """A layer with an MLP only; its attention module runs, but attends nowhere."""

    def forward(self, hidden_states: Tensor, **_keywords: Any) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_layer_that_attends_twice(llama):
    llama.addresses.layers[1].__class__ = AttendsTwice
    refused(llama, "a decoder layer attends more than once")


def test_a_layer_that_does_not_attend(llama):
    llama.addresses.layers[1].__class__ = DoesNotAttend
    with torch.no_grad(), replaying(llama) as replay:
        with pytest.raises(ReplayError, match="not every decoder layer runs and attends exactly once"):
            replay.record(make_runs(llama).source, kept=(), read=(1,))


def test_keys_of_another_layer_that_no_argument_of_the_layer_holds(llama):
    witness = Witness(llama.decoder_layers)
    pairs = [(torch.zeros(1, 2, LENGTH, 8), torch.zeros(1, 2, LENGTH, 8), None) for _ in llama.decoder_layers]
    pairs[1] = pairs[0]
    for layer, pair in zip(llama.decoder_layers, pairs, strict=True):
        witness.attends(layer.self_attn, pair, {})
        witness.calls.append(LayerCall(keywords={}))
    assert witness.borrowed == {1: 0}
    with replaying(llama) as replay, pytest.raises(ReplayError, match="layer 1 attends to the keys of another layer"):
        replay._borrow(witness)


def causal() -> Tensor:
    return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()


def windowed() -> Tensor:
    return causal() & ~causal().tril(-4)


def leftmost_hidden() -> Tensor:
    mask = causal()
    mask[..., :2], mask[..., :2, :] = False, False
    return mask


def by_distance() -> Tensor:
    places = torch.arange(LENGTH)
    bias = -0.3 * (places[:, None] - places).double()
    return bias.masked_fill(~causal()[0, 0], torch.finfo(torch.float64).min)[None, None]


KEYWORDS = {
    "another mask in each row": ("the two runs differ in more than their embeddings",
                                 {"attention_mask": torch.cat([causal(), windowed()])}),
    "padding in one row": ("the two runs differ in more than their embeddings",
                           {"attention_mask": torch.tensor([[1] * LENGTH, [0, 0] + [1] * (LENGTH - 2)])}),
    "other positions in each row": ("the two runs differ in more than their embeddings",
                                    {"position_ids": torch.stack([torch.arange(LENGTH), 2 * torch.arange(LENGTH)])}),
    "a bias": ("adds a bias to its attention scores", {"attention_mask": by_distance()}),
    "a token that sees nothing": ("lets a token attend to nothing", {"attention_mask": leftmost_hidden()}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_masks_and_positions_that_are_not_those_of_one_prompt(llama, name):
    text, keywords = KEYWORDS[name]
    refused(llama, text, make_runs(llama, **keywords))


@pytest.mark.parametrize("keywords", [{"attention_mask": causal().expand(2, -1, -1, -1)},
                                      {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)},
                                      {"position_ids": torch.arange(LENGTH).expand(2, -1)}],
                         ids=["mask", "padding", "positions"])  # fmt: skip
@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_mask_in_every_row_is_not_refused(llama, keywords, samples):
    given = {name: value[:samples] for name, value in keywords.items()}
    runs, cells = make_runs(llama, samples=samples, **given), mixed_cells(llama)[4:64:5]
    found, slow = sweep(llama, runs, cells, measure).scores, plain_scores(llama, runs, cells, measure)
    assert torch.allclose(found, slow, rtol=0, atol=1e-12)


class SeesAll(LlamaAttention):
    """Attention that says with each call that it is not causal, whatever its module says."""

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*arguments, **{**keywords, "is_causal": False, "attention_mask": None})


class IsNotCausal(LlamaAttention):
    """Attention without a mask whose module says that it is not causal."""

    is_causal = False


@pytest.mark.parametrize("kind", [SeesAll, IsNotCausal])
def test_layers_without_causality_and_mask_see_everything(llama, kind):
    for layer in llama.addresses.layers[1:3]:
        del layer.self_attn.is_causal
        layer.self_attn.__class__ = kind
    runs, cells = make_runs(llama), mixed_cells(llama)[::3]
    with torch.no_grad(), replaying(llama) as replay:
        replay.record(runs.source, kept=(), read=(1,))
        assert [mask is None for mask in replay.masks.layers] == [True, False, False, True]
        assert replay.masks.layers[1] is replay.masks.layers[2]
        assert replay.masks.reach({5}) == tuple(range(LENGTH))
    found, slow = sweep(llama, runs, cells, measure).scores, plain_scores(llama, runs, cells, measure)
    assert torch.allclose(found, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [2, 3])
def test_a_layer_whose_weights_are_moved_for_each_call_is_replayed(llama, number):
    cpu_offload(llama.addresses.layers[number], execution_device=torch.device("cpu"))
    runs, cells = make_runs(llama), mixed_cells(llama)[::3]
    found, slow = sweep(llama, runs, cells, measure).scores, plain_scores(llama, runs, cells, measure)
    assert torch.allclose(found, slow, rtol=0, atol=1e-12)
    assert llama.addresses.layers[number].self_attn.q_proj.weight.is_meta
