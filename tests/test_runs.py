"""Runs over many records: whatever happens on the way, the end is that of an undisturbed run, or one line says why."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from killed import Fork, kill_at_random
from multrace import ModelError, VisionLanguageModel
from multrace.artefacts import read_json, write_json
from multrace.data import DataError, EditRecord, Question, world_questions, write_lines
from multrace.scripts.main import app
from multrace.tracing import AverageTrace, TraceError, average, causal_trace
from multrace.workflow import (
    Analysis,
    ModelToLoad,
    Outcome,
    RunContext,
    RunError,
    Shard,
    Summary,
    Task,
    TraceRun,
    compare,
    merge,
    question_of_record,
    read_rows,
    run,
)
from multrace.workflow.run_folder import Contents, RunFolder
from PIL import Image
from safetensors.torch import load_file, save_file

WORDS = ("red", "green", "blue", "large", "small", "round", "old")


@dataclass(frozen=True, kw_only=True)
class Scores(Analysis):
    """The log probability of an answer: an analysis that takes milliseconds."""

    name: ClassVar[str] = "scores"
    answer: str = "yes"
    scale: float = 1.0

    def sources(self, record: Question | EditRecord) -> Sequence[Any]:
        return () if record.corrupt is None else (Path(record.corrupt),)

    def check(self, record: Question | EditRecord) -> None:
        if "impossible" in question_of_record(record).text:
            raise DataError("this question cannot be asked")

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        question = question_of_record(task.record)
        if "unanswerable" in question.text:
            raise TraceError("there is no answer")
        score = vlm.score(None, question.text, self.answer)
        return Outcome(row={"question": question.text, "score": float(score.log_probability) * self.scale})

    def summary(self) -> "MeanScore":
        return MeanScore()


class MeanScore(Summary):
    def __init__(self) -> None:
        self.total, self.order = 0.0, []

    def add(self, record: Any) -> None:
        self.total += record.row["score"]
        self.order.append(record.id)

    def files(self) -> Mapping[str, Callable[[Path], Any]]:
        return {"mean.txt": lambda path: path.write_text(f"{self.total!r} {self.order}")}


def questions(*words: str) -> Iterator[tuple[int, Question]]:
    yield from enumerate((Question(text=f"Is the car {word}?", id=word) for word in words), start=1)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those that say who works there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def go(random_gpt2: VisionLanguageModel, tmp_path: Path) -> Callable[..., Any]:
    """Runs the scores of some words in a folder."""

    def start(*words: str, out: str = "out", vlm: Any = None, **options: Any) -> Any:
        settings = {name: options.pop(name) for name in ("answer", "scale") if name in options}
        model = random_gpt2 if vlm is None else vlm
        return run(model, Scores(**settings), questions(*words), tmp_path / out, progress=False, **options)

    return start


# ---- one process ----


def test_a_run_keeps_every_record_and_sums_them_up(go: Callable, tmp_path: Path, random_gpt2: VisionLanguageModel):
    report = go(*WORDS[:3])
    table = read_rows(tmp_path / "out")
    expected = [float(random_gpt2.score(None, f"Is the car {word}?", "yes").log_probability) for word in WORDS[:3]]
    assert (report.done, report.failed, report.missing) == (3, (), 0)
    assert list(table["id"]) == list(WORDS[:3]) and list(table["score"]) == expected
    assert (tmp_path / "out/summary/mean.txt").read_text() == f"{sum(expected)!r} {list(WORDS[:3])}"


def test_a_second_start_computes_nothing_and_opens_no_model(go: Callable, tmp_path: Path, gpt2_path: Path):
    @dataclass(frozen=True)
    class Closed(ModelToLoad):
        def open(self) -> VisionLanguageModel:
            raise AssertionError("the model was opened")

    go(*WORDS, vlm=ModelToLoad(gpt2_path))
    before = content(tmp_path / "out")
    report = go(*WORDS, vlm=Closed(gpt2_path))
    assert report.done == len(WORDS) and content(tmp_path / "out") == before
    with pytest.raises(AssertionError, match="was opened"):
        go(*WORDS, out="new", vlm=Closed(gpt2_path))


def test_more_records_continue_and_fewer_or_other_ones_are_refused(go: Callable, tmp_path: Path):
    go(*WORDS[:3])
    kept = (tmp_path / "out/records").stat().st_ino
    assert go(*WORDS).done == len(WORDS) and (tmp_path / "out/records").stat().st_ino == kept
    go(*WORDS, out="at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")
    with pytest.raises(RunError, match="holds results of 6 records that this run does not have.*choose another folder"):
        go(*WORDS[:1])


def test_the_order_of_the_records_decides_over_the_order_of_computing(go: Callable, tmp_path: Path):
    go(*WORDS[3:])
    go(*WORDS)
    go(*WORDS, out="at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"answer": "no"}, "settings answer 'no' instead of 'yes'"),
        ({"scale": 2.0}, "settings scale 2.0 instead of 1.0"),
    ],
)
def test_other_settings_are_refused_by_name(go: Callable, tmp_path: Path, changed: dict[str, Any], words: str):
    go(*WORDS[:1])
    before = content(tmp_path / "out")
    with pytest.raises(RunError, match=words):
        go(*WORDS[:1], **changed)
    assert content(tmp_path / "out") == before


def test_records_whose_settings_are_lost_are_refused(go: Callable, tmp_path: Path):
    go(*WORDS[:2])
    settings = tmp_path / "out" / "settings.json"
    settings.write_bytes(settings.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"settings.json' is damaged; choose another folder"):
        go(*WORDS[:2])
    settings.unlink()
    for changed in ({}, {"scale": 2.0}):
        with pytest.raises(RunError, match=r"holds records without settings.json.*; choose another folder"):
            go(*WORDS[:2], **changed)
    go(*WORDS[:2], shard="1/2", out="one")
    go(*WORDS[:2], shard="2/2", out="two")
    with pytest.raises(RunError, match="holds records without their settings"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", analyses=[Scores])
    assert not settings.exists()


def test_a_damaged_list_of_records_may_be_removed(go: Callable, tmp_path: Path):
    go(*WORDS[:2])
    before, records = content(tmp_path / "out"), tmp_path / "out" / "records.json"
    records.write_bytes(b"")
    with pytest.raises(RunError, match=r"records.json' is damaged; remove that file and start the run again"):
        go(*WORDS[:2])
    records.unlink()
    go(*WORDS[:2])
    assert content(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(go: Callable, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"belong to no run \(thesis.tex\); choose a new or empty folder"):
        go(*WORDS[:1])


def test_a_replaced_model_is_noticed_and_a_copied_one_is_welcome(go: Callable, tmp_path: Path, gpt2_path: Path):
    model = shutil.copytree(gpt2_path, tmp_path / "model")
    go(*WORDS[:2], vlm=ModelToLoad(model))
    shutil.copytree(gpt2_path, tmp_path / "copy")
    assert go(*WORDS[:3], vlm=ModelToLoad(tmp_path / "copy")).done == 3
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="other settings: model [0-9a-f]{12} instead of [0-9a-f]{12}"):
        go(*WORDS[:3], vlm=ModelToLoad(model))


def test_an_edited_model_in_memory_is_another_model(go: Callable, random_gpt2: VisionLanguageModel):
    go(*WORDS[:1])
    weight = random_gpt2.weight(random_gpt2.down_projection(0).name)
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(RunError, match="other settings: model"):
            go(*WORDS[:1])
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert go(*WORDS[:1]).done == 1


# ---- records ----


def test_a_failing_record_is_kept_with_its_error_and_the_others_go_on(go: Callable, tmp_path: Path):
    report = go("red", "impossible", "unanswerable", "blue")
    assert report.done == 2
    assert report.failed == (("impossible", "this question cannot be asked"), ("unanswerable", "there is no answer"))
    assert list(read_rows(tmp_path / "out")["id"]) == ["red", "blue"]
    before = content(tmp_path / "out")
    assert go("red", "impossible", "unanswerable", "blue") == report and content(tmp_path / "out") == before
    assert go("red", "blue").failed == ()  # a failed record may be taken out


def test_failed_records_are_tried_again_on_demand(go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go("red", "unanswerable")
    before = content(tmp_path / "out")
    monkeypatch.setattr(Scores, "compute", lambda self, vlm, task: Outcome(row={"score": 1.0}))
    go("red", "unanswerable")
    assert content(tmp_path / "out") == before
    assert go("red", "unanswerable", retry_failed=True).done == 2


def test_nothing_but_failures_is_an_error(go: Callable):
    with pytest.raises(
        RunError, match="scores failed for all 2 records; impossible: this question cannot be asked; the errors"
    ):
        go("impossible", "unanswerable")


def test_unreadable_rows_and_twins_are_reported(random_gpt2: VisionLanguageModel, tmp_path: Path):
    (_, question), *_ = questions("red")
    rows = [(1, question), (2, DataError("no JSON")), (3, question), (4, replace(question, id="other"))]
    report = run(random_gpt2, Scores(), rows, tmp_path / "out", progress=False)
    assert report.done == 2 and report.unreadable == ((2, "no JSON"), (3, "the same record as row 1"))
    with pytest.raises(RunError, match="there is no record to analyse; row 2: no JSON"):
        run(random_gpt2, Scores(), rows[1:2], tmp_path / "none", progress=False)


def test_a_record_is_known_by_its_content_and_not_by_its_path(random_gpt2: VisionLanguageModel, tmp_path: Path):
    def start(path: Path) -> Any:
        question = Question(text="Is the car red?", id="red", corrupt=str(path))
        return run(random_gpt2, Scores(), [(1, question)], tmp_path / "out", progress=False)

    one, moved, other = (tmp_path / name for name in ("one.png", "moved.png", "other.png"))
    Image.new("RGB", (8, 8), "red").save(one)
    Image.new("RGB", (8, 8), "blue").save(other)
    start(one)
    before = content(tmp_path / "out")
    one.rename(moved)
    assert start(moved).done == 1 and content(tmp_path / "out") == before
    with pytest.raises(RunError, match="holds results of 1 record that this run does not have"):
        start(other)


def test_a_missing_picture_fails_its_record_and_a_vanishing_one_stops_the_run(
    random_gpt2: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    Image.new("RGB", (8, 8)).save(paths[0])
    rows = [(n, Question(text="Is it red?", id=str(n), corrupt=str(path))) for n, path in enumerate(paths)]
    report = run(random_gpt2, Scores(), rows, tmp_path / "out", progress=False)
    assert report.done == 1 and "1.png' (No such file" in report.failed[0][1]

    def vanish(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        paths[0].unlink()
        raise ModelError("cannot open the picture")

    monkeypatch.setattr(Scores, "compute", vanish)
    with pytest.raises(RunError, match="has vanished since the run began: no picture at .*0.png'.*bring it back"):
        run(random_gpt2, Scores(), rows, tmp_path / "new", progress=False)


def test_damaged_outcomes_are_computed_again(go: Callable, tmp_path: Path):
    go(*WORDS[:3])
    before = content(tmp_path / "out")
    for name in ("red", "green"):
        (path,) = (tmp_path / "out/records").glob(f"{name}-*/record.json")
        path.write_bytes(path.read_bytes().replace(b"score", b"scare") if name == "red" else b"")
    shutil.rmtree(tmp_path / "out/summary")
    assert go(*WORDS[:3]).done == 3 and content(tmp_path / "out") == before


# ---- the environment ----


@dataclass(frozen=True, kw_only=True)
class Kept(Scores):
    """Scores with a file of results for each record."""

    name: ClassVar[str] = "kept scores"

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        outcome = super().compute(vlm, task)
        return replace(outcome, files={"score.txt": lambda path: path.write_text(repr(outcome.row["score"]))})


def damaged(path: Path, damage: str) -> None:
    """Remove a file, cut its end off, or flip its last bit."""
    raw = path.read_bytes()
    path.unlink() if damage == "lost" else path.write_bytes(
        raw[:-1] if damage == "cut" else raw[:-1] + bytes([raw[-1] ^ 1])
    )


@dataclass(frozen=True, kw_only=True)
class Prepared(Kept):
    """Scores in units that are measured once, by a tool that is made once."""

    name: ClassVar[str] = "prepared scores"

    def calibrate(self, vlm: VisionLanguageModel, records: Mapping[str, Any], **_: Any) -> Mapping[str, Any]:
        return {"unit": 2.0}

    @contextmanager
    def opened(self, vlm: VisionLanguageModel, work: RunContext) -> Iterator[Analysis]:
        if not (path := work.folder.shared / "tool.json").exists():
            write_json(path, "tool 1", {"kind": "ruler"})
        yield self


@pytest.fixture
def prepared(random_gpt2: VisionLanguageModel, tmp_path: Path) -> Callable[..., Any]:
    """Runs the prepared scores of two words."""

    def start(out: str = "out", words: Sequence[str] = WORDS[:2], **options: Any) -> Any:
        options = {"progress": False, **options}
        return run(random_gpt2, Prepared(), questions(*words), tmp_path / out, **options)

    return start


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
@pytest.mark.parametrize("name", ["shared/tool.json", "calibration.json", "summary/report.json"])
def test_a_damaged_file_of_all_records_is_made_anew(
    prepared: Callable, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture
):
    prepared()
    before = content(tmp_path / "out")
    damaged(tmp_path / "out" / name, damage)
    assert content(tmp_path / "out").get(name) != before[name]
    prepared(progress=True)
    assert content(tmp_path / "out") == before
    told = "made anew" in capsys.readouterr().out
    assert told == (damage != "lost" and not name.startswith("summary"))
    prepared(progress=True)
    assert "made anew" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shared/tool.json", "calibration.json"])
def test_a_damaged_file_of_all_records_of_an_unfinished_run_may_be_removed(
    prepared: Callable, tmp_path: Path, name: str
):
    prepared()
    before = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "summary")
    damaged(tmp_path / "out" / name, "flipped")
    with pytest.raises(RunError, match=rf"{name}' is damaged; remove that file and start the run again, which makes"):
        prepared()
    (tmp_path / "out" / name).unlink()
    shutil.rmtree(next((tmp_path / "out" / "records").glob("red-*")))
    prepared()
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["records/{}", "records", "shared", "summary"])
def test_files_of_something_else_inside_a_run_are_refused_and_kept(prepared: Callable, tmp_path: Path, place: str):
    """Those in the summary only when it is about to be replaced."""
    prepared()
    record = next((tmp_path / "out" / "records").glob("red-*")).name
    notes = tmp_path / "out" / place.format(record) / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(RunError, match=r"notes.txt' (is damaged|belongs to no run); remove .* start the run again"):
        prepared(words=WORDS[:3])
    assert notes.read_text() == "mine"
    notes.unlink()
    assert prepared(words=WORDS[:3]).done == 3


def test_a_folder_without_a_record_among_the_records_is_refused_and_kept(go: Callable, tmp_path: Path):
    go(*WORDS[:2])
    (tmp_path / "out" / "records" / "mine").mkdir()
    with pytest.raises(RunError, match=r"records/mine' belongs to no run"):
        go(*WORDS[:2])
    assert (tmp_path / "out" / "records" / "mine").is_dir()


def test_a_record_of_files_outside_its_folder_is_damaged(go: Callable, tmp_path: Path):
    go(*WORDS[:2])
    (path,) = (tmp_path / "out" / "records").glob("red-*/record.json")
    whole = read_json(path, "multrace run record 1")
    other = tmp_path / "out" / "settings.json"
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    write_json(
        path, "multrace run record 1", {**whole, "files": {"../../settings.json": [other.stat().st_size, digest]}}
    )
    folder = RunFolder(tmp_path / "out")
    assert folder.stored(path.parent.name) is None
    write_json(path, "multrace run record 1", whole)
    assert folder.stored(path.parent.name) is not None


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Let SIGINT interrupt, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("change", ["more records", "a damaged record"])
@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_run_has_no_summary_of_earlier_records(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    prepared()
    assert len(read_rows(tmp_path / "out")) == 2
    if change == "a damaged record":
        damaged(next((tmp_path / "out" / "records").glob("green-*/score.txt")), "flipped")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Kept, "compute", lambda *_: signal.raise_signal(signal.SIGINT))
        prepared(words=WORDS[: 2 + (change == "more records")])
    with pytest.raises(RunError, match="holds no finished run"):
        read_rows(tmp_path / "out")


def test_files_of_the_whole_run_are_written_by_one_process_at_a_time(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    is_free: dict[str, bool] = {}
    calibrate, files, compute = Prepared.calibrate, MeanScore.files, Prepared.compute

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            lock = FileLock(tmp_path / "out" / ".locks" / "whole.lock")
            try:
                lock.acquire(timeout=0)
                is_free[name] = True
            except Timeout:
                is_free[name] = False
            lock.release()
            return method(*arguments, **options)

        return call

    monkeypatch.setattr(Prepared, "calibrate", noted("calibration", calibrate))
    monkeypatch.setattr(MeanScore, "files", noted("summary", files))
    monkeypatch.setattr(Prepared, "compute", noted("record", compute))
    prepared()
    assert is_free == {"calibration": False, "summary": False, "record": True}


def test_a_comparison_leaves_out_records_without_a_value(go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go(*WORDS[:5], out="one")
    go(*WORDS[2:5], out="whole", answer="no")
    compute = Scores.compute

    def gap(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        return compute(self, vlm, task) if task.number > 1 else Outcome(row={"question": "?", "score": None})

    monkeypatch.setattr(Scores, "compute", gap)
    monkeypatch.setattr(Scores, "summary", lambda self: Summary())
    go(*WORDS[:5], out="gaps", answer="no")
    assert read_rows(tmp_path / "gaps")["score"].isna().sum() == 2
    with_gaps, without = (compare(tmp_path / "one", tmp_path / name) for name in ("gaps", "whole"))
    assert with_gaps.to_dict("records") == without.to_dict("records") and list(without["records"]) == [3]


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_damaged_shards_are_mended_by_each_other_or_refused(
    random_gpt2: VisionLanguageModel, prepared: Callable, tmp_path: Path, damage: str
):
    for name, shard in (("one", "1/2"), ("two", "2/2"), ("at once", "1/1")):
        prepared(name, WORDS[:4], shard=shard)
    parts = [tmp_path / "one", tmp_path / "two"]
    damaged(parts[0] / "shared" / "tool.json", damage)
    if damage == "flipped":
        merge(parts, tmp_path / "merged", analyses=[Prepared])
        assert content(tmp_path / "merged") == content(tmp_path / "at once")
        damaged(parts[1] / "shared" / "tool.json", damage)
        with pytest.raises(RunError, match=r"tool.json' is damaged; remove that file and start the run again"):
            merge(parts, tmp_path / "none", analyses=[Prepared])
    file = next(parts[1].glob("records/*/score.txt"))
    damaged(file, damage)
    with pytest.raises(RunError, match=rf"two/records/{file.parent.name}' is damaged; remove that folder"):
        merge(parts, tmp_path / "other", analyses=[Prepared])
    shutil.copytree(tmp_path / "at once", tmp_path / "whole")
    damaged(tmp_path / "whole" / "records" / file.parent.name / "score.txt", damage)
    with pytest.raises(RunError, match=r"whole/records/.* is damaged"):
        compare(tmp_path / "whole", tmp_path / "at once")
    prepared("whole", WORDS[:4])
    assert list(compare(tmp_path / "whole", tmp_path / "at once")["difference"]) == [0.0]


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_record_whose_file_is_not_the_one_that_was_written_is_computed_again(
    random_gpt2: VisionLanguageModel, tmp_path: Path, damage: str
):
    for name in ("out", "undisturbed"):
        run(random_gpt2, Kept(), questions(*WORDS[:2]), tmp_path / name, progress=False)
    files = sorted((tmp_path / "out").glob("records/*/score.txt"))
    assert len(files) == 2
    damaged(files[0], damage)
    assert content(tmp_path / "out") != content(tmp_path / "undisturbed")
    times = files[1].stat().st_mtime_ns
    run(random_gpt2, Kept(), questions(*WORDS[:2]), tmp_path / "out", progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed") and files[1].stat().st_mtime_ns == times


def test_a_whole_folder_that_a_killed_process_left_is_emptied_into_the_records(
    go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Finished records count, whichever process finds them; those of a half written folder are computed again."""
    go(*WORDS[:4])
    go(*WORDS[:4], out="undisturbed")
    records = tmp_path / "out" / "records"
    names = {path.name.split("-")[0]: path for path in records.iterdir()}
    finished = names["red"].joinpath("record.json").stat().st_mtime_ns
    for folder, word in ((".whole-2-of-2", "red"), (".part-1-of-1", "green")):
        (records / folder).mkdir()
        names[word].rename(records / folder / names[word].name)
    computed = []
    compute = Scores.compute

    def noted(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        computed.append(task.record.id)
        return compute(self, vlm, task)

    monkeypatch.setattr(Scores, "compute", noted)
    go(*WORDS[:4])
    assert computed == ["green"] and names["red"].joinpath("record.json").stat().st_mtime_ns == finished
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert not list(records.glob(".*"))


def test_records_of_one_id_are_told_apart_by_their_content(random_gpt2: VisionLanguageModel, tmp_path: Path):
    rows = [(row, Question(text=f"Is the car {word} {row}?", id="car")) for row, word in enumerate(3 * WORDS)]
    report = run(random_gpt2, Scores(), rows, tmp_path / "out", progress=False)
    assert report.done == len(rows) and not report.failed
    assert list(read_rows(tmp_path / "out")["question"]) == [question.text for _, question in rows]


def test_a_picture_that_changes_is_read_again(tmp_path: Path):
    """Within one run the file of a picture is read once, as long as it is the same."""
    path, contents = tmp_path / "photo.png", Contents()
    path.write_bytes(b"one")
    first = contents.key(path)
    assert contents.key(path) == first == Contents().key(path)
    path.write_bytes(b"another")
    assert contents.key(path) == Contents().key(path) != first


def test_records_computed_together_survive_a_stop_between_them(
    random_gpt2: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both outcomes were finished before the first came to its place, so that neither is computed again."""

    @dataclass(frozen=True, kw_only=True)
    class Together(Scores):
        together: ClassVar[int] = 2

    computed, compute, move = [], Scores.compute, Path.rename

    def noted(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        computed.append(task.record.id)
        return compute(self, vlm, task)

    def stop(path: Path, target: Path) -> Path:
        if path.name.startswith("green-"):
            raise KeyboardInterrupt
        return move(path, target)

    def go() -> Any:
        return run(random_gpt2, Together(), questions("red", "green"), tmp_path / "out", progress=False)

    monkeypatch.setattr(Scores, "compute", noted)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", stop)
        go()
    assert sorted(computed) == ["green", "red"]
    assert go().done == 2 and len(computed) == 2


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_summary_whose_file_is_not_the_one_that_was_written_is_made_again(go: Callable, tmp_path: Path, damage: str):
    go(*WORDS[:2])
    before, mean = content(tmp_path / "out"), tmp_path / "out" / "summary" / "mean.txt"
    mean.unlink() if damage == "lost" else mean.write_text(mean.read_text().replace("red", "rad"))
    assert content(tmp_path / "out") != before
    go(*WORDS[:2])
    assert content(tmp_path / "out") == before


def test_a_summary_whose_report_is_damaged_is_made_again(go: Callable, tmp_path: Path):
    go(*WORDS[:2])
    before, report = content(tmp_path / "out"), tmp_path / "out" / "summary" / "report.json"
    report.write_bytes(report.read_bytes()[:-9])
    with pytest.raises(RunError, match="holds no finished run; finish it with the same command"):
        read_rows(tmp_path / "out")
    go(*WORDS[:2])
    assert content(tmp_path / "out") == before


def test_two_processes_in_one_folder_are_refused_and_a_dead_one_is_not(
    go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def again(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        with pytest.raises(RunError, match=rf"process {os.getpid()} on .* works in .* on shard 1-of-1 .* wait for it"):
            go(*WORDS)
        with pytest.raises(RunError, match="shard 1-of-1 of the same records"):
            go(*WORDS, shard="2/3")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Scores, "compute", again)
        with pytest.raises(KeyboardInterrupt):
            go(*WORDS)
    assert (tmp_path / "out/.locks/1-of-1.lock").exists() and go(*WORDS).done == len(WORDS)


def test_a_full_disk_stops_the_run_and_leaves_what_is_done(go: Callable, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    go(*WORDS[:2])
    before = content(tmp_path / "out")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(RunError, match="cannot write .*File too large"):
            go(*WORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [name for name in content(tmp_path / "out") if name not in before]
    go(*WORDS)
    go(*WORDS, out="at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), OSError(5, "Input/output error")])
def test_what_no_record_is_to_blame_for_stops_the_run(
    go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    compute = Scores.compute

    def fail(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        if task.record.id == WORDS[1]:
            raise error
        return compute(self, vlm, task)

    with monkeypatch.context() as patched:
        patched.setattr(Scores, "compute", fail)
        with pytest.raises(RunError, match=f"stopped at {WORDS[1]}: .*; what is done is kept"):
            go(*WORDS)
    assert len(list((tmp_path / "out/records").iterdir())) == 1
    assert go(*WORDS).done == len(WORDS)


def test_a_vanished_folder_stops_the_run(go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute = Scores.compute

    def vanish(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        shutil.rmtree(tmp_path / "out")
        return compute(self, vlm, task)

    monkeypatch.setattr(Scores, "compute", vanish)
    with pytest.raises(RunError, match="cannot write to .*No such file or directory.*start the run again"):
        go(*WORDS)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_whose_lock_cannot_be_opened_is_refused_in_words(go: Callable, tmp_path: Path):
    """As for a user who may only read it."""
    go(*WORDS)
    lock = tmp_path / "out/.locks/start.lock"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(RunError, match="cannot write to .*; make room or choose another folder"):
        go(*WORDS)


def test_a_list_of_records_that_vanishes_stops_the_run(go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute = Scores.compute

    def vanish(self: Scores, vlm: VisionLanguageModel, task: Task) -> Outcome:
        (tmp_path / "out" / "records.json").unlink()
        return compute(self, vlm, task)

    monkeypatch.setattr(Scores, "compute", vanish)
    with pytest.raises(RunError, match=r"records.json' has vanished; bring the folder back, or choose another one"):
        go(WORDS[0])


# ---- shards ----


def test_shards_share_the_records() -> None:
    for count in (1, 2, 3, 7):
        shards = [Shard.parse(f"{index}/{count}") for index in range(1, count + 1)]
        assert all(sum(shard.holds(place) for shard in shards) == 1 for place in range(20))
    for one in (Shard(index, 4) for index in range(4)):
        for other in (Shard(index, 6) for index in range(6)):
            common = any(one.holds(place) and other.holds(place) for place in range(24))
            assert one.overlaps(other) == common
    parts = [Shard(1, 3).part(index, 2) for index in range(2)]
    assert [place for place in range(20) if any(part.holds(place) for part in parts)] == list(range(1, 20, 3))
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(RunError, match="write i/n"):
            Shard.parse(text)


def test_shards_in_one_folder_equal_one_run(go: Callable, tmp_path: Path):
    first = go(*WORDS, shard="1/2")
    assert (first.done, first.missing) == (4, 3) and not (tmp_path / "out/summary").exists()
    assert go(*WORDS, shard="2/2").missing == 0
    go(*WORDS, out="at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def test_merged_shards_equal_one_run(go: Callable, tmp_path: Path):
    def joined(*names: str, out: str = "merged") -> Any:
        return merge([tmp_path / name for name in names], tmp_path / out, analyses=[Scores])

    for index in (1, 2, 3):
        go(*WORDS, "unanswerable", out=f"part{index}", shard=f"{index}/3")
    with pytest.raises(RunError, match="2 of 8 records are in none of the folders.*run the missing shards first"):
        joined("part1", "part2")
    assert not (tmp_path / "merged").exists()
    report = joined("part3", "part1", "part2")
    go(*WORDS, "unanswerable", out="at once")
    assert content(tmp_path / "merged") == content(tmp_path / "at once")
    assert joined("part1", "part2", "part3") == report
    go(*WORDS, "unanswerable", out="other", shard="3/3", answer="no")
    with pytest.raises(RunError, match="other' is no shard of the run in .*settings answer 'no' instead of 'yes'"):
        joined("part1", "part2", "other", out="mixed")
    with pytest.raises(RunError, match="holds no run"):
        joined("part1", "nowhere", out="mixed")


def test_damaged_shards_and_folders_of_other_runs_are_not_merged(go: Callable, tmp_path: Path):
    for index in (1, 2):
        go(*WORDS[:4], out=f"part{index}", shard=f"{index}/2")
    go(*WORDS[:4], out="other", answer="no")
    parts, before = [tmp_path / "part1", tmp_path / "part2"], content(tmp_path / "other")
    with pytest.raises(RunError, match="other' holds another run"):
        merge(parts, tmp_path / "other", analyses=[Scores])
    assert content(tmp_path / "other") == before
    (path, *_) = (tmp_path / "part2" / "records").glob("*/record.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"score", b"scare"))
    with pytest.raises(RunError, match="part2.*is damaged; remove that folder"):
        merge(parts, tmp_path / "merged", analyses=[Scores])
    path.write_bytes(whole)
    assert merge(parts, tmp_path / "merged", analyses=[Scores]).done == 4


def test_a_comparison_is_paired_over_common_records(go: Callable, tmp_path: Path):
    go(*WORDS[:6], out="one")
    go(*WORDS[1:], out="other", answer="no")
    table = compare(tmp_path / "one", tmp_path / "other")
    one, other = (read_rows(tmp_path / name).set_index("id")["score"] for name in ("one", "other"))
    common = list(WORDS[1:6])
    (row,) = table.to_dict("records")
    assert (row["column"], row["records"]) == ("score", 5)
    assert row["difference"] == pytest.approx((other[common] - one[common]).mean())
    assert row["low"] <= row["difference"] <= row["high"] and row["low"] < row["high"]
    assert table.attrs["settings"] == ["settings answer 'no' instead of 'yes'"]
    same = compare(tmp_path / "one", tmp_path / "one")
    assert np.allclose(same[["difference", "low", "high"]].to_numpy(), 0)
    go("far", out="far")
    with pytest.raises(RunError, match="no record in common"):
        compare(tmp_path / "one", tmp_path / "far")
    with pytest.raises(RunError, match=r"holds no finished run; pass one of those in it \(.*far, .*one, .*other\)"):
        compare(tmp_path, tmp_path / "one")


# ---- killed processes, and several at once ----

COMMANDS = {
    "trace": [
        "--corrupt",
        "text-noise:3",
        "--positions",
        "last",
        "--sites",
        "hidden",
        "--even-if-weak",
        "--checks",
        "0",
    ],
    "flow": ["--lens", "--knockout", "--flows", "question -> last", "--windows", "1"],
}


def asked(command: str, out: Path, count: int) -> list[str]:
    """The command over questions without pictures."""
    data = out.parent / "questions.jsonl"
    if not data.exists():
        write_lines(data, (replace(each, image=None, boxes=(), answer=None) for each in world_questions(count)))
    return [command, *COMMANDS[command], "--data", str(data), "--out", str(out)]


def started(
    command: str, out: Path, count: int, *, launcher: Sequence[str] = (), output: int = subprocess.PIPE
) -> subprocess.Popen:
    """The same in a process of its own."""
    words = [sys.executable, *launcher, "-m", "multrace.scripts.main", *asked(command, out, count)]
    return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread here and in processes started from here: another number of threads rounds sums differently."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("command", "kills", "count"),
    [
        pytest.param("trace", 1, 8, id="trace-1 kill"),  # of a copy of this process, which has its libraries
        *(pytest.param(command, 20, 100, marks=pytest.mark.slow, id=f"{command}-20 kills") for command in COMMANDS),
    ],
)
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, command: str, kills: int, count: int):
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    words, kept = asked(command, one, count), lambda: len([*one.glob("records/[!.]*-*/record.json")])
    start = (lambda: Fork(lambda: app(words))) if kills == 1 else lambda: started(command, one, count)
    longest = 0.1 if kills == 1 else 0.25  # the records of a run are soon done on a fast machine
    assert kill_at_random(start, kept, kills, longest) == kills
    done = {path: path.stat().st_mtime_ns for path in one.glob("records/[!.]*-*/record.json")}
    assert kills <= len(done)
    assert app(asked(command, one, count)) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished record was computed again"
    assert app(asked(command, other, count)) == 0
    assert content(one) == content(other) and len(read_rows(one)) == count


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_of_torchrun_equal_one(tmp_path: Path, command: str):
    one, other = tmp_path / "two", tmp_path / "one"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finish(started(command, one, 9, launcher=launcher))
    assert {path.name for path in (one / ".locks").glob("*.holder")} == {"1-of-2.holder", "2-of-2.holder"}
    finish(started(command, other, 9))
    assert content(one) == content(other)


@pytest.mark.slow
def test_a_thousand_records_need_the_memory_of_one(tmp_path: Path):
    """The peak of a run over 1,000 records is that over 50, up to their plain questions and rows."""
    peaks = {}
    for count in (50, 1000):
        out = tmp_path / str(count)
        out.mkdir()
        process = started("trace", out / "run", count, output=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks[count] = usage.ru_maxrss / 1024
        assert len(read_rows(out / "run")) == count
    assert peaks[1000] - peaks[50] < 60, peaks


def test_traces_average_to_the_average_of_the_traces(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    names = ("Kimdor", "Lovmis", "Draivo")
    rows = [(n, Question(text=f"Who founded {each}?", constraint=each, id=each)) for n, each in enumerate(names)]
    settings = TraceRun(corrupt="text-noise:3", positions=("last",), sites=("hidden", "mlp"), even_if_weak=True)
    report = run(tiny_vlm, settings, rows, tmp_path / "out", progress=False)
    traces = [
        causal_trace(tiny_vlm, tiny_vlm.prompt_for(each), **settings.arguments(each), progress=False)
        for _, each in rows
    ]
    expected = average(traces)
    expected.save(tmp_path / "expected.safetensors")
    loaded = AverageTrace.load(tmp_path / "out/summary/average.safetensors")
    assert torch.equal(loaded.means["mlp"].mean, expected.means["mlp"].mean) and loaded.count == 3
    table = read_rows(tmp_path / "out")
    assert list(table["total_effect"]) == [trace.total_effect for trace in traces]
    assert report.lines[0].startswith("AverageTrace of") and json.loads((tmp_path / "out/settings.json").read_text())
