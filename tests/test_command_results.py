"""multrace results: a real row of the tables, kept and reused; the paired comparison by hand."""

import json

import pytest
from multrace.scripts.main import app
from multrace.scripts.results_editors import EditorRow, editor_rows
from multrace.scripts.results_locating import by_onset, comparisons, paired

GOOD, BAD = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]


def test_a_row_is_measured_once_and_written_into_the_tables(tmp_path, monkeypatch, capsys):
    edited = []
    monkeypatch.setattr(
        "multrace.scripts.results.editor_rows",
        lambda: (_counted(editor_rows()[3], edited),),
    )
    arguments = ["results", "--out", str(tmp_path), "--number", "2", "--probes", "1", "--parts", "editors"]
    assert app([*arguments, "--splits", "outdated"]) == 0
    row = json.loads((tmp_path / "rows" / "outdated single multedit-5.json").read_text())
    assert row["scores"]["efficacy"][0] == 0 and row["scores"]["efficacy"][2] == 1
    assert "| MultEdit at layer 5, last token | 100 [100, 100] |" in (tmp_path / "results.md").read_text()
    made = len(edited)
    assert made == 2
    assert app([*arguments, "--splits", "outdated"]) == 0
    assert len(edited) == made


def _counted(row: EditorRow, edited: list[str]) -> EditorRow:
    def edit(vlm, bench, requests, earlier):
        edited.extend(request.name for request in requests)
        return row.edit(vlm, bench, requests, earlier)

    return EditorRow(name=row.name, text=row.text, edit=edit)


def test_unknown_parts_are_an_error(tmp_path, capsys):
    assert app(["results", "--out", str(tmp_path), "--parts", "nonsense"]) == 2
    assert "parts are editors" in capsys.readouterr().err


def test_the_traced_place_is_compared_request_by_request():
    sites = {f"{index}": [1, "last", 1] for index in range(20)}
    grid = {(layer, token): dict.fromkeys(sites, BAD) for layer in (0, 1) for token in ("last", "constraint_last")}
    grid[1, "last"] = dict.fromkeys(sites, GOOD)
    found = {each["choice"]: each for each in comparisons(sites, grid)}
    worse, same = found["token constraint_last, traced layer"], found["layer 1, traced token"]
    assert worse["traced"] == 1 and worse["other"] == pytest.approx(1 / 3) and worse["p"] < 0.001 < worse["low"]
    assert same["p"] == 1 and same["low"] == same["high"] == 0
    assert {each["offset"]: each["efficacy"] for each in by_onset(sites, grid)} == {-1: 0, 0: 1}


def test_differences_by_chance_are_not_significant():
    assert paired([1, 0] * 20, [0, 1] * 20).p > 0.5
