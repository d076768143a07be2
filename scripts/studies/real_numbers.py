"""The numbers of the study of a real model, as plain values: what its page is written from.

Whatever is chosen (the layer of a peak, a number of tokens, a threshold) is chosen on the facts of one half of the
countries and read on those of the other half, so that no reported number is the largest of many by its selection.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...artefacts import Mean, Result, auroc, mean_interval, wilson_interval
from ...tracing import (
    AttentionContributions,
    AverageKnockout,
    AveragePruning,
    AverageTrace,
    FailureFeatures,
    LogitLens,
    TraceError,
    predict_failure,
)
from ...workflow import StoredRecord
from ...workflow.run_folder import RECORDS, RunFolder
from .real_facts import CHOOSING, REPORTING
from .real_readings import BEST, NO_BOX, NONE, ONLY_BOX, PLACES, RANDOM, token_shares

ENOUGH = 0.9
"""Share of the answers that a set of image tokens has to keep."""
TOLERANCE = 0.05
"""Share of the answers that may be lost at a cliff."""
SUBSET = 1 / 16
"""The share of the image tokens, by index, that arXiv 2406.04236 reports as the source: 36 of 576."""
TOP = 8
"""Number of image tokens whose agreement between questions is measured."""
_DIGITS = 5
_Kind = TypeVar("_Kind", bound=Result)

Halves = Mapping[str, Path]
"""The folder of the run on each half."""


def plain(values: Any) -> Any:
    """Return numbers, tensors and lists of them as rounded plain values; what is not finite becomes None."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list | tuple):
        return [plain(each) for each in values]
    if isinstance(values, float):
        return round(values, _DIGITS) if math.isfinite(values) else None
    return values


def stored_records(folder: Path) -> list[StoredRecord]:
    """Return the records of a run that did not fail, in their order."""
    run = RunFolder(folder)
    listed = run.read(RECORDS)
    stored = [] if listed is None else [run.stored(name) for name in listed["names"]]
    return [record for record in stored if record is not None and record.error is None]


def _average(folder: Path, kind: type[_Kind]) -> _Kind:
    """Return the average of a finished run."""
    return kind.load(folder / "summary" / "average.safetensors")


def mean_of(values: Sequence[float]) -> list[float | None]:
    """Return [mean, low, high, count] with the 95 % interval by Student's t; no interval for fewer than two values."""
    column = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if len(column) < 2:
        return plain([float(column.mean()) if len(column) else math.nan, math.nan, math.nan, len(column)])
    low, high = mean_interval(column)
    return plain([float(column.nanmean()), float(low), float(high), len(column)])


def share_of(flags: Sequence[bool]) -> list[float | None]:
    """Return [share, low, high, count] of true flags, with Wilson's 95 % interval."""
    share = torch.tensor(sum(flags) / len(flags) if flags else math.nan)
    low, high = wilson_interval(share.nan_to_num(), torch.tensor(len(flags)))
    return plain([float(share), float(low), float(high), len(flags)])


# ---- answers ----


def answer_numbers(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by relation, the shares of true answers by picture and by name, and the share of equal answers.

    rows: of each fact the relation, whether the answers are right ("picture", "name"), and whether they are equal
    ("agrees").
    """
    by_relation: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_relation.setdefault(row["relation"], []).append(row)
    columns = ("picture", "name", "agrees")
    return {
        name: {column: share_of([bool(row[column]) for row in members]) for column in columns}
        for name, members in by_relation.items()
    }


# ---- causal traces ----


def trace_numbers(folder: Path, choosing: Path | None = None) -> dict[str, Any]:
    """Return the average trace of a run, and its strongest layers, which another run may choose."""
    trace = _average(folder, AverageTrace)
    chooser = trace if choosing is None else _average(choosing, AverageTrace)
    kinds = {}
    for kind in trace.kinds:
        low, high = trace.means[kind][0].band()
        kinds[kind] = {"effect": plain(trace.indirect_effect(kind)), "low": plain(low), "high": plain(high)}
        kinds[kind]["peaks"] = _peaks(trace, chooser, kind)
    return {
        "count": trace.count,
        "chosen_on": None if choosing is None else chooser.count,
        "window": trace.window,
        "layers": trace.layers,
        "corruption": trace.corruption,
        "rows": list(trace.rows),
        "clean": plain(float(trace.clean.mean[0])),
        "corrupted": plain(float(trace.corrupted.mean[0])),
        "total": plain([trace.total_effect, *(float(each) for each in trace.total[0].band()), trace.count]),
        "kinds": kinds,
    }


def _peaks(trace: AverageTrace, chooser: AverageTrace, kind: str) -> dict[str, Any]:
    """Return, for each row, the layer where the chooser's effect is largest, and [effect, low, high, count] there."""
    low, high = trace.means[kind][0].band()
    effects, counts = trace.indirect_effect(kind), trace.means[kind].count[0]
    peaks = {}
    for row, name in enumerate(trace.rows):
        if name in chooser.rows:
            layer = int(chooser.indirect_effect(kind)[chooser.rows.index(name)].nan_to_num(nan=-math.inf).argmax())
            place = row, layer
            values = [float(each[place]) for each in (effects, low, high)]
            peaks[name] = {"layer": layer, "effect": plain([*values, int(counts[place])])}
    return peaks


# ---- flows, emergence ----


def flow_numbers(halves: Halves) -> dict[str, Any]:
    """Return the change of the answer's probability by flow, window and layer, with centres and strongest layers."""
    chooser, flows = (_average(halves[half], AverageKnockout) for half in (CHOOSING, REPORTING))
    low, high = flows.changes[0].band()
    change = flows.change()
    found: dict[str, Any] = {}
    for index, name in enumerate(flows.flows):
        for column, window in enumerate(flows.windows):
            layer = int(chooser.curve(name, window).nan_to_num(nan=math.inf).argmin()) if name in chooser.flows else 0
            place = index, column, layer
            centre = flows.centre(name, window)
            found.setdefault(name, {})[str(window)] = {
                "change": plain(change[index, column]),
                "low": plain(low[index, column]),
                "high": plain(high[index, column]),
                "layer": layer,
                "strongest": plain([float(each[place]) for each in (change, low, high)] + [flows.counts[name]]),
                "centre": None if centre is None else plain([centre.layer, *(centre.interval or ())]),
            }
    return {"count": flows.count, "windows": list(flows.windows), "layers": flows.layers, "flows": found}


def emergence_numbers(folder: Path) -> dict[str, Any]:
    """Return, for both places, by layer how often the answer leads, and quartiles of its rank; -1 is the embedding."""
    records = stored_records(folder)
    lenses = [(record.load("lens", LogitLens), int(record.row["token"])) for record in records]
    places = {}
    for place in PLACES:
        ranks = torch.stack([lens.rank(token, position=place) for lens, token in lenses]).double()
        firsts = [record.row[f"first layer at {place}"] for record in records]
        leads = [share_of([bool(flag) for flag in column]) for column in (ranks == 1).T.tolist()]
        known = sorted(layer for layer in firsts if layer is not None)
        places[place] = {
            "leads": leads,
            "ranks": plain(torch.quantile(ranks, torch.tensor([0.25, 0.5, 0.75], dtype=ranks.dtype), 0)),
            "never": share_of([layer is None for layer in firsts]),
            "first": plain(np.quantile(known, [0.25, 0.5, 0.75]).tolist()) if known else None,
        }
    return {"count": len(lenses), "places": places}


# ---- image tokens ----


def token_numbers(halves: Halves, facts: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return what is known about the image tokens that feed the constraint.

    facts: country and relation of each record, by its id.
    """
    records = {half: stored_records(folder) for half, folder in halves.items()}
    masses = {half: [_mass(record) for record in members] for half, members in records.items()}
    shares = {half: torch.stack([token_shares(mass) for mass in members]) for half, members in masses.items()}
    reported = records[REPORTING]
    by_layer = torch.stack([mass.sum(1) for mass in masses[REPORTING]])
    count = shares[REPORTING].shape[1]
    few = max(1, round(count * SUBSET))
    chosen = shares[CHOOSING].mean(0).topk(few).indices
    return {
        "count": len(reported),
        "tokens": count,
        "by_layer": [mean_of(column) for column in by_layer.T.tolist()],
        "for_80": mean_of([_tokens_for(row, 0.8) / count for row in shares[REPORTING]]),
        "subset": {
            "size": few,
            "indices": sorted(chosen.tolist()),
            "chosen": mean_of(shares[REPORTING][:, chosen].sum(1).tolist()),
            "last": mean_of(shares[REPORTING][:, -few:].sum(1).tolist()),
            "uniform": plain(few / count),
        },
        "agreement": _agreement(shares[REPORTING], [facts[record.id] for record in reported]),
        "box": {
            "tokens": mean_of([record.row["box tokens"] / count for record in reported]),
            "mass": mean_of([record.row["box mass"] for record in reported]),
        },
        **_kept(records),
    }


def _mass(record: StoredRecord) -> Tensor:
    """Return the contributions (layer, image token) to the constraint."""
    return record.load("contributions", AttentionContributions).image_mass().double()


def _tokens_for(shares: Tensor, share: float) -> int:
    return int((shares.sort(descending=True).values.cumsum(0) < share).sum()) + 1


def _agreement(shares: Tensor, facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the overlap of the strongest tokens of two questions: of one picture, and of one relation.

    Overlaps are shares of `TOP` tokens. The first is between the relations of one country, the second between one
    country and the next of the same relation; both are means over countries.
    """
    tops = [set(row.topk(min(TOP, len(row))).indices.tolist()) for row in shares]
    countries: dict[str, list[set[int]]] = {}
    relations: dict[str, list[set[int]]] = {}
    for index, (country, relation) in enumerate(facts):
        countries.setdefault(country, []).append(tops[index])
        relations.setdefault(relation, []).append(tops[index])
    size = min(TOP, shares.shape[1])

    def overlap(pairs: Iterable[tuple[set[int], set[int]]]) -> list[float]:
        return [len(one & two) / size for one, two in pairs]

    same = [float(np.mean(overlap(combinations(members, 2)))) for members in countries.values() if len(members) > 1]
    other = [value for members in relations.values() for value in overlap(pairwise(members))]
    return {
        "top": size,
        "same_picture": mean_of(same),
        "other_picture": mean_of(other),
        "chance": plain(size / shares.shape[1]),
    }


def _kept(records: Mapping[str, Sequence[StoredRecord]]) -> dict[str, Any]:
    """Return how often the answer stays with each set of image tokens, and the number of tokens chosen for enough."""
    names = [name for name, value in records[REPORTING][0].row.items() if isinstance(value, bool)]
    kept = {
        half: {name: share_of([record.row[name] for record in each]) for name in names}
        for half, each in records.items()
    }
    counts = sorted(int(name.removeprefix(f"{BEST} ")) for name in names if name.startswith(BEST))
    enough = [count for count in counts if kept[CHOOSING][f"{BEST} {count}"][0] >= ENOUGH]
    return {
        "keep": counts,
        "best": [kept[REPORTING][f"{BEST} {count}"] for count in counts],
        "random": [kept[REPORTING][f"{RANDOM} {count}"] for count in counts],
        "sets": {name: kept[REPORTING][name] for name in (ONLY_BOX, NO_BOX, NONE)},
        "enough": enough[0] if enough else None,
    }


# ---- cliff, failure ----


def cliff_numbers(halves: Halves) -> dict[str, Any]:
    """Return how often the answer stays when image tokens are dropped from each layer on, and the chosen cliff."""
    chooser, pruning = (_average(halves[half], AveragePruning) for half in (CHOOSING, REPORTING))
    low, high = pruning.accuracy_interval()
    cliff = chooser.cliff_layer(0, TOLERANCE)
    index = None if cliff is None else pruning.layers.index(cliff)
    columns = (pruning.accuracy()[0], low[0], high[0])
    return {
        "count": pruning.count,
        "chosen_on": chooser.count,
        "tolerance": TOLERANCE,
        "layers": list(pruning.layers),
        "stays": [plain([*(float(each[place]) for each in columns), pruning.count]) for place in range(len(low[0]))],
        "floor": _mean(pruning.floor_right),
        "cliff": cliff,
        "at_cliff": None if index is None else plain([*(float(each[index]) for each in columns), pruning.count]),
        "saved": None if index is None else plain(1 - float(pruning.operations_kept()[0, index])),
    }


def _mean(mean: Mean) -> list[float | None]:
    low, high = mean.wilson()
    return plain([float(each) for each in (mean.mean, low, high)] + [int(mean.count)])


def failure_numbers(halves: Halves, relations: Mapping[str, str]) -> dict[str, Any]:
    """Return how well scores tell right answers from wrong ones, and how often a chosen threshold is right.

    relations: of each record, by its id; whoever knows only the relation can predict failure, too.
    """
    records = {half: stored_records(folder) for half, folder in halves.items()}
    right = {half: np.array([record.row["right"] for record in members]) for half, members in records.items()}
    features = [record.load("features", FailureFeatures) for record in records[REPORTING]]
    fewest = min(int(right[REPORTING].sum()), int((~right[REPORTING]).sum()))
    try:
        prediction = predict_failure(features, right[REPORTING].tolist(), folds=max(2, min(5, fewest)), progress=False)
    except TraceError as error:
        return {"count": len(features), "right": share_of(right[REPORTING].tolist()), "problem": str(error)}
    base = _by_relation(records[CHOOSING], relations)
    scores: dict[str, Callable[[StoredRecord], float]] = {
        "probability of the first token": lambda record: record.row["first token"],
        "probability of the whole answer": lambda record: record.row["whole answer"],
        "the relation alone": lambda record: base[relations[record.id]],
    }
    decisions = {}
    for name, score in scores.items():
        values = {half: np.array([score(record) for record in members]) for half, members in records.items()}
        threshold = best_threshold(values[CHOOSING], right[CHOOSING])
        says_right = values[REPORTING] >= threshold
        decisions[name] = {
            "threshold": plain(threshold),
            "accuracy": share_of((says_right == right[REPORTING]).tolist()),
            "caught": share_of((~says_right)[~right[REPORTING]].tolist()),
            "false_alarms": share_of((~says_right)[right[REPORTING]].tolist()),
            "auroc": plain(auroc(values[REPORTING], right[REPORTING])),
        }
    return {
        "count": len(features),
        "chosen_on": len(records[CHOOSING]),
        "right": share_of(right[REPORTING].tolist()),
        "scores": {name: plain([prediction.auroc(name), *prediction.interval(name)]) for name in prediction.names},
        "decisions": decisions,
    }


def _by_relation(records: Sequence[StoredRecord], relations: Mapping[str, str]) -> dict[str, float]:
    """Return the share of right answers by relation; one half for relations without any."""
    found: dict[str, list[bool]] = {relation: [] for relation in relations.values()}
    for record in records:
        found[relations[record.id]].append(bool(record.row["right"]))
    return {name: sum(flags) / len(flags) if flags else 0.5 for name, flags in found.items()}


def best_threshold(scores: np.ndarray, is_right: np.ndarray) -> float:
    """Return the lowest threshold for which "right from it on" is most often true.

    Example:
        >>> import numpy as np
        >>> from multrace.scripts.studies.real_numbers import best_threshold
        >>> best_threshold(np.array([0.1, 0.4, 0.8]), np.array([False, True, True]))
        0.4
    """
    candidates = [*np.unique(scores).tolist(), math.inf]
    accuracies = [float(((scores >= candidate) == is_right).mean()) for candidate in candidates]
    return candidates[int(np.argmax(accuracies))]
