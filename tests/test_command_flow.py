"""multrace flow: options reach the library, files are whole, and of many questions nothing is lost."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from multrace import VisionLanguageModel
from multrace.data import world_questions
from multrace.scripts import flow
from multrace.scripts.main import app, parse
from multrace.scripts.options import ModelOptions
from multrace.tracing import (
    AttentionContributions,
    AttentionSaliency,
    AttentionShare,
    AverageContributions,
    AveragePruning,
    AverageSaliency,
    AverageShare,
    Box,
    Engine,
    FailurePrediction,
    ImagePruning,
    LogitLens,
    RelevanceMap,
    attention_saliency,
    average as mean_of,
    llava_cam,
    logit_lens,
    prune_image_tokens,
)
from multrace.tracing.attention import attention_contributions
from multrace.tracing.knockout import AttentionKnockout, AverageKnockout, attention_knockout
from multrace.tracing.lens import AverageLogitLens
from multrace.workflow import FlowRun, ModelToLoad, Outcome, Task, read_rows
from PIL import Image

ALL = ("--knockout", "--lens", "--contributions", "--relevance")
QUESTIONS = world_questions(5)
FIRST = QUESTIONS[0]
ONE_FLOW = ("--flows", "image -> question", "--windows", "2", "--checks=0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of the world, and one that is cut short."""
    for number, question in enumerate(QUESTIONS):
        question.image.save(tmp_path / f"{number}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tiny_vlm: VisionLanguageModel) -> None:
    """The embedded model is opened once for all tests."""
    monkeypatch.setattr(ModelOptions, "open_model", lambda settings: tiny_vlm)
    monkeypatch.setattr(ModelToLoad, "open", lambda model: tiny_vlm)


@pytest.fixture
def ask(folder: Path, opened: None) -> Callable[..., int]:
    """One question that works, and more options."""

    def asked(*more: str, out: str = "out") -> int:
        options = {"image": folder / "0.png", "question": FIRST.text, "out": folder / out}
        return app(["flow", *(f"--{name}={value}" for name, value in options.items()), *more])

    return asked


@pytest.fixture
def ask_records(folder: Path, opened: None) -> Callable[..., int]:
    """Questions of a file, and more options."""

    def asked(records: list[Any], *more: str, out: str = "out") -> int:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (folder / "records.jsonl").write_text("\n".join(lines))
        return app(["flow", f"--data={folder / 'records.jsonl'}", f"--out={folder / out}", *more])

    return asked


def record(number: int, **others: Any) -> dict[str, Any]:
    """A question of the world as a line says it."""
    question = QUESTIONS[number]
    words = {"id": f"q{number}", "image": f"{number}.png", "question": question.text, "answer": question.answer}
    return words | {"constraint": question.constraint, **others}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def own(folder: Path, id: str) -> Path:
    """The folder of a record."""
    (path,) = (folder / "out" / "records").glob(f"{id}-*")
    return path


def done(folder: Path, name: str) -> list[str]:
    """The ids of the records that have a result of this name, in order."""
    return [
        row["id"]
        for _, row in read_rows(folder / "out").iterrows()
        if (own(folder, row["id"]) / f"{name}.safetensors").exists()
    ]


def same_prompt(vlm: VisionLanguageModel, folder: Path) -> Any:
    return vlm.prompt(folder / "0.png", FIRST.text, constraint=FIRST.constraint)


# ---- one question ----

SETTINGS = ["--constraint", FIRST.constraint, "--answer", FIRST.answer, "--foil", "1982", "--box=12,17,47,53"]
LOADED = {
    "knockout": AttentionKnockout,
    "lens": LogitLens,
    "contributions": AttentionContributions,
    "image_to_constraint": AttentionContributions,
    "cam": RelevanceMap,
    "share": AttentionShare,
    "saliency": AttentionSaliency,
    "pruning": ImagePruning,
}


def test_every_option_reaches_the_library(
    ask: Callable[..., int], folder: Path, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    cut = ["--flows", "object -> question", "3 -> last", "--windows", "1", "3", "--heads", "0", "2", "--whole-answer"]
    read_ = ["--positions", "last", "-3", "--smooth", "2", "--seed=4", "--keep", "5", "all"]
    assert ask(*ALL, *SETTINGS, *cut, *read_, "--checks=3") == 0
    found = {name: kind.load(folder / "out" / f"{name}.safetensors") for name, kind in LOADED.items()}
    vlm, prompt, gold = tiny_vlm, same_prompt(tiny_vlm, folder), FIRST.answer
    engine = Engine(checks=0)
    cutting = {"flows": ["object -> question", "3 -> last"], "windows": (1, 3), "heads": (0, 2), "whole_answer": True}
    flow_ = attention_knockout(
        vlm, prompt, **cutting, boxes=[Box(12, 17, 47, 53)], gold=gold, engine=engine, progress=False
    )
    assert (found["knockout"].flows, found["knockout"].windows) == (flow_.flows, (1, 3))
    assert torch.equal(found["knockout"].probabilities, flow_.probabilities)
    assert (found["knockout"].is_right, found["knockout"].engine.checked_cells) == (True, 3)
    lens = logit_lens(vlm, prompt, positions=["last", -3], answer=gold, foil="1982", progress=False)
    assert (found["lens"].position_roles, found["lens"].foil) == (("last", "position -3"), "1982")
    assert torch.equal(found["lens"].ranks, lens.ranks)
    heat = llava_cam(vlm, prompt, answer=gold, samples=2, seed=4, progress=False).heat
    assert torch.allclose(found["cam"].heat, heat)
    assert found["pruning"].keep == (5, "all")
    kept = prune_image_tokens(vlm, prompt, keep=(5, "all"), generated=gold, engine=engine, progress=False)
    assert torch.equal(found["pruning"].probabilities, kept.probabilities)
    assert found["contributions"].head_contributions is not None
    assert (found["image_to_constraint"].queries, found["image_to_constraint"].sources) == ("constraint", "image")
    expected = {f"{name}{suffix}" for name in LOADED for suffix in (".safetensors", ".png")}
    expected |= {"knockout.csv", "lens_tokens.png", "image_tokens.png"}
    expected |= {f"{name}_overlay.png" for name in ("cam", "saliency", "pruning")} | {"contents.json"}
    assert set(names(folder / "out")) == expected
    for path in (folder / "out").glob("*.png"):
        Image.open(path).load()
    printed = capsys.readouterr().out
    assert f"answer    {gold!r}, right\n" in printed
    assert re.search(r"^    object -> question, heads 0, 2  window 1: -", printed, re.MULTILINE)
    for words in ("the likeliest from layer", "image tokens hold 80%", "the answer stays from layer"):
        assert words in printed
    assert all(name in printed.splitlines()[-1] for name in expected)


ALONE = {
    "--knockout": {"knockout.safetensors", "knockout.png", "knockout.csv"},
    "--lens": {"lens.safetensors", "lens.png", "lens_tokens.png"},
    "--contributions": {
        *(f"{name}.{suffix}" for name in ("contributions", "image_to_constraint") for suffix in ("safetensors", "png")),
        "image_tokens.png",
    },
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("flag", ALONE)
def test_each_analysis_writes_its_own_files(flag: str, ask: Callable[..., int], folder: Path):
    assert ask(flag, "--constraint", FIRST.constraint) == 0
    assert set(names(folder / "out")) == ALONE[flag] | {"contents.json"}


@pytest.mark.usefixtures("undrawn")
def test_files_of_another_analysis_do_not_stay(ask: Callable[..., int], folder: Path):
    assert ask("--lens") == 0
    assert ask(*ONE_FLOW) == 0
    assert set(names(folder / "out")) == ALONE["--knockout"] | {"contents.json"}


@pytest.mark.usefixtures("undrawn")
def test_a_run_and_a_question_do_not_share_a_folder(
    ask: Callable[..., int], ask_records: Callable[..., int], capsys: pytest.CaptureFixture
):
    assert ask(*ONE_FLOW) == 0
    assert ask_records([record(0)], *ONE_FLOW) == 2
    assert "holds files that belong to no run (contents.json" in capsys.readouterr().err
    assert ask_records([record(0)], *ONE_FLOW, out="run") == 0
    assert ask(*ONE_FLOW, out="run") == 2
    assert "holds files of something else (.locks, records, records.json" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_knockout_is_the_default_and_a_picture_is_not_needed_for_words(
    gpt2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    asked = ["flow", "--model", str(gpt2_path), "--question", "Who is it?", "--out", str(tmp_path / "out")]
    assert app([*asked, "--flows", "question -> last"]) == 0
    assert AttentionKnockout.load(tmp_path / "out" / "knockout.safetensors").flows == ("question -> last",)
    assert app(asked) == 2
    assert "knockout needs a picture" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_what_one_analysis_lacks_takes_nothing_from_the_others(
    ask: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
):
    assert ask("--lens", "--knockout", *ONE_FLOW, "--positions", "900") == 2
    said = capsys.readouterr()
    assert "no lens: no position 900" in said.err
    assert "knockout" in said.out
    assert names(folder / "out") == ["contents.json", "knockout.csv", "knockout.png", "knockout.safetensors"]


@pytest.mark.usefixtures("undrawn")
def test_a_wrong_answer_is_told(ask: Callable[..., int], capsys: pytest.CaptureFixture):
    assert ask("--answer", "1066", *ONE_FLOW) == 0
    printed = capsys.readouterr().out
    assert f"answer    {FIRST.answer!r}, wrong: the right answer is '1066'\n" in printed


@pytest.mark.usefixtures("undrawn")
def test_of_many_heads_the_strongest_are_drawn(
    ask: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    original, drawn = AttentionKnockout.plot, []

    def noted(self: AttentionKnockout, path: Path, *, flows: tuple[str, ...]) -> Path:
        drawn.extend(flows)
        return original(self, path, flows=flows)

    monkeypatch.setattr(AttentionKnockout, "plot", noted)
    assert ask("--heads", "each", "--windows", "1", "--checks=0") == 0
    found = AttentionKnockout.load(folder / "out" / "knockout.safetensors")
    peaks = found.change().abs().flatten(1).amax(1)
    assert (len(found.flows), len(drawn)) == (16, 12)
    assert {found.flows[index] for index in peaks.topk(12).indices.tolist()} == set(drawn)
    assert "drawn are the 12 strongest of 16 flows" in capsys.readouterr().out


HERE = ["--question", FIRST.text, "--image", "{0}"]
WRONG: dict[str, tuple[list[str], str]] = {
    "nothing to ask": ([], "found nothing to ask; pass one of --question"),
    "two ways": (["--question", "Why?", "--world"], "found --question and --world"),
    "no words": (["--question", " "], "is empty"),
    "no picture file": (["--question", "Why?", "--image", "gone.png"], "no picture at 'gone.png'"),
    "picture cut short": (["--question", "Why?", "--image", "{cut}"], "cannot read picture"),
    "other words": ([*HERE, "--constraint", "the moon"], "'the moon' is not in the question"),
    "box outside": ([*HERE, "--box", "0,0,65,20"], "leaves the picture of 64 x 64 pixels"),
    "box without picture": (["--question", "Why?", "--box", "0,0,5,5"], "is of no picture"),
    "no arrow": ([*HERE, "--flows", "image last"], "no flow 'image last'"),
    "unknown group": ([*HERE, "--flows", "imgae -> last"], "no token group 'imgae'; did you mean 'image'?"),
    "object without box": ([*HERE, "--flows", "object -> last"], "the group 'object' needs the boxes"),
    "group without words": ([*HERE, "--flows", "constraint -> last"], "the group 'constraint' needs the words"),
    "unknown position": ([*HERE, "--lens", "--positions", "lst"], "did you mean 'last'?"),
    "contributions without words": ([*HERE, "--contributions"], "contributions needs the words"),
    "relevance without picture": (["--question", "Why?", "--relevance"], "relevance needs a picture"),
    "no layers": ([*HERE, "--windows", "0"], "a window of 0 layers"),
    "too many layers": ([*HERE, "--windows", "99"], "no window of 99 layers"),
    "heads and each": ([*HERE, "--heads", "each", "1"], "both 'each' and numbers"),
    "too many heads": ([*HERE, "--heads", "99"], "heads 0 to 3"),
    "option of an analysis": ([*HERE, "--keep", "3"], "--keep belongs to --relevance, which is not asked for"),
    "option of many": ([*HERE, "--all"], "--all cannot go with --question: it is for many questions"),
    "option of one": (
        ["--world", "--limit=3", "--answer", "7"],
        "--answer cannot go with --world: it is for one question",
    ),
    "option of records": (["--world", "--images", "x"], "--images cannot go with --world: it is for --data"),
    "world without end": (["--world"], "pass the number of questions as --limit N"),
    "degrade alone": (["--world", "--limit=3", "--degrade"], "--degrade belongs to --contributions"),
    "no questions": (["--world", "--limit=0"], "--limit 0: take at least one"),
    "no such file": (["--data", "gone.jsonl"], "gone.jsonl"),
    "no such CSV": (["--data", "gone.csv"], "gone.csv"),
    "no place": ([*HERE, "--out", "{0}/out"], "is not a folder"),
    "no memory": ([*HERE, "--memory", "0"], "memory=0 is too small"),
    "negative keep": ([*HERE, "--relevance", "--keep", "-1"], "cannot be kept"),
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], message: str, folder: Path, opened: None, capsys: pytest.CaptureFixture
):
    places = {"{0}": str(folder / "0.png"), "{cut}": str(folder / "cut.png")}
    for name, place in places.items():
        arguments = [each.replace(name, place) for each in arguments]
    before = names(folder)
    out = [] if "--out" in arguments else ["--out", str(folder / "out")]
    assert app(["flow", *arguments, *out]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.rstrip("\n").splitlines()) == 1
    assert names(folder) == before


@pytest.mark.parametrize(
    "arguments", [["--box", "1,2,3"], ["--box", "a,b,c,d"], ["--heads", "all"], ["--keep", "most"]], ids=" ".join
)
def test_misspelt_options_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture):
    assert app(["flow", "--question", "Why?", *arguments]) == 2
    assert arguments[1] in capsys.readouterr().err


def test_the_examples_of_the_help_can_be_asked():
    text = flow.EXAMPLE.split("\n\n")[0].replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("multrace flow")]
    assert len(lines) == 7
    for line in lines:
        settings = parse(shlex.split(line)[1:])[1]
        settings.check()
        assert settings.settings().readings()


# ---- many questions ----


def test_averages_and_results_of_every_question(
    ask_records: Callable[..., int], folder: Path, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    records = [record(0, boxes=[[12, 17, 47, 53]]), record(1, id="a/b")]
    assert ask_records(records, *ALL[:3], "--checks=0") == 0
    out = folder / "out" / "summary"
    prompts = [same_prompt(tiny_vlm, folder), tiny_vlm.prompt_for(QUESTIONS[1])]
    options = [{"gold": each.answer, "generated": each.answer, "progress": False} for each in QUESTIONS]
    flows = [
        attention_knockout(tiny_vlm, prompts[0], boxes=[Box(12, 17, 47, 53)], **options[0]),
        attention_knockout(tiny_vlm, prompts[1], **options[1]),
    ]
    average = AverageKnockout.load(out / "knockout.safetensors")
    expected = mean_of(flows)
    assert torch.allclose(average.changes.mean, expected.changes.mean, atol=1e-4, equal_nan=True)
    assert average.counts["object -> question"] == 1
    assert (len(pd.read_csv(out / "knockout.csv")), average.filtered) == (average.change().numel(), ())
    assert AverageLogitLens.load(out / "lens.safetensors").count == 2
    assert AverageContributions.load(out / "contributions.safetensors").groups == ("constraint", "image", "last")
    assert AverageContributions.load(out / "image_to_constraint.safetensors").queries == "constraint"
    stems = ("knockout", "lens", "contributions", "image_to_constraint")
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("safetensors", "png", "csv")}
    assert set(names(out)) == expected | {"image_tokens.png", "report.json", "rows.parquet"}
    for path in out.glob("*.png"):
        Image.open(path).load()
    files = {f"{stem}.safetensors" for stem in (*stems, "failure")}
    assert set(names(own(folder, "a_b"))) == set(names(own(folder, "q0"))) == files | {"record.json"}
    table = read_rows(folder / "out")
    assert list(table["id"]) == ["q0", "a/b"] and table["right"].all()
    assert table["knockout object -> question"].isna().tolist() == [False, True]
    printed = capsys.readouterr().out
    assert "no average of failure: all 2 answers are right" in printed
    assert re.search(r"^2 questions, 2 of 2 answered rightly$", printed, re.MULTILINE)


@pytest.mark.usefixtures("undrawn")
def test_what_has_no_average_is_drawn_for_each_question(
    ask_records: Callable[..., int], folder: Path, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    assert ask_records([record(0), record(1)], "--relevance", "--checks=0") == 0
    out = folder / "out" / "summary"
    assert AverageShare.load(out / "share.safetensors").count == 2
    assert AveragePruning.load(out / "pruning.safetensors").baseline_accuracy == 1
    prompts = [same_prompt(tiny_vlm, folder), tiny_vlm.prompt_for(QUESTIONS[1])]
    pairs = zip(prompts, QUESTIONS, strict=False)
    expected = mean_of([attention_saliency(tiny_vlm, prompt, answer=each.answer) for prompt, each in pairs])
    found = AverageSaliency.load(out / "saliency.safetensors")
    assert found.flows == expected.flows
    assert torch.allclose(found.log.mean, expected.log.mean, rtol=0, atol=1e-3, equal_nan=True)
    said = r"attention x gradient, geometric mean over 2 prompts, strongest per edge: .* in layer \d"
    assert re.search(said, capsys.readouterr().out)
    stems = ("share", "saliency", "pruning")
    averages = {f"{stem}.{suffix}" for stem in stems for suffix in ("safetensors", "png", "csv")}
    assert set(names(out)) == averages | {"report.json", "rows.parquet"}
    assert {name for name in names(own(folder, "q0")) if name.endswith(".png")} == {"cam.png", "cam_overlay.png"}
    assert all(done(folder, name) == ["q0", "q1"] for name in ("cam", "share", "saliency", "pruning"))


@pytest.mark.usefixtures("undrawn")
def test_slim_contributions_have_the_average_of_full_ones(
    ask_records: Callable[..., int], folder: Path, tiny_vlm: VisionLanguageModel
):
    prompt = same_prompt(tiny_vlm, folder)
    ends = {"contributions": ("last", "all"), "image_to_constraint": ("constraint", "image")}
    assert ask_records([record(0)], "--contributions") == 0
    for name, (queries, sources) in ends.items():
        whole = attention_contributions(tiny_vlm, prompt, queries=queries, sources=sources)
        mean = AverageContributions.load(folder / "out" / "summary" / f"{name}.safetensors")
        slim = AttentionContributions.load(own(folder, "q0") / f"{name}.safetensors")
        assert (slim.weights.shape[1], whole.weights.shape[1]) == (1, 4)
        for of in ("contribution", "weight"):
            assert torch.allclose(mean.by_layer("image", of=of).float(), whole.by_layer("image", of=of), atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_wrong_answers_are_left_out_and_named(
    ask_records: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
):
    wrong = record(1, answer="Nowhere")
    records = [record(0), wrong, {"id": "no answer", "image": "2.png", "question": QUESTIONS[2].text}]
    assert ask_records(records, *ONE_FLOW, "--knockout", "--lens") == 0
    average = AverageKnockout.load(folder / "out" / "summary" / "knockout.safetensors")
    table = read_rows(folder / "out").set_index("id")
    assert table["left_out"].tolist() == [False, True, False]
    assert [table["right"][name] for name in ("q0", "q1", "no answer")] == [True, False, None]
    assert [each.generated for each in average.filtered] == [QUESTIONS[1].answer]
    printed = capsys.readouterr().out
    assert f"{QUESTIONS[1].text!r}: {QUESTIONS[1].answer!r}, not 'Nowhere'" in printed
    assert "1 of 2 answered rightly, 1 without a known right answer, 1 left out for a wrong answer" in printed
    assert ask_records(records, *ONE_FLOW, "--knockout", "--all", out="all") == 0
    assert AverageKnockout.load(folder / "all" / "summary" / "knockout.safetensors").count == 3


@pytest.mark.usefixtures("undrawn")
def test_all_answers_wrong_leaves_no_average_and_names_one(
    ask_records: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
):
    assert ask_records([record(0, answer="Nowhere")], *ONE_FLOW) == 0
    printed = capsys.readouterr().out
    assert "the model's own answer is wrong to all 1" in printed
    assert f"{FIRST.answer!r}, wrong: the right answer is 'Nowhere'" in printed
    assert names(folder / "out" / "summary") == ["report.json", "rows.parquet"]


@pytest.mark.usefixtures("undrawn")
def test_failure_is_predicted_from_right_and_wrong_answers(ask_records: Callable[..., int], folder: Path, capsys):
    records = [record(0), record(1), record(2, answer="Nowhere"), record(3, answer="Nobody")]
    assert ask_records([*records, record(4, answer=None)], "--contributions") == 0
    summary = folder / "out" / "summary"
    prediction = FailurePrediction.load(summary / "failure.safetensors")
    assert prediction.is_right.tolist() == [True, True, False, False]
    assert {"failure.png", "failure.csv"} <= set(names(summary))
    assert AverageContributions.load(summary / "contributions.safetensors").count == 5
    assert not read_rows(folder / "out")["left_out"].any()
    assert "q4: no failure: failure prediction needs the right answer" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_damaged_pictures_make_wrong_answers(opened: None, tmp_path: Path):
    assert app(["flow", "--world", "--limit=3", "--contributions", "--degrade", f"--out={tmp_path / 'out'}"]) == 0
    assert 0 < (~read_rows(tmp_path / "out")["right"]).sum() < 3
    noise = json.loads((tmp_path / "out" / "calibration.json").read_text())["values"]
    assert noise["strength"] > 1 and noise["undamaged"] == 0 and 0 < noise["errors"] < 1


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{'question': 1}", "not JSON"),
    "no object": ([1], "a list instead of an object"),
    "no question": ({"image": "0.png"}, "question"),
    "misspelt key": ({"questoin": "Why?"}, "'questoin'"),
    "boxes of another form": (record(0, id="b", boxes=[1, 2]), "boxes"),
    "the same id": (record(0), "give each its own"),
}
UNFIT: dict[str, tuple[Any, str]] = {
    "gone": (record(0, id="gone", image="gone.png"), "no picture at"),
    "cut": (record(0, id="cut", image="cut.png"), "cannot read picture"),
    "outside": (record(0, id="outside", boxes=[[0, 0, 99, 5]]), "leaves the picture"),
    "moon": (record(0, id="moon", constraint="the moon"), "'the moon' is not in"),
    "blind": ({"id": "blind", "question": "Why?"}, "needs a picture"),
    "mark": (record(0, id="mark", question=f"<image> {FIRST.text}"), "holds the image token"),
}


@pytest.mark.usefixtures("undrawn")
def test_bad_lines_are_named_and_cost_no_other(
    ask_records: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
):
    lines = [record(0), *(line for line, _ in BAD.values()), *(line for line, _ in UNFIT.values()), record(1)]
    assert ask_records(lines, *ONE_FLOW) == 1
    assert done(folder, "knockout") == ["q0", "q1"]
    printed = capsys.readouterr().out
    assert f"2 records done, {len(UNFIT)} failed, {len(BAD)} rows unreadable" in printed
    for number, (_, message) in enumerate(BAD.values(), start=2):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  row {number}: ")]
        assert message in line
    for name, (_, message) in UNFIT.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name}: ")]
        assert message in line


@pytest.mark.usefixtures("undrawn")
def test_what_fails_for_one_question_fails_for_it_alone(
    ask_records: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
):
    records = [record(0), record(1, constraint=None)]
    assert ask_records(records, "--lens", "--contributions") == 0
    assert (done(folder, "lens"), done(folder, "contributions")) == (["q0", "q1"], ["q0"])
    printed = capsys.readouterr().out
    for name in ("contributions", "image_to_constraint", "failure"):
        assert f"  q1: no {name}: " in printed


def test_nothing_to_do_is_an_error_without_a_model(
    ask_records: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(ModelToLoad, "open", lambda model: pytest.fail("the model was opened"))
    assert ask_records([UNFIT["gone"][0]]) == 2
    assert "flow failed for the only record; gone: no picture at" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that were analysed."""
    original, ids = FlowRun.compute, []

    def noted(self: FlowRun, vlm: VisionLanguageModel, task: Task) -> Outcome:
        ids.append(task.record.id)
        return original(self, vlm, task)

    monkeypatch.setattr(FlowRun, "compute", noted)
    return ids


@pytest.mark.usefixtures("undrawn")
def test_finished_questions_are_not_asked_again(
    ask_records: Callable[..., int], folder: Path, computed: list[str], capsys: pytest.CaptureFixture
):
    cut = ("--flows", "image -> question", "--windows", "2", "--checks=1")
    assert ask_records([record(0)], *cut) == 0
    five = [record(number) for number in range(5)]
    assert ask_records(five, *cut) == 0
    assert computed == ["q0", "q1", "q2", "q3", "q4"]
    checked = [AttentionKnockout.load(own(folder, id) / "knockout.safetensors").engine.checked_cells for id in computed]
    assert checked == [1, 1, 1, 0, 0], "only three questions are checked"
    assert AverageKnockout.load(folder / "out" / "summary" / "knockout.safetensors").count == 5
    assert ask_records(five, *cut, "--memory=64") == 0
    assert len(computed) == 5
    for other, words in {"--all": "keep_wrong True instead of False", "--engine=plain": "engine 'plain'"}.items():
        assert ask_records(five, *cut, other) == 2
        assert words in capsys.readouterr().err
    assert ask_records(five[:2], *cut) == 2
    assert "holds results of 3 records that this run does not have" in capsys.readouterr().err
    (own(folder, "q1") / "knockout.safetensors").write_bytes(b"broken")
    assert ask_records(five, *cut) == 0
    assert computed[5:] == ["q1"]
    assert AttentionKnockout.load(own(folder, "q1") / "knockout.safetensors").engine.checked_cells == 1


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_stays_when_a_run_is_interrupted(
    ask_records: Callable[..., int], folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
):
    original, records = FlowRun.compute, [record(0), record(1)]

    def second_breaks(self: FlowRun, vlm: VisionLanguageModel, task: Task) -> Outcome:
        if task.record.id == "q1":
            raise KeyboardInterrupt
        return original(self, vlm, task)

    with monkeypatch.context() as patched:
        patched.setattr(FlowRun, "compute", second_breaks)
        assert ask_records(records, *ONE_FLOW) == 130
    assert names(own(folder, "q0")) == ["knockout.safetensors", "record.json"]
    assert not (folder / "out" / "summary").exists()
    assert ask_records(records, *ONE_FLOW) == 0
    assert computed == ["q0", "q1"]


@pytest.mark.usefixtures("undrawn")
def test_folders_of_questions_are_harmless_and_never_shared(ask_records: Callable[..., int], folder: Path):
    ids = ["../up", ".up", "up", "Up"]
    assert ask_records([record(0, id=each) for each in ids], *ONE_FLOW) == 0
    own_names = names(folder / "out" / "records")
    assert sorted(name.rpartition("-")[0] for name in own_names) == ["Up", "up", "up", "up"]
    assert len({name.lower() for name in own_names}) == 4
    assert list(read_rows(folder / "out")["id"]) == ids


@pytest.mark.usefixtures("undrawn")
def test_the_world_is_asked_and_limits_hold(
    ask_records: Callable[..., int], opened: None, folder: Path, capsys: pytest.CaptureFixture
):
    assert app(["flow", "--world", "--limit=2", *ONE_FLOW, f"--out={folder / 'world'}"]) == 0
    assert re.search(r"^2 questions, 2 of 2 answered rightly$", capsys.readouterr().out, re.MULTILINE)
    assert ask_records([record(0), record(1), record(2)], *ONE_FLOW, "--limit=2") == 0
    assert done(folder, "knockout") == ["q0", "q1"]
