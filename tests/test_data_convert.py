"""Files in other forms: what a form has a place for is read back, and what it has none for is named."""

import json
from pathlib import Path

import pytest
from multrace.data import DataError, EditRecord, Probe, Question, convert_data, read_records, write_lines

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")


def plain(record: EditRecord) -> tuple[object, ...]:
    """What every form keeps: texts, pictures and answers, without ids and remarks."""

    def words(question: Question) -> tuple[object, ...]:
        return question.text, question.images, question.constraint

    probes = [(probe.kind, words(probe.question), probe.answer, probe.hops) for probe in record.probes]
    return words(record.question), record.target, record.old, sorted(probes, key=repr)


@needs_shared
@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("mmedit/evqa_eval.json", "mmedit"),
        ("mmedit/eic_eval.json", "mmedit"),
        ("vlkeb/eval.json", "mmedit"),
        ("vlkeb/eval_edit_onehop.json", "mmedit"),
        ("zsre/zsre_mend_train.json", "zsre"),
        ("mmedit/evqa_eval.json", "lines"),
        ("gqa_flow", "lines"),
        ("counterfact/counterfact-edit.json", "lines"),
    ],
)
def test_a_published_file_is_read_back_from_the_form_it_is_converted_to(name, to, tmp_path):
    records = read_records(SHARED / name)
    report = convert_data(SHARED / name, tmp_path / "data.json", to=to)
    again = read_records(tmp_path / "data.json")
    assert report.written == len(records) == len(again) and report.skipped == ()
    if to == "lines":
        assert again == records and report.lost == {}
    else:
        assert [*map(plain, again)] == [*map(plain, records)]
        assert set(report.lost) <= {"extra", "question's extra"}


@needs_shared
def test_easyedits_counterfact_becomes_romes(tmp_path):
    source = SHARED / "counterfact" / "counterfact-edit.json"
    records = {record.id: record for record in read_records(source)}
    report = convert_data(source, tmp_path / "rome.json", to="counterfact")
    again = read_records(tmp_path / "rome.json")
    assert len(again) + len(report.skipped) == len(records) and len(again) > 1900
    for record in again:
        old = records[record.id]
        assert (record.question.text, record.target, record.old) == (old.question.text, old.target, old.old)
        assert record.question.constraint == old.question.constraint
        assert [probe.question.text for probe in record.probes] == [probe.question.text for probe in old.probes]


@pytest.fixture
def records(tmp_path) -> Path:
    picture = tmp_path / "a.jpg"
    shown = Question(text="Who is it?", image=picture, constraint="it", boxes=((1, 2, 3, 4),))
    text = Question(text="Ada was born in", constraint="Ada")
    return write_lines(
        tmp_path / "own.jsonl",
        [
            EditRecord(
                id="a",
                question=shown,
                target="Ada",
                old="Bo",
                contexts=[Question(text="Who?", image=picture)],
                probes=[
                    Probe(kind="rephrase", question=Question(text="Who?", image=picture)),
                    Probe(kind="rephrase", question=Question(text="Who then?", image=picture)),
                    Probe(
                        kind="portability", question=Question(text="Born where?", image=picture), answer="Oslo", hops=2
                    ),
                    Probe(kind="no_picture", question=Question(text="Who is it?")),
                ],
            ),
            EditRecord(id="b", question=text, target="Oslo", old="Lima"),
            EditRecord(id="c", question=Question(text="Ada saw Ada", constraint=("Ada", "all")), target="x", old="y"),
            EditRecord(id="d", question=text.with_answer("Rome"), target="Oslo", old="Lima", group="g"),
            Question(id="e", text="Who?"),
        ],
    )


def test_what_a_form_has_no_place_for_is_named(records, tmp_path):
    report = convert_data(records, tmp_path / "mm.json", to="mmedit")
    assert report.lost == {
        "boxes": 1,
        "constraint": 1,
        "contexts": 1,
        "probes: no_picture": 1,
        "probes: rephrase": 1,
    }
    assert [row for row, _ in report.skipped] == [2, 3, 4, 5] and "has 0 pictures" in report.skipped[0][1]
    (row,) = json.loads((tmp_path / "mm.json").read_text())
    assert row["image"] == "a.jpg" and row["rephrase"] == "Who?" and row["pred"] == "Bo"
    assert row["port_new"] == [{"port_type": "2-hop", "Q&A": {"Question": "Born where?", "Answer": "Oslo"}}]
    assert "lost: contexts (1 record)" in str(report) and "row 5: the question 'Who?' has no target" in str(report)

    report = convert_data(records, tmp_path / "rome.json", to="counterfact")
    assert [row for row, _ in report.skipped] == [1, 3, 5] and report.lost == {"answer": 1, "group": 1}
    first, _ = json.loads((tmp_path / "rome.json").read_text())
    assert first["requested_rewrite"]["prompt"] == "{} was born in" and first["case_id"] == "b"


def test_a_form_that_can_hold_nothing_leaves_the_file_alone(records, tmp_path):
    (tmp_path / "out.json").write_text("old")
    only = write_lines(tmp_path / "only.jsonl", [Question(text="Who?")])
    with pytest.raises(DataError, match="no record of .* can be written as zsre; row 1: .* has no target"):
        convert_data(only, tmp_path / "out.json", to="zsre")
    with pytest.raises(DataError, match="no form 'csv' that can be written; use one of lines, mmedit"):
        convert_data(only, tmp_path / "out.json", to="csv")
    assert (tmp_path / "out.json").read_text() == "old"
