"""Beside a process that keeps a core busy, a command takes what the core is worth longer, and no more."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from multrace.scripts import available_cores

pytestmark = [pytest.mark.slow, pytest.mark.alone]
COMMAND = "import sys\nfrom multrace.scripts.door import main\nsys.argv[0] = 'multrace'\nsys.exit(main())"
THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")
LIMIT = 3.0


def seconds(folder: Path, *, limit: float | None = None, **environment: str) -> float:
    """How long a demo of two facts takes, at most the limit, after which it is stopped."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(THREADS)}
    arguments = ["demo", "--limit", "2", "--out", str(folder)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    except subprocess.TimeoutExpired:
        pass
    return time.perf_counter() - start


@contextmanager
def a_busy_core() -> Iterator[None]:
    """A process that computes on one of our cores for as long as the block lasts."""
    core = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as neighbour:
        try:
            assert neighbour.stdout.readline()
            yield
        finally:
            neighbour.kill()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that keeps a process on one core")
@pytest.mark.skipif(available_cores() < 2, reason="needs two cores, of which one is kept busy")
def test_a_busy_core_costs_a_demo_at_most_three_times_its_quiet_time(tmp_path: Path):
    quiet = seconds(tmp_path)
    with a_busy_core():
        busy = seconds(tmp_path)
        spinning = seconds(tmp_path, limit=2 * LIMIT * quiet, OMP_WAIT_POLICY="ACTIVE")
    told = f"quiet {quiet:.1f} s, beside a busy core {busy:.1f} s, there with spinning threads {spinning:.1f} s or more"
    assert busy <= LIMIT * quiet, told
    assert spinning > busy, f"threads that spin while they wait would do as well: {told}"
