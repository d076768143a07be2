"""Half precision: edits, undo and exports work in it, and what it rounds away is measured and told."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from multrace import EditRequest, Engine, History, MultEdit, SwapImage, VisionLanguageModel, causal_trace
from multrace.data import tiny_vlm_path
from multrace.editing import Delta, RuntimeEdit, save_merged, to_peft, verify_export, with_adapters
from multrace.models import load
from multrace.workflow.edit_outcome import EditOutcome, Place


@pytest.fixture(scope="module")
def in_dtype() -> Callable[[str], VisionLanguageModel]:
    """The embedded model in a dtype, each loaded once; proofs in half precision are in test_models_loading.py."""
    return cache(lambda dtype: load(tiny_vlm_path(), dtype=dtype, verify=False))


def scaled(delta: Delta, factor: float) -> Delta:
    """The same edit with a change of another size."""
    changes = {name: replace(each, left=factor * each.left) for name, each in delta.changes.items()}
    return replace(delta, changes=changes)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_makes_edits_exports_and_undo(in_dtype, dtype, tmp_path):
    vlm = in_dtype(dtype)
    prompt, digest = vlm.prompt(None, "Who won?"), vlm.weights_digest()
    delta = MultEdit(layer=5).edit(vlm, [EditRequest(question=prompt, target="Pruro")], progress=False)
    (rounding,) = delta.rounding(vlm).values()
    assert 0 < rounding.lost < 0.01 and abs(rounding.survives - 1) < 1e-3 and not rounding.is_lossy
    with delta.applied(vlm):
        assert vlm.answers([prompt]) == ["Pruro"]
        rounded = vlm.score(None, "Who won?", "Pruro").probability
    assert vlm.weights_digest() == digest
    with RuntimeEdit(delta=delta).applied(vlm):
        assert abs(vlm.score(None, "Who won?", "Pruro").probability - rounded) < 0.01
    merged = load(save_merged(vlm, delta, tmp_path / "merged", dtype=vlm.dtype), dtype=dtype, verify=False)
    assert verify_export(vlm, delta, merged, [prompt]).difference == 0
    adapted = with_adapters(load(tiny_vlm_path(), dtype=dtype, verify=False), to_peft(vlm, delta, tmp_path / "adapter"))
    assert adapted.answers([prompt]) == ["Pruro"]


@pytest.mark.parametrize(("dtype", "small"), [("bfloat16", 2e-3), ("float16", 2e-4)])
def test_an_edit_that_half_precision_rounds_away_is_no_secret(in_dtype, tiny_vlm, dtype, small, caplog):
    vlm = in_dtype(dtype)
    prompt = vlm.prompt(None, "Who won?")
    whole = MultEdit(layer=5).edit(vlm, [EditRequest(question=prompt, target="Pruro")], progress=False)
    lost = scaled(whole, small)
    (rounding,) = lost.rounding(vlm).values()
    ((name, change),) = lost.changes.items()
    exact = vlm.weight(name).double() + change.left.double() @ change.right.double()
    step = exact - vlm.weight(name).double()
    wanted = (exact.to(vlm.dtype).double() - exact).norm() / step.norm()
    assert rounding.is_lossy and rounding.lost == pytest.approx(float(wanted), rel=1e-6) and rounding.lost > 0.3
    caplog.clear()
    with whole.applied(vlm):
        assert not caplog.records
    with lost.applied(vlm):
        (record,) = caplog.records
    assert f"{name}: rounding to {dtype} takes " in record.message and "RuntimeEdit" in record.message
    assert "\n" not in record.message
    caplog.clear()
    with lost.applied(tiny_vlm, on_other_weights=True):
        assert not caplog.records
    (line,) = History().added("small", lost).verify(vlm, progress=False)
    assert str(line).startswith(f"small: as it was made; {name}: rounding to {dtype} takes ")


@pytest.mark.parametrize(("dtype", "says"), [("bfloat16", True), ("float32", False)])
def test_the_outcome_of_an_edit_tells_what_half_precision_takes(in_dtype, dtype, says):
    vlm = in_dtype(dtype)
    request = EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
    editor = MultEdit(layer=5)
    delta = editor.edit(vlm, [request], progress=False)
    outcome = EditOutcome.of(vlm, [request], delta, places=[Place.of_editor(editor, 5)], progress=False)
    lines = [line for line in outcome.lines() if line.startswith("rounding")]
    assert len(lines) == says and len(outcome.probabilities) == says
    assert outcome.as_json()["rounding"][0]["dtype"] == dtype
    if says:
        ((rounded, whole),) = outcome.probabilities
        assert 0.9 < rounded < 1 and 0.9 < whole < 1 and rounded != whole
        assert f"P(target) {rounded:.3f} in the weights, {whole:.3f} with the change in float32" in lines[0]


def test_a_file_in_half_precision_says_what_it_takes_from_an_edit(tiny_vlm, tmp_path, caplog):
    request = EditRequest(question=tiny_vlm.prompt(None, "Who won?"), target="Pruro")
    delta = MultEdit(layer=5).edit(tiny_vlm, [request], progress=False)
    caplog.set_level("INFO", logger="multrace")
    save_merged(tiny_vlm, delta, tmp_path / "half", dtype=torch.bfloat16)
    save_merged(tiny_vlm, scaled(delta, 1e-3), tmp_path / "lost", dtype=torch.bfloat16)
    save_merged(tiny_vlm, delta, tmp_path / "whole", dtype=torch.float32)
    said = [record for record in caplog.records if "rounding to bfloat16 takes" in record.message]
    assert [record.levelname for record in said] == ["INFO", "WARNING"]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_traces_in_half_precision_agree_with_plain_passes(in_dtype, dtype, photo, other_photo):
    vlm = in_dtype(dtype)
    prompt = vlm.prompt(photo, "Who founded the company in this photo?")
    swap, rows = SwapImage(other_photo), ("image", "last")
    fast, plain = (
        causal_trace(vlm, prompt, corruption=swap, positions=rows, engine=Engine(name=name), progress=False)
        for name in ("replay", "plain")
    )
    assert fast.engine.engine == "replay" and fast.engine.largest_difference < 3e-2
    for kind, samples in fast.samples.items():
        torch.testing.assert_close(samples, plain.samples[kind], atol=3e-2, rtol=0)
