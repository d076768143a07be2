"""Attention x gradient saliency by layer: flows between groups of tokens, maps of the picture, saved and drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.curves import Curve, CurvePanel, draw_curves
from ...artefacts.drawing.overlay import Overlay, strongest
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...models import Prompt
from ..errors import TraceError
from ..knockout.styles import flow_styles
from .image_maps import ImageReading

_LAYOUT = "multrace attention saliency 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSaliency(ImageReading):
    """How much the answer's loss rests on each edge of attention. Made by `attention_saliency`."""

    tokens: tuple[str, ...]
    """The tokens up to the last query, one readable string per position."""
    loss: float
    """What the gradients are of: minus the log probability of the answer's first token, or of all of them."""
    queries: tuple[int, ...]
    """Positions that attend, in the order of the rows."""
    groups: Mapping[str, tuple[int, ...]]
    """Positions by name, each in one of them: "system" (before the picture), "image", "last", "question" (all else)."""
    saliency: Tensor
    """(layer, query, source) float64, at least 0: |sum over heads of weight times gradient|; 0 after the query."""

    def flow(self, source: str | Sequence[int], target: str | Sequence[int]) -> Tensor:
        """(layer,) float64: mean saliency of the edges from source to target tokens, as S_wp and S_pq in the paper.

        source, target: groups or positions; of a target only those count that are among the queries. An edge leads
        from a token to a later one, never to itself. NaN where there is none (arXiv 2305.14160, section 2.1).
        """
        rows = [index for index, query in enumerate(self.queries) if query in set(self._positions(target))]
        columns = list(self._positions(source))
        queries = torch.tensor([self.queries[row] for row in rows], dtype=torch.long)
        are_edges = torch.tensor(columns, dtype=torch.long)[None, :] < queries[:, None]
        return self.saliency[:, rows][..., columns][:, are_edges].mean(-1)

    @property
    def flows(self) -> dict[str, Tensor]:
        """Per "source -> target" of two groups that have edges (layer,) float64: `flow`."""
        pairs = ((source, target) for target in self.groups for source in self.groups)
        found = {f"{source} -> {target}": self.flow(source, target) for source, target in pairs}
        return {name: flow for name, flow in found.items() if not flow.isnan().all()}

    def image_map(self, target: str | Sequence[int] | None = None) -> Tensor:
        """(layer, image token) float64: mean saliency over the queries, or over those of a target.

        TraceError for a target without queries.
        """
        asked = self.queries if target is None else self._positions(target)
        rows = [index for index, query in enumerate(self.queries) if query in set(asked)]
        if not rows:
            raise TraceError(f"none of the queries {self.queries} is in {target!r}; read again with these queries")
        return self.saliency[:, rows][..., list(self.image_positions)].mean(1)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionSaliency":
        """The saliency that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: all flows over the layers, by powers of ten; where a flow is zero its line has a gap."""
        flows, layers = self.flows, torch.tensor(self.layers)
        curves = [
            Curve(label=name, x=layers, y=flow.masked_fill(flow == 0, torch.nan).log10(), style=style)
            for (name, flow), style in zip(flows.items(), flow_styles(tuple(flows)), strict=True)
        ]
        label, titles = "log10 of saliency per edge", self._titles("mean over edges")
        return draw_curves(path, [CurvePanel(curves=curves)], titles=titles, y_label=label, reference=None)

    def overlay(
        self,
        path: str | Path,
        prompt: Prompt,
        layers: Sequence[int] | None = None,
        target: str | Sequence[int] | None = None,
    ) -> Path:
        """The written picture: saliency of image tokens over the prompt's picture as the model saw it.

        layers: one panel each; if None, the strongest four. target: as `image_map`. TraceError for another prompt, for
        layers that the model does not have, and where image tokens form no grid.
        """
        grid = self.over_picture(self.image_map(target))
        rows = strongest(grid) if layers is None else self._rows_of(layers, ())
        overlays = [Overlay(title=f"layer {self.layers[row]}", values=grid[row]) for row in rows]
        asked = "all queries" if target is None else target if isinstance(target, str) else "some queries"
        return self._draw_over(
            path, prompt, overlays, kind="attention", titles=self._titles(f"to {asked}"), unit="saliency"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line per layer, query and source (positions of tokens) with the group of each and the saliency."""
        sources = range(self.saliency.shape[2])
        axes = [("layer", self.layers), ("query", self.queries), ("source", sources)]
        frame = long_frame(axes, {"saliency": self.saliency})
        named = {position: name for name, positions in self.groups.items() for position in positions}
        frame.insert(2, "query_group", frame["query"].map(named))
        frame.insert(4, "source_group", frame["source"].map(named))
        return frame

    def _positions(self, asked: str | Sequence[int]) -> tuple[int, ...]:
        """Positions of a group, or the given ones."""
        if isinstance(asked, str) and asked not in self.groups:
            raise TraceError(f"no group {asked!r} here; pass {', '.join(map(repr, self.groups))}, or positions")
        found = self.groups[asked] if isinstance(asked, str) else tuple(asked)
        unknown = [position for position in found if not 0 <= position < self.saliency.shape[2]]
        if unknown:
            raise TraceError(f"no position {unknown[0]} here; pass some of 0 to {self.saliency.shape[2] - 1}")
        return found

    def _titles(self, what: str) -> tuple[str, str]:
        """Title and subtitle of pictures."""
        return self.question, f"attention x gradient of the loss of {self.answer!r} ({self.loss:.3g}); {what}"


def _problem(found: AttentionSaliency) -> str | None:
    """What does not fit together in a saliency that was read from a file."""
    fits = found.saliency.shape == (len(found.layers), len(found.queries), len(found.tokens))
    return None if fits else "its saliency is of another shape than its layers, queries and tokens"
