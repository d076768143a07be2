"""One row of the flow table: the three ways on the same cells, their seconds, counted work and differences.

"Published" lets the whole model generate one token per cell, vision tower and prefill in each call; "strong" runs the
vision tower once, then the decoder once per cell; "ours" is the sweep over edges. The first two compute all tokens for
every cell, but make masks that grow with the window: the timed cells are spread evenly over cells by the number of
edges cut, and the rest is multiplication.

The run without a cut is done once for all flows of a prompt and is left out of all three ways' seconds and
token-layers; the ratios with the recording put it back on ours alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from torch import Tensor
from tqdm import tqdm

from ...tracing.engine.cells import CellScores, EdgeCell, Engine, Measure, Runs
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.sweep import sweep
from .flow_cases import FlowCase
from .flow_published import published_scores
from .flow_truncation import Saving, measure_saving
from .peaks import forget_peak, peak_mb
from .rates import counted_flops, matrix_rate
from .subjects import Recipe, Subject, open_subject
from .timing import Clock, largest

REPEATS = 3
"""Sweeps that are timed, since one takes milliseconds; the median counts."""


@dataclass(frozen=True, kw_only=True)
class FlowRow:
    """One row of the table. Ratios are the other way's cost over ours; cells answered for free are in none of them."""

    flow: str
    """The label."""
    computed_cells: int
    free_cells: int
    seconds: float
    """What the sweep's cells took: the median of its runs."""
    seconds_runs: tuple[float, ...]
    """What they took in each run."""
    recording_seconds: float
    """What recording the clean run took before that, the median again."""
    seconds_per_cell: float
    seconds_per_cell_strong: float
    seconds_per_cell_published: float
    timed_cells: int
    """How many cells the other two ways answered, each before and after ours."""
    ratio_strong: float
    ratio_published: float
    ratio_strong_recorded: float
    """In seconds, if this row alone bears the whole recording."""
    ratio_published_recorded: float
    token_layers: int
    """Tokens times layers that the sweep's cells computed."""
    recording_token_layers: int
    ratio_token_layers: float
    """Against either other way; the published one's vision tower is not counted."""
    ratio_token_layers_recorded: float
    flops: float
    """Counted floating-point operations of the sweep's cells: linear maps, attention and output head."""
    share_of_rate: float
    """Those operations per second, over the measured rate of matrix products."""
    times_counted_work: float
    """Seconds over what the counted operations take at that rate."""
    max_abs_diff: float
    """Largest difference to the stronger way on the timed cells, in probability."""
    max_abs_diff_published: float
    max_relative_diff: float
    """Largest difference to either way in log-probability, which tells more where a cut leaves next to nothing."""
    plain_noise: float
    """How far the stronger way is from itself with two equal rows per pass, on one timed cell, in probability."""
    plain_relative_noise: float
    """The same in log-probability."""
    largest_effect: float
    """Largest difference that any cell makes: what the differences are to be compared with."""
    matrix_gflops: float
    """The measured rate, in the same process."""
    peak_mb: float
    """Peak memory of our way in MiB; see `peaks.peak_mb`. The other ways' is not measured."""
    saving: Saving | None = None
    """Of a truncated prefill, where the row drops tokens."""


def measure_flow_anew(recipe: Recipe, case: FlowCase, timed_cells: int) -> FlowRow:
    """The row, measured from opening the model on."""
    return measure_flow(open_subject(recipe), case, timed_cells=timed_cells)


def measure_flow(subject: Subject, case: FlowCase, *, timed_cells: int) -> FlowRow:
    """The row of a case, with a progress bar over cells.

    An unmeasured sweep comes first, which leaves our way's peak; then a call of either other way to warm up. These go
    before and after the measured sweeps, so that a busy machine slows all.
    """
    vlm = subject.vlm
    run = Runs.of_one(vlm.embed(subject.prompt), scored=(subject.prompt.length - 1,))
    with tqdm(total=(1 + REPEATS) * len(case.cells), desc=case.label, unit="cell", leave=False) as bar:
        forget_peak(vlm.device)
        swept, _ = _timed_sweep(subject, run, case.cells, bar)
        peak = peak_mb(vlm.device)
        chosen = spread_cells(case.cells, swept.free, timed_cells, seed=subject.recipe.seed)
        bar.total += 2 * (1 + 2 * len(chosen))
        ways = _UsualWays(subject, run, bar)
        ways.answer([case.cells[chosen[0]]])
        early = ways.answer([case.cells[index] for index in chosen])
        clocked = [_timed_sweep(subject, run, case.cells, bar)[1] for _ in range(REPEATS)]
        late = ways.answer([case.cells[index] for index in chosen])
    recordings, seconds = zip(*clocked, strict=True)
    measure = probabilities(subject)
    twice = replace(run, base=run.base.expand(2, -1, -1))
    noise = early.strong[:1] - plain_scores(vlm, twice, [case.cells[chosen[0]]], measure)[..., 0]
    found = swept.scores[chosen, :, 0]
    strong, published = (
        torch.stack([found - getattr(each, name) for each in (early, late)]) for name in ("strong", "published")
    )
    return FlowRow(
        flow=case.label,
        timed_cells=len(chosen),
        seconds_runs=seconds,
        **_costs(subject, swept, (median(recordings), median(seconds)), (early, late)),
        max_abs_diff=largest(strong[..., 0]),
        max_abs_diff_published=largest(published[..., 0]),
        max_relative_diff=largest(torch.stack([strong, published])[..., 1]),
        plain_noise=largest(noise[..., 0]),
        plain_relative_noise=largest(noise[..., 1]),
        largest_effect=largest((swept.scores - swept.base)[:, 0]),
        peak_mb=peak,
        saving=None
        if case.middle is None
        else measure_saving(subject, run, case.middle, swept.scores[case.middle, :, 0]),
    )


def probabilities(subject: Subject) -> Measure:
    """Scores (row, 2) float64 of logits (row, scored position, vocab): the answer's probability, and its logarithm."""

    def measure(logits: Tensor) -> Tensor:
        logarithm = logits[:, -1].double().log_softmax(-1)[:, subject.answer]
        return torch.stack([logarithm.exp(), logarithm], dim=-1)

    return measure


def spread_cells(cells: Sequence[EdgeCell], free: Tensor, count: int, *, seed: int) -> list[int]:
    """Numbers of some cells that are not free: random ones, one from each of equal parts by the number of edges cut."""
    computed = [number for number in range(len(cells)) if not free[number]]
    order = sorted(computed, key=lambda number: _edges(cells[number]))
    count = min(count, len(order))
    ends = [len(order) * part // count for part in range(count + 1)]
    chance = random.Random(seed)
    return [order[chance.randrange(ends[part], ends[part + 1])] for part in range(count)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answers:
    """The two usual ways on some cells."""

    strong: Tensor
    """(cell, metric)"""
    published: Tensor
    strong_seconds: float
    """Per cell, the mean."""
    published_seconds: float


class _UsualWays:
    """Answers cells one by one, by each way in turn."""

    def __init__(self, subject: Subject, run: Runs, bar: tqdm) -> None:
        self._subject, self._run, self._bar = subject, run, bar

    def answer(self, cells: Sequence[EdgeCell]) -> _Answers:
        """Scores and seconds of both ways."""
        vlm, measure = self._subject.vlm, probabilities(self._subject)
        ways: dict[str, Callable[[list[EdgeCell]], Tensor]] = {
            "strong": lambda asked: plain_scores(vlm, self._run, asked, measure)[..., 0],
            "published": lambda asked: published_scores(vlm, self._subject.prompt, asked, measure),
        }
        scores: dict[str, list[Tensor]] = {name: [] for name in ways}
        clock = Clock(vlm.device, self._bar)
        for cell in cells:
            for name, way in ways.items():
                scores[name].append(way([cell]))
                clock.update()
        seconds = clock.durations()
        return _Answers(
            **{name: torch.cat(found) for name, found in scores.items()},
            strong_seconds=fmean(seconds[::2]),
            published_seconds=fmean(seconds[1::2]),
        )


def _timed_sweep(
    subject: Subject, run: Runs, cells: Sequence[EdgeCell], bar: tqdm
) -> tuple[CellScores, tuple[float, float]]:
    """A sweep without the check of its own that results end with, and the seconds of its recording and its cells."""
    clock = Clock(subject.vlm.device)
    settings = Engine(checks=0)
    measure = probabilities(subject)
    swept = sweep(subject.vlm, run, cells, measure, settings=settings, accept=lambda *_: clock.update(), bar=bar)
    clock.update()
    recording, seconds = clock.durations()
    return swept, (recording, seconds)


def _costs(
    subject: Subject, swept: CellScores, clocked: tuple[float, float], usual: tuple[_Answers, _Answers]
) -> dict[str, float]:
    """The row's fields about seconds and work. clocked: seconds of recording and cells."""
    vlm, (recording, seconds) = subject.vlm, clocked
    strong, published = (
        fmean(getattr(each, name) for each in usual) for name in ("strong_seconds", "published_seconds")
    )
    free = int(swept.free.sum())
    computed = len(swept.free) - free
    whole, work = computed * vlm.layers * subject.prompt.length, swept.work.token_layers
    flops, rate = counted_flops(vlm, swept.work), matrix_rate(vlm.down_projection(0))
    return {
        "computed_cells": computed,
        "free_cells": free,
        "seconds": seconds,
        "recording_seconds": recording,
        "seconds_per_cell": seconds / computed,
        "seconds_per_cell_strong": strong,
        "seconds_per_cell_published": published,
        "ratio_strong": strong * computed / seconds,
        "ratio_published": published * computed / seconds,
        "ratio_strong_recorded": strong * computed / (seconds + recording),
        "ratio_published_recorded": published * computed / (seconds + recording),
        "token_layers": work,
        "recording_token_layers": swept.recording.token_layers,
        "ratio_token_layers": whole / work,
        "ratio_token_layers_recorded": whole / (work + swept.recording.token_layers),
        "flops": flops,
        "share_of_rate": flops / seconds / rate,
        "times_counted_work": seconds * rate / flops,
        "matrix_gflops": rate / 1e9,
    }


def _edges(cell: EdgeCell) -> int:
    """Pairs of tokens, times layers, that a cell keeps apart."""
    return len(cell.cut.sources) * len(cell.cut.targets) * (cell.last - cell.first + 1)
