"""Effects of image patches drawn over the picture as the model saw it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from multrace.artefacts import ArtefactError
from multrace.artefacts.drawing import over_patches, strongest
from multrace.tracing import Blocks, Box, CausalTrace, TraceError
from multrace.tracing.engine import resolve_rows
from pictures import labels, pixels
from PIL import Image

QUESTION = "Who founded the company in this photo?"


def trace_of(traced, prompt, positions, effects) -> CausalTrace:
    """A trace of the prompt with these rows and these effects of its hidden states, (row, column)."""
    rows = resolve_rows(prompt, positions)
    scores = 0.1 + torch.as_tensor(effects, dtype=torch.float64)
    return replace(
        traced,
        rows=tuple(row.label for row in rows),
        row_tokens=tuple(row.token for row in rows),
        row_positions=tuple(row.positions for row in rows),
        question=prompt.question,
        tokens=prompt.tokens,
        input_ids=tuple(prompt.inputs["input_ids"][0].tolist()),
        patches=tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches),
        samples={"hidden": scores[None, ..., None].expand(-1, -1, -1, 2)},
    )


def test_the_picture_is_the_one_the_model_saw(random_llava, make_photo):
    photo = make_photo(1).resize((64, 32))
    (seen,) = random_llava.prompt(photo, QUESTION).seen_pictures()
    middle = torch.from_numpy(np.asarray(photo.crop((16, 0, 48, 32)), dtype=np.float64) / 255)  # short side kept
    assert seen.shape == (32, 32, 3)
    assert torch.allclose(seen, middle, rtol=0, atol=1e-6)
    assert not torch.allclose(seen, middle.flip(1), rtol=0, atol=0.1)


def test_a_patch_shows_the_effect_of_its_smallest_row(random_llava, photo, traced):
    prompt = random_llava.prompt(photo, QUESTION)
    effects = torch.zeros(7, 6)
    effects[0], effects[1], effects[6, 2] = 0.3, 0.2, 0.7  # an image row, another, a patch in the first, the last token
    effects[4, 5], effects[5] = 0.6, 0.9
    trace = trace_of(traced, prompt, ["image_rows", Box(0, 0, 12, 12), "image", "last"], effects)
    grid = over_patches(trace.indirect_effect("hidden"), trace.row_positions, trace.patches)
    assert grid.shape == (6, 1, 4, 4)
    assert grid[5, 0, 0].tolist() == pytest.approx([0.6, 0.3, 0.3, 0.3])
    assert grid[0, 0, 1].tolist() == pytest.approx([0.2] * 4)
    assert strongest(grid, 1) == (5,)
    assert len(strongest(grid)) == 4 and sorted(strongest(grid)) == list(strongest(grid))


def test_empty_layers_are_not_drawn_and_the_caption_states_the_rule(random_llava, photo, traced):
    prompt = random_llava.prompt(photo, QUESTION)
    effects = torch.zeros(16, 6)
    effects[3, 1], effects[3, 2], effects[7, 4] = 0.4, 0.05, 0.03  # the last one is below a tenth of the largest
    text = labels(trace_of(traced, prompt, "patches", effects).overlay(prompt))
    assert [layer for layer in range(6) if f"<!-- hidden state, layer {layer} -->" in text] == [1, 2]
    assert "shown: the 2 layers of 6 with at least a tenth of the largest effect" in " ".join(text.split())
    many = labels(trace_of(traced, prompt, "patches", torch.linspace(0.5, 1, 6).expand(16, 6)).overlay(prompt))
    assert many.count("<!-- hidden state, layer") == 4
    assert "shown: the 4 of 6 layers with the largest effect" in " ".join(many.split())
    nothing = labels(trace_of(traced, prompt, "patches", torch.zeros(16, 6)).overlay(prompt))
    assert nothing.count("<!-- hidden state, layer") == 1 and "too small to be seen" in " ".join(nothing.split())
    assert "shown:" not in labels(trace_of(traced, prompt, "patches", effects).overlay(prompt, layers=(0,)))


def test_strong_patches_are_coloured_and_the_rest_is_the_picture(random_llava, traced, tmp_path):
    prompt = random_llava.prompt(Image.new("RGB", (48, 48), "white"), QUESTION)

    def coloured(effects: torch.Tensor) -> int:
        figure = trace_of(traced, prompt, "patches", effects).overlay(prompt, layers=[1])
        image, edge = pixels(figure), figure.axes[0].get_position().x1
        picture = np.asarray(image, dtype=int)[:, : int(image.width * edge)]  # the colour bar is beyond it
        return int(((picture[..., 2] - picture[..., 1]) > 60).sum())  # purple

    nothing, one = torch.zeros(16, 6), torch.zeros(16, 6)
    one[5, 1], one[9, 0] = 0.5, 0.9
    few, many = coloured(one), coloured(one.index_fill(0, torch.tensor([6, 7]), 0.5))
    assert coloured(nothing) == 0
    assert few > 3_000
    assert many == pytest.approx(3 * few, rel=0.05)


def test_the_strongest_layers_are_drawn_unless_others_are_asked(random_llava, make_photo, traced, tmp_path):
    prompt = random_llava.prompt([make_photo(1), make_photo(2)], QUESTION)
    effects = torch.linspace(0, 1, 6).expand(8, 6)
    trace = replace(trace_of(traced, prompt, Blocks(2), effects), effect="direct")
    text = labels(trace.overlay(prompt))
    assert all(f"<!-- hidden state, layer {layer} -->" in text for layer in (2, 3, 4, 5))
    assert "<!-- hidden state, layer 1 -->" not in text and "Direct effects of restored states" in text
    wide = replace(trace, spans={"hidden": torch.tensor([[0, 2]] * 6)})
    text = labels(wide.overlay(prompt, layers=(1,)))
    assert "<!-- hidden state, layers 0 to 2 -->" in text and "layer 5" not in text
    flags = torch.zeros(8, 6, dtype=torch.bool).index_fill(1, torch.tensor(3), True)
    text = labels(replace(trace, estimated={"hidden": flags}).overlay(prompt, layers=(3, 4)))
    assert text.count("(estimates among them)") == 1 and "layer 3 (estimates" in text


@pytest.mark.parametrize("positions", ["image", "last", ("image", "question")])
def test_rows_that_are_no_part_of_the_picture_are_refused(random_llava, photo, traced, tmp_path, positions):
    prompt = random_llava.prompt(photo, QUESTION)
    trace = trace_of(traced, prompt, positions, torch.ones(len(resolve_rows(prompt, positions)), 6))
    with pytest.raises(ArtefactError, match="no row of this trace is a part of the picture"):
        trace.overlay(prompt, tmp_path / "over.png")


def test_other_prompts_layers_and_formats_are_refused(random_llava, photo, traced, tmp_path):
    prompt = random_llava.prompt(photo, QUESTION)
    trace = trace_of(traced, prompt, "patches", torch.ones(16, 6))
    for other in (random_llava.prompt(photo, "What colour is the emblem?"), random_llava.prompt(None, QUESTION)):
        with pytest.raises(TraceError, match="this trace is of another prompt"):
            trace.overlay(other, tmp_path / "over.png")
    for layers in ((6,), (-1,), ()):
        with pytest.raises(TraceError, match="pass some of 0 to 5"):
            trace.overlay(prompt, tmp_path / "over.png", layers=layers)
    with pytest.raises(ArtefactError, match="no format '.gif'"):
        trace.overlay(prompt, tmp_path / "over.gif")
    with pytest.raises(TraceError, match="no 'mlp' effects"):
        trace.overlay(prompt, tmp_path / "over.png", kind="mlp")
    assert list(tmp_path.iterdir()) == []
    trace.overlay(random_llava.prompt(photo, QUESTION, answer="Ada"), tmp_path / "over.png")
    assert (tmp_path / "over.png").is_file()
