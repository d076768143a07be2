"""Layers with inputs of their own that attend to the keys of lower layers (Gemma 4): replayed and searched exactly."""

from pathlib import Path

import multrace as mt
import pytest
import torch
from model_fixtures import draw_photo
from multrace.models.loading import prove_addresses
from multrace.tracing import TextNoise
from multrace.tracing.engine import measure

from .battery import true_float64
from .folders import write
from .table import RECIPES

QUESTION = "Who founded the company in this photo?"
RUNS = {
    "another picture": (mt.SwapImage(draw_photo(2)), ["image", "last"]),
    "other words": (mt.ReplaceText(replacement="Paris city"), ["constraint", "last"]),
    "noise": (TextNoise(scale=3.0, samples=2), ["constraint", "last"]),
}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> mt.VisionLanguageModel:
    """Four layers, of which the upper two attend to the keys of the lower two."""
    vlm = mt.load(write(RECIPES["gemma4"], tmp_path_factory.mktemp("gemma4")), dtype="float64")
    assert vlm.config.get_text_config().kv_sharing_modes == ["store", "store", "reuse", "reuse"]
    return vlm


def traces(vlm: mt.VisionLanguageModel, case: str, **settings: object) -> tuple[mt.CausalTrace, mt.CausalTrace]:
    """A trace by the fast engine, and by one whole run per cell."""
    corruption, positions = RUNS[case]
    prompt = vlm.prompt(draw_photo(1), QUESTION, constraint="the company")
    options = {"corruption": corruption, "positions": positions, "even_if_weak": True, "progress": False, **settings}
    engines = mt.Engine(checks=0), mt.Engine(name="plain")
    fast, plain = (mt.causal_trace(vlm, prompt, engine=engine, **options) for engine in engines)
    assert fast.engine.engine == "replay" and fast.engine.token_layers < 0.5 * plain.engine.token_layers
    return fast, plain


def largest(fast: mt.CausalTrace, plain: mt.CausalTrace) -> float:
    return max(float((fast.samples[kind] - plain.samples[kind]).abs().max()) for kind in plain.samples)


@pytest.mark.parametrize(
    "settings", [{"window": 2}, {"sites": ("hidden",), "severed": "mlp"}], ids=["windows", "severed"]
)
@pytest.mark.parametrize("case", RUNS)
def test_a_sweep_is_one_whole_run_per_cell(vlm, case, settings):
    with true_float64(vlm):
        fast, plain = traces(vlm, case, **{"sites": ("hidden", "mlp", "attention", "heads"), **settings})
    assert largest(fast, plain) < 1e-12 < 1e-4 < float(plain.samples["hidden"].std())


def test_a_lane_attends_to_its_own_keys_and_not_to_recorded_ones(vlm, monkeypatch):
    monkeypatch.setattr(measure.Replay, "lenders", ())  # nothing is kept for the borrowing layers
    with pytest.raises(KeyError):
        traces(vlm, "another picture")
    monkeypatch.undo()
    own = measure._Sweep._layer

    def forgetful(self, layer, chunk, part, states, _lent, read):
        lent = self.recorded.own(self.replay, chunk.computed, self.runs.samples, len(chunk.lanes))
        own(self, layer, chunk, part, states, lent, read)  # always the keys of the base run

    monkeypatch.setattr(measure._Sweep, "_layer", forgetful)
    assert largest(*traces(vlm, "another picture")) > 1e-4


def test_a_knockout_is_one_masked_run_per_cell(vlm):
    prompt = vlm.prompt(draw_photo(1), QUESTION, constraint="the company")
    settings = {"flows": ["image -> last", "image -> constraint"], "windows": (1, 2), "progress": False}
    with true_float64(vlm):
        fast, plain = (
            mt.attention_knockout(vlm, prompt, engine=engine, **settings)
            for engine in (mt.Engine(checks=0), mt.Engine(name="plain"))
        )
    assert float((fast.probabilities - plain.probabilities).abs().max()) < 1e-12
    assert float((plain.probabilities - plain.clean[0]).abs().max()) > 1e-4


def test_goals_that_are_done_leave_a_search_above_the_shared_keys(vlm):
    """Rows of the keys that the upper layers borrow leave with them."""
    questions = ("Who?", "Which city is in the photo here?", "Who won the medal?")
    asked = zip(questions, ("golf", "tennis", "rome"), strict=True)
    requests = [mt.EditRequest(question=vlm.prompt(draw_photo(1), text), target=target) for text, target in asked]
    editor = mt.MultEdit(layer=3, steps=12, stop_loss=5.2, ending="stop")
    together = editor.search(vlm, requests, progress=False)
    alone = [editor.search(vlm, [request], progress=False)[0] for request in requests]
    steps = [each.results[0].steps for each in together]
    assert len({*steps}) > 1 and steps == [each.results[0].steps for each in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.results[0].change, other.results[0].change, rtol=1e-4, atol=1e-5)


def test_the_proof_patches_a_layer_that_acts_on_later_positions(vlm, tmp_path: Path):
    assert "patches at layer 0 act forward" in prove_addresses(vlm)
    plain = mt.load(write(RECIPES["gemma4_dense"], tmp_path))
    assert "patches at layer 2 act forward" in prove_addresses(plain)
