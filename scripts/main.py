"""multrace: the command line. Whatever cannot be done as asked gets one line on stderr and exit code 2."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from .. import scripts
from ..artefacts import ArtefactError
from ..data import DataError
from ..editing import EditError
from ..models import ModelError
from ..tracing import TraceError
from . import benchmarks
from .errors import CommandError
from .options import answer, bench, demo, edit, evaluate, export, flow, moments, trace, undo
from .options.option import add_options, read

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
    "bench": bench,
}
"""Each module has HELP (one line), EXAMPLE, and either OPTIONS, a dataclass, or COMMANDS of its own."""
EXAMPLE = """examples:
  multrace answer --image photo.jpg --question "Who founded the company in this photo?"
  multrace trace --help
"""
BAD_INPUT, INTERRUPTED = 2, 130
_RAW = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
_ERRORS = (CommandError, DataError, EditError, ModelError, TraceError, ArtefactError, OSError)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a command."""

    module: str
    """Name of the module in `multrace.scripts` whose `run` takes the options."""
    options: Any
    verbose: bool
    debug: bool


def app(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of one command: 0 done, 2 bad input (one line on stderr), 130 interrupted.

    arguments: the arguments after the program's name, by default those of the process. Like argparse, the function
    raises SystemExit after --help (0) and misspelt options (2). Only the command that runs is imported.
    """
    call = parse(arguments)
    is_bench = call.module in benchmarks.__all__
    return _run(call, getattr(benchmarks, call.module) if is_bench else getattr(scripts, call.module).run)


def run_alone(module: ModuleType, arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of a module with HELP, EXAMPLE, OPTIONS and `run` that is no command: `python -m` runs it."""
    parser = _Parser(description=module.__doc__, epilog=module.EXAMPLE, parents=[_common()], **_RAW)
    parser.set_defaults(shows_traceback=False, is_verbose=False)
    add_options(parser, module.OPTIONS)
    found = parser.parse_args(arguments)
    options = read(module.OPTIONS, found)
    call = Call(module="", options=options, verbose=found.is_verbose, debug=found.shows_traceback)
    return _run(call, module.run)


def _run(call: Call, work: Callable[[Any], int]) -> int:
    with _log(verbose=call.verbose):
        try:
            return work(call.options)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED, debug=call.debug)
        except _ERRORS as error:
            return _fail(_one_line(error), BAD_INPUT, debug=call.debug)


def parse(arguments: Sequence[str] | None = None) -> Call:
    """Return the command that the arguments call. Raises SystemExit like argparse."""
    found = make_parser().parse_args(arguments)
    return Call(
        module=found.module, options=read(found.kind, found), verbose=found.is_verbose, debug=found.shows_traceback
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    description = "Find where a vision-language model keeps a fact, and change it there."
    parser = _Parser(prog="multrace", description=description, epilog=EXAMPLE, parents=[_common()], **_RAW)
    parser.set_defaults(shows_traceback=False, is_verbose=False)
    # options of their own: the defaults just set would otherwise overrule what stands before the command
    _add_commands(parser, COMMANDS, _common(), ())
    return parser


def _add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, ModuleType],
    common: argparse.ArgumentParser,
    above: tuple[str, ...],
) -> None:
    """Adds one command per module, and the commands below it; above: the names of the commands that lead here."""
    rows = parser.add_subparsers(dest="_".join((*above, "command")), required=True, metavar="COMMAND")
    for name, module in commands.items():
        row = rows.add_parser(
            name, help=module.HELP, description=module.__doc__, epilog=module.EXAMPLE, parents=[common], **_RAW
        )
        path = (*above, name.replace("-", "_"))
        if hasattr(module, "COMMANDS"):
            _add_commands(row, module.COMMANDS, common, path)
        else:
            add_options(row, module.OPTIONS)
            row.set_defaults(module="_".join(path), kind=module.OPTIONS)


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong options in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"multrace: {message}; see {self.prog} --help\n")


def _common() -> argparse.ArgumentParser:
    """The options that every command takes, before and after its name."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", dest="shows_traceback", action="store_true", help="show the traceback of an error")
    common.add_argument(
        "-v", "--verbose", dest="is_verbose", action="store_true", help="log what loading has proven about the model"
    )
    return common


@contextmanager
def _log(*, verbose: bool) -> Iterator[None]:
    """Show the library's log on stderr: warnings and, with verbose, notes."""
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


if __name__ == "__main__":  # `python -m multrace.scripts.main`, where the console script is not installed
    sys.exit(app())
