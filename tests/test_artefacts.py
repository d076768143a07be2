"""The kit under all results: whole files, dataclasses on disk, streaming averages, statistics, two lines of text."""

import json
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from multrace.artefacts import (
    LAYOUT,
    ArtefactError,
    Averager,
    Mean,
    Result,
    RunningMean,
    auroc,
    averaged,
    digest,
    drawing,
    from_plain,
    load_fields,
    mean_interval,
    plain_fields,
    read_json,
    read_tensors,
    replacing,
    save_fields,
    student_interval,
    wilson_interval,
    write_json,
    write_tensors,
    write_whole,
)
from multrace.artefacts.files import write_arrays
from multrace.tracing import average
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Whole files


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        paths = [write_whole(tmp_path / "a" / "text", b"content"), write_tensors(tmp_path / "t", {"x": double(1)}, {})]
    finally:
        os.umask(old)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [mode, mode]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["t", "text"]


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys, torch; from multrace.artefacts.files import write_tensors; "
        "write_tensors(sys.argv[1], {'b': torch.ones(2), 'a': torch.zeros(3)}, "
        "{f'key {n}': 'é \\n \"' + chr(1) + str(n) for n in range(9)})"
    )
    seed = str(next(seed for seed in (0, 1) if str(seed) != os.environ.get("PYTHONHASHSEED")))
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    tensors, text = read_tensors(tmp_path / "there")
    backwards = [dict(reversed(list(part.items()))) for part in (tensors, text)]
    write_tensors(tmp_path / "here", *backwards)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert torch.equal(tensors["b"], torch.ones(2)) and torch.equal(load_file(tmp_path / "there")["a"], torch.zeros(3))
    assert sorted(text) == [f"key {number}" for number in range(9)] and text["key 3"] == 'é \n "\x013'


def test_tensors_that_share_memory_or_are_strided_are_written(tmp_path):
    grid = torch.arange(6.0).reshape(2, 3)
    tensors, _ = read_tensors(write_tensors(tmp_path / "t", {"grid": grid, "turned": grid.T, "row": grid[0]}, {}))
    assert torch.equal(tensors["turned"], grid.T) and torch.equal(tensors["row"], grid[0])


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_whole(tmp_path / "file", b"old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyError("interrupted")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_do_not_mix_their_contents(tmp_path):
    contents = [bytes([number]) * 200_000 for number in range(8)]
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_is_the_error_of_the_room(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for write in (
        lambda path, **more: write_whole(path, b"", **more),
        lambda path, **more: write_tensors(path, {}, {}, **more),
    ):
        with pytest.raises(ArtefactError, match="cannot write .* choose a folder that you may write to"):
            write(tmp_path / "file" / "inner")
        with pytest.raises(LookupError, match="cannot write"):
            write(tmp_path / "file" / "inner", error=LookupErrorOfValue)


class LookupErrorOfValue(ValueError, LookupError):
    """An error class of another room."""


def test_an_array_of_objects_is_refused_instead_of_pickled(tmp_path):
    for value in ([None, 1], [object()]):
        with pytest.raises(ArtefactError, match="'x' holds other values"):
            write_arrays(tmp_path / "file.npz", {"x": value})
    with np.load(write_arrays(tmp_path / "file.npz", {"x": ["a", "b"]})) as read:
        assert read["x"].tolist() == ["a", "b"]


def test_a_digest_tells_values_shapes_dtypes_and_borders_apart():
    parts = [
        (torch.zeros(4),),
        (torch.zeros(2, 2),),
        (torch.zeros(4).double(),),
        (torch.ones(4),),
        ("ab", "c"),
        ("a", "bc"),
    ]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert digest(torch.ones(3).bfloat16(), b"x") == digest(torch.ones(3).bfloat16(), b"x")


# Dataclasses on disk


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part with a tensor."""

    name: str
    values: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Toy(Result):
    """A result with one field of each kind."""

    layout: ClassVar[str] = "toy 1"

    model: str
    question: str
    rows: tuple[str, ...]
    scores: torch.Tensor
    pair: tuple[int, float] = (1, 0.5)
    side: Literal["left", "right"] = "left"
    maybe: bool | None = None
    token: str | int | None = None
    by_kind: Mapping[str, torch.Tensor]
    inner: Inner
    inners: tuple[Inner, ...] = ()
    anything: Any = None

    def _axes(self) -> Mapping[str, tuple[str, ...]]:
        return {"row": self.rows}

    def _columns(self) -> Mapping[str, torch.Tensor]:
        return {"score": self.scores}

    def plot(self, path: str | Path | None = None) -> Figure:
        curve = drawing.Curve(label="score", x=torch.arange(len(self.scores)), y=self.scores)
        figure = drawing.curves_figure(
            [drawing.CurvePanel(curves=[curve])], titles=(self.question, ""), y_label="score"
        )
        return drawing.finished(figure, path)

    def _lines(self) -> tuple[str, str]:
        return f"Toy of {self.model}: {self.question!r}", f"largest score {float(self.scores.max()):.2f}"

    def _problem(self) -> str | None:
        return None if len(self.rows) == len(self.scores) else "rows and scores differ"


def toy(*scores: float, rows: tuple[str, ...] | None = None, **changes: Any) -> Toy:
    made = Toy(
        model="some-model",
        question="Who <b>costs</b> & why?\n" + "very long " * 40,
        rows=rows or tuple(f"row {number}" for number in range(len(scores))),
        scores=double(scores),
        by_kind={"z": double([1.0]), "a": torch.ones(2, dtype=torch.bool)},
        inner=Inner(name="inner", values=torch.arange(3)),
        inners=(Inner(name="one"), Inner(name="two", values=torch.eye(2))),
        anything={"x": [1, None]},
    )
    return replace(made, **changes)


def test_every_kind_of_field_comes_back(tmp_path):
    before = toy(0.1, 0.2, maybe=True, token=7)
    after = Toy.load(before.save(tmp_path / "toy"))
    assert list(after.by_kind) == ["z", "a"] and torch.equal(after.by_kind["a"], before.by_kind["a"])
    assert after.inners[0] == before.inners[0] and torch.equal(after.inners[1].values, torch.eye(2))
    assert after.inner.values.dtype == torch.int64 and after.anything == before.anything
    for name in ("model", "question", "rows", "pair", "side", "maybe", "token"):
        assert getattr(after, name) == getattr(before, name), name
    assert before.save(tmp_path / "again").read_bytes() == after.save(tmp_path / "toy").read_bytes()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "5", "model is 5, not of type str"),
        ("rows", '["a", 3]', "rows.1 is 3, not of type str"),
        ("pair", "[1]", "zip"),
        ("pair", "[true, 0.5]", "pair.0 is True, not of type int"),
        ("side", '"up"', "side is 'up', not of type"),
        ("maybe", "1", "maybe is 1, not of type"),
        ("token", "0.5", "token is 0.5, not of type"),
        ("pair", "[9223372036854775808, 0.5]", "pair.0 is 9223372036854775808, beyond 64 bits"),
        ("inner", '{"name": "x", "size": 3}', "unknown field inner.size"),
        ("inner", '{"values": null}', "KeyError: 'inner.name'"),
        ("inners", '{"0": 1}', "inners is"),
        ("by_kind", '{"q": null}', "KeyError: 'by_kind.q'"),
        ("scores", None, "KeyError: 'scores'"),
        ("rows", '["a"]', "rows and scores differ"),
    ],
)
def test_other_types_than_those_of_the_class_are_refused(tmp_path, field, value, message):
    path = toy(0.1, 0.2).save(tmp_path / "toy")
    tensors, text = read_tensors(path)
    changed = {name: each for name, each in (text | {field: value}).items() if each is not None}
    write_tensors(path, tensors, changed)
    with pytest.raises(ArtefactError, match="holds no whole Toy") as caught:
        Toy.load(path)
    assert message in str(caught.value)


def test_a_number_without_a_point_is_a_float(tmp_path):
    assert Toy.load(toy(0.1, pair=(1, 2)).save(tmp_path / "toy")).pair == (1, 2.0)


def test_another_layout_version_or_program_is_refused(tmp_path):
    path = toy(0.1).save(tmp_path / "toy")
    assert read_tensors(path)[1][LAYOUT] == "toy 1"
    save_fields(path, "toy 2", Inner(name="x"))
    with pytest.raises(ArtefactError, match="of another version of multrace"):
        Toy.load(path)
    assert load_fields(path, "toy 2", Inner).name == "x"
    with pytest.raises(ArtefactError, match="'toy 2', not 'inner 1'; load another file"):
        load_fields(path, "inner 1", Inner)


@pytest.mark.parametrize("name", ["more", "maybe", "inner.name"])
def test_a_tensor_that_no_field_holds_is_refused(name, tmp_path):
    """Also one in the place of a field of another type."""
    tensors, text = read_tensors(toy(0.1).save(tmp_path / "toy"))
    assert Toy.load(write_tensors(tmp_path / "same", tensors, text)).maybe is None
    with pytest.raises(ArtefactError, match=f"unexpected tensors {name}"):
        Toy.load(write_tensors(tmp_path / "toy", tensors | {name: torch.ones(1)}, text))


# What people see


def test_a_result_is_two_lines_that_fit_a_screen():
    lines = repr(toy(0.1, 0.9)).split("\n")
    assert len(lines) == 2 and lines[1] == "largest score 0.90"
    assert lines[0].startswith("Toy of some-model: 'Who <b>costs</b>") and len(lines[0]) <= 140
    assert str(toy(0.1, 0.9)) == "\n".join(lines)


def test_a_notebook_shows_the_picture_and_no_markup_of_the_question():
    shown = toy(0.1, 0.9)._repr_html_()
    assert (
        "data:image/png;base64," in shown and "&lt;b&gt;costs&lt;/b&gt; &amp; why" in shown and "<b>costs" not in shown
    )
    assert toy(0.1, 0.9).plot()._repr_png_().startswith(b"\x89PNG")


def test_a_plot_is_a_figure_and_written_only_where_asked(tmp_path):
    assert isinstance(toy(0.1, 0.9).plot(), Figure) and not list(tmp_path.iterdir())
    toy(0.1, 0.9).plot(tmp_path / "toy.pdf")
    assert (tmp_path / "toy.pdf").read_bytes().startswith(b"%PDF")


def test_a_table_has_a_line_per_entry():
    frame = toy(0.1, 0.9).to_dataframe()
    assert frame.to_dict("list") == {"row": ["row 0", "row 1"], "score": [0.1, 0.9]}


@pytest.mark.slow  # the imports of the whole package are checked by test_startup.py
def test_results_are_imported_without_pandas_matplotlib_and_scipy():
    """They add none of the three to what transformers and the models import already; drawing adds matplotlib."""
    code = (
        "import sys, torch, transformers, multrace.models.vlm\n"
        "def heavy(): print(*(name for name in ('pandas', 'matplotlib', 'scipy') if name in sys.modules), sep=',')\n"
        "heavy()\n"
        "import multrace.tracing.causal.average, multrace.tracing.knockout.result\n"
        "heavy()\n"
        "import matplotlib.figure\n"
        "heavy()\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    before, after, drawn = printed.splitlines()
    assert after == before
    assert "matplotlib" in drawn.split(",") and "matplotlib" not in after.split(",")


# Averages


def test_a_running_mean_is_the_mean_and_deviation_of_what_was_added():
    values = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e3
    values[3:7, 1] = torch.nan
    values[:, 2, 2] = torch.nan
    running = RunningMean()
    for each in values:
        running.add(each, {"row": "abc", "layer": range(4)})
    mean = running.value
    assert torch.allclose(mean.mean, values.nanmean(0), rtol=1e-13, atol=0, equal_nan=True)
    assert torch.equal(mean.count, (~values.isnan()).sum(0))
    slow = mean_interval(values, comparisons=12)
    for end, expected in zip(mean.interval(comparisons=12), slow, strict=True):
        assert torch.allclose(end, expected, rtol=0, atol=1e-9, equal_nan=True)
    assert mean.mean[2, 2].isnan() and mean.count[2, 2] == 0


def test_labels_that_come_up_later_are_appended_and_missing_ones_left_out():
    running = RunningMean(joint=True)
    running.add(double([[1, 2]]), {"flow": ["a"], "layer": [0, 1]})
    running.add(double([[5, 6], [3, 8]]), {"flow": ["b", "a"], "layer": [0, 1]})
    assert running.axes == {"flow": ("a", "b"), "layer": (0, 1)}
    mean = running.value
    assert mean.mean.tolist() == [[2, 5], [5, 6]] and mean.count.tolist() == [[2, 2], [1, 1]]
    assert torch.allclose(running.covariance[0], double([[1, 2], [3, 8]]).T.cov())
    assert mean.interval()[0][1].isnan().all() and not mean.interval()[0][0].isnan().any()


class ToyAverager(Averager[Toy, Toy]):
    """Averages the scores of toys."""

    alike = ("model", "by_kind")

    def _take(self, result: Toy) -> None:
        self._add("scores", result.scores, {"row": result.rows})
        self._add("total", result.scores.sum())

    def _average(self) -> Toy:
        assert self._mean("total").count.shape == ()
        return replace(self.first, rows=self._labels("scores", "row"), scores=self._mean("scores").mean)


def test_results_are_taken_in_one_by_one_and_may_be_forgotten():
    alive = []

    def stream():
        for number in range(20):
            result = toy(float(number), 1.0)
            alive.append(len([each for each in made if each() is not None]))
            made.append(weakref.ref(result))
            yield result
            del result

    made: list[weakref.ref] = []
    mean = averaged(ToyAverager(), stream())
    assert mean.scores.tolist() == pytest.approx([9.5, 1.0])
    assert max(alive) <= 2  # the first one, which says what the others must share, and the last one


def test_an_average_lines_up_rows_by_name():
    mean = averaged(ToyAverager(), [toy(1.0, 2.0), toy(4.0, rows=("row 1",)), toy(7.0, rows=("row 9",))])
    assert mean.rows == ("row 0", "row 1", "row 9") and mean.scores.tolist() == [1, 3, 7]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (toy(0.1, model="another"), r"differ in their model \(some-model and another\)"),
        (toy(0.1, by_kind={"z": double([2.0])}), "differ in their by_kind; average equal ones only"),
        (Inner(name="x"), "cannot average Toy and Inner together"),
    ],
)
def test_what_differs_is_not_averaged(other, message):
    with pytest.raises(ArtefactError, match=message):
        averaged(ToyAverager(), [toy(0.1), other])


def test_nothing_and_things_without_an_average_are_refused():
    with pytest.raises(ArtefactError, match="no results to average"):
        average(iter(()))
    with pytest.raises(ArtefactError, match="a Toy has no average over prompts"):
        average([toy(0.1)])
    with pytest.raises(ArtefactError, match="needs at least two results"):
        Mean(mean=double(1), deviation=double(0), count=torch.tensor(1)).interval()


# Statistics


def test_student_intervals_are_those_of_the_tables():
    quantiles = {2: 12.7062047364, 3: 4.3026527297, 11: 2.2281388520}
    for count, quantile in quantiles.items():
        low, high = student_interval(double(1.0), double(2.0), torch.tensor(count))
        assert float(high - 1) == pytest.approx(2 * quantile / count**0.5, rel=1e-9) == pytest.approx(float(1 - low))


def test_wilson_intervals_are_those_of_the_formula():
    shares, counts = double([0.0, 0.3, 1.0, torch.nan]), torch.tensor([10, 10, 10, 0])
    low, high = wilson_interval(shares, counts)
    z = 1.959963984540054
    for index in range(3):
        p, n = float(shares[index]), 10
        middle, half = (
            (p + z**2 / 2 / n) / (1 + z**2 / n),
            z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5,
        )
        assert (float(low[index]), float(high[index])) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert low[3].isnan() and high[3].isnan()


def test_the_area_under_the_curve_is_scikit_learns():
    generator = np.random.default_rng(3)
    scores, is_right = generator.integers(0, 6, 80).astype(float), generator.random(80) < 0.4
    assert auroc(scores, is_right) == pytest.approx(roc_auc_score(is_right, scores), abs=1e-12)


# Digests


def digested(folder: Path) -> dict[str, tuple[Path, Any]]:
    """A file of each form, with the function that reads it."""
    return {
        "tensors": (toy(0.1, 0.2).save(folder / "toy"), Toy.load),
        "no tensors": (
            save_fields(folder / "inner", "inner 1", Inner(name="x")),
            lambda path: load_fields(path, "inner 1", Inner),
        ),
        "JSON": (
            write_json(folder / "run", "run 1", {"seed": 0, "text": "é\n\x01"}),
            lambda path: read_json(path, "run 1"),
        ),
    }


@pytest.mark.parametrize("form", ["tensors", "no tensors", "JSON"])
def test_every_single_flipped_bit_is_refused(form, tmp_path):
    path, load = digested(tmp_path)[form]
    load(path)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (place % 8, (5 * place + 3) % 8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ArtefactError):
                load(path)


def test_a_digest_with_the_same_meaning_but_other_digits_is_refused(tmp_path):
    path, load = digested(tmp_path)["JSON"]
    content = path.read_bytes()
    path.write_bytes(content.replace(content[14:78], content[14:78].upper()))
    with pytest.raises(ArtefactError, match="its content is not what its SHA-256 vouches for"):
        load(path)


def test_a_header_that_claims_more_than_the_file_holds_allocates_nothing(tmp_path):
    path = toy(0.1).save(tmp_path / "toy")
    content = path.read_bytes()
    for claimed in (0, 1, 2**30, 2**62, 2**64 - 1):
        path.write_bytes(claimed.to_bytes(8, "little") + content[8:])
        tracemalloc.start()
        with pytest.raises(ArtefactError, match="toy' is not a readable safetensors file"):
            Toy.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
        tracemalloc.stop()


def test_a_json_file_is_read_by_its_layout(tmp_path):
    path = write_json(tmp_path / "run.json", "run 2", {"seed": 0, "share": float("nan")})
    assert str(read_json(path, "run 2")) == "{'seed': 0, 'share': nan}"
    assert json.loads(path.read_text())["layout"] == "run 2"
    assert path.read_bytes() == write_json(tmp_path / "again", "run 2", {"seed": 0, "share": float("nan")}).read_bytes()
    with pytest.raises(ArtefactError, match="'run 2', not 'run 3'; it is of another version of multrace"):
        read_json(path, "run 3")
    with pytest.raises(LookupError, match="no file"):
        read_json(tmp_path / "nowhere", "run 2", error=LookupErrorOfValue)
    path.write_text('{\n "seed": 0\n}')
    with pytest.raises(ArtefactError, match="run.json' is not a readable JSON file of multrace"):
        read_json(path, "run 2")


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A dataclass of plain values."""

    names: tuple[str, ...]
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    inner: Inner | None = None


def test_plain_values_become_a_dataclass_as_its_hints_say():
    made = from_plain(Plain, {"names": ["a"], "points": {"x": [1, 2.5]}, "inner": None})
    assert made == Plain(names=("a",), points={"x": (1.0, 2.5)}, inner=None)
    assert plain_fields(Plain, {"names": ["b"], "more": 3}, ["names"]) == {"names": ("b",)}
    for content in ([], {}, {"names": "a"}, {"names": [1]}, {"names": [], "points": {"x": [1]}}, {"names": [], "z": 1}):
        with pytest.raises((TypeError, KeyError, ValueError)):
            from_plain(Plain, content)


def test_a_refusal_quotes_no_more_than_a_line_of_a_damaged_file(tmp_path):
    path = toy(0.1).save(tmp_path / "toy")
    tensors, text = read_tensors(path)
    for changes in ({"rows": json.dumps("x" * 10**5)}, {LAYOUT: "x" * 10**5}, {"rows": "[" * 10**5}):
        write_tensors(path, tensors, text | changes)
        with pytest.raises(ArtefactError) as caught:
            Toy.load(path)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
