"""What a trace of one prompt found: scores and effects, saved, loaded, drawn and handed on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.heat_map import Panel, heat_maps
from ...artefacts.drawing.overlay import Overlay, draw_overlays, over_patches, strongest
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...models import Prompt
from ..engine.report import EngineReport
from ..errors import TraceError
from .rome import over_tokens, rome_kind, write_rome
from .sites import SITE_NAMES, EffectMap

_LAYOUT = "multrace causal trace 2"
_COLUMNS = ("kind", "row", "label", "positions", "column", "first_layer", "last_layer", "metric", "sample")


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTrace(EffectMap):
    """One prompt's causal trace. Made by `causal_trace`."""

    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    input_ids: tuple[int, ...]
    """The prompt's tokens as the model reads them."""
    row_positions: tuple[tuple[int, ...], ...]
    """Token positions that each row restores."""
    grouped: bool
    """Every row is a named group or region, so that traces of other prompts have the same rows."""
    starred: tuple[int, ...]
    """Positions of the constraint."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""
    scale: float | None
    """Strength of the noise in standard deviations, as used; None where the corruption is not noise."""
    deviation: float | None
    """The standard deviation that the scale multiplies."""
    answer_ids: tuple[int, ...]
    """The scored tokens: the answer's first, or all of them."""
    answer: str
    """The scored tokens' text."""
    is_predicted: bool
    """The model itself answers so: its likeliest next token after the clean prompt is the first scored one."""
    foil_ids: tuple[int, ...]
    foil: str | None
    """What the answer is compared with in a logit difference; None where no metric asks for one."""
    clean_scores: Tensor
    """(metric,) float64: the answer's scores in the clean run."""
    corrupted_scores: Tensor
    """(metric, sample) float64: its scores in each corrupted run."""
    samples: Mapping[str, Tensor]
    """Per kind (metric, row, column, sample) float64: its scores with the states put in; see `axes`."""
    agreement: Mapping[str, float]
    """Per kind: rank agreement (Spearman) of estimated and exact values over the cells that have both."""
    engine: EngineReport

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that were traced, in the order asked."""
        return tuple(self.samples)

    def axes(self, kind: str) -> dict[str, tuple[Any, ...]]:
        """Name and labels of each axis of `samples[kind]`, in order; a column's label is its (first, last) layer."""
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
        """The answer's score in the clean run, in the main metric."""
        return float(self.clean_scores[0])

    @property
    def corrupted(self) -> Tensor:
        """(sample,) float64: its score in each corrupted run, in the main metric."""
        return self.corrupted_scores[0]

    @property
    def scores(self) -> dict[str, Tensor]:
        """Per kind (row, column) float64: main metric with the states put in, mean over samples."""
        return {kind: values[0].mean(-1) for kind, values in self.samples.items()}

    def total_effect_of(self, metric: str | None = None) -> float:
        """Clean minus corrupted score in this metric (default: the main one), mean over samples."""
        index = self._metric(metric)
        return float(self.clean_scores[index] - self.corrupted_scores[index].mean())

    def indirect_samples(self, kind: str, metric: str | None = None) -> Tensor:
        """(row, column, sample) float64: score minus corrupted score, or clean score minus score for "corrupt"."""
        index = self._metric(metric)
        scores = self.samples[self._check_kind(kind)][index]
        if self.direction == "corrupt":
            return self.clean_scores[index] - scores
        return scores - self.corrupted_scores[index]

    def indirect_effect(self, kind: str, metric: str | None = None) -> Tensor:
        """(row, column) float64: `indirect_samples`, mean over samples."""
        return self.indirect_samples(kind, metric).mean(-1)

    def positions_of(self, row: int) -> tuple[int, ...]:
        """Token positions of the row with this index."""
        return self.row_positions[row]

    def _certainty(self, kind: str) -> Callable[[int, int], dict[str, Any]]:
        effects = self.indirect_samples(kind)
        if effects.shape[-1] < 2:
            return lambda row, column: {}
        return lambda row, column: {"spread": float(effects[row, column].std())}

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "CausalTrace":
        """The trace that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem, nested={"engine": EngineReport})

    def plot(self, path: str | Path, kinds: Sequence[str] | None = None, metric: str | None = None) -> Path:
        """The written picture (format by suffix: png, pdf, svg): one heat map of scores per kind.

        ROME's style: rows from the top, constraint tokens starred, colours from the corrupted score upwards. Corrupted
        states put into the clean run show the loss of score instead. Estimated cells are hatched.
        """
        index, is_loss = self._metric(metric), self.direction == "corrupt"
        low = float(self.corrupted_scores[index].mean())
        panels = [
            Panel(
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
        return heat_maps(path, panels, rows=rows, stars=stars, titles=self._titles(index), unit=unit)

    def overlay(
        self, path: str | Path, prompt: Prompt, kind: str = "hidden", layers: Sequence[int] | None = None
    ) -> Path:
        """The written picture: indirect effects of image patches over the prompt's picture as the model saw it.

        For rows that are patches, blocks, image rows or boxes. layers: columns of the map, one panel each; if not
        given, the strongest four. TraceError for another prompt than the traced one, and for rows that are no parts of
        a picture.
        """
        found = tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches)
        ids = tuple(prompt.inputs["input_ids"][0, : len(self.input_ids)].tolist())
        if (found, ids) != (self.patches, self.input_ids):
            raise TraceError(f"this trace is of another prompt ({self.question!r}); pass the prompt that was traced")
        grid = over_patches(self.indirect_effect(kind), self.row_positions, self.patches)
        columns = strongest(grid) if layers is None else tuple(layers)
        if not columns or not all(0 <= column < len(grid) for column in columns):
            raise TraceError(f"no layers {columns} of {kind!r} in this trace; pass some of 0 to {len(grid) - 1}")
        overlays = []
        for column in columns:
            first, last = self.spans[kind][column].tolist()
            title = f"{SITE_NAMES.get(kind, kind)}, " + (
                f"layer {first}" if first == last else f"layers {first} to {last}"
            )
            title += (
                " (estimates among them)" if kind in self.estimated and self.estimated[kind][:, column].any() else ""
            )
            overlays.append(Overlay(title=title, values=grid[column]))
        return draw_overlays(
            path, prompt.seen_pictures(), overlays, kind=kind, titles=self._titles(0), scale=self.total_effect
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line per kind, metric, row, column and sample, with its score and effects.

        row is the index of `label`; column is the centre of layers first_layer to last_layer; normalised_effect is NaN
        where the total effect is not positive.
        """
        return pd.concat([self._frame(kind) for kind in self.kinds], ignore_index=True)

    def _frame(self, kind: str) -> pd.DataFrame:
        labels = self.axes(kind)
        axes = [(name, range(len(labels[name])) if name in ("row", "column") else labels[name]) for name in labels]
        effects = torch.stack([self.indirect_samples(kind, metric) for metric in self.metrics])
        totals = torch.tensor([self.total_effect_of(metric) for metric in self.metrics], dtype=torch.float64)
        totals = torch.where(totals > 0, totals, torch.nan).view(-1, 1, 1, 1)
        estimated = self.estimated.get(kind, torch.zeros(effects.shape[1:3], dtype=torch.bool))
        values = {"score": self.samples[kind], "indirect_effect": effects, "normalised_effect": effects / totals}
        frame = long_frame(axes, values | {"estimated": estimated[..., None]})
        layers = self.spans[kind][torch.from_numpy(frame["column"].to_numpy().copy())].numpy()
        frame = frame.assign(
            kind=kind,
            label=pd.Series(self.rows)[frame["row"]].to_numpy(),
            positions=pd.Series(self.row_positions)[frame["row"]].to_numpy(),
            first_layer=layers[:, 0],
            last_layer=layers[:, 1],
        )
        return frame[[*_COLUMNS, *values, "estimated"]]

    def to_rome(self, kind: str = "hidden") -> dict[str, Any]:
        """The dictionary that ROME's own `calculate_hidden_flow` gives, with numpy arrays.

        scores (token, layer): mean probability with the states restored, NaN for tokens without a row of their own;
        low_score and high_score: corrupted and clean; subject_range: first and past the last constraint token;
        correct_prediction: the model itself answers so; kind: None, "mlp" or "attn". TraceError for other kinds,
        without the probability among the metrics, for groups only, and for anything but total effects of restored
        states.
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
        """The written npz file with what `to_rome` gives, as ROME keeps its cases; nothing in it is pickled."""
        return write_rome(path, self.to_rome(kind))

    def _unit(self, metric: int) -> str:
        """A metric of this answer, in short."""
        name = self.metrics[metric]
        foil = f"logit of {self.answer} minus {self.foil or 'foil'}"
        units = {"probability": f"p({self.answer})", "log_probability": f"log p({self.answer})"}
        return (units | {"logit_difference": foil}).get(name, name)

    def _titles(self, metric: int) -> tuple[str, str]:
        """Title and subtitle of pictures; what is not a usual trace says so in the title."""
        usual = (self.direction, self.effect, self.severed) == ("restore", "total", None)
        title = self.question if usual else f"{self.question}\n{self.variant[:1].upper()}{self.variant[1:]}"
        clean, corrupted = self.clean_scores[metric], self.corrupted_scores[metric].mean()
        return title, f"clean {clean:.3f}, corrupted {corrupted:.3f}  ({self.corruption})"


def _problem(trace: CausalTrace) -> str | None:
    """What does not fit together in a trace that was read from a file."""
    metrics, rows, samples = len(trace.metrics), len(trace.rows), trace.corrupted_scores.shape[-1]
    fits = [trace.clean_scores.shape == (metrics,), trace.corrupted_scores.shape == (metrics, samples)]
    fits += [len(trace.row_tokens) == rows, len(trace.row_positions) == rows, bool(trace.kinds)]
    fits += [len(trace.tokens) == len(trace.input_ids), set(trace.estimated) <= set(trace.kinds)]
    for kind, values in trace.samples.items():
        columns = len(trace.spans[kind])
        has_layers = kind in ("vision", "projector") or columns == trace.layers
        fits += [values.shape == (metrics, rows, columns, samples), trace.spans[kind].shape == (columns, 2), has_layers]
        fits += [trace.estimated[kind].shape == (rows, columns)] if kind in trace.estimated else []
    return None if all(fits) else "its tensors are of other shapes than its rows, layers and metrics"
