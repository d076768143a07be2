"""Attention contributions: they add up to what attention writes; groups, picture, files and drawings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import multrace
import pytest
import torch
from exact_models import SIZES, assemble, close
from multrace import ModelError, VisionLanguageModel
from multrace.artefacts import ArtefactError
from multrace.data import World
from multrace.models import Prompt, Site, capture
from multrace.models.families import Family
from multrace.models.frame import DecoderInput
from multrace.models.replay import attending
from multrace.tracing import AttentionContributions, AverageContributions, TraceError, average
from multrace.tracing.attention import (
    attention_contributions,
    contribution_norms,
    contribution_vectors,
    index_shares,
    projected_values,
    record_attention,
    tokens_for_share,
    value_bias,
)
from PIL import Image
from random_models import make_tokenizer, save, text_sizes
from result_checks import assert_same, assert_shown, svg
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company"


def prompt_of(vlm: VisionLanguageModel, photo: Image.Image) -> Prompt:
    return vlm.prompt(photo if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def attention_output(vlm: VisionLanguageModel, prompt: Prompt, layer: int) -> Tensor:
    """(token, hidden): what the attention module writes, less its output bias and the value bias sent through it."""
    site, projection = Site("attention", layer), vlm.attention_projection(layer)
    with torch.no_grad(), capture(vlm, [site]) as seen:
        vlm.logits(prompt)
    written = seen[site][0]
    if projection.module.bias is not None:
        written = written - projection.module.bias
    bias = value_bias(vlm)[layer]
    heads = bias.repeat_interleave(vlm.heads // len(bias), 0).flatten()
    return written - heads @ (projection.weight if projection.transposed else projection.weight.T)


def own_value_bias(vlm: VisionLanguageModel, layer: int) -> Tensor | None:
    """The parameter of this family's attention module that is added to every value, flat; None without one."""
    module = vlm.module(Site("attention", layer))
    bias = module.c_attn.bias if hasattr(module, "c_attn") else module.v_proj.bias
    return None if bias is None else bias[-vlm.hidden :] if hasattr(module, "c_attn") else bias


@contextmanager
def with_biases(vlm: VisionLanguageModel) -> Iterator[int]:
    """How many biases its attention modules have, filled while the block lasts: nobody has trained them off zero."""
    parts = [part for layer in range(vlm.layers) for part in vlm.module(Site("attention", layer)).modules()]
    biases = [part.bias for part in parts if getattr(part, "bias", None) is not None]
    saved, generator = [bias.clone() for bias in biases], torch.Generator().manual_seed(3)
    try:
        for bias in biases:
            bias.copy_(torch.randn(bias.shape, generator=generator, dtype=torch.float64))
        yield len(biases)
    finally:
        for bias, before in zip(biases, saved, strict=True):
            bias.copy_(before)


@pytest.mark.parametrize("queries", ["last", "constraint", "all"])
def test_contributions_of_all_sources_add_up_to_what_attention_writes(exact_vlm, photo, queries):
    prompt = prompt_of(exact_vlm, photo)
    where = list(prompt.groups[queries])
    with with_biases(exact_vlm) as biases:
        for layer in (0, exact_vlm.layers - 1):
            vectors = contribution_vectors(exact_vlm, prompt, layer, queries=queries)
            assert vectors.shape == (exact_vlm.heads, len(where), prompt.length, exact_vlm.hidden)
            expected = attention_output(exact_vlm, prompt, layer)[where]
            assert close(vectors.sum((0, 2)), expected, 1e-12)
            assert not close(vectors[1:].sum((0, 2)), expected, 1e-2)  # a head that is left out is missed
    assert (biases > 0) == (exact_vlm.family.name in ("llava_phi", "gpt2"))


def test_contributions_add_up_in_single_precision(random_vlm, photo):
    prompt = prompt_of(random_vlm, photo)
    for layer in range(random_vlm.layers):
        expected = attention_output(random_vlm, prompt, layer)[-1:]
        vectors = contribution_vectors(random_vlm, prompt, layer - random_vlm.layers)
        assert close(vectors.sum((0, 2)), expected, 1e-6 * max(1.0, float(expected.abs().max())))


def test_the_value_bias_is_the_parameter_that_every_value_has(random_vlm):
    has_bias = random_vlm.family.name in ("llava_phi", "gpt2")
    with with_biases(random_vlm):
        for layer, found in enumerate(value_bias(random_vlm)):
            own = own_value_bias(random_vlm, layer)
            assert (own is not None) == has_bias == (float(found.abs().max()) > 0.1)
            assert torch.equal(found.flatten(), torch.zeros_like(found).flatten() if own is None else own)


def test_lengths_are_those_of_the_vectors(exact_vlm, photo):
    prompt = prompt_of(exact_vlm, photo)
    found = attention_contributions(exact_vlm, prompt, queries="constraint", sources="question")
    places = prompt.groups["constraint"], prompt.groups["question"]
    assert (found.query_positions, found.source_positions) == places
    for layer in range(exact_vlm.layers):
        vectors = contribution_vectors(exact_vlm, prompt, layer, queries="constraint", sources="question")
        assert close(found.head_contributions[layer], vectors.norm(dim=-1))
        assert close(found.contributions[layer], vectors.sum(0).norm(dim=-1))
        with torch.no_grad(), attending(exact_vlm, places[0]) as seen:
            exact_vlm.logits(prompt)
        assert close(found.weights[layer], seen[layer].weights[0][:, :, list(places[1])])
    few = attention_contributions(exact_vlm, prompt, queries="constraint", sources="question", by_head=False)
    assert few.head_contributions is None and torch.equal(few.contributions, found.contributions)


@pytest.mark.parametrize(("options", "tolerance"), [({"attention": "eager"}, 1e-5), ({"dtype": "bfloat16"}, 0.15)],
                         ids=["eager", "bfloat16"])  # fmt: skip
def test_other_ways_of_loading(llava_llama_path, random_llava_llama, photo, options, tolerance):
    other = multrace.load(llava_llama_path, verify=False, **options)
    found, expected = (attention_contributions(each, prompt_of(each, photo)) for each in (other, random_llava_llama))
    assert found.contributions.dtype == torch.float32
    assert close(found.contributions, expected.contributions, tolerance * float(expected.contributions.max()))


def test_sources_are_taken_some_at_a_time(exact_llava, photo, monkeypatch):
    prompt = prompt_of(exact_llava, photo)
    whole = attention_contributions(exact_llava, prompt)
    monkeypatch.setattr("multrace.tracing.attention.contributions._ENTRIES", 5 * exact_llava.hidden * 4)
    parts = attention_contributions(exact_llava, prompt)
    assert close(parts.contributions, whole.contributions) and close(parts.head_contributions, whole.head_contributions)
    sizes = []
    plain = multrace.tracing.attention.contributions.projected_values
    monkeypatch.setattr(
        "multrace.tracing.attention.contributions.projected_values",
        lambda vlm, layer, values, bias: sizes.append(values.shape[1]) or plain(vlm, layer, values, bias),
    )
    attention_contributions(exact_llava, prompt)
    assert max(sizes) == 5 and sum(sizes) == exact_llava.layers * prompt.length


def test_an_answer_after_the_prompt_changes_nothing(random_llava, photo):
    prompt = prompt_of(random_llava, photo)
    found, other = (attention_contributions(random_llava, each) for each in (prompt, prompt.with_answer("Ada Example")))
    assert torch.equal(found.contributions, other.contributions) and found.tokens == other.tokens
    assert found.groups == other.groups and "answer" not in found.groups
    with pytest.raises(TraceError, match=r"none beyond its last token \(\d+\)"):
        attention_contributions(random_llava, prompt.with_answer("Ada Example"), queries=-1)


@pytest.fixture(scope="module")
def travels(tiny_vlm: VisionLanguageModel) -> dict[str, AverageContributions]:
    """In the trained model: from the picture to the constraint, and from everything to the last token."""
    world, prompts = World(), []
    for fact in world.facts[:120:20]:
        record = world.question(fact).with_image(world.picture(world.entities[fact.entity], 5).image)
        prompts.append(tiny_vlm.prompt(record.image, record.text, constraint=record.constraint))
    asked = {"constraint": "image", "last": "all"}
    return {
        queries: average(
            [attention_contributions(tiny_vlm, each, queries=queries, sources=sources) for each in prompts]
        )
        for queries, sources in asked.items()
    }


def test_the_picture_reaches_the_constraint_early_and_the_constraint_the_last_token_late(travels):
    early, late = travels["constraint"].by_layer("image"), travels["last"].by_layer("constraint")
    assert int(early.argmax()) <= 2 < 3 <= int(late.argmax())
    assert float(travels["last"].by_layer("image").max()) < 0.2 * float(late.max())  # it does not go there directly
    low, high = travels["last"].interval("constraint")
    assert bool((low > travels["last"].interval("image")[1])[3:].all()) and bool((low < high).all())


@pytest.fixture
def found(random_llava_llama: VisionLanguageModel, photo: Image.Image) -> AttentionContributions:
    prompt = prompt_of(random_llava_llama, photo)
    return attention_contributions(random_llava_llama, prompt, queries="question")


def test_a_group_of_sources_counts_with_its_largest_token(found):
    columns, rows = list(found.groups["constraint"]), list(found.groups["question"])
    assert list(found.query_positions) == rows and len(columns) > 1
    plain = found.contributions[..., columns]
    assert torch.equal(found.by_layer("constraint"), plain.amax(-1).mean(-1))
    assert torch.equal(found.by_layer("constraint", reduction="sum"), plain.sum(-1).mean(-1))
    assert torch.equal(found.by_layer("constraint", reduction="mean"), plain.mean(-1).mean(-1))
    assert torch.equal(found.by_head("constraint"), found.head_contributions[..., columns].amax(-1).mean(-1))
    weights = found.weights[..., columns]
    assert torch.equal(found.by_head("constraint", of="weight"), weights.amax(-1).mean(-1))
    assert torch.equal(found.by_layer("constraint", of="weight"), weights.mean(1).amax(-1).mean(-1))
    into = [rows.index(place) for place in found.groups["constraint"]]
    pictured = found.contributions[:, into][..., list(found.groups["image"])]
    assert torch.equal(found.by_layer("image", into="constraint"), pictured.amax(-1).mean(-1))
    total = found.by_layer(of="weight", reduction="sum")
    assert close(total, torch.ones_like(total), 1e-5)


def test_the_picture_is_read_by_index_and_by_place(found):
    image = list(found.groups["image"])
    mass = found.contributions[..., image].mean(1)
    assert torch.equal(found.image_mass(), mass)
    assert torch.equal(found.image_map(-1), mass[-1].view(1, 4, 4))
    assert close(found.index_histogram(2, bins=4), mass[2].view(4, 4).sum(1) / mass[2].sum(), 1e-6)
    for share in (0.3, 0.8, 1.0):
        ordered, count = sorted(mass[2].tolist(), reverse=True), 0
        while sum(ordered[:count]) < share * sum(ordered) - 1e-9:
            count += 1
        assert found.tokens_for(share, layer=2) == count
    assert found.tokens_for(0.3, layer=2) < found.tokens_for(0.8, layer=2) < found.tokens_for(1.0, layer=2)


def test_shares_of_known_masses():
    mass = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    shares = index_shares(mass, 3)  # two, two and three tokens
    assert close(shares[:2], torch.tensor([[0, 0, 1.0], [2 / 7, 2 / 7, 3 / 7]]), 1e-6)
    assert bool(shares[2].isnan().all())
    assert tokens_for_share(mass, 0.8).tolist() == [1, 6, 0]
    assert tokens_for_share(mass, 1.0).tolist() == [1, 7, 0]
    study = torch.zeros(576).index_fill(0, torch.arange(540, 576), 1.0)
    assert index_shares(study, 16).tolist() == [0.0] * 15 + [1.0]
    for bins in (0, 8):
        with pytest.raises(TraceError, match="pass a number from 1 to 7"):
            index_shares(mass, bins)
    for share in (0.0, 1.1):
        with pytest.raises(TraceError, match="above 0 and at most 1"):
            tokens_for_share(mass, share)


def test_what_cannot_be_asked_is_refused(random_llava_llama, photo, found):
    vlm, prompt = random_llava_llama, prompt_of(random_llava_llama, photo)
    cases = (
        ({"queries": "image", "sources": "constraint"}, "lie behind the queries 'image'"),
        ({"sources": "answer"}, "no tokens in group 'answer'"),
        ({"queries": ()}, "pass at least one"),
    )
    for options, text in cases:
        with pytest.raises(TraceError, match=text):
            attention_contributions(vlm, prompt, **options)
    with pytest.raises(ModelError, match="no layer 9"):
        contribution_vectors(vlm, prompt, 9)
    narrow = attention_contributions(vlm, prompt, sources="constraint", by_head=False)
    with pytest.raises(TraceError, match="do not hold all of a group 'image'; they hold constraint, constraint_last"):
        narrow.by_layer("image")
    for ask in (narrow.by_head, lambda: narrow.to_dataframe(by_head=True)):
        with pytest.raises(TraceError, match="with by_head=True"):
            ask()
    with pytest.raises(TraceError, match="the queries do not hold all of a group 'image'"):
        found.by_layer("image", into="image")
    for ask, text in (
        (lambda: found.by_layer("image", reduction="median"), "no reduction 'median'"),
        (lambda: found.by_layer("image", of="both"), "no quantity 'both'"),
        (lambda: found.image_map(4), "no layer 4; these contributions have layers 0 to 3"),
        (lambda: replace(found, patches=()).image_map(0), "form no grid"),
    ):
        with pytest.raises((TraceError, ArtefactError), match=text):
            ask()


def test_an_output_projection_that_reads_something_else_is_refused(llava_llama_path, photo):
    vlm = multrace.load(llava_llama_path, verify=False)
    prompt = prompt_of(vlm, photo)
    attention_contributions(vlm, prompt)
    gate = vlm.attention_projection(2).module.register_forward_pre_hook(lambda _, given: (given[0] * 0.9,))
    with pytest.raises(TraceError, match="decoder layer 2 reads something else than the values"):
        attention_contributions(vlm, prompt)
    gate.remove()
    projection = vlm.attention_projection(1).module
    projection.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    embeddings = torch.zeros(1, 1, vlm.hidden)
    seen, _ = record_attention(multrace.load(llava_llama_path, verify=False), DecoderInput(embeddings=embeddings), (0,))
    with pytest.raises(TraceError, match="its columns cannot be read: .*packed by Linear"):
        contribution_norms(vlm, 1, seen[1], seen[1].values[0, :, 0], (0,))


def test_grouped_queries_with_a_value_bias_add_up():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES)).double()
    vlm = assemble(model, Family(name="phi", model_types=(), text_types=(), attention_out="self_attn.dense",
                                 down="mlp.fc2", final_norm="final_layernorm"))  # fmt: skip
    embeddings = torch.randn(1, 9, vlm.hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = Site("attention", 1)
    with with_biases(vlm), capture(vlm, [site]) as output:
        bias = value_bias(vlm)[1]
        seen, _ = record_attention(vlm, DecoderInput(embeddings=embeddings), (8, 3))
        vectors = seen[1].weights[0, ..., None] * projected_values(vlm, 1, seen[1].values[0], bias)[:, None]
        projection = vlm.attention_projection(1)
        constant = projection.module.bias + projection.weight @ bias.repeat_interleave(2, 0).flatten()
    assert (vlm.heads, len(bias)) == (4, 2) and float(constant.abs().max()) > 1
    assert close(vectors.sum((0, 2)) + constant, output[site][0, [8, 3]], 1e-12)


def test_behind_a_norm_contributions_add_up_to_what_is_added(tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Gemma2Config(**text_sizes(tokenizer), head_dim=8, num_key_value_heads=2, query_pre_attn_scalar=8)
    vlm = multrace.load(save(Gemma2ForCausalLM(config), tokenizer, tmp_path))
    prompt, queries = vlm.prompt(None, QUESTION), (4, -1)
    embeddings, site, projection = vlm.embed(prompt), Site("attention", 2), vlm.attention_projection(2)
    with torch.no_grad(), capture(vlm, [site]) as added, capture(vlm, [projection]) as written:
        vlm.logits(prompt)
    vectors = contribution_vectors(vlm, prompt, 2, queries=[4, prompt.length - 1])
    assert close(vectors.sum((0, 2)), added[site][0, list(queries)], 1e-5)
    assert not close(vectors.sum((0, 2)), written[projection][0, list(queries)], 1e-1)
    (recorded, _), bias = record_attention(vlm, embeddings, [4, prompt.length - 1]), value_bias(vlm)[2]
    assert not bias.any()  # attention, not the norm behind it, is given zeros
    summed, by_head = contribution_norms(vlm, 2, recorded[2], bias, range(prompt.length))
    assert close(summed, vectors.sum(0).norm(dim=-1), 1e-5) and close(by_head, vectors.norm(dim=-1), 1e-5)


def test_files_hold_everything(found, tmp_path):
    path = found.save(tmp_path / "found.safetensors")
    again = AttentionContributions.load(path)
    assert_same(again, found)
    assert_shown(found)
    few = replace(found, head_contributions=None)
    assert AttentionContributions.load(few.save(tmp_path / "few.safetensors")).head_contributions is None
    replace(found, weights=found.weights[1:]).save(path)
    with pytest.raises(ArtefactError, match="tensors are of other shapes"):
        AttentionContributions.load(path)


def test_tables_have_a_line_per_value(found):
    frame, heads = found.to_dataframe(), found.to_dataframe(by_head=True)
    layers, queries, sources = found.contributions.shape
    assert len(frame) == layers * queries * sources and len(heads) == len(frame) * found.weights.shape[1]
    line = frame.iloc[-1 - sources]
    query, source = found.query_positions[-2], found.source_positions[-1]
    assert (line["layer"], line["query"], line["source"]) == (layers - 1, query, source)
    assert (line["query_token"], line["source_token"]) == (found.tokens[query], found.tokens[source])
    assert line["contribution"] == found.contributions[-1, -2, -1]
    line = heads[(heads["head"] == 2) & (heads["layer"] == 1)].iloc[3]
    assert line["contribution"] == found.head_contributions[1, 2, 0, 3] and line["weight"] == found.weights[1, 2, 0, 3]


def test_drawings_say_what_they_show(found, random_llava_llama, photo, other_photo, tmp_path):
    text = svg(found.plot())
    for label in ("constraint", "image", "length of contribution", "attention weight", "head", QUESTION):
        assert f"<!-- {label} -->" in text, label
    lengths = svg(replace(found, head_contributions=None).plot(groups=["image"], reduction="sum"))
    assert "<!-- constraint -->" not in lengths and "sum over tokens" in lengths
    bars = svg(found.plot_histogram(layers=[0, -1], bins=4))
    assert f"<!-- layer 3: {found.tokens_for(layer=3)} tokens hold 80% -->" in bars
    assert "<!-- index of the image token -->" in bars and "<!-- layer 1" not in bars
    prompt = prompt_of(random_llava_llama, photo)
    over = svg(found.overlay(prompt, layers=[1]))
    assert "<!-- layer 1 -->" in over and "<!-- contribution -->" in over and "indirect effect" not in over
    assert "<!-- layer 1 -->" in svg(found.overlay(prompt, of="weight"))
    with pytest.raises(TraceError, match="of another prompt"):
        found.overlay(random_llava_llama.prompt(other_photo, "What colour?"))
    with pytest.raises(ArtefactError, match="no format '.gif'"):
        found.plot(tmp_path / "f.gif")
    with pytest.raises(TraceError, match="no layers to draw"):
        found.plot_histogram(layers=[])


def test_an_average_is_the_mean_with_its_interval(found, tmp_path):
    other = replace(found, contributions=2 * found.contributions, weights=found.weights.flip(0))
    mean = average([found, other], bins=4)
    assert mean.groups == ("constraint", "image", "last") and mean.count == 2
    own = found.by_layer("constraint").double()
    assert close(mean.by_layer("constraint"), 1.5 * own, 1e-6)
    low, high = mean.interval("constraint")
    assert close((high - low) / 2, 12.7062047 * own / 2, 1e-4)  # t with one degree of freedom; deviation own / sqrt 2
    assert mean.image_tokens.mean.tolist() == [found.tokens_for(layer=layer) for layer in range(4)]
    assert close(mean.image_shares.mean[2].float(), found.index_histogram(2, bins=4), 1e-6) and mean.image_count == 16
    again = AverageContributions.load(mean.save(tmp_path / "mean.safetensors"))
    assert again.reduction == "max"
    assert_same(again, mean)
    assert_shown(mean)
    frame = mean.to_dataframe()
    assert len(frame) == (2 * 3 + 1) * 4 and set(frame["n"]) == {2}
    line = frame[(frame["quantity"] == "weight") & (frame["group"] == "image")].iloc[1]
    assert line["mean"] == pytest.approx(float(mean.by_layer("image", of="weight")[1]))
    assert "bands: 95% intervals" in svg(mean.plot())
    assert "<!-- layer 3 -->" in svg(mean.plot_histogram(layers=[0, -1]))


def test_one_prompt_has_no_interval_and_unlike_ones_no_average(found, tmp_path):
    one = average([replace(found, sources="constraint")], groups=["constraint"], reduction="sum")
    assert one.groups == ("constraint",)
    assert bool(one.to_dataframe()["low"].isna().all())
    assert "95%" not in svg(one.plot())
    assert "95%" not in svg(one.plot_histogram(layers=[0]))
    with pytest.raises(ArtefactError, match="at least two"):
        one.interval("constraint")
    for ask, text in (
        (lambda: average([]), "no results to average"),
        (lambda: average([found, replace(found, queries="last")]), r"queries \(question and last\)"),
        (lambda: average([found], groups=["answer"]), "do not hold all of a group 'answer'"),
        (lambda: one.by_layer("image"), "no contribution of 'image' in this average"),
        (lambda: one.plot_histogram(layers=[4]), r"no layers \(4,\) here"),
        (lambda: replace(one, image_shares=None).plot_histogram(layers=[0]), "no shares by index here"),
    ):
        with pytest.raises((TraceError, ArtefactError), match=text):
            ask()
