"""The average of causal traces over prompts, with intervals, in rows that all prompts share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.results import long_frame, stacked_frame
from ..engine.cells import TraceError
from .result import CausalTrace, EffectMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHARED = ("model", "revision", "layers", "window", "kinds", "metrics", "direction", "effect", "severed", "spans")
_TOKENS = {"last constraint token": "constraint_last", "last token": "last"}
"""Groups of arXiv 2202.05262 that consist of one token, with the name of this token in an edit."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageTrace(EffectMap):
    """Mean indirect effects of several traces in common rows. Made by `average`."""

    layout: ClassVar[str] = "multrace average trace 3"

    count: int
    """Number of traces."""
    clean: Mean
    """(metric,): score of the answer in the clean run."""
    corrupted: Mean
    """(metric,): score of the answer in the corrupted runs."""
    total: Mean
    """(metric,): clean minus corrupted score."""
    means: Mapping[str, Mean]
    """Per kind (metric, row, column): indirect effects over the traces that have the row."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the requested order."""
        return tuple(self.means)

    def total_effect_of(self, metric: str | None = None) -> float:
        """Return the mean of clean minus corrupted score in this metric (default: the main one)."""
        return float(self.total.mean[self._metric(metric)])

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: indirect effects, mean over the traces that have the row."""
        return self._of(kind, metric).mean

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Return no positions, since each prompt has its own."""
        return ()

    def interval(self, kind: str, metric: str | None = None, *, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (row, column): 95 % interval of the mean indirect effect over prompts (Student's t).

        Args:
            kind: a kind of site that was traced.
            metric: one of `metrics`; the main one by default.
            corrected: give intervals that hold jointly for all cells of this kind (Bonferroni). Use them to judge the
                largest cell.

        Returns:
            Both ends, NaN for rows that only one prompt has.

        Raises:
            ArtefactError: for an average of one trace.
        """
        mean = self._of(kind, metric)
        return mean.interval(comparisons=int((mean.count > 0).sum()) if corrected else 1)

    def total_interval(self, metric: str | None = None) -> tuple[float, float]:
        """Return (low, high) of the 95 % interval of the mean total effect over prompts (Student's t)."""
        index = self._metric(metric)
        low, high = self.total.interval()
        return float(low[index]), float(high[index])

    def plot(
        self, path: str | Path | None = None, kinds: Sequence[str] | None = None, metric: str | None = None
    ) -> "Figure":
        """Return a figure with one heat map of mean indirect effects per kind, with numbers where they fit.

        Numbers whose uncorrected 95 % interval contains zero are pale.

        Args:
            path: where to write the figure as well (png, pdf or svg by suffix); None for nowhere.
            kinds: kinds of sites to draw; all by default.
            metric: the metric to draw; the main one by default.

        Raises:
            TraceError: if a kind or the metric was not traced.
            ArtefactError: if the file cannot be written.
        """
        panels = [self._panel(kind, metric) for kind in (kinds or self.kinds)]
        index, total = self._metric(metric), self.total_effect_of(metric)
        scores = f"clean {self.clean.mean[index]:.3f}, corrupted {self.corrupted.mean[index]:.3f}"
        has_pale = self.count > 1 and drawing.show_numbers(panels)
        pale = "; pale numbers: the 95% interval holds zero" if has_pale else ""
        name = "" if index == 0 else f" on {self.metrics[index]}"
        variant = "" if self._is_usual else f"\n{self.variant[:1].upper()}{self.variant[1:]}"
        title = f"Average indirect effect{name} over {self.count} prompts{variant}"
        subtitle = f"{scores}, total effect {total:.3f}  ({self.corruption}{pale})"
        stars = ["constraint" in row for row in self.rows]
        figure = drawing.heat_maps(
            panels, rows=self.rows, stars=stars, titles=(title, subtitle), unit="indirect effect"
        )
        return drawing.finished(figure, path)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one line per kind, metric, row and layer.

        Its columns include effect (the mean), low and high of its 95 % interval (NaN where n is 1), n (the number of
        traces with that row), and layer (the column, which is the centre of a window).
        """
        frames = {}
        for kind, mean in self.means.items():
            low, high = mean.band()
            axes = {"metric": self.metrics, "row": self.rows, "layer": range(mean.shape[-1])}
            frames[kind] = long_frame(axes, {"effect": mean.mean, "low": low, "high": high, "n": mean.count})
        return stacked_frame(frames, "kind")

    def _of(self, kind: str, metric: str | None) -> Mean:
        """Return the mean indirect effects (row, column)."""
        return self.means[self._check_kind(kind)][self._metric(metric)]

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        if self.count < 2:
            return lambda row, column: {}
        ends = torch.stack(self.interval(kind, corrected=True), -1)  # NaN if only one prompt has the row
        return lambda row, column: (
            {} if ends[row, column].isnan().any() else {"interval": tuple(ends[row, column].tolist())}
        )

    def _panel(self, kind: str, metric: str | None) -> "drawing.Panel":
        clear = None
        if self.count > 1:
            low, high = self.interval(kind, metric)
            clear = (low > 0) | (high < 0)
        return drawing.Panel(
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

    def _lines(self) -> tuple[str, str]:
        ends = " [{:.3f}, {:.3f}]".format(*self.total_interval()) if self.count > 1 else ""
        return (
            f"AverageTrace of {self.model} over {self.count} prompts ({self.corruption})",
            f"total effect {self.total_effect:.3f}{ends}; {self._strongest()}",
        )

    def _problem(self) -> str | None:
        metrics, rows = len(self.metrics), len(self.rows)
        fits = [each.fits(metrics) for each in (self.clean, self.corrupted, self.total)]
        fits += [len(self.row_tokens) == rows, bool(self.kinds), set(self.estimated) <= set(self.kinds)]
        for kind, mean in self.means.items():
            columns = len(self.spans[kind])
            has_layers = kind in ("vision", "projector") or columns == self.layers
            fits += [mean.fits(metrics, rows, columns), self.spans[kind].shape == (columns, 2), has_layers]
        return None if all(fits) else "its tensors are of other shapes than its rows, layers and metrics"


class TraceAverager(Averager[CausalTrace, AverageTrace]):
    """Averages traces of one model that were made with equal settings.

    Rows that are groups must be equal. Rows that are single tokens are sorted into ROME's groups (arXiv 2202.05262):
    first, middle and last constraint token, first subsequent, further and last token, and groups such as the image
    under their own names. A group of several tokens is represented by its mean, and a prompt without a group is left
    out of that row.
    """

    alike = _SHARED

    def __init__(self) -> None:
        super().__init__()
        self._tokens: dict[str, set[str | int | None]] = {}
        self._corruptions: dict[str, None] = {}
        self._seeds: set[int | None] = set()
        self._estimated: dict[str, dict[str, Tensor]] = {}

    def _take(self, result: CausalTrace) -> None:
        groups = self._groups(result)
        self._corruptions[result.corruption] = None
        self._seeds.add(result.seed)
        metric = {"metric": result.metrics}
        self._add("clean", result.clean_scores, metric)
        self._add("corrupted", result.corrupted_scores.mean(-1), metric)
        self._add("total", result.clean_scores - result.corrupted_scores.mean(-1), metric)
        for kind in result.kinds:
            effects = torch.stack([result.indirect_effect(kind, name) for name in result.metrics])
            values = torch.stack([effects[:, list(rows)].mean(1) for rows in groups.values()], 1)
            self._add(kind, values, {**metric, "row": tuple(groups), "column": range(values.shape[-1])})
            if kind in result.estimated:
                flags, own = self._estimated.setdefault(kind, {}), result.estimated[kind]
                for name, rows in groups.items():
                    flags[name] = own[list(rows)].any(0) | flags.get(name, torch.zeros_like(own[0]))

    def _groups(self, trace: CausalTrace) -> dict[str, tuple[int, ...]]:
        """Return the trace's rows by the name of their common row, and record the names of the tokens in an edit."""
        if trace.grouped != self.first.grouped:
            raise TraceError("some of these traces hold groups only, others single tokens; average equal ones only")
        if trace.grouped:
            if trace.rows != self.first.rows:
                raise TraceError(
                    f"these traces differ in their rows ({self.first.rows} and {trace.rows}); average equal ones only"
                )
            for index, token in enumerate(trace.row_tokens):
                self._tokens.setdefault(str(index), set()).add(token)
            return {str(index): (index,) for index in range(len(trace.rows))}  # labels may occur twice
        if not trace.starred:
            raise TraceError(
                f"traces over single tokens are averaged by their place after the constraint, and {trace.question!r} "
                "has none; build prompts with constraint=, or trace again with group names, such as "
                'positions=("image", "question", "last") (--positions image question last)'
            )
        return _token_groups(trace)

    def _average(self) -> AverageTrace:
        first, means = self.first, {kind: self._mean(kind) for kind in self.first.kinds}
        names = self._labels(first.kinds[0], "row")
        present = [index for index in range(len(names)) if (means[first.kinds[0]].count[0, index] > 0).any()]
        if first.grouped:
            present = list(range(len(names)))
            rows = first.rows
            tokens = [next(iter(each)) if len(each) == 1 else None for each in self._tokens.values()]
        else:
            rows = tuple(names[index] for index in present)
            tokens = [_TOKENS.get(row) for row in rows]
        descriptions = list(self._corruptions)
        others = f" and {len(descriptions) - 1} more" if len(descriptions) > 1 else ""
        return AverageTrace(
            rows=rows,
            row_tokens=tuple(tokens),
            corruption=descriptions[0] + others,
            seed=first.seed if len(self._seeds) == 1 else None,
            estimated={
                kind: torch.stack(
                    [flags.get(names[index], torch.zeros_like(next(iter(flags.values())))) for index in present]
                )
                for kind, flags in self._estimated.items()
            },
            count=self.count,
            clean=self._mean("clean"),
            corrupted=self._mean("corrupted"),
            total=self._mean("total"),
            means={kind: mean[:, present] for kind, mean in means.items()},
            **{name: getattr(first, name) for name in _SHARED if name != "kinds"},
        )


def _token_groups(trace: CausalTrace) -> dict[str, tuple[int, ...]]:
    """Return the rows of one trace by the name of their group, including groups without a row.

    As in ROME, tokens before the constraint are left out, the only token of a constraint is both its first and last,
    and the first subsequent token may also be the last one.
    """
    patches = {position for position, *_ in trace.patches}
    single, groups = {}, {}
    for index, (label, positions) in enumerate(zip(trace.rows, trace.row_positions, strict=True)):
        is_token = len(positions) == 1 and positions[0] not in patches and label == trace.tokens[positions[0]]
        if is_token:
            single[positions[0]] = index
        else:
            groups[label] = (index,)
    first, after, last = min(trace.starred), max(trace.starred) + 1, len(trace.tokens) - 1
    places = {
        "first constraint token": [first],
        "middle constraint tokens": range(first + 1, after - 1),
        "last constraint token": [after - 1],
        "first subsequent token": [after],
        "further tokens": range(after + 1, last),
        "last token": [last],
    }
    return groups | {
        name: tuple(single[position] for position in positions if position in single)
        for name, positions in places.items()
    }
