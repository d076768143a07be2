"""Exclusive use of a loaded model by one thread at a time, with every run in eval mode."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import nn


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
        for module in training:
            module.training = True
