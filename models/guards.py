"""What surrounds the use of a model: one thread at a time, eval mode, undoing without interrupts, quiet libraries."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from types import TracebackType
from typing import Any

from torch import nn

from .errors import gist


class ModelLock:
    """A lock that one thread holds at a time and may take again while it holds it.

    Whoever runs a model, hooks it, replaces its attention function or writes its weights holds the model's lock for
    as long as that lasts; other threads wait. A thread that needs two models takes their locks in the same order as
    every other thread, or both may wait forever. A copied or unpickled lock is a new one that nobody holds.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["ModelLock"], tuple[()]]:
        return type(self), ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode (no dropout) inside the block; restore the mode of each on exit."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        uninterrupted(lambda: [setattr(module, "training", True) for module in training])


def uninterrupted(undo: Callable[[], object]) -> None:
    """Call a function that puts something back, and let no interrupt leave it half done.

    An interrupt (Ctrl-C) that arrives meanwhile takes effect when the function is done; one that still gets in, before
    its handler is out of the way, makes the function run again. The function must therefore do no harm if it is called
    twice. Only the main thread receives interrupts, so elsewhere the function is just called.
    """
    try:
        _shielded(undo)
    except (KeyboardInterrupt, SystemExit):
        _shielded(undo)
        raise


def _shielded(undo: Callable[[], object]) -> None:
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        undo()
        return
    late: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *received: late.append(received))
    try:
        undo()
    finally:
        signal.signal(signal.SIGINT, before)
    if late:
        before(*late[-1])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers and accelerate log errors only, and draw bars only on a terminal; restore all of it on exit."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    level, hub_had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    placing = getLogger("accelerate")
    placing_level = placing.level
    hides_bars = logging.is_progress_bar_enabled() and not is_terminal(sys.stderr)
    try:
        logging.set_verbosity(max(level, logging.ERROR))
        placing.setLevel(max(placing_level, logging.ERROR))
        if hides_bars:
            logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        placing.setLevel(placing_level)
        if hides_bars:
            logging.enable_progress_bar()  # also enables the hub's progress bars
            if not hub_had_bars:
                disable_progress_bars()


@contextmanager
def without_panics() -> Iterator[None]:
    """Raise a `RuntimeError` for a panic inside a library in Rust, which no `except Exception` would catch."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 offers no name to import
            raise
        raise RuntimeError(gist(error)) from error


def is_terminal(stream: Any) -> bool:
    """Return whether text written to the stream appears on a terminal; False if the stream is None or cannot tell."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):  # a logger in place of a stream has no isatty; a closed one raises
        return False
