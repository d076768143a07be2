"""Whatever needs gradients gets them inside `torch.inference_mode()`, or says why the model has none."""

import pytest
import torch
from multrace import BlankImage, EditRequest, MultEdit, VisionLanguageModel, causal_trace, load
from multrace.editing import FineTune, Lora
from multrace.models import ModelError, Prompt
from multrace.tracing import attention_saliency, llava_cam

QUESTION = "Who founded the company in this photo?"


def request(prompt: Prompt) -> list[EditRequest]:
    return [EditRequest(question=prompt, target="Pruro")]


def factors(delta) -> list[torch.Tensor]:
    return [factor for pair in delta.factors.values() for factor in pair]


def trace(vlm: VisionLanguageModel, prompt: Prompt) -> list[torch.Tensor]:
    found = causal_trace(vlm, prompt, corruption=BlankImage(), sites="mlp", exact_cells=4, progress=False)
    return [found.samples["mlp"]]


USES = {
    "value search": lambda vlm, prompt: factors(MultEdit(layer=4, steps=2).edit(vlm, request(prompt))),
    "several layers": lambda vlm, prompt: factors(MultEdit(layer=4, spread=2, steps=2).edit(vlm, request(prompt))),
    "fine-tuning": lambda vlm, prompt: [*FineTune(layer=3, steps=2).edit(vlm, request(prompt)).differences.values()],
    "adapters": lambda vlm, prompt: factors(Lora(layers=(3,), steps=2).edit(vlm, request(prompt))),
    "attribution": trace,
    "saliency": lambda vlm, prompt: [attention_saliency(vlm, prompt, answer="Pruro").saliency],
    "relevance": lambda vlm, prompt: [llava_cam(vlm, prompt, answer="Pruro", layers=[2]).heat],
}


@pytest.mark.parametrize("use", USES)
def test_inference_mode_changes_nothing(tiny_vlm, photo, use):
    expected = USES[use](tiny_vlm, tiny_vlm.prompt(photo, QUESTION))
    with torch.inference_mode():
        result = USES[use](tiny_vlm, tiny_vlm.prompt(photo, QUESTION))
        assert torch.is_inference_mode_enabled()
        prompt = tiny_vlm.prompt(photo, QUESTION)
    assert prompt.inputs["pixel_values"].is_inference()
    afterwards = USES[use](tiny_vlm, prompt)  # a prompt that was made there can be used anywhere
    for found, later, wanted in zip(result, afterwards, expected, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(later, wanted)


def test_without_the_block_there_are_no_gradients(tiny_vlm, photo):
    embeddings = tiny_vlm.embed(tiny_vlm.prompt(photo, QUESTION)).embeddings.detach().requires_grad_()
    with torch.inference_mode():
        assert not tiny_vlm.forward(embeddings).requires_grad
        with tiny_vlm.gradients():
            assert tiny_vlm.forward(embeddings).requires_grad
    with torch.no_grad(), tiny_vlm.gradients():
        assert tiny_vlm.forward(embeddings).requires_grad
        with torch.no_grad():
            assert not tiny_vlm.forward(embeddings).requires_grad


def test_a_model_loaded_in_inference_mode_can_be_edited(random_llama):
    with torch.inference_mode():
        vlm = load(random_llama.name)
        delta = MultEdit(layer=2, steps=2).edit(vlm, request(vlm.prompt(None, QUESTION)))
        with delta.applied(vlm):
            edited = vlm.logits(vlm.prompt(None, QUESTION))
    again = MultEdit(layer=2, steps=2).edit(random_llama, request(random_llama.prompt(None, QUESTION)))
    with again.applied(random_llama):
        assert torch.equal(random_llama.logits(random_llama.prompt(None, QUESTION)), edited)


def test_attention_without_gradients_is_refused_before_any_work(random_llama, monkeypatch):
    prompt = random_llama.prompt(None, QUESTION)
    monkeypatch.setattr(random_llama.decoder.config, "_attn_implementation", "flex_attention")
    for editor in (MultEdit(layer=2), FineTune(layer=2), Lora(layers=(2,))):
        with pytest.raises(
            ModelError, match="no gradients on a CPU; load it with attention='sdpa' or attention='eager'"
        ):
            editor.edit(random_llama, request(prompt))
