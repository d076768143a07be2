"""multrace data, run in process: what it prints and writes, its exit codes, and one line for a file it cannot read."""

import json
from pathlib import Path

import pytest
from multrace.data import read_records
from multrace.scripts.main import app


@pytest.fixture
def path(tmp_path) -> Path:
    rows = [
        {"question": "Is the car red?", "constraint": "the car,"},
        {"question": "Is the car red?", "constraint": "the boat"},
        {"question": "Who?", "target": "Ada", "image": "none.png"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


def run(*tokens: object) -> int:
    return app(["data", *map(str, tokens)])


def test_check_prints_each_kind_with_its_rows(path, capsys):
    assert run("check", path) == 1
    out = capsys.readouterr().out
    assert f"{path} (lines): 4 rows, 4 findings" in out
    assert "error         1  a span is not in the question" in out and "3 errors\n" in out
    assert "row 2: 'the boat' is not in the question" in out
    assert "note          1  a span is not spelt as in the question" in out and "--fix: the span is cleaned" in out


def test_check_writes_a_clean_file_and_its_findings(path, tmp_path, capsys):
    assert run("check", "--file", path, "--fix", tmp_path / "clean.jsonl", "--json", tmp_path / "f.json") == 1
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'clean.jsonl'} (2 of 4 rows)" in out and "1 error left" in out
    assert [record.constraint for record in read_records(tmp_path / "clean.jsonl")] == ["the car", "the boat"]
    findings = json.loads((tmp_path / "f.json").read_text())
    assert [finding["row"] for finding in findings["findings"]] == [1, 2, 3, 4]
    assert run("check", path, "--no-pictures", "--show", 0) == 1
    assert "none.png" not in capsys.readouterr().out


def test_a_good_file_has_no_errors(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "Who?"}\n')
    assert run("check", path) == 0 and "1 row, 0 findings" in capsys.readouterr().out
    path.write_text('{"question": "Who?", "image": "none.png"}\n')
    assert run("check", path, "--fix", tmp_path / "clean.jsonl") == 1
    assert "nothing is written; if the pictures are elsewhere, pass --images" in capsys.readouterr().out
    assert not (tmp_path / "clean.jsonl").exists()


def test_convert_says_what_is_lost_and_left_out(path, tmp_path, capsys):
    assert run("convert", path, tmp_path / "out.json", "--to", "mmedit") == 1
    out = capsys.readouterr().out
    assert "1 record written, 3 left out" in out and "row 1: the question 'Is the car red?' has no target" in out
    assert json.loads((tmp_path / "out.json").read_text())[0]["image"] == "none.png"
    assert run("convert", tmp_path / "out.json", tmp_path / "again.jsonl") == 0
    assert read_records(tmp_path / "again.jsonl")[0].target == "Ada"


def test_the_schema_is_json(capsys):
    assert run("schema") == 0
    assert "EditLine" in json.loads(capsys.readouterr().out)["$defs"]


@pytest.mark.parametrize("command", ["check", "convert"])
def test_a_file_that_cannot_be_read_is_one_line(command, path, tmp_path, capsys):
    out = [tmp_path / "out.jsonl"] if command == "convert" else []
    cases = {tmp_path / "none.jsonl": "No such file", tmp_path / "empty.jsonl": "is empty"}
    (tmp_path / "empty.jsonl").touch()
    for file, message in cases.items():
        assert run(command, file, *out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert run(command, path, *out, "--format", "mmedit") in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
