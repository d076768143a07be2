"""The entry point of the command line: prepares the process before torch is imported, and stops it quietly."""

import atexit
import gc
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import lazy_loader

# imported when `main` uses it, so that an interruption of the import is handled too
_commands: Any = lazy_loader.load("multrace.scripts.main", suppress_warning=True)
INTERRUPTED, UNREAD = 130, 1


def main() -> int:
    """Return the exit code of the command line: 130 after an interruption at any time, 1 if nobody reads the output."""
    atexit.register(gc.freeze)  # else Python searches all of torch for cycles as it exits, which takes a second
    try:
        be_polite(os.environ)
        code = _commands.app()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("multrace: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `multrace ... | head -1`: the reader has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return UNREAD


def be_polite(environment: MutableMapping[str, str]) -> None:
    """Set environment variables so that waiting threads sleep, and that there are no more threads than free cores.

    OpenMP reads these variables when torch is imported. Threads that spin while they wait slow down every process,
    their own most of all, as soon as another one needs a core. Variables that the user has set stay as they are.
    """
    environment.setdefault("OMP_NUM_THREADS", str(available_cores()))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
