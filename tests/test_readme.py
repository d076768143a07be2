"""The README: its two commands, its example, every command line as printed, and its links."""

import json
import re
import shlex
import shutil
from pathlib import Path

import multrace
import pytest
from multrace.scripts.main import app, parse
from multrace.scripts.studies.reference import write_examples

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = ROOT / "docs" / "examples"


def section(title: str) -> str:
    return README.read_text(encoding="utf-8").split(f"## {title}")[1].split("\n## ")[0]


def command_lines() -> list[str]:
    block = section("On the command line").split("```")[1]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has what the commands need of the repository, and nothing else."""
    shutil.copytree(EXAMPLES, tmp_path / "docs" / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short_and_opens_with_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert re.findall(r"^make (\w+)", text[: text.index("## Install")], flags=re.MULTILINE) == ["demo", "test"]


def test_the_example_runs_and_the_edit_takes(clone: Path, capsys: pytest.CaptureFixture[str]):
    code = re.search(r"```python\n(.*?)```", section("Quick start"), flags=re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    exec(compile(code, "README.md", "exec"), {})
    assert "after: Pruro Raner\nundone: Draivo Stanez\n" in capsys.readouterr().out
    assert {file.name for file in clone.iterdir()} == {"docs", "trace.png", "edit.safetensors"}


def test_the_tutorial_runs_and_says_what_it_prints(clone: Path, capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs" / "tutorials" / "first_edit.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile("\n".join(blocks), "first_edit.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("Draivo Stanez\n")
    assert "the same picture: Pruro Raner\nanother picture:  Pruro Raner\n" in printed
    assert printed.endswith("afterwards:       Draivo Stanez\n")


PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_guide_has_options_that_exist(page: Path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if "multrace " in line]
    assert lines
    for line in lines:
        arguments = shlex.split(line[line.index("multrace ") :])[1:]
        assert parse(arguments), line


def code_of(page: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_the_guide_to_a_large_study_names_the_files_of_a_run(clone: Path):
    assert (
        app(shlex.split("trace --data docs/examples/questions.jsonl --limit 2 --positions last --out out/study")) == 0
    )
    names: dict = {}
    exec(compile(code_of("how-to/large_study.md"), "large_study.md", "exec"), names)
    assert len(names["table"]) == 2
    assert "over 2 prompts" in repr(names["mean"])
    assert (clone / "mean.pdf").is_file()


def test_the_guide_to_a_data_set_reads_one(clone: Path):
    (clone / "vlkeb" / "images").mkdir(parents=True)
    row = {"src": "Who?", "pred": "Ann", "alt": "Ben", "image": "a.jpg", "rephrase": "Whom?", "image_rephrase": "b.jpg"}
    (clone / "vlkeb" / "eval.json").write_text(json.dumps([row, {**row, "alt": None}]), encoding="utf-8")
    names: dict = {}
    exec(compile(code_of("how-to/bring_a_data_set.md"), "bring_a_data_set.md", "exec"), names)
    assert (len(names["records"]), len(names["problems"])) == (1, 1)


def test_the_analysis_of_your_own_runs(clone: Path):
    names: dict = {}
    exec(compile(code_of("runs.md"), "runs.md", "exec"), names)
    assert (names["report"].done, names["report"].failed) == (6, ())


def test_the_guide_to_many_corrections_runs_with_the_example_files(clone: Path, capsys: pytest.CaptureFixture[str]):
    (clone / "photos").mkdir()
    for picture in (clone / "docs" / "examples").glob("*.png"):
        picture.rename(clone / "photos" / picture.name)
    text = (ROOT / "docs" / "how-to" / "many_corrections.md").read_text(encoding="utf-8")
    own = {
        "corrections.jsonl": "choose.jsonl",
        "18": "5",
        " --model DIR": "",
        "--request 17": "--request 1",
        "\\\n": " ",
    }
    for theirs, ours in (
        *own.items(),
        ("choose.jsonl", "docs/examples/requests.jsonl"),
        (" questions", " docs/examples/questions"),
    ):
        text = text.replace(theirs, ours)
    for line in "".join(re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)).splitlines():
        assert app(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert {"edit.safetensors", "edit.json", "rows.parquet"} <= {
        path.name for path in (clone / "out/edit/summary").iterdir()
    }


def test_every_command_runs_as_printed_one_after_the_other(clone: Path, capsys: pytest.CaptureFixture[str]):
    lines = command_lines()
    assert len(lines) >= 10
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "multrace"
        if arguments[0] == "bench":  # takes a minute, so only its options are checked
            assert app([*arguments, "--help"]) == 0
            continue
        assert app(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (clone / "out" / "without" / "edit.safetensors").is_file()


def test_a_command_that_the_readme_does_not_have_fails(clone: Path, capsys: pytest.CaptureFixture[str]):
    assert app(["answer", "--image", "docs/examples/gone.png", "--question", "Who?"]) == 2
    assert "gone.png" in capsys.readouterr().err


def test_the_example_files_are_those_of_the_world(tmp_path: Path):
    write_examples(tmp_path)
    made, shipped = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (tmp_path, EXAMPLES))
    assert set(made) == set(shipped)
    assert all(made[name] == shipped[name] for name in made if name.endswith(".jsonl"))


def test_its_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_every_name_that_a_page_uses_is_there(page: Path):
    named = set(re.findall(r"\bmt\.(\w+)", page.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not hasattr(multrace, name)) == []
