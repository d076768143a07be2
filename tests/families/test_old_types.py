"""Old text types that no row serves: what cannot run fast runs slowly with one clear reason, and no error is raw."""

from pathlib import Path

import multrace as mt
import pytest
import torch

from .battery import CONSTRAINT, QUESTION, TARGET, open_subject, with_reason
from .folders import IDS, VOCABULARY, Recipe, write
from .table import KNOWN, RECIPES, Known
from .texts import GPT, text

ALIBI = {"vocab_size": VOCABULARY, "initializer_range": 0.2, **IDS}
OLD: dict[str, tuple[Recipe, str]] = {
    "mpt": (
        Recipe(config={"model_type": "mpt", **ALIBI, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}),
        "MptModel does not let its attention function be replaced",
    ),
    "falcon": (text("falcon"), "FalconModel does not let its attention function be replaced"),
    "bloom": (
        Recipe(config={"model_type": "bloom", **ALIBI, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
        "BloomModel does not let its attention function be replaced",
    ),
    "xglm": (
        Recipe(config={"model_type": "xglm", "vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 64, "num_layers": 4,
                       "attention_heads": 4, "max_position_embeddings": 512, "init_std": 0.2, **IDS}),
        "XGLMModel does not let its attention function be replaced",
    ),
    "ctrl": (Recipe(config={"model_type": "ctrl", **GPT, "dff": 64}), ""),
}  # fmt: skip
"""A model, and why the fast engine leaves it to plain passes; empty if it does not."""
ENGINES = ("replay", "plain")
DTYPES = {"xglm": "float32"}  # whose masks overflow in float64
SOME_ONLY = [pytest.param(name, marks=() if name in ("mpt", "ctrl") else pytest.mark.families) for name in OLD]


@pytest.mark.parametrize("name", SOME_ONLY)
def test_old_types_are_traced_cut_and_edited(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, reason = OLD[name]
    monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.setitem(KNOWN, name, Known(title=name, dtype=DTYPES.get(name, "float64")))
    subject = open_subject(name, tmp_path)
    vlm, prompt = subject.vlm, subject.prompt
    settings = {"corruption": mt.TextNoise(samples=1, scale=3.0), "even_if_weak": True, "progress": False}
    trace = with_reason(reason, lambda: mt.causal_trace(vlm, prompt, sites="hidden", positions="last", **settings))
    assert (trace.engine.engine, trace.engine.reason) == (("plain", reason) if reason else ("replay", None))
    flow = {"flows": ["constraint -> last"], "windows": (1,), "progress": False}
    if reason:
        with pytest.raises(mt.TraceError, match="cannot be cut"), pytest.warns(UserWarning, match=reason):
            mt.attention_knockout(vlm, prompt, **flow)
    else:
        fast, slow = (mt.attention_knockout(vlm, prompt, engine=mt.Engine(name=name), **flow) for name in ENGINES)
        assert (fast.probabilities - slow.probabilities).abs().max() < 1e-10
        assert (fast.probabilities - fast.clean[0]).abs().max() > 1e-6
    before = vlm.score(None, QUESTION, TARGET).probability
    request = mt.EditRequest(question=prompt, target=TARGET)
    with mt.MultEdit(layer=2, token="last", steps=5).edit(vlm, [request], progress=False).applied(vlm):
        assert vlm.score(None, QUESTION, TARGET).probability > before


def test_a_text_stack_that_writes_into_its_input_is_run_on_copies(tmp_path: Path) -> None:
    vlm = mt.load(write(OLD["ctrl"][0], tmp_path / "ctrl"), dtype="float64")
    entering = vlm.embed(vlm.prompt(None, QUESTION, constraint=CONSTRAINT))
    before = entering.embeddings.clone()
    with torch.no_grad():
        first, second = vlm.forward(entering), vlm.forward(entering)
        vlm.decoder(inputs_embeds=(own := before.clone()))
    assert torch.equal(first, second) and torch.equal(entering.embeddings, before)
    assert not torch.equal(own, before)  # the stack itself does write into it


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"])
def test_a_model_without_attention_is_refused_as_such(model_type: str, tmp_path: Path) -> None:
    config = {"mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}}.get(model_type, {})
    folder = write(text(model_type, **config), tmp_path / model_type)
    with pytest.raises(mt.ModelError, match="cannot be opened: it has no attention: each of its layers"):
        mt.load(folder)
