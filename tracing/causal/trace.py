"""Causal tracing: destroy the constraint or the picture, restore clean states, see which bring the answer back."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ..corruptions.calibration import calibrate
from ..corruptions.corruption import Corrupted, Corruption
from ..engine.cells import KINDS
from ..engine.experiment import Experiment
from ..engine.grid import Grid, make_grid
from ..engine.prefilter import Filtered, measure_best
from ..engine.rows import Item, resolve_rows
from ..engine.scoring import Metric, choose_scoring
from ..engine.settings import Engine
from ..errors import TraceError, WeakCorruption
from .result import CausalTrace

DIRECTIONS = ("restore", "corrupt")
_LEAST_DROP = 0.01
"""Share of the answer's probability that a corruption must take away to be worth tracing."""


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
    """How much of the answer comes back for each (site kind, row, layer) that is restored in the corrupted run.

    A cell restores the clean output of one decoder layer ("hidden"), or of `window` neighbouring MLPs or attentions
    around a layer l, at the positions of one row: layers max(0, l - window // 2) up to but excluding
    min(layers, l + ceil(window / 2)), so cut off at both ends (ROME's convention, arXiv 2202.05262). sites: kinds of
    them; "heads" for each attention head on its own; "vision" for layers of the vision tower and "projector" for what
    follows it (both need a corruption of pixels). positions: the rows, see `resolve_rows`; "tokens" gives one for each
    text token and one for the whole image.
    answer: the scored one; None for the model's own. Scored is its first token, or with whole_answer all of them, each
    after the ones before it; metrics: any of `METRICS`, or functions; a logit difference subtracts the foil, by default
    the corrupted run's answer. Positions of a given answer are never restored.
    direction: "restore" puts clean states into the corrupted run, "corrupt" corrupted states into the clean one.
    effect: "direct" freezes all other image tokens at the states of the run that is changed, so only the way from a
    patch to the text counts, not from patch to patch. severed: "mlp" or "attention" freezes those of later layers at
    the restored positions (arXiv 2202.05262, section 2.2).
    exact_cells: compute only so many cells, those with the largest effects by one backward pass (attribution
    patching); the others are estimates and marked as such.
    engine: settings; by default the exact fast sweep where the model allows it, else one forward pass per cell, with
    one warning. TraceError or ModelError for what does not fit the model or the prompt; WeakCorruption if the damage
    does not lower the answer's probability, unless even_if_weak.
    """
    rows = resolve_rows(prompt, positions)
    variant = {"direction": _check_direction(direction), "effect": effect, "severed": severed}
    grid = make_grid(vlm, prompt, rows, sites=sites, window=window, effect=effect, severed=severed)
    clean = vlm.embed(prompt)
    corrupted = _corrupt(vlm, prompt, corruption, clean, answer)
    words = {"answer": answer, "foil": foil, "whole_answer": whole_answer, "metrics": metrics}
    scoring = choose_scoring(vlm, prompt, (clean, corrupted.embeddings), **words)
    restores = direction == "restore"
    experiment = Experiment(prompt=prompt, clean=clean, corrupted=corrupted, scoring=scoring, restores=restores)
    accept = None if even_if_weak else _refuse_weak(corrupted)
    with tqdm(total=len(grid.cells) * len(scoring.branches), desc="tracing", unit="cell", disable=not progress) as bar:
        measured = measure_best(experiment, vlm, grid, exact_cells, engine=engine or Engine(), accept=accept, bar=bar)
    return _result(vlm, experiment, grid, measured, {"window": window, **variant})


def _result(
    vlm: VisionLanguageModel, experiment: Experiment, grid: Grid, measured: Filtered, settings: Mapping[str, Any]
) -> CausalTrace:
    """The trace of what was measured."""
    prompt, corrupted, scoring, rows = experiment.prompt, experiment.corrupted, experiment.scoring, grid.rows
    length = experiment.clean.shape[1]
    return CausalTrace(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[:length],
        input_ids=tuple(prompt.inputs["input_ids"][0, :length].tolist()),
        rows=tuple(row.label for row in rows),
        row_tokens=tuple(row.token for row in rows),
        row_positions=tuple(row.positions for row in rows),
        grouped=all(row.is_group for row in rows),
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
        clean_scores=measured.found.clean.mean(-1),  # samples differ in rounding only
        corrupted_scores=measured.found.corrupted,
        samples=grid.maps(measured.found.scores),
        estimated=measured.estimated,
        agreement=measured.agreement,
        engine=measured.found.report,
        **settings,
    )


def _check_direction(direction: str) -> str:
    if direction not in DIRECTIONS:
        raise TraceError(f"no direction {direction!r}; pass direction='restore' or 'corrupt'")
    return direction


def _corrupt(
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, clean: Tensor, answer: str | None
) -> Corrupted:
    """The damaged prompt; noise without a scale gets one that halves the probability of the answer's first token."""

    @cache  # most corruptions are applied as they are, and then nobody asks
    def token() -> int:
        if answer is None:
            return int(vlm.next_token_probabilities(clean)[0].argmax())
        return prompt.with_answer(answer).answer_ids[0]

    def probability(embeddings: Tensor) -> float:
        return float(vlm.next_token_probabilities(embeddings)[:, token()].mean())

    return calibrate(vlm, prompt, corruption, probability)


def _refuse_weak(corrupted: Corrupted) -> Callable[[float, float], None]:
    """What looks at the answer's probability in both runs before anything is traced."""

    def accept(clean: float, damaged: float) -> None:
        if damaged > (1 - _LEAST_DROP) * clean:
            raise WeakCorruption(
                f"the corruption ({corrupted.description}) does not lower the answer's probability: {clean:.3g} clean, "
                f"{damaged:.3g} corrupted; use a stronger or another one, or pass even_if_weak=True to trace it anyway"
            )

    return accept
