"""The knockout benchmark: one row of the table for each flow, with seconds, counted work and differences.

The published way lets the whole model generate one token for each cell, with vision tower and prefill in each call. The
strong way runs the vision tower once, and then the decoder once for each cell. The third way is the sweep of multrace
over edges. The first two compute all tokens for every cell, but build masks that grow with the window: the timed cells
are spread evenly over the cells by the number of edges that are cut, and their time is multiplied.

The run without a cut is done once for all flows of a prompt, so the seconds and token-layers of all three ways leave it
out; the ratios "with the recording" add it to the sweep alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel
from ...models.guards import quiet_transformers
from ...models.replay.recording import Cut
from ...tracing.engine.cells import CellScores, EdgeCell, Engine, Measure, Runs
from ...tracing.engine.measure import sweep
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.positions import window_layers
from .machine import Clock, aligned, counted_flops, forget_peak, in_new_process, largest, matrix_rate, now, peak_mb
from .models import Recipe, Shape, Subject, measured_rows, open_subject

DROPPED = "image tokens dropped from each layer on, K = 0"
"""The label of the row beside which a truncated prefill is timed."""

REPEATS = 3
"""Number of sweeps and of truncated prefills that are timed, since one takes milliseconds; the median counts."""
_SPEAKING = ("image", "question", "last")


@dataclass(frozen=True, kw_only=True)
class FlowCase:
    """A row of the table: the cells of one flow or of several."""

    label: str
    cells: tuple[EdgeCell, ...]
    """The cells, without repetitions."""
    middle: int | None = None
    """The layer from which a truncated prefill runs on text alone; None for a row without one."""


def make_flow_cases(shape: Shape, windows: Sequence[int]) -> tuple[FlowCase, ...]:
    """Return every row of the table, with a window of each width around each layer.

    The question is the text tokens after the image without the last one.
    """
    image, after = tuple(shape.image_positions), tuple(range(shape.image_positions.stop, shape.tokens))
    question, last = after[:-1], after[-1:]
    paper = {
        "image -> last": _cut(image, last),
        "question -> last": _cut(question, last),
        "image -> question": _cut(image, question),
        "last -> last": _cut(last, last),
    }
    heads = [_cut(image, last, head) for head in range(shape.heads)]
    asked = {
        **{name: [cut] for name, cut in paper.items()},
        "image -> question and last": [_cut(image, after)],
        "image -> last, each head": heads,
        "the three flows to the last token in one call": [paper[f"{name} -> last"] for name in _SPEAKING],
        "the four flows of the paper in one call": list(paper.values()),
    }
    dropped = [
        EdgeCell(cut=_cut(image, after), first=layer, last=shape.layers - 1, is_dropped=True)
        for layer in range(shape.layers)
    ]
    return (
        *(FlowCase(label=label, cells=_cells(cuts, windows, shape.layers)) for label, cuts in asked.items()),
        FlowCase(label=DROPPED, cells=tuple(dropped), middle=shape.layers // 2),
    )


def _cut(sources: Sequence[int], targets: Sequence[int], *heads: int) -> Cut:
    return Cut(sources=frozenset(sources), targets=frozenset(targets), heads=heads)


def _cells(cuts: Sequence[Cut], windows: Sequence[int], layers: int) -> tuple[EdgeCell, ...]:
    """Return a cell for each cut, window and centre; windows that are equal at the ends of the decoder occur once."""
    spans = [window_layers(centre, window, layers) for window in windows for centre in range(layers)]
    cells = [EdgeCell(cut=cut, first=span[0], last=span[-1]) for cut in cuts for span in spans]
    return tuple(dict.fromkeys(cells))


_Pairs = Sequence[tuple[int, int]]


def published_scores(vlm: VisionLanguageModel, prompt: Prompt, cells: Sequence[EdgeCell], measure: Measure) -> Tensor:
    """Return (cell, metric) float64 on the CPU: the scores of `plain_scores` at the last token, the published way."""
    return torch.stack([_score(vlm, prompt, cell, measure) for cell in cells])


def _score(vlm: VisionLanguageModel, prompt: Prompt, cell: EdgeCell, measure: Measure) -> Tensor:
    inputs = {
        name: value.to(vlm.device, vlm.dtype if value.is_floating_point() else None)
        for name, value in prompt.inputs.items()
    }
    pairs = [(target, source) for target in sorted(cell.cut.targets) for source in sorted(cell.cut.sources)]
    blocked = {layer: copy.deepcopy(pairs) for layer in range(cell.first, cell.last + 1)}
    with torch.no_grad(), quiet_transformers(), _blocking(vlm, blocked, cell.cut.heads):
        made = cast(Any, vlm.model).generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return measure(made.logits[0][:, None].float())[0].double().cpu()


@contextmanager
def _blocking(vlm: VisionLanguageModel, blocked: Mapping[int, _Pairs], heads: Sequence[int]) -> Iterator[None]:
    """Cut (target, source) edges of layers inside the block, in these heads or, if there are none, in all."""
    with ExitStack() as stack:
        for layer, pairs in blocked.items():
            attention = vlm.module(Site("attention", layer))
            hook = attention.register_forward_pre_hook(_masked(pairs, heads, vlm.heads), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _masked(pairs: _Pairs, heads: Sequence[int], all_heads: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a hook that gives attention an additive mask, which is causal and lacks these pairs."""

    def give(_module: Any, given: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = keywords["hidden_states"]
        tokens = states.shape[1]
        seen = torch.ones(all_heads if heads else 1, tokens, tokens, dtype=torch.bool).tril()
        targets, sources = zip(*pairs, strict=True)
        for head in heads or (0,):
            seen[head, list(targets), list(sources)] = False
        mask = torch.zeros(seen.shape, dtype=states.dtype).masked_fill_(~seen, torch.finfo(states.dtype).min)
        return given, {**keywords, "attention_mask": mask[None].to(states.device)}

    return give


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A prefill that drops the image tokens in the middle of the decoder, beside one that keeps them."""

    layer: int
    """The first layer that runs on text alone."""
    seconds_full: float
    """Median of three passes of the decoder on all tokens."""
    seconds_truncated: float
    ratio_seconds: float
    ratio_token_layers: float
    """Tokens times layers of the full pass over those of the truncated one."""
    max_abs_diff: float
    """Difference of its score from that of the cell that only cuts the edges, in probability."""


def measure_saving(subject: Subject, run: Runs, layer: int, expected: Tensor) -> Saving:
    """Return the saving of dropping the image tokens from this layer on.

    The two passes take turns, after one of each that does not count.

    Args:
        subject: The model and the question.
        run: The run without a cut.
        layer: The first layer without image tokens.
        expected: (metric,), the scores of the cell that cuts the same edges, the probability first.
    """
    vlm = subject.vlm
    image = set(subject.recipe.shape.image_positions)
    text = [place for place in range(run.length) if place not in image]
    seconds: dict[str, list[float]] = {"full": [], "truncated": []}
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            started = now(vlm.device)
            vlm.forward(run.base, positions=run.scored)
            between = now(vlm.device)
            found = truncated_logits(vlm, run, layer, text)
            seconds["full"].append(between - started)
            seconds["truncated"].append(now(vlm.device) - between)
    full, truncated = (median(each[1:]) for each in seconds.values())
    whole = run.length * vlm.layers
    return Saving(
        layer=layer,
        seconds_full=full,
        seconds_truncated=truncated,
        ratio_seconds=full / truncated,
        ratio_token_layers=whole / (run.length * layer + len(text) * (vlm.layers - layer)),
        max_abs_diff=abs(float(subject.measure(found)) - float(expected[0])),
    )


def truncated_logits(vlm: VisionLanguageModel, run: Runs, layer: int, text: Sequence[int]) -> Tensor:
    """Return logits (1, scored position, vocab) of a pass that drops all but the text (ascending) from the layer on."""
    places = [list(text).index(place) for place in run.scored]
    with _text_only(vlm, layer, torch.tensor(list(text), device=vlm.device)):
        return vlm.forward(run.base, positions=places)


@contextmanager
def _text_only(vlm: VisionLanguageModel, layer: int, text: Tensor) -> Iterator[None]:
    """Give the layers from this one on the text tokens only, with their rotary positions, inside the block."""

    def give(module: Any, given: tuple[Tensor, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = given[0][:, text] if module is entry else given[0]
        angles = tuple(each[..., text, :] for each in keywords["position_embeddings"])
        return (states, *given[1:]), {**keywords, "position_embeddings": angles}

    entry = vlm.module(Site("hidden", layer))
    with ExitStack() as stack:
        for number in range(layer, vlm.layers):
            hook = vlm.module(Site("hidden", number)).register_forward_pre_hook(give, with_kwargs=True)
            stack.callback(hook.remove)
        yield


@dataclass(frozen=True, kw_only=True)
class FlowRow:
    """A measured row. Ratios are the cost of another way over that of the sweep, without cells that cost nothing."""

    flow: str
    """The label."""
    computed_cells: int
    free_cells: int
    seconds: float
    """Seconds of the cells of the sweep: the median of its runs."""
    seconds_runs: tuple[float, ...]
    """Seconds of the cells in each run."""
    recording_seconds: float
    """Seconds of recording the clean run before that: the median of its runs."""
    seconds_per_cell: float
    seconds_per_cell_strong: float
    seconds_per_cell_published: float
    timed_cells: int
    """Number of cells that the other two ways computed, each of them before and after the sweep."""
    ratio_strong: float
    ratio_published: float
    ratio_strong_recorded: float
    """In seconds, if this row alone bears the cost of the recording."""
    ratio_published_recorded: float
    token_layers: int
    """Tokens times layers that the cells of the sweep computed."""
    recording_token_layers: int
    ratio_token_layers: float
    """Either other way over the sweep; the vision tower of the published way is not counted."""
    ratio_token_layers_recorded: float
    flops: float
    """Counted floating-point operations of the cells of the sweep: linear maps, attention and output head."""
    share_of_rate: float
    """These operations per second, over the measured rate of matrix products."""
    times_counted_work: float
    """The seconds, over those that the counted operations take at that rate."""
    max_abs_diff: float
    """Largest difference from the strong way on the timed cells, in probability."""
    max_abs_diff_published: float
    max_relative_diff: float
    """Largest difference from either way in log-probability, which says more if a cut leaves little probability."""
    plain_noise: float
    """Difference of the strong way from itself with two equal rows in a pass, on one timed cell, in probability."""
    plain_relative_noise: float
    """The same in log-probability."""
    largest_effect: float
    """Largest effect of any cell, for comparison with the differences."""
    matrix_gflops: float
    """The measured rate of matrix products, in the same process."""
    peak_mb: float
    """Peak memory of the sweep in MiB, as in `machine.peak_mb`; those of the other ways are not measured."""
    saving: Saving | None = None
    """The saving of a truncated prefill; None unless the row drops tokens."""


def flow_rows(recipe: Recipe, cases: Sequence[FlowCase], *, timed_cells: int) -> Iterator[FlowRow]:
    """Yield the row of each case as soon as it is measured."""
    here = partial(measure_flow, timed_cells=timed_cells)
    return measured_rows(
        recipe, cases, here, lambda recipe, case: in_new_process(measure_flow_anew, recipe, case, timed_cells)
    )


def measure_flow_anew(recipe: Recipe, case: FlowCase, timed_cells: int) -> FlowRow:
    """Return the row, after opening the model in this process."""
    return measure_flow(open_subject(recipe), case, timed_cells=timed_cells)


def measure_flow(subject: Subject, case: FlowCase, *, timed_cells: int) -> FlowRow:
    """Return the row of a case, with a progress bar over cells.

    A sweep that is not timed comes first and gives the peak, then a call of each other way to warm up. The other ways
    run before and after the timed sweeps, so that a busy machine slows all three.
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
    twice = replace(run, base=run.base.of_rows([0, 0]))
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
    """Return the measure of logits (row, scored position, vocab): (row, 2), the probability and its logarithm."""

    def measure(logits: Tensor) -> Tensor:
        logarithm = logits[:, -1].double().log_softmax(-1)[:, subject.answer]
        return torch.stack([logarithm.exp(), logarithm], dim=-1)

    return measure


def spread_cells(cells: Sequence[EdgeCell], free: Tensor, count: int, *, seed: int) -> list[int]:
    """Return the numbers of random cells that are not free, one from each of `count` equal parts by edges cut."""
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
    """The mean of the cells."""
    published_seconds: float


class _UsualWays:
    """Computes cells one by one, in each of the usual ways in turn."""

    def __init__(self, subject: Subject, run: Runs, bar: tqdm) -> None:
        self._subject, self._run, self._bar = subject, run, bar

    def answer(self, cells: Sequence[EdgeCell]) -> _Answers:
        """Return the scores and the seconds of both ways."""
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
    """Return the scores of a sweep without its check of itself, and the seconds of its recording and of its cells."""
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
    """Return the fields of a row about seconds and work; clocked: seconds of the recording and of the cells."""
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
    """Return the number of edges that a cell cuts: pairs of tokens, times layers."""
    return len(cell.cut.sources) * len(cell.cut.targets) * (cell.last - cell.first + 1)


def describe_flow(row: FlowRow) -> list[str]:
    """Return lines with everything that was measured for a row."""
    lines = [
        f"{row.flow}: {row.computed_cells} cells computed, {row.free_cells} free",
        f"  seconds       {row.seconds:.3f} ({1000 * row.seconds_per_cell:.2f} ms per cell; recording "
        f"{row.recording_seconds:.2f}); "
        f"strong {row.ratio_strong:.1f}x ({row.seconds_per_cell_strong:.2f} s per cell), "
        f"published {row.ratio_published:.1f}x ({row.seconds_per_cell_published:.2f} s per cell); with the recording "
        f"{row.ratio_strong_recorded:.1f}x and {row.ratio_published_recorded:.1f}x",
        f"  token-layers  {row.token_layers}; {row.ratio_token_layers:.1f}x; with the recording "
        f"({row.recording_token_layers}) {row.ratio_token_layers_recorded:.1f}x",
        f"  work          {row.flops / 1e9:.2f} GFLOP counted, at {row.share_of_rate:.0%} of the matrix-product rate "
        f"({row.matrix_gflops:.0f} GFLOP/s): {row.times_counted_work:.2f}x what it costs at that rate",
        f"  differences   {row.max_abs_diff:.1e} to strong, {row.max_abs_diff_published:.1e} to published "
        f"({row.timed_cells} cells); strong to itself {row.plain_noise:.1e}; largest effect {row.largest_effect:.3f}; "
        f"in log-probability {row.max_relative_diff:.1e}, strong to itself {row.plain_relative_noise:.1e}",
        f"  peak memory   {row.peak_mb:.0f} MiB (multrace)",
    ]
    if row.saving is not None:
        lines.append(
            f"  pruning       a prefill on text alone from layer {row.saving.layer} on takes "
            f"{row.saving.seconds_truncated:.3f} s, a whole one {row.saving.seconds_full:.3f}: "
            f"{row.saving.ratio_seconds:.2f}x ({row.saving.ratio_token_layers:.2f}x token-layers); its answer is "
            f"{row.saving.max_abs_diff:.1e} from that cell's"
        )
    return lines


def flow_table(rows: Sequence[FlowRow]) -> list[str]:
    """Return the lines of the table of all rows, with the main figures."""
    head = (
        "flow",
        "cells (free)",
        "token-layers",
        "with recording",
        "seconds, strong",
        "seconds, published",
        "ms per cell",
        "largest difference",
        "in log-probability",
    )
    return [
        *aligned([head, *(_entries(row) for row in rows)]),
        f"multrace is the median of {REPEATS} sweeps. Ratios are the cost of the other ways over that of multrace, "
        "without the recording of the clean run and without free cells.",
    ]


def _entries(row: FlowRow) -> tuple[str, ...]:
    ratios = (row.ratio_token_layers, row.ratio_token_layers_recorded, row.ratio_strong, row.ratio_published)
    return (
        row.flow,
        f"{row.computed_cells} ({row.free_cells})",
        *(f"{ratio:.1f}x" for ratio in ratios),
        f"{1000 * row.seconds_per_cell:.2f}",
        f"{max(row.max_abs_diff, row.max_abs_diff_published):.1e}",
        f"{row.max_relative_diff:.1e}",
    )
