"""One thread at a time uses a loaded model, and every run of it is in eval mode."""

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
    """A block in which every module is in eval mode (no dropout); afterwards each is in the mode it was in before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
