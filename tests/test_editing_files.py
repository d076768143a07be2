"""Saved deltas: bit-equal after a round trip, written whole or not at all, and an error for every file that is none."""

from pathlib import Path

import pytest
import torch
from multrace.editing import Delta, EditError, WeightChange
from multrace.models import VisionLanguageModel
from safetensors.torch import save_file


def made_by_hand(vlm: VisionLanguageModel) -> Delta:
    """A delta with random factors on one down projection."""
    projection, generator = vlm.down_projection(1), torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((projection.hidden, 2), (2, projection.width)))
    change = WeightChange(left=0.1 * left, right=right, keys=right, residuals=left.T.contiguous())
    return Delta(
        changes={projection.name: change},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        settings={"editor": "by hand"},
        requests=({"target": "Ünï"},),
    )


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    """A hash of every weight of the model."""
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def test_saving_and_loading_is_bit_equal(random_vlm, tmp_path):
    delta = made_by_hand(random_vlm)
    path = delta.save(tmp_path / "new folder" / "edit.safetensors")
    again = Delta.load(path)
    (name, change), (same_name, same) = (next(iter(each.changes.items())) for each in (delta, again))
    assert name == same_name
    for part in ("left", "right", "keys", "residuals"):
        assert torch.equal(getattr(change, part), getattr(same, part))
    for part in ("fingerprints", "model", "revision", "settings", "requests"):
        assert getattr(delta, part) == getattr(again, part)
    with delta.applied(random_vlm):
        wanted = bits(random_vlm)
    with again.applied(random_vlm):
        assert bits(random_vlm) == wanted
    assert [file.name for file in path.parent.iterdir()] == ["edit.safetensors"]


def corrupt(kind: str, good: Path, bad: Path) -> None:
    """A file that is no saved delta in one of several ways."""
    content = good.read_bytes()
    if kind == "truncated":
        bad.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        bad.write_bytes(b"")
    elif kind == "text":
        bad.write_text("no tensors here, only words")
    elif kind == "a folder":
        bad.mkdir()
    elif kind == "another safetensors file":
        save_file({"weight": torch.ones(2)}, bad)
    elif kind == "a part is missing":
        header = {"format": "multrace delta 2", "model": "m", "revision": "", "settings": "{}", "requests": "[]"}
        save_file({"left:w": torch.ones(2, 1)}, bad, metadata=header | {"fingerprints": '{"w": "00"}'})
    elif kind == "header is damaged":
        save_file({"left:w": torch.ones(2, 1)}, bad, metadata={"format": "multrace delta 2", "fingerprints": "{"})


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "text",
        "a folder",
        "missing",
        "another safetensors file",
        "a part is missing",
        "header is damaged",
    ],
)
def test_a_file_that_is_no_delta_is_an_error_that_names_it(kind, random_llama, tmp_path):
    good, bad = made_by_hand(random_llama).save(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    corrupt(kind, good, bad)
    with pytest.raises(EditError, match="bad.safetensors"):
        Delta.load(bad)
    assert Delta.load(good).model == random_llama.name


@pytest.mark.parametrize("kind", ["a file in place of the folder", "a folder in place of the file"])
def test_a_place_that_cannot_be_written_is_an_error_and_nothing_half_written_stays(kind, random_llama, tmp_path):
    if kind.startswith("a file"):
        (tmp_path / "folder").write_text("taken")
        path = tmp_path / "folder" / "edit.safetensors"
    else:
        path = tmp_path / "edit.safetensors"
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EditError, match="cannot write '"):
        made_by_hand(random_llama).save(path)
    assert sorted(tmp_path.rglob("*")) == before
