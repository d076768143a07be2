"""Ablation: zeros or a reference mean at a group's positions, and nothing anywhere else."""

from pathlib import Path

import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel, load
from multrace.tracing import MeanAblation, TraceError, ZeroAblation
from PIL import Image

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
GROUPS = ["image", "constraint", "question", "constraint_last"]


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def touched(vlm: VisionLanguageModel, prompt: Prompt, corruption: ZeroAblation | MeanAblation) -> tuple[int, ...]:
    difference = corruption.corrupt(vlm, prompt).embeddings != vlm.embed(prompt).embeddings
    return tuple(difference.any(-1)[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("group", [*GROUPS, "all"])
def test_zeros_at_the_group_and_nothing_elsewhere(random_llava, photo, group):
    prompt, corruption = ask(random_llava, photo), ZeroAblation(group=group)
    found = corruption.corrupt(random_llava, prompt)
    assert touched(random_llava, prompt, corruption) == prompt.groups[group]
    assert not found.embeddings[0, list(prompt.groups[group])].any()
    assert found.embeddings.shape == random_llava.embed(prompt).embeddings.shape
    assert (found.description, found.inputs, found.seed) == (f"zeros on the {group} tokens", (), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_of_pictures_is_over_all_their_tokens(llava_llama_path, make_photo, dtype):
    vlm, pictures = load(llava_llama_path, dtype=dtype, verify=False), [make_photo(seed) for seed in (4, 5, 6)]
    prompt, corruption = ask(vlm, make_photo(1)), MeanAblation(references=pictures)
    with torch.no_grad():
        features = [vlm.image_features(ask(vlm, picture)).double() for picture in pictures]
    mean = (sum(each.sum(0) for each in features) / sum(map(len, features))).to(vlm.dtype)
    found = corruption.corrupt(vlm, prompt)
    image = list(prompt.groups["image"])
    assert torch.allclose(found.embeddings[0, image], mean.expand(len(image), -1), rtol=1e-6, atol=1e-6)
    assert found.embeddings.dtype == vlm.dtype
    assert touched(vlm, prompt, corruption) == prompt.groups["image"]
    assert found.description == "mean over 3 reference pictures on the image tokens"
    fewer = MeanAblation(references=pictures[:2]).corrupt(vlm, prompt)
    assert not torch.equal(fewer.embeddings, found.embeddings)


@pytest.mark.parametrize("group", ["constraint", "question", "last"])
def test_the_mean_of_phrases_is_over_all_their_tokens(random_vlm, photo, group):
    prompt, phrases = ask(random_vlm, photo), ("the flag", "the capital of the country")
    table = random_vlm.model.get_input_embeddings().weight.double()
    ids = [token for phrase in phrases for token in random_vlm.tokenizer(phrase, add_special_tokens=False)["input_ids"]]
    corruption = MeanAblation(references=phrases, group=group)
    found = corruption.corrupt(random_vlm, prompt)
    positions = list(prompt.groups[group])
    expected = (sum(table[token] for token in ids) / len(ids)).float().expand(len(positions), -1)
    assert torch.allclose(found.embeddings[0, positions], expected, rtol=1e-6, atol=1e-7)
    assert touched(random_vlm, prompt, corruption) == prompt.groups[group]
    assert found.description == f"mean over 2 reference phrases on the {group} tokens"


def test_one_reference_needs_no_list(random_llava, photo, other_photo, tmp_path: Path):
    prompt, path = ask(random_llava, photo), tmp_path / "other.png"
    other_photo.save(path)
    listed = MeanAblation(references=[other_photo]).corrupt(random_llava, prompt)
    for one in (other_photo, path, str(path)):
        assert torch.equal(MeanAblation(references=one).corrupt(random_llava, prompt).embeddings, listed.embeddings)
    phrase = MeanAblation(references="the flag", group="constraint").corrupt(random_llava, prompt)
    phrases = MeanAblation(references=("the flag",), group="constraint").corrupt(random_llava, prompt)
    assert torch.equal(phrase.embeddings, phrases.embeddings)


@pytest.mark.parametrize("references", [(), [], ""])
def test_a_mean_of_nothing_says_what_to_pass(references):
    with pytest.raises(TraceError, match="pass references=, pictures for image tokens or phrases for words"):
        MeanAblation(references=references)


def test_references_that_do_not_fit_the_group_are_refused(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    cases = [
        (MeanAblation(references=["the flag"]), ModelError, "no picture at 'the flag'"),
        (MeanAblation(references=[other_photo], group="constraint"), ModelError, "the phrase is of type Image"),
        (MeanAblation(references=("a",), group="all"), TraceError, "group 'all' holds image tokens and words"),
        (MeanAblation(references=("",), group="constraint"), TraceError, "no tokens in the phrases ['']"),
        (MeanAblation(references=("a",), group="subject"), TraceError, "no tokens in group 'subject'"),
        (ZeroAblation(group="subject"), TraceError, "no tokens in group 'subject'"),
    ]
    for corruption, error, message in cases:
        with pytest.raises(error) as caught:
            corruption.corrupt(random_llava, prompt)
        assert message in str(caught.value)


def test_the_answer_is_never_damaged(random_llava, photo):
    prompt = ask(random_llava, photo).with_answer("Ada Example")
    last = prompt.groups["last"][0]
    with pytest.raises(TraceError, match=rf"group 'answer' reaches beyond the prompt's last token \(position {last}\)"):
        ZeroAblation(group="answer").corrupt(random_llava, prompt)
    assert ZeroAblation(group="last").corrupt(random_llava, prompt).embeddings.shape[1] == last + 1
