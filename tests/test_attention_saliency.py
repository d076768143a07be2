"""Attention x gradient saliency, against finite differences of the loss through an attention written out by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.artefacts import ArtefactError
from multrace.data import World
from multrace.models.replay import attention_function
from multrace.tracing import AttentionSaliency, TraceError, attention_saliency
from PIL import Image
from result_checks import assert_same, assert_shown, colours, svg
from torch import Tensor, nn

QUESTION, ANSWER = "Who founded the company in this photo?", "Ada Example"


@pytest.fixture(params=["llava_llama", "llava_phi"])
def exact_seeing(request: pytest.FixtureRequest, load_double: Callable, exact: None) -> VisionLanguageModel:
    """Each family that sees, in true float64."""
    return load_double(request.getfixturevalue(f"{request.param}_path"))


def scaled_loss(
    vlm: VisionLanguageModel, prompt: Prompt, edge: tuple[int, int, int], factor: float, tokens: int
) -> float:
    """Minus log probability of the answer's first tokens when one weight (layer, query, source) is scaled."""
    layer, query, source = edge
    numbers = {id(part): number for number, each in enumerate(vlm.addresses.layers) for part in each.modules()}

    def attend(
        module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, _mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        keys, values = (each.repeat_interleave(queries.shape[1] // each.shape[1], 1) for each in (keys, values))
        scores = queries @ keys.transpose(2, 3) * scaling
        weights = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
        if numbers[id(module)] == layer:
            weights[:, :, query, source] *= factor
        return (weights @ values).transpose(1, 2), None

    told = prompt.with_answer(ANSWER)
    with torch.no_grad(), attention_function(vlm, attend):
        logits = vlm.logits(told)[0]
    start = prompt.groups["last"][0]
    return -sum(
        float(logits[start + step].log_softmax(-1)[token]) for step, token in enumerate(told.answer_ids[:tokens])
    )


def slope(vlm: VisionLanguageModel, prompt: Prompt, edge: tuple[int, int, int], tokens: int) -> float:
    """How fast the loss changes with the weights of an edge in all heads, each in proportion to itself."""
    high, low = (scaled_loss(vlm, prompt, edge, 1 + step, tokens) for step in (1e-4, -1e-4))
    return abs(high - low) / 2e-4


@pytest.mark.parametrize("whole", [False, True])
def test_saliency_is_what_finite_differences_of_the_loss_say(exact_seeing, photo, whole):
    prompt = exact_seeing.prompt(photo, QUESTION)
    found = attention_saliency(exact_seeing, prompt, answer=ANSWER, whole_answer=whole)
    tokens = len(prompt.with_answer(ANSWER).answer_ids) if whole else 1
    assert len(found.answer_ids) == tokens and found.saliency.dtype == torch.float64
    assert found.loss == pytest.approx(scaled_loss(exact_seeing, prompt, (0, 0, 0), 1.0, tokens), rel=1e-12)
    image, question, last = prompt.groups["image"], prompt.groups["question"], prompt.groups["last"][0]
    for layer in range(exact_seeing.layers):
        for query, source in ((last, image[5]), (last, last), (question[3], image[0]), (question[-1], question[0])):
            expected = slope(exact_seeing, prompt, (layer, query, source), tokens)
            value = float(found.saliency[layer, found.queries.index(query), source])
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-10), (layer, query, source)


def test_no_edge_leads_backwards_nor_matters_where_nothing_reads_it(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    found = attention_saliency(random_llava, prompt, answer=ANSWER)
    assert found.queries == (*prompt.groups["question"], *prompt.groups["last"])
    assert found.saliency.shape == (random_llava.layers, len(found.queries), prompt.length)
    later = torch.arange(prompt.length) > torch.tensor(found.queries)[:, None]
    assert not found.saliency[:, later].any() and found.saliency[:, -1].gt(0).all()
    assert not found.saliency[-1, :-1].any()  # the last layer's other tokens reach no answer
    assert found.saliency[0, :-1].gt(0).any(-1).all()


def test_chosen_queries_are_rows_of_the_whole(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    everything = attention_saliency(random_llava, prompt, answer=ANSWER, queries="all")
    assert everything.queries == tuple(range(prompt.length))
    some = attention_saliency(random_llava, prompt, answer=ANSWER, queries=(-1, 3, "image"))
    rows = sorted({prompt.length - 1, 3, *prompt.groups["image"]})
    assert some.queries == tuple(rows)
    assert torch.allclose(some.saliency, everything.saliency[:, rows], rtol=1e-3, atol=1e-8)


def test_the_answer_is_the_models_own_unless_another_is_given(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    said = random_llava.answers([prompt])[0]
    own, given, other = (attention_saliency(random_llava, prompt, answer=each) for each in (None, said, "red"))
    assert torch.equal(own.saliency, given.saliency) and own.answer_ids == prompt.with_answer(said).answer_ids[:1]
    assert not torch.allclose(own.saliency, other.saliency, rtol=0.01)
    carried = attention_saliency(random_llava, prompt.with_answer("red"), answer=said)
    assert torch.equal(carried.saliency, own.saliency) and carried.input_ids == own.input_ids


def test_the_model_is_left_as_it_was(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    before = random_llava.logits(prompt)
    with torch.no_grad():  # gradients are taken all the same
        assert attention_saliency(random_llava, prompt).saliency.any()
    assert torch.equal(random_llava.logits(prompt), before)
    assert all(weight.grad is None for weight in random_llava.model.parameters())


def test_prompts_and_queries_that_make_no_sense_are_refused(random_vlm, random_llava_llama, photo):
    with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image to the prompt"):
        attention_saliency(random_vlm, random_vlm.prompt(None, QUESTION))
    prompt = random_llava_llama.prompt(photo, QUESTION, answer=ANSWER)
    with pytest.raises(TraceError, match="no tokens in group 'answer'"):
        attention_saliency(random_llava_llama, prompt, queries="answer")
    with pytest.raises(ModelError, match="no position"):
        attention_saliency(random_llava_llama, prompt, queries=prompt.length - 1)


@pytest.fixture
def found(random_llava_llama: VisionLanguageModel, photo: Image.Image) -> tuple[AttentionSaliency, Prompt]:
    """A saliency, and its prompt."""
    prompt = random_llava_llama.prompt(photo, QUESTION)
    return attention_saliency(random_llava_llama, prompt, answer=ANSWER), prompt


def test_flows_are_means_over_edges_to_later_tokens(found):
    saliency, _ = found
    groups = saliency.groups
    assert sorted(each for members in groups.values() for each in members) == list(range(len(saliency.tokens)))
    for name, flow in saliency.flows.items():
        source, target = name.split(" -> ")
        for layer in range(len(saliency.layers)):
            edges = [
                float(saliency.saliency[layer, saliency.queries.index(i), j])
                for i in groups[target]
                for j in groups[source]
                if i in saliency.queries and j < i
            ]
            assert float(flow[layer]) == pytest.approx(sum(edges) / len(edges), rel=1e-12)
    sources, targets = ("system", "image", "question"), ("question", "last")
    assert list(saliency.flows) == [f"{source} -> {target}" for target in targets for source in sources]
    assert saliency.flow("last", "last").isnan().all()  # a token's attention to itself is no flow
    assert saliency.flow("image", "system").isnan().all()  # no system token is among the queries
    assert torch.equal(saliency.flow((5,), "last"), saliency.saliency[:, -1, 5])
    for asked in ("picture", (999,)):
        with pytest.raises(TraceError, match="no group 'picture'|no position 999"):
            saliency.flow(asked, "last")


def test_image_maps_are_means_over_queries(found):
    saliency, prompt = found
    whole = saliency.saliency[..., list(prompt.groups["image"])]
    assert torch.equal(saliency.image_map(), whole.mean(1))
    assert torch.equal(saliency.image_map("last"), whole[:, -1])
    with pytest.raises(TraceError, match="read again with these queries"):
        saliency.image_map("system")


def test_a_saved_saliency_comes_back_whole(found, tmp_path):
    saliency, _ = found
    again = AttentionSaliency.load(saliency.save(tmp_path / "saliency.safetensors"))
    assert_same(again, saliency)
    assert_shown(saliency)
    replace(saliency, queries=(1,)).save(tmp_path / "torn.safetensors")
    with pytest.raises(ArtefactError, match="another shape than its layers, queries and tokens"):
        AttentionSaliency.load(tmp_path / "torn.safetensors")


def test_the_table_has_a_line_per_edge(found):
    saliency, prompt = found
    table = saliency.to_dataframe()
    assert len(table) == saliency.saliency.numel()
    source, last = prompt.groups["image"][2], prompt.groups["last"][0]
    line = table.query(f"layer == 1 and query == {last} and source == {source}").iloc[0]
    assert (line["query_group"], line["source_group"]) == ("last", "image")
    assert line["saliency"] == float(saliency.saliency[1, -1, source])


def test_pictures_show_every_flow_and_the_asked_layers(found, random_llava_llama, photo, tmp_path):
    saliency, prompt = found
    text = svg(saliency.plot(tmp_path / "flows.svg"))
    assert (tmp_path / "flows.svg").is_file()
    assert all(name.replace(">", "&gt;") in text for name in saliency.flows)
    silent = replace(saliency, saliency=torch.zeros_like(saliency.saliency))
    assert colours(silent.plot()) > 10 and colours(silent.overlay(prompt)) > 10
    text = svg(saliency.overlay(prompt, layers=[1, 2], target="last"))
    assert "<!-- layer 1 -->" in text and "<!-- layer 0 -->" not in text and "; to last" in text
    with pytest.raises(TraceError, match="of another prompt"):
        saliency.overlay(random_llava_llama.prompt(photo, "What colour is the emblem?"))


def inside(prompt: Prompt, box: tuple[float, float, float, float]) -> Tensor:
    """(image token,) booleans: the patch's middle lies in a box given in shares of the side."""
    side = 1 + max(patch.row for patch in prompt.patches)
    left, top, right, bottom = box
    middles = [((patch.column + 0.5) / side, (patch.row + 0.5) / side) for patch in prompt.patches]
    return torch.tensor([left <= x < right and top <= y < bottom for x, y in middles])


def test_early_layers_point_at_the_entity_that_is_asked_about(tiny_vlm):
    world, maps, own = World(), [], []
    for entity in world.taught[::6][:20]:
        picture, record = world.picture(entity, 5), world.question(world.facts_of(entity)[0])
        prompt = tiny_vlm.prompt(picture.image, record.text)
        found = attention_saliency(tiny_vlm, prompt, queries="question", answer=record.answer)
        maps.append(found.image_map()[:3])
        own.append((prompt, picture.boxes[0]))

    def excess(shift: int) -> Tensor:
        """(picture, layer): saliency per token in the box of the picture so many places on, over that of all tokens."""
        boxes = [box for _, box in own[shift:] + own[:shift]]
        masks = [inside(prompt, box) for (prompt, _), box in zip(own, boxes, strict=True)]
        return torch.stack([each[:, mask].mean(1) / each.mean(1) for each, mask in zip(maps, masks, strict=True)])

    right, wrong = excess(0), excess(7)
    assert right.mean(0).min() > 2 and (right > 1).sum(0).min() >= 18
    assert (right.mean(0) - wrong.mean(0)).min() > 0.8  # boxes of other pictures hold less
