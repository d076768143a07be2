"""Traces on disk and in pictures: what is saved comes back, what cannot be written leaves nothing behind."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.tracing import AverageTrace, CausalTrace, TraceError, average
from PIL import Image
from safetensors.torch import save_file

# Files.


def test_a_trace_comes_back_from_its_file(traced, tmp_path):
    path = traced.save(tmp_path / "new" / "trace.safetensors")
    again = CausalTrace.load(path)
    tensors = ("scores", "spans", "corrupted")
    for name in traced.__dataclass_fields__:
        if name not in tensors:
            assert getattr(again, name) == getattr(traced, name), name
    assert torch.equal(again.corrupted, traced.corrupted)
    for kind in traced.kinds:
        assert torch.equal(again.scores[kind], traced.scores[kind])
        assert torch.equal(again.spans[kind], traced.spans[kind])
    assert again.kinds == traced.kinds
    assert again.edit_site() == traced.edit_site()


def test_an_average_comes_back_from_its_file(traced, tmp_path):
    mean = average([traced, replace(traced, clean=0.8)])
    again = AverageTrace.load(mean.save(tmp_path / "mean.safetensors"))
    assert torch.equal(again.clean, mean.clean) and torch.equal(again.corrupted, mean.corrupted)
    assert all(torch.equal(again.effects[kind], mean.effects[kind]) for kind in mean.kinds)
    assert (again.rows, again.row_tokens, again.kinds) == (mean.rows, mean.row_tokens, mean.kinds)
    assert again.edit_site() == mean.edit_site()


def test_files_that_are_no_trace_are_refused(traced, tmp_path):
    whole = traced.save(tmp_path / "trace.safetensors").read_bytes()
    stranger, hollow = tmp_path / "stranger", tmp_path / "hollow"
    save_file({"weight": torch.zeros(2)}, stranger)
    save_file({"clean": torch.zeros(())}, hollow, {"layout": "multrace causal trace 1"})
    save_file({"clean": torch.zeros(())}, tmp_path / "header", {"layout": "multrace causal trace 1", "rows": "[oops"})
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("not a trace")
    (tmp_path / "empty").write_bytes(b"")
    average([traced]).save(tmp_path / "mean")
    replace(traced, layers=7).save(tmp_path / "shapes")
    cases = {
        "nowhere": "no file",
        "stranger": "holds 'something of another program'",
        "hollow": "is not a whole trace",
        "header": "the header of",
        "cut": "is not a readable safetensors file",
        "text": "is not a readable safetensors file",
        "empty": "is not a readable safetensors file",
        "mean": "holds 'multrace average trace 1', not 'multrace causal trace 1'",
        "shapes": "effects of other shapes than its rows and layers",
    }
    for name, message in cases.items():
        with pytest.raises(TraceError) as caught:
            CausalTrace.load(tmp_path / name)
        assert message in str(caught.value), name
        assert name in str(caught.value)
    with pytest.raises(TraceError, match="not 'multrace average trace 1'"):
        AverageTrace.load(tmp_path / "trace.safetensors")


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(traced, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    before = everything_in(tmp_path)
    for write in (traced.save, traced.plot, average([traced]).save, average([traced]).plot):
        for target in (tmp_path / "file" / "out.png", tmp_path / "folder.png"):
            with pytest.raises(TraceError, match="cannot write .* choose a folder that you may write to"):
                write(target)
    assert everything_in(tmp_path) == before


def test_an_interrupted_write_keeps_the_old_file(traced, tmp_path, monkeypatch):
    path = traced.save(tmp_path / "trace.safetensors")
    old = path.read_bytes()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(TraceError, match="No space left on device"):
        replace(traced, clean=0.5).save(path)
    assert path.read_bytes() == old
    assert everything_in(tmp_path) == ["trace.safetensors"]


# Pictures.


def labels(path: Path) -> str:
    """The text of an SVG picture, which matplotlib keeps in comments beside the outlines."""
    return path.read_text(encoding="utf-8")


def test_a_trace_is_drawn_with_constraint_rows_starred(traced, tmp_path):
    text = labels(traced.plot(tmp_path / "trace.svg"))
    for label in ("image (2 tokens)", "constraint_last*", "last", "Who $costs$?", "p(Ada)", "hidden state", "MLP"):
        assert f"<!-- {label} -->" in text, label
    assert "<!-- last* -->" not in text
    assert "<!-- attention -->" not in text
    only = labels(traced.plot(tmp_path / "only.svg", kinds=["mlp"]))
    assert "<!-- MLP -->" in only and "<!-- hidden state -->" not in only


def test_every_format_is_drawn_and_others_are_refused(traced, tmp_path):
    for name in ("trace.png", "trace.pdf", "trace.svg", "TRACE.PNG"):
        assert traced.plot(tmp_path / name).stat().st_size > 1000
    with Image.open(tmp_path / "trace.png") as image:
        assert image.width > 600 and len(image.getcolors(100_000)) > 50
    with pytest.raises(TraceError, match=r"no format '.bmp'; end the name in .png, .pdf or .svg"):
        traced.plot(tmp_path / "trace.bmp")
    with pytest.raises(TraceError, match="no 'attention' effects in this trace"):
        traced.plot(tmp_path / "trace.png", kinds=["attention"])


def test_the_strongest_cell_is_the_darkest(traced, tmp_path):
    def darkest(trace: CausalTrace) -> tuple[float, float]:
        with Image.open(trace.plot(tmp_path / "one.png", kinds=["mlp"])) as image:
            grey = image.convert("RGB").crop((0, 150, int(image.width * 0.8), image.height))
        greens = [
            (x / grey.width, y / grey.height)
            for x in range(0, grey.width, 4)
            for y in range(0, grey.height, 4)
            if (pixel := grey.getpixel((x, y)))[1] > 1.4 * max(pixel[0], 1) and pixel[1] < 100
        ]
        return tuple(statistics.mean(axis) for axis in zip(*greens, strict=True))

    left, low = darkest(traced)
    moved = traced.scores["mlp"].flip(1)
    right, same_row = darkest(replace(traced, scores={**traced.scores, "mlp": moved}))
    assert left + 0.2 < right
    assert low == pytest.approx(same_row, abs=0.02)


def test_an_average_is_drawn_with_its_numbers(traced, tmp_path):
    other = replace(traced, scores={kind: scores * 0.9 for kind, scores in traced.scores.items()})
    text = labels(average([traced, other]).plot(tmp_path / "mean.svg"))
    for label in ("constraint_last*", "indirect effect", "Average indirect effect over 2 prompts", ".47"):
        assert f"<!-- {label} -->" in text, label


def test_tokens_that_no_font_knows_are_drawn_as_boxes(traced, tmp_path):
    odd = replace(traced, rows=("\U0001f9ff", "\n", " ", "$x$"), question="蓝 \ue000?")
    text = labels(odd.plot(tmp_path / "odd.svg"))
    for label in ("↵", "␣*", "$x$"):
        assert label in text, label
