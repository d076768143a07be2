"""Every form of `multrace evaluate` is a run: it may be killed at any moment, and shared where records allow it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from killed import files_of, kill_at_random
from multrace import MultEdit, VisionLanguageModel
from multrace.data import EditRecord, Probe, Question, World, WorldRequests, world_records
from multrace.editing import EditCurve, EditReport, EvaluationSettings, FineTune, NormBound, evaluate
from multrace.editing.values import search
from multrace.scripts.main import app
from multrace.tracing import CausalTrace
from multrace.workflow import (
    EvaluateBatchRun,
    EvaluateRun,
    EvaluateSequenceRun,
    RunError,
    Task,
    evaluate_sequence,
    merge,
    read_rows,
    run,
)

WORLD = World()
CASES = WORLD.edit_cases("outdated", "choose")[:3]
KINDS = ("other_picture", "same_question_other_picture", "unrelated")
RECORDS = [
    replace(record, probes=tuple(probe for probe in record.probes if probe.kind in KINDS))
    for record in world_records(WORLD, CASES, requests=WorldRequests(count=1))
]
"""Edits with three probes each."""
FREE = EvaluationSettings(forced=False, max_new_tokens=4)
EDITOR = MultEdit(layer=5, steps=8)
FORMS = {
    "single": ["--where", "5:last"],
    "single, traced": ["--where", "trace"],
    "batch": ["--where", "5:last", "--mode", "batch"],
    "sequence": ["--where", "5:last", "--mode", "sequence", "--at", "2", "4"],
    "sequence, fine-tuned": [
        "--where",
        "5",
        "--mode",
        "sequence",
        "--at",
        "2",
        "--editor",
        "ft",
        "--learning-rate",
        "0.01",
    ],
}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its locks and the times that its edits took."""
    others = (".locks", "costs.jsonl")
    files = (path for path in folder.rglob("*") if path.is_file() and not {*others} & {*path.parts})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def arguments(form: str, out: Path, count: int, *more: str) -> list[str]:
    """The command over records of the built-in world."""
    records = ["--world", "outdated", "--limit", str(count), "--probes", "1", "--steps", "8", "--free-only"]
    return ["evaluate", *records, *FORMS[form], "--out", str(out), *more]


def started(form: str, out: Path, count: int, *more: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """The same in a process of its own."""
    words = [*launcher, "-m", "multrace.scripts.main", *arguments(form, out, count, *more)]
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, output
    return output


def progress(out: Path) -> int:
    """The number of files that a run keeps until its end."""
    files = (path for path in files_of(out) if path.suffix == ".json")
    return len([path for path in files if "records" in path.parts or "shared" in path.parts])


@pytest.mark.parametrize(
    ("form", "kills", "count"),
    [
        pytest.param("sequence", 1, 3, marks=pytest.mark.slow, id="sequence-1 kill"),
        *(pytest.param(form, 3, 6, marks=pytest.mark.slow, id=f"{form}-3 kills") for form in FORMS),
        pytest.param("single", 20, 60, marks=pytest.mark.slow, id="single-20 kills"),
    ],
)
def test_a_killed_evaluation_ends_like_an_undisturbed_one(tmp_path: Path, form: str, kills: int, count: int):
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    killed = kill_at_random(lambda: started(form, one, count), lambda: progress(one), kills, longest=2.0)
    assert killed == kills if kills == 20 else killed >= 1  # a few records may be done before the last kill
    done = {path: path.stat().st_mtime_ns for path in one.glob("*/records/[!.]*-*/record.json")}
    finish(started(form, one, count))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished record was computed again"
    finish(started(form, other, count))
    assert content(one) == content(other)
    (folder,) = one.iterdir()
    assert len(read_rows(folder)) == count
    begun = os.times().children_user
    finish(started(form, one, count, "--device-map", "cpu"))
    assert os.times().children_user - begun < 30 and content(one) == content(other)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "single, traced", "batch"])
def test_two_processes_equal_one(tmp_path: Path, form: str):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finish(started(form, tmp_path / "two", 5, launcher=launcher))
    finish(started(form, tmp_path / "one", 5))
    for shard in ("1/2", "2/2"):
        finish(started(form, tmp_path / f"shard{shard[0]}", 5, "--shard", shard))
    merge([tmp_path / f"shard{index}" / "multedit" for index in "12"], tmp_path / "merged")
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert content(tmp_path / "merged") == content(tmp_path / "one" / "multedit")


def analysed(vlm: VisionLanguageModel, analysis, folder: Path, records=RECORDS, **options):
    return run(vlm, analysis, enumerate(records, 1), folder, progress=False, **options)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sequence_of_a_run_is_that_of_the_library(tiny_vlm: VisionLanguageModel, tmp_path: Path, count: int):
    records, at = RECORDS[:count], (count - 1,)
    analysis = EvaluateSequenceRun(editor=EDITOR, evaluation=FREE, at=at)
    analysed(tiny_vlm, analysis, tmp_path / "run", records)
    expected = evaluate(tiny_vlm, records, EDITOR, mode="sequence", at=at, settings=FREE, progress=False)
    report = EditReport.load(tmp_path / "run/summary/evaluation.json")
    assert report.rows == expected.rows and report.statuses == expected.statuses
    assert str(EditCurve.load(tmp_path / "run/summary/curve.json").points) == str(expected.curve.points)
    with pytest.raises(RunError, match="holds a run of other records, and evaluate sequence depends on all of them"):
        analysed(tiny_vlm, analysis, tmp_path / "run", RECORDS[:1])
    with pytest.raises(RunError, match="evaluate sequence has no shards: each edit needs all earlier ones"):
        analysed(tiny_vlm, analysis, tmp_path / "other", shard="1/2")


@pytest.mark.parametrize(
    "bound",
    [
        pytest.param(NormBound(), marks=pytest.mark.slow, id="to the end"),
        pytest.param(NormBound(growth=1e-9, stop=True), id="stopped"),
    ],
)
def test_a_failed_edit_of_a_sequence_is_a_failed_record(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: NormBound
):
    """As it is one by one. What is measured after it, or after a stop, is that of the library."""
    editor, short = replace(EDITOR, token="constraint_last", steps=1), replace(FREE, max_new_tokens=1)
    bare = EditRecord(id="bare", question=Question(text="Who plays Ada?"), target="Pruro")
    analysis = EvaluateSequenceRun(editor=editor, evaluation=short, growth=bound.growth, stop=bound.stop)
    records = [bare, replace(RECORDS[1], probes=()), replace(bare, id="bare again")]
    report = analysed(tiny_vlm, analysis, tmp_path / "run", records)
    reasons = dict(report.failed)
    assert (report.done, list(reasons), report.is_clean) == (1, [bare.id, "bare again"], False)
    assert "cannot edit at token 'constraint_last'" in reasons[bare.id]
    assert ("the sequence was stopped after 2 edits" in reasons["bare again"]) == bound.stop
    assert list(read_rows(tmp_path / "run")["id"]) == [RECORDS[1].id]
    expected = evaluate(tiny_vlm, records, editor, mode="sequence", settings=short, norm_bound=bound, progress=False)
    curve = EditCurve.load(tmp_path / "run/summary/curve.json")
    assert str(curve.points[-1]) == str(expected.curve.points[-1]) and curve.statuses == expected.statuses
    assert curve.stopped_at == expected.curve.stopped_at == (2 if bound.stop else None)
    _interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        analysed(tiny_vlm, analysis, tmp_path / "again", records)
    monkeypatch.undo()
    analysed(tiny_vlm, analysis, tmp_path / "again", records)
    assert content(tmp_path / "again") == content(tmp_path / "run")


def test_an_interrupted_sequence_goes_on_with_the_same_bits(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last edit is of the first fact again, so that its earlier keys are subtracted from what is held."""
    again = EvaluateSequenceRun(editor=EDITOR, evaluation=FREE)
    records = [*RECORDS[:2], replace(RECORDS[0], id="again", target="Pruro Flurov")]
    analysed(tiny_vlm, again, tmp_path / "at once", records)
    for stop in (1, 2):
        _interrupt(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            analysed(tiny_vlm, again, tmp_path / "interrupted", records)
        monkeypatch.undo()
        assert len(list((tmp_path / "interrupted/records").glob("[!.]*-*/record.json"))) == stop
    analysed(tiny_vlm, again, tmp_path / "interrupted", records)
    assert content(tmp_path / "interrupted") == content(tmp_path / "at once")


def _interrupt(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt the next run before the record of this number."""
    compute = evaluate_sequence._Sequence.compute

    def stopped(self, vlm: VisionLanguageModel, task: Task):
        if task.number == number:
            raise KeyboardInterrupt
        return compute(self, vlm, task)

    monkeypatch.setattr(evaluate_sequence._Sequence, "compute", stopped)


def test_single_edits_of_a_run_are_those_of_the_library(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    """So is the reason of one that cannot be made."""
    bad = EditRecord(id="bad", question=Question(text="Who won?"), target=RECORDS[0].target)
    editor = replace(EDITOR, token="constraint_last")
    done = analysed(tiny_vlm, EvaluateRun(editor=editor, evaluation=FREE), tmp_path / "run", [RECORDS[0], bad])
    expected = evaluate(tiny_vlm, [RECORDS[0], bad], editor, settings=FREE, progress=False)
    report = EditReport.load(tmp_path / "run/summary/evaluation.json")
    assert report.rows == tuple(row for row in expected.rows if row.record == RECORDS[0].id)
    (failure,) = done.failed
    assert f"failed: {failure[1]}" == expected.statuses[bad.id]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_batch_of_a_run_is_that_of_the_library(tiny_vlm: VisionLanguageModel, tmp_path: Path, count: int):
    records, analysis = RECORDS[:count], EvaluateBatchRun(editor=EDITOR, evaluation=FREE)
    analysed(tiny_vlm, analysis, tmp_path / "run", records)
    expected = evaluate(tiny_vlm, records, EDITOR, mode="batch", settings=FREE, progress=False)
    report = EditReport.load(tmp_path / "run/summary/evaluation.json")
    assert report.rows == expected.rows and report.left_out == expected.left_out
    assert (tmp_path / "run/shared/edit-Delta.safetensors").is_file()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_batch_goes_on_with_the_values_that_are_there(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    records = RECORDS[:count]
    analysis = EvaluateBatchRun(editor=replace(EDITOR, steps=2, rows_at_once=1), evaluation=FREE)
    analysed(tiny_vlm, analysis, tmp_path / "at once", records)
    searches, run_search = [], search._BatchSearch.run

    def counting(batch: search._BatchSearch, *arguments) -> list:
        searches.append(batch)
        if len(searches) == 2:
            raise KeyboardInterrupt
        return run_search(batch, *arguments)

    monkeypatch.setattr(search._BatchSearch, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        analysed(tiny_vlm, analysis, tmp_path / "interrupted", records)
    assert [path.name for path in (tmp_path / "interrupted/shared").iterdir()] == ["values-0.safetensors"]
    analysed(tiny_vlm, analysis, tmp_path / "interrupted", records)
    assert len(searches) == len(records) + 1
    assert content(tmp_path / "interrupted") == content(tmp_path / "at once")


def test_records_of_a_batch_that_contradict_each_other_fail_alone(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    other = replace(RECORDS[1], id="other", target="Lovmis")
    analysis = EvaluateBatchRun(editor=replace(EDITOR, steps=2), evaluation=FREE)
    report = analysed(tiny_vlm, analysis, tmp_path / "run", [*RECORDS, other])
    assert report.done == 2 and dict(report.failed) == {
        one: f"it has the key of {another!r} and another target; drop one of them"
        for one, another in ((RECORDS[1].id, "other"), ("other", RECORDS[1].id))
    }


def test_a_trained_batch_is_kept_and_read_again(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    analysis = EvaluateBatchRun(editor=FineTune(layer=5, steps=2), evaluation=FREE)
    for name in ("12", "at once"):
        for shard in ("1/2", "2/2") if name == "12" else ("1/1",):
            analysed(tiny_vlm, analysis, tmp_path / name, shard=shard)
    assert content(tmp_path / "12") == content(tmp_path / "at once")


def test_a_trace_of_each_record_is_kept(tmp_path: Path):
    out = tmp_path / "out"
    assert app(arguments("single, traced", out, 2)) == 0
    table = read_rows(out / "multedit")
    for row in table.to_dict("records"):
        trace = CausalTrace.load(out / "multedit/records" / row["record"] / "trace.safetensors")
        site = trace.edit_site()
        assert (row["layer"], row["token"]) == (site.layer, str(site.token))
    settings = json.loads((out / "multedit/settings.json").read_text())["settings"]
    assert settings["trace"] == {"window": 3} and "layer" not in settings["editor"]


@pytest.mark.parametrize("mode", [EvaluateBatchRun, pytest.param(EvaluateSequenceRun, marks=pytest.mark.slow)])
def test_a_bad_record_costs_only_itself_where_edits_belong_together(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, mode
):
    good, own = [RECORDS[0], RECORDS[2]], RECORDS[1]
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    own.question.images[0].save(whole)
    half.write_bytes(whole.read_bytes()[:300])
    bad = {  # why it fails -> the record
        "the moon": replace(own, question=replace(own.question, constraint="the moon")),
        "truncated": replace(own, id="half", question=replace(own.question, image=half)),
        "512 positions": replace(
            own, id="long", probes=(Probe(kind="unrelated", question=Question(text="Why? " * 600)),)
        ),
        "max_new_tokens=": replace(  # a prompt of 511 tokens
            own, id="no room", probes=(Probe(kind="unrelated", question=Question(text="Why? " * 126 + "Why")),)
        ),
    }
    if mode is EvaluateBatchRun:  # in a sequence, such an edit fails in its place
        without = replace(own.question, constraint=None, spans={})
        bad["'constraint_last'"] = replace(own, id="no token", question=without)
    analysis = mode(editor=replace(EDITOR, token="constraint_last", steps=2), evaluation=FREE)
    report = analysed(tiny_vlm, analysis, tmp_path / "run", [good[0], *bad.values(), good[1]])
    assert [id for id, _ in report.failed] == [each.id for each in bad.values()] and report.done == 2
    assert all(reason in error for reason, (_, error) in zip(bad, report.failed, strict=True))
    analysed(tiny_vlm, analysis, tmp_path / "without", good)
    name = "summary/evaluation.json"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_sequences_share_the_answers_of_the_unedited_model(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = EvaluateSequenceRun(editor=EDITOR, evaluation=FREE)
    shared = replace(alone, unedited=tmp_path / "unedited")
    reports = [analysed(tiny_vlm, each, tmp_path / f"{index}") for index, each in enumerate([alone, shared])]
    files = sorted((tmp_path / "unedited").rglob("*.json"))
    assert len(files) == len(RECORDS)
    monkeypatch.setattr(evaluate_sequence, "measure_baseline", None)  # nothing is asked again
    reports.append(analysed(tiny_vlm, replace(shared, per_step=3), tmp_path / "2"))
    assert [report.done for report in reports] == [len(RECORDS)] * 3
    tables = [(tmp_path / name / "summary" / "generations.jsonl").read_bytes() for name in "01"]
    assert tables[0] == tables[1]
