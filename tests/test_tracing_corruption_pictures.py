"""Damaged pictures: only what was asked changes in the pixels, only image positions change after them."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.tracing import BlankImage, BlurImage, MaskBoxes, SwapImage, TraceError
from PIL import Image, ImageFilter

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
DAMAGES = [BlankImage(), BlurImage(), BlurImage(radius=1), MaskBoxes(boxes=((8, 16, 24, 32),))]
SIDE = 32  # the processor takes pictures of this size as they are


@pytest.fixture
def small(make_photo) -> Image.Image:
    """A picture whose pixels are the processor's."""
    return make_photo(3, SIDE)


def ask(vlm: VisionLanguageModel, image: Image.Image | list[Image.Image]) -> Prompt:
    return vlm.prompt(image, QUESTION, constraint=CONSTRAINT)


@pytest.mark.parametrize("corruption", DAMAGES, ids=str)
def test_image_positions_change_and_no_other(random_llava, photo, corruption):
    prompt = ask(random_llava, photo).with_answer("Ada Example")
    clean, found = random_llava.embed(prompt).embeddings, corruption.corrupt(random_llava, prompt)
    assert found.embeddings.shape == clean.shape
    assert tuple((found.embeddings[0] != clean[0]).any(-1).nonzero().flatten().tolist()) == prompt.groups["image"]
    (inputs,) = found.inputs
    assert torch.equal(random_llava.embeddings(dict(inputs)), found.embeddings)
    assert (found.seed, found.scale, found.deviation) == (None, None, None)


@pytest.mark.parametrize(
    ("corruption", "by_hand"),
    [
        (BlankImage(), lambda image: Image.new("RGB", image.size, (127, 127, 127))),
        (BlankImage(colour="red"), lambda image: Image.new("RGB", image.size, (255, 0, 0))),
        (BlurImage(radius=2), lambda image: image.filter(ImageFilter.GaussianBlur(2))),
        (BlurImage(), lambda image: image.filter(ImageFilter.GaussianBlur(10))),
    ],
    ids=["blank", "red", "blurred by 2", "blurred by 10"],
)
def test_it_is_what_the_model_sees_of_a_picture_changed_by_hand(random_llava, photo, corruption, by_hand):
    prompt, before = ask(random_llava, photo), photo.tobytes()
    found = corruption.corrupt(random_llava, prompt)
    assert torch.equal(found.embeddings, random_llava.embeddings(ask(random_llava, by_hand(photo))))
    assert photo.tobytes() == prompt.images[0].tobytes() == before


def test_a_box_changes_its_pixels_and_no_other(random_llava, small):
    prompt = ask(random_llava, small)
    boxes, colour = ((4, 8, 12, 10), (30, 0, 32, 32)), (1, 2, 3)
    (inputs,) = MaskBoxes(boxes=boxes, colour=colour).corrupt(random_llava, prompt).inputs
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    clean, masked = prompt.inputs["pixel_values"], inputs["pixel_values"]
    assert torch.equal(clean[..., ~inside], masked[..., ~inside])
    painted = ask(random_llava, Image.new("RGB", (SIDE, SIDE), colour)).inputs["pixel_values"]
    assert torch.equal(masked[..., inside], painted[..., inside])
    assert not torch.equal(clean[..., inside], masked[..., inside])


def test_a_box_over_everything_is_a_blank(random_llava, photo):
    prompt = ask(random_llava, photo)
    whole = MaskBoxes(boxes=((0, 0, *photo.size),)).corrupt(random_llava, prompt)
    assert torch.equal(whole.embeddings, BlankImage().corrupt(random_llava, prompt).embeddings)
    most = MaskBoxes(boxes=((0, 0, photo.width, photo.height - 8),)).corrupt(random_llava, prompt)
    assert not torch.equal(most.embeddings, whole.embeddings)


@pytest.mark.parametrize("corruption", DAMAGES, ids=str)
def test_of_several_pictures_only_the_chosen_one_changes(random_llava, photo, other_photo, corruption):
    prompt = ask(random_llava, [photo, other_photo])
    clean = random_llava.embed(prompt).embeddings
    image = prompt.groups["image"]
    halves = {0: image[: len(image) // 2], 1: image[len(image) // 2 :], None: image}
    for chosen, positions in halves.items():
        found = replace(corruption, image=chosen).corrupt(random_llava, prompt)
        assert tuple((found.embeddings != clean).any(-1)[0].nonzero().flatten().tolist()) == positions
        assert ("the image" if chosen is None else f"image {chosen}") in found.description
    for missing in (2, -1):
        with pytest.raises(TraceError, match=rf"no picture {missing}: the prompt has 2 \(0 to 1\); pass one, or None"):
            replace(corruption, image=missing).corrupt(random_llava, prompt)


@pytest.mark.parametrize(
    ("corruption", "description"),
    [
        (BlankImage(), "blank the image with colour (127, 127, 127)"),
        (BlankImage(colour="#010203"), "blank the image with colour (1, 2, 3)"),
        (BlurImage(radius=2.5), "blur the image with a radius of 2.5 pixels"),
        (
            MaskBoxes(boxes=((0, 0, 8, 8), (8, 8, 9, 9))),
            "mask boxes 0,0,8,8; 8,8,9,9 of the image with colour (127, 127, 127)",
        ),
    ],
    ids=str,
)
def test_the_damage_is_said_in_words(random_llava, photo, corruption, description):
    assert corruption.corrupt(random_llava, ask(random_llava, photo)).description == description


def test_damage_to_no_picture_is_refused(random_llava, random_llama):
    for vlm in (random_llava, random_llama):
        for corruption in DAMAGES:
            with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image to the prompt"):
                corruption.corrupt(vlm, vlm.prompt(None, QUESTION))


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (0, -1, 8, 8), (0, 0, 49, 8), (0, 0, 8, 41), (48, 0, 50, 8)])
def test_a_box_outside_the_picture_is_refused_with_the_valid_range(random_llava, make_photo, box):
    prompt = ask(random_llava, make_photo(1).crop((0, 0, 48, 40)))
    with pytest.raises(TraceError) as caught:
        MaskBoxes(boxes=((0, 0, 48, 40), box)).corrupt(random_llava, prompt)
    assert str(caught.value) == (
        f"box {box} reaches beyond the picture; pass left and right from 0 to 48, top and bottom from 0 to 40"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurImage(radius=0), "a blur of radius 0 changes nothing; pass a positive number"),
        (lambda: BlurImage(radius=float("nan")), "a blur of radius nan changes nothing"),
        (lambda: MaskBoxes(boxes=()), "no boxes to mask; pass some as (left, top, right, bottom)"),
        (lambda: MaskBoxes(boxes=(0, 0, 8, 8)), "no box 0; pass four whole numbers"),
        (lambda: MaskBoxes(boxes=((0, 0, 8),)), "no box (0, 0, 8); pass four whole numbers"),
        (lambda: MaskBoxes(boxes=((0, 0, 0.5, 1),)), "no box (0, 0, 0.5, 1); pass four whole numbers"),
        (lambda: MaskBoxes(boxes=((8, 0, 8, 8),)), "box (8, 0, 8, 8) is empty; pass left < right and top < bottom"),
        (lambda: MaskBoxes(boxes=((0, 9, 8, 8),)), "box (0, 9, 8, 8) is empty"),
        (lambda: MaskBoxes(boxes=((0, 0, 8, 8),), colour=(0, 0)), "no colour (0, 0); pass red, green and blue"),
        (lambda: BlankImage(colour=(0, 0, 256)), "no colour (0, 0, 256)"),
        (lambda: BlankImage(colour="#01020304"), "no colour '#01020304'"),
        (lambda: BlankImage(colour="no such"), "no colour 'no such'; pass red, green and blue from 0 to 255, such as"),
        (lambda: BlankImage(colour=127), "no colour 127"),
    ],
)
def test_damage_that_cannot_be_is_refused(make, message):
    with pytest.raises(TraceError) as caught:
        make()
    assert message in str(caught.value)


def uncropped(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The model with a processor that keeps a picture's shape, so that another shape takes another number of tokens."""
    processor = deepcopy(vlm.processor)
    processor.image_processor.do_center_crop = False
    return replace(vlm, frontend=replace(vlm.frontend, processor=processor))


def test_a_picture_of_another_size_is_refused_or_resized(random_llava, photo, other_photo):
    vlm, wide = uncropped(random_llava), other_photo.resize((96, 48))
    prompt = ask(vlm, photo)
    longer = len(vlm.frontend.encode(prompt.text, [wide])["input_ids"][0])
    assert longer > prompt.length
    with pytest.raises(TraceError) as caught:
        SwapImage(wide).corrupt(vlm, prompt)
    assert str(caught.value) == (
        f"the other picture turns {prompt.length} tokens into {longer}; pass a picture of the same size as the "
        "prompt's (48 x 48 pixels), or resize=True to resize it first"
    )
    found = SwapImage(wide, resize=True).corrupt(vlm, prompt)
    assert torch.equal(found.embeddings, vlm.embeddings(ask(vlm, wide.resize(photo.size))))
    changed = (found.embeddings != vlm.embed(prompt).embeddings).any(-1)[0].nonzero().flatten()
    assert tuple(changed.tolist()) == prompt.groups["image"]


def test_each_picture_is_resized_to_its_own_place(random_llava, make_photo):
    old = [make_photo(1, 40), make_photo(2, 56)]
    new = [make_photo(3, 64), make_photo(4, 44)]
    prompt = ask(random_llava, old)
    found = SwapImage(new, resize=True).corrupt(random_llava, prompt)
    by_hand = [new[0].resize((40, 40)), new[1].resize((56, 56))]
    assert torch.equal(found.inputs[0]["pixel_values"], ask(random_llava, by_hand).inputs["pixel_values"])
    unsized = SwapImage(new).corrupt(random_llava, prompt)
    assert not torch.equal(unsized.embeddings, found.embeddings)
    with pytest.raises(TraceError, match="has 2 pictures, 1 were given to swap; pass as many"):
        SwapImage(new[0], resize=True).corrupt(random_llava, prompt)


def test_resizing_is_not_offered_where_it_cannot_help(random_llava, photo, other_photo):
    prompt = replace(ask(random_llava, photo), text=f"{ask(random_llava, photo).text} Yes")
    with pytest.raises(TraceError, match=r"it is of the same size \(48 x 48 pixels\), so resizing cannot help"):
        SwapImage(other_photo, resize=True).corrupt(random_llava, prompt)


def test_swapping_comes_with_its_inputs(random_llava, photo, other_photo):
    (inputs,) = SwapImage(other_photo).corrupt(random_llava, ask(random_llava, photo)).inputs
    assert torch.equal(inputs["pixel_values"], ask(random_llava, other_photo).inputs["pixel_values"])
    assert not torch.equal(inputs["pixel_values"], ask(random_llava, photo).inputs["pixel_values"])
