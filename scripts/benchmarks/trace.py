"""The tracing benchmark: one row of the table for each case, with seconds, counted work, differences and peak memory.

The naive way makes one hooked call of the whole model for each cell, with the vision tower and a clean row. The strong
way runs the vision tower once, and then one hooked forward pass of the decoder for each cell. The third way is the
sweep of multrace. In the first two ways all cells cost the same, so a few random cells are timed and their time is
multiplied.

Each way first records the clean and the corrupted run. This is done once for all maps of a prompt, so the seconds and
token-layers of all three ways leave it out; its cost in the sweep is listed separately.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture, collate, patch
from ...tracing.engine.cells import CellScores, Engine, Measure, Runs, StateCell
from ...tracing.engine.measure import sweep
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.positions import window_layers
from .machine import Clock, aligned, counted_flops, forget_peak, in_new_process, largest, matrix_rate, peak_mb
from .models import Recipe, Shape, Subject, measured_rows, open_subject

WIDE = 10
"""The window of layers in the figures of ROME (arXiv 2202.05262)."""
_BLOCKS = 9
_PATCHES = 12
_EVERY = 4
"""Maps over single image tokens and blocks take every fourth layer, from 1; the others would only take longer."""

_Rows = Sequence[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table: the cells to compute under one corruption."""

    label: str
    corruption: str
    """The part of the prompt that gets noise: "text" or "image"."""
    cells: tuple[StateCell, ...]


def make_cases(shape: Shape) -> tuple[Case, ...]:
    """Return every row of the table for a prompt and a decoder of this shape."""
    return (*_text_cases(shape), *_image_cases(shape))


def _text_cases(shape: Shape) -> Iterator[Case]:
    rows = [(position,) for position in range(shape.tokens) if position not in shape.image_positions]
    for kind, window in (("hidden", 1), ("mlp", 1), ("attention", 1), ("mlp", WIDE), ("attention", WIDE)):
        cells = _cells(rows, kind, window, range(shape.layers), shape.layers)
        yield Case(label=f"text tokens, {kind}, window {window}", corruption="text", cells=cells)


def _image_cases(shape: Shape) -> Iterator[Case]:
    layers, image = shape.layers, tuple(shape.image_positions)
    question = tuple(range(image[-1] + 1, shape.tokens))
    last = question[-1:]
    every, some = range(layers), range(1, layers, _EVERY)
    tokens, patches = [(position,) for position in question], [(position,) for position in image]
    size = -(-len(image) // _BLOCKS)
    blocks = [image[start : start + size] for start in range(0, len(image), size)]
    spread = patches[:: max(1, len(patches) // _PATCHES)][:_PATCHES]
    kinds = (("hidden", 1), ("mlp", 1))
    wider = (*kinds, ("attention", 1), ("mlp", WIDE), ("attention", WIDE))
    maps = {
        "question tokens under image corruption, hidden and mlp, window 1": [
            _cells(tokens, kind, window, every, layers) for kind, window in kinds
        ],
        "last token under image corruption, every kind, windows 1 and 10": [
            _cells([last], kind, window, every, layers) for kind, window in wider
        ],
        "all image tokens as one group, hidden, window 1": [_cells([image], "hidden", 1, every, layers)],
        "the question as one group, hidden and mlp, window 1": [
            _cells([question], kind, window, every, layers) for kind, window in kinds
        ],
        f"image blocks of {size} tokens, hidden, window 1": [_cells(blocks, "hidden", 1, some, layers)],
        f"single patches, mlp, window {WIDE}": [_cells(spread, "mlp", WIDE, some, layers)],
        "every single patch, direct effect, hidden, window 1": [
            _cells(patches, "hidden", 1, some, layers, is_direct=True)
        ],
    }
    for label, parts in maps.items():
        yield Case(label=label, corruption="image", cells=tuple(cell for part in parts for cell in part))


def _cells(
    rows: _Rows, kind: str, window: int, centres: range, layers: int, *, is_direct: bool = False
) -> tuple[StateCell, ...]:
    """Return a cell for each row and centre of a window."""
    windows = [window_layers(centre, window, layers) for centre in centres]
    return tuple(
        StateCell(kind=kind, first=span[0], last=span[-1], positions=positions, is_direct=is_direct)
        for positions in rows
        for span in windows
    )


def naive_scores(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    runs: Runs,
    cells: Sequence[StateCell],
    measure: Measure,
    *,
    states: Mapping[Site, Tensor],
) -> Tensor:
    """Return (cell, metric, sample) float64 on the CPU: the scores of `plain_scores`, computed the naive way.

    The kinds of cells are hidden, mlp and attention, without severed modules.

    Args:
        vlm: The model.
        prompt: The prompt.
        runs: Its corrupted and its clean run.
        cells: The cells to compute.
        measure: The metrics of logits (row, scored position, vocab).
        states: The hidden states of the base run (`base_states`), which only direct effects need.
    """
    samples = runs.base.rows
    inputs, _ = collate([prompt] * (samples + 1), vlm.tokenizer)
    base, scores = runs.base.embeddings, []
    for cell in cells:
        edits = _edits(vlm, runs, cell, states)
        corrupt = {Site("hidden", 0): lambda embeddings: torch.cat([embeddings[:1], base.to(embeddings)])}
        with torch.no_grad(), patch(vlm, corrupt, inputs=True), patch(vlm, edits):
            logits = vlm.logits(inputs)
        scores.append(measure(logits[1:, list(runs.scored)]).double().cpu().T)
    return torch.stack(scores)


def base_states(vlm: VisionLanguageModel, runs: Runs) -> dict[Site, Tensor]:
    """Return the hidden states (sample, token, hidden) of the base run in each layer."""
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites) as states:
        vlm.forward(runs.base)
    return {site: states[site] for site in sites}


def _edits(
    vlm: VisionLanguageModel, runs: Runs, cell: StateCell, states: Mapping[Site, Tensor]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Return what each hook writes: clean states at the cell, base states at the frozen tokens of a direct effect."""
    restored = {Site(cell.kind, layer): list(cell.positions) for layer in range(cell.first, cell.last + 1)}
    edits = {site: _writing(None, positions) for site, positions in restored.items()}
    if cell.is_direct:
        frozen = [position for position in runs.frozen if position not in cell.positions]
        for layer in range(vlm.layers):
            site = Site("hidden", layer)
            freeze, restore = _writing(states[site], frozen), edits.get(site)
            edits[site] = freeze if restore is None else _both(freeze, restore)
    return edits


def _writing(states: Tensor | None, positions: list[int]) -> Callable[[Tensor], Tensor]:
    """Return a hook that writes states (sample, token, hidden), or those of the clean row, into the corrupted rows."""

    def write(output: Tensor) -> Tensor:
        written = output.clone()
        written[1:, positions] = output[:1, positions] if states is None else states[:, positions]
        return written

    return write


def _both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda output: second(first(output))


def run_sweep(
    subject: Subject,
    runs: Runs,
    cells: Sequence[StateCell],
    *,
    recorded: Callable[[Tensor, Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of the sweep, without its check of itself; `recorded` is called when both runs are recorded."""
    settings = Engine(checks=0)
    return sweep(subject.vlm, runs, cells, subject.measure, settings=settings, accept=recorded, bar=bar)


def run_strong(subject: Subject, runs: Runs, cells: Sequence[StateCell], bar: tqdm | None = None) -> Tensor:
    """Return (cell, metric, sample), computed in the strong way."""
    return plain_scores(subject.vlm, runs, cells, subject.measure, bar=bar)


def run_naive(subject: Subject, runs: Runs, cells: Sequence[StateCell], states: Mapping[Site, Tensor]) -> Tensor:
    """Return (cell, metric, sample), computed in the naive way; states: those of `frozen_states`."""
    return naive_scores(subject.vlm, subject.prompt, runs, cells, subject.measure, states=states)


def frozen_states(subject: Subject, runs: Runs, cells: Sequence[StateCell]) -> dict[Site, Tensor]:
    """Return the hidden states of the base run if a cell is a direct effect, else nothing."""
    return base_states(subject.vlm, runs) if any(cell.is_direct for cell in cells) else {}


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """A measured row. Ratios are the cost of another way over that of the sweep, without cells that cost nothing."""

    cells: str
    """The label."""
    corruption: str
    samples: int
    computed_cells: int
    free_cells: int
    seconds: float
    """Seconds of the cells of the sweep."""
    recording_seconds: float
    """Seconds of recording both runs before that."""
    seconds_per_cell: float
    seconds_per_cell_strong: float
    seconds_per_cell_naive: float
    timed_cells: int
    """Number of cells that the other two ways computed."""
    ratio_strong: float
    ratio_naive: float
    token_layers: int
    """Tokens times layers that the cells of the sweep computed."""
    recording_token_layers: int
    ratio_token_layers: float
    """The strong way over the sweep."""
    ratio_token_layers_naive: float
    """The naive way, which also computes a clean row, over the sweep."""
    ratio_token_layers_recorded: float
    """The strong way over the sweep, if this map alone bears the cost of the recording."""
    flops: float
    """Counted floating-point operations of the cells of the sweep: linear maps, attention and output head."""
    share_of_rate: float
    """These operations per second, over the measured rate of matrix products."""
    times_counted_work: float
    """The seconds, over those that the counted operations take at that rate."""
    max_abs_diff: float
    """Largest difference from the strong way on the timed cells, in probability."""
    max_abs_diff_naive: float
    plain_noise: float
    """Difference of the strong way from itself when it runs each sample on its own."""
    largest_effect: float
    """Largest effect of any cell, for comparison with the differences."""
    matrix_gflops: float
    """The measured rate of matrix products, in the same process."""
    peak_mb: float
    """Peak memory in MiB up to the end of the sweep, which runs first; see `machine.peak_mb`."""
    peak_mb_strong: float | None = None
    """Peaks of the other ways; None if they were not measured separately."""
    peak_mb_naive: float | None = None


def measure_row(subject: Subject, case: Case, *, timed_cells: int) -> TimingRow:
    """Return the row of a case, with all peaks on a CUDA device and else that of the sweep; show a progress bar.

    The naive way runs before and after the strong one, so that a busy machine slows both.
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
    """The two usual ways on some cells."""

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
    alone = run_strong(subject, replace(runs, base=runs.base.of_rows([0])), cells[:1])
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
    """Return scores, seconds per cell without the first cell, whose seconds hold the recording, and the peak."""
    device = subject.vlm.device
    forget_peak(device)
    clock = Clock(device, bar)
    scores = run_strong(subject, runs, cells if len(cells) > 1 else 2 * cells, clock)
    return scores[: len(cells)], median(clock.durations()[1:]), peak_mb(device)


def _timed_naive(
    subject: Subject, runs: Runs, cells: list[StateCell], bar: tqdm
) -> tuple[list[Tensor], list[float], float]:
    """Return the scores (metric, sample) and the seconds of each cell, and the peak."""
    device = subject.vlm.device
    forget_peak(device)
    states, scores, clock = frozen_states(subject, runs, cells), [], Clock(device, bar)
    for cell in cells:
        scores += run_naive(subject, runs, [cell], states)
        clock.update()
    return scores, clock.durations(), peak_mb(device)


class Measurements:
    """Measures rows, each in a process of its own, in which the sweep runs first.

    The two usual ways need the same memory for all cells of one sort, so each is measured once, in its own process.
    """

    def __init__(self, recipe: Recipe, timed_cells: int) -> None:
        self._recipe, self._timed_cells = recipe, timed_cells
        self._known: dict[tuple, float] = {}

    def row(self, case: Case) -> TimingRow:
        """Return one row of the table.

        The peak of the strong way is that of one cell of each kind, since it holds the states of all kinds; that of the
        naive way is that of one cell.
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


def trace_rows(recipe: Recipe, cases: Sequence[Case], *, timed_cells: int) -> Iterator[TimingRow]:
    """Yield the row of each case as soon as it is measured."""
    measurements = Measurements(recipe, timed_cells)
    here = partial(measure_row, timed_cells=timed_cells)
    return measured_rows(recipe, cases, here, lambda _recipe, case: measurements.row(case))


def measure_anew(recipe: Recipe, case: Case, timed_cells: int) -> TimingRow:
    """Return the row with the peak of the sweep, after opening the model in this process."""
    return measure_row(open_subject(recipe), case, timed_cells=timed_cells)


def strong_peak(recipe: Recipe, case: Case) -> float:
    """Return the peak memory in MiB of opening the model and the strong way."""
    subject = open_subject(recipe)
    run_strong(subject, subject.runs(case.corruption), case.cells)
    return peak_mb(subject.vlm.device)


def naive_peak(recipe: Recipe, case: Case) -> float:
    """Return the peak memory in MiB of opening the model and the naive way."""
    subject = open_subject(recipe)
    runs = subject.runs(case.corruption)
    run_naive(subject, runs, case.cells, frozen_states(subject, runs, case.cells))
    return peak_mb(subject.vlm.device)


def describe_row(row: TimingRow) -> list[str]:
    """Return lines with everything that was measured for a row."""
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
    """Return the lines of the table of all rows, with the main figures."""
    head = ("cells", "token-layers", "seconds, strong", "seconds, naive", "largest difference", "peak MiB")
    return aligned([head, *(_entries(row) for row in rows)])


def _entries(row: TimingRow) -> tuple[str, ...]:
    ratios = (row.ratio_token_layers, row.ratio_strong, row.ratio_naive)
    return (row.cells, *(f"{ratio:.1f}x" for ratio in ratios), f"{row.max_abs_diff:.1e}", f"{row.peak_mb:.0f}")
