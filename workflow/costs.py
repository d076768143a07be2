"""What the edits of a run cost, kept beside what they are: times differ between two runs, and results do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..editing.evaluation import CostMeter, EditCost
from .run_folder import COSTS, RunFolder


@contextmanager
def metered(folder: RunFolder, device: torch.device) -> Iterator[CostMeter]:
    """Yield a meter for the edits of one process, whose times are added to the folder when the block ends.

    A process that is killed adds none: a cost says how long the edits took whose time was taken.
    """
    meter = CostMeter(device)
    try:
        yield meter
    finally:
        if meter.seconds:
            line = {"seconds": meter.seconds, "peak_mib": meter.peak_mib(), "device": str(device)}
            with (folder.path / COSTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_cost(folder: str | Path) -> EditCost | None:
    """Return what the edits of an evaluation cost, or None if no time was taken.

    The times are those of all processes and calls of the run, in the order in which these ended; the peak is the
    highest of them. Lines that are not whole are passed over.
    """
    path = Path(folder) / COSTS
    if not path.is_file():
        return None
    parts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            parts.append(json.loads(line))
        except json.JSONDecodeError:  # of a process that was killed while it wrote
            continue
    seconds = [second for part in parts for second in part["seconds"]]
    peaks = [part["peak_mib"] for part in parts if part["peak_mib"] is not None]
    if not seconds:
        return None
    return EditCost.of(seconds, peak_mib=max(peaks, default=None), device=parts[-1]["device"])
