"""The causal trace of one prompt: its scores and effects, and how to save, draw and export them."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import SITE_NAMES
from ...artefacts.folders import write_whole
from ...artefacts.results import long_frame, stacked_frame
from ...models import Prompt
from ..engine.cells import EngineReport
from ..errors import TraceError
from .sites import EffectMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
        index, name = self._metric("probability"), rome_kind(kind)
        scores = self.samples[self._check_kind(kind)][index].mean(-1)
        return {
            "scores": over_tokens(scores, self.row_positions, len(self.tokens)).numpy(),
            "low_score": self.corrupted_scores[index].mean().numpy(),
            "high_score": self.clean_scores[index].numpy(),
            "input_ids": np.array(self.input_ids),
            "input_tokens": np.array(self.tokens),
            "subject_range": np.array((self.starred[0], self.starred[-1] + 1) if self.starred else (0, 0)),
            "answer": self.answer,
            "window": self.window,
            "correct_prediction": self.is_predicted,
            "kind": name,
        }

    def save_rome(self, path: str | Path, kind: str = "hidden") -> Path:
        """Write the result of `to_rome` as an npz file, the format of ROME's cases, and return the path."""
        return write_rome(path, self.to_rome(kind))

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


def rome_kind(kind: str) -> str | None:
    """Return ROME's name of a kind of site. Raises `TraceError` if it has none."""
    if kind not in _KINDS:
        raise TraceError(f"ROME's layout knows no {kind!r}; ask for one of {', '.join(map(repr, _KINDS))}")
    return _KINDS[kind]


def over_tokens(scores: Tensor, row_positions: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Return (token, column): the scores of the rows that are one token each, NaN for every other token."""
    single = [row for row, positions in enumerate(row_positions) if len(positions) == 1]
    if not single:
        raise TraceError('ROME\'s layout has one row per token, this trace only groups; trace with positions="tokens"')
    spread = torch.full((count, scores.shape[1]), torch.nan, dtype=scores.dtype)
    for row in single:
        spread[row_positions[row][0]] = scores[row]
    return spread


def write_rome(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write an npz file without pickled objects and return its path; None becomes the empty text, as in ROME."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray("" if value is None else value) for name, value in result.items()}
    np.savez(content, **arrays)
    return write_whole(path, content.getvalue())
