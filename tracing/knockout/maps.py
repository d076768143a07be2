"""What results of attention knockout share: changes by flow, window and layer, found by name and drawn as curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artefacts.drawing.curves import Curve, CurvePanel, draw_curves
from ..errors import TraceError
from .styles import flow_styles


@dataclass(frozen=True, kw_only=True)
class FlowPeak:
    """Where cutting a flow changes the answer's probability most."""

    flow: str
    window: int
    layer: int
    """The centre of the window."""
    first_layer: int
    last_layer: int
    """First and last layer, both included, in which the edges are cut there."""
    change: float
    """In percent of the uncut probability; the mean over questions in an average."""
    interval: tuple[float, float] | None = None
    """95 % interval of the mean, corrected for choosing among all layers; None for fewer than two questions."""
    count: int = 1
    """Questions that have this flow."""

    @property
    def is_clear(self) -> bool:
        """The interval leaves out zero; without one, the change is not zero."""
        if self.interval is None:
            return self.change != 0
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowMap:
    """Changes of an answer's probability over (flow, window, layer) by cutting attention edges.

    A flow is a set of edges, from all of its sources to all of its targets. The part that one question and an average
    share.
    """

    model: str
    """Name or path of the model."""
    revision: str | None
    flows: tuple[str, ...]
    """Names such as "image -> last"."""
    flow_heads: tuple[tuple[int, ...], ...]
    """Per flow the heads in which its edges are cut; empty for all heads."""
    windows: tuple[int, ...]
    """How many neighbouring layers are cut together."""
    spans: Tensor
    """(window, layer, 2) int64: first and last layer, both included, cut for the window centred at that layer."""
    layers: int
    """How many layers the decoder has."""
    scores: tuple[str, ...]
    """What was scored: "first token" of the answer, and "answer", all of its tokens; the first is the main one."""

    def change(self, score: str | None = None) -> Tensor:
        """(flow, window, layer) float64: change of the answer's probability in percent of the uncut one."""
        raise NotImplementedError

    def curve(self, flow: str, window: int | None = None, score: str | None = None) -> Tensor:
        """(layer,) float64: `change` of one flow; the default is the first window, and the first score."""
        return self.change(score)[self._flow(flow), self._window(window)]

    def _peak(self, flow: str, window: int | None, score: str | None, **certainty: Any) -> FlowPeak:
        """The layer with the largest change, up or down; the first one of equals."""
        curve, index = self.curve(flow, window, score), self._window(window)
        layer = int(curve.abs().nan_to_num(nan=-1.0).argmax())
        first, last = self.spans[index, layer].tolist()
        place = {"layer": layer, "first_layer": first, "last_layer": last}
        return FlowPeak(flow=flow, window=self.windows[index], change=float(curve[layer]), **place, **certainty)

    def _flow(self, flow: str) -> int:
        return _index("flow", self.flows, flow)

    def _window(self, window: int | None) -> int:
        return 0 if window is None else _index("window", self.windows, window)

    def _score(self, score: str | None) -> int:
        return 0 if score is None else _index("score", self.scores, score)

    def _span_columns(self) -> dict[str, Tensor]:
        """The layers that are cut, as columns of a table over (window, layer)."""
        return {"first_layer": self.spans[..., 0], "last_layer": self.spans[..., 1]}

    def fits_together(self) -> list[bool]:
        """What must hold for the shared fields of a result that was read from a file."""
        spans = self.spans
        return [
            min(len(self.flows), len(self.windows), len(self.scores)) > 0,
            len(self.flow_heads) == len(self.flows),
            spans.shape == (len(self.windows), self.layers, 2) and spans.dtype == torch.int64,
        ]


def draw_flows(
    path: str | Path,
    flow_map: FlowMap,
    *,
    windows: Sequence[int],
    curves: Sequence[tuple[str, str, Tensor]],
    titles: tuple[str, str],
) -> Path:
    """The written picture: a panel per window, in each a line per flow by layer in percent.

    curves: per line the flow, its label and (3, window, layer), its values with the ends of their band (NaN: no band);
    the windows are those of the map and in its order.
    """
    styles = dict(zip(flow_map.flows, flow_styles(flow_map.flows), strict=True))
    layers = torch.arange(flow_map.layers)
    panels = [
        CurvePanel(
            curves=[
                Curve(label=label, x=layers, y=y, low=low, high=high, style=styles[flow])
                for flow, label, values in curves
                for y, low, high in [values[:, flow_map.windows.index(window)]]
            ],
            title="cut in a single layer" if window == 1 else f"cut in windows of {window} layers",
            x_label="layer" if window == 1 else "layer (centre of the window)",
        )
        for window in windows
    ]
    return draw_curves(path, panels, titles=titles, y_label="change in answer probability (%)")


def _index(kind: str, labels: Sequence[Any], label: Any) -> int:
    """Where the label stands."""
    if label not in labels:
        raise TraceError(
            f"no {kind} {label!r} in this information flow: it holds {', '.join(map(repr, labels))}; "
            "pass one of these, or compute it again with that one"
        )
    return labels.index(label)
