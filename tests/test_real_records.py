"""Real photographs and real annotated questions, where the folder with them lies beside the checkout."""

import csv
from pathlib import Path

import pytest
from multrace.models import ModelError
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_photos = pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="no folder ../shared/data/photos")
needs_records = pytest.mark.skipif(
    not (SHARED / "vqa_constraints").is_dir(), reason="no folder ../shared/data/vqa_constraints"
)


@needs_photos
@pytest.mark.parametrize("name", ["dog.jpg", "groceries.jpg"])
def test_a_photograph_of_any_size_becomes_a_prompt_and_gets_an_answer(tiny_vlm, name):
    path = SHARED / "photos" / name
    prompt = tiny_vlm.prompt(path, "What is the name of the company in this photo?", constraint="the company")
    with Image.open(path) as photograph:
        assert min(photograph.size) > 64
    assert len(prompt.groups["image"]) == len(prompt.patches) == 64
    assert len({(patch.row, patch.column) for patch in prompt.patches}) == 64
    assert tiny_vlm.answers([prompt])[0]


@needs_photos
def test_half_a_photograph_is_refused_by_name(tiny_vlm, tmp_path):
    whole = (SHARED / "photos" / "dog.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="half.jpg"):
        tiny_vlm.prompt(tmp_path / "half.jpg", "What is this?")


@needs_records
def test_every_published_constraint_is_found_in_its_question(tiny_vlm):
    with open(SHARED / "vqa_constraints" / "multimodal_known.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for row in rows:
        prompt = tiny_vlm.prompt(None, row["question"], constraint=row["main_entity"])
        found = tiny_vlm.decode([prompt.inputs["input_ids"][0, at] for at in prompt.groups["constraint"]])
        assert row["main_entity"].lower() in found.lower()
