"""multrace trace: options reach the library, parts of the picture get an overlay, and records are traced in turn."""

import json
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import multrace as mt
import pytest
import torch
from matplotlib.figure import Figure
from multrace import VisionLanguageModel
from multrace.scripts.main import app
from multrace.scripts.options import CorruptionOptions
from multrace.tracing import AverageTrace, Blocks, Box, CausalTrace, ImageNoise, SwapImage, average, causal_trace
from multrace.tracing.engine import Engine
from multrace.workflow import Outcome, Task, TraceRun, read_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

ROOMS = ("workflow", "tracing", "editing", "models", "artefacts", "data")
QUESTION = "Who founded the company in this photo?"
CONSTRAINT = "the company in this photo"
OTHER_QUESTION = "Which sport does the person in the picture play?"
PERSON = "the person in the picture"

pytestmark = pytest.mark.usefixtures("unproven", "load_once")


@pytest.fixture
def folder(tmp_path: Path, make_photo: Callable[[int], Image.Image]) -> Path:
    for seed, name in enumerate(("photo", "other", "third"), start=1):
        make_photo(seed).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:100])
    return tmp_path


@pytest.fixture
def ask(folder: Path, llava_llama_path: Path) -> Callable[..., list[str]]:
    """Arguments of a trace that works, and more of them."""

    def arguments(*more: str) -> list[str]:
        options = {"model": llava_llama_path, "image": folder / "photo.png", "out": folder / "out"}
        options |= {"question": QUESTION, "constraint": CONSTRAINT}
        return ["trace", *(f"--{name}={value}" for name, value in options.items()), *more]

    return arguments


def found(folder: Path, name: str = "out") -> CausalTrace:
    return CausalTrace.load(folder / name / "trace.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one question ----


@pytest.mark.usefixtures("undrawn")
def test_every_option_reaches_the_library(
    ask: Callable[..., list[str]], folder: Path, random_llava_llama: VisionLanguageModel
):
    corrupted = ["--corrupt=image-noise:2", "--seed=7", "--direction=corrupt", "--severed=mlp", "--window=2"]
    scored = ["--answer=Paris", "--foil=Rome", "--whole-answer", "--even-if-weak"]
    scored += ["--metrics", "logit_difference", "log_probability"]
    restored = ["--sites", "attention", "hidden", "--positions", "image_rows", "7", "blocks:3", "box:0,0,20,24", "last"]
    computed = ["--engine=plain", "--checks=0", "--memory=64"]
    assert app(ask(*corrupted, *scored, *restored, *computed)) == 0
    vlm = random_llava_llama
    expected = causal_trace(
        vlm,
        vlm.prompt(folder / "photo.png", QUESTION, constraint=CONSTRAINT),
        corruption=ImageNoise(scale=2.0, seed=7),
        sites=("attention", "hidden"),
        window=2,
        positions=("image_rows", 7, Blocks(3), Box(0, 0, 20, 24), "last"),
        answer="Paris",
        foil="Rome",
        whole_answer=True,
        metrics=("logit_difference", "log_probability"),
        direction="corrupt",
        severed="mlp",
        even_if_weak=True,
        engine=Engine(name="plain", checks=0, memory=64),
        progress=False,
    )
    trace = found(folder)
    for name in (
        "rows",
        "kinds",
        "metrics",
        "direction",
        "severed",
        "window",
        "seed",
        "scale",
        "answer_ids",
        "foil_ids",
    ):
        assert getattr(trace, name) == getattr(expected, name), name
    for kind in expected.kinds:
        assert torch.equal(trace.samples[kind], expected.samples[kind])
    assert trace.engine == expected.engine
    assert trace.engine.engine == "plain"


@pytest.mark.usefixtures("undrawn")
def test_the_default_is_the_fast_engine_with_its_check(ask: Callable[..., list[str]], folder: Path, capsys):
    assert app(ask(f"--corrupt=swap:{folder / 'other.png'}", "--positions", "last", "--checks=3")) == 0
    assert (found(folder).engine.engine, found(folder).engine.checked_cells) == ("replay", 3)
    assert re.search(r"^engine +replay engine; 12 cells.*3 cells recomputed", capsys.readouterr().out, re.MULTILINE)


def test_direct_effects_of_patches_get_an_overlay(ask: Callable[..., list[str]], folder: Path, capsys):
    options = ["--corrupt=image-noise:3", "--positions", "patches", "--sites", "hidden"]
    assert app(ask(*options, "--effect=direct")) == 0
    direct = found(folder)
    assert (direct.effect, len(direct.rows)) == ("direct", 16)
    assert names(folder / "out") == ["contents.json", "overlay.png", "trace.png", "trace.safetensors"]
    with Image.open(folder / "out" / "overlay.png") as picture:
        picture.load()
    printed = capsys.readouterr().out
    assert "direct effects of restored states" in printed
    assert str(folder / "out" / "overlay.png") in printed
    assert app(ask(*options)) == 0
    assert not torch.allclose(found(folder).scores["hidden"], direct.scores["hidden"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("undrawn")
def test_an_overlay_of_an_earlier_trace_does_not_stay(ask: Callable[..., list[str]], folder: Path):
    corrupt = f"--corrupt=swap:{folder / 'other.png'}"
    assert app(ask(corrupt, "--positions", "image_quadrants")) == 0
    assert "overlay.png" in names(folder / "out")
    assert app(ask(corrupt, "--positions", "image", "last")) == 0
    assert names(folder / "out") == ["contents.json", "trace.png", "trace.safetensors"]


def test_a_folder_of_something_else_is_refused_before_the_model_is_opened(
    ask: Callable[..., list[str]], folder: Path, capsys
):
    (folder / "out").mkdir()
    (folder / "out" / "knockout.safetensors").write_text("of another question")
    assert app(ask("--corrupt=image-noise:3", "--positions", "last")) == 2
    assert "holds files of something else (knockout.safetensors)" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_layers_of_the_vision_tower(ask: Callable[..., list[str]], folder: Path):
    corrupt = f"--corrupt=swap:{folder / 'other.png'}"
    assert app(ask(corrupt, "--positions", "image", "--sites", "vision", "projector", "--window=1")) == 0
    assert found(folder).kinds == ("vision", "projector")


@pytest.mark.usefixtures("undrawn")
def test_estimates_are_counted(ask: Callable[..., list[str]], folder: Path, capsys):
    corrupt = f"--corrupt=swap:{folder / 'other.png'}"
    assert app(ask(corrupt, "--exact-cells=20")) == 0
    count = sum(int(flags.sum()) for flags in found(folder).estimated.values())
    assert count == 3 * 4 * len(found(folder).rows) - 20
    assert re.search(rf"^estimated +{count} cells; rank agreement", capsys.readouterr().out, re.MULTILINE)
    assert app(ask(corrupt, "--positions", "last")) == 0
    assert "estimated" not in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_calibrated_scale_is_stored(ask: Callable[..., list[str]], folder: Path):
    assert app(ask("--corrupt=image-noise:auto", "--positions", "last")) == 0
    trace = found(folder)
    assert trace.scale is not None
    assert "calibrated" in trace.corruption


@pytest.mark.usefixtures("undrawn")
def test_a_weak_corruption_is_refused_unless_asked_for(ask: Callable[..., list[str]], folder: Path, capsys):
    weak = ask("--corrupt=image-noise:0.0001", "--positions", "last")
    assert app(weak) == 2
    assert "does not lower the answer's probability" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert app([*weak, "--even-if-weak"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_trace_goes_on(ask: Callable[..., list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ask(f"--corrupt=swap:{folder / 'other.png'}", "--resume")
    assert app(asked) == 0
    whole = found(folder)
    assert names(folder / "out") == ["contents.json", "trace.png", "trace.safetensors"], "finished cells stay behind"
    for name in names(folder / "out"):
        (folder / "out" / name).unlink()

    def break_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CausalTrace, "plot", break_off)  # all cells are done, nothing is written
        assert app(asked) == 130
    assert names(folder / "out") == ["trace.unfinished"]
    assert app([*asked, "--checks=0"]) == 0
    assert names(folder / "out") == ["contents.json", "trace.png", "trace.safetensors"]
    for kind in whole.kinds:
        assert torch.equal(found(folder).samples[kind], whole.samples[kind])


ONE_LINE: dict[str, tuple[list[str], str]] = {
    "noise on words without a constraint": (["--corrupt=zero:constraint"], "needs the words of the question"),
    "zeros on no picture": (["--corrupt=zero"], "needs a picture"),
    "blur of no picture": (["--corrupt=blur:3"], "needs a picture"),
    "nothing to trace": ([], "pass either --question or --data"),
}


@pytest.mark.parametrize(("arguments", "message"), ONE_LINE.values(), ids=ONE_LINE)
def test_what_lacks_an_option_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    question = ["--question", QUESTION] if arguments else []
    assert app(["trace", *question, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("group", ["blocks:0", "blocks:", "box:1,2,3", "box:a,b,c,d"])
def test_misspelt_regions_are_one_line(group: str, capsys: pytest.CaptureFixture):
    assert app(["trace", "--question", QUESTION, "--positions", group]) == 2
    assert group.replace("blocks:0", "no blocks of 0") in capsys.readouterr().err


def test_groups_of_a_command_are_the_librarys_rows():
    options = CorruptionOptions(question=QUESTION, positions=("tokens", -1, Blocks(2)))
    assert options.rows("image") == ("tokens", -1, Blocks(2))
    assert CorruptionOptions(question=QUESTION).rows(("image",)) == ("image",)


def files_on_the_way(top: str) -> tuple[str, ...]:
    """The files of multrace on the stack from this one down, each once."""
    root = Path(mt.__file__).resolve().parent  # a checkout may have any name
    files = [Path(frame.filename).resolve() for frame in traceback.extract_stack()]
    paths = [file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)]
    paths = [path for path in dict.fromkeys(paths) if path.split("/")[0] in ("scripts", *ROOMS)]
    return tuple(paths[paths.index(top) :])


def test_a_request_passes_few_files_to_the_decoder_and_to_the_picture(
    ask: Callable[..., list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    decoder, picture, calls = LlamaMLP.forward, Figure.savefig, {"decoder": set(), "picture": set()}

    def noted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls["decoder"].add(files_on_the_way("scripts/main.py"))
        return decoder(self, x)

    def drawn(self: Figure, *arguments: object, **words: object) -> None:
        calls["picture"].add(files_on_the_way("scripts/main.py"))
        picture(self, *arguments, **words)

    monkeypatch.setattr(LlamaMLP, "forward", noted)
    monkeypatch.setattr(Figure, "savefig", drawn)
    assert app(ask(f"--corrupt=swap:{folder / 'other.png'}", "--positions", "last", "--checks=0")) == 0
    cells = [path for path in calls["decoder"] if "tracing/causal/trace.py" in path]
    assert cells and all(len(path[1:]) <= 5 for path in cells), cells  # from the file of the command
    assert calls["picture"] and all(len(path) <= 4 for path in calls["picture"]), calls["picture"]


# ---- records ----

GOOD = [
    {"id": "one", "image": "photo.png", "question": QUESTION, "constraint": CONSTRAINT, "corrupt": "swap:third.png"},
    {"id": "two", "image": "other.png", "question": OTHER_QUESTION, "constraint": PERSON, "answer": "chess"},
]
UNREADABLE: dict[str, tuple[object, str]] = {  # name: a line, and what is said of it
    "no JSON": ("{'question': 1}", "not JSON"),
    "no object": ([1, 2], "a list instead of an object"),
    "no question": ({"image": "photo.png"}, "question"),
    "misspelt key": ({"questoin": QUESTION}, "'questoin'"),
    "question that is no string": ({"question": 7}, "question"),
}
BAD: dict[str, tuple[object, str]] = {  # id: a line, and why it cannot be traced
    "gone": ({"image": "gone.png", "question": QUESTION}, "no picture at"),
    "cut": ({"image": "cut.png", "question": QUESTION}, "cannot read picture"),
    "blind": ({"question": QUESTION}, "needs a picture"),
    "moon": ({"image": "photo.png", "question": QUESTION, "constraint": "the moon"}, "'the moon' is not in"),
    "smear": ({"image": "photo.png", "question": QUESTION, "corrupt": "smear"}, "no corruption 'smear'"),
    "swap": ({"image": "photo.png", "question": QUESTION, "corrupt": "swap:lost.png"}, "lost.png"),
    "weak": (
        {"image": "photo.png", "question": QUESTION, "constraint": CONSTRAINT, "corrupt": "image-noise:0.0001"},
        "does not lower the answer's probability",
    ),
    "group": ({"image": "third.png", "question": QUESTION}, "no token group 'constraint_last'"),
}


def write_records(folder: Path, records: list[object]) -> Path:
    """A file of records in a folder of its own, beside which pictures have relative paths."""
    path = folder / "records.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


ROWS = ("image", "constraint_last", "last")


def trace_file(path: Path, model: Path, *more: str, out: str = "out", rows: Sequence[str] = ROWS) -> int:
    options = {"model": model, "data": path, "corrupt": "image-noise:3", "out": path.parent / out}
    sites = ["--positions", *rows, "--sites", "hidden", "mlp"]
    return app(["trace", *(f"--{name}={value}" for name, value in options.items()), *sites, *more])


def record(folder: Path, id: str) -> CausalTrace:
    (path,) = (folder / "out" / "records").glob(f"{id}-*/trace.safetensors")
    return CausalTrace.load(path)


@pytest.mark.usefixtures("undrawn")
def test_records_are_traced_each_into_its_folder(
    folder: Path, llava_llama_path: Path, random_llava_llama: VisionLanguageModel
):
    lines = [GOOD[0], "", {**GOOD[1], "foil": "tennis"}]  # a foil that no metric uses
    assert trace_file(write_records(folder, lines), llava_llama_path) == 0
    vlm, options = random_llava_llama, {"sites": ("hidden", "mlp"), "positions": ("image", "constraint_last", "last")}
    first = vlm.prompt(folder / "photo.png", QUESTION, constraint=CONSTRAINT)
    second = vlm.prompt(folder / "other.png", OTHER_QUESTION, constraint=PERSON)
    expected = [
        causal_trace(vlm, first, corruption=SwapImage(folder / "third.png"), progress=False, **options),
        causal_trace(vlm, second, corruption=ImageNoise(scale=3.0, seed=0), answer="chess", progress=False, **options),
    ]
    traces = [record(folder, id) for id in ("one", "two")]
    for trace, each in zip(traces, expected, strict=True):
        assert (trace.question, trace.answer_ids, trace.corruption) == (each.question, each.answer_ids, each.corruption)
        assert torch.equal(trace.samples["mlp"], each.samples["mlp"])
    summary = folder / "out" / "summary"
    mean = AverageTrace.load(summary / "average.safetensors")
    assert mean.count == 2
    assert torch.equal(mean.indirect_effect("hidden"), average(expected).indirect_effect("hidden"))
    table = read_rows(folder / "out")
    assert list(table["id"]) == ["one", "two"]
    assert list(table["total_effect"]) == [each.total_effect for each in expected]
    assert names(summary) == ["average.csv", "average.png", "average.safetensors", "report.json", "rows.parquet"]


@pytest.mark.usefixtures("undrawn")
def test_maps_of_records_are_drawn_on_demand(folder: Path, llava_llama_path: Path):
    assert trace_file(write_records(folder, GOOD[:1]), llava_llama_path, "--draw") == 0
    (own,) = (folder / "out" / "records").iterdir()
    assert names(own) == ["record.json", "trace.png", "trace.safetensors"]


def test_a_limit_traces_the_first_lines_only(folder: Path, llava_llama_path: Path, capsys):
    assert trace_file(write_records(folder, [GOOD[0], "", GOOD[1]]), llava_llama_path, "--limit=1") == 0
    assert list(read_rows(folder / "out")["id"]) == ["one"]
    assert "no average of trace: an average needs 2 results, there are 1" in capsys.readouterr().out
    assert names(folder / "out" / "summary") == ["report.json", "rows.parquet"]


@pytest.mark.usefixtures("undrawn")
def test_bad_records_are_named_and_cost_no_other(folder: Path, llava_llama_path: Path, capsys):
    bad = [{"id": id, **line} for id, (line, _) in BAD.items()]
    lines = [GOOD[0], *(line for line, _ in UNREADABLE.values()), *bad, GOOD[1]]
    assert trace_file(write_records(folder, lines), llava_llama_path) == 1
    printed = capsys.readouterr().out
    assert f"2 records done, {len(BAD)} failed, {len(UNREADABLE)} rows unreadable" in printed
    for id, (_, message) in BAD.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {id}: ")]
        assert message in line
    for number, (_, message) in enumerate(UNREADABLE.values(), start=2):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  row {number}: ")]
        assert message in line
    assert list(read_rows(folder / "out")["id"]) == ["one", "two"]


def test_records_none_of_which_can_be_traced_are_an_error(folder: Path, llava_llama_path: Path, capsys):
    weak = {"id": "weak", **BAD["weak"][0]}
    assert trace_file(write_records(folder, [UNREADABLE["no JSON"][0], weak]), llava_llama_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("multrace: trace failed for the only record; weak: ")
    assert "does not lower the answer's probability" in said


def test_a_model_is_opened_only_for_a_record_that_can_be_traced(folder: Path, capsys):
    gone = folder / "gone"
    assert trace_file(write_records(folder, [UNREADABLE["no JSON"][0]]), gone) == 2
    assert "there is no record to analyse; row 1" in capsys.readouterr().err
    assert trace_file(write_records(folder, [{"id": "blind", **BAD["blind"][0]}]), gone) == 2
    assert "trace failed for the only record; blind: " in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert trace_file(write_records(folder, GOOD), gone) == 2
    assert "no model directory" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_finished_records_are_not_traced_again(
    folder: Path, llava_llama_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    path, traced = write_records(folder, GOOD[:1]), []
    original = TraceRun.compute

    def noted(self: TraceRun, vlm: VisionLanguageModel, task: Task) -> Outcome:
        traced.append(task.record.id)
        return original(self, vlm, task)

    monkeypatch.setattr(TraceRun, "compute", noted)
    assert trace_file(path, llava_llama_path) == 0
    write_records(folder, GOOD)
    assert trace_file(path, llava_llama_path, "--memory=64") == 0
    assert traced == ["one", "two"]
    assert AverageTrace.load(folder / "out" / "summary" / "average.safetensors").count == 2
    assert trace_file(path, llava_llama_path, "--window=1") == 2
    assert "holds a run with other settings: settings window 1 instead of 3" in capsys.readouterr().err
    assert trace_file(write_records(folder, GOOD[1:]), llava_llama_path) == 2
    assert "holds results of 1 record that this run does not have, such as 'one'" in capsys.readouterr().err
    Image.open(folder / "third.png").rotate(90).save(folder / "other.png")  # another picture under the same name
    assert trace_file(write_records(folder, GOOD), llava_llama_path) == 2
    assert "such as 'two': the data, their pictures or the limit differ" in capsys.readouterr().err
    assert traced == ["one", "two"]


def test_a_model_that_was_edited_since_is_noticed(folder: Path, llava_llama_path: Path, capsys):
    model = shutil.copytree(llava_llama_path, folder / "model")
    path = write_records(folder, GOOD[:1])
    assert trace_file(path, model) == 0
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    save_file({**weights, name: -weights[name]}, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert trace_file(path, model) == 2
    assert "holds a run with other settings: model " in capsys.readouterr().err
    assert trace_file(path, model, out="new") == 0


@pytest.mark.usefixtures("undrawn")
def test_a_copy_of_the_model_goes_on_with_the_run(folder: Path, llava_llama_path: Path):
    assert trace_file(write_records(folder, GOOD[:1]), llava_llama_path) == 0
    copy = shutil.copytree(llava_llama_path, folder / "copy")
    assert trace_file(write_records(folder, GOOD), copy) == 0
    assert AverageTrace.load(folder / "out" / "summary" / "average.safetensors").count == 2


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_stays_when_a_run_is_interrupted(
    folder: Path, llava_llama_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = TraceRun.compute

    def second_breaks(self: TraceRun, vlm: VisionLanguageModel, task: Task) -> Outcome:
        if task.record.id == "two":
            raise KeyboardInterrupt
        return original(self, vlm, task)

    path = write_records(folder, GOOD)
    with monkeypatch.context() as patched:
        patched.setattr(TraceRun, "compute", second_breaks)
        assert trace_file(path, llava_llama_path) == 130
    assert [name.split("-")[0] for name in names(folder / "out" / "records")] == ["one"]
    assert not (folder / "out" / "summary").exists()
    assert trace_file(path, llava_llama_path) == 0
    assert AverageTrace.load(folder / "out" / "summary" / "average.safetensors").count == 2


def test_shards_are_merged_and_compared(folder: Path, llava_llama_path: Path, capsys):
    path = write_records(folder, GOOD)
    for shard in ("1/2", "2/2"):
        assert trace_file(path, llava_llama_path, f"--shard={shard}", out=shard[0]) == 0
        assert "1 left to other shards" in capsys.readouterr().out
    assert app(["merge", str(folder / "1"), str(folder / "2"), f"--out={folder / 'merged'}"]) == 0
    assert "2 records done" in capsys.readouterr().out
    assert trace_file(path, llava_llama_path) == 0
    merged, whole = (
        {
            path.relative_to(top): path.read_bytes()
            for path in top.rglob("*.*")
            if path.is_file() and ".locks" not in path.parts
        }
        for top in (folder / "merged", folder / "out")
    )
    assert merged == whole
    assert trace_file(path, llava_llama_path, "--window=1", out="narrow") == 0
    capsys.readouterr()
    csv = folder / "difference.csv"
    assert app(["compare", str(folder / "out"), str(folder / "narrow"), f"--csv={csv}"]) == 0
    printed = capsys.readouterr().out
    assert "differs in settings window 1 instead of 3" in printed
    assert re.search(r"^ *total_effect +2 ", printed, re.MULTILINE) and csv.read_text().startswith("column,records")
    assert app(["merge", str(folder / "1"), f"--out={folder / 'half'}"]) == 2
    assert "run the missing shards first" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_rows_that_differ_have_no_average(folder: Path, llava_llama_path: Path, capsys):
    path = write_records(folder, [{key: each[key] for key in ("id", "image", "question")} for each in GOOD])
    assert trace_file(path, llava_llama_path, rows=["tokens"]) == 0  # tokens are averaged by their constraint
    assert "no average of trace: traces over single tokens" in capsys.readouterr().out
    assert names(folder / "out" / "summary") == ["report.json", "rows.parquet"]


RECORD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "both": (["--question", QUESTION, "--data", "{file}"], "either --question or --data"),
    "a picture for all": (["--data", "{file}", "--image", "photo.png"], "--image belongs to one question"),
    "a run that is resumed": (["--data", "{file}", "--resume"], "a run over --data always continues"),
    "a limit of one question": (["--question", QUESTION, "--limit", "1"], "--limit belongs to --data"),
    "no lines": (["--data", "{file}", "--limit", "0"], "--limit 0: take at least one record"),
    "no such shard": (["--data", "{file}", "--shard", "3/2"], "no shard '3/2'; write i/n"),
    "no such format": (["--data", "{file}", "--format", "xml"], '"xml" for --format'),
    "no file": (["--data", "{file}.gone"], "records.jsonl.gone"),
    "an empty file": (["--data", "{empty}"], "empty"),
    "no place": (["--data", "{file}", "--out", "{file}/out"], "cannot write to"),
}


@pytest.mark.parametrize(("arguments", "message"), RECORD_OPTIONS.values(), ids=RECORD_OPTIONS)
def test_records_that_cannot_begin_are_one_line(arguments: list[str], message: str, folder: Path, capsys):
    (folder / "empty").write_text("\n \n")
    places = {"{file}": str(write_records(folder, GOOD)), "{empty}": str(folder / "empty")}
    for name, place in places.items():
        arguments = [each.replace(name, place) for each in arguments]
    before = names(folder)
    assert app(["trace", "--corrupt=image-noise:3", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()[-1:]) == 1 and "Traceback" not in said
    assert names(folder) == before
