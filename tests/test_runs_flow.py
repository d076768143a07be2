"""Runs of information flow: each reading is what the library computes, wrong answers are left out, averages stream."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multrace import VisionLanguageModel
from multrace.data import DataError, EditRecord, Question, read_data, world_questions
from multrace.scripts.main import app
from multrace.tracing import (
    AttentionKnockout,
    AverageKnockout,
    AverageShare,
    LogitLens,
    RelevanceMap,
    TraceError,
    attention_knockout,
    attention_share,
    average,
    logit_lens,
    same_answer,
)
from multrace.workflow import (
    FlowRun,
    RunError,
    check_result_folder,
    noise_for_errors,
    read_rows,
    result_folder,
    run,
    with_noise,
)
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gqa_flow"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Three questions that the embedded model answers rightly, and one that it cannot."""
    asked = list(world_questions(3))
    return [*asked, replace(asked[0], id="wrong", answer="Atlantis")]


def folder_of(out: Path, id: str) -> Path:
    (path,) = (out / "records").glob(f"{id}-*")
    return path


def test_readings_are_those_of_the_library(tiny_vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path):
    settings = FlowRun(analyses=("knockout", "lens", "relevance"), flows=("image -> last",), windows=(2,))
    report = run(tiny_vlm, settings, enumerate(questions[:2], 1), tmp_path / "out", progress=False)
    assert report.done == 2 and report.skipped == ()
    for question in questions[:2]:
        prompt, folder = tiny_vlm.prompt_for(question), folder_of(tmp_path / "out", question.id)
        cut = attention_knockout(tiny_vlm, prompt, flows=("image -> last",), windows=(2,), progress=False)
        stored = AttentionKnockout.load(folder / "knockout.safetensors")
        assert torch.equal(stored.change(), cut.change()) and stored.is_right
        lens = logit_lens(tiny_vlm, prompt, positions=("last",), answer=question.answer, progress=False)
        kept = LogitLens.load(folder / "lens.safetensors")
        assert torch.equal(kept.probability(kept.followed.ids[0]), lens.probability(lens.followed.ids[0]))
        assert RelevanceMap.load(folder / "cam.safetensors").layers and (folder / "cam.png").exists()
        assert not (folder / "knockout.png").exists()  # averages are drawn
    shares = average(attention_share(tiny_vlm, tiny_vlm.prompt_for(question)) for question in questions[:2])
    stored = AverageShare.load(tmp_path / "out/summary/share.safetensors")
    assert torch.equal(stored.of("image"), shares.of("image"))
    table = read_rows(tmp_path / "out")
    assert list(table["answer"]) == [question.answer for question in questions[:2]] and table["right"].all()


@pytest.mark.usefixtures("undrawn")
def test_wrong_answers_are_left_out_of_the_knockout_and_counted_on_demand(
    tiny_vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
):
    settings = FlowRun(flows=("image -> last",), windows=(1,))
    report = run(tiny_vlm, settings, enumerate(questions, 1), tmp_path / "out", progress=False)
    mean = AverageKnockout.load(tmp_path / "out/summary/knockout.safetensors")
    assert mean.count == 3 and [each.gold for each in mean.filtered] == ["Atlantis"]
    assert "4 questions, 3 of 4 answered rightly, 1 left out for a wrong answer" in report.lines
    assert not (folder_of(tmp_path / "out", "wrong") / "knockout.safetensors").exists()
    run(tiny_vlm, replace(settings, keep_wrong=True), enumerate(questions, 1), tmp_path / "all", progress=False)
    assert AverageKnockout.load(tmp_path / "all/summary/knockout.safetensors").count == 4


@pytest.mark.usefixtures("undrawn")
def test_any_of_several_right_answers_is_right(
    tiny_vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
):
    accepted = replace(questions[-1], answers=("Atlantis", str(questions[0].answer)))
    run(tiny_vlm, FlowRun(analyses=("lens",)), [(1, accepted)], tmp_path / "out", progress=False)
    assert read_rows(tmp_path / "out")["right"].all()


@pytest.mark.usefixtures("undrawn")
def test_a_reading_that_does_not_fit_is_skipped_and_a_question_without_any_fails(
    tiny_vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
):
    bare = Question(text="What is this?", id="bare")
    plain = replace(questions[0], id="plain", constraint=None)
    settings = FlowRun(analyses=("contributions", "relevance"))
    report = run(tiny_vlm, settings, enumerate([questions[1], plain, bare], 1), tmp_path / "out", progress=False)
    reasons = {name: reason for id, name, reason in report.skipped if id == "plain"}
    assert set(reasons) == {"contributions", "image_to_constraint", "failure"}
    assert "give the question a constraint" in reasons["contributions"]
    assert report.failed[0][0] == "bare" and "give the question a constraint" in report.failed[0][1]


@pytest.mark.usefixtures("undrawn")
def test_an_edit_record_is_asked_with_the_answer_that_it_replaces(
    tiny_vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
):
    question = replace(questions[0], answer=None)
    record = EditRecord(id="edit", question=question, target="Atlantis", old=questions[0].answer)
    run(tiny_vlm, FlowRun(analyses=("lens",)), [(1, record)], tmp_path / "out", progress=False)
    row = read_rows(tmp_path / "out").iloc[0]
    assert (row["id"], row["answer"], bool(row["right"])) == ("edit", questions[0].answer, True)


@pytest.mark.usefixtures("undrawn")
def test_noise_is_as_strong_as_the_share_of_errors_asks(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    asked = list(world_questions(8))
    noise = noise_for_errors(tiny_vlm, asked, share=0.5, progress=False)
    answers = [
        tiny_vlm.answers([tiny_vlm.prompt_for(with_noise(question, noise["strength"]))])[0] for question in asked
    ]
    wrong = sum(not same_answer(text, str(each.answer)) for text, each in zip(answers, asked, strict=True))
    assert noise["errors"] == pytest.approx(wrong / 8) and noise["undamaged"] < 0.34
    assert abs(noise["errors"] - 0.5) <= 0.17
    weak, strong = (np.asarray(with_noise(asked[0], strength).image, float) for strength in (1.0, 2.0))
    assert not np.array_equal(weak, strong) and with_noise(asked[0], 9.0).boxes == asked[0].boxes
    settings = FlowRun(analyses=("contributions",), degrade=True)
    report = run(tiny_vlm, settings, enumerate(asked, 1), tmp_path / "out", progress=False)
    table = read_rows(tmp_path / "out")
    assert 0 < table["right"].sum() < 8 and "failure.safetensors" in report.files
    with pytest.raises(RunError, match=r"errs on \d+% of these questions as they are; leave out the noise"):
        noise_for_errors(tiny_vlm, [replace(each, answer="Atlantis") for each in asked], progress=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"analyses": ("lense",)}, "no analysis 'lense'; there are knockout, lens"),
        ({"flows": ("imag -> last",)}, "no token group 'imag'; did you mean 'image'"),
        ({"flows": ("last",)}, "image -> last"),
        ({"windows": (0,)}, "cut the edges in at least one layer"),
        ({"heads": (-1,)}, "heads are counted from 0"),
        ({"analyses": ("lens",), "positions": ("lst",)}, "did you mean 'last'"),
        ({"analyses": ("relevance",), "keep": (-1,)}, "keep 0 or more"),
        ({"analyses": ("relevance",), "smooth": -1}, "pass 0 or more"),
    ],
)
def test_settings_that_no_model_could_follow_are_refused_at_once(settings: dict[str, Any], words: str):
    with pytest.raises(TraceError, match=words):
        FlowRun(**settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"constraint": "the horse"}, "is not in the question"),
        ({"boxes": ((0, 0, 500, 10),)}, "leaves the picture of"),
        ({"boxes": ((9, 9, 9, 20),)}, "is empty or"),
        ({"image": None}, "give the question an image|is of no picture"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_without_the_model(
    questions: list[Question], changes: dict[str, Any], words: str
):
    with pytest.raises((TraceError, DataError, ValueError), match=words):
        FlowRun().check(replace(questions[0], **changes))


def test_the_world_asks_each_fact_once_before_any_twice():
    questions = world_questions(900)
    first = [question.id.rsplit("-", 1)[0] for question in questions]
    assert len({question.id for question in questions}) == 900
    count = len(set(first))
    assert len(set(first[:count])) == count == 440
    for question in questions[:40]:
        ((left, top, right, bottom),) = question.boxes
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        assert question.constraint.lower() in question.text.lower()
    assert [each.id for each in world_questions(5, seed=1)] != [each.id for each in world_questions(5)]
    with pytest.raises(DataError, match="ask at least one"):
        world_questions(0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data/gqa_flow")
@pytest.mark.usefixtures("undrawn")
def test_the_studys_own_questions_go_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Their pictures are not at hand, so others stand in for them."""
    (file,) = SHARED.glob("*ChooseAttr.csv")
    records = [record for _, record in islice(read_data(file, images=tmp_path), 3)]
    for number, record in enumerate(records):
        side = max([max(box) for box in record.boxes], default=64) + 1
        Image.new("RGB", (side, side), (90 * number, 50, 200)).save(record.image)
    out = tmp_path / "out"
    asked = ["flow", "--data", str(file), "--images", str(tmp_path), "--limit", "4", "--out", str(out)]
    assert app([*asked, "--all", "--windows", "2", "--checks", "0"]) == 1  # one picture is missing
    average = AverageKnockout.load(out / "summary" / "knockout.safetensors")
    assert average.count == 3
    expected = {"image -> question", "object -> question", "other patches -> question", "true option -> last"}
    assert expected <= set(average.flows)
    printed = capsys.readouterr().out
    assert "no picture at" in printed and "3 records done, 1 failed" in printed


# ---- the folder of one question ----


def test_files_that_belong_together_change_together(tmp_path: Path):
    folder = tmp_path / "out"

    def write(*names: str) -> None:
        with result_folder(folder, spare="cells") as new:
            for name in names:
                if name == "full":
                    raise OSError(28, "No space left on device")
                (new / name).write_text(name)

    write("a.txt", "b.txt")
    (folder / "cells.1").write_text("")
    write("a.txt", "c.txt")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "c.txt", "contents.json"]
    with pytest.raises(RunError, match="cannot write .*No space left on device"):
        write("d.txt", "full")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "c.txt", "contents.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "notes.txt").write_text("mine")
    for refuse in (lambda: check_result_folder(folder), lambda: write("a.txt")):
        with pytest.raises(RunError, match=r"files of something else \(notes.txt\)"):
            refuse()
    assert check_result_folder(folder, spare="notes") == ["a.txt", "c.txt"]
    (folder / "contents.json").write_text("{}")
    with pytest.raises(RunError, match="no digest"):
        check_result_folder(folder)


@pytest.mark.usefixtures("undrawn")
def test_a_picture_in_memory_and_its_file_are_told_by_content(tmp_path: Path, tiny_vlm: VisionLanguageModel):
    path = tmp_path / "one.png"
    Image.new("RGB", (64, 64), "red").save(path)
    asked = Question(text="What is this?", image=path, id="q")
    settings = FlowRun(analyses=("lens",))
    run(tiny_vlm, settings, [(1, asked)], tmp_path / "out", progress=False)
    Image.new("RGB", (64, 64), "blue").save(path)
    with pytest.raises(RunError, match="holds results of 1 record that this run does not have"):
        run(tiny_vlm, settings, [(1, asked)], tmp_path / "out", progress=False)
