"""Processes that are killed at random moments, which tests of all runs share."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def kill_at_random(
    start: Callable[[], subprocess.Popen], kept: Callable[[], int], kills: int, longest: float = 0.5
) -> int:
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
