"""Runs of edits: the joint edit is the one of the library, whatever happens on the way."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import multrace as mt
import pytest
import torch
from killed import files_of, kill_at_random
from multrace import VisionLanguageModel
from multrace.data import EditRecord, Question, World, tiny_vlm_path, write_lines
from multrace.editing import EditError
from multrace.editing.moments import own
from multrace.scripts.main import app
from multrace.tracing import AverageTrace, TraceError
from multrace.workflow import EditRun, EditTrace, ModelToLoad, RunError, merge, read_rows, run
from safetensors.torch import load_file, save_file

EDITOR = mt.MultEdit(layer=5, steps=10)
SHORT = EditTrace(positions=("last",), checks=0)
"""A trace of few cells, which are not checked against the slow way."""


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those that say who works there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def world_edits(folder: Path, count: int) -> list[EditRecord]:
    """Outdated facts of the world with pictures in a folder, each to be traced under the picture of the next one."""
    world = World()
    cases = world.edit_cases("outdated", "choose")[:count]
    pictures = [folder / f"{number}.png" for number in range(count)]
    for case, path in zip(cases, pictures, strict=True):
        world.picture(world.entities[case.fact.entity], 0).image.save(path)
    records = []
    for number, case in enumerate(cases):
        asked = world.question(case.fact)
        swap = f"swap:{pictures[(number + 1) % count]}"
        question = replace(asked, image=pictures[number], boxes=(), answer=None, id="", corrupt=swap)
        records.append(EditRecord(id=f"fact-{number}", question=question, target=case.target, old=case.fact.answer))
    return records


def plain_edits(*targets: str) -> list[EditRecord]:
    """Edits of questions without pictures."""
    names = ("Ada", "Bo", "Cy", "Dora", "Ed")[: len(targets)]
    return [
        EditRecord(id=f"n{number}", question=Question(text=f"Who plays {name}?"), target=target)
        for number, (name, target) in enumerate(zip(names, targets, strict=True))
    ]


TARGETS = ("Pruro", "Draivo", "Kimdor", "Lovmis", "Sodman")


@pytest.fixture
def go(tiny_vlm: VisionLanguageModel, tmp_path: Path) -> Any:
    """Runs edits of some records in a folder."""

    def start(records: Sequence[Any], out: str = "out", vlm: Any = None, **options: Any) -> Any:
        how = {name: options.pop(name) for name in ("shard", "retry_failed") if name in options}
        analysis = EditRun(**{"editor": EDITOR, **options})
        rows = enumerate(records, 1)
        return run(tiny_vlm if vlm is None else vlm, analysis, rows, tmp_path / out, progress=False, **how)

    return start


def delta_of(folder: Path) -> mt.Delta:
    return mt.Delta.load(folder / "summary" / "edit.safetensors")


# ---- the edit ----


def test_the_edit_is_the_one_of_the_library(go: Any, tmp_path: Path, tiny_vlm: VisionLanguageModel):
    """Bit for bit where the batches are the same, and up to rounding where each record is searched for by itself."""
    records = world_edits(tmp_path, 3)
    expected = EDITOR.edit(tiny_vlm, records, progress=False)
    report = go(records)
    assert delta_of(tmp_path / "out").digest == expected.digest
    go(records, out="alone", together=1)
    for name, change in delta_of(tmp_path / "alone").changes.items():
        one, other = ((each.left.double() @ each.right.double()) for each in (change, expected.changes[name]))
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max())
    table = read_rows(tmp_path / "out")
    assert list(table["status"]) == [request["status"] for request in expected.requests]
    assert list(table["before"]) == list(table["undone"]) == [record.old for record in records]
    with expected.applied(tiny_vlm):
        said = tiny_vlm.answers([tiny_vlm.prompt_for(record.question) for record in records])
    assert list(table["edited"]) == said
    assert report.missed == sum(answer != record.target for answer, record in zip(said, records, strict=True))


def test_several_layers_and_moments_are_those_of_the_library(
    go: Any, tmp_path: Path, tiny_vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    records = plain_edits(*TARGETS[:3])
    prompts = [tiny_vlm.prompt_for(record.question) for record in records]
    moments = mt.second_moments(tiny_vlm, prompts, layers=(4, 5), progress=False)
    path = moments.save(tmp_path / "moments.safetensors")
    editor = mt.MEMIT(layer=5, spread=2, steps=10, ridge_fraction=0.01, moment_weight=5.0)
    go(records, editor=editor, moments=path)
    expected = editor.edit(tiny_vlm, records, moments=moments, progress=False)
    assert delta_of(tmp_path / "out").digest == expected.digest
    monkeypatch.setattr(own, "LEAST", 24)
    monkeypatch.setattr(own, "MOST", 24)
    go(records, out="own", editor=editor)
    assert delta_of(tmp_path / "own").digest == editor.edit(tiny_vlm, records, progress=False).digest
    assert delta_of(tmp_path / "own").digest != expected.digest


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("each", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_place_is_the_one_that_the_traces_of_the_library_show(
    go: Any, tmp_path: Path, tiny_vlm: VisionLanguageModel, each: bool
):
    records = world_edits(tmp_path, 3)[1:]
    corruptions = [mt.SwapImage(str(record.question.corrupt).removeprefix("swap:")) for record in records]
    options = {"positions": ("constraint_last", "last"), "sites": ("hidden", "mlp"), "progress": False}
    located = mt.locate_then_edit(
        tiny_vlm, records, corruptions=corruptions, editor=EDITOR, per_request=each, trace_after=True, **options
    )
    go(records, trace=EditTrace(), each=each, trace_after=True)
    table = read_rows(tmp_path / "out")
    assert list(table["layer"]) == [site.layer for site in located.edit_sites]
    assert list(table["token"]) == [site.token for site in located.edit_sites]
    average = AverageTrace.load(tmp_path / "out/traces/summary/average.safetensors")
    assert average.count == 2 and torch.equal(average.means["mlp"].mean, located.average.means["mlp"].mean)
    report = (tmp_path / "out/summary/edit.json").read_text()
    assert len(set(table["layer"])) == (2 if each else 1)
    assert delta_of(tmp_path / "out").digest == located.deltas[0].digest
    assert all(line in report for shift in located.shifts for line in shift.lines())


@pytest.mark.usefixtures("undrawn")
def test_traces_made_before_choose_the_place(go: Any, tmp_path: Path, tiny_vlm: VisionLanguageModel):
    records = world_edits(tmp_path, 2)
    go(records, trace=EditTrace())
    homes = [next((tmp_path / "out/traces/records").glob(f"{record.id}-*")) for record in records]
    files = tuple(home / "trace.safetensors" for home in homes)
    go(records, out="again", trace_files=files)
    assert delta_of(tmp_path / "again").digest == delta_of(tmp_path / "out").digest
    assert not (tmp_path / "again/traces").exists()
    go(records, out="average", trace_files=(tmp_path / "out/traces/summary/average.safetensors",))
    assert delta_of(tmp_path / "average").digest == delta_of(tmp_path / "out").digest
    with pytest.raises(TraceError, match="2 requests with 1 traces"):
        go(records, out="too few", trace_files=files[:1])


@pytest.mark.usefixtures("undrawn")
def test_a_picture_that_cannot_be_decoded_has_no_part_in_the_place(go: Any, tmp_path: Path):
    records = world_edits(tmp_path, 3)
    half = tmp_path / "half.png"
    half.write_bytes(records[1].question.image.read_bytes()[:300])
    bad = replace(records[1], question=replace(records[1].question, image=half))
    report = go([records[0], bad, records[2]], trace=SHORT)
    assert report.done == 2 and [id for id, _ in report.failed] == [bad.id] and "truncated" in report.failed[0][1]
    go([records[0], records[2]], out="without", trace=SHORT)
    assert delta_of(tmp_path / "out").digest == delta_of(tmp_path / "without").digest


# ---- records ----


def test_a_record_that_fails_leaves_the_others_as_they_would_be_without_it(go: Any, tmp_path: Path):
    records = plain_edits(*TARGETS)
    named = replace(records[1], question=replace(records[1].question, constraint="Bo"))
    bad = replace(records[2], question=replace(records[2].question, image=tmp_path / "gone.png"))
    editor = mt.MultEdit(layer=5, token="constraint_last", steps=10)
    others = [
        replace(each, question=replace(each.question, constraint=name))
        for each, name in zip(records[3:], ("Dora", "Ed"), strict=True)
    ]
    fay = Question(text="Who plays Fay?", constraint="Fay")
    crowded = EditRecord(id="long", question=fay, target="Pruro", preserve_prompts=(Question(text="Why? " * 600),))
    report = go([records[0], named, bad, Question(text="Who?", id="bare"), crowded, *others], editor=editor)
    assert report.done == 3 and not report.is_clean
    reasons = dict(report.failed)
    assert "cannot edit at token 'constraint_last'" in reasons["n0"]
    assert "no picture at" in reasons["n2"] and "without a target" in reasons["bare"]
    assert "512 positions" in reasons["long"]
    go([named, *others], out="alone", editor=editor)
    assert delta_of(tmp_path / "out").digest == delta_of(tmp_path / "alone").digest
    before = content(tmp_path / "out")
    go([named, *others], editor=editor)  # records that failed may be taken out
    assert content(tmp_path / "out").keys() < before.keys()


def test_a_long_target_needs_no_room_after_a_long_question(go: Any, tiny_vlm: VisionLanguageModel):
    long_question = EditRecord(id="q", question=Question(text="Why? " * 100), target="Pruro")
    long_target = EditRecord(id="t", question=Question(text="Who plays Ada?"), target="word " * 50)
    report = go([long_question, long_target], editor=mt.MultEdit(layer=5, steps=1))
    assert report.done == 2 and not report.failed
    with pytest.raises(mt.ModelError, match="does not fit into the model's 512 positions"):
        tiny_vlm.answers([tiny_vlm.prompt_for(long_question.question)], max_new_tokens=154)


def test_edits_that_contradict_each_other_are_named_and_not_made(go: Any, tmp_path: Path):
    one, other, fine = plain_edits(*TARGETS[:3])
    report = go([one, replace(other, question=one.question), fine])
    table = read_rows(tmp_path / "out").set_index("id")
    assert table.loc["n0", "status"] == "failed: it has the key of 'n1' and another target; drop one of them"
    assert "key of 'n0'" in table.loc["n1", "status"] and not table.loc["n2", "status"].startswith("failed")
    assert not report.is_clean and report.missed >= 2
    go([fine], out="alone")
    assert set(next(iter(delta_of(tmp_path / "out").changes.values())).owners.tolist()) == {2}


def test_nothing_to_do_is_an_outcome(go: Any, tmp_path: Path, tiny_vlm: VisionLanguageModel):
    (record,) = plain_edits("any")
    (answer,) = tiny_vlm.answers([tiny_vlm.prompt_for(record.question)])
    report = go([replace(record, target=answer)])
    assert report.is_clean and list(read_rows(tmp_path / "out")["status"]) == ["nothing to do"]


def test_nothing_but_failures_is_an_error(go: Any, tmp_path: Path):
    with pytest.raises(RunError, match="edit failed for all 2 records; n0: cannot edit at token"):
        go(plain_edits(*TARGETS[:2]), editor=mt.MultEdit(layer=5, token="constraint"))
    with pytest.raises(EditError, match="cannot edit layer 40"):
        go(plain_edits(*TARGETS[:2]), out="layer", editor=mt.MultEdit(layer=40))
    assert not list((tmp_path / "layer/records").iterdir())


@pytest.mark.usefixtures("undrawn")
def test_more_records_keep_what_is_there_and_end_as_if_they_had_been_there(go: Any, tmp_path: Path):
    records = world_edits(tmp_path, 2)
    go(records[:1], trace=SHORT, together=1)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("**/records/*/record.json")}
    assert len(kept) == 2
    go(records, trace=SHORT, together=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    go(records, out="at once", trace=SHORT, together=1)
    assert content(tmp_path / "out") == content(tmp_path / "at once")


@pytest.mark.usefixtures("undrawn")
def test_records_that_move_the_place_are_refused(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = world_edits(tmp_path, 3)
    go(records[:2], trace=SHORT)
    site = AverageTrace.edit_site
    monkeypatch.setattr(AverageTrace, "edit_site", lambda self, share: replace(site(self, share), layer=1))
    with pytest.raises(RunError, match="with other records the traces place the edit of .* choose another folder"):
        go(records, trace=SHORT)


# ---- one folder, one run ----


@dataclass(frozen=True)
class Closed(ModelToLoad):
    """A model that must not be opened."""

    def open(self) -> VisionLanguageModel:
        raise AssertionError("the model was opened")


def test_a_second_start_opens_no_model_and_a_changed_one_is_noticed(go: Any, tmp_path: Path):
    model = shutil.copytree(tiny_vlm_path(), tmp_path / "model")
    records = plain_edits(*TARGETS[:2])
    report = go(records, vlm=ModelToLoad(model))
    before = content(tmp_path / "out")
    assert go(records, vlm=Closed(model)) == report and content(tmp_path / "out") == before
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    save_file({**weights, name: weights[name] * 2}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="was opened"):
        go(records, vlm=Closed(model))
    with pytest.raises(RunError, match="other settings: model [0-9a-f]{12} instead of [0-9a-f]{12}"):
        go(records, vlm=ModelToLoad(model))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"editor": replace(EDITOR, steps=11)}, "settings editor steps '11' instead of '10'"),
        ({"editor": replace(EDITOR, layer=4)}, "settings editor layer '4' instead of '5'"),
        ({"together": 2}, "settings together 2 instead of 16"),
    ],
)
def test_other_settings_are_refused_by_name(go: Any, tmp_path: Path, changed: dict[str, Any], words: str):
    records = plain_edits(*TARGETS[:1])
    go(records)
    before = content(tmp_path / "out")
    with pytest.raises(RunError, match=words):
        go(records, **changed)
    assert content(tmp_path / "out") == before


def test_a_damaged_value_is_searched_for_again(go: Any, tmp_path: Path):
    records = plain_edits(*TARGETS[:2])
    go(records)
    before = content(tmp_path / "out")
    (path,) = (tmp_path / "out/records").glob("n0-*/values.safetensors")
    path.write_bytes(bytes([*path.read_bytes()[:-1], 1]))
    shutil.rmtree(tmp_path / "out/summary")
    assert content(tmp_path / "out") != before
    go(records)
    assert content(tmp_path / "out") == before


# ---- shards ----


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("count", "together"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_shards_in_one_folder_equal_one_run(go: Any, tmp_path: Path, count: int, together: int):
    records = world_edits(tmp_path, count)
    options = {"trace": SHORT, "together": together}
    first = go(records, shard="1/2", **options)
    assert (first.done, first.missing) == (count - 1, 1) and not (tmp_path / "out/summary").exists()
    assert go(records, shard="2/2", **options).missing == 0
    go(records, out="at once", **options)
    assert content(tmp_path / "out") == content(tmp_path / "at once")


@pytest.mark.parametrize(("count", "together"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_merged_shards_are_ended_by_the_same_command(go: Any, tmp_path: Path, count: int, together: int):
    records = world_edits(tmp_path, count)
    options = {"trace": SHORT, "together": together}
    for index in (1, 2):
        go(records, out=f"part{index}", shard=f"{index}/2", **options)
    report = merge([tmp_path / "part1", tmp_path / "part2"], tmp_path / "merged")
    assert content(tmp_path / "merged" / "traces") == content(tmp_path / "part1" / "traces") != {}
    (line,) = report.lines
    assert "start the command of this run with this folder once more" in line and not report.files
    assert go(records, out="merged", **options).files
    go(records, out="at once", **options)
    assert content(tmp_path / "merged") == content(tmp_path / "at once")
    (tmp_path / "merged" / "traces" / "settings.json").unlink()
    with pytest.raises(RunError, match="traces' holds records without settings.json"):
        go(records, out="merged", **options)


# ---- killed processes, and several at once ----


def arguments(out: Path, count: int, *more: str) -> list[str]:
    """The command over edits of the world; some do not make the model say their targets, after so few steps."""
    data = out.parent / "edits.jsonl"
    if not data.exists():
        write_lines(data, world_edits(out.parent, count))
    return ["edit", "--data", str(data), "--steps", "10", "--together", "2", "--out", str(out), *more]


def started(out: Path, count: int, *more: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """The same in a process of its own."""
    words = [sys.executable, *launcher, "-m", "multrace.scripts.main", *arguments(out, count, *more)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records_of(out: Path) -> dict[Path, int]:
    """The finished records of the run and of its traces, with the times at which they were written."""
    paths = (path for path in files_of(out) if path.match("records/[!.]*-*/record.json"))
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize(
    ("kills", "count", "more"),
    [
        pytest.param(1, 4, ("--where", "5"), marks=pytest.mark.slow, id="1 kill"),
        pytest.param(20, 32, ("--where", "trace"), marks=pytest.mark.slow, id="20 kills"),
    ],
)
def test_a_killed_edit_ends_like_an_undisturbed_one(tmp_path: Path, kills: int, count: int, more: tuple[str, ...]):
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    assert kill_at_random(lambda: started(one, count, *more), lambda: len(records_of(one)), kills) == kills
    done = records_of(one)
    assert kills <= len(done)
    assert app(arguments(one, count, *more)) == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished record was computed again"
    assert app(arguments(other, count, *more)) == 1
    assert content(one) == content(other) and len(read_rows(one)) == count


def test_an_interrupted_edit_goes_on_with_the_values_that_are_there(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In this process: a run that is killed, and a run in a process of its own, are above."""
    records = plain_edits(*TARGETS)
    search, groups = EditRun.compute_together, []

    def stopped(self: EditRun, vlm: VisionLanguageModel, tasks: Sequence[Any]) -> Any:
        groups.append(len(tasks))
        if len(groups) == 2:
            raise KeyboardInterrupt
        return search(self, vlm, tasks)

    monkeypatch.setattr(EditRun, "compute_together", stopped)
    with pytest.raises(KeyboardInterrupt):
        go(records, together=2)
    done = records_of(tmp_path / "out")
    assert len(done) == 2 and not (tmp_path / "out/summary").exists()
    go(records, together=2)
    assert groups == [2, 2, 2, 1]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished record was computed again"
    go(records, out="undisturbed", together=2)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_processes_of_torchrun_equal_one(tmp_path: Path):
    one, other = tmp_path / "two", tmp_path / "one"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = started(one, 8, "--where", "trace", launcher=launcher)
    process.communicate(timeout=300)
    assert {path.name for path in (one / ".locks").glob("*.holder")} == {"1-of-2.holder", "2-of-2.holder"}
    assert app(arguments(other, 8, "--where", "trace")) == 1
    assert content(one) == content(other)


def test_a_file_that_is_no_edit_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_lines(tmp_path / "questions.jsonl", [Question(text="Who won?", id="a")])
    assert app(["edit", "--data", str(data), "--where", "5", "--out", str(tmp_path / "out")]) == 2
    assert "row 1: 'Who won?' has no 'target'" in capsys.readouterr().err
