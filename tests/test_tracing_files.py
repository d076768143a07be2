"""Traces on disk: what is saved comes back bit for bit, what cannot be written leaves nothing behind."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
from multrace.artefacts import ArtefactError, read_tensors, write_tensors
from multrace.tracing import AverageTrace, CausalTrace, EngineReport, average
from safetensors.torch import save_file


def assert_equal(again: object, before: object) -> None:
    """Every field of two dataclasses is the same, to the last bit and in the same order."""
    assert type(again) is type(before)
    for name in before.__dataclass_fields__:
        new, old = getattr(again, name), getattr(before, name)
        if is_dataclass(old):
            assert_equal(new, old)
            continue
        if isinstance(old, dict) and any(is_dataclass(each) for each in old.values()):
            assert list(new) == list(old), name
            for key, value in old.items():
                assert_equal(new[key], value)
            continue
        if is_dataclass(old):
            assert_equal(new, old)
            continue
        if isinstance(old, torch.Tensor):
            new, old = {"": new}, {"": old}
        if isinstance(old, dict) and any(is_dataclass(each) for each in old.values()):
            assert list(new) == list(old), name
            for key, value in old.items():
                assert_equal(new[key], value)
        elif isinstance(old, dict) and any(isinstance(each, torch.Tensor) for each in old.values()):
            assert list(new) == list(old), name
            for key, value in old.items():
                assert new[key].dtype == value.dtype and torch.equal(new[key].nan_to_num(7), value.nan_to_num(7)), name
        else:
            assert new == old and repr(new) == repr(old), name


@pytest.fixture
def full(traced) -> CausalTrace:
    """A trace that uses every field: two metrics, more kinds, noise, a foil, estimates and an engine that checked."""
    generator = torch.Generator().manual_seed(3)
    spans = {"mlp": torch.tensor([[0, 2]] * 6), "head 0": torch.tensor([[0, 0]] * 6), "projector": torch.zeros(1, 2)}
    shapes = {kind: (2, 4, len(span), 3) for kind, span in spans.items()}
    return replace(
        traced,
        revision="abc",
        window=3,
        seed=1,
        scale=0.1 + 0.2,
        deviation=1 / 3,
        row_tokens=(None, 4, "constraint_last", "last"),
        question='quotes " and \n lines, 蓝',
        answer_ids=(3, 5),
        foil_ids=(7,),
        foil="Bob",
        metrics=("logit_difference", "probability"),
        clean_scores=torch.rand(2, generator=generator, dtype=torch.float64) + 1,
        corrupted_scores=torch.rand(2, 3, generator=generator, dtype=torch.float64),
        spans={kind: span.long() for kind, span in spans.items()},
        samples={
            kind: torch.rand(shape, generator=generator, dtype=torch.float64).transpose(1, 1)
            for kind, shape in shapes.items()
        },
        direction="corrupt",
        effect="direct",
        severed="attention",
        estimated={"mlp": torch.rand(4, 6, generator=generator) > 0.5},
        agreement={"mlp": 0.1 + 0.7},
        engine=EngineReport(
            engine="replay",
            cells=100,
            free_cells=7,
            token_layers=12345,
            halvings=1,
            checked_cells=4,
            largest_difference=1e-7 / 3,
            plain_noise=0.0,
        ),
    )


@pytest.mark.parametrize("name", ["traced", "full"])
def test_a_trace_comes_back_from_its_file(request, name, tmp_path):
    trace = request.getfixturevalue(name)
    again = CausalTrace.load(trace.save(tmp_path / "new" / "trace.safetensors"))
    assert_equal(again, trace)
    assert again.kinds == trace.kinds and again.engine.summary() == trace.engine.summary()
    with pytest.raises(AssertionError):
        assert_equal(again, replace(trace, seed=99))


def test_an_average_comes_back_from_its_file(traced, full, shift_trace, tmp_path):
    for number, traces in enumerate(([traced, shift_trace(traced, 0.1)], [full, shift_trace(full, 0.2)])):
        mean = average(traces)
        again = AverageTrace.load(mean.save(tmp_path / f"{number}.safetensors"))
        assert_equal(again, mean)
        assert again.causal_blocks("mlp") == mean.causal_blocks("mlp")


def rewritten(path: Path, name: str, *, drop: str = "", add: Mapping[str, torch.Tensor] = {}, **changes: str) -> None:
    """A copy of the file beside it, without one entry and with other metadata."""
    tensors, header = read_tensors(path)
    write_tensors(
        path.with_name(name),
        {key: value for key, value in tensors.items() if key != drop} | dict(add),
        {key: value for key, value in (header | changes).items() if key != drop},
    )


def test_files_that_are_no_trace_are_refused(traced, tmp_path):
    path = traced.save(tmp_path / "trace.safetensors")
    whole = path.read_bytes()
    save_file({"weight": torch.zeros(2)}, tmp_path / "stranger")
    write_tensors(tmp_path / "hollow", {"clean": torch.zeros(())}, {"layout": "multrace causal trace 3"})
    save_file({"clean": torch.zeros(())}, tmp_path / "old", {"layout": "multrace causal trace 1"})
    save_file({"clean": torch.zeros(())}, tmp_path / "unsealed", {"layout": "multrace causal trace 3"})
    rewritten(path, "header", rows="[oops")
    rewritten(path, "no_field", drop="question")
    rewritten(path, "no_tensor", drop="samples.mlp")
    rewritten(path, "too_much", surprise="1")
    rewritten(path, "more_tensors", add={"surprise": torch.zeros(1)})
    rewritten(path, "wrong_type", rows="5")
    rewritten(path, "bad_engine", engine='{"engin": "plain"}')
    rewritten(path, "mapping", samples='["hidden", "mlp"]')
    rewritten(path, "number", layers='"6"')
    rewritten(path, "tuple", row_positions="[[0, 1], [2, 3, 4], [3], [5.5]]")
    rewritten(path, "fewer_rows", rows='["image", "question"]')
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("not a trace")
    (tmp_path / "empty").write_bytes(b"")
    average([traced]).save(tmp_path / "mean")
    replace(traced, layers=7).save(tmp_path / "shapes")
    cases = {
        "nowhere": "no file",
        "stranger": "holds 'something of another program'",
        "hollow": "holds no whole CausalTrace (KeyError: 'model')",
        "old": "it is of another version of multrace, so make it again",
        "unsealed": "no digest vouches for its content; it is of another version of multrace",
        "header": "the header of",
        "no_field": "holds no whole CausalTrace (KeyError: 'question')",
        "no_tensor": "holds no whole CausalTrace (KeyError: 'samples.mlp')",
        "too_much": "unknown field surprise",
        "more_tensors": "unexpected tensors surprise",
        "wrong_type": "rows is 5, not of type tuple[str, ...]",
        "bad_engine": "KeyError: 'engine.engine'",
        "mapping": "samples is ['hidden', 'mlp'], not of type",
        "number": "layers is '6', not of type int",
        "tuple": "row_positions.3.0 is 5.5, not of type int",
        "fewer_rows": "of other shapes than its rows",
        "cut": "is not a readable safetensors file",
        "text": "is not a readable safetensors file",
        "empty": "is not a readable safetensors file",
        "mean": "holds 'multrace average trace 3', not 'multrace causal trace 3'",
        "shapes": "of other shapes than its rows, layers and metrics",
    }
    for name, message in cases.items():
        with pytest.raises(ArtefactError) as caught:
            CausalTrace.load(tmp_path / name)
        assert message in str(caught.value), name
        assert name in str(caught.value)
    with pytest.raises(ArtefactError, match="not 'multrace average trace 3'"):
        AverageTrace.load(path)
    assert CausalTrace.load(path).kinds == traced.kinds


def test_an_engine_report_is_one_line(full, traced):
    assert full.engine.summary() == (
        "replay engine; 100 cells, 7 of them free; 12345 token-layers; batch halved 1 times; "
        "4 cells recomputed by plain forward passes, largest difference 3.3e-08 (plain passes among themselves: "
        "0.0e+00)"
    )
    assert traced.engine.summary() == "plain engine (made by hand); 48 cells"


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(traced, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    before = everything_in(tmp_path)
    for write in (traced.save, traced.plot, average([traced]).save, average([traced]).plot, traced.save_rome):
        for target in (tmp_path / "file" / "out.png", tmp_path / "folder.png"):
            with pytest.raises(ArtefactError, match="cannot write .* choose a folder that you may write to"):
                write(target)
    assert everything_in(tmp_path) == before


def test_an_interrupted_write_keeps_the_old_file(traced, tmp_path, monkeypatch):
    path = traced.save(tmp_path / "trace.safetensors")
    old = path.read_bytes()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(ArtefactError, match="No space left on device"):
        replace(traced, seed=5).save(path)
    assert path.read_bytes() == old
    assert everything_in(tmp_path) == ["trace.safetensors"]
