"""The help of every command: each name, class and option that it mentions exists, and its examples can be asked."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator

import multrace
import pytest
from multrace.scripts.main import COMMANDS, make_parser, parse


def parsers(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every parser with the names of the commands that lead to it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*path, name))


PARSERS = dict(parsers(make_parser()))
EVERY = pytest.mark.parametrize("path", PARSERS, ids=lambda path: " ".join(path) or "multrace")


def flags(path: tuple[str, ...]) -> set[str]:
    return {flag for action in PARSERS[path]._actions for flag in action.option_strings}


def text(path: tuple[str, ...]) -> str:
    """What the help says, on lines that are not broken by its width."""
    parser = PARSERS[path]
    helps = [action.help or "" for action in parser._actions]
    return "\n".join([parser.description or "", *helps, (parser.epilog or "").replace("\\\n", " ")])


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
        named = [other for other in PARSERS if other and re.search(rf"\bmultrace {' '.join(other)}\b", line)]
        known = flags(path).union(*map(flags, named))
        missing += [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line) if flag not in known]
    return missing


def examples(text: str) -> list[list[str]]:
    """The arguments of each example; what stands behind two spaces explains it."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  multrace ")]
    return [shlex.split(re.sub(r" +", " ", re.split(r" {3,}(?=[^\s\"-])", line)[0])) for line in lines]


@EVERY
def test_what_the_help_mentions_exists(path: tuple[str, ...]):
    assert missing_names(text(path)) == []
    assert missing_flags(path, text(path)) == []


@EVERY
def test_the_examples_can_be_asked(path: tuple[str, ...]):
    found = examples(text(path))
    assert found, "there is no example"
    for program, *arguments in found:
        assert program == "multrace"
        if "--help" not in arguments:
            parse(arguments)


@EVERY
def test_help_texts_are_phrases_of_one_form(path: tuple[str, ...]):
    """A help text is no fragment that begins with "of", has no final stop, and writes its default as (default: ...)."""
    for action in PARSERS[path]._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            assert not action.help.startswith("of "), action.help
            assert not action.help.endswith("."), action.help
            assert "(default " not in action.help, action.help


def test_a_wrong_name_and_a_wrong_option_are_noticed():
    assert missing_names("read by multrace.tracing.results: CausalTrace.open, Trace.load and CausalTrace.load") == [
        "multrace.tracing.results",
        "CausalTrace.open",
        "Trace.load",
    ]
    assert missing_flags(("answer",), "--image and --groups\nmultrace trace --positions") == ["--groups"]
    assert examples("  multrace demo --seed 3         other facts\n  nothing") == [["multrace", "demo", "--seed", "3"]]


def test_options_of_one_name_mean_the_same_in_every_command():
    assert {"--records", "--groups", "--number", "--synthetic"}.isdisjoint(set().union(*map(flags, PARSERS)))
    for path, parser in PARSERS.items():
        for action in parser._actions:
            for flag in action.option_strings:
                if flag == "--seed":
                    assert (action.type, action.default) == (int, 0), path
                if flag == "--memory":
                    assert (action.type, action.metavar) == (int, "MIB"), path
                if flag == "--limit":
                    assert (action.type, action.metavar) == (int, "N"), path
    assert set(COMMANDS) == {path[0] for path in PARSERS if path}
