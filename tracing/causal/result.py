"""The causal trace of one prompt: its scores and effects, what to read off them, and how to save, draw and export them.

A map of indirect effects has a largest cell, causal blocks, and a site for an edit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import SITE_NAMES
from ...artefacts.files import write_arrays
from ...artefacts.results import Result, long_frame, stacked_frame
from ...models import Prompt
from ..engine.cells import EngineReport, TraceError
from .sites import EditSite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Peak(NamedTuple):
    """One cell of a map: the row's label, the layer (centre of its window) and the indirect effect (main metric)."""

    row: str
    layer: int
    effect: float


@dataclass(frozen=True, kw_only=True)
class CausalBlock:
    """Neighbouring columns of one row whose restored outputs all recover the answer."""

    kind: str
    row: str
    positions: tuple[int, ...]
    """The row's token positions; empty in an average, where they differ from prompt to prompt."""
    token: str | int | None
    """Group name or position by which an edit names the row's token; None for rows of several tokens or patches."""
    first: int
    last: int
    """First and last column, both included; for layers restored in windows, a column is the centre of its window."""
    layers: tuple[int, ...]
    """All layers, of the decoder or of the kind's own tower, that a window of the block restores."""
    effect: float
    """The largest indirect effect inside the block, in units of the main metric."""
    spread: float | None = None
    """Standard deviation of that cell's effect over the noise samples of one prompt; None for one sample."""
    interval: tuple[float, float] | None = None
    """95 % interval of that cell's mean effect over prompts, corrected for the choice among all cells of the kind."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EffectMap(Result):
    """Indirect effects over (row, column) for some kinds of sites, the common base of single traces and averages.

    A column is a decoder layer; for "vision" it is a layer of the vision tower, and "projector" has one column.
    """

    model: str
    """Name or path of the traced model."""
    revision: str | None
    rows: tuple[str, ...]
    """Label of each row: a token, or the name of a token group."""
    row_tokens: tuple[str | int | None, ...]
    """Group name or position by which an edit names the row's token; None for rows of several tokens or patches."""
    layers: int
    """Number of decoder layers."""
    window: int
    """Number of neighbouring MLPs or attentions restored together; hidden states are restored one at a time."""
    spans: Mapping[str, Tensor]
    """Per kind (column, 2): first and last layer, both included, that a cell restores."""
    corruption: str
    seed: int | None
    """Random seed of the noise; None if the corruption is not random."""
    metrics: tuple[str, ...] = ("probability",)
    """Names of the metrics; the first is the main one."""
    direction: Literal["restore", "corrupt"] = "restore"
    """"restore" patches clean states into the corrupted run, "corrupt" corrupted states into the clean run."""
    effect: Literal["total", "direct"] = "total"
    """"total", or "direct" if the other image tokens were frozen at the run's own states, so that a patch acts on the
    text only."""
    severed: str | None = None
    """"mlp" or "attention" if later modules of that kind were frozen at the run's own values, else None."""
    estimated: Mapping[str, Tensor] = field(default_factory=dict)
    """Per kind (row, column), True where the value is an estimate by attribution; empty where all are exact."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the requested order."""
        raise NotImplementedError

    def total_effect_of(self, metric: str | None = None) -> float:
        """Return clean minus corrupted score in this metric (default: the main one)."""
        raise NotImplementedError

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: the part of the total effect that each cell recovers.

        Args:
            kind: a kind of site that was traced, such as "hidden" or "mlp".
            metric: one of `metrics`; the main one by default.

        Raises:
            TraceError: if this kind or metric was not traced.
        """
        raise NotImplementedError

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Return the token positions of the row with this index; none if they differ from prompt to prompt."""
        raise NotImplementedError

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        """Return a function from row and column to the fields of a block that describe the certainty of its effect."""
        raise NotImplementedError

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted score in the main metric."""
        return self.total_effect_of()

    def normalised_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: each indirect effect as a share of the total effect.

        Raises `TraceError` if the total effect is not positive.
        """
        return self.indirect_effect(kind, metric) / self._positive_total(metric)

    def best(self, kind: str = "mlp") -> Peak:
        """Return the cell with the largest indirect effect."""
        effects = _present(self.indirect_effect(kind))
        row, column = divmod(int(effects.argmax()), effects.shape[1])
        return Peak(self.rows[row], column, float(effects[row, column]))

    def causal_blocks(self, kind: str = "mlp", fraction: float = 0.5) -> tuple[CausalBlock, ...]:
        """Return runs of neighbouring columns with large effects, the strongest first; none if no effect is positive.

        Args:
            kind: a kind of site that was traced.
            fraction: share of the map's largest effect that every column of a block reaches, above 0 and at most 1.

        A trace of one prompt gives the spread of an effect over its noise samples, which does not measure significance;
        an average gives an interval over prompts.
        """
        _check_fraction(fraction)
        effects = _present(self.indirect_effect(kind))
        threshold = fraction * float(effects.max())
        if threshold <= 0:
            return ()
        certainty = self._certainty(kind)
        blocks = []
        for row in range(len(self.rows)):
            for first, last in _runs((effects[row] >= threshold).tolist()):
                peak = first + int(effects[row, first : last + 1].argmax())
                block = CausalBlock(
                    kind=kind,
                    row=self.rows[row],
                    positions=self.positions_of(row),
                    token=self.row_tokens[row],
                    first=first,
                    last=last,
                    layers=tuple(range(int(self.spans[kind][first, 0]), int(self.spans[kind][last, 1]) + 1)),
                    effect=float(effects[row, peak]),
                    **certainty(row, peak),
                )
                blocks.append(block)
        return tuple(sorted(blocks, key=lambda block: -block.effect))

    def onset(self, row: str | int, fraction: float = 0.25) -> int | None:
        """Return the first layer at which a row's hidden state recovers a share of the total effect, or None.

        Args:
            row: label or index of the row, or the group name of its token.
            fraction: share of the total effect, above 0 and at most 1.

        Raises:
            TraceError: if hidden states were not traced or the corruption lowers nothing.
        """
        _check_fraction(fraction)
        effects = self.indirect_effect("hidden")[self._row_index(row)]
        reached = (effects >= fraction * self._positive_total()).nonzero().flatten().tolist()
        return reached[0] if reached else None

    def edit_site(self, fraction: float = 0.25) -> EditSite:
        """Return the site where an edit belongs: the strongest MLP cell at or after the onset of its token.

        Candidates are the rows of a single text token. The onset of a token is the first layer at which restoring its
        hidden state recovers a share of the total effect. Before it, the token does not yet carry what the corruption
        destroyed: a key taken there depends on the wording and not on the picture, so that an edit would change the
        answer for every picture. A token that the corruption itself destroyed has its onset at layer 0, which says
        nothing: restoring its embedding brings all of it back. Its MLP cells count from the first window on that does
        not hold layer 0.

        Args:
            fraction: share of the total effect that defines the onset, above 0 and at most 1.

        Raises:
            TraceError: if "hidden" and "mlp" were not both traced, if the corruption lowers nothing, if no candidate
                ever carries the information, or for direct effects, severed runs and patched-in corrupted states.
        """
        if not self._is_usual:
            raise TraceError(
                f"an edit site needs total effects of restoring clean states, this trace holds {self.variant}; "
                'trace with direction="restore", effect="total" and severed=None'
            )
        effects, best = _present(self.indirect_effect("mlp")), None
        for row, token in enumerate(self.row_tokens):
            if token is None or (onset := self.onset(row, fraction)) is None:
                continue
            start = self.first_sound_layer(onset)
            if start is None:
                continue
            layer = start + int(effects[row, start:].argmax())
            if best is None or effects[row, layer] > best.effect:
                since = "from there on" if start == onset else f"from layer {start} on, the first without layer 0,"
                reason = (
                    f"restoring the hidden state of {self.rows[row]!r} first gives back {fraction:.0%} of the total "
                    f"effect at layer {onset}; {since} its MLPs act most at layer {layer}"
                )
                best = EditSite(layer=layer, token=token, effect=float(effects[row, layer]), onset=onset, reason=reason)
        if best is None:
            raise TraceError(
                f"no single token among the rows {', '.join(map(repr, self.rows))} gives back {fraction:.0%} of the "
                'total effect when its hidden state is restored; trace more rows, such as positions="tokens"'
            )
        return best

    def first_sound_layer(self, onset: int) -> int | None:
        """Return the first layer whose MLP cell says where a token with this onset keeps a fact; None for none.

        It is the onset, except where that is layer 0: the corruption then destroyed the token itself, and a window with
        layer 0 restores what its embedding says rather than what the model knows.
        """
        if onset:
            return onset
        sound = (self.spans["mlp"][:, 0] > 0).nonzero().flatten().tolist()
        return sound[0] if sound else None

    @property
    def variant(self) -> str:
        """The kind of effect in words, which is "total effects of restored states" for the default settings."""
        states = {"restore": "restored states", "corrupt": "corrupted states put into the clean run"}[self.direction]
        severed = f", later {SITE_NAMES.get(self.severed, self.severed)} outputs severed" if self.severed else ""
        return f"{self.effect} effects of {states}{severed}"

    @property
    def _is_usual(self) -> bool:
        """True for total effects of restored states without severed modules."""
        return (self.direction, self.effect, self.severed) == ("restore", "total", None)

    def _strongest(self) -> str:
        """Return a description of the largest cell of each kind."""
        peaks = {kind: self.best(kind) for kind in self.kinds}
        cells = [f"{kind} {peak.effect:.3f} ({peak.row.strip()!r}, layer {peak.layer})" for kind, peak in peaks.items()]
        return f"largest: {', '.join(cells)}"

    def _positive_total(self, metric: str | None = None) -> float:
        """Return the total effect, which must be positive for shares of it to have a meaning."""
        total = self.total_effect_of(metric)
        if not total > 0:
            raise TraceError(
                f"the corruption ({self.corruption}) does not lower the answer's {metric or self.metrics[0]} (total "
                f"effect {total:.3f}), so nothing can be brought back; trace with a stronger or another corruption"
            )
        return total

    def _metric(self, metric: str | None) -> int:
        """Return the index of a metric; None is the main one."""
        if metric is not None and metric not in self.metrics:
            raise TraceError(
                f"no metric {metric!r} in this trace: it holds {', '.join(map(repr, self.metrics))}; "
                f"trace again with metrics=({', '.join(map(repr, (*self.metrics, metric)))})"
            )
        return 0 if metric is None else self.metrics.index(metric)

    def _row_index(self, row: str | int) -> int:
        """Return the index of the row with this index, label or token name; a name must occur exactly once."""
        if isinstance(row, int) and -len(self.rows) <= row < len(self.rows):
            return row
        if isinstance(row, str) and self.rows.count(row) == 1:
            return self.rows.index(row)
        if isinstance(row, str) and row not in self.rows and self.row_tokens.count(row) == 1:
            return self.row_tokens.index(row)
        problem = (
            "several rows have that label" if row in self.rows else f"the rows are {', '.join(map(repr, self.rows))}"
        )
        raise TraceError(
            f"no single row {row!r} in this trace: {problem}; pass an index from 0 to {len(self.rows) - 1}"
        )

    def _check_kind(self, kind: str) -> str:
        """Return the kind if it was traced."""
        if kind not in self.kinds:
            raise TraceError(
                f"no {kind!r} effects in this trace: it holds {', '.join(map(repr, self.kinds))}; "
                f"trace again with sites=({', '.join(map(repr, (*self.kinds, kind)))})"
            )
        return kind


def _present(effects: Tensor) -> Tensor:
    """Return the effects with untraced cells replaced so that they are never the largest."""
    return effects.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Return the first and last index of every unbroken run of true flags."""
    starts = [index for index, flag in enumerate(flags) if flag and not (index and flags[index - 1])]
    ends = [index for index, flag in enumerate(flags) if flag and not (index + 1 < len(flags) and flags[index + 1])]
    return list(zip(starts, ends, strict=True))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise TraceError(f"fraction {fraction} is not a share of an effect; pass one above 0, up to 1, such as 0.5")


_COLUMNS = ("kind", "row", "label", "positions", "column", "first_layer", "last_layer", "metric", "sample")
_KINDS: Mapping[str, str | None] = {"hidden": None, "mlp": "mlp", "attention": "attn"}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CausalTrace(EffectMap):
    """The causal trace of one prompt. Made by `causal_trace`.

    Example:
        >>> import multrace as mt
        >>> vlm = mt.load(mt.data.tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Kimdor?", constraint="Kimdor")
        >>> trace = mt.causal_trace(vlm, prompt, corruption=mt.TextNoise(), progress=False, even_if_weak=True)
        >>> trace.kinds
        ('hidden', 'mlp', 'attention')
        >>> trace.indirect_effect("mlp").shape == (len(trace.rows), trace.layers)
        True
    """

    layout: ClassVar[str] = "multrace causal trace 3"

    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    input_ids: tuple[int, ...]
    """The prompt's tokens as the model reads them."""
    row_positions: tuple[tuple[int, ...], ...]
    """Token positions that each row restores."""
    grouped: bool
    """True if every row is a named group or region, so that traces of other prompts have the same rows."""
    starred: tuple[int, ...]
    """Positions of the constraint."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""
    scale: float | None
    """Strength of the noise that was used, in standard deviations; None if the corruption is not noise."""
    deviation: float | None
    """The standard deviation that the scale multiplies."""
    answer_ids: tuple[int, ...]
    """The scored tokens: the answer's first, or all of them."""
    answer: str
    """Text of the scored tokens."""
    is_predicted: bool
    """True if the first scored token is the model's likeliest next token after the clean prompt."""
    foil_ids: tuple[int, ...]
    """Tokens of the foil; empty where no metric needs one."""
    foil: str | None
    """The answer that a logit difference subtracts; None if no metric needs one."""
    clean_scores: Tensor
    """(metric,) float64: scores of the answer in the clean run."""
    corrupted_scores: Tensor
    """(metric, sample) float64: scores of the answer in each corrupted run."""
    samples: Mapping[str, Tensor]
    """Per kind (metric, row, column, sample) float64: scores of the answer with states patched in; see `axes`."""
    agreement: Mapping[str, float]
    """Per kind: rank correlation (Spearman) of estimated and exact values over the cells that have both."""
    engine: EngineReport
    """The cost of the trace and the outcome of its self-check."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the requested order."""
        return tuple(self.samples)

    def axes(self, kind: str) -> dict[str, tuple[Any, ...]]:
        """Return name and labels of each axis of `samples[kind]`; a column's label is its (first, last) layer."""
        values = self.samples[self._check_kind(kind)]
        columns = tuple((int(first), int(last)) for first, last in self.spans[kind])
        return {
            "metric": self.metrics,
            "row": self.rows,
            "column": columns,
            "sample": tuple(range(values.shape[-1])),
        }

    @property
    def clean(self) -> float:
        """Score of the answer in the clean run, in the main metric."""
        return float(self.clean_scores[0])

    @property
    def corrupted(self) -> Tensor:
        """(sample,) float64: score of the answer in each corrupted run, in the main metric."""
        return self.corrupted_scores[0]

    @property
    def scores(self) -> dict[str, Tensor]:
        """Per kind (row, column) float64: main metric with states patched in, averaged over samples."""
        return {kind: values[0].mean(-1) for kind, values in self.samples.items()}

    def total_effect_of(self, metric: str | None = None) -> float:
        """Return clean minus corrupted score in this metric (default: the main one), averaged over samples."""
        index = self._metric(metric)
        return float(self.clean_scores[index] - self.corrupted_scores[index].mean())

    def indirect_samples(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column, sample) float64: the indirect effect of each cell in each corrupted run.

        This is the score minus the corrupted score; with direction "corrupt" it is the clean score minus the score.
        """
        index = self._metric(metric)
        scores = self.samples[self._check_kind(kind)][index]
        if self.direction == "corrupt":
            return self.clean_scores[index] - scores
        return scores - self.corrupted_scores[index]

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """Return (row, column) float64: `indirect_samples` averaged over samples."""
        return self.indirect_samples(kind, metric).mean(-1)

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Return the token positions of the row with this index."""
        return self.row_positions[row]

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        effects = self.indirect_samples(kind)
        if effects.shape[-1] < 2:
            return lambda row, column: {}
        return lambda row, column: {"spread": float(effects[row, column].std())}

    def plot(
        self, path: str | Path | None = None, kinds: Sequence[str] | None = None, metric: str | None = None
    ) -> "Figure":
        """Return a figure with one heat map of scores per kind, in ROME's style (arXiv 2202.05262, figure 1).

        Constraint tokens are starred, and colours start at the corrupted score. With direction "corrupt" the maps show
        the loss of score instead. Estimated cells are hatched.

        Args:
            path: where to write the figure as well (png, pdf or svg by suffix); None for nowhere.
            kinds: kinds of sites to draw; all by default.
            metric: the metric to draw; the main one by default.

        Raises:
            TraceError: if a kind or the metric was not traced.
            ArtefactError: if the file cannot be written.
        """
        index, is_loss = self._metric(metric), self.direction == "corrupt"
        low = float(self.corrupted_scores[index].mean())
        panels = [
            drawing.Panel(
                kind=kind,
                window=self.window,
                values=self.indirect_effect(kind, metric) + (0.0 if is_loss else low),
                low=0.0 if is_loss else low,
                scale=self.total_effect_of(metric),
                verb="corrupted" if is_loss else "restored",
                estimated=self.estimated.get(kind),
            )
            for kind in (kinds or self.kinds)
        ]
        stars = [bool(set(positions) & set(self.starred)) for positions in self.row_positions]
        rows = [
            f"{row} ({len(positions)} tokens)" if len(positions) > 1 else row
            for row, positions in zip(self.rows, self.row_positions, strict=True)
        ]
        unit = f"loss of {self._unit(index)}" if is_loss else self._unit(index)
        figure = drawing.heat_maps(panels, rows=rows, stars=stars, titles=self._titles(index), unit=unit)
        return drawing.finished(figure, path)

    @property
    def has_overlay(self) -> bool:
        """Whether some row is a part of a picture, and not all of it, so that an overlay shows something."""
        places = {position for position, *_ in self.patches}
        return any(set(row) < places for row in self.row_positions)

    def overlay(
        self,
        prompt: Prompt,
        path: str | Path | None = None,
        kind: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> "Figure":
        """Return a figure with the indirect effects of image patches over the picture that the model saw.

        Args:
            prompt: the prompt that was traced.
            path: where to write the figure as well (png, pdf or svg by suffix); None for nowhere.
            kind: kind of site; by default "hidden" if that was traced, else the first one.
            layers: columns of the map, one panel each; by default those with at least a tenth of the largest effect,
                at most four. The caption states how they were chosen.

        Raises:
            TraceError: for another prompt, and for layers or a kind that were not traced.
            ArtefactError: if no row is a part of a picture (a patch, a block, an image row or a box), or if the file
                cannot be written.
        """
        patches = tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches)
        ids = tuple(prompt.inputs["input_ids"][0, : len(self.input_ids)].tolist())
        if (patches, ids) != (self.patches, self.input_ids):
            raise TraceError(f"this trace is of another prompt ({self.question!r}); pass the prompt that was traced")
        kind = kind or ("hidden" if "hidden" in self.kinds else self.kinds[0])
        grid = drawing.over_patches(self.indirect_effect(kind), self.row_positions, self.patches)
        least, rule = drawing.FLOOR * abs(self.total_effect), ""
        columns = drawing.strongest(grid, least=least) if layers is None else tuple(layers)
        if not columns or not all(0 <= column < len(grid) for column in columns):
            raise TraceError(f"no layers {columns} of {kind!r} in this trace; pass some of 0 to {len(grid) - 1}")
        overlays = [drawing.Overlay(title=self._column_title(kind, column), values=grid[column]) for column in columns]
        if layers is None:
            rule = f"\nshown: {drawing.choice_in_words(grid, columns, least=least)}"
        title, subtitle = self._titles(0)
        figure = drawing.overlays_figure(
            prompt.seen_pictures(), overlays, kind=kind, titles=(title, subtitle + rule), scale=self.total_effect
        )
        return drawing.finished(figure, path)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one line per kind, metric, row, column and sample, with its score and effects.

        The column "row" is the index of "label", "column" is the centre of layers first_layer to last_layer, and
        normalised_effect is NaN where the total effect is not positive.
        """
        return stacked_frame({kind: self._frame(kind) for kind in self.kinds}, "kind")

    def _frame(self, kind: str) -> "pd.DataFrame":
        labels = self.axes(kind)
        axes = {name: range(len(labels[name])) if name in ("row", "column") else labels[name] for name in labels}
        effects = torch.stack([self.indirect_samples(kind, metric) for metric in self.metrics])
        totals = torch.tensor([self.total_effect_of(metric) for metric in self.metrics], dtype=torch.float64)
        totals = torch.where(totals > 0, totals, torch.nan).view(-1, 1, 1, 1)
        estimated = self.estimated.get(kind, torch.zeros(effects.shape[1:3], dtype=torch.bool))
        values = {"score": self.samples[kind], "indirect_effect": effects, "normalised_effect": effects / totals}
        frame = long_frame(axes, values | {"estimated": estimated[..., None]})
        rows, columns = frame["row"].to_numpy(), torch.from_numpy(frame["column"].to_numpy().copy())
        layers = self.spans[kind][columns].numpy()
        frame["label"] = [self.rows[row] for row in rows]
        frame["positions"] = [self.row_positions[row] for row in rows]
        frame["first_layer"], frame["last_layer"] = layers[:, 0], layers[:, 1]
        return frame[[*_COLUMNS[1:], *values, "estimated"]]

    def to_rome(self, kind: str = "hidden") -> dict[str, Any]:
        """Return the dictionary that ROME's `calculate_hidden_flow` returns, with numpy arrays.

        scores (token, layer): mean probability with the states restored, NaN for tokens without a separate row;
        low_score and high_score: corrupted and clean; subject_range: first constraint token, and the one past its last;
        correct_prediction: whether the model itself gives this answer; kind: None, "mlp" or "attn". Raises `TraceError`
        for other kinds, if the probability is not among the metrics, if all rows are groups, and for anything but
        total effects of restored states.
        """
        if (self.direction, self.effect) != ("restore", "total"):
            raise TraceError(f"ROME's layout holds total effects of restored states, not {self.variant}")
        if kind not in _KINDS:
            raise TraceError(f"ROME's layout knows no {kind!r}; ask for one of {', '.join(map(repr, _KINDS))}")
        index = self._metric("probability")
        scores = self.samples[self._check_kind(kind)][index].mean(-1)
        return {
            "scores": _over_tokens(scores, self.row_positions, len(self.tokens)).numpy(),
            "low_score": self.corrupted_scores[index].mean().numpy(),
            "high_score": self.clean_scores[index].numpy(),
            "input_ids": np.array(self.input_ids),
            "input_tokens": np.array(self.tokens),
            "subject_range": np.array((self.starred[0], self.starred[-1] + 1) if self.starred else (0, 0)),
            "answer": self.answer,
            "window": self.window,
            "correct_prediction": self.is_predicted,
            "kind": _KINDS[kind],
        }

    def save_rome(self, path: str | Path, kind: str = "hidden") -> Path:
        """Write the result of `to_rome` as an npz file, the format of ROME's cases, and return the path.

        None becomes the empty text, as in ROME.
        """
        return write_arrays(path, {name: "" if value is None else value for name, value in self.to_rome(kind).items()})

    def _unit(self, metric: int) -> str:
        """Return a short label for a metric of this answer."""
        name = self.metrics[metric]
        foil = f"logit of {self.answer} minus {self.foil or 'foil'}"
        units = {"probability": f"p({self.answer})", "log_probability": f"log p({self.answer})"}
        return (units | {"logit_difference": foil}).get(name, name)

    def _column_title(self, kind: str, column: int) -> str:
        """Return the layers of a column in words, and whether some of its cells are estimates."""
        first, last = self.spans[kind][column].tolist()
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        has_estimates = kind in self.estimated and bool(self.estimated[kind][:, column].any())
        return f"{SITE_NAMES.get(kind, kind)}, {layers}" + (" (estimates among them)" if has_estimates else "")

    def _titles(self, metric: int) -> tuple[str, str]:
        """Return title and subtitle of figures; the title names settings that differ from the defaults."""
        title = self.question if self._is_usual else f"{self.question}\n{self.variant[:1].upper()}{self.variant[1:]}"
        clean, corrupted = self.clean_scores[metric], self.corrupted_scores[metric].mean()
        return title, f"clean {clean:.3f}, corrupted {corrupted:.3f}  ({self.corruption})"

    def _lines(self) -> tuple[str, str]:
        clean = f"clean {self.clean:.3f}, corrupted {float(self.corrupted.mean()):.3f}"
        return (
            f"CausalTrace of {self.model}: {self.question!r} -> {self.answer!r} ({self.corruption})",
            f"total effect {self.total_effect:.3f} ({clean}); {self._strongest()}",
        )

    def _problem(self) -> str | None:
        metrics, rows, samples = len(self.metrics), len(self.rows), self.corrupted_scores.shape[-1]
        fits = [self.clean_scores.shape == (metrics,), self.corrupted_scores.shape == (metrics, samples)]
        fits += [len(self.row_tokens) == rows, len(self.row_positions) == rows, bool(self.kinds)]
        fits += [len(self.tokens) == len(self.input_ids), set(self.estimated) <= set(self.kinds)]
        for kind, values in self.samples.items():
            columns = len(self.spans[kind])
            has_layers = kind in ("vision", "projector") or columns == self.layers
            fits += [values.shape == (metrics, rows, columns, samples)]
            fits += [self.spans[kind].shape == (columns, 2), has_layers]
            fits += [self.estimated[kind].shape == (rows, columns)] if kind in self.estimated else []
        return None if all(fits) else "its tensors are of other shapes than its rows, layers and metrics"


def _over_tokens(scores: Tensor, row_positions: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Return (token, column): the scores of the rows that are one token each, NaN for every other token."""
    single = [row for row, positions in enumerate(row_positions) if len(positions) == 1]
    if not single:
        raise TraceError('ROME\'s layout has one row per token, this trace only groups; trace with positions="tokens"')
    spread = torch.full((count, scores.shape[1]), torch.nan, dtype=scores.dtype)
    spread[[row_positions[row][0] for row in single]] = scores[single]
    return spread
