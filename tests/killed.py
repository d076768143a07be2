"""Processes that are killed at random moments, and copies of this one, which tests of all runs share."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch


class Process(Protocol):
    """What a test asks of a process: the part of `subprocess.Popen` that `Fork` has too."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def communicate(self) -> object: ...


class Fork:
    """A copy of this process that runs an action and ends with the code that it returns.

    It has all libraries imported, which takes a new process seconds.
    """

    def __init__(self, action: Callable[[], int]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            torch.set_num_threads(1)  # the other threads are not copied
            code = action()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def communicate(self) -> None:
        self._waited(0)

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def kill_at_random(start: Callable[[], Process], kept: Callable[[], int], kills: int, longest: float = 0.5) -> int:
    """Start a process so many times and kill it once it has kept something more and worked on for a while.

    Returns how many of them were still at work when they were killed; the others had ended before.
    """
    generator, at_work = random.Random(0), 0
    for _ in range(kills):
        before, process = kept(), start()
        while process.poll() is None and kept() == before:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        at_work += process.returncode == -signal.SIGKILL
    return at_work


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a folder in which another process works; `os.walk` passes over what vanishes meanwhile."""
    return (Path(home, name) for home, _, names in os.walk(folder) for name in names)
