"""The frame of a run: cut, continued, repeated and padded, it gives what the model gives to the prompt itself."""

from pathlib import Path

import multrace as mt
import pytest
import torch
from model_fixtures import draw_photo
from multrace.models import collate
from multrace.models.frame import DecoderInput, Frame

from .battery import true_float64
from .folders import write
from .table import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
QUESTION, SHORT = "Who founded the company in this photo?", "Who?"
CLOSE = 1e-5
"""Between logits of a prompt at other places of a batch: rotary angles are float32 everywhere."""


@pytest.fixture(scope="module", params=["qwen3_vl", "gemma3", "paligemma2", "mllama"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mt.VisionLanguageModel:
    """Positions on three axes and DeepStack, a picture's block, a prefix, and pictures that are attended to."""
    folder: Path = write(RECIPES[request.param], tmp_path_factory.mktemp(request.param))
    return mt.load(folder, dtype="float64", verify=False)


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@torch.no_grad()
def test_a_run_is_the_models_own_only_in_its_frame(vlm):
    prompt = vlm.prompt(draw_photo(1), QUESTION)
    own, entering = vlm.logits(prompt), vlm.decoder_input(prompt)
    assert entering.frame
    assert torch.equal(vlm.forward(entering), own)
    assert gap(vlm.forward(entering.embeddings), own) > 1e-3
    twice = vlm.forward(entering.for_rows(2))
    assert gap(twice, own) < CLOSE


@torch.no_grad()
def test_a_continued_frame_is_that_of_the_prompt_with_its_answer(vlm):
    prompt = vlm.prompt(draw_photo(1), QUESTION)
    answered = prompt.with_answer("Paris tennis")
    extended = vlm.extend(vlm.embed(prompt), (*answered.answer_ids, 0))
    assert extended.length == answered.length
    assert gap(vlm.forward(extended), vlm.logits(answered)) < CLOSE
    assert gap(vlm.forward(vlm.embed(answered)), vlm.logits(prompt)) < CLOSE  # the answer is cut off again


@torch.no_grad()
def test_a_padded_batch_keeps_the_frame_of_each_row(vlm):
    prompts = [vlm.prompt(draw_photo(1), QUESTION, answer="Paris"), vlm.prompt(draw_photo(2), SHORT)]
    inputs, shifts = [vlm.decoder_input(prompt) for prompt in prompts], (2, 5)
    batch = DecoderInput.padded(inputs, shifts)
    for logits, prompt, shift in zip(vlm.forward(batch), prompts, shifts, strict=True):
        assert gap(logits[shift : shift + prompt.length], vlm.logits(prompt)[0]) < CLOSE
    (second,) = vlm.forward(batch.of_rows([1]))
    assert gap(second[5 : 5 + prompts[1].length], vlm.logits(prompts[1])[0]) < CLOSE


@torch.no_grad()
def test_rows_of_a_padded_batch_have_the_positions_that_they_have_alone(vlm, monkeypatch):
    prompts = [vlm.prompt(draw_photo(1), QUESTION), vlm.prompt(draw_photo(2), SHORT)]
    inputs, shifts = collate(prompts, vlm.tokenizer)

    def largest_gap() -> float:
        rows = zip(vlm.logits(inputs), prompts, shifts, strict=True)
        return max(gap(logits[shift:], vlm.logits(prompt)[0]) for logits, prompt, shift in rows)

    with true_float64(vlm):
        assert largest_gap() < 1e-12
        monkeypatch.setitem(vars(vlm), "first_position", 1 - vlm.first_position)
        counts_itself = "position_ids" in vlm.embed(prompts[0]).frame.keywords and vlm.family.name != "paligemma_gemma2"
        assert counts_itself or largest_gap() > 1e-9  # rotary angles are float32


@torch.no_grad()
def test_a_run_is_split_only_where_no_earlier_token_sees_a_later_one(vlm):
    prompt = vlm.prompt(draw_photo(1), QUESTION)
    frame, image = vlm.decoder_input(prompt).frame, prompt.groups["image"]
    is_prefix = vlm.family.prefix
    assert frame.split_before(prompt.length - 1) == (0 if is_prefix else prompt.length - 1)
    if vlm.family.name.startswith("gemma3"):
        assert frame.split_before(image[2]) == image[0]


def test_a_frame_of_other_tokens_is_refused(vlm):
    prompt = vlm.prompt(draw_photo(1), QUESTION)
    entering = vlm.embed(prompt)
    with pytest.raises(mt.ModelError, match="tokens, and the embeddings have"):
        vlm.forward(entering.with_embeddings(entering.embeddings[:, 1:]))
    with pytest.raises(mt.ModelError, match="does not fit 3 rows"):
        entering.frame.for_rows(2).for_rows(3)
    assert not Frame()
