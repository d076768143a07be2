"""The tracing benchmark: one row of the table for each case, with seconds, counted work, differences and peak memory.

The naive way is one hooked call of the whole model per cell, with the vision tower and a clean row in it. The strong
way runs the vision tower once, then one hooked forward pass of the decoder per cell. Ours is the sweep. The cost of a
cell does not depend on the cell in the first two ways, so a few random cells are timed and multiplied.

Every way first records the clean and the corrupted run. That is done once for all maps of a prompt and is left out of
the seconds and token-layers of all three ways; its cost for the sweep is listed separately.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ...tracing.engine.cells import Runs, StateCell
from .machine import (
    Clock,
    aligned,
    counted_flops,
    describe_machine,
    forget_peak,
    in_new_process,
    largest,
    machine_facts,
    matrix_rate,
    peak_mb,
)
from .models import Recipe, Subject, check_settings, chosen_shape, open_subject, random_model, write_json
from .options import BenchTrace
from .trace_cells import Case, chosen_cases, frozen_states, make_cases, run_naive, run_strong, run_sweep


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


class Measurements:
    """EvaluationSettings rows, each in a process of its own, in which the sweep runs first.

    The two usual ways need the same memory for every cell of a sort, so they are asked once, in a process each.
    """

    def __init__(self, recipe: Recipe, timed_cells: int) -> None:
        self._recipe, self._timed_cells = recipe, timed_cells
        self._known: dict[tuple, float] = {}

    def row(self, case: Case) -> TimingRow:
        """One row of the table. The stronger way's peak is that of one cell of each kind, since it holds the states
        of all kinds; the naive way's that of one cell.
        """
        row = in_new_process(measure_anew, self._recipe, case, self._timed_cells)
        kinds = tuple({cell.kind: cell for cell in case.cells}.values())
        sort = (case.corruption, case.cells[0].is_direct)
        return replace(
            row,
            peak_mb_strong=self._asked(("strong", *sort, len(kinds)), strong_peak, replace(case, cells=kinds)),
            peak_mb_naive=self._asked(("naive", *sort), naive_peak, replace(case, cells=kinds[:1])),
        )

    def _asked(self, key: tuple, work: Callable[[Recipe, Case], float], case: Case) -> float:
        if key not in self._known:
            self._known[key] = in_new_process(work, self._recipe, case)
        return self._known[key]


def measure_anew(recipe: Recipe, case: Case, timed_cells: int) -> TimingRow:
    """The row, measured from opening the model on, with the sweep's peak."""
    return measure_row(open_subject(recipe), case, timed_cells=timed_cells)


def strong_peak(recipe: Recipe, case: Case) -> float:
    """MiB that the stronger way takes, from opening the model on."""
    subject = open_subject(recipe)
    run_strong(subject, subject.runs(case.corruption), case.cells)
    return peak_mb(subject.vlm.device)


def naive_peak(recipe: Recipe, case: Case) -> float:
    """MiB that the naive way takes, from opening the model on."""
    subject = open_subject(recipe)
    runs = subject.runs(case.corruption)
    run_naive(subject, runs, case.cells, frozen_states(subject, runs, case.cells))
    return peak_mb(subject.vlm.device)


def describe_row(row: TimingRow) -> list[str]:
    """One row of the table, with everything that was measured."""
    lines = [
        f"{row.cells}: {row.computed_cells} cells computed, {row.free_cells} free, {row.samples} samples",
        f"  seconds       {row.seconds:.1f} ({1000 * row.seconds_per_cell:.1f} ms per cell; recording "
        f"{row.recording_seconds:.1f}); "
        f"strong {row.ratio_strong:.1f}x ({row.seconds_per_cell_strong:.2f} s per cell), "
        f"naive {row.ratio_naive:.1f}x ({row.seconds_per_cell_naive:.2f} s per cell)",
        f"  token-layers  {row.token_layers}; strong {row.ratio_token_layers:.1f}x, "
        f"naive {row.ratio_token_layers_naive:.1f}x; with the recording ({row.recording_token_layers}) strong "
        f"{row.ratio_token_layers_recorded:.1f}x",
        f"  work          {row.flops / 1e12:.3f} TFLOP counted, at {row.share_of_rate:.0%} of the matrix-product rate "
        f"({row.matrix_gflops:.0f} GFLOP/s): {row.times_counted_work:.2f}x what it costs at that rate",
        f"  differences   {row.max_abs_diff:.1e} to strong, {row.max_abs_diff_naive:.1e} to naive "
        f"({row.timed_cells} cells); strong to itself {row.plain_noise:.1e}; largest effect {row.largest_effect:.3f}",
    ]
    if row.peak_mb_strong is not None:
        lines.append(
            f"  peak memory   {row.peak_mb:.0f} MiB; strong {row.peak_mb_strong:.0f}, naive {row.peak_mb_naive:.0f}"
        )
    return lines


def table(rows: Sequence[TimingRow]) -> list[str]:
    """All rows, with the figures that count."""
    head = ("cells", "token-layers", "seconds, strong", "seconds, naive", "largest difference", "peak MiB")
    return aligned([head, *(_entries(row) for row in rows)])


def _entries(row: TimingRow) -> tuple[str, ...]:
    ratios = (row.ratio_token_layers, row.ratio_strong, row.ratio_naive)
    return (row.cells, *(f"{ratio:.1f}x" for ratio in ratios), f"{row.max_abs_diff:.1e}", f"{row.peak_mb:.0f}")


def bench_trace(settings: BenchTrace) -> int:
    """Create the model in a temporary folder, measure and print each row and the table, write the JSON."""
    check_settings(settings)
    shape = chosen_shape(settings)
    cases = chosen_cases(make_cases(shape), settings.value("cells"))
    samples = {"text": settings.value("samples"), "image": settings.value("image_samples")}
    facts = machine_facts(settings.device or "cpu") | {"shape": asdict(shape)}
    print(*describe_machine(facts), "", sep="\n", flush=True)
    rows = []
    with random_model(settings, shape, samples) as recipe:
        for row in _measured(settings, recipe, cases):
            print(*describe_row(row), "", sep="\n", flush=True)
            rows.append(row)
    print(*table(rows), sep="\n")
    write_json(settings, {**facts, "samples": samples, "seed": settings.seed, "rows": [asdict(row) for row in rows]})
    return 0


def _measured(settings: BenchTrace, recipe: Recipe, cases: Sequence[Case]) -> Iterator[TimingRow]:
    """Yield each row as soon as it is measured."""
    timed_cells = settings.value("baseline_cells")
    if settings.runs_on_cuda:
        subject = open_subject(recipe)
        yield from (measure_row(subject, case, timed_cells=timed_cells) for case in cases)
    else:
        measurements = Measurements(recipe, timed_cells)
        yield from (measurements.row(case) for case in cases)
