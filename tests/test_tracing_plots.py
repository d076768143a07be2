"""Heat maps of traces and averages: labels, stars, colours, estimates and variants."""

import re
import statistics
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from multrace.artefacts import ArtefactError
from multrace.tracing import CausalTrace, TraceError, average
from pictures import labels, pixels
from PIL import Image


def test_a_trace_is_drawn_with_constraint_rows_starred(traced, tmp_path):
    text = labels(traced.plot())
    for label in ("image (2 tokens)", "constraint_last*", "last", "Who $costs$?", "p(Ada)", "hidden state", "MLP"):
        assert f"<!-- {label} -->" in text, label
    assert "<!-- last* -->" not in text
    assert "<!-- attention -->" not in text
    only = labels(traced.plot(kinds=["mlp"]))
    assert "<!-- MLP -->" in only and "<!-- hidden state -->" not in only


def test_the_maps_of_one_figure_share_one_scale(traced):
    weak = replace(
        traced, samples=traced.samples | {"mlp": traced.corrupted + (traced.samples["mlp"] - traced.corrupted) / 4}
    )

    def scales(trace: CausalTrace, *kinds: str) -> list[tuple[float, float]]:
        return [axes.collections[0].get_clim() for axes in trace.plot(kinds=kinds).axes if axes.get_title(loc="left")]

    (alone,), (hidden, mlp) = scales(weak, "mlp"), scales(weak, "hidden", "mlp")
    assert hidden == mlp == scales(weak, "hidden")[0]
    assert alone[0] == mlp[0] and alone[1] < mlp[1]  # alone, the weak map would look as strong as the other


def test_every_format_is_drawn_and_others_are_refused(traced, tmp_path):
    for name in ("trace.png", "trace.pdf", "trace.svg", "TRACE.PNG"):
        assert isinstance(traced.plot(tmp_path / name), Figure)
        assert (tmp_path / name).stat().st_size > 1000
    with Image.open(tmp_path / "trace.png") as image:
        assert image.width > 600 and len(image.getcolors(100_000)) > 50
    with pytest.raises(ArtefactError, match=r"no format '.bmp'; end the name in .png, .pdf or .svg"):
        traced.plot(tmp_path / "trace.bmp")
    with pytest.raises(TraceError, match="no 'attention' effects in this trace"):
        traced.plot(tmp_path / "trace.png", kinds=["attention"])


def test_the_strongest_cell_is_the_darkest(traced, tmp_path):
    def darkest(trace: CausalTrace) -> tuple[float, float]:
        image = pixels(trace.plot(kinds=["mlp"]))
        grey = image.crop((0, 150, int(image.width * 0.8), image.height))
        greens = [
            (x / grey.width, y / grey.height)
            for x in range(0, grey.width, 4)
            for y in range(0, grey.height, 4)
            if (pixel := grey.getpixel((x, y)))[1] > 1.4 * max(pixel[0], 1) and pixel[1] < 100
        ]
        return tuple(statistics.mean(axis) for axis in zip(*greens, strict=True))

    left, low = darkest(traced)
    moved = traced.samples["mlp"].flip(2)
    right, same_row = darkest(replace(traced, samples={**traced.samples, "mlp": moved}))
    assert left + 0.2 < right
    assert low == pytest.approx(same_row, abs=0.02)


def test_an_average_is_drawn_with_its_numbers(traced, tmp_path):
    other = replace(traced, samples={kind: values * 0.9 for kind, values in traced.samples.items()})
    text = labels(average([traced, other]).plot())
    for label in ("constraint_last*", "indirect effect", "Average indirect effect over 2 prompts", ".47"):
        assert f"<!-- {label} -->" in text, label


def test_tokens_that_no_font_knows_are_drawn_as_boxes(traced, tmp_path):
    odd = replace(traced, rows=("\U0001f9ff", "\n", " ", "$x$"), question="蓝 \ue000?")
    text = labels(odd.plot())
    for label in ("↵", "␣*", "$x$"):
        assert label in text, label


def test_windows_variants_and_directions_are_said(traced, tmp_path):
    usual = labels(traced.plot())
    assert "<!-- single restored layer -->" in usual and "effects" not in usual and "interval" not in usual
    wide = labels(replace(traced, window=3).plot())
    assert wide.count("<!-- centre of interval of 3 restored layers -->") == 1  # hidden states stay single
    assert wide.count("<!-- single restored layer -->") == 1
    for change, words in (
        ({"effect": "direct"}, "Direct effects of restored states"),
        ({"severed": "mlp"}, "Total effects of restored states, later MLP outputs severed"),
        ({"direction": "corrupt"}, "Total effects of corrupted states put into the clean run"),
    ):
        text = labels(replace(traced, **change).plot())
        assert f"<!-- {words} -->" in text, words
        mean = labels(average([replace(traced, **change)] * 2).plot())
        assert f"<!-- {words} -->" in mean, words
    corrupt = labels(replace(traced, direction="corrupt").plot())
    assert "<!-- loss of p(Ada) -->" in corrupt and "<!-- single corrupted layer -->" in corrupt


def test_metrics_have_their_own_captions(traced, tmp_path):
    two = replace(
        traced,
        metrics=("log_probability", "logit_difference"),
        foil="Bob",
        clean_scores=torch.tensor([-0.1, 3.0], dtype=torch.float64),
        corrupted_scores=torch.tensor([[-3.0, -2.0], [-1.0, 0.0]], dtype=torch.float64),
        samples={kind: torch.cat([values - 3, values]) for kind, values in traced.samples.items()},
    )
    assert "<!-- log p(Ada) -->" in labels(two.plot())
    text = labels(two.plot(metric="logit_difference"))
    assert "<!-- logit of Ada minus Bob -->" in text and "corrupted -0.500" in text
    assert "on logit_difference" in labels(average([two]).plot(metric="logit_difference"))
    with pytest.raises(TraceError, match="no metric 'probability' in this trace"):
        two.plot(tmp_path / "none.svg", metric="probability")


def test_estimates_are_hatched(traced, tmp_path):
    flags = torch.zeros(4, 6, dtype=torch.bool)
    flags[1, 2:5] = True
    exact = labels(traced.plot())
    guessed = labels(replace(traced, estimated={"mlp": flags}).plot())
    assert "<!-- MLP (hatched: estimated) -->" in guessed and "<!-- hidden state -->" in guessed
    assert "hatched" not in exact
    assert len(re.findall(r"fill: url\(#h", guessed)) == 3 and "url(#h" not in exact


def test_kinds_of_other_widths_and_colours_are_drawn_together(traced, tmp_path):
    samples = {
        "projector": torch.full((1, 4, 1, 2), 0.5),
        "head 3": traced.samples["mlp"],
        "hidden": traced.samples["hidden"],
    }
    spans = {"projector": torch.zeros(1, 2).long(), "head 3": traced.spans["mlp"], "hidden": traced.spans["hidden"]}
    text = labels(replace(traced, samples=samples, spans=spans).plot())
    for label in ("projector", "head 3", "hidden state"):
        assert f"<!-- {label} -->" in text, label


def test_numbers_and_their_legend_come_together(traced, tmp_path):
    few = average([traced, traced])
    many = replace(few, rows=few.rows * 4, means={"mlp": few.means["mlp"][:, list(range(4)) * 4]})
    assert "pale numbers" in labels(few.plot())
    assert "pale numbers" not in labels(many.plot())


def test_every_patch_of_a_large_picture_can_be_drawn(traced, tmp_path):
    repeats = 100
    tall = replace(
        traced,
        rows=traced.rows * repeats,
        row_positions=traced.row_positions * repeats,
        samples={"mlp": traced.samples["mlp"].repeat(1, repeats, 1, 1)},
    )
    assert pixels(tall.plot()).height < 10_100  # at full height 15_000


def test_what_was_not_traced_is_grey(traced, tmp_path):
    holes = {kind: values.clone() for kind, values in traced.samples.items()}
    holes["mlp"][:, 1] = torch.nan

    def grey_pixels(trace: CausalTrace) -> int:
        colours = pixels(trace.plot(kinds=["mlp"])).getcolors(100_000)
        return sum(count for count, colour in colours if colour == (228,) * 3)

    assert grey_pixels(replace(traced, samples=holes)) > 5_000
    assert grey_pixels(traced) < 500
