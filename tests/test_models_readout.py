"""The readout gives a model's own logits bit by bit, whatever scale and cap follow the output head; else it refuses."""

from dataclasses import replace

import pytest
import torch
import transformers
from exact_models import SIZES, assemble
from multrace import ModelError, VisionLanguageModel
from multrace.models import Family, capture

MODELS = {
    "Llama": ({}, {}),
    "Cohere": ({"logit_scale": 0.0625}, {"factor": 0.0625}),
    "Cohere2": ({"logit_scale": 0.3}, {"factor": 0.3}),
    "Granite": ({"logits_scaling": 3.7}, {"divisor": 3.7}),
    "Gemma2": ({"head_dim": 16, "final_logit_softcapping": 0.7}, {"cap": 0.7}),
    "Gemma3": ({"head_dim": 16, "final_logit_softcapping": 3.0}, {"cap": 3.0}),
    "MiniCPM3": (
        {
            "dim_model_base": 7,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
        },
        {"before": SIZES["hidden_size"] / 7},
    ),  # divides what its head reads
    "HyperCLOVAX": ({"logits_scaling": 0.21}, {"factor": 0.21}),  # the name by which Granite divides
}


def build(name: str, dtype: torch.dtype, **settings: object) -> VisionLanguageModel:
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **settings})).to(dtype)
    return assemble(model, Family(name=name, model_types=(), text_types=()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_readout_of_normed_states_is_the_models_own_logits(name, dtype):
    settings, operations = MODELS[name]
    vlm, ids = build(name, dtype, **settings), torch.arange(3, 12)[None]
    assert {key: value for key, value in vars(vlm.after_head).items() if value is not None} == operations
    with torch.no_grad(), capture(vlm, [vlm.final_norm]) as states:
        logits = vlm.logits({"input_ids": ids})
    with torch.no_grad():
        assert torch.equal(vlm.readout(states[vlm.final_norm]), logits)
        bare = vlm.output_head(states[vlm.final_norm])
    assert torch.equal(bare.to(logits.dtype), logits) == (not operations)


def test_a_scale_that_no_configuration_names_is_measured():
    vlm = build("Llama", torch.float64)

    def scaled(_module: object, _inputs: object, output: object) -> object:
        output.logits = output.logits * 1.7
        return output

    with vlm.model.register_forward_hook(scaled):
        assert replace(vlm).after_head.factor == 1.7  # measured anew


def test_anything_else_is_refused():
    vlm = build("Llama", torch.float32)

    def shifted(_module: object, _inputs: object, output: object) -> object:
        output.logits = output.logits + 1
        return output

    with (
        vlm.model.register_forward_hook(shifted),
        pytest.raises(ModelError, match="no answers can be read from states"),
    ):
        replace(vlm).readout(torch.zeros(1, vlm.hidden))
