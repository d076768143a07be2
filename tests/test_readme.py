"""The README: its first commands, its example and its command lines are real."""

import re
import shlex
from pathlib import Path

import multrace
import pytest
from multrace.scripts.main import make_parser

README = Path(__file__).parents[1] / "README.md"


def test_it_opens_with_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"^make (\w+)", text[: text.index("## In Python")], flags=re.MULTILINE) == ["demo", "test"]


def test_the_example_runs_and_the_edit_takes(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    was, wanted, found = re.search(r"was (.*) \| should be (.*) \| is (.*)", capsys.readouterr().out).groups()
    assert found == wanted != was
    assert {file.name for file in tmp_path.iterdir()} == {"trace.png", "edit.safetensors"}


def command_lines() -> list[str]:
    block = README.read_text(encoding="utf-8").split("## On the command line")[1].split("```")[1]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: line.split()[1])
def test_every_command_line_is_understood(line):
    program, *arguments = shlex.split(line)
    assert program == "multrace"
    assert make_parser().parse_args(arguments).command == arguments[0]


def test_its_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_every_name_that_a_page_uses_is_there(page):
    named = set(re.findall(r"\bmt\.(\w+)", page.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not hasattr(multrace, name)) == []
