"""`multrace families` and `multrace doctor`: what is known of architectures, and what works on one model."""

import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
from families.folders import write
from families.table import RECIPES
from families.texts import text
from multrace import models, tracing
from multrace.editing import Delta
from multrace.models.families import table
from multrace.scripts import doctor, families
from multrace.scripts.main import app


def test_the_table_fits_a_terminal_and_has_every_row(capsys: pytest.CaptureFixture[str]):
    assert app(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    said = {word.strip(",") for line in lines for word in line.split()}
    types = [name for row in models.TEXT_STACKS for name in row.text_types]
    types += [name for row in models.PICTURE_FRONTS for name in row.model_types]
    assert {*types, *families.USUAL} <= said


def test_json_has_every_field_of_every_row(capsys: pytest.CaptureFixture[str]):
    assert app(["families", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    made = [
        models.TextStack(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in row.items()
                if name not in ("special", "engine")
            }
        )
        for row in tables["text_stacks"]
    ]
    assert tuple(made) == models.TEXT_STACKS
    (gpt_neox,) = [row for row in tables["text_stacks"] if row["text_types"] == ["gpt_neox"]]
    assert gpt_neox["special"] == ["attention and MLP side by side", "own names of modules"]
    assert len(tables["picture_fronts"]) == len(models.PICTURE_FRONTS)


def test_no_text_type_is_both_usual_and_in_a_row():
    types = [name for row in models.TEXT_STACKS for name in row.text_types]
    assert not {*types} & {*families.USUAL} and len({*types}) == len(types)


def test_the_table_is_printed_without_torch():
    code = (
        "import sys\nfrom multrace.scripts.main import app\nassert app(['families']) == 0\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- the doctor ----


def findings(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> dict[str, dict]:
    """What `multrace doctor --json` finds, by name."""
    assert app(["doctor", "--json", *arguments]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["works"] == (code == 0)
    return {finding["name"]: finding for finding in report["findings"]}


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text-only model that attends in a way of its own."""
    return str(write(text("falcon"), tmp_path_factory.mktemp("models") / "falcon"))


def test_everything_works_on_the_embedded_model(capsys: pytest.CaptureFixture[str]):
    assert app(["doctor"]) == 0
    out, err = capsys.readouterr()
    lines = {line[:15].strip(): line[16:] for line in out.splitlines()}
    assert [*lines] == [*doctor.EXAMINATIONS] and all(line.startswith("ok ") for line in lines.values())
    assert "llava over llama: 8 layers" in lines["family"] and "addresses proven" in lines["proof"]
    assert "fast engine" in lines["trace"] and "64 of them with a place" in lines["pictures"]
    assert "undo is bit-exact" in lines["edit"] and "layers.4.mlp.down_proj" in lines["export"]
    assert not [line for line in err.splitlines() if line.startswith("multrace:")]


def test_what_does_not_work_is_said_with_the_reason(
    falcon: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(table, "TEXT_STACKS", ())
    found = findings(capsys, "--model", falcon, code=1)
    assert [name for name, finding in found.items() if not finding["works"]] == ["knockout"]
    assert "cannot be cut" in found["knockout"]["says"]
    assert "plain passes, since" in found["trace"]["says"]
    assert "discovered" in found["family"]["says"] and found["pictures"]["says"] == "text-only model"


def test_pictures_that_layers_attend_to_are_said_to_stand_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    chosen = {"pictures": doctor.pictures, "trace": doctor.trace}
    monkeypatch.setattr(doctor, "EXAMINATIONS", chosen)
    found = findings(capsys, "--model", str(write(RECIPES["mllama"], tmp_path / "mllama")), code=0)
    assert found["pictures"]["says"].endswith("pictures stand at no position, since layers attend to their states")
    assert found["trace"]["says"].startswith("fast engine")


def leave_the_edit(self: Delta, vlm: models.VisionLanguageModel, **options: object) -> object:
    """Applied as ever, and not taken back."""
    return nullcontext(self.apply(vlm))


def a_weaker_edit(self: Delta, vlm: models.VisionLanguageModel, **options: object) -> object:
    """The weights stay as they are."""
    return nullcontext()


def fail(*args: object, **options: object) -> object:
    raise TypeError("unhashable")


FAULTS = {
    "not undone": (Delta, "applied", leave_the_edit, "edit", "an edit is applied"),
    "without effect": (Delta, "applied", a_weaker_edit, "edit", "it does not rise"),
    "the library's own error": (tracing, "logit_lens", fail, "lens", "TypeError: unhashable"),
}


def test_an_undo_that_leaves_something_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    own, numbers = models.VisionLanguageModel.fingerprint, count()

    def never_twice_the_same(self: models.VisionLanguageModel, names: list[str]) -> dict[str, str]:
        by_the_doctor = inspect.stack()[1].function == "edit"
        return dict.fromkeys(names, str(next(numbers))) if by_the_doctor else own(self, names)

    monkeypatch.setattr(doctor, "EXAMINATIONS", {"edit": doctor.edit})
    monkeypatch.setattr(models.VisionLanguageModel, "fingerprint", never_twice_the_same)
    says = findings(capsys, code=1)["edit"]["says"]
    assert "undoing the edit has not restored model.language_model.layers.4.mlp.down_proj.weight" in says


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_notices(fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    owner, name, function, place, reason = FAULTS[fault]
    monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(doctor, "EXAMINATIONS", {place: doctor.EXAMINATIONS[place]})
    found = findings(capsys, code=1)
    assert not found[place]["works"] and reason in found[place]["says"]


def test_a_model_that_cannot_be_opened_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text('{"model_type": "llama"', encoding="utf-8")
    assert app(["doctor", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("multrace: ") and "config.json" in line
