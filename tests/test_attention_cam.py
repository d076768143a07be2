"""LLaVA-CAM: heat of image tokens by layer, against one hand-placed backward pass per layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.artefacts import ArtefactError
from multrace.models import Site
from multrace.tracing import RelevanceMap, TraceError, llava_cam
from PIL import Image
from result_checks import assert_same, assert_shown, colours, svg
from torch import Tensor, nn

QUESTION, ANSWER = "Who founded the company in this photo?", "Ada Example"
NORMS = {"llava_llama": "post_attention_layernorm", "llava_phi": "input_layernorm"}


@pytest.fixture(params=NORMS)
def exact_seeing(request: pytest.FixtureRequest, load_double: Callable, exact: None) -> VisionLanguageModel:
    """Each family that sees, in true float64."""
    return load_double(request.getfixturevalue(f"{request.param}_path"))


def cam(vlm: VisionLanguageModel, prompt: Prompt, **settings: object) -> RelevanceMap:
    return llava_cam(vlm, prompt, **{"answer": ANSWER, "progress": False} | settings)


def slow_heat(vlm: VisionLanguageModel, prompt: Prompt, layer: int) -> Tensor:
    """(image token,): the heat by a pass of its own, in which the layer's norm is replaced by a leaf of the graph."""
    leaves = []

    def replace_output(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().clone().requires_grad_())
        return leaves[-1]

    norm = vlm.module(Site("hidden", layer)).get_submodule(NORMS[vlm.family.name])
    handle = norm.register_forward_hook(replace_output)
    logits = vlm.logits(prompt.with_answer(ANSWER))[0]
    handle.remove()
    start = prompt.groups["last"][0]
    total = sum(logits[start + step, token] for step, token in enumerate(prompt.with_answer(ANSWER).answer_ids))
    (leaf,) = leaves
    gradients = torch.autograd.grad(total, leaf, allow_unused=True)[0]
    gradients = torch.zeros_like(leaf) if gradients is None else gradients
    heat = torch.zeros(len(prompt.groups["image"]), dtype=torch.float64)
    for channel in range(vlm.hidden):
        weight = sum(max(float(gradients[0, place, channel]), 0.0) for place in prompt.groups["image"]) / len(heat)
        heat += weight * leaf[0, list(prompt.groups["image"]), channel].detach()
    return heat.clamp(min=0)


def noised(prompt: Prompt, sigma: float, seed: int, count: int) -> list[Prompt]:
    generator, pixels = torch.Generator().manual_seed(seed), prompt.inputs["pixel_values"]
    copies = []
    for _ in range(count):
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        copies.append(replace(prompt, inputs={**prompt.inputs, "pixel_values": pixels + sigma * noise}))
    return copies


def test_all_layers_at_once_give_what_one_backward_pass_per_layer_gives(exact_seeing, photo):
    prompt = exact_seeing.prompt(photo, QUESTION)
    found = cam(exact_seeing, prompt)
    assert found.heat.shape == (exact_seeing.layers, 16) and found.heat.dtype == torch.float64
    assert len(found.answer_ids) > 1
    for layer in range(exact_seeing.layers):
        slow = slow_heat(exact_seeing, prompt, layer)
        assert torch.allclose(found.heat[layer], slow, rtol=1e-9, atol=1e-14), layer
    assert not torch.allclose(found.heat[0], found.heat[1], rtol=0.1)


def test_several_pictures_share_the_weights_and_the_maximum(exact_seeing, photo, other_photo):
    prompt = exact_seeing.prompt([photo, other_photo], QUESTION)
    found = cam(exact_seeing, prompt, layers=[1])
    assert torch.allclose(found.heat[0], slow_heat(exact_seeing, prompt, 1), rtol=1e-9, atol=1e-14)
    first, second = (float(half.max()) for half in found.normalised[0].split(16))
    assert max(first, second) == 1.0 and min(first, second) < 1.0


def test_what_cannot_reach_the_answer_has_no_heat_and_says_so(random_llava, photo):
    found = cam(random_llava, random_llava.prompt(photo, QUESTION))
    last = random_llava.layers - 1
    # Attention reads the same norm in a parallel layer, so there the last one still reaches the answer.
    assert found.silent_layers == (() if random_llava.family.parallel else (last,))
    for layer, heat in enumerate(found.normalised):
        assert heat.isfinite().all() and heat.min() >= 0
        assert float(heat.max()) == (0.0 if layer in found.silent_layers else 1.0)


def test_the_answer_is_the_models_own_unless_another_is_given(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    own = llava_cam(random_llava, prompt, progress=False)
    said = random_llava.answers([prompt])[0]
    assert own.answer == said and own.answer_ids == prompt.with_answer(said).answer_ids
    assert torch.equal(own.heat, cam(random_llava, prompt, answer=said).heat)
    assert not torch.allclose(own.heat, cam(random_llava, prompt, answer="red").heat, rtol=0.01)
    carried = cam(random_llava, prompt.with_answer("red"))  # an answer that the prompt carries plays no part
    assert torch.equal(carried.heat, cam(random_llava, prompt).heat)
    assert carried.input_ids == own.input_ids == tuple(prompt.inputs["input_ids"][0].tolist())


def test_chosen_layers_are_rows_of_the_whole_map(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    whole, some = cam(random_llava, prompt), cam(random_llava, prompt, layers=(2, -4, 2))
    assert some.layers == (2, random_llava.layers - 4)
    assert torch.allclose(some.heat, whole.heat[list(some.layers)], rtol=1e-5)
    with pytest.raises(ModelError, match="no layer 99"):
        cam(random_llava, prompt, layers=[99])


def test_smoothing_without_noise_is_the_plain_map(exact_seeing, photo):
    prompt = exact_seeing.prompt(photo, QUESTION)
    plain, still = cam(exact_seeing, prompt), cam(exact_seeing, prompt, samples=5, noise=0.0)
    assert torch.allclose(still.heat, plain.heat, rtol=1e-10, atol=1e-14)
    assert (plain.samples, plain.noise, plain.seed) == (0, None, None) and (still.samples, still.noise) == (5, 0.0)


def test_smoothing_is_the_mean_over_noisy_copies(exact_seeing, photo):
    prompt = exact_seeing.prompt(photo, QUESTION)
    smooth = cam(exact_seeing, prompt, samples=5, noise=0.5, seed=3)  # more copies than share a pass
    one_by_one = [cam(exact_seeing, copy).heat for copy in noised(prompt, 0.5, 3, 5)]
    assert torch.allclose(smooth.heat, torch.stack(one_by_one).mean(0), rtol=1e-9, atol=1e-14)
    assert not torch.allclose(smooth.heat, cam(exact_seeing, prompt).heat, rtol=0.01)


def test_noise_keeps_the_clean_answer_and_its_seed(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    settings = {"answer": None, "samples": 2, "noise": 3.0}
    first, again, other = (cam(random_llava, prompt, seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first.heat, again.heat) and first.seed == 1
    assert not torch.allclose(first.heat, other.heat, rtol=0.01)
    assert first.answer == random_llava.answers([prompt])[0]


def test_the_threshold_removes_weak_heat_only(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    whole, cut = cam(random_llava, prompt), cam(random_llava, prompt, threshold=0.5)
    assert torch.equal(whole.heat, cut.heat)
    strong = whole.normalised >= 0.5
    assert torch.equal(cut.normalised[strong], whole.normalised[strong]) and not cut.normalised[~strong].any()
    assert whole.normalised[~strong].any()


def test_the_model_is_left_as_it_was(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    before = random_llava.logits(prompt)
    with torch.no_grad():  # gradients are taken all the same
        assert cam(random_llava, prompt).heat.any()
    assert torch.equal(random_llava.logits(prompt), before)
    assert all(weight.grad is None and not weight.requires_grad for weight in random_llava.model.parameters())
    assert not any(part._forward_pre_hooks for part in random_llava.module(Site("hidden", 0)).modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": -1}, "samples=0 for the picture itself"),
        ({"noise": -0.1}, "pass one of at least 0"),
        ({"noise": float("nan")}, "pass one of at least 0"),
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"layers": ()}, "layers=None for all"),
    ],
)
def test_settings_out_of_range_are_refused(random_llava_llama, photo, settings, message):
    with pytest.raises(TraceError, match=message):
        cam(random_llava_llama, random_llava_llama.prompt(photo, QUESTION), **settings)


def test_a_prompt_without_a_picture_is_told_to_get_one(random_vlm):
    with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image to the prompt"):
        cam(random_vlm, random_vlm.prompt(None, QUESTION))


@pytest.fixture
def smoothed(random_llava_llama: VisionLanguageModel, photo: Image.Image) -> tuple[RelevanceMap, Prompt]:
    """A map with every setting, and its prompt."""
    prompt = random_llava_llama.prompt(photo, QUESTION)
    return cam(random_llava_llama, prompt, samples=2, seed=5, threshold=0.25), prompt


def test_a_saved_map_comes_back_whole(smoothed, tmp_path):
    found, _ = smoothed
    again = RelevanceMap.load(found.save(tmp_path / "map.safetensors"))
    assert_same(again, found)
    assert_shown(found)
    replace(found, layers=(0,)).save(tmp_path / "torn.safetensors")
    with pytest.raises(ArtefactError, match="another shape than its layers"):
        RelevanceMap.load(tmp_path / "torn.safetensors")


def test_the_table_has_a_line_per_layer_and_image_token(smoothed):
    found, prompt = smoothed
    table = found.to_dataframe()
    assert len(table) == found.heat.numel()
    line = table.query("layer == 1 and row == 2 and column == 3").iloc[0]
    index = [(patch.row, patch.column) for patch in prompt.patches].index((2, 3))
    assert (line["heat"], line["normalised"]) == (float(found.heat[1, index]), float(found.normalised[1, index]))
    assert line["position"] == prompt.patches[index].position
    assert set(replace(found, patches=()).to_dataframe()["row"]) == {-1}


def drawn(figure: Figure, layers: Sequence[int]) -> list[bool]:
    """Whether each layer is named in a figure."""
    text = svg(figure)
    return [f"<!-- layer {layer}" in text for layer in layers]


def test_plots_show_every_layer_and_overlays_the_asked_ones(smoothed, tmp_path):
    found, prompt = smoothed
    assert all(drawn(found.plot(), found.layers)) and "(no heat)" in svg(found.plot())
    assert drawn(found.overlay(prompt, layers=[2]), found.layers) == [layer == 2 for layer in found.layers]
    spread = found.overlay(prompt, tmp_path / "spread.svg")
    assert sum(drawn(spread, found.layers)) == min(4, len(found.layers) - 1)  # the last has no heat
    assert "<!-- layer 0" in (tmp_path / "spread.svg").read_text()
    gridless = replace(found, patches=())
    assert colours(gridless.plot()) > 10
    with pytest.raises(TraceError, match="no grid of patches"):
        gridless.overlay(prompt)


def test_overlays_of_other_prompts_or_layers_are_refused(smoothed, random_llava_llama, photo, tmp_path):
    found, prompt = smoothed
    with pytest.raises(TraceError, match="of another prompt"):
        found.overlay(random_llava_llama.prompt(photo, "What colour is the emblem?"), tmp_path / "over.png")
    for layers in ((), (17,)):
        with pytest.raises(TraceError, match="pass some of 0, 1"):
            found.overlay(prompt, tmp_path / "over.png", layers=layers)
    assert list(tmp_path.iterdir()) == []
