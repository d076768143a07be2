"""multrace: the command line. One line on stderr and exit code 2 for whatever cannot be done as asked."""

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from ..artefacts.errors import ArtefactError
from ..data import DataError
from ..editing import EditError
from ..models import ModelError
from ..tracing import TraceError
from . import answer, bench, demo, edit, evaluate, export, flow, moments, results, trace, train_tiny_vlm, undo
from .errors import CommandError

COMMANDS: Mapping[str, ModuleType] = {
    "answer": answer,
    "trace": trace,
    "flow": flow,
    "edit": edit,
    "evaluate": evaluate,
    "undo": undo,
    "export": export,
    "moments": moments,
    "demo": demo,
    "train-tiny": train_tiny_vlm,
    "bench": bench,
    "results": results,
}
"""Each module has HELP (one line), EXAMPLE, and either add_arguments(parser) and run(options) -> exit code, or COMMANDS
of its own.
"""
EXAMPLE = """examples:
  multrace answer --image photo.jpg --question "Who founded the company in this photo?"
  multrace trace --help
"""
BAD_INPUT, INTERRUPTED = 2, 130
_RAW = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
_ERRORS = (CommandError, DataError, EditError, ModelError, TraceError, ArtefactError, OSError)


def app(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command: 0 done, 2 bad input (said in one line on stderr), 130 interrupted.

    arguments: those after the program's name, by default the process's own. Like argparse, it leaves by SystemExit
    after --help (0) and misspelt options (2).
    """
    options = make_parser().parse_args(arguments)
    with _log(verbose=options.verbose):
        try:
            return options.run(options)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED, debug=options.debug)
        except _ERRORS as error:
            return _fail(_one_line(error), BAD_INPUT, debug=options.debug)


def make_parser(commands: Mapping[str, ModuleType] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of all commands."""
    description = "Find where a vision-language model keeps a fact, and change it there."
    parser = _Parser(prog="multrace", description=description, epilog=EXAMPLE, parents=[_common()], **_RAW)
    parser.set_defaults(debug=False, verbose=False)
    # options of their own: the defaults just set would otherwise overrule what stands before the command
    _add_commands(parser, commands, _common(), "command")
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, ModuleType], common: argparse.ArgumentParser, name_kept: str
) -> None:
    """One command per module, and theirs below them; the chosen one's name is kept under another name each time."""
    rows = parser.add_subparsers(dest=name_kept, required=True, metavar="COMMAND")
    for name, module in commands.items():
        row = rows.add_parser(
            name, help=module.HELP, description=module.__doc__, epilog=module.EXAMPLE, parents=[common], **_RAW
        )
        if hasattr(module, "COMMANDS"):
            _add_commands(row, module.COMMANDS, common, f"{name_kept}_of_{name}")
        else:
            module.add_arguments(row)
            row.set_defaults(run=module.run)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"multrace: {message}; see {self.prog} --help\n")


def _common() -> argparse.ArgumentParser:
    """What every command understands, before and after its name."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("-v", "--verbose", action="store_true", help="log what loading has proven about the model")
    return common


@contextmanager
def _log(*, verbose: bool) -> Iterator[None]:
    """Shows the library's log on stderr: warnings, and with verbose its notes too."""
    logger = logging.getLogger("multrace")
    level = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("multrace: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"multrace: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line) or type(error).__name__
