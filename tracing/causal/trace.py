"""Causal tracing: corrupt the words or the picture, restore clean states, and see which recover the answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, ReplayError, Site, VisionLanguageModel, capture
from ...models.families import Kind, Projection
from ...models.frame import DecoderInput
from ...models.replay.recording import Recording, Source, places
from ...models.replay.replay import Own, Replay, replaying
from ..corruptions.corruption import Corrupted, Corruption
from ..corruptions.kinds import calibrate
from ..engine.cells import KINDS, CellScores, Engine, Measure, Runs, StateCell, TraceError, WeakCorruption
from ..engine.lanes import Recorded
from ..engine.measure import measure, record
from ..engine.plain import Shown, is_before_decoder
from ..engine.positions import Grid, Item, make_grid, resolve_rows
from ..engine.scoring import Metric, Scoring, choose_scoring
from .result import CausalTrace

DIRECTIONS = ("restore", "corrupt")
_LEAST_DROP = 0.01
"""Share of the score that a corruption must remove to be worth tracing."""
_Key = Site | Projection


def causal_trace(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    corruption: Corruption,
    sites: str | Sequence[str] = KINDS,
    window: int = 3,
    positions: Item | Sequence[Item] = "tokens",
    answer: str | None = None,
    foil: str | None = None,
    whole_answer: bool = False,
    metrics: Metric | Sequence[Metric] = ("probability",),
    direction: str = "restore",
    effect: str = "total",
    severed: str | None = None,
    exact_cells: int | None = None,
    even_if_weak: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> CausalTrace:
    """Return how much of the answer's score each state recovers when it is restored in the corrupted run.

    The result has one map per kind of site, with a row for each group of positions and a column for each layer. A cell
    restores the clean output of one decoder layer ("hidden"), or of `window` neighbouring MLPs or attentions around a
    layer l: the layers max(0, l - window // 2) up to but excluding min(layers, l + ceil(window / 2)). This is causal
    tracing as in ROME (Meng et al., arXiv 2202.05262, section 2) for questions about pictures as in Basu et al., arXiv
    2406.04236.

    Args:
        vlm: The model.
        prompt: The question, with its constraint if the corruption or the rows need one.
        corruption: The damage, such as `SwapImage` or `TextNoise`. Noise without a scale is calibrated.
        sites: Kinds of sites: "hidden", "mlp", "attention"; "heads" for each attention head on its own; "vision" for
            layers of the vision tower and "projector" for what follows it (both need a corruption of pixels).
        window: Number of neighbouring layers that are restored together (default 3); hidden states are
            always restored one at a time.
        positions: The rows, as in `resolve_rows`: "tokens" (default) gives one for each text token and one for the
            whole image. Positions of a given answer are never restored.
        answer: The answer that is scored; by default the model's own.
        foil: The answer that a logit difference subtracts; by default the corrupted run's.
        whole_answer: Score all tokens of the answer, each after the ones before it, instead of the first.
        metrics: Any of "probability", "log_probability" and "logit_difference", or functions from logits (row, answer
            position, vocab) to scores (row,); the first is the main one.
        direction: "restore" puts clean states into the corrupted run, "corrupt" corrupted states into the clean one.
        effect: "direct" freezes all other image tokens at the states of the run that is changed, so that only the path
            from a patch to the text counts, not the paths between patches; "total" (default) freezes nothing.
        severed: "mlp" or "attention" freezes modules of this kind in later layers at the restored positions (arXiv
            2202.05262, section 2.2).
        exact_cells: Number of cells to compute exactly: the cells with the largest effects by one backward pass
            (attribution patching, arXiv 2403.00745); the others are marked as estimates. By default all are exact.
        even_if_weak: Trace even if the corruption does not lower the main metric.
        engine: Settings; by default the exact fast sweep if the model allows it, else one forward pass per cell.
        progress: Show a progress bar over cells.

    Returns:
        The scores of all cells and of both runs, with the settings.

    Raises:
        WeakCorruption: The corruption does not lower the main metric.
        TraceError: A setting does not exist or does not fit the model or the prompt, or a score is not finite.
        ModelError: The prompt has no such group or position.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> fact, other = world.facts[0], world.entities[1]
        >>> question = world.question(fact)
        >>> picture = world.picture(world.entities[fact.entity], 0).image
        >>> prompt = vlm.prompt(picture, question.text, constraint=question.constraint)
        >>> swap = mt.SwapImage(world.picture(other, 0).image)
        >>> trace = mt.causal_trace(vlm, prompt, corruption=swap, positions=("image", "last"), progress=False)
        >>> trace.samples["mlp"].shape  # metric, row, layer, sample
        torch.Size([1, 2, 8, 1])
    """
    rows = resolve_rows(prompt, positions)
    if direction not in DIRECTIONS:
        raise TraceError(f"no direction {direction!r}; pass direction='restore' or 'corrupt'")
    grid = make_grid(vlm, prompt, rows, sites=sites, window=window, effect=effect, severed=severed)
    clean = vlm.embed(prompt)
    corrupted = _corrupt(vlm, prompt, corruption, clean, answer)
    scored = {"answer": answer, "foil": foil, "whole_answer": whole_answer, "metrics": metrics}
    scoring = choose_scoring(vlm, prompt, (clean, corrupted.entering(clean)), **scored)
    question = _Question(
        vlm=vlm, prompt=prompt, clean=clean, corrupted=corrupted, scoring=scoring, restores=direction == "restore"
    )
    settings: dict[str, Any] = {"engine": engine or Engine(), "accept": None if even_if_weak else question.refuse_weak}
    chosen = None if exact_cells is None or exact_cells >= len(grid.cells) else _best(question, grid, exact_cells)
    total = (len(grid.cells) if chosen is None else exact_cells) * len(scoring.branches)
    with tqdm(total=total, desc="tracing", unit="cell", disable=not progress) as bar:
        cells = grid.cells if chosen is None else [grid.cells[number] for number in chosen.exact]
        if any(map(is_before_decoder, cells)):
            settings["pictures"] = question.pictures
        result = measure(vlm, question.runs, cells, scoring, bar=bar, **settings)
    variant: dict[str, Any] = {"window": window, "direction": direction, "effect": effect, "severed": severed}
    return _result(question, grid, result, chosen, variant)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """One prompt, clean and corrupted, with its scoring."""

    vlm: VisionLanguageModel
    prompt: Prompt
    clean: DecoderInput
    """What the text stack reads, in one row, up to and including the prompt's last token."""
    corrupted: Corrupted
    scoring: Scoring
    restores: bool
    """True if clean states are patched into the corrupted run, False if corrupted states into the clean one."""

    @property
    def runs(self) -> Runs:
        """The run that is changed, and the one whose states are patched in."""
        base, source = self.ordered(self.clean, self.corrupted.entering(self.clean))
        return Runs(base=base, source=source, scored=(base.length - 1,), frozen=self.prompt.groups["image"])

    @property
    def pictures(self) -> Shown:
        """The pictures of both runs. Raises `TraceError` if the corruption leaves them unchanged."""
        if not self.corrupted.inputs:
            raise TraceError(
                f"the corruption ({self.corrupted.description}) leaves the pixels as they are, so 'vision' and "
                "'projector' hold the same states in both runs; pass SwapImage, BlankImage, BlurImage, MaskBoxes or "
                "PixelNoise, or leave these sites out"
            )
        base, source = self.ordered((self.prompt.inputs,), self.corrupted.inputs)
        return Shown(prompt=self.prompt, base=base, source=source)

    def ordered(self, clean: Any, corrupted: Any) -> tuple[Any, Any]:
        """Return clean and corrupted as base and source, or base and source as clean and corrupted."""
        return (corrupted, clean) if self.restores else (clean, corrupted)

    def refuse_weak(self, base: Tensor, source: Tensor) -> None:
        """Raise `WeakCorruption` if the main metric of scores (metric, sample) is no lower in the corrupted run."""
        clean, damaged = (float(each[0].mean()) for each in self.ordered(base, source))
        if _is_weak(self.scoring.metrics[0], clean, damaged):
            raise WeakCorruption(
                f"the corruption ({self.corrupted.description}) does not lower {self._score_in_words()}: {clean:.3g} "
                f"clean, {damaged:.3g} corrupted; {self._advice()}, or trace it anyway with even_if_weak=True "
                "(--even-if-weak)"
            )

    def _score_in_words(self) -> str:
        metric, answer = self.scoring.metrics[0], self.vlm.decode(list(self.scoring.answer_ids)).strip()
        if metric == "logit_difference":
            return f"the logit difference of {answer!r} and {self.vlm.decode(list(self.scoring.foil_ids)).strip()!r}"
        if metric in ("probability", "log_probability"):
            whose = ", the model's own answer" if self.scoring.is_predicted else ""
            return f"the answer's {metric.replace('_', ' ')} ({answer!r}{whose})"
        return f"the score {self.scoring.names[0]!r}"

    def _advice(self) -> str:
        if self.scoring.is_predicted:
            return "use a stronger or another corruption"
        own, scored = self.vlm.answers([self.prompt])[0], self.vlm.decode(list(self.scoring.answer_ids)).strip()
        if not scored:
            token = self.vlm.tokenizer.convert_ids_to_tokens(self.scoring.answer_ids[0])
            return (
                f"the model answers {own!r}, and the first token of the answer that you score spells nothing (it is "
                f"{token!r}), as that of many answers does: score all its tokens with whole_answer=True "
                "(--whole-answer)"
            )
        return (
            f"the model answers {own!r}, and you score {scored!r}: score the logit difference of both with "
            f"answer={own!r}, foil={scored!r} and metrics='logit_difference' (--answer, --foil, --metrics)"
        )


def _is_weak(metric: Metric, clean: float, damaged: float) -> bool:
    """Return whether the corruption removes less than 1 % of a probability, of odds, or of a score's magnitude."""
    if metric == "probability":
        return damaged > (1 - _LEAST_DROP) * clean
    if metric in ("log_probability", "logit_difference"):
        return damaged > clean + math.log(1 - _LEAST_DROP)
    return abs(damaged - clean) <= _LEAST_DROP * abs(clean)


def _corrupt(
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, clean: DecoderInput, answer: str | None
) -> Corrupted:
    """Return the corrupted prompt; noise without a scale is calibrated to halve the first token's probability."""

    @cache  # most corruptions need no calibration and never call this
    def token() -> int:
        if answer is None:
            return int(vlm.next_token_probabilities(clean)[0].argmax())
        return prompt.with_answer(answer).answer_ids[0]

    def probability(entering: DecoderInput) -> float:
        return float(vlm.next_token_probabilities(entering)[:, token()].mean())

    return calibrate(vlm, prompt, corruption, probability)


# ---- estimates for all cells, exact scores for the best of them ----


@dataclass(frozen=True, kw_only=True, eq=False)
class _Best:
    """The cells of a grid that are computed exactly, and estimates for all cells."""

    exact: tuple[int, ...]
    """Numbers of the cells with the largest estimated effects, ascending."""
    changes: Tensor
    """(cell, metric, sample): estimated effects of all cells."""


def _best(question: _Question, grid: Grid, count: int) -> _Best:
    """Return the `count` cells with the largest effects by one backward pass.

    Raises `TraceError` for cells that cannot be estimated (direct effects, severed modules, those before the decoder).
    """
    if count < 1:
        raise TraceError(f"exact_cells={count}: pass at least 1, or None for all")
    check_estimable(grid.cells)
    vlm, scoring = question.vlm, question.scoring
    try:
        changes = scoring.joined(
            [
                estimated_changes(vlm, question.runs.along(vlm, ids), grid.cells, score)
                for ids, score in scoring.branches
            ]
        )
    except ReplayError as error:
        raise TraceError(f"{vlm.name!r} cannot be replayed, so nothing can be estimated: {error}") from error
    chosen = changes[:, 0].mean(-1).abs().argsort(descending=True, stable=True)[:count].sort().values
    return _Best(exact=tuple(chosen.tolist()), changes=changes)


def _filled(grid: Grid, measured: CellScores, best: _Best) -> tuple[Tensor, dict[str, Any]]:
    """Return scores (cell, metric, sample) with estimates for cells not computed, and the result's fields on these."""
    scores = measured.base + best.changes
    scores[list(best.exact)] = measured.scores
    is_exact = torch.zeros(len(grid.cells), dtype=torch.bool).index_fill(0, torch.tensor(best.exact), True)
    estimates, exact = best.changes[:, 0].mean(-1), (scores - measured.base)[:, 0].mean(-1)
    maps = [grid.maps(each.unsqueeze(-1)) for each in (estimates, exact)]
    maps.append(grid.maps(is_exact.unsqueeze(-1), empty=True))
    agreement = {}
    for kind in grid.spans:
        first, second, known = (each[kind].flatten() for each in maps)
        known &= ~first.isnan()
        if int(known.sum()) > 1:
            agreement[kind] = rank_agreement(first[known], second[known])
    estimated = {kind: ~each[..., 0] for kind, each in maps[2].items()}
    return scores, {"estimated": estimated, "agreement": agreement}


def _result(
    question: _Question, grid: Grid, measured: CellScores, best: _Best | None, variant: Mapping[str, Any]
) -> CausalTrace:
    """Return the trace with these scores."""
    vlm, prompt, corrupted, scoring = question.vlm, question.prompt, question.corrupted, question.scoring
    scores, estimates = measured.scores, dict[str, Any](estimated={}, agreement={})
    if best is not None:
        scores, estimates = _filled(grid, measured, best)
    clean, damaged = question.ordered(measured.base, measured.source)
    length = question.clean.length
    return CausalTrace(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[:length],
        input_ids=tuple(prompt.inputs["input_ids"][0, :length].tolist()),
        rows=tuple(row.label for row in grid.rows),
        row_tokens=tuple(row.token for row in grid.rows),
        row_positions=tuple(row.positions for row in grid.rows),
        grouped=all(row.is_group for row in grid.rows),
        starred=tuple(prompt.groups.get("constraint", ())),
        patches=tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches),
        layers=vlm.layers,
        spans=grid.spans,
        corruption=corrupted.description,
        seed=corrupted.seed,
        scale=corrupted.scale,
        deviation=corrupted.deviation,
        answer_ids=scoring.answer_ids,
        answer=vlm.tokenizer.decode(list(scoring.answer_ids)).strip(),
        is_predicted=scoring.is_predicted,
        foil_ids=scoring.foil_ids,
        foil=vlm.tokenizer.decode(list(scoring.foil_ids)).strip() if scoring.foil_ids else None,
        metrics=scoring.names,
        clean_scores=clean.mean(-1),  # samples differ only by rounding
        corrupted_scores=damaged,
        samples=grid.maps(scores),
        engine=measured.report,
        **estimates,
        **variant,
    )


# ---- attribution patching: one backward pass estimates the effects of all cells ----


def estimated_changes(vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell], measure: Measure) -> Tensor:
    """Return first-order estimates of what each cell adds to the base run's scores: (cell, metric, sample) float64.

    The estimate is (source state - base state) . gradient, at the run that is changed. It is exact for small
    corruptions and at best a ranking for large ones. The estimate of a window is the sum over its layers, so an effect
    that passes through a later layer of the same window counts twice. The method is Nanda's attribution patching; see
    Kramar et al., arXiv 2403.00745.

    This takes one forward pass and, per metric, one backward pass for each row of the base run, over the positions that
    can differ. Metrics must be differentiable, and cells total effects without severed modules. Raises `ReplayError`
    for a model whose layers cannot be replayed.
    """
    with replaying(vlm) as replay, vlm.gradients(), torch.no_grad():
        recorded = record(replay, runs, cells, keep_all=True)
        metrics = measure(recorded.base.logits).shape[-1]
        estimates = torch.zeros(len(cells), metrics, runs.samples, dtype=torch.float64)
        if not recorded.changed:
            return estimates
        for row in range(runs.base.rows):
            samples = [row] if runs.base.rows > 1 else list(range(runs.samples))
            effects = _effects(replay, runs, recorded, row, measure)
            for number, cell in enumerate(cells):
                estimates[number][:, samples] += _estimate(vlm, cell, effects, recorded.changed)
    return estimates


def _stored(run: Recording, key: _Key) -> Tensor:
    return run.states[key.layer + 1] if isinstance(key, Site) and key.kind == "hidden" else run.outputs[key]


def check_estimable(cells: Sequence[StateCell]) -> None:
    """Raise `TraceError` unless all cells are total effects on states of the decoder without severed modules."""
    for cell in cells:
        if cell.is_direct or cell.severed or cell.kind not in (*KINDS, "head"):
            what = "direct effects" if cell.is_direct else "severed modules" if cell.severed else f"{cell.kind!r} cells"
            raise TraceError(f"{what} cannot be estimated by one backward pass; leave out exact_cells")


def _estimate(
    vlm: VisionLanguageModel, cell: StateCell, effects: dict[_Key, Tensor], changed: tuple[int, ...]
) -> Tensor:
    """Return (metric, sample): the estimate of what a cell adds to the base run's scores."""
    live = sorted(set(cell.positions) & set(changed))
    if not live:
        return torch.zeros(())
    where, total = places(changed, live, torch.device("cpu")), torch.zeros(())
    for layer in range(cell.first, cell.last + 1):
        key = vlm.attention_projection(layer) if cell.kind == "head" else Site(cast(Kind, cell.kind), layer)
        if key in effects:  # a layer with a running state inside a window has no heads
            total = total + effects[key][..., cell.head or 0][..., where].sum(-1)
    return total


def _effects(replay: Replay, runs: Runs, recorded: Recorded, row: int, measure: Measure) -> dict[_Key, Tensor]:
    """Return the runs' difference times the gradient, (metric, sample, position, head) float64; a site has one head."""
    base, source = recorded.base, recorded.source
    gradients = _gradients(replay, runs, recorded, row, measure)
    source_rows = slice(row, row + 1) if runs.base.rows > 1 and runs.source.rows > 1 else slice(None)
    effects = {}
    for key, gradient in gradients.items():
        patched, own = (each.at(_stored(each, key), recorded.changed) for each in (source, base))
        difference = (patched[source_rows] - own[row : row + 1]).double()
        heads = 1 if isinstance(key, Site) else replay.vlm.heads
        effects[key] = (gradient.double() * difference).unflatten(-1, (heads, -1)).sum(-1).cpu()
    return effects


def _gradients(replay: Replay, runs: Runs, recorded: Recorded, row: int, measure: Measure) -> dict[_Key, Tensor]:
    """Return the gradients of one base row's scores, per site or projection (metric, 1, position, width)."""
    vlm, changed, base = replay.vlm, recorded.changed, recorded.base
    keys = list(base.outputs)
    sites, projections = ([key for key in keys if isinstance(key, kind)] for kind in (Site, Projection))
    rest = tuple(sorted(set(range(runs.length)) - set(changed)))
    span = replay.span(changed, [Source(run=recorded.full, positions=rest)])
    values: dict[_Key, Tensor] = {}
    own: Own = {}
    replay.follow(replay.frame_of(runs.base.of_rows([row])))
    with (
        torch.enable_grad(),
        capture(vlm, sites) as written,
        capture(vlm, projections, inputs=True) as read,
    ):
        states = base.at(base.states[0], changed)[row : row + 1].clone().requires_grad_()
        for layer in range(vlm.layers):
            states = replay.layer(layer, states, span, own)
            values[Site("hidden", layer)] = states
        scored = [place for place in runs.scored if place in set(changed)]
        logits = base.logits[row : row + 1].clone()
        if scored:
            here = [runs.scored.index(place) for place in scored]
            computed = replay.read(states[:, places(changed, scored, states.device)])
            logits = logits.index_copy(1, torch.tensor(here, device=logits.device), computed)
        values |= {**written, **read}
        scores = measure(logits)[0]
        gradients = [
            torch.autograd.grad(score, list(values.values()), retain_graph=True, materialize_grads=True)
            for score in scores
        ]
    return {key: torch.stack(parts) for key, parts in zip(values, zip(*gradients, strict=True), strict=True)}


def rank_agreement(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors, from -1 to 1; NaN where one is constant."""
    from scipy.stats import spearmanr

    if len(first) < 2 or any(len(each.unique()) < 2 for each in (first, second)):
        return float("nan")
    return float(spearmanr(first.double().numpy(), second.double().numpy()).statistic)
