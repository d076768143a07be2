"""Averages of traces over prompts, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.heat_map import Panel, heat_maps, show_numbers
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ..errors import TraceError
from .alignment import Aligned, aligned_rows
from .result import CausalTrace
from .sites import EffectMap

_LAYOUT = "multrace average trace 2"
_SHARED = ("model", "revision", "layers", "window", "kinds", "metrics", "direction", "effect", "severed")


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageTrace(EffectMap):
    """Mean indirect effects of several traces with the same rows, and each trace's own. Made by `average`."""

    clean_scores: Tensor
    """(metric, trace) float64: score of each prompt's answer in its clean run."""
    corrupted_scores: Tensor
    """(metric, trace) float64: the same after corruption, mean over samples."""
    trace_effects: Mapping[str, Tensor]
    """Per kind (metric, trace, row, column) float64: indirect effects; NaN where a prompt has no such row."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the order asked."""
        return tuple(self.trace_effects)

    @property
    def count(self) -> int:
        """How many traces were averaged."""
        return self.clean_scores.shape[1]

    @property
    def clean(self) -> Tensor:
        """(trace,) float64: score of each prompt's answer in its clean run, in the main metric."""
        return self.clean_scores[0]

    @property
    def corrupted(self) -> Tensor:
        """(trace,) float64: the same after corruption, mean over samples."""
        return self.corrupted_scores[0]

    @property
    def effects(self) -> dict[str, Tensor]:
        """Per kind (trace, row, column) float64: indirect effects in the main metric."""
        return {kind: effects[0] for kind, effects in self.trace_effects.items()}

    def total_effect_of(self, metric: str | None = None) -> float:
        """Clean minus corrupted score in this metric (default: the main one), mean over traces."""
        index = self._metric(metric)
        return float((self.clean_scores[index] - self.corrupted_scores[index]).mean())

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """(row, column) float64: indirect effects, mean over the traces that have the row."""
        return self._effects(kind, metric).nanmean(0)

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Empty: each prompt has its own positions."""
        return ()

    def interval(self, kind: str, metric: str | None = None, *, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """(low, high), each (row, column): 95 % interval of the mean indirect effect over prompts, by Student's t.

        corrected: intervals that hold all cells of this kind together (Bonferroni), as one must ask for who looks at
        the largest of them. NaN for rows that only one prompt has; TraceError for an average of one trace.
        """
        effects = self._effects(kind, metric)
        cells = int((~effects.isnan()).any(0).sum())
        return mean_interval(effects, comparisons=cells if corrected else 1)

    def total_interval(self, metric: str | None = None) -> tuple[float, float]:
        """(low, high) of the 95 % interval of the mean total effect, by Student's t."""
        index = self._metric(metric)
        low, high = mean_interval(self.clean_scores[index] - self.corrupted_scores[index])
        return float(low), float(high)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageTrace":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def plot(self, path: str | Path, kinds: Sequence[str] | None = None, metric: str | None = None) -> Path:
        """The written picture: one heat map of mean indirect effects per kind, with its numbers where they fit.

        Numbers whose own 95 % interval holds zero are pale.
        """
        panels = [self._panel(kind, metric) for kind in (kinds or self.kinds)]
        index, total = self._metric(metric), self.total_effect_of(metric)
        means = f"clean {self.clean_scores[index].mean():.3f}, corrupted {self.corrupted_scores[index].mean():.3f}"
        has_pale = self.count > 1 and show_numbers(panels)
        pale = "; pale numbers: the 95% interval holds zero" if has_pale else ""
        name = "" if index == 0 else f" on {self.metrics[index]}"
        usual = (self.direction, self.effect, self.severed) == ("restore", "total", None)
        variant = "" if usual else f"\n{self.variant[:1].upper()}{self.variant[1:]}"
        title = f"Average indirect effect{name} over {self.count} prompts{variant}"
        subtitle = f"{means}, total effect {total:.3f}  ({self.corruption}{pale})"
        stars = ["constraint" in row for row in self.rows]
        return heat_maps(path, panels, rows=self.rows, stars=stars, titles=(title, subtitle), unit="indirect effect")

    def to_dataframe(self) -> pd.DataFrame:
        """One line per kind, metric, row and layer: mean effect, its 95 % interval, and n, the traces with that row.

        layer is the column, the centre of a window; low and high are NaN where n is 1.
        """
        return pd.concat([self._frame(kind) for kind in self.kinds], ignore_index=True)

    def _frame(self, kind: str) -> pd.DataFrame:
        effects = self.trace_effects[kind]
        unknown = torch.full_like(effects[:, 0], torch.nan)
        intervals = [self.interval(kind, metric) for metric in self.metrics] if self.count > 1 else []
        low, high = (torch.stack(side) for side in zip(*intervals, strict=True)) if intervals else (unknown, unknown)
        values = {"effect": effects.nanmean(1), "low": low, "high": high, "n": (~effects.isnan()).sum(1)}
        axes = [("metric", self.metrics), ("row", self.rows), ("layer", range(effects.shape[-1]))]
        frame = long_frame(axes, values)
        frame.insert(0, "kind", kind)
        return frame

    def _effects(self, kind: str, metric: str | None) -> Tensor:
        """(trace, row, column): indirect effects."""
        return self.trace_effects[self._check_kind(kind)][self._metric(metric)]

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        if self.count < 2:
            return lambda row, column: {}
        low, high = self.interval(kind, corrected=True)
        ends = torch.stack([low, high], -1)  # NaN where a single prompt has the row
        return lambda row, column: (
            {} if ends[row, column].isnan().any() else {"interval": tuple(ends[row, column].tolist())}
        )

    def _panel(self, kind: str, metric: str | None) -> Panel:
        clear = None
        if self.count > 1:
            low, high = self.interval(kind, metric)
            clear = (low > 0) | (high < 0)
        return Panel(
            kind=kind,
            window=self.window,
            values=self.indirect_effect(kind, metric),
            low=0.0,
            scale=self.total_effect_of(metric),
            verb="corrupted" if self.direction == "corrupt" else "restored",
            numbers=True,
            clear=clear,
            estimated=self.estimated.get(kind),
        )


def average(traces: Sequence[CausalTrace]) -> AverageTrace:
    """Mean effects of traces of one model that asked the same: equal kinds, window, metrics and variant.

    Rows that are groups must be equal. Rows that are single tokens are put into ROME's groups: first, middle and last
    constraint token, first subsequent, further and last token, and groups such as the image under their own names; a
    group of several tokens counts with its mean, and a prompt without a group is left out of that row. TraceError where
    traces differ, for no traces, and for single tokens without a constraint.
    """
    _check_alike(traces)
    first, rows = traces[0], aligned_rows(traces)
    descriptions = dict.fromkeys(trace.corruption for trace in traces)
    others = f" and {len(descriptions) - 1} more" if len(descriptions) > 1 else ""
    return AverageTrace(
        rows=tuple(row.label for row in rows),
        row_tokens=tuple(row.token for row in rows),
        spans=first.spans,
        corruption=first.corruption + others,
        seed=first.seed if len({trace.seed for trace in traces}) == 1 else None,
        estimated={kind: _estimated(traces, rows, kind) for trace in traces for kind in trace.estimated},
        clean_scores=torch.stack([trace.clean_scores for trace in traces], 1),
        corrupted_scores=torch.stack([trace.corrupted_scores.mean(-1) for trace in traces], 1),
        trace_effects={kind: _aligned(traces, rows, kind) for kind in first.kinds},
        **{name: getattr(first, name) for name in _SHARED if name != "kinds"},
    )


def _check_alike(traces: Sequence[CausalTrace]) -> None:
    if not traces:
        raise TraceError("no traces to average; pass at least one")
    for name in _SHARED:
        found = {getattr(trace, name): None for trace in traces}
        if len(found) > 1:
            raise TraceError(
                f"these traces differ in their {name} ({' and '.join(map(str, found))}); average equal ones only"
            )
    for kind in traces[0].kinds:
        if not all(torch.equal(trace.spans[kind], traces[0].spans[kind]) for trace in traces):
            raise TraceError(f"these traces differ in the layers restored for {kind!r}; average equal ones only")


def _aligned(traces: Sequence[CausalTrace], rows: Sequence[Aligned], kind: str) -> Tensor:
    """(metric, trace, row, column): indirect effects in common rows, NaN where a trace has none."""
    metrics = []
    for metric in traces[0].metrics:
        maps = [trace.indirect_effect(kind, metric) for trace in traces]
        metrics.append(
            torch.stack(
                [
                    torch.stack([effects[list(row.indices[index])].mean(0) for row in rows])
                    for index, effects in enumerate(maps)
                ]
            )
        )
    return torch.stack(metrics)


def _estimated(traces: Sequence[CausalTrace], rows: Sequence[Aligned], kind: str) -> Tensor:
    """(row, column): any value that went into the mean is an estimate."""
    flags = [
        torch.stack([trace.estimated[kind][list(row.indices[index])].any(0) for row in rows])
        for index, trace in enumerate(traces)
        if kind in trace.estimated
    ]
    return torch.stack(flags).any(0)


def _problem(trace: AverageTrace) -> str | None:
    """What does not fit together in an average that was read from a file."""
    metrics, rows, count = len(trace.metrics), len(trace.rows), trace.count
    fits = [each.shape == (metrics, count) for each in (trace.clean_scores, trace.corrupted_scores)]
    fits += [len(trace.row_tokens) == rows, bool(trace.kinds), set(trace.estimated) <= set(trace.kinds)]
    for kind, effects in trace.trace_effects.items():
        columns = len(trace.spans[kind])
        has_layers = kind in ("vision", "projector") or columns == trace.layers
        fits += [effects.shape == (metrics, count, rows, columns), trace.spans[kind].shape == (columns, 2), has_layers]
    return None if all(fits) else "its tensors are of other shapes than its rows, layers and metrics"
