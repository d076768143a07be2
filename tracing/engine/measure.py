"""Scores of cells by the selected engine: the exact fast sweep if the model allows it, else plain forward passes.

The sweep computes for each cell only the layers and positions that the cell can change. A cell starts at the output of
its first layer, which the base run already holds except for the positions that the cell changes; keys and values of all
positions that it cannot change come from the recorded runs, which all cells share.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ...models import ReplayError, VisionLanguageModel
from ...models.replay.recording import index_of, places
from ...models.replay.replay import Own, Replay, Work, replaying
from .cells import (
    Cell,
    CellScores,
    Chunk,
    EdgeCell,
    Engine,
    EngineReport,
    Measure,
    Runs,
    StateCell,
    TraceError,
    all_edges,
    halved,
    make_plan,
    single,
    state_cells,
    touched,
    warn_caller,
)
from .lanes import Checkpoint, Edges, Recorded, States, differing_in_layers, needed_outputs, positions_differing
from .plain import Shown, each_plain, is_before_decoder, lacking_edges, plain_scores, run_scores, with_pictures
from .scoring import Scoring

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Differences in probability that rounding alone can explain."""
_COARSE = 3e-2
"""The same in half precision, and in a quantised model, which may round its activations too."""

Accept = Callable[[Tensor, Tensor], None]
"""A check of the scores (metric, sample) of base and source before any cell is computed; it may raise."""


def measure(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    scoring: Scoring,
    *,
    engine: Engine,
    accept: Accept | None = None,
    pictures: Shown | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of all cells in all metrics, and the cost of computing them.

    Args:
        vlm: The model.
        runs: The runs of the prompt, without an answer.
        cells: State cells or edge cells.
        scoring: Metrics and tokens. A foil of several tokens takes a second pass over all cells.
        engine: The engine and its settings.
        accept: A function that is called first, with the scores (metric, sample) of base and source.
        pictures: Model inputs of both runs, for cells before the decoder.
        bar: Progress bar that counts cells, once for each sequence of tokens.

    Raises:
        TraceError: The model cannot be replayed and `engine.name` is "replay"; its attention cannot be cut; memory
            runs out; or a score is not finite. With other engine settings, a model that cannot be replayed gets one
            warning instead.
    """
    if message := lacking_edges(vlm, runs.base, cells):
        warn_caller(message)
    before = [is_before_decoder(cell) for cell in cells]
    others = [cell for cell, is_before in zip(cells, before, strict=True) if not is_before]
    parts: list[CellScores] = []

    def look(base: Tensor, source: Tensor) -> None:
        columns = [[base, source], *(_both(vlm, runs.along(vlm, ids), score) for ids, score in scoring.branches[1:])]
        if accept is not None:
            accept(*(scoring.joined(each) for each in zip(*columns, strict=True)))

    for number, (ids, score) in enumerate(scoring.branches):
        settings = replace(engine, checkpoint=_branch_file(engine.checkpoint, number))
        if parts and parts[0].report.engine == "plain":  # a warning has already given the reason
            settings = replace(settings, name="plain")
        along = runs.along(vlm, ids)
        judge = look if accept is not None and not parts else None
        part = measure_once(vlm, along, others, score, engine=settings, accept=judge, bar=bar)
        if any(before):
            assert pictures is not None, "cells before the decoder need the model inputs of both runs"
            part = with_pictures(vlm, pictures, along, cells, score, measured=part, bar=bar)
        parts.append(part)
    scores, base, source = (
        scoring.joined([getattr(part, name) for part in parts]) for name in ("scores", "base", "source")
    )
    report = _joint_report([part.report for part in parts])
    return CellScores(scores=scores, base=base, source=source, free=parts[0].free, report=report)


def measure_once(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    score: Measure,
    *,
    engine: Engine,
    accept: Accept | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of one function on one sequence of tokens, by the selected engine.

    A few cells of a sweep are computed a second time by plain forward passes. The arguments are those of `measure`.
    """
    reason = "asked for" if cells else "the vision tower cannot be replayed"
    if cells and engine.name != "plain":
        try:
            result = sweep(vlm, runs, cells, score, settings=engine, accept=accept, bar=bar)
            return replace(result, report=replace(result.report, **_checked(vlm, runs, cells, score, (engine, result))))
        except ReplayError as error:
            _both(vlm, runs, score)  # logits that are not finite raise their own error
            if engine.name == "replay":
                raise TraceError(f"{vlm.name!r} cannot be replayed: {error}; pass Engine(name='auto')") from error
            reason = str(error)
            warn_caller(f"tracing one forward pass per cell, which is slow: {reason}")
    return _measure_plain(vlm, runs, cells, score, (engine, reason), accept, bar)


def _measure_plain(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    score: Measure,
    settings: tuple[Engine, str],
    accept: Accept | None,
    bar: tqdm | None,
) -> CellScores:
    """Return the scores by one forward pass per cell; settings: the engine, and why the fast one is not used."""
    engine, reason = settings
    base, source = _both(vlm, runs, score)
    if accept is not None:
        accept(base, source)
    chunks = [single(number) for number in range(len(cells))]
    checkpoint = Checkpoint(engine.checkpoint if cells else None)
    checkpoint.open(cells, chunks, torch.stack([base, source]))
    scores = torch.full((len(cells), *base.shape), torch.nan, dtype=torch.float64)
    with checkpoint.writing(scores):
        known = {number for number, chunk in enumerate(chunks) if checkpoint.restore(number, chunk, scores)}
        if bar is not None:
            bar.update(len(known))
        try:
            for number, values in each_plain(vlm, runs, cells, score, known=known):
                scores[number] = values
                checkpoint.finish(number)
                if bar is not None:
                    bar.update()
        except ReplayError as error:
            raise TraceError(f"the attention of {vlm.name!r} cannot be cut: {error}") from error
    tokens = len(cells) * runs.samples * runs.length * vlm.layers
    report = EngineReport(engine="plain", reason=reason, cells=len(cells), token_layers=tokens)
    free = torch.zeros(len(cells), dtype=torch.bool)
    return CellScores(scores=scores, base=base, source=source, free=free, report=report)


def _both(vlm: VisionLanguageModel, runs: Runs, score: Measure) -> list[Tensor]:
    """Return the scores (metric, sample) of base and source."""
    base = run_scores(vlm, runs.base.for_rows(runs.samples), runs, score)
    if runs.source is runs.base:
        return [base, base]
    return [base, run_scores(vlm, runs.source.for_rows(runs.samples), runs, score)]


# ---- the check of the fast engine ----


def _checked(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], score: Measure, done: tuple[Engine, CellScores]
) -> dict[str, Any]:
    """Return how far a few sweep scores are from plain ones, and how far plain ones vary with the batch size.

    Warns once if they are further apart than rounding can explain.
    """
    engine, result = done
    computed = (~result.free).nonzero().flatten()
    order = torch.randperm(len(computed), generator=torch.Generator().manual_seed(0))
    chosen = computed[order[: engine.checks]].tolist()
    if not chosen:
        return {}
    again = [cells[number] for number in chosen]
    plain, other = (plain_scores(vlm, each, again, score) for each in (runs, _in_another_batch(runs)))
    difference, noise = (
        _largest_difference(result.scores[chosen], plain),
        _largest_difference(plain[..., :1], other[..., :1]),
    )
    size = float(plain[:, 0].nan_to_num(0.0, 0.0, 0.0).abs().max())
    rounding = _COARSE if vlm.is_quantised else _TOLERANCE.get(vlm.dtype, _COARSE)
    if difference > max(rounding, 5 * noise) * max(1.0, size):
        warn_caller(
            f"the fast engine differs by {difference:.1e} from plain forward passes on {len(chosen)} checked cells, "
            f"which differ by {noise:.1e} among themselves; trace again with Engine(name='plain') and report this model"
        )
    return {"checked_cells": len(chosen), "largest_difference": difference, "plain_noise": noise}


def _in_another_batch(runs: Runs) -> Runs:
    """Return the same runs with another number of samples, of which the first is unchanged."""
    if runs.samples == 1:
        return replace(runs, base=runs.base.of_rows([0, 0]))
    return replace(runs, base=runs.base.of_rows([0]), source=runs.source.of_rows([0]))


def _largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference in the first and in the last metric, which is a probability in every trace.

    Where both scores are equally infinite or both are NaN, they do not differ.
    """
    first, second = first[:, [0, -1]], second[:, [0, -1]]
    alike = (first == second) | (first.isnan() & second.isnan())
    return float((first - second).abs().nan_to_num(torch.inf, torch.inf).masked_fill(alike, 0.0).max())


# ---- several sequences of tokens ----


def _branch_file(checkpoint: str | PathLike[str] | None, branch: int) -> Path | None:
    """Return the checkpoint path of one of several token sequences."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return path.with_name(f"{path.name}.{branch}") if branch else path


def _joint_report(reports: Sequence[EngineReport]) -> EngineReport:
    """Return one report for all sequences, with the sums of the counts and the largest differences."""
    first = reports[0]
    counts: dict[str, Any] = {
        name: sum(getattr(each, name) or 0 for each in reports)
        for name in ("cells", "free_cells", "token_layers", "halvings", "checked_cells")
    }
    worst: dict[str, Any] = {
        name: max((value for each in reports if (value := getattr(each, name)) is not None), default=None)
        for name in ("largest_difference", "plain_noise")
    }
    return replace(first, **counts, **worst)


def sweep(
    vlm: VisionLanguageModel,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    settings: Engine | None = None,
    accept: Callable[[Tensor, Tensor], None] | None = None,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of all cells, equal to those of `plain_scores` except for rounding.

    Finished cells are kept in the settings' checkpoint, which is read first and written during the sweep, even if the
    sweep is interrupted.

    Args:
        vlm: The model.
        runs: The two runs; for edge cells, `Runs.of_one`.
        cells: Cells of one kind.
        measure: Function from logits to scores.
        settings: Memory, batch size and checkpoint.
        accept: Function that gets the scores (metric, sample) of base and source before any cell; it may raise.
        bar: Progress bar that counts cells.

    Raises:
        ReplayError: The model's layers cannot be replayed.
        TraceError: Memory runs out for one cell, or an edge cell leaves a token that would see nothing.
    """
    settings = settings or Engine()
    with torch.no_grad(), replaying(vlm) as replay:
        try:
            if all_edges(cells):
                recorded = record_once(replay, runs, cells)
            else:
                recorded = record(replay, runs, state_cells(cells))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TraceError(
                f"memory ran out while recording the runs ({runs.length} tokens, {runs.samples} samples); trace "
                "with fewer samples, or on a device with more memory"
            ) from error
        running = _Sweep(replay, runs, cells, measure, settings, recorded)
        base, source = (running.score(each.logits) for each in (recorded.base, recorded.source))
        if accept is not None:
            accept(base, source)
        return running.run(base, source, bar)


def record(replay: Replay, runs: Runs, cells: Sequence[StateCell], *, keep_all: bool = False) -> Recorded:
    """Return both runs with the outputs that these cells patch in or freeze; the one with fewer rows is recorded whole.

    States and outputs of the other run are kept where some cell needs them, or, with `keep_all`, wherever they can
    differ.
    """
    first, second = sorted((runs.base, runs.source), key=lambda each: each.rows)
    if what := first.frame.difference(second.frame):
        raise ReplayError(f"the two runs differ in more than their embeddings, {what}")
    entering, other_entering = replay.entering(first), replay.entering(second)
    frames = replay.frame_of(first), replay.frame_of(second)
    between = differing_in_layers(*frames, layers=replay.vlm.layers)
    if seeing := frames[0].seeing_others(frames[1], runs.length):
        between |= {number: sorted({*between.get(number, ()), *seeing}) for number in replay.crossing}
    differs = sorted(
        {*positions_differing(entering, other_entering), *(place for each in between.values() for place in each)}
    )
    sites, projections = needed_outputs(replay, cells)
    settings: dict[str, Any] = {"read": runs.scored, "sites": sites, "projections": projections}
    # The positions that can differ depend on masks that only a run shows; with causal masks, all from the first one on.
    possible = tuple(range(min(differs, default=runs.length), runs.length))
    full = replay.record(first, kept=possible, **settings)
    changed = replay.masks.reach(differs)
    if not set(changed) <= set(possible):
        full = replay.record(first, kept=changed, **settings)
    other = full
    # A layer may attend to the keys of a lower one, which a patch in between leaves as the base run has them.
    alike_from = replay.vlm.layers if replay.lenders else max(between, default=0)
    if changed:
        needed = touched(cells, masks=replay.masks, changed=changed, frozen=runs.frozen, alike_from=alike_from)
        other = replay.record_after(
            full,
            other_entering[:, list(changed)],
            changed,
            frame=frames[1],
            kept=changed if keep_all else needed,
            sites=sites,
            projections=projections,
        )
    base, source = (full, other) if first is runs.base else (other, full)
    replay.follow(frames[0] if first is runs.base else frames[1])
    return Recorded(full=full, base=base, source=source, changed=changed, alike_from=alike_from)


def record_once(replay: Replay, runs: Runs, cells: Sequence[EdgeCell]) -> Recorded:
    """Return the recorded run in which edges will be cut, with the states of all positions that may change."""
    settings: dict[str, Any] = {"read": runs.scored}
    first = min((place for cell in cells for place in cell.cut.targets), default=runs.length)
    clean = replay.record(runs.base, kept=range(first, runs.length), **settings)
    if any(mask is not None for mask in replay.masks.layers):  # earlier positions may see the targets as well
        clean = replay.record(runs.base, kept=range(runs.length), **settings)
    return Recorded(full=clean, base=clean, source=clean, changed=())


class _Sweep:
    """The state of one sweep."""

    def __init__(
        self,
        replay: Replay,
        runs: Runs,
        cells: Sequence[Cell],
        measure: Measure,
        settings: Engine,
        recorded: Recorded,
    ) -> None:
        self.replay, self.runs, self.cells, self.measure, self.settings = replay, runs, cells, measure, settings
        self.recorded, self.vlm, self.halvings = recorded, replay.vlm, 0
        if all_edges(cells):
            self.acts = Edges(replay, runs, cells, recorded)
        else:
            self.acts = States(replay, runs, state_cells(cells), recorded, settings)

    def run(self, base: Tensor, source: Tensor, bar: tqdm | None) -> CellScores:
        """Return the scores after planning the sweep, scoring the free cells and computing chunk after chunk."""
        plan = make_plan(
            self.cells,
            masks=self.replay.masks,
            changed=self.recorded.changed,
            scored=self.runs.scored,
            frozen=self.runs.frozen,
            alike_from=self.recorded.alike_from,
            lane_tokens=self.settings.lane_tokens(self.vlm, self.runs.samples),
        )
        recording, self.replay.work = self.replay.work, Work()
        scores = torch.full((len(self.cells), *base.shape), torch.nan, dtype=torch.float64)
        free = torch.zeros(len(self.cells), dtype=torch.bool)
        for number, merged in plan.free.items():
            scores[number] = self.score(self._spliced(None, merged, ())) if merged else base
            free[number] = True
        self.acts.prepare(plan)
        checkpoint = Checkpoint(self.settings.checkpoint)
        checkpoint.open(self.cells, plan.chunks, torch.stack([base, source]))
        if bar is not None:
            bar.update(len(plan.free) + len(plan.copies))
        with checkpoint.writing(scores):
            for number, chunk in enumerate(plan.chunks):
                if not checkpoint.restore(number, chunk, scores):
                    self._answer(chunk, scores, self.settings.call_tokens(self.vlm))
                    checkpoint.finish(number)
                if bar is not None:
                    bar.update(len(chunk.lanes))
        for number, same in plan.copies.items():
            scores[number] = scores[same]
        work = self.replay.work
        report = EngineReport(
            engine="replay",
            cells=len(self.cells),
            free_cells=len(plan.free),
            token_layers=recording.token_layers + work.token_layers,
            halvings=self.halvings,
        )
        return CellScores(
            scores=scores, base=base, source=source, free=free, report=report, recording=recording, work=work
        )

    def _answer(self, chunk: Chunk, scores: Tensor, tokens: int) -> None:
        """Compute a chunk; if memory runs out, compute its halves with half as many tokens per call."""
        try:
            self._run(chunk, scores, tokens)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self.vlm.processes > 1:  # the others have finished the batch, and would wait for ever
                raise TraceError(
                    "memory ran out in one of the processes that hold the model; pass Engine(memory=...)"
                ) from error
            parts = halved(chunk, self.cells)
            if len(parts) == 1 and tokens <= len(chunk.computed):
                raise TraceError(
                    f"memory ran out for a single cell ({len(chunk.computed)} tokens, {self.runs.samples} samples); "
                    "trace with fewer samples, or on a device with more memory"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halvings += 1
        for part in parts:
            self._answer(part, scores, max(1, tokens // 2))

    def _run(self, chunk: Chunk, scores: Tensor, tokens: int) -> None:
        """Run all lanes of a chunk through the layers, each from the layer after which it joins."""
        samples, length, end = self.runs.samples, len(chunk.computed), self.vlm.layers - 1
        read = tuple(place for place in self.runs.scored if place in set(chunk.computed))
        states = self.recorded.base.states[0].new_empty(samples, len(chunk.lanes), length, self.vlm.hidden)
        own = self.recorded.own(self.replay, chunk.computed, samples, len(chunk.lanes))
        step, count, active = max(1, tokens // (samples * length)), 0, 0
        for layer in range(chunk.lanes[0].join, end + 1):
            active = count
            for start in range(0, active, step):
                self._layer(layer, chunk, slice(start, min(active, start + step)), states, own, read)
            while count < len(chunk.lanes) and chunk.lanes[count].join == layer:
                count += 1
            self._join(layer, chunk, range(active, count), states, own)
        here, batches = places(chunk.computed, read, states.device), self.acts.scored_together(chunk, active, step)
        for slots in batches:
            last = rearrange(states[:, index_of(slots, states.device)][:, :, here], "s c t d -> (s c) t d")
            self._finish(chunk, slots, last, read, scores)
        for slot in set(range(len(chunk.lanes))).difference(*batches):
            lane = chunk.lanes[slot]
            if lane.leader is not None:
                scores[lane.cell] = scores[chunk.lanes[lane.leader].cell]

    def _layer(self, layer: int, chunk: Chunk, part: slice, states: Tensor, own: Own, read: tuple[int, ...]) -> None:
        """Run a layer on some lanes of states (sample, lane, position, hidden); the last one only at read positions."""
        is_last = layer == self.vlm.layers - 1
        rows = rearrange(states[:, part], "s c t d -> (s c) t d")
        mine = {
            number: (keys[:, part].flatten(0, 1), values[:, part].flatten(0, 1))
            for number, (keys, values) in own.items()
        }
        with self.acts.acting(layer, chunk, chunk.lanes[part], read if is_last else chunk.computed) as span:
            if is_last:
                output = self.replay.last_layer(rows, span, read, mine)
            else:
                output = self.replay.layer(layer, rows, span, mine)
        if layer in own:
            for whole, computed in zip(own[layer], mine[layer], strict=True):
                whole[:, part] = computed.view(self.runs.samples, -1, *computed.shape[1:])
        here = places(chunk.computed, read, states.device) if is_last else slice(None)
        states[:, part, here] = rearrange(output, "(s c) t d -> s c t d", s=self.runs.samples)

    def _join(self, layer: int, chunk: Chunk, slots: range, states: Tensor, own: Own) -> None:
        """Fill in the states (sample, lane, position, hidden) with which lanes start, which are this layer's output."""
        starting = [slot for slot in slots if chunk.lanes[slot].leader is None]
        if starting:
            base = self.recorded.base
            states[:, index_of(starting, states.device)] = base.at(base.states[layer + 1], chunk.computed).unsqueeze(1)
            self.acts.start(layer, chunk, starting, states)
        for slot in slots:
            leader = chunk.lanes[slot].leader
            if leader is not None:
                states[:, slot] = states[:, leader]
                for whole in (each for pair in own.values() for each in pair):
                    whole[:, slot] = whole[:, leader]

    def _finish(
        self, chunk: Chunk, slots: Sequence[int], states: Tensor, read: tuple[int, ...], scores: Tensor
    ) -> None:
        """Score the lanes in these slots, whose last states (row, read position, hidden) are known."""
        step = self.settings.read_rows(self.vlm, len(self.runs.scored))
        owners = torch.arange(len(states), device=states.device) // len(slots)
        parts = []
        for start in range(0, len(states), step):
            logits = self.replay.read(states[start : start + step])
            spliced = self._spliced((read, logits), chunk.merged, owners[start : start + step])
            parts.append(self.measure(spliced).double().cpu())
        numbers = [chunk.lanes[slot].cell for slot in slots]
        scores[numbers] = rearrange(torch.cat(parts), "(s c) m -> c m s", c=len(slots))

    def _spliced(
        self, computed: tuple[tuple[int, ...], Tensor] | None, merged: Sequence[int], owners: Tensor | Sequence[int]
    ) -> Tensor:
        """Return logits (row, scored position, vocab): computed, the source run's where merged, else the base run's."""
        scored = self.runs.scored
        if computed is not None and len(computed[0]) == len(scored):
            return computed[1]
        base, source = (
            each.logits.expand(self.runs.samples, -1, -1) for each in (self.recorded.base, self.recorded.source)
        )
        logits = base.clone() if computed is None else base[owners]
        from_source = [index for index, place in enumerate(scored) if place in set(merged)]
        if from_source:
            logits[:, from_source] = source[:, from_source] if computed is None else source[owners][:, from_source]
        if computed is not None:
            logits[:, [scored.index(place) for place in computed[0]]] = computed[1]
        return logits

    def score(self, logits: Tensor) -> Tensor:
        """Return the scores (metric, sample) float64 on the CPU."""
        return self.measure(logits.expand(self.runs.samples, -1, -1)).double().T.cpu()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Torch has an error class for accelerators only; on the CPU the text decides."""
    texts = ("not enough memory", "can't allocate memory")  # Windows, other systems
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)
