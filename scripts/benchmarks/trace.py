"""The tracing benchmark: one row of the table for each case, with seconds, counted work, differences and peak memory.

The naive way is one hooked call of the whole model per cell, with the vision tower and a clean row in it. The strong
way runs the vision tower once, then one hooked forward pass of the decoder per cell. Ours is the sweep. The cost of a
cell does not depend on the cell in the first two ways, so a few random cells are timed and multiplied.

Every way first records the clean and the corrupted run. That is done once for all maps of a prompt and is left out of
the seconds and token-layers of all three ways; its cost for the sweep is listed separately.
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

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...tracing.engine.cells import CellScores, Engine, Measure, Runs, StateCell
from ...tracing.engine.measure import sweep
from ...tracing.engine.plain import plain_scores
from ...tracing.engine.positions import window_layers
from .machine import Clock, aligned, counted_flops, forget_peak, in_new_process, largest, matrix_rate, peak_mb
from .models import Recipe, Shape, Subject, measured_rows, open_subject

WIDE = 10
"""The window that ROME's figures use."""
_BLOCKS = 9
_PATCHES = 12
_EVERY = 4
"""Maps over single image tokens and blocks take every fourth layer, from 1: the others would only take longer."""

_Rows = Sequence[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    label: str
    corruption: str
    """Which part is destroyed: "text" or "image"."""
    cells: tuple[StateCell, ...]


def make_cases(shape: Shape) -> tuple[Case, ...]:
    """Every row of the table for a prompt and a decoder of this shape."""
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
    """One cell per row and window centre."""
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
    """(cell, metric, sample) float64 on the CPU: what `plain_scores` gives, at the field's price.

    Kinds are hidden, mlp and attention, nothing is severed. states: the base run's hidden states (`base_states`),
    which only direct effects need.
    """
    samples = runs.base.shape[0]
    inputs = {name: value.expand(samples + 1, *value.shape[1:]) for name, value in prompt.inputs.items()}
    scores = []
    for cell in cells:
        edits = _edits(vlm, runs, cell, states)
        corrupt = {Site("hidden", 0): lambda embeddings: torch.cat([embeddings[:1], runs.base.to(embeddings)])}
        with torch.no_grad(), patch(vlm, corrupt, inputs=True), patch(vlm, edits):
            logits = vlm.logits(inputs)
        scores.append(measure(logits[1:, list(runs.scored)]).double().cpu().T)
    return torch.stack(scores)


def base_states(vlm: VisionLanguageModel, runs: Runs) -> dict[Site, Tensor]:
    """Per layer the hidden states of the base run (sample, token, hidden)."""
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites) as states:
        vlm.forward(inputs_embeds=runs.base)
    return {site: states[site] for site in sites}


def _edits(
    vlm: VisionLanguageModel, runs: Runs, cell: StateCell, states: Mapping[Site, Tensor]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """What each hook does: clean states at the cell's positions, base states at the frozen ones of a direct effect."""
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
    """A hook that writes states (sample, token, hidden) into the corrupted rows; None: those of the clean row."""

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
    """Our way, without the check of its own that a trace ends with. recorded: is called once both runs are."""
    settings = Engine(checks=0)
    return sweep(subject.vlm, runs, cells, subject.measure, settings=settings, accept=recorded, bar=bar)


def run_strong(subject: Subject, runs: Runs, cells: Sequence[StateCell], bar: tqdm | None = None) -> Tensor:
    """(cell, metric, sample): the stronger of the usual ways."""
    return plain_scores(subject.vlm, runs, cells, subject.measure, bar=bar)


def run_naive(subject: Subject, runs: Runs, cells: Sequence[StateCell], states: Mapping[Site, Tensor]) -> Tensor:
    """(cell, metric, sample): the usual way as scripts have it; states: `frozen_states`."""
    return naive_scores(subject.vlm, subject.prompt, runs, cells, subject.measure, states=states)


def frozen_states(subject: Subject, runs: Runs, cells: Sequence[StateCell]) -> dict[Site, Tensor]:
    """The base run's hidden states, if any of the cells is a direct effect; else nothing."""
    return base_states(subject.vlm, runs) if any(cell.is_direct for cell in cells) else {}


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
    """Measures rows, each in a process of its own, in which the sweep runs first.

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


def trace_rows(recipe: Recipe, cases: Sequence[Case], *, timed_cells: int) -> Iterator[TimingRow]:
    """Yield the row of each case as soon as it is measured."""
    measurements = Measurements(recipe, timed_cells)
    here = partial(measure_row, timed_cells=timed_cells)
    return measured_rows(recipe, cases, here, lambda _recipe, case: measurements.row(case))


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
