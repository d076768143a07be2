"""Which image positions see a box, in one plain grid and in tiles, against pixels that are changed box by box."""

from dataclasses import replace

import multrace
import pytest
import torch
from families.battery import silenced
from families.folders import write
from families.table import RECIPES
from multrace import EditRequest, ModelError
from multrace.editing import second_moments
from multrace.editing.baselines import FineTune
from multrace.models import Family, batches, collate
from multrace.tracing import Box, TraceError
from multrace.tracing.engine import box_patches, box_positions
from PIL import Image
from random_models import CHAT_TEMPLATE, IMAGE_SIZE, PATCH_SIZE, make_tokenizer, save, text_sizes
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

QUESTION = "Who founded the company in this photo?"
TILINGS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]  # height and width, in tiles of 32 x 32 pixels
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
ROW = Family(
    name="llava_next",
    model_types=("llava_next",),
    text_types=("llama",),
    vision="vision_tower",
    vision_layers="encoder.layers",
    projector="multi_modal_projector",
)


def save_tiling(folder, *, is_local, resample):
    """A LLaVA-NeXT with random weights; local: its vision tower's attention writes nothing, so a patch sees itself."""
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
        initializer_factor=5.0,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=TILINGS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    if is_local:
        for layer in model.model.vision_tower.encoder.layers:
            torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=TILINGS,
        resample=resample,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return save(model, processor, folder)


def loaded(folder):
    return multrace.load(folder, families=(ROW,))


@pytest.fixture(scope="module")
def tiling_path(tmp_path_factory):
    return save_tiling(tmp_path_factory.mktemp("tiling"), is_local=False, resample=BICUBIC)


@pytest.fixture(scope="module")
def tiling(tiling_path):
    return loaded(tiling_path)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Resizes without blur, and each patch sees itself only: a changed pixel changes the tokens that show it."""
    return loaded(save_tiling(tmp_path_factory.mktemp("sharp"), is_local=True, resample=NEAREST))


def noise(width, height):
    generator = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def repainted(picture, box):
    """The picture with every colour inside the box moved by half its range."""
    corners = (box.left, box.top, box.right, box.bottom)
    changed = picture.copy()
    changed.paste(picture.crop(corners).point(lambda value: (value + 128) % 256), corners)
    return changed


def changed_positions(vlm, picture, box):
    """The image positions whose features change when the pixels in the box do."""
    clean, changed = (vlm.prompt(each, QUESTION) for each in (picture, repainted(picture, box)))
    differs = (vlm.image_features(clean) != vlm.image_features(changed)).any(1).tolist()
    return tuple(place for place, is_changed in zip(clean.groups["image"], differs, strict=True) if is_changed)


def image_tokens(vlm, prompt, box):
    """Numbers of the box's positions among the image positions."""
    return [prompt.groups["image"].index(position) for position in box_positions(vlm, prompt, box)]


BOXES = [Box(0, 0, 48, 48), Box(12, 24, 24, 36), Box(6, 0, 18, 12), Box(36, 30, 48, 42), Box(13, 25, 16, 27)]


@pytest.mark.parametrize("size", [(48, 48), (96, 48), (48, 70)])
@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_where_its_patches_are(random_llava, size, box):
    shift = (size[0] - 48) // 2, (size[1] - 48) // 2  # what is cut off is not in any box
    box = Box(box.left + shift[0], box.top + shift[1], box.right + shift[0], box.bottom + shift[1])
    prompt = random_llava.prompt(Image.new("RGB", size), QUESTION)
    touched = box_patches(prompt, box)
    assert box_positions(random_llava, prompt, box) == tuple(patch.position for patch in touched)
    assert touched and (len(touched) < 16 or box.right - box.left == 48)
    for patch in prompt.patches:
        left, top, right, bottom = prompt.place(patch)
        width, height = min(right, box.right) - max(left, box.left), min(bottom, box.bottom) - max(top, box.top)
        is_inside = width > 0.75 and height > 0.75  # half of a pixel of the processed picture, which has 2 / 3 of them
        assert (patch in touched) == is_inside, (patch, width, height)


def test_a_box_of_the_second_picture(random_llava, photo, other_photo):
    prompt = random_llava.prompt([photo, other_photo], QUESTION)
    inside = box_positions(random_llava, prompt, Box(12, 12, 30, 24, image=1))
    assert inside and set(inside) < set(prompt.groups["image"][16:])


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (90, 40), (64, 64), (41, 100), (150, 101)], ids=str)
def test_tokens_of_a_box_are_those_that_its_pixels_change(sharp, size):
    prompt, picture = sharp.prompt(noise(*size), QUESTION), noise(*size)
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(6):
        left, top = (int(torch.randint(0, length - 8, (), generator=generator)) for length in size)
        width, height = torch.randint(8, 30, (2,), generator=generator).tolist()
        box = Box(left, top, min(left + width, size[0]), min(top + height, size[1]))
        positions = box_positions(sharp, prompt, box)
        assert positions == changed_positions(sharp, picture, box), box
        found.add(positions)
    assert len(found) > 3


def test_where_patches_see_each_other_pixels_change_more_than_the_box(tiling):
    """Without a local tower the comparison above would say nothing: there, every token of both tiles changes."""
    picture, box = noise(96, 32), Box(40, 8, 48, 16)
    prompt = tiling.prompt(picture, QUESTION)
    assert len(changed_positions(tiling, picture, box)) == 2 * 16
    assert len(box_positions(tiling, prompt, box)) == 2


# 96 x 32 pixels: 4 x 4 tokens of the whole picture, then 4 rows of 12 tokens from three tiles and one for the line end.


@pytest.mark.parametrize(
    ("size", "box", "whole", "parts"),
    [
        ((96, 32), Box(40, 8, 48, 16), [(1, 1)], [(1, 5)]),
        ((96, 32), Box(0, 0, 8, 8), [(0, 0)], [(0, 0)]),
        ((96, 32), Box(88, 24, 96, 32), [(3, 3)], [(3, 11)]),
        ((96, 32), Box(28, 8, 36, 16), [(1, 1)], [(1, 3), (1, 4)]),
        ((144, 48), Box(24, 12, 48, 24), [(1, 0), (1, 1)], [(1, 2), (1, 3)]),  # ends where the first tile does
        ((192, 64), Box(82, 18, 84, 20), [(1, 1)], [(1, 5)]),  # a third of a pixel wide in the whole picture
    ],
)
def test_a_box_in_a_wide_picture_is_in_the_whole_and_in_the_tiles(tiling, size, box, whole, parts):
    prompt = tiling.prompt(Image.new("RGB", size), QUESTION)
    assert len(prompt.groups["image"]) == 4 * 4 + 4 * (12 + 1) and len(prompt.patches) == 4 * 12
    expected = [4 * row + column for row, column in whole] + [16 + 13 * row + column for row, column in parts]
    assert image_tokens(tiling, prompt, box) == expected


def test_line_ends_belong_to_no_box(tiling):
    prompt = tiling.prompt(Image.new("RGB", (96, 32)), QUESTION)
    line_ends = {16 + 13 * row + 12 for row in range(4)}
    assert set(image_tokens(tiling, prompt, Box(0, 0, 96, 32))) == set(range(68)) - line_ends


def test_pictures_of_several_tilings_are_kept_apart(tiling):
    wide, tall = noise(96, 32), noise(30, 60)
    box = Box(4, 20, 13, 29)
    alone = tiling.prompt(tall, QUESTION)
    both = tiling.prompt([wide, tall], QUESTION)
    before = len(tiling.prompt(wide, QUESTION).groups["image"])
    expected = [before + number for number in image_tokens(tiling, alone, box)]
    assert image_tokens(tiling, both, replace(box, image=1)) == expected
    assert max(image_tokens(tiling, both, box)) < before


def test_tiles_need_no_row_of_the_projector(tiling_path):
    vlm = multrace.load(tiling_path, families=(replace(ROW, projector=None),))
    prompt = vlm.prompt(Image.new("RGB", (96, 32)), QUESTION)
    assert vlm.image_features(prompt).shape == (68, 32)
    assert len(box_positions(vlm, prompt, Box(0, 0, 8, 8))) == 2


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(0, 0, 97, 8), "pass 0 <= left < right <= 96 and 0 <= top < bottom <= 32"),
        (Box(8, 8, 8, 16), "is empty or leaves the picture of 96 x 32 pixels"),
        (Box(0, 0, 4, 4, image=1), "no image 1 for Box"),
    ],
)
def test_boxes_that_are_not_in_the_picture_are_refused_with_what_is(tiling, random_llava, box, message):
    for vlm in (tiling, random_llava):
        prompt = vlm.prompt(Image.new("RGB", (96, 32)), QUESTION)
        with pytest.raises(TraceError) as caught:
            box_positions(vlm, prompt, box)
        assert message in str(caught.value)


def test_a_box_that_is_cut_off_or_too_small_shows_what_is_seen(random_llava, sharp):
    prompt = random_llava.prompt(Image.new("RGB", (96, 48)), QUESTION)
    with pytest.raises(TraceError, match=r"cuts it off; .* from left 2\d to right 7\d and from top 0 to bottom 48"):
        box_positions(random_llava, prompt, Box(0, 0, 8, 8))
    with pytest.raises(TraceError, match="too small .* from left 5 to right 956 and from top 5 to bottom 316"):
        box_positions(sharp, sharp.prompt(Image.new("RGB", (960, 320)), QUESTION), Box(0, 0, 2, 2))


def test_the_grid_of_tiles_leaves_out_borders_and_lies_over_the_picture(tiling):
    """150 x 101 pixels become 64 x 44 in tiles of 64 x 64 in all; of 8 rows of patches, the model leaves out 2."""
    prompt = tiling.prompt(Image.new("RGB", (150, 101)), QUESTION)
    overview, detail = prompt.grids
    assert (overview.rows, overview.columns, overview.is_overview) == (4, 4, True)
    assert (detail.rows, detail.columns, detail.is_overview) == (6, 8, False)
    assert {patch.position for patch in prompt.overview} == set(prompt.groups["image"][:16])
    first, last = prompt.place(prompt.patches[0]), prompt.place(prompt.patches[-1])
    border = (48 - 44) / 2 * 150 / 64
    torch.testing.assert_close(torch.tensor(first), torch.tensor([0, -border, 18.75, 18.75 - border]), atol=1, rtol=0)
    assert abs(last[2] - 150) < 1 and abs(last[3] - 101 - border) < 1
    (seen,) = prompt.seen_pictures()
    assert seen.shape == (48, 64, 3)


def test_what_does_not_fit_together_has_no_grid(tiling):
    prompt, box = tiling.prompt(Image.new("RGB", (96, 32)), QUESTION), Box(0, 0, 8, 8)
    fewer = replace(prompt, groups={**prompt.groups, "image": prompt.groups["image"][:-1]})
    odd = replace(prompt, frontend=replace(prompt.frontend, patch_size=5))
    for each in (fewer, odd):
        assert each.patches == each.overview == ()
        with pytest.raises(TraceError, match="do not form a grid"):
            box_patches(each, box)
    queries = replace(prompt, frontend=replace(prompt.frontend, places=False))
    with pytest.raises(TraceError, match="answers of learned queries to the whole picture"):
        box_positions(tiling, queries, box)
    with pytest.raises(ModelError, match="no grid over its pictures"):
        queries.seen_pictures()


def test_pictures_of_unequal_size_are_answered_as_one_by_one(tiling):
    sizes = [(64, 64), (96, 32), (64, 64), (32, 96), None, (96, 32)]
    prompts = [tiling.prompt(size and noise(*size), QUESTION[: 12 + 5 * number]) for number, size in enumerate(sizes)]
    assert batches(prompts, 16) == [[0, 2, 4], [1, 3, 5]] and batches(prompts, 2) == [[0, 2], [1, 3], [4, 5]]
    with pytest.raises(ModelError, match="do not fit into one batch"):
        collate(prompts, tiling.tokenizer)
    alone = [tiling.answers([prompt])[0] for prompt in prompts]
    assert tiling.answers(prompts) == tiling.answers(prompts, batch_size=2) == alone
    assert len(set(alone)) > 1
    together = second_moments(tiling, prompts, layers=[1], progress=False)
    one_by_one = second_moments(tiling, prompts, layers=[1], batch_size=1, progress=False)
    torch.testing.assert_close(together.matrix(1), one_by_one.matrix(1))
    requests = [EditRequest(question=prompt, target="Lima") for prompt in prompts if prompt.images]
    tune = FineTune(layer=2, learning_rate=1e-2, steps=2, stop_loss=0)
    ((_, mixed),) = tune.edit(tiling, requests).differences.items()
    ((_, alone),) = replace(tune, batch_size=1).edit(tiling, requests).differences.items()
    torch.testing.assert_close(mixed, alone, rtol=0.01, atol=1e-4)


SHAPES = {  # of the grid over a picture of 150 x 101 pixels, and of the copy of the whole picture beside it
    "qwen2_5_vl": [(4, 7)],
    "internvl": [(4, 4), (2, 2)],
    "idefics3": [(4, 4), (2, 2)],
    "mistral3": [(3, 4)],
    "minicpmv4_6": [(4, 4), (2, 2)],
    "gemma4_dense": [(6, 10)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_painted_into_a_patch_moves_that_patch_most(name, tmp_path):
    """Flat patches, tiles beside a copy, line breaks, strips, averaged patches: each has a grid over its picture."""
    vlm = multrace.load(write(RECIPES[name], tmp_path / name), verify=False)
    picture = Image.new("RGB", (150, 101), "gray")
    prompt = vlm.prompt([picture, picture], "Who?")
    shown = [grid for grid in prompt.grids if grid.image == 1]
    assert [(grid.rows, grid.columns) for grid in shown] == SHAPES[name]
    assert [grid.is_overview for grid in shown] == [False, True][: len(shown)]
    hits = {False: 0, True: 0}
    with silenced(vlm.vision_tower), torch.no_grad():
        clean = vlm.image_features(prompt)
        for patches in (prompt.patches, prompt.overview):
            own = {(patch.row, patch.column): patch.position for patch in patches if patch.image == 1}
            for patch in [each for each in patches if each.image == 1][::3]:
                painted = picture.copy()
                painted.paste("white", tuple(round(edge) for edge in prompt.place(patch)))
                moves = (vlm.image_features(prompt.with_images([picture, painted])) - clean).norm(dim=-1)
                by_position = dict(zip(prompt.groups["image"], moves.tolist(), strict=True))
                assert max(own.values(), key=lambda position: by_position[position]) == patch.position, patch
                mirrored = own[patch.row, max(column for _, column in own) - patch.column]
                hits[mirrored == patch.position] += 1
    assert hits[False] > hits[True], "most patches are not where their mirror images are, so a wrong grid is noticed"
