"""One row of the table: the three ways on the same cells, their seconds, counted work and differences.

"Naive" is one hooked call of the whole model per cell, the vision tower and a clean row in it; "strong" runs the vision
tower once, then one hooked forward pass of the decoder per cell; "ours" is the sweep. What a cell costs the first two
does not depend on the cell, so they answer a few random ones, and the rest is multiplication.

Every way first records the clean and the corrupted run. That is done once for all maps of a prompt and is left out of
all three ways' seconds and token-layers; what it costs ours is given beside them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ...tracing.engine.cells import Runs, StateCell
from .cases import Case
from .peaks import forget_peak, peak_mb
from .rates import counted_flops, matrix_rate, now
from .subjects import Subject
from .ways import frozen_states, run_naive, run_strong, run_sweep


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """One row of the table. Ratios are the other way's cost over ours; cells answered for free are in none of them."""

    cells: str
    """The label."""
    corruption: str
    samples: int
    computed_cells: int
    free_cells: int
    seconds: float
    """What the sweep's cells took."""
    recording_seconds: float
    """What recording both runs took before that."""
    seconds_per_cell: float
    seconds_per_cell_strong: float
    seconds_per_cell_naive: float
    timed_cells: int
    """How many cells the other two ways answered."""
    ratio_strong: float
    ratio_naive: float
    token_layers: int
    """Tokens times layers that the sweep's cells computed."""
    recording_token_layers: int
    ratio_token_layers: float
    """Against the stronger way."""
    ratio_token_layers_naive: float
    """Against the naive way, which also computes a clean row."""
    ratio_token_layers_recorded: float
    """Against the stronger way, if this map alone bears the whole recording."""
    flops: float
    """Counted floating-point operations of the sweep's cells: linear maps, attention and output head."""
    share_of_rate: float
    """Those operations per second, over the measured rate of matrix products."""
    times_counted_work: float
    """Seconds over what the counted operations take at that rate."""
    max_abs_diff: float
    """Largest difference to the stronger way on the timed cells, in probability."""
    max_abs_diff_naive: float
    plain_noise: float
    """How far the stronger way is from itself if it runs each sample on its own."""
    largest_effect: float
    """Largest difference that any cell makes: what the differences are to be compared with."""
    matrix_gflops: float
    """The measured rate, in the same process."""
    peak_mb: float
    """Peak memory in MiB up to the end of the sweep, which runs first; see `peaks.peak_mb`."""
    peak_mb_strong: float | None = None
    """Peaks of the other ways; None where they were not measured apart."""
    peak_mb_naive: float | None = None


def measure_row(subject: Subject, case: Case, *, timed_cells: int) -> TimingRow:
    """The row of a case, with a progress bar over cells. On a CUDA device with all peaks, else with the sweep's.

    The naive way goes before and after the stronger one, so that a busy machine slows both.
    """
    runs, vlm = subject.runs(case.corruption), subject.vlm
    device = vlm.device
    with tqdm(total=len(case.cells) + 2 * timed_cells, desc=case.label, unit="cell", leave=False) as bar:
        clock = Clock(device)
        forget_peak(device)
        swept = run_sweep(subject, runs, case.cells, recorded=lambda *_: clock.update(), bar=bar)
        clock.update()
        peak = peak_mb(device)
        computed = (~swept.free).nonzero().flatten().tolist()
        chosen = sorted(random.Random(subject.recipe.seed).sample(computed, min(timed_cells, len(computed))))
        usual = _usual_ways(subject, runs, [case.cells[index] for index in chosen], bar)
    recording, seconds = clock.durations()
    found, whole = swept.scores[chosen], len(computed) * runs.samples * vlm.layers * runs.length
    flops, rate = counted_flops(vlm, swept.work), matrix_rate(vlm.down_projection(0))
    return TimingRow(
        cells=case.label,
        corruption=case.corruption,
        samples=runs.samples,
        computed_cells=len(computed),
        free_cells=len(case.cells) - len(computed),
        seconds=seconds,
        recording_seconds=recording,
        seconds_per_cell=seconds / len(computed),
        seconds_per_cell_strong=usual.strong_seconds,
        seconds_per_cell_naive=usual.naive_seconds,
        timed_cells=len(chosen),
        ratio_strong=usual.strong_seconds * len(computed) / seconds,
        ratio_naive=usual.naive_seconds * len(computed) / seconds,
        token_layers=swept.work.token_layers,
        recording_token_layers=swept.recording.token_layers,
        ratio_token_layers=whole / swept.work.token_layers,
        ratio_token_layers_naive=whole * (1 + 1 / runs.samples) / swept.work.token_layers,
        ratio_token_layers_recorded=whole / (swept.work.token_layers + swept.recording.token_layers),
        flops=flops,
        share_of_rate=flops / seconds / rate,
        times_counted_work=seconds * rate / flops,
        max_abs_diff=largest(found - usual.strong),
        max_abs_diff_naive=largest(found - usual.naive),
        plain_noise=usual.noise,
        largest_effect=largest(swept.scores - swept.base),
        matrix_gflops=rate / 1e9,
        peak_mb=peak,
        peak_mb_strong=usual.strong_peak,
        peak_mb_naive=usual.naive_peak,
    )


class Clock:
    """Notes when each of several steps is done. May stand in for a progress bar, which it then passes on."""

    def __init__(self, device: torch.device, bar: tqdm | None = None) -> None:
        self._device, self._bar = device, bar
        self._marks = [now(device)]

    def update(self, count: int = 1) -> None:
        """One more step is done."""
        self._marks.append(now(self._device))
        if self._bar is not None:
            self._bar.update(count)

    def durations(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in pairwise(self._marks)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Usual:
    """The other two ways on some cells."""

    strong: Tensor
    """(cell, metric, sample)"""
    naive: Tensor
    strong_seconds: float
    """Per cell."""
    naive_seconds: float
    noise: float
    strong_peak: float | None
    naive_peak: float | None


def _usual_ways(subject: Subject, runs: Runs, cells: list[StateCell], bar: tqdm) -> _Usual:
    device, early = subject.vlm.device, (len(cells) + 1) // 2
    naive, seconds, naive_peak = _timed_naive(subject, runs, cells[:early], bar)
    strong, strong_seconds, strong_peak = _timed_strong(subject, runs, cells, bar)
    late, late_seconds, _ = _timed_naive(subject, runs, cells[early:], bar)
    alone = run_strong(subject, replace(runs, base=runs.base[:1]), cells[:1])
    is_apart = device.type == "cuda"
    return _Usual(
        strong=strong,
        naive=torch.stack(naive + late),
        strong_seconds=strong_seconds,
        naive_seconds=median(seconds + late_seconds),
        noise=largest(strong[:1, :, :1] - alone),
        strong_peak=strong_peak if is_apart else None,
        naive_peak=naive_peak if is_apart else None,
    )


def _timed_strong(subject: Subject, runs: Runs, cells: list[StateCell], bar: tqdm) -> tuple[Tensor, float, float]:
    """Scores, seconds per cell, and the peak. The first cell's seconds hold the recording, so they do not count."""
    device = subject.vlm.device
    forget_peak(device)
    clock = Clock(device, bar)
    scores = run_strong(subject, runs, cells if len(cells) > 1 else 2 * cells, clock)
    return scores[: len(cells)], median(clock.durations()[1:]), peak_mb(device)


def _timed_naive(
    subject: Subject, runs: Runs, cells: list[StateCell], bar: tqdm
) -> tuple[list[Tensor], list[float], float]:
    """Scores (metric, sample) and seconds of each cell, and the peak."""
    device = subject.vlm.device
    forget_peak(device)
    states, scores, clock = frozen_states(subject, runs, cells), [], Clock(device, bar)
    for cell in cells:
        scores += run_naive(subject, runs, [cell], states)
        clock.update()
    return scores, clock.durations(), peak_mb(device)


def largest(difference: Tensor) -> float:
    """The largest absolute value."""
    return float(difference.abs().max())
