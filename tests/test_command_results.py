"""multrace results: a real row of the tables, kept and reused; the paired comparison by hand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from multrace.data import World
from multrace.editing import EditorByRequest, MultEdit
from multrace.scripts.main import execute
from multrace.scripts.studies import results
from multrace.scripts.studies.results import LABELS, document
from multrace.scripts.studies.rows import EditorRow, _cases, by_onset, comparisons, editor_rows, paired

RUN = {"weights": "0" * 64, "version": "0", "limit": 4, "together": 8, "probes": 1}
GOOD, BAD = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]


@dataclass(frozen=True)
class MeasuredTables:
    """A folder of two measured requests, and how to run the study into it again."""

    out: Path
    edited: list[str]
    """The requests that an editor was given, from the first run on."""

    def again(self, limit: int = 2) -> int:
        arguments = ["--out", str(self.out), "--limit", str(limit), "--probes", "1"]
        return execute(results.app, [*arguments, "--parts", "editors", "--splits", "outdated"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredTables]:
    """The study with one row; few second moments, which no assertion here is about."""
    tables = MeasuredTables(out=tmp_path_factory.mktemp("results"), edited=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multrace.scripts.studies.rows._MOMENT_FACTS", 16)
        row = _counted(_row("multedit-5"), tables.edited)
        patch.setattr("multrace.scripts.studies.results.editor_rows", lambda: (row,))
        assert tables.again() == 0
        yield tables


def test_a_row_is_measured_once_and_written_into_the_tables(measured):
    row = json.loads((measured.out / "rows" / "outdated single multedit-5.json").read_text())["row"]
    assert row["scores"]["efficacy"][0] == 0 and row["scores"]["efficacy"][2] == 1
    page = (measured.out / "results.md").read_text()
    assert f"| {LABELS['multedit-5']} | 100 [100, 100] |" in page
    assert "--limit 2 --together 160 --probes 1" in page and "2 requests, one edit at a time" in page
    assert len(measured.edited) == 2
    assert measured.again() == 0
    assert len(measured.edited) == 2 and (measured.out / "results.md").read_text() == page


def test_rows_of_another_run_are_refused_instead_of_reported_under_its_header(measured, capsys):
    page = (measured.out / "results.md").read_text()
    assert measured.again(limit=1) == 2
    assert "is a row of another run: limit 2 instead of 1" in capsys.readouterr().err
    assert (measured.out / "results.md").read_text() == page and len(measured.edited) == 2


def test_more_requests_than_a_half_holds_come_from_the_end_of_the_other():
    world = World()
    report, choose = (world.edit_cases("long_tail", part) for part in ("report", "choose"))
    cases = _cases(world, "long_tail", "report", len(report) + 2)
    assert cases == (*report, choose[-1], choose[-2])
    assert _cases(world, "outdated", "report", 3) == world.edit_cases("outdated", "report")[:3]


@pytest.mark.slow
def test_a_batch_a_larger_one_and_a_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr("multrace.scripts.studies.results.editor_rows", lambda: (_row("multedit-moments"),))
    arguments = ["--out", str(tmp_path), "--limit", "1", "--together", "2", "--probes", "1"]
    assert execute(results.app, [*arguments, "--parts", "batch", "sequence", "--splits", "outdated"]) == 0
    rows = {path.stem: json.loads(path.read_text())["row"] for path in (tmp_path / "rows").iterdir()}
    assert {name: row["requests"] for name, row in rows.items() if "multedit-moments" in name} == {
        "outdated batch multedit-moments": 1,
        "outdated whole multedit-moments": 2,
        "outdated sequence multedit-moments": 2,
    }
    text = (tmp_path / "results.md").read_text()
    assert "2 requests, all edits in one solve" in text
    assert (
        f"Efficacy after so many edits:\n\n| row | 1 | 2 |\n|---|---|---|\n| {LABELS['multedit-moments']} | 100 | 100 |"
        in text
    )


def test_every_row_has_a_short_name_of_its_own():
    assert set(LABELS) == {row.name for row in editor_rows()}
    assert len(set(LABELS.values())) == len(LABELS)


def _row(name: str) -> EditorRow:
    return next(row for row in editor_rows() if row.name == name)


def _counted(row: EditorRow, edited: list[str]) -> EditorRow:
    def editor(bench):
        def choose(requests):
            edited.extend(request.id for request in requests)
            return MultEdit(layer=5)

        return EditorByRequest(choose=choose)

    return EditorRow(name=row.name, text=row.text, editor=editor)


def test_unknown_parts_are_an_error(tmp_path, capsys):
    assert execute(results.app, ["--out", str(tmp_path), "--parts", "nonsense"]) == 2
    assert "cannot measure --parts nonsense; pass some of editors" in capsys.readouterr().err


def test_the_traced_place_is_compared_request_by_request():
    sites = {f"{index}": [1, "last", 1] for index in range(20)}
    grid = {(layer, token): dict.fromkeys(sites, BAD) for layer in (0, 1) for token in ("last", "constraint_last")}
    grid[1, "last"] = dict.fromkeys(sites, GOOD)
    found = {each["choice"]: each for each in comparisons(sites, grid)}
    worse, same = found["token constraint_last, traced layer"], found["layer 1, traced token"]
    assert worse["traced"] == 1 and worse["other"] == pytest.approx(1 / 3) and worse["p"] < 0.001 < worse["low"]
    assert same["p"] == 1 and same["low"] == same["high"] == 0
    assert {each["offset"]: each["efficacy"] for each in by_onset(sites, grid)} == {-1: 0, 0: 1}


def test_the_page_shows_every_place_that_was_edited():
    sites = {f"{index}": [1, "last", 1] for index in range(4)}
    cells = {f"grid {layer} {token}": dict.fromkeys(sites, BAD) for layer in range(8) for token in ("last", "image")}
    cells["grid 1 last"] = {name: [float(name == "0"), 1.0, 0.5, 0.25] for name in sites}
    page = document({"outdated": {"sites": {"sites": sites}, **cells}}, **RUN)
    assert "| last | 1 | 25 | 100 | 50 | 25 |" in page and page.count("| image | ") == 8
    assert "`make results` (`--limit 4 --together 8 --probes 1`)" in page
    assert "Does locating help?" not in document({"outdated": {"sites": {"sites": sites}}}, **RUN)


def test_differences_by_chance_are_not_significant():
    assert paired([1, 0] * 20, [0, 1] * 20).p > 0.5
