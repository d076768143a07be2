"""What a trace found: scores and effects of one prompt, averages of several with intervals; saved, loaded, drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .effects import EffectMap
from .errors import TraceError
from .plots import Panel, heat_maps
from .storage import load, save

_Loaded = TypeVar("_Loaded", bound=EffectMap)


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTrace(EffectMap):
    """One prompt's causal trace. Made by `causal_trace`."""

    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    row_positions: tuple[tuple[int, ...], ...]
    """Token positions that each row restores."""
    grouped: bool
    """Every row is a named group, so that traces of other prompts have the same rows."""
    starred: tuple[int, ...]
    """Positions of the constraint."""
    spans: Mapping[str, Tensor]
    """Per kind (layer, 2): first and last layer, both included, that a cell restores."""
    answer_ids: tuple[int, ...]
    """The scored tokens: the answer's first, or all of them."""
    answer: str
    """The scored tokens' text."""
    clean: float
    """Their probability in the clean run."""
    corrupted: Tensor
    """(sample,) float64: their probability in each corrupted run."""
    scores: Mapping[str, Tensor]
    """Per kind (row, layer) float64: their probability with the states restored, mean over samples."""

    _LAYOUT = "multrace causal trace 1"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the order asked."""
        return tuple(self.scores)

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted probability, mean over samples."""
        return self.clean - float(self.corrupted.mean())

    def indirect_effect(self, kind: str) -> Tensor:
        """(row, layer) float64: restored minus corrupted probability, mean over samples."""
        return self.scores[self._check_kind(kind)] - self.corrupted.mean()

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Token positions of the row with this index."""
        return self.row_positions[row]

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        fields = _shared_fields(self) | {
            "question": self.question,
            "tokens": self.tokens,
            "row_positions": self.row_positions,
            "grouped": self.grouped,
            "starred": self.starred,
            "answer_ids": self.answer_ids,
            "answer": self.answer,
        }
        tensors = {"clean": torch.tensor(self.clean, dtype=torch.float64), "corrupted": self.corrupted}
        tensors |= {f"scores.{kind}": scores for kind, scores in self.scores.items()}
        tensors |= {f"spans.{kind}": spans for kind, spans in self.spans.items()}
        return save(path, self._LAYOUT, fields, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "CausalTrace":
        """The trace that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return _load(path, cls._LAYOUT, cls._from_file)

    @classmethod
    def _from_file(cls, fields: dict[str, Any], tensors: dict[str, Tensor]) -> "CausalTrace":
        kinds = fields.pop("kinds")
        return cls(
            **_tuples(fields),
            clean=float(tensors["clean"]),
            corrupted=tensors["corrupted"],
            scores={kind: tensors[f"scores.{kind}"] for kind in kinds},
            spans={kind: tensors[f"spans.{kind}"] for kind in kinds},
        )

    def plot(self, path: str | Path, kinds: Sequence[str] | None = None) -> Path:
        """The written picture (format by suffix: png, pdf, svg): one heat map of restored probabilities per kind.

        ROME's style: rows from the top, constraint tokens starred, colours from the corrupted probability upwards.
        """
        low = float(self.corrupted.mean())
        panels = [
            Panel(
                kind=kind,
                window=self.window,
                values=self.scores[self._check_kind(kind)],
                low=low,
                scale=self.total_effect,
            )
            for kind in (kinds or self.kinds)
        ]
        subtitle = f"clean {self.clean:.3f}, corrupted {low:.3f}  ({self.corruption})"
        stars = [bool(set(positions) & set(self.starred)) for positions in self.row_positions]
        rows = [
            f"{row} ({len(positions)} tokens)" if len(positions) > 1 else row
            for row, positions in zip(self.rows, self.row_positions, strict=True)
        ]
        unit = f"p({self.answer})"
        return heat_maps(path, panels, rows=rows, stars=stars, title=self.question, subtitle=subtitle, unit=unit)


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageTrace(EffectMap):
    """Mean indirect effects of several traces with the same rows, and each trace's own. Made by `average`."""

    clean: Tensor
    """(trace,) float64: probability of each prompt's answer in its clean run."""
    corrupted: Tensor
    """(trace,) float64: the same after corruption, mean over samples."""
    effects: Mapping[str, Tensor]
    """Per kind (trace, row, layer) float64: indirect effects."""

    _LAYOUT = "multrace average trace 1"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the order asked."""
        return tuple(self.effects)

    @property
    def count(self) -> int:
        """How many traces were averaged."""
        return len(self.clean)

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted probability, mean over traces."""
        return float((self.clean - self.corrupted).mean())

    def indirect_effect(self, kind: str) -> Tensor:
        """(row, layer) float64: restored minus corrupted probability, mean over traces."""
        return self.effects[self._check_kind(kind)].mean(0)

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Empty: each prompt has its own positions."""
        return ()

    def interval(self, kind: str) -> tuple[Tensor, Tensor]:
        """(low, high), each (row, layer): 95% interval of the mean indirect effect, mean -+ 1.96 s / sqrt(n).

        TraceError for fewer than two traces, whose spread is unknown.
        """
        return _interval(self.effects[self._check_kind(kind)])

    def total_interval(self) -> tuple[float, float]:
        """(low, high) of the 95% interval of the mean total effect."""
        low, high = _interval(self.clean - self.corrupted)
        return float(low), float(high)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        tensors = {"clean": self.clean, "corrupted": self.corrupted}
        tensors |= {f"effects.{kind}": effects for kind, effects in self.effects.items()}
        return save(path, self._LAYOUT, _shared_fields(self), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "AverageTrace":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return _load(path, cls._LAYOUT, cls._from_file)

    @classmethod
    def _from_file(cls, fields: dict[str, Any], tensors: dict[str, Tensor]) -> "AverageTrace":
        kinds = fields.pop("kinds")
        return cls(
            **_tuples(fields),
            clean=tensors["clean"],
            corrupted=tensors["corrupted"],
            effects={kind: tensors[f"effects.{kind}"] for kind in kinds},
        )

    def plot(self, path: str | Path, kinds: Sequence[str] | None = None) -> Path:
        """The written picture: one heat map of mean indirect effects per kind, with its numbers where they fit.

        Numbers whose 95% interval holds zero are pale.
        """
        panels = [self._panel(kind) for kind in (kinds or self.kinds)]
        means = f"clean {self.clean.mean():.3f}, corrupted {self.corrupted.mean():.3f}"
        pale = "; pale numbers: the 95% interval holds zero" if self.count > 1 else ""
        subtitle = f"{means}, total effect {self.total_effect:.3f}  ({self.corruption}{pale})"
        title = f"Average indirect effect over {self.count} prompts"
        stars = [row.startswith("constraint") for row in self.rows]
        return heat_maps(
            path, panels, rows=self.rows, stars=stars, title=title, subtitle=subtitle, unit="indirect effect"
        )

    def _panel(self, kind: str) -> Panel:
        clear = None
        if self.count > 1:
            low, high = self.interval(kind)
            clear = (low > 0) | (high < 0)
        values = self.indirect_effect(kind)
        return Panel(
            kind=kind, window=self.window, values=values, low=0.0, scale=self.total_effect, numbers=True, clear=clear
        )


def average(traces: Sequence[CausalTrace]) -> AverageTrace:
    """Mean effects of traces with the same model, group rows, kinds and window. TraceError where they differ."""
    if not traces:
        raise TraceError("no traces to average; pass at least one")
    first = traces[0]
    if not all(trace.grouped for trace in traces):
        raise TraceError(
            "traces over single tokens cannot be averaged, since each prompt has its own tokens; "
            'trace again with group names, such as positions=("image", "question", "constraint_last", "last")'
        )
    for name in ("model", "rows", "layers", "window", "kinds"):
        found = {getattr(trace, name): None for trace in traces}
        if len(found) > 1:
            raise TraceError(
                f"these traces differ in their {name} ({' and '.join(map(str, found))}); average equal ones only"
            )
    descriptions = dict.fromkeys(trace.corruption for trace in traces)
    others = f" and {len(descriptions) - 1} more" if len(descriptions) > 1 else ""
    tokens = zip(*(trace.row_tokens for trace in traces), strict=True)
    return AverageTrace(
        model=first.model,
        revision=first.revision,
        rows=first.rows,
        row_tokens=tuple(each[0] if len(set(each)) == 1 else None for each in tokens),
        layers=first.layers,
        window=first.window,
        corruption=first.corruption + others,
        seed=first.seed if len({trace.seed for trace in traces}) == 1 else None,
        clean=torch.tensor([trace.clean for trace in traces], dtype=torch.float64),
        corrupted=torch.stack([trace.corrupted.mean() for trace in traces]),
        effects={kind: torch.stack([trace.indirect_effect(kind) for trace in traces]) for kind in first.kinds},
    )


def _interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """95% interval of the mean over the first axis."""
    if len(values) < 2:
        raise TraceError(f"an interval needs at least two traces, this average has {len(values)}; average more prompts")
    mean, half = values.mean(0), 1.96 * values.std(0) / math.sqrt(len(values))
    return mean - half, mean + half


def _shared_fields(trace: EffectMap) -> dict[str, Any]:
    """What every map writes into the header of its file."""
    names = ("model", "revision", "rows", "row_tokens", "layers", "window", "corruption", "seed", "kinds")
    return {name: getattr(trace, name) for name in names}


def _load(path: str | Path, layout: str, build: Callable[[dict[str, Any], dict[str, Tensor]], _Loaded]) -> _Loaded:
    """What `build` makes of the file; a file that lacks something is corrupt."""
    fields, tensors = load(path, layout)
    try:
        trace = build(fields, tensors)
        shapes = {tuple(trace.indirect_effect(kind).shape) for kind in trace.kinds}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise TraceError(f"{str(path)!r} is not a whole trace ({error}); trace again and save anew") from error
    if shapes != {(len(trace.rows), trace.layers)}:
        raise TraceError(
            f"{str(path)!r} has effects of other shapes than its rows and layers; trace again and save anew"
        )
    return trace


def _tuples(value: Any) -> Any:
    """JSON's lists back as tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
