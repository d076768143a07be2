"""The help of every command: each name, class and option that it mentions exists, and its examples can be asked."""

import importlib
import re
import shlex
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import multrace
import pytest
from cyclopts import App
from multrace.scripts.main import COMMANDS, app, make_app, parse
from multrace.scripts.options import STYLE
from multrace.scripts.studies import flag_edits, flags_splits, results
from multrace.scripts.training import train_tiny


@dataclass(frozen=True, kw_only=True)
class Help:
    """What the help of one command says."""

    text: str
    """Description, help texts of the options and examples."""
    options: dict[str, Any]
    """Spelling -> cyclopts' argument, for each option."""


def help_of(command: App) -> Help:
    arguments = [
        argument
        for argument in (
            command.assemble_argument_collection(default_parameter=STYLE["default_parameter"])
            if command.default_command
            else ()
        )
        if not is_dataclass(argument.hint)
    ]
    helps = [argument.parameter.help or "" for argument in arguments]
    text = "\n".join([command.help, *helps, (command.help_epilogue or "").replace("\\\n", " ")])
    return Help(text=text, options={name: argument for argument in arguments for name in argument.names})


def every_help() -> dict[tuple[str, ...], Help]:
    """The help of each command by the names that lead to it, and of the programs that `python -m` runs."""
    helps = {(): help_of(make_app())}
    for name in COMMANDS:
        command = make_app(name)[name]
        helps[name,] = help_of(command)
        helps |= {(name, below): help_of(command[below]) for below in command if not below.startswith("-")}
    return helps


HELPS = every_help()
ALONE = {
    module.app.name[0]: module.app
    for module in (results, flag_edits, flags_splits, importlib.import_module(train_tiny.__module__))
}
EVERY = pytest.mark.parametrize("path", HELPS, ids=lambda path: " ".join(path) or "multrace")


def missing_names(text: str) -> list[str]:
    """Dotted names of ours, and classes with a method, that do not exist."""
    names = re.findall(r"\bmultrace(?:\.\w+)+", text)
    classes = re.findall(r"(?<![\w./])[A-Z]\w+\.(?!(?:csv|json|jsonl|safetensors)\b)[a-z]\w+", text)
    rooms = (multrace, multrace.tracing, multrace.editing)
    return [name for name in names if not resolves(name)] + [
        name for name in classes if not any(has(room, name) for room in rooms)
    ]


def has(owner: object, name: str) -> bool:
    first, _, rest = name.partition(".")
    return hasattr(owner, first) and (not rest or has(getattr(owner, first), rest))


def resolves(name: str) -> bool:
    """Whether the name is a module, or what a module has."""
    return has(importlib.import_module("multrace"), name.partition(".")[2])


def missing_flags(path: tuple[str, ...], text: str) -> list[str]:
    """Options that the text mentions and neither this command has nor one that is named on the same line."""
    missing = []
    for line in text.splitlines():
        named = [other for other in HELPS if other and re.search(rf"\bmultrace {' '.join(other)}\b", line)]
        known = {"--help"}.union(HELPS[path].options, *(HELPS[other].options for other in named))
        missing += [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line) if flag not in known]
    return missing


def examples(text: str, program: str = "multrace") -> list[list[str]]:
    """The arguments of each example; what stands behind three spaces explains it."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(f"  {program} ")]
    return [shlex.split(re.sub(r" +", " ", re.split(r" {3,}(?=[^\s\"-])", line)[0])) for line in lines]


@EVERY
def test_what_the_help_mentions_exists(path: tuple[str, ...]):
    assert missing_names(HELPS[path].text) == []
    assert missing_flags(path, HELPS[path].text) == []


@EVERY
def test_the_examples_can_be_asked(path: tuple[str, ...]):
    calls = examples(HELPS[path].text)
    assert calls, "there is no example"
    for program, *arguments in calls:
        assert program == "multrace"
        if "--help" not in arguments:
            assert parse(arguments)[1] is not None


def test_examples_can_be_run_one_after_the_other():
    """A run has a folder of its own: no two examples over many records write to the same one."""
    calls = [call for shown in HELPS.values() for call in examples(shown.text) if {"--data", "--world"} & {*call}]
    folders = [parse(arguments)[1].out for _, *arguments in calls]
    assert len(folders) > 10 and len({*folders}) == len(folders), folders


@pytest.mark.parametrize("program", ALONE)
def test_the_examples_of_programs_that_are_no_commands_can_be_asked(program: str):
    command = ALONE[program]
    calls = examples(help_of(command).text, program)
    assert calls, "there is no example"
    assert missing_names(help_of(command).text) == []
    for words in calls:
        assert parse(words[len(program.split()) :], command)[1] is not None


@EVERY
def test_help_texts_are_phrases_of_one_form(path: tuple[str, ...]):
    """Each option has a help text: no fragment that begins with "of", without a final stop, "(default: ...)" in words.

    Words are for what the default value does not say; what it says is shown beside the text.
    """
    for flag, argument in HELPS[path].options.items():
        text, default = argument.parameter.help, argument.field_info.default
        assert text, flag
        assert not text.startswith("of "), text
        assert not text.endswith("."), text
        assert "(default " not in text, text
        if default not in (None, (), False):
            assert f"(default: {default})" not in text, "the default is shown already"


@EVERY
def test_help_shows_what_it_describes(path: tuple[str, ...], capsys: pytest.CaptureFixture):
    """Description, options with their defaults and choices, and the examples stand in the printed help."""
    assert app([*path, "--help"]) == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for flag, argument in HELPS[path].options.items():
        assert flag in shown
        assert " ".join(argument.parameter.help.split()) in shown
        if isinstance(argument.field_info.default, int | Path) and not isinstance(argument.field_info.default, bool):
            assert f"[default: {argument.field_info.default}]" in shown
    assert "examples: multrace" in shown
    types = re.findall(r"--[a-z-]+ (?:STR|PATH|INT|FLOAT|BOOL)\b", shown)
    assert types == [], "a value is named by what it is, not by its type"


def test_a_wrong_name_and_a_wrong_option_are_noticed():
    assert missing_names("read by multrace.tracing.results: CausalTrace.open, Trace.load and CausalTrace.load") == [
        "multrace.tracing.results",
        "CausalTrace.open",
        "Trace.load",
    ]
    assert missing_flags(("answer",), "--image and --groups\nmultrace trace --positions") == ["--groups"]
    assert examples("  multrace demo --seed 3         other facts\n  nothing") == [["multrace", "demo", "--seed", "3"]]


def test_options_of_one_name_mean_the_same_in_every_command():
    assert {"--records", "--groups", "--number", "--synthetic"}.isdisjoint(
        set().union(*(h.options for h in HELPS.values()))
    )
    for path, shown in HELPS.items():
        for flag, argument in shown.options.items():
            if flag == "--seed":
                assert (argument.hint, argument.field_info.default) == (int, 0), path
            if flag == "--memory":
                assert argument.parameter.metavar == "MIB" and argument.hint in (int, int | None), path
            if flag == "--limit":
                assert argument.parameter.metavar == "N" and argument.hint in (int, int | None), path
    assert set(COMMANDS) == {path[0] for path in HELPS if path}


def test_options_are_frozen_and_named_after_their_fields():
    for path, shown in HELPS.items():
        if shown.options:
            _, options = parse(
                [
                    *path,
                    *(
                        word
                        for flag, argument in shown.options.items()
                        if argument.required
                        for word in (flag, (argument.get_choices() or ("1",))[0])
                    ),
                ]
            )
            names = {f"--{row.name.replace('_', '-')}" for row in fields(options)}
            assert names == set(shown.options) - {"-v"}, path
            with pytest.raises(AttributeError):
                options.debug = True
