"""The door of the command line: sets up the process before torch is imported, and exits quietly when it has to stop."""

import atexit
import gc
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import lazy_loader

# imported where `main` can be interrupted
_commands: Any = lazy_loader.load("multrace.scripts.main", suppress_warning=True)
INTERRUPTED, UNREAD = 130, 1


def main() -> int:
    """Return the exit code of the command line: 130 for an interruption at any time, 1 if nobody reads the output."""
    atexit.register(gc.freeze)  # Python would search all of torch for cycles as it exits, which takes a second
    try:
        be_polite(os.environ)
        code = _commands.app()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("multrace: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `multrace ... | head -1`: whoever read the output has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return UNREAD


def be_polite(environment: MutableMapping[str, str]) -> None:
    """Makes waiting threads sleep instead of spin, and starts no more threads than cores are available.

    OpenMP reads these variables when torch is imported. Threads that spin while they wait slow down everybody, above
    all themselves, as soon as another process wants a core. What the user has set stays.
    """
    environment.setdefault("OMP_NUM_THREADS", str(available_cores()))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
