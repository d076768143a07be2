"""Rows of a map: tokens, groups, regions of the picture, and boxes that are found by painting them."""

import pytest
from multrace import ModelError
from multrace.tracing import TraceError
from multrace.tracing.engine import Blocks, Box, resolve_rows
from PIL import Image

QUESTION = "Who founded the company in this photo?"


@pytest.fixture
def prompt(random_llava, photo):
    """A question about one picture of 48 x 48 pixels, which becomes 4 x 4 patches."""
    return random_llava.prompt(photo, QUESTION, constraint="the company")


def cells(prompt, row):
    """Row and column of the patches that a row restores."""
    places = {patch.position: (patch.row, patch.column) for patch in prompt.patches}
    return [places[position] for position in row.positions]


def test_tokens_are_one_row_each_and_the_image_is_one(prompt):
    rows = resolve_rows(prompt, "tokens")
    image = prompt.groups["image"]
    assert [row.label for row in rows].count("image") == 1
    assert sorted(position for row in rows for position in row.positions) == list(range(prompt.length))
    assert [row.positions[0] for row in rows] == sorted(row.positions[0] for row in rows)
    assert [row.positions for row in rows if row.is_group] == [image]
    tokens = {row.token for row in rows}
    assert {"constraint_last", "last", None} < tokens and image[0] not in tokens


def test_a_prompt_without_a_picture_has_text_rows_only(random_llama):
    prompt = random_llama.prompt(None, QUESTION)
    assert [row.positions for row in resolve_rows(prompt)] == [(position,) for position in range(prompt.length)]


def test_regions_cut_the_grid_completely_and_without_overlap(prompt):
    for item, count in (("image_rows", 4), ("image_columns", 4), ("image_quadrants", 4), ("patches", 16)):
        rows = resolve_rows(prompt, item)
        assert len(rows) == count, item
        assert sorted(sum((row.positions for row in rows), ())) == list(prompt.groups["image"]), item
        assert all(row.is_group and row.token is None for row in rows), item
        assert len({row.label for row in rows}) == count, item
    assert cells(prompt, resolve_rows(prompt, "image_rows")[1]) == [(1, column) for column in range(4)]
    assert cells(prompt, resolve_rows(prompt, "image_columns")[2]) == [(row, 2) for row in range(4)]
    by_name = {row.label: cells(prompt, row) for row in resolve_rows(prompt, "image_quadrants")}
    assert by_name["image bottom left"] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert cells(prompt, resolve_rows(prompt, "patches")[6]) == [(1, 2)]


def test_blocks_at_the_edge_are_smaller(prompt):
    rows = resolve_rows(prompt, Blocks(3))
    assert [len(row.positions) for row in rows] == [9, 3, 3, 1]
    assert [row.label for row in rows] == ["patch 0-2, 0-2", "patch 0-2, 3", "patch 3, 0-2", "patch 3, 3"]
    assert resolve_rows(prompt, Blocks(1)) == resolve_rows(prompt, "patches")


def test_items_may_be_mixed(prompt):
    rows = resolve_rows(prompt, ["last", 2, "image_quadrants", Box(0, 0, 12, 12), Blocks(4)])
    assert [row.label for row in rows][0] == "last" and rows[1].positions == (2,)
    assert len(rows) == 2 + 4 + 1 + 1
    assert not rows[1].is_group and rows[0].is_group
    assert resolve_rows(prompt, 2) == resolve_rows(prompt, [2])


def test_regions_of_several_pictures_say_which(random_llava, photo, other_photo):
    prompt = random_llava.prompt([photo, other_photo], QUESTION)
    rows = resolve_rows(prompt, "image_rows")
    assert [row.label for row in rows][::4] == ["image row 0 of image 0", "image row 0 of image 1"]
    (box,) = resolve_rows(prompt, Box(0, 0, 12, 12, image=1))
    assert box.positions == (prompt.groups["image"][16],)
    assert box.label.endswith("of image 1")


# Boxes: the picture of 48 x 48 pixels is resized to 32 x 32, so that a patch is 12 x 12 of its pixels.


def test_a_box_touches_the_patches_under_it(prompt):
    for box, expected in {
        Box(0, 0, 48, 48): [(row, column) for row in range(4) for column in range(4)],
        Box(12, 24, 24, 36): [(2, 1)],
        Box(13, 25, 14, 26): [(2, 1)],
        Box(6, 0, 18, 12): [(0, 0), (0, 1)],
        Box(36, 30, 48, 42): [(2, 3), (3, 3)],
    }.items():
        (row,) = resolve_rows(prompt, box)
        assert cells(prompt, row) == expected, box
    assert cells(prompt, resolve_rows(prompt, Box(0, 0, 12, 12))[0]) != cells(prompt, row)


def test_a_box_in_a_cropped_picture_is_where_the_crop_puts_it(random_llava):
    """96 x 48 pixels: the short side becomes 32, so the middle 48 of 96 columns are kept."""
    prompt = random_llava.prompt(Image.new("RGB", (96, 48)), QUESTION)
    assert cells(prompt, resolve_rows(prompt, Box(24, 0, 36, 12))[0]) == [(0, 0)]
    assert cells(prompt, resolve_rows(prompt, Box(60, 36, 72, 48))[0]) == [(3, 3)]
    assert cells(prompt, resolve_rows(prompt, Box(0, 0, 36, 12))[0]) == [(0, 0)]
    with pytest.raises(TraceError, match=r"cuts it off; .* from left 2\d to right 7\d and from top 0 to bottom 48"):
        resolve_rows(prompt, Box(0, 0, 12, 12))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(0, 0, 49, 10), "leaves the picture of 48 x 48 pixels; pass 0 <= left < right <= 48"),
        (Box(-1, 0, 4, 4), "0 <= top < bottom <= 48"),
        (Box(10, 10, 10, 20), "is empty or leaves"),
        (Box(0, 0, 4, 4, image=1), "no image 1 for Box"),
    ],
)
def test_boxes_that_are_not_in_the_picture_are_refused(prompt, box, message):
    with pytest.raises(TraceError) as caught:
        resolve_rows(prompt, box)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("subject", ModelError, "no token group 'subject'; this prompt has image, question"),
        ("subject", ModelError, "'image_quadrants', 'patches', Blocks(3)"),
        (1.5, TraceError, "no rows 1.5; this prompt has the groups image"),
        ([None], TraceError, "Box(left, top, right, bottom)"),
        ([], TraceError, 'no positions to restore; pass positions="tokens"'),
        ("answer", TraceError, "positions of the answer are never restored"),
        (999, ModelError, "no position 999"),
    ],
)
def test_unknown_rows_are_refused_with_what_there_is(prompt, item, error, message):
    with pytest.raises(error) as caught:
        resolve_rows(prompt, item)
    assert message in str(caught.value)


def test_positions_of_a_given_answer_are_refused(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, answer="Ada Example")
    with pytest.raises(TraceError, match="into the answer, which is never restored"):
        resolve_rows(prompt, prompt.groups["answer"][0])


def test_regions_need_a_grid_of_patches(random_llava, random_llama, photo):
    with pytest.raises(TraceError, match="no 'image_rows' in this prompt: it has no picture"):
        resolve_rows(random_llama.prompt(None, QUESTION), "image_rows")
    with pytest.raises(TraceError, match=r"no Blocks\(size=2\) in this prompt"):
        resolve_rows(random_llava.prompt(None, QUESTION), Blocks(2))
    with pytest.raises(TraceError, match="this prompt has 0"):
        resolve_rows(random_llama.prompt(None, QUESTION), Box(0, 0, 1, 1))
    with pytest.raises(TraceError, match="no blocks of 0 x 0 patches"):
        Blocks(0)
    assert resolve_rows(random_llava.prompt(photo, QUESTION), "image_rows")
