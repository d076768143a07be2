"""Does locating help? Every request is edited at every layer and token and compared with its traced place."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..artefacts.statistics import paired_test
from ..editing.evaluation import (
    BY_NAME,
    EFFICACY,
    EXACT,
    GENERALITY,
    LOCALITY,
    SAME_QUESTION_OTHER_PICTURE,
    UNCHANGED,
    evaluate,
)
from ..editing.solve import MultEdit
from ..models import VisionLanguageModel
from .results_world import Bench

CONVERGED = 200
"""Steps of the value search: enough for values that can be found at all."""
_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The traced choice compared with another one over the same requests."""

    traced: float
    """Mean score of the traced choice, 0 to 1."""
    other: float
    low: float
    """Of the mean difference (traced minus other), 95 % bootstrap over requests."""
    high: float
    p: float
    """Of a permutation test that flips the signs of the differences at random, two-sided."""
    number: int


def sites_of(_vlm: VisionLanguageModel, bench: Bench) -> Mapping[str, Any]:
    """{"sites": {request: [layer, token, onset]}, "notes": [...]} of each request's own trace."""
    names = [record.request.name for record in bench.records]
    sites = {name: [site.layer, site.token, site.onset] for name, site in zip(names, bench.sites, strict=True)}
    return {"sites": sites, "notes": list(bench.notes)}


def measure_grid(vlm: VisionLanguageModel, bench: Bench, layer: int, token: str) -> Mapping[str, Any]:
    """{request: [efficacy, generality, other entities unchanged, all questions that should stay unchanged]}, 0 to 1.

    Each request is edited alone at this layer and token, with converged values.
    """
    editor = MultEdit(layer=layer, token=token, steps=CONVERGED)
    report = evaluate(vlm, bench.records, editor, baseline=bench.baseline, batch_size=64)
    found: dict[str, Any] = {}
    for record in bench.records:
        rows = [row for row in report.rows if row.record == record.name]
        moved = [row.numbers[EXACT][1] for row in rows if row.aspect == EFFICACY]
        spread = [row.numbers[EXACT][1] for row in rows if row.aspect == GENERALITY and row.kind != BY_NAME]
        stayed = [(row.kind, row.numbers[UNCHANGED][1]) for row in rows if row.aspect == LOCALITY]
        entities = [value for kind, value in stayed if kind == SAME_QUESTION_OTHER_PICTURE]
        found[record.request.name] = [*moved, *map(_mean, (spread, entities, [value for _, value in stayed]))]
    return found


def score(cell: Sequence[float]) -> float:
    """Return one number for one edit: the mean of efficacy, generality and locality."""
    return (cell[0] + cell[1] + cell[3]) / 3


def paired(traced: Sequence[float], other: Sequence[float]) -> Paired:
    """Return the comparison of two choices over the same requests."""
    differences = np.asarray(traced) - np.asarray(other)
    low, high, p = paired_test(differences, draws=_DRAWS)
    means = {"traced": float(np.mean(traced)), "other": float(np.mean(other))}
    return Paired(**means, low=low, high=high, p=p, number=len(differences))


def comparisons(sites: Mapping[str, Sequence[Any]], grid: Mapping[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """Traced token against the others at the traced layer; traced layer against each other one at the traced token."""
    found = []
    chosen = [score(grid[layer, token][name]) for name, (layer, token, _) in sites.items()]
    tokens, layers = sorted({token for _, token in grid}), sorted({layer for layer, _ in grid})
    for token in tokens:
        other = [score(grid[layer, token][name]) for name, (layer, _, _) in sites.items()]
        found.append({"choice": f"token {token}, traced layer", **asdict(paired(chosen, other))})
    for layer in layers:
        other = [score(grid[layer, token][name]) for name, (_, token, _) in sites.items()]
        found.append({"choice": f"layer {layer}, traced token", **asdict(paired(chosen, other))})
    return found


def by_onset(sites: Mapping[str, Sequence[Any]], grid: Mapping[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """Edits at the traced token by how far their layer is from the request's own onset there."""
    groups: dict[int, list[Sequence[float]]] = {}
    for name, (_, token, onset) in sites.items():
        for layer in sorted({layer for layer, _ in grid}):
            groups.setdefault(layer - onset, []).append(grid[layer, token][name])
    return [
        {
            "offset": offset,
            "edits": len(cells),
            "efficacy": _mean([cell[0] for cell in cells]),
            "generality": _mean([cell[1] for cell in cells]),
            "entities": _mean([cell[2] for cell in cells]),
            "locality": _mean([cell[3] for cell in cells]),
        }
        for offset, cells in sorted(groups.items())
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
