"""Noise: where it lies, how large it is, that its seed decides it; calibration takes the smallest that works."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from multrace import Prompt, VisionLanguageModel, load
from multrace.data import World
from multrace.models.frame import DecoderInput
from multrace.tracing import ImageNoise, PixelNoise, ReplaceText, TextNoise, TraceError, calibrate
from multrace.tracing.corruptions import CONSTRAINTS, LADDER, Noise
from PIL import Image
from torch import Tensor

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
NOISES = [TextNoise, ImageNoise, PixelNoise]


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def constraint_of(vlm: VisionLanguageModel, prompt: Prompt) -> Tensor:
    """(token, hidden): clean embeddings of the constraint."""
    return vlm.embeddings(prompt)[0, list(prompt.groups["constraint"])]


def words_of(vlm: VisionLanguageModel, prompt: Prompt) -> str:
    """The constraint with the blank before it, which makes its tokens those of the running question."""
    ids = prompt.inputs["input_ids"][0, list(prompt.groups["constraint"])].tolist()
    words = vlm.tokenizer.decode(ids)
    assert vlm.tokenizer(words, add_special_tokens=False)["input_ids"] == ids
    return words


def naive_deviation(vlm: VisionLanguageModel, phrases: tuple[str, ...]) -> float:
    """Standard deviation of the embedding table's rows that the phrases pick, one by one."""
    table = vlm.model.get_input_embeddings().weight.double()
    entries = [
        float(entry)
        for phrase in phrases
        for token in vlm.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        for entry in table[token]
    ]
    mean = sum(entries) / len(entries)
    return (sum((entry - mean) ** 2 for entry in entries) / (len(entries) - 1)) ** 0.5


def test_by_default_noise_on_words_is_measured_over_a_corpus_of_constraints(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    found = TextNoise(samples=1).corrupt(random_vlm, prompt)
    assert found.scale == 3
    assert found.deviation == pytest.approx(naive_deviation(random_vlm, CONSTRAINTS), rel=1e-6)
    assert 60 <= len(set(CONSTRAINTS)) == len(CONSTRAINTS) <= 100


def test_over_the_prompt_it_is_measured_by_the_groups_own_words(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    corpus, own = (TextNoise(samples=1, over=over).corrupt(random_vlm, prompt) for over in ("corpus", "prompt"))
    assert own.deviation == pytest.approx(constraint_of(random_vlm, prompt).double().std().item(), rel=1e-12)
    assert abs(own.deviation / corpus.deviation - 1) > 1e-4
    assert not torch.equal(own.embeddings, corpus.embeddings)
    assert own.description == "noise of 3 standard deviations of their own on the constraint tokens, one sample"
    assert corpus.description == "noise of 3 standard deviations over a corpus on the constraint tokens, one sample"


def test_a_corpus_of_ones_own_replaces_the_default(random_vlm, photo):
    prompt, phrases = ask(random_vlm, photo), ("the flag", "the capital of the country")
    found = TextNoise(samples=1, corpus=phrases).corrupt(random_vlm, prompt)
    assert found.deviation == pytest.approx(naive_deviation(random_vlm, phrases), rel=1e-6)
    assert abs(found.deviation / naive_deviation(random_vlm, CONSTRAINTS) - 1) > 1e-4
    same = TextNoise(samples=1, corpus=(words_of(random_vlm, prompt),)).corrupt(random_vlm, prompt)
    own = TextNoise(samples=1, over="prompt").corrupt(random_vlm, prompt)
    assert same.deviation == pytest.approx(own.deviation, rel=1e-6)  # the corpus is the constraint, token for token


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_seeds_normal_numbers_times_scale_and_deviation(llava_llama_path, photo, noise, dtype):
    vlm = load(llava_llama_path, dtype=dtype, verify=False)
    prompt = ask(vlm, photo)
    found = noise(scale=2, samples=3, seed=5).corrupt(vlm, prompt)
    group = list(prompt.groups["constraint" if noise is TextNoise else "image"])
    pixels = prompt.inputs["pixel_values"]
    clean = pixels if noise is PixelNoise else vlm.embeddings(prompt)[:, group]
    drawn = torch.randn(3, *(pixels.shape if noise is PixelNoise else clean.shape[1:]), dtype=torch.float64,
                        generator=torch.Generator().manual_seed(5))  # fmt: skip
    expected = (clean.double() + 2 * found.deviation * drawn).to(clean)
    if noise is PixelNoise:
        assert torch.equal(torch.stack([each["pixel_values"] for each in found.inputs]), expected)
    else:
        assert torch.equal(found.embeddings[:, group], expected)
    if noise is not TextNoise:
        assert found.deviation == pytest.approx(clean.double().std().item(), rel=1e-12)
    assert (found.embeddings.dtype, found.seed, found.scale) == (clean.dtype, 5, 2)
    assert torch.equal(pixels, ask(vlm, photo).inputs["pixel_values"])


@pytest.mark.parametrize("noise", NOISES)
def test_every_sample_leaves_the_other_positions_bit_equal(random_llava, photo, noise):
    prompt = ask(random_llava, photo)
    clean = random_llava.embed(prompt).embeddings
    found = noise(samples=4).corrupt(random_llava, prompt)
    group = prompt.groups["constraint" if noise is TextNoise else "image"]
    assert found.embeddings.shape == (4, *clean.shape[1:])
    for sample in found.embeddings:
        assert tuple((sample != clean[0]).any(-1).nonzero().flatten().tolist()) == group
    assert len({float(sample.double().sum()) for sample in found.embeddings}) == 4


@pytest.mark.parametrize("noise", NOISES)
def test_another_seed_is_another_noise_and_the_same_the_same(random_llava, photo, noise):
    prompt = ask(random_llava, photo)
    first, again, other = (noise(samples=2, seed=seed).corrupt(random_llava, prompt) for seed in (1, 1, 2))
    assert torch.equal(first.embeddings, again.embeddings)
    assert not torch.equal(first.embeddings, other.embeddings)


def test_noisy_pixels_come_with_the_inputs_of_each_sample(random_llava, photo):
    prompt = ask(random_llava, photo).with_answer("Ada Example")
    found = PixelNoise(samples=3).corrupt(random_llava, prompt)
    assert len(found.inputs) == 3
    for sample, inputs in zip(found.embeddings, found.inputs, strict=True):
        assert torch.equal(random_llava.embeddings(dict(inputs))[0], sample)
        assert inputs["input_ids"].shape[1] == len(sample) == prompt.groups["last"][0] + 1
    assert found.description == "noise of 3 standard deviations on the pixels, 3 samples"
    for noise in (TextNoise, ImageNoise):
        assert noise(samples=3).corrupt(random_llava, prompt).inputs == ()


def test_several_pictures_are_all_noised(random_llava, photo, other_photo):
    prompt = random_llava.prompt([photo, other_photo], QUESTION)
    found = PixelNoise(samples=2).corrupt(random_llava, prompt)
    clean = prompt.inputs["pixel_values"]
    assert all((each["pixel_values"] != clean).any((1, 2, 3)).all() for each in found.inputs)
    assert found.deviation == pytest.approx(clean.double().std().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "noise scale 0.0 destroys nothing; pass a positive number, such as 3, or None to calibrate"),
        ({"scale": float("inf")}, "noise scale inf destroys nothing"),
        ({"samples": 0}, "0 noise samples; pass at least 1"),
        ({"over": "batch"}, "no deviation over 'batch'; pass over='corpus' or over='prompt'"),
        ({"over": "prompt", "corpus": ("a",)}, "a corpus plays no part with over='prompt'; leave out corpus="),
        ({"corpus": ()}, "a corpus of phrases cannot be (); pass a tuple of phrases"),
        ({"corpus": "the flag"}, "a corpus of phrases cannot be 'the flag'; pass a tuple of phrases"),
    ],
)
def test_noises_that_cannot_be_are_refused(settings, message):
    with pytest.raises(TraceError) as caught:
        TextNoise(**settings)
    assert message in str(caught.value)


def test_noise_without_anything_to_measure_it_by_is_refused(random_llava, photo):
    prompt = ask(random_llava, photo)
    flat = {**prompt.inputs, "pixel_values": torch.ones_like(prompt.inputs["pixel_values"])}
    with pytest.raises(TraceError, match="noise on the pixels is measured in standard deviations, and here that is 0;"):
        PixelNoise().corrupt(random_llava, replace(prompt, inputs=flat))
    with pytest.raises(TraceError, match=r"no tokens in the phrases \[''\]; pass phrases with words"):
        TextNoise(corpus=("",)).corrupt(random_llava, prompt)
    with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image to the prompt"):
        PixelNoise().corrupt(random_llava, random_llava.prompt(None, QUESTION))


@pytest.mark.parametrize("noise", NOISES)
def test_without_a_scale_it_says_who_finds_one(random_llava, photo, noise):
    with pytest.raises(TraceError) as caught:
        noise(scale=None).corrupt(random_llava, ask(random_llava, photo))
    assert str(caught.value) == (
        f"{noise.__name__} has no scale yet (scale=None); use causal_trace or calibrate, which find one, or pass a "
        "number, such as scale=3"
    )


@pytest.fixture(scope="module")
def known(tiny_vlm: VisionLanguageModel) -> tuple[Prompt, Callable[[Tensor], float]]:
    """A question that the trained model answers, and the probability of that answer."""
    world = World()
    fact = world.facts[3]
    record = world.question(fact)
    picture = world.picture(world.entities[fact.entity], 5).image
    prompt = tiny_vlm.prompt(picture, record.text, constraint=record.constraint)
    with torch.no_grad():
        answer = int(tiny_vlm.logits(prompt)[0, -1].argmax())

    def score(entering: DecoderInput) -> float:
        with torch.no_grad():
            return float(tiny_vlm.forward(entering)[:, -1].double().softmax(-1)[:, answer].mean())

    return prompt, score


@pytest.mark.parametrize("noise", NOISES)
def test_calibration_takes_the_smallest_scale_that_halves_the_answer(tiny_vlm, known, noise):
    prompt, score = known
    unscaled = noise(scale=None, samples=4, seed=3)
    found = calibrate(tiny_vlm, prompt, unscaled, score)
    unharmed = tiny_vlm.embed(prompt)
    clean, step = score(unharmed), LADDER.index(found.scale)
    assert clean > 0.9
    assert score(found.entering(unharmed)) <= clean / 2
    assert step > 0  # else there is no step less to compare with
    less = replace(unscaled, scale=LADDER[step - 1]).corrupt(tiny_vlm, prompt)
    assert score(less.entering(unharmed)) > clean / 2
    again = replace(unscaled, scale=found.scale).corrupt(tiny_vlm, prompt)
    assert torch.equal(found.embeddings, again.embeddings)
    assert found.deviation == again.deviation
    assert found.description == f"{again.description}, calibrated"
    assert len(found.inputs) == (4 if noise is PixelNoise else 0)


def test_where_no_scale_halves_the_answer_it_takes_the_one_that_lowers_it_most(random_llava, photo):
    prompt, unscaled = ask(random_llava, photo), ImageNoise(scale=None, samples=20)
    image, clean = list(prompt.groups["image"]), random_llava.embed(prompt).embeddings
    deviation = replace(unscaled, scale=1).corrupt(random_llava, prompt).deviation

    def lowest_at_five(entering: DecoderInput) -> float:
        return 10 + abs(float((entering.embeddings - clean)[:, image].std()) / deviation - 5)  # 15 on the clean prompt

    found = calibrate(random_llava, prompt, unscaled, lowest_at_five)
    assert found.scale == 5
    assert found.description.endswith("20 samples, calibrated (no scale tried halves the score)")


def test_what_has_a_scale_or_knows_none_is_not_calibrated(random_llava, photo):
    prompt = ask(random_llava, photo)

    def never(_: Tensor) -> float:
        raise AssertionError("scored")

    for corruption in (TextNoise(scale=0.5, samples=2), ReplaceText(replacement="Oslo")):
        found, expected = calibrate(random_llava, prompt, corruption, never), corruption.corrupt(random_llava, prompt)
        assert torch.equal(found.embeddings, expected.embeddings)
        assert found.description == expected.description
        assert found.scale == getattr(corruption, "scale", None)


def test_a_score_that_is_no_number_calibrates_nothing(random_llava, photo):
    prompt = ask(random_llava, photo)
    with pytest.raises(TraceError, match="the score of the clean prompt is nan, so no noise can be calibrated by it"):
        calibrate(random_llava, prompt, ImageNoise(scale=None), lambda _: float("nan"))
    with pytest.raises(TraceError, match=r"the score of noise of scale 0\.25 is nan"):
        calibrate(random_llava, prompt, ImageNoise(scale=None), lambda each: 1.0 if each.rows == 1 else float("nan"))


def test_every_noise_is_a_noise_and_nothing_else_is():
    assert all(issubclass(noise, Noise) for noise in NOISES)
    assert not isinstance(ReplaceText(replacement="Oslo"), Noise)
