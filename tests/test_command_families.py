"""`multrace families` and `multrace doctor`: what is known of architectures, and what works on one model."""

import json
import subprocess
import sys

import pytest
from multrace import models
from multrace.scripts import families
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
