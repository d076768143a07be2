"""The command line, run in process: what it prints and writes, and one line for whatever cannot be done."""

import io
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from multrace import VisionLanguageModel, load
from multrace.editing import Delta
from multrace.scripts import answer, parse_place
from multrace.scripts.main import COMMANDS, app
from multrace.tracing import CausalTrace, SwapImage, TextNoise, causal_trace
from PIL import Image
from transformers.utils import logging as transformers_logging

QUESTION = "Who founded the company in this photo?"
CONSTRAINT = "the company in this photo"
TARGET = "red"
GROUPS = ("constraint_last", "last")

pytestmark = pytest.mark.usefixtures("load_once")


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Everything a command is given, in one folder."""

    folder: Path
    model: Path
    photo: Path
    other: Path
    out: Path

    def asked(self, command: str, **changes: str | None) -> list[str]:
        """Arguments of a command that works; changes replace an option's value, or leave it out (None)."""
        options: dict[str, str | None] = {"model": str(self.model), "question": QUESTION, "image": str(self.photo)}
        if command != "answer":
            options |= {"constraint": CONSTRAINT, "corrupt": f"swap:{self.other}", "out": str(self.out)}
        if command == "trace":
            options |= {"positions": "last", "sites": "mlp"}  # few cells
        if command == "edit":
            options |= {"target": TARGET, "where": "1:last"}
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        return [command, *(f"--{name}={value}" for name, value in options.items() if value is not None)]

    def files(self) -> dict[str, bytes | None]:
        """Every file and folder with its content."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }


def lay(folder: Path, model: Path) -> Desk:
    """Good and bad files, all in the folder."""
    for seed, name in enumerate(("photo", "other")):
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((48, 48)).save(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:100])
    (folder / "corrupt.safetensors").write_bytes(b"\xff" * 100)
    (folder / "full").mkdir()
    (folder / "full" / "something.txt").write_text("mine")
    photo, other, out = folder / "photo.png", folder / "other.png", folder / "out" / "deep"
    return Desk(folder=folder, model=model, photo=photo, other=other, out=out)


@pytest.fixture
def desk(tmp_path: Path, llava_llama_path: Path) -> Desk:
    return lay(tmp_path, llava_llama_path)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A command that edited and saved edit and model, and what it printed."""

    desk: Desk
    states: dict[str, str]
    model: Path

    @property
    def file(self) -> Path:
        return self.desk.out / "edit.safetensors"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, llava_llama_path: Path) -> Edited:
    desk = lay(tmp_path_factory.mktemp("edited"), llava_llama_path)
    saved, printed = desk.folder / "edited_model", io.StringIO()
    with redirect_stdout(printed):
        assert app(desk.asked("edit", save_model=str(saved), ending="stop")) == 0  # a random model never stops
    pairs = (line.split("  ", 1) for line in printed.getvalue().splitlines() if "  " in line)
    return Edited(desk=desk, states={name: rest.strip() for name, rest in pairs}, model=saved)


# ---- what the commands do ----


def test_answer_is_the_librarys(desk: Desk, random_llava_llama: VisionLanguageModel, capsys: pytest.CaptureFixture):
    assert app(desk.asked("answer")) == 0
    printed = capsys.readouterr()
    assert printed.out == random_llava_llama.answer(desk.photo, QUESTION) + "\n"
    assert printed.err == ""


def test_answer_sees_the_picture(desk: Desk, capsys: pytest.CaptureFixture):
    answers = []
    for image in (desk.photo, desk.other, None):
        assert app(desk.asked("answer", image=image and str(image))) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 3


def test_answer_of_a_text_only_model(desk: Desk, random_gpt2: VisionLanguageModel, capsys: pytest.CaptureFixture):
    assert app(desk.asked("answer", model=random_gpt2.name, image=None)) == 0
    assert capsys.readouterr().out == random_gpt2.answer(None, QUESTION) + "\n"


def test_answer_scores(desk: Desk, random_llava_llama: VisionLanguageModel, capsys: pytest.CaptureFixture):
    assert app(desk.asked("answer", score="Ada Example")) == 0
    score = random_llava_llama.score(desk.photo, QUESTION, "Ada Example")
    expected = f"probability of 'Ada Example': {score.probability:.4g} (log-probability {score.log_probability:.3f})"
    assert capsys.readouterr().out.splitlines()[1] == expected


def test_answer_is_as_long_as_asked(desk: Desk, random_llava_llama: VisionLanguageModel, capsys: pytest.CaptureFixture):
    assert app(desk.asked("answer", max_new_tokens="2")) == 0
    assert capsys.readouterr().out == random_llava_llama.answer(desk.photo, QUESTION, max_new_tokens=2) + "\n"


def test_trace_writes_the_librarys_trace(
    desk: Desk, random_llava_llama: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    words = {"question": "Which sport?", "constraint": "sport"}  # few rows
    assert app(desk.asked("trace", positions=None, sites=None, **words)) == 0
    assert sorted(path.name for path in desk.out.iterdir()) == ["contents.json", "trace.png", "trace.safetensors"]
    with Image.open(desk.out / "trace.png") as picture:
        picture.load()
    prompt = random_llava_llama.prompt(desk.photo, **words)
    corruption = SwapImage(desk.other)
    expected = causal_trace(random_llava_llama, prompt, corruption=corruption, progress=False)
    found = CausalTrace.load(desk.out / "trace.safetensors")
    assert found.rows == expected.rows
    assert found.kinds == ("hidden", "mlp", "attention")
    assert torch.equal(found.scores["attention"], expected.scores["attention"])
    printed = capsys.readouterr()
    assert f"total effect  {expected.total_effect:.3f}" in printed.out
    assert "engine        replay engine" in printed.out
    block = expected.causal_blocks("attention")[0]
    assert f"{block.row!r}" in printed.out
    assert f"{block.effect:.3f}" in printed.out
    assert "tracing" in printed.err


def test_trace_takes_its_options_to_the_library(desk: Desk, random_llava_llama: VisionLanguageModel):
    changes = {"corrupt": "text-noise:2", "seed": "7", "window": "2", "answer": "Paris", "sites": "attention"}
    rows = ["--positions", "image", "7", "last", "--even-if-weak"]
    assert app([*desk.asked("trace", positions=None, **changes), *rows]) == 0
    prompt = random_llava_llama.prompt(desk.photo, QUESTION, constraint=CONSTRAINT)
    options = {"sites": "attention", "window": 2, "positions": ("image", 7, "last"), "answer": "Paris"}
    options |= {"even_if_weak": True}
    corruption = TextNoise(scale=2.0, seed=7)
    expected = causal_trace(random_llava_llama, prompt, corruption=corruption, progress=False, **options)
    found = CausalTrace.load(desk.out / "trace.safetensors")
    assert (found.rows, found.window, found.seed, found.kinds) == (expected.rows, 2, 7, ("attention",))
    assert torch.equal(found.scores["attention"], expected.scores["attention"])


def test_trace_of_a_text_only_question(desk: Desk, random_llama: VisionLanguageModel):
    changes = {"model": random_llama.name, "image": None, "corrupt": "replace:Paris city"}
    assert app(desk.asked("trace", **changes)) == 0
    assert CausalTrace.load(desk.out / "trace.safetensors").layers == random_llama.layers


def test_edit_writes_an_edit_that_changes_the_answer(edited: Edited, random_llava_llama: VisionLanguageModel):
    assert sorted(path.name for path in edited.desk.out.iterdir()) == ["edit.safetensors", "report.json"]
    vlm, states = random_llava_llama, edited.states
    before = vlm.answer(edited.desk.photo, QUESTION)
    delta = Delta.load(edited.file)
    with delta.applied(vlm):
        after = vlm.answer(edited.desk.photo, QUESTION)
    assert after != before
    assert after.startswith(TARGET)
    assert (states["before"], states["with the edit"], states["after undo"]) == (before, after, before)
    (share,) = delta.shares(delta.retained(vlm))
    assert states["retained"].startswith(f"{share:.1%}")


def test_answer_with_a_saved_edit(edited: Edited, capsys: pytest.CaptureFixture):
    assert app(edited.desk.asked("answer", edit=str(edited.file))) == 0
    assert capsys.readouterr().out == edited.states["with the edit"] + "\n"


def test_a_saved_edited_model_answers_like_the_edit(edited: Edited):
    before, after = load(edited.desk.model), load(edited.model)  # from the files, unlike the commands of this file
    assert after.answer(edited.desk.photo, QUESTION) == edited.states["with the edit"]
    assert before.answer(edited.desk.photo, QUESTION) == edited.states["before"]  # the original is as it was
    names = [name for name, _ in before.model.named_parameters()]
    hashes = before.fingerprint(names), after.fingerprint(names)
    assert [name for name in names if hashes[0][name] != hashes[1][name]] == [*Delta.load(edited.file).changes]


def test_edit_where_the_trace_says(desk: Desk, random_llava_llama: VisionLanguageModel, capsys: pytest.CaptureFixture):
    assert app(desk.asked("edit", where=None, ending="stop")) == 0  # tracing is the default
    vlm = random_llava_llama
    prompt = vlm.prompt(desk.photo, QUESTION, constraint=CONSTRAINT)
    trace = causal_trace(
        vlm, prompt, corruption=SwapImage(desk.other), sites=("hidden", "mlp"), positions=GROUPS, progress=False
    )
    site = trace.edit_site()
    assert f"layer {site.layer}, token {site.token!r}: {site.reason}" in capsys.readouterr().out
    settings = Delta.load(desk.out / "edit.safetensors").settings
    assert (settings["layer"], settings["token"]) == (str(site.layer), str(site.token))


PLACES: dict[str, tuple[str, tuple[int, str | int]]] = {  # name: --where, layer and token
    "layer": ("2", (2, "last")),
    "layer from the end": ("-1", (-1, "last")),
    "layer and group": ("1:constraint_last", (1, "constraint_last")),
    "layer and a named constraint": ("1:constraint:visual", (1, "constraint:visual")),
    "layer and position": ("1:20", (1, 20)),
    "layer and position from the end": ("1:-1", (1, -1)),
}


@pytest.mark.parametrize(("where", "place"), PLACES.values(), ids=PLACES)
def test_a_place_is_a_layer_and_a_token(where: str, place: tuple[int, str | int]):
    assert (parse_place(where).layer, parse_place(where).token) == place


def test_edit_at_a_place(desk: Desk):
    assert app(desk.asked("edit", where="-2:20", corrupt=None)) == 1  # a random model does not say the target
    delta = Delta.load(desk.out / "edit.safetensors")
    assert (delta.settings["layer"], delta.settings["token"]) == ("2", "20")
    assert [*delta.changes] == ["model.language_model.layers.2.mlp.down_proj.weight"]


def test_results_replace_older_ones_and_leave_a_folder_of_something_else_alone(
    desk: Desk, capsys: pytest.CaptureFixture
):
    out = desk.folder / "results"
    assert app(desk.asked("trace", out=str(out))) == 0
    (out / "trace.png").write_text("old")
    assert app(desk.asked("trace", out=str(out))) == 0
    assert (out / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["contents.json", "trace.png", "trace.safetensors"]
    full = desk.folder / "full"
    before = sorted(path.name for path in full.iterdir())
    assert app(desk.asked("trace", out=str(full))) == 2
    assert "holds files of something else" in capsys.readouterr().err
    assert sorted(path.name for path in full.iterdir()) == before and (full / "something.txt").read_text() == "mine"


# ---- bad input: one line, exit code 2, nothing left behind ----

BAD: dict[str, tuple[str, dict[str, str | None], str]] = {  # name: command, changed options, what the line must say
    "missing image": ("answer", {"image": "{folder}/gone.png"}, "no picture at '{folder}/gone.png'"),
    "truncated image": ("answer", {"image": "{folder}/cut.png"}, "cannot read picture '{folder}/cut.png'"),
    "image that is none": ("answer", {"image": "{folder}/corrupt.safetensors"}, "cannot read picture"),
    "truncated image to swap": ("trace", {"corrupt": "swap:{folder}/cut.png"}, "cannot read picture"),
    "unknown model path": ("answer", {"model": "{folder}/gone"}, "no model directory at '{folder}/gone'"),
    "unknown model id": ("answer", {"model": "nobody/nothing"}, "'nobody/nothing'"),
    "empty model path": ("answer", {"model": ""}, "no configuration of ''"),
    "folder without a model": ("answer", {"model": "{folder}/full"}, "no usable configuration in '{folder}/full'"),
    "empty question": ("answer", {"question": "  "}, "the question is empty"),
    "empty question to trace": ("trace", {"question": ""}, "the question is empty"),
    "empty answer to score": ("answer", {"score": " "}, "the answer is empty"),
    "corrupt edit": ("answer", {"edit": "{folder}/corrupt.safetensors"}, "'{folder}/corrupt.safetensors'"),
    "missing edit": ("answer", {"edit": "{folder}/gone.safetensors"}, "'{folder}/gone.safetensors'"),
    "unknown dtype": ("answer", {"dtype": "int8"}, "in dtype 'int8'"),
    "no new tokens": ("answer", {"max_new_tokens": "0"}, "must be at least 1"),
    "absent span": (
        "trace",
        {"constraint": "the firm in this photo"},
        f"'the firm in this photo' is not in the question '{QUESTION}'; the nearest words are '{CONSTRAINT}",
    ),
    "absent span in an edit": ("edit", {"constraint": "the moon"}, "'the moon' is not in the question"),
    "empty span": ("trace", {"constraint": " "}, "the constraint is empty"),
    "misspelt corruption": ("trace", {"corrupt": "smear:3"}, "no corruption 'smear:3'"),
    "no corruption": ("trace", {"corrupt": None}, "no corruption is given; pass one"),
    "no corruption to trace an edit": ("edit", {"corrupt": None, "where": "trace"}, "needs --corrupt"),
    "noise without a number": ("trace", {"corrupt": "text-noise:loud"}, "'loud'"),
    "noise on no words": (
        "trace",
        {"corrupt": "text-noise:3", "constraint": None},
        "needs the words of the question to corrupt",
    ),
    "noise on no picture": ("trace", {"corrupt": "image-noise:3", "image": None}, "needs a picture"),
    "window of no layers": ("trace", {"window": "0"}, "no window of 0 layers"),
    "window of too many layers": ("trace", {"window": "5"}, "no window of 5 layers: the decoder has 4"),
    "unknown group": ("trace", {"positions": "nowhere"}, "no token group 'nowhere'"),
    "position out of range": ("trace", {"positions": "400"}, "no position 400"),
    "no target": ("edit", {"target": None}, "--target"),
    "empty target": ("edit", {"target": " "}, "the target of the edit"),
    "layer out of range": ("edit", {"where": "4"}, "no layer 4 in"),
    "layer out of range from the end": ("edit", {"where": "-5"}, "no layer -5 in"),
    "no place": ("edit", {"where": "somewhere"}, "no place 'somewhere'"),
    "no token after the colon": ("edit", {"where": "1:"}, "no place '1:'"),
    "unknown token": ("edit", {"where": "1:nowhere"}, "cannot edit at token 'nowhere'"),
    "output is a file": ("trace", {"out": "{folder}/photo.png"}, "'{folder}/photo.png' is not a folder"),
    "output below a file": ("edit", {"out": "{folder}/photo.png/out"}, "'{folder}/photo.png' is not a folder"),
    "model output is a file": ("edit", {"save_model": "{folder}/photo.png"}, "'{folder}/photo.png' is not a folder"),
    "model output is not empty": ("edit", {"save_model": "{folder}/full"}, "'{folder}/full' is not empty"),
    "both outputs in one place": ("edit", {"save_model": "{out}"}, "--out and --save-model are both"),
}


@pytest.mark.parametrize(("command", "changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    command: str, changes: dict[str, str | None], message: str, desk: Desk, capsys: pytest.CaptureFixture
):
    places = {"{folder}": str(desk.folder), "{out}": str(desk.out)}
    before = desk.files()
    assert app(desk.asked(command, **{name: fill(value, places) for name, value in changes.items()})) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if not line.startswith("multrace: ")] == []
    assert said.err.count("\n") == 1
    assert fill(message, places) in said.err
    assert desk.files() == before


def fill(text: str | None, places: dict[str, str]) -> str | None:
    """The text with its places filled in."""
    for name, place in places.items():
        text = text and text.replace(name, place)
    return text


BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no processor": (lambda folder: [path.unlink() for path in folder.glob("*processor*")], "no usable processor"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "junk for weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 999), "safetensors file"),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "safetensors file",
    ),
    "junk for a configuration": (lambda folder: (folder / "config.json").write_text("{"), "no usable configuration"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_MODELS.values(), ids=BROKEN_MODELS)
@pytest.mark.parametrize("command", ["answer", "trace", "edit"])
def test_a_broken_model_is_one_line(
    command: str, damage: Callable[[Path], object], message: str, desk: Desk, capsys: pytest.CaptureFixture
):
    broken = desk.folder / "broken"
    broken.mkdir()
    for path in desk.model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    damage(broken)
    before = desk.files()
    assert app(desk.asked(command, model=str(broken))) == 2
    said = capsys.readouterr()
    assert said.err.startswith("multrace: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert desk.files() == before


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_opened(desk: Desk, capsys: pytest.CaptureFixture):
    for command, option in (("trace", "out"), ("edit", "out"), ("edit", "save_model")):
        changes = {option: str(desk.photo), "model": str(desk.folder / "gone")}
        assert app(desk.asked(command, **changes)) == 2
        assert f"{str(desk.photo)!r} is not a folder" in capsys.readouterr().err
        assert app(desk.asked(command, model=str(desk.folder / "gone"))) == 2  # without it, the model is the error
        assert "no model directory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody may write to: /proc")
@pytest.mark.parametrize("command", ["trace", "edit"])
def test_a_file_system_that_cannot_be_written_is_one_line(command: str, desk: Desk, capsys: pytest.CaptureFixture):
    assert app(desk.asked(command, out="/proc/out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("multrace: cannot write to '/proc/out'")
    assert said.count("\n") == 1


def test_a_folder_in_the_place_of_a_result_is_one_line(desk: Desk, capsys: pytest.CaptureFixture):
    (desk.folder / "taken" / "trace.png").mkdir(parents=True)
    before = desk.files()
    assert app(desk.asked("trace", out=str(desk.folder / "taken"))) == 2
    assert "holds files of something else (trace.png)" in capsys.readouterr().err
    assert desk.files() == before


def test_an_edit_of_another_model_is_one_line(
    edited: Edited, random_llava_phi: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    assert app(edited.desk.asked("answer", edit=str(edited.file), model=random_llava_phi.name)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "does not fit" in said.err
    assert said.err.count("\n") == 1


def test_a_folder_that_was_there_stays_when_a_command_fails(desk: Desk):
    desk.out.mkdir(parents=True)
    assert app(desk.asked("trace", window="9")) == 2
    assert list(desk.out.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_command_that_breaks_off_while_writing_leaves_nothing(
    error: type[BaseException], desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    def break_off(*_: object, **__: object) -> None:
        assert list(desk.folder.rglob("trace.safetensors"))  # one of the two files is already there
        raise error("no space left")

    before = desk.files()
    monkeypatch.setattr(CausalTrace, "plot", break_off)
    assert app(desk.asked("trace")) == {KeyboardInterrupt: 130, OSError: 2}[error]
    assert desk.files() == before


def test_a_file_that_may_not_be_used_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "trace.png")

    monkeypatch.setattr(CausalTrace, "plot", refuse)
    assert app(desk.asked("trace")) == 2
    assert "multrace: cannot use 'trace.png': Permission denied; check that it is there" in capsys.readouterr().err


# ---- the parser and the log ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture):
    assert app([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^examples?:\n  multrace {command}\b", text, re.MULTILINE)


def test_help_names_every_command(capsys: pytest.CaptureFixture):
    assert app(["--help"]) == 0
    text = capsys.readouterr().out
    assert {"answer", "trace", "edit", "demo"} <= set(COMMANDS)
    assert [command for command in COMMANDS if not re.search(rf"^\W+{command}  ", text, re.MULTILINE)] == []


USAGE: dict[str, tuple[list[str], str]] = {
    "no command": ([], "COMMAND"),
    "unknown command": (["paint"], "paint"),
    "no question": (["answer"], "--question"),
    "unknown option": (["answer", "--question", "q", "--colour", "red"], "--colour"),
    "shortened option": (["answer", "--quest", "q"], "--question"),
    "seed that is no number": (["trace", "--question", "q", "--seed", "x"], "--seed"),
    "unknown kind of site": (["trace", "--question", "q", "--sites", "legs"], "--sites"),
    "unknown benchmark": (["bench", "sleep"], "sleep"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_misspelt_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert app(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("multrace: ")
    assert said.count("\n") == 1
    assert message in said
    assert "--help" in said


@pytest.mark.parametrize("before_command", [True, False])
def test_debug_shows_the_traceback(before_command: bool, desk: Desk, capsys: pytest.CaptureFixture):
    asked = desk.asked("answer", question="")
    assert app(["--debug", *asked] if before_command else [*asked, "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("multrace: the question is empty")


def test_our_own_bugs_are_not_hidden(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    def fail(_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(answer.Answer, "check_question", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        app(desk.asked("answer"))


def test_an_interrupted_command_leaves_with_130(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(answer.Answer, "check_question", interrupt)
    assert app(desk.asked("answer")) == 130
    assert capsys.readouterr().err == "multrace: interrupted\n"


def test_verbose_says_what_loading_proved(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = shutil.copytree(desk.model, tmp_path / "model")
    assert app([*desk.asked("answer", model=str(model)), "-v"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"multrace: {model}: llava_llama, 4 layers")
    assert "addresses proven" in said


def test_no_setting_of_the_process_is_left_changed(desk: Desk, tmp_path: Path):
    model = str(shutil.copytree(desk.model, tmp_path / "model"))
    logger = logging.getLogger("multrace")
    before = (logger.level, list(logger.handlers), transformers_logging.is_progress_bar_enabled())
    assert app([*desk.asked("answer", model=model), "-v"]) == 0
    assert app([*desk.asked("answer", model=model, question=""), "-v"]) == 2
    assert (logger.level, list(logger.handlers), transformers_logging.is_progress_bar_enabled()) == before
