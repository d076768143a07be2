"""Attention shares of the parts of a prompt, against transformers' own eager attention."""

from dataclasses import replace

import multrace
import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.artefacts import ArtefactError
from multrace.tracing import AttentionShare, AverageShare, TraceError, attention_share, average
from result_checks import assert_same, assert_shown, svg
from torch import Tensor

QUESTION = "Who founded the company in this photo?"


@pytest.fixture(scope="module", params=["llava_llama", "llava_phi"])
def both(request: pytest.FixtureRequest) -> tuple[VisionLanguageModel, VisionLanguageModel]:
    """A model that sees, and the same one with transformers' eager attention, which hands out its weights."""
    eager = multrace.load(request.getfixturevalue(f"{request.param}_path"), attention="eager", verify=False)
    return request.getfixturevalue(f"random_{request.param}"), eager


def own_weights(eager: VisionLanguageModel, prompt: Prompt) -> Tensor:
    """(layer, head, query, key) as transformers gives them."""
    with torch.no_grad():
        found = eager.model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    return torch.stack([layer[0] for layer in found]).double()


def is_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_shares_are_sums_of_the_models_own_weights(both, photo, other_photo):
    vlm, eager = both
    for image in (photo, [photo, other_photo]):
        prompt = vlm.prompt(image, QUESTION)
        found, weights = attention_share(vlm, prompt), own_weights(eager, prompt)[:, :, -1]
        positions, image = torch.arange(prompt.length), torch.tensor(prompt.groups["image"])
        is_image, is_system = torch.isin(positions, image), positions < image[0]
        sums = [weights[..., each].sum(-1) for each in (is_system, is_image, ~is_system & ~is_image)]
        assert tuple(found.parts) == ("system", "image", "question")
        assert found.heads.dtype == torch.float64 and is_close(found.heads, torch.stack(sums, -1))
        assert is_close(found.of("image"), sums[1].mean(1))
        assert len(found.parts["image"]) == len(prompt.groups["image"]) and min(found.heads.shape) > 1


def test_several_queries_are_averaged_whatever_follows_them(both, photo):
    vlm, eager = both
    prompt = vlm.prompt(photo, QUESTION, answer="Ada Example")
    weights, rows = own_weights(eager, prompt), list(prompt.groups["question"])
    found = attention_share(vlm, prompt, queries="question")
    assert found.queries == tuple(rows) and found.tokens == prompt.tokens[: rows[-1] + 1]
    assert is_close(found.of("image"), weights[:, :, rows][..., list(prompt.groups["image"])].sum(-1).mean((1, 2)))
    answering = attention_share(vlm, prompt, queries=(-1, "last"))
    pair = weights[:, :, [prompt.groups["last"][0], prompt.length - 1]].mean(2)
    assert is_close(answering.heads[..., 1], pair[..., list(prompt.groups["image"])].sum(-1))
    assert not is_close(answering.of("image"), found.of("image"))


def test_shares_sum_to_one(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint="the company")
    parts = {"subject": "constraint", "picture": "image", "start": 0, "end": (-2, -1)}
    for settings in ({}, {"queries": "question"}, {"parts": parts}, {"queries": "constraint", "parts": {"a": (0, 1)}}):
        found = attention_share(random_llava, prompt, **settings)
        assert is_close(found.heads.sum(-1), torch.ones(found.heads.shape[:2]).double()), settings
        assert sorted(each for part in found.parts.values() for each in part) == list(range(len(found.tokens)))


def test_what_the_parts_leave_is_called_other(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint="the company")
    whole = attention_share(random_llava, prompt, parts={"constraint": "constraint", "image": "image"})
    assert tuple(whole.parts) == ("constraint", "image", "other")
    assert torch.allclose(whole.of("other"), 1 - whole.of("constraint") - whole.of("image"), atol=1e-6)
    assert torch.equal(whole.of("image"), attention_share(random_llava, prompt).of("image"))
    full = attention_share(random_llava, prompt, parts={"everything": "all"})
    assert tuple(full.parts) == ("everything",)  # nothing is left


def test_text_only_prompts_need_parts(random_vlm):
    prompt = random_vlm.prompt(None, QUESTION, constraint="the company")
    with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image to the prompt"):
        attention_share(random_vlm, prompt)
    found = attention_share(random_vlm, prompt, parts={"constraint": "constraint"})
    assert float(found.of("constraint").min()) > 0


def test_parts_and_queries_that_make_no_sense_are_refused(random_llava_llama, photo):
    prompt = random_llava_llama.prompt(photo, QUESTION, constraint="the company")
    for settings, message in (
        ({"parts": {"a": "question", "b": "constraint"}}, "part 'b' shares the positions .* with another part"),
        ({"parts": {"a": "answer"}}, "part 'a' .* holds no token that a query can see"),
        ({"parts": {"late": "last"}, "queries": "image"}, "part 'late' .* holds no token"),
        ({"parts": {"other": "image"}}, "give it another name"),
        ({"queries": "answer"}, "no tokens in group 'answer'"),
        ({"queries": ()}, "no positions to read"),
    ):
        with pytest.raises(TraceError, match=message):
            attention_share(random_llava_llama, prompt, **settings)
    for settings in ({"parts": {"a": "subject"}}, {"queries": 999}):
        with pytest.raises(ModelError, match="no token group|no position"):
            attention_share(random_llava_llama, prompt, **settings)


@pytest.fixture
def several(random_llava_llama: VisionLanguageModel, make_photo) -> list[AttentionShare]:
    """The shares of one question about four pictures."""
    prompts = [random_llava_llama.prompt(make_photo(seed), QUESTION) for seed in range(4)]
    return [attention_share(random_llava_llama, prompt) for prompt in prompts]


def test_averages_have_the_interval_of_student(several):
    found = average(several)
    values = torch.stack([each.shares for each in several])
    half = 3.182446305 * values.std(0) / 2  # Student's t with 3 degrees of freedom; four prompts
    low, high = found.interval()
    assert torch.allclose(found.shares, values.mean(0)) and float(values.std(0).max()) > 1e-3
    assert torch.allclose(high - found.shares, half, rtol=1e-6) and torch.allclose(found.shares - low, half, rtol=1e-6)
    table = found.to_dataframe()
    line = table.query("layer == 2 and part == 'image'").iloc[0]
    expected = [float(each[2, 1]) for each in (found.shares, low, high)]
    assert line[["share", "low", "high", "n"]].tolist() == [*expected, 4]
    single = average(several[:1])
    assert single.to_dataframe()["low"].isna().all()
    with pytest.raises(ArtefactError, match="at least two results"):
        single.interval()


def test_only_equal_shares_are_averaged(several):
    renamed = {"system": (), "image": (), "words": ()}
    for others, message in (
        ([], "pass at least one"),
        ([several[0], replace(several[1], model="another")], "differ in their model"),
        ([several[0], replace(several[1], parts=renamed)], "differ in their names"),
        ([several[0], replace(several[1], heads=several[1].heads[:2])], "differ in their layers"),
    ):
        with pytest.raises(ArtefactError, match=message):
            average(others)


def test_saved_shares_come_back_whole(several, tmp_path):
    whole = several[0]
    again = AttentionShare.load(whole.save(tmp_path / "one.safetensors"))
    assert_same(again, whole)
    assert_shown(whole)
    mean = average(several)
    loaded = AverageShare.load(mean.save(tmp_path / "mean.safetensors"))
    assert_same(loaded, mean)
    assert_shown(mean)
    with pytest.raises(ArtefactError, match="load another file"):
        AttentionShare.load(tmp_path / "mean.safetensors")
    replace(whole, parts={"all": (0,)}).save(tmp_path / "torn.safetensors")
    with pytest.raises(ArtefactError, match="another shape than its parts"):
        AttentionShare.load(tmp_path / "torn.safetensors")


def test_the_table_has_a_line_per_layer_head_and_part(several):
    table = several[0].to_dataframe()
    assert len(table) == several[0].heads.numel()
    line = table.query("layer == 1 and head == 3 and part == 'question'").iloc[0]
    assert line["share"] == float(several[0].heads[1, 3, 2])


def test_plots_name_every_part(several):
    single = svg(several[0].plot())
    mean = svg(average(several).plot())
    for text in (single, mean):
        assert all(f"<!-- {part} -->" in text for part in several[0].parts)
    assert "95% interval" in mean and "95% interval" not in single
    assert "95% interval" not in svg(average(several[:1]).plot())
    with pytest.raises(TraceError, match="no part 'words'"):
        several[0].of("words")
