"""An architecture without a row is measured: what is found equals the rows that exist, and is proven or refused."""

import logging
from dataclasses import replace
from pathlib import Path

import multrace as mt
import pytest
from multrace.models import Family, Site, pictures
from multrace.models.families import table
from multrace.models.loading import load as loading

from .folders import Recipe, write
from .table import KNOWN, RECIPES
from .texts import TEXT, text

IN_EVERY_TEST_RUN = ("gpt_neox", "gptj", "gemma2", "granite", "olmo2", "cohere2", "llava")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of some processors
UNKNOWN: dict[str, tuple[Recipe, dict[str, object]]] = {
    "falcon": (
        text("falcon"),
        {
            "layers": "h", "attention": "self_attention", "attention_out": "self_attention.dense", "mlp": "mlp",
            "down": "mlp.dense_4h_to_h", "final_norm": "ln_f", "parallel": True,
        },
    ),
    "bloom": (  # its attention and its MLP add the residual stream themselves, so the maps inside are the parts
        Recipe(config={"model_type": "bloom", **TEXT, "n_layer": 4, "n_head": 4}),
        {
            "layers": "h", "attention": "self_attention.dense", "attention_out": "self_attention.dense",
            "mlp": "mlp.dense_4h_to_h", "down": "mlp.dense_4h_to_h", "final_norm": "ln_f", "parallel": False,
        },
    ),
}  # fmt: skip
"""Text types, and what their classes in transformers say."""
NO_ROW_SERVES = ("gemma3n", "phi4_multimodal")
"""Families with several residual streams, or with pictures that are read inside the text stack."""


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text type has a row."""
    monkeypatch.setattr(table, "TEXT_STACKS", ())


@pytest.fixture
def no_fronts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model type has a row."""
    monkeypatch.setattr(table, "PICTURE_FRONTS", ())


def places(vlm: mt.VisionLanguageModel) -> dict[str, object]:
    """Every module that the model's family names, by path, and the family's two properties."""
    found: dict[str, object] = {"norm": vlm.path(vlm.final_norm), "transposed": vlm.family.transposed}
    found |= {
        "parallel": vlm.family.parallel,
        "prefix": vlm.family.prefix,
        "beside": None if vlm.addresses.beside(0) is None else vlm.family.beside,
    }
    for layer in range(vlm.layers):
        found |= {str(site): vlm.path(site) for site in (Site("attention", layer), Site("mlp", layer))}
        found[f"out {layer}"] = vlm.attention_projection(layer).path
        found[f"down {layer}"] = vlm.down_projection(layer).path if vlm.has_down_projection(layer) else None
    if vlm.has_vision:
        found["tower"] = vlm.path(vlm.vision_tower)
    if vlm.has_vision and vlm.family.vision_layers is not None:
        found["tower's layers"] = [vlm.path(layer) for layer in vlm.vision_layers]
    if vlm.has_vision and vlm.family.projector is not None:
        found["projector"] = vlm.path(vlm.projector)
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_EVERY_TEST_RUN else pytest.mark.families)
        for name, known in KNOWN.items()
        if not known.refused and name not in NO_ROW_SERVES
    ],
)
def test_what_is_measured_is_what_the_rows_say(name: str, tmp_path: Path) -> None:
    """A row may leave out what is not needed (timm's blocks), and measuring what it cannot see as a list."""
    if KNOWN[name].missing:
        pytest.skip(f"needs {', '.join(KNOWN[name].missing)}, which is not installed")
    folder = write(RECIPES[name], tmp_path / name)
    by_row, measured = (
        mt.load(folder, families=families, verify=False, dtype=KNOWN[name].dtype) for families in ((), "discover")
    )
    assert measured.family.name == "discovered" != by_row.family.name
    for part in ("attended", "places"):
        assert getattr(measured.family, part) == getattr(by_row.family, part) == getattr(measured.frontend, part)
    named, found = places(by_row), places(measured)
    assert {place: found[place] for place in found if place in named} == {
        place: named[place] for place in named if place in found
    }
    assert {*named} ^ {*found} <= {"tower's layers", "projector"}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_architecture_without_a_row_is_measured_and_proven(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, no_rows: None
) -> None:
    recipe, expected = UNKNOWN[name]
    with caplog.at_level(logging.INFO, logger="multrace"):
        vlm = mt.load(write(recipe, tmp_path / name))
    assert vlm.family.name == "discovered"
    assert {part: getattr(vlm.family, part) for part in expected} == expected
    line, proof = caplog.messages
    assert "discovered" in line and "\n" not in line and expected["attention_out"] in line
    assert "addresses proven" in proof
    again = mt.load(tmp_path / name, families=(vlm.family,))  # what was found serves as a row
    assert places(again) == places(vlm)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("aria", (False, False)), ("mllama", (True, False)), ("idefics3", (False, True))],
)
def test_what_pictures_are_to_the_text_stack_is_measured(
    name: str, expected: tuple[bool, bool], tmp_path: Path, caplog: pytest.LogCaptureFixture, no_fronts: None
) -> None:
    with caplog.at_level(logging.INFO, logger="multrace"):
        vlm = mt.load(write(RECIPES[name], tmp_path / name), dtype=KNOWN[name].dtype)
    assert (vlm.family.attended, vlm.family.places) == (vlm.frontend.attended, vlm.frontend.places) == expected
    lines = [line for line in caplog.messages if "discovered, not in the tables" in line]
    assert len(lines) == (expected != (False, True)) and all("places=False" in line for line in lines)
    assert caplog.messages[-1].count("addresses proven") == 1


def test_what_cannot_be_told_of_pictures_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, no_fronts: None
) -> None:
    monkeypatch.setattr(pictures, "_change_one", lambda _output: None)  # nothing in the tower reaches an image token
    with caplog.at_level(logging.INFO, logger="multrace"):
        vlm = mt.load(write(RECIPES["idefics3"], tmp_path / "idefics3"), verify=False)
    assert vlm.family.places
    assert caplog.messages[0].endswith("; not found: whether image tokens show places")


def swapped(row: Family) -> Family:
    return replace(row, attention=row.mlp, attention_out=row.down, mlp=row.attention, down=row.attention_out)


WRONG = {
    "parts swapped": swapped,
    "parallel": lambda row: replace(row, parallel=not row.parallel),
    "a norm for a part": lambda row: replace(row, mlp="post_attention_layernorm"),
    "another map": lambda row: replace(row, down="mlp.dense_h_to_4h"),
    "another norm": lambda row: replace(row, final_norm="h.3.post_attention_layernorm"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_guess_is_refused_by_the_proof(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_rows: None
) -> None:
    recipe = text("falcon", parallel_attn=False)
    folder = write(recipe, tmp_path / "falcon")
    own = loading.discover
    monkeypatch.setattr(loading, "discover", lambda *args, **options: WRONG[wrong](own(*args, **options)))
    with pytest.raises(mt.ModelError) as caught:
        mt.load(folder)
    assert "no row serves it" in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_that_is_no_sum_of_its_parts_is_refused(tmp_path: Path, no_rows: None) -> None:
    recipe = text("gpt_neox_japanese")  # the last layer adds a bias besides
    with pytest.raises(mt.ModelError, match="no two modules of 'gpt_neox_japanese.layers.3'"):
        mt.load(write(recipe, tmp_path / "model"))


def test_a_row_that_is_wrong_is_refused_and_not_replaced_by_what_is_measured(tmp_path: Path, no_rows: None) -> None:
    row = Family(name="mine", model_types=("falcon",), text_types=("falcon",), layers="h")
    folder = write(UNKNOWN["falcon"][0], tmp_path / "falcon")
    with pytest.raises(mt.ModelError, match="mine"):
        mt.load(folder, families=(row,))
    assert mt.load(folder, families="discover").family.name == "discovered"
