"""Corruptions: only what was asked is damaged, lengths stay, the seed decides, and the command line can spell them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.tracing import (
    BlankImage,
    BlurImage,
    Corruption,
    ImageNoise,
    MaskBoxes,
    MeanAblation,
    PixelNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    ZeroAblation,
    parse_corruption,
)
from PIL import Image

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def touched(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption) -> tuple[int, ...]:
    """Positions whose embeddings differ from the clean ones in some sample."""
    difference = corruption.corrupt(vlm, prompt).embeddings - vlm.embeddings(prompt)
    return tuple(difference.abs().amax((0, 2)).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("corruption", "group"),
    [
        (ReplaceText(replacement="Paris city"), "constraint"),
        (ReplaceText(replacement="Oslo", group="constraint_last"), "constraint_last"),
        (TextNoise(samples=2), "constraint"),
        (TextNoise(samples=2, group="question"), "question"),
        (TextNoise(samples=2, over="prompt"), "constraint"),
        (PixelNoise(samples=2), "image"),
        (ImageNoise(samples=2), "image"),
    ],
    ids=str,
)
def test_only_the_group_is_touched(random_llava, photo, corruption, group):
    prompt = ask(random_llava, photo)
    assert touched(random_llava, prompt, corruption) == prompt.groups[group]


def test_a_swapped_image_touches_image_positions_only(random_llava, photo, other_photo, tmp_path):
    prompt, path = ask(random_llava, photo), tmp_path / "other.png"
    other_photo.save(path)
    corrupted = SwapImage(path).corrupt(random_llava, prompt)
    assert touched(random_llava, prompt, SwapImage(path)) == prompt.groups["image"]
    assert corrupted.description == "swap the image for other.png"
    assert torch.equal(corrupted.embeddings, random_llava.embeddings(ask(random_llava, other_photo)))


def test_prompts_with_several_images_swap_as_many(random_llava, photo, other_photo):
    prompt = random_llava.prompt([photo, other_photo], QUESTION)
    swapped = SwapImage([other_photo, photo]).corrupt(random_llava, prompt)
    assert torch.equal(swapped.embeddings, random_llava.embeddings(random_llava.prompt([other_photo, photo], QUESTION)))
    with pytest.raises(TraceError, match="has 2 pictures, 1 were given"):
        SwapImage(photo).corrupt(random_llava, prompt)


@pytest.mark.parametrize("noise", [partial(TextNoise, over="prompt"), ImageNoise], ids=["words", "image"])
def test_noise_is_decided_by_its_seed_and_has_the_asked_size(random_llava, photo, noise):
    prompt = ask(random_llava, photo)
    group = list(prompt.groups["image" if noise is ImageNoise else "constraint"])
    first, again, other = (noise(samples=40, seed=seed).corrupt(random_llava, prompt) for seed in (1, 1, 2))
    assert torch.equal(first.embeddings, again.embeddings)
    assert not torch.equal(first.embeddings, other.embeddings)
    assert (first.seed, other.seed) == (1, 2)
    clean = random_llava.embeddings(prompt)[:, group]
    assert torch.equal(noise(samples=3, seed=1).corrupt(random_llava, prompt).embeddings, first.embeddings[:3])
    drawn = first.embeddings[:, group] - clean
    assert float(drawn.std() / clean.std()) == pytest.approx(3, rel=0.05)
    assert abs(float(drawn.mean() / drawn.std())) < 0.05


@pytest.mark.parametrize(
    ("name", "replacement", "repeat"),
    [
        ("a shorter phrase starts over", "Paris", False),
        ("a longer phrase is cut", "Paris, Rome, Lima, Oslo and Kyoto are cities", False),
        ("the first token repeats", "Paris city", True),
    ],
)
def test_a_replacement_takes_exactly_the_tokens_of_the_span(random_vlm, photo, name, replacement, repeat):
    prompt = ask(random_vlm, photo)
    corruption = ReplaceText(replacement=replacement, repeat_first_token=repeat)
    ids = random_vlm.tokenizer(f" {replacement}", add_special_tokens=False)["input_ids"]
    length = len(prompt.groups["constraint"])
    wanted = ids[:1] * length if repeat else (ids * length)[:length]
    inputs = dict(prompt.inputs) | {"input_ids": prompt.inputs["input_ids"].clone()}
    inputs["input_ids"][0, list(prompt.groups["constraint"])] = torch.tensor(wanted)
    corrupted = corruption.corrupt(random_vlm, prompt)
    assert torch.equal(corrupted.embeddings, random_vlm.embeddings(inputs)), name
    assert corrupted.description == f"replace {CONSTRAINT!r} by {random_vlm.decode(wanted).strip()!r}"


def test_a_span_at_the_start_gets_no_blank(random_llava, photo):
    who, what = (
        random_llava.prompt(photo, "Who founded it?", constraint="Who"),
        random_llava.prompt(photo, "X founded it?"),
    )
    assert who.length == what.length
    corrupted = ReplaceText(replacement="X").corrupt(random_llava, who)
    assert torch.equal(corrupted.embeddings, random_llava.embeddings(what))


def test_corrupting_leaves_the_prompt_and_its_answer_alone(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo).with_answer("Ada Example")
    before = {name: value.clone() for name, value in prompt.inputs.items()}
    pictures = (SwapImage(other_photo), BlankImage(), BlurImage(), MaskBoxes(boxes=((0, 0, 8, 8),)))
    ablations = (ZeroAblation(), MeanAblation(references=[other_photo]))
    noises = (TextNoise(), ImageNoise(), PixelNoise(samples=2))
    for corruption in (ReplaceText(replacement="Oslo"), *noises, *pictures, *ablations):
        assert corruption.corrupt(random_llava, prompt).embeddings.shape[1] == prompt.groups["last"][0] + 1
    assert all(torch.equal(prompt.inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("swap:other.jpg", SwapImage("other.jpg")),
        ("swap:C:/photos/other.jpg", SwapImage("C:/photos/other.jpg")),
        ("replace:Paris city", ReplaceText(replacement="Paris city")),
        ("text-noise:3", TextNoise(scale=3.0)),
        ("image-noise:0.5", ImageNoise(scale=0.5)),
        ("image-noise", ImageNoise()),
        ("text-noise", TextNoise()),
        ("text-noise:auto", TextNoise(scale=None)),
        ("image-noise:auto", ImageNoise(scale=None)),
        ("pixel-noise", PixelNoise()),
        ("pixel-noise:2", PixelNoise(scale=2.0)),
        ("pixel-noise:auto", PixelNoise(scale=None)),
        ("blank", BlankImage()),
        ("blur", BlurImage()),
        ("blur:2.5", BlurImage(radius=2.5)),
        ("boxes:0,0,8,8", MaskBoxes(boxes=((0, 0, 8, 8),))),
        ("boxes:0,0,8,8; 8, 8,16,9", MaskBoxes(boxes=((0, 0, 8, 8), (8, 8, 16, 9)))),
        ("zero", ZeroAblation()),
        ("zero:constraint", ZeroAblation(group="constraint")),
        ("mean:one.jpg", MeanAblation(references=("one.jpg",))),
        ("mean:one.jpg, C:/two.jpg", MeanAblation(references=("one.jpg", "C:/two.jpg"))),
    ],
)
def test_the_command_line_spells_corruptions(text, expected):
    assert parse_corruption(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no corruption ''; write swap:other.jpg, replace:Paris city, text-noise:3, image-noise:3, pixel-noise:3"),
        ("blurr:3", "no corruption 'blurr:3'; write swap:"),
        ("blank:red", "no corruption 'blank:red'; write swap:"),
        ("blur:-1", "a blur of radius -1.0 changes nothing; pass a positive number"),
        ("blur:much", "'much' in 'blur:much' is not a number; write the radius, such as blur:3"),
        ("boxes:0,0,8", "'0,0,8' in 'boxes:0,0,8' is no box; write left, top, right and bottom in pixels, such as"),
        ("boxes:0,0,8,8;", "'' in 'boxes:0,0,8,8;' is no box"),
        ("boxes:0,0,8,x", "'0,0,8,x' in 'boxes:0,0,8,x' is no box"),
        ("boxes:8,0,0,8", "box (8, 0, 0, 8) is empty; pass left < right"),
        ("mean: ,", "no corruption 'mean: ,'; write swap:"),
        ("swap:", "no corruption 'swap:'; write swap:"),
        ("replace: ", "the replacement is empty; pass the words"),
        ("text-noise:loud", "'loud' in 'text-noise:loud' is not a number; write the noise scale, such as text-noise:3"),
        ("image-noise:-1", "noise scale -1.0 destroys nothing; pass a positive number"),
        ("text-noise:nan", "noise scale nan destroys nothing"),
    ],
)
def test_misspelt_corruptions_are_refused(text, message):
    with pytest.raises(TraceError) as caught:
        parse_corruption(text)
    assert message in str(caught.value)


def test_corruptions_that_do_not_fit_the_prompt_are_refused(random_llava, random_llama, photo, tmp_path):
    bare, blind = random_llava.prompt(photo, QUESTION), random_llava.prompt(None, QUESTION)
    text_only = random_llama.prompt(None, QUESTION, constraint=CONSTRAINT)
    truncated = tmp_path / "truncated.png"
    photo.save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:200])
    cases = [
        (random_llava, bare, TextNoise(), TraceError, "no tokens in group 'constraint' of this prompt; groups with"),
        (random_llava, bare, ReplaceText(replacement="Oslo"), TraceError, "pass constraint= to the prompt"),
        (random_llava, bare, ReplaceText(replacement="Oslo", group="image"), TraceError, "use SwapImage instead"),
        (random_llava, bare, TextNoise(group="subject"), TraceError, "no tokens in group 'subject'"),
        (random_llava, blind, ImageNoise(), TraceError, "no tokens in group 'image'"),
        (random_llava, blind, SwapImage(photo), TraceError, "pass an image to the prompt"),
        (random_llama, text_only, SwapImage(photo), TraceError, "no tokens in group 'image'"),
        (random_llava, bare, SwapImage(tmp_path / "none.png"), ModelError, "none.png"),
        (random_llava, bare, SwapImage(truncated), ModelError, "truncated.png"),
        (random_llava, replace(bare, text=bare.text + " Yes"), SwapImage(photo), TraceError, "of the same size"),
    ]
    for vlm, prompt, corruption, error, message in cases:
        with pytest.raises(error) as caught:
            corruption.corrupt(vlm, prompt)
        assert message in str(caught.value)


def test_a_noise_without_samples_is_refused():
    with pytest.raises(TraceError, match="0 noise samples; pass at least 1"):
        TextNoise(samples=0)
