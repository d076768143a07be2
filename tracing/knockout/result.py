"""Attention knockout of one question: the answer's probability with each flow cut, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import flow_styles, name_of_model
from ...artefacts.results import Result
from ..engine.cells import EngineReport
from ..engine.scoring import same_answer
from ..errors import TraceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class FlowPeak:
    """The window in which cutting a flow changes the answer's probability most."""

    flow: str
    window: int
    layer: int
    """The centre of the window."""
    first_layer: int
    last_layer: int
    """First and last layer of the window, both included, in which the edges are cut."""
    change: float
    """The change in percent of the uncut probability; in an average, the mean over questions."""
    interval: tuple[float, float] | None = None
    """95 % interval of the mean, corrected for the choice among all layers; None for fewer than two questions."""
    count: int = 1
    """Number of questions that have this flow."""

    @property
    def is_clear(self) -> bool:
        """True if the interval excludes zero or, without an interval, if the change is not zero."""
        if self.interval is None:
            return self.change != 0
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FlowMap(Result):
    """Changes of an answer's probability over (flow, window, layer), the common base of single results and averages.

    A flow is a set of attention edges, from all of its sources to all of its targets.
    """

    model: str
    """Name or path of the model."""
    revision: str | None
    flows: tuple[str, ...]
    """Names such as "image -> last"."""
    flow_heads: tuple[tuple[int, ...], ...]
    """The heads in which each flow's edges are cut; empty for all heads."""
    windows: tuple[int, ...]
    """Numbers of neighbouring layers that are cut together."""
    spans: Tensor
    """(window, layer, 2) int64: first and last layer, both included, cut for the window centred at that layer."""
    layers: int
    """Number of decoder layers."""
    scores: tuple[str, ...]
    """Names of the scores: "first token" of the answer, and "answer" for all its tokens; the first is the main one."""

    def change(self, score: str | None = None) -> Tensor:
        """Return (flow, window, layer) float64: change of the answer's probability in percent of the uncut one.

        score: one of `scores`; the first one by default. Raises `TraceError` for a score that was not computed.
        """
        raise NotImplementedError

    def curve(self, flow: str, window: int | None = None, score: str | None = None) -> Tensor:
        """Return (layer,) float64: `change` of one flow, by default in the first window and the first score."""
        return self.change(score)[self._flow(flow), self._window(window)]

    def _peak(self, flow: str, window: int | None, score: str | None, **certainty: Any) -> FlowPeak:
        """Return the layer with the largest change, up or down; the first one if several are equal."""
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

    def _axes(self) -> dict[str, Sequence[Any]]:
        return {"score": self.scores, "flow": self.flows, "window": self.windows, "layer": range(self.layers)}

    def _span_columns(self) -> dict[str, Tensor]:
        """Return the layers that are cut, as columns of a table over (window, layer)."""
        return {"first_layer": self.spans[..., 0], "last_layer": self.spans[..., 1]}

    def _named(self, score: str | None) -> str:
        """Return the name of a score in brackets if there are several scores."""
        return f" ({self.scores[self._score(score)]})" if len(self.scores) > 1 else ""

    def _figure(
        self,
        path: str | Path | None,
        window: int | None,
        flows: Sequence[str] | None,
        values: Tensor,
        labels: Mapping[str, str],
        titles: tuple[str, str],
    ) -> "Figure":
        """Return the figure of values (3, flow, window, layer), which are changes and both ends of their bands."""
        styles = dict(zip(self.flows, flow_styles(self.flows), strict=True))
        layers, panels = torch.arange(self.layers), []
        for each in self.windows if window is None else (self.windows[self._window(window)],):
            curves = []
            for flow in self.flows if flows is None else flows:
                y, low, high = values[:, self._flow(flow), self._window(each)]
                curve = drawing.Curve(label=labels[flow], x=layers, y=y, low=low, high=high, style=styles[flow])
                curves.append(curve)
            title = "cut in a single layer" if each == 1 else f"cut in windows of {each} layers"
            x_label = "layer" if each == 1 else "layer (centre of the window)"
            panels.append(drawing.CurvePanel(curves=curves, title=title, x_label=x_label))
        figure = drawing.curves_figure(panels, titles=titles, y_label="change in answer probability (%)")
        return drawing.finished(figure, path)

    def _fits(self) -> list[bool]:
        """Return the conditions that the shared fields must fulfil."""
        spans = self.spans
        return [
            min(len(self.flows), len(self.windows), len(self.scores)) > 0,
            len(self.flow_heads) == len(self.flows),
            spans.shape == (len(self.windows), self.layers, 2) and spans.dtype == torch.int64,
        ]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionKnockout(FlowMap):
    """The answer to one question with attention edges cut (arXiv 2411.18620, section 3). Made by `attention_knockout`.

    Example:
        >>> import multrace as mt
        >>> vlm = mt.load(mt.data.tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Kimdor?")
        >>> result = mt.attention_knockout(vlm, prompt, flows=["question -> last"], windows=[1], progress=False)
        >>> result.curve("question -> last").shape == (vlm.layers,)
        True
    """

    layout: ClassVar[str] = "multrace attention knockout 2"

    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    flow_sources: tuple[tuple[int, ...], ...]
    """Per flow, the positions to which attention is cut."""
    flow_targets: tuple[tuple[int, ...], ...]
    """Per flow, the positions whose attention to its sources is cut."""
    answer: str
    """Text of the scored tokens."""
    answer_ids: tuple[int, ...]
    """The scored tokens."""
    gold: str | None
    """The right answer; None if it is not known."""
    generated: str | None
    """The model's own free answer; None if it is not known."""
    clean: Tensor
    """(score,) float64: the answer's probability without any cut."""
    probabilities: Tensor
    """(score, flow, window, layer) float64: the answer's probability with the edges cut."""
    free: Tensor
    """(flow, window, layer) bool: True where the cut can have no effect, so that no computation was needed."""
    engine: EngineReport
    """The cost of the probabilities and the outcome of their self-check."""

    @property
    def is_right(self) -> bool | None:
        """True if the model's own answer is the right one (`same_answer`); None if either is not known."""
        return None if self.gold is None or self.generated is None else same_answer(self.generated, self.gold)

    def change(self, score: str | None = None) -> Tensor:
        """Return (flow, window, layer) float64: (p_cut - p_clean) / p_clean in percent, from -100 upwards.

        score: one of `scores`; the first one by default. Values are NaN where p_clean is 0, since the change is
        undefined there. Raises `TraceError` for a score that was not computed.
        """
        index = self._score(score)
        clean = self.clean[index]
        ratio = self.probabilities[index] / clean
        return torch.where(clean > 0, (ratio - 1) * 100, torch.nan)

    def strongest(self, flow: str, window: int | None = None, score: str | None = None) -> FlowPeak:
        """Return the layer at which cutting this flow changes the answer most, up or down (default: first window)."""
        return self._peak(flow, window, score)

    def summary(self, score: str | None = None) -> str:
        """Return lines of text: the answer, then per flow and window the strongest change and its layers."""
        peaks = [self.strongest(flow, window, score) for flow in self.flows for window in self.windows]
        name = max(map(len, self.flows))
        return "\n".join([self.question, self._answers(score), *(f"  {_peak_line(peak, name)}" for peak in peaks)])

    def plot(
        self,
        path: str | Path | None = None,
        window: int | None = None,
        score: str | None = None,
        *,
        flows: Sequence[str] | None = None,
    ) -> "Figure":
        """Return a figure with a line per flow: change of the answer's probability by layer, in a panel per window.

        Args:
            path: where to write the figure as well (png, pdf or svg by suffix); None for nowhere.
            window: the only window to draw; all by default.
            score: one of `scores`; the first one by default.
            flows: the flows to draw; all by default.

        Raises:
            TraceError: for a flow, window or score that was not computed.
            ArtefactError: if the file cannot be written.
        """
        changes = self.change(score)
        values = torch.stack([changes, *[torch.full_like(changes, torch.nan)] * 2])
        labels = {flow: cut_label(flow) for flow in self.flows}
        titles = self.question, f"{self._answers(score)}\n{name_of_model(self.model)}"
        return self._figure(path, window, flows, values, labels, titles)

    def _columns(self) -> dict[str, Tensor]:
        changes = torch.stack([self.change(score) for score in self.scores])
        return {"probability": self.probabilities, "change": changes, **self._span_columns(), "free": self.free}

    def _answers(self, score: str | None) -> str:
        """Return the scored answer with its probability, and its comparison with the right one."""
        clean = float(self.clean[self._score(score)])
        parts = [f"p({self.answer.strip()}) = {clean:.3g} without a cut{self._named(score)}"]
        if self.is_right is not None:
            parts.append("the model is right" if self.is_right else f"the model says {self.generated!r}")
        if self.gold is not None and not self.is_right:
            parts.append(f"the right answer is {self.gold!r}")
        return ", ".join(parts)

    def _lines(self) -> tuple[str, str]:
        peaks = sorted((self.strongest(flow) for flow in self.flows), key=lambda peak: -abs(peak.change))
        changes = [f"{peak.flow} {peak.change:+.1f} % (layer {peak.layer})" for peak in peaks]
        return (
            f"AttentionKnockout of {self.model}: {self.question!r} -> {self.answer.strip()!r}",
            f"p = {float(self.clean[0]):.3g} without a cut; window {self.windows[0]}: {', '.join(changes)}",
        )

    def _problem(self) -> str | None:
        shape, scores = (len(self.flows), len(self.windows), self.layers), len(self.scores)
        fits = self._fits()
        fits += [self.clean.shape == (scores,), self.probabilities.shape == (scores, *shape)]
        fits += [self.free.shape == shape and self.free.dtype == torch.bool]
        fits += [len(self.flow_sources) == len(self.flow_targets) == len(self.flows)]
        return None if all(fits) else "its tensors are of other shapes than its flows, windows, layers and scores"


def cut_label(flow: str) -> str:
    """Return a flow's name in a figure, with the crossed arrow of the paper."""
    return flow.replace("->", "\N{RIGHTWARDS ARROW WITH STROKE}")


def place_words(peak: FlowPeak) -> str:
    """Return a description of the layers in which a flow is cut."""
    single = peak.first_layer == peak.last_layer
    return f"layer {peak.layer}" + ("" if single else f" (cut in {peak.first_layer} to {peak.last_layer})")


def _peak_line(peak: FlowPeak, name: int) -> str:
    """Return one line on a flow's strongest change, with the flow's name padded to `name` letters."""
    text = f"{peak.change:+.1f} % at {place_words(peak)}" if peak.change else "changes nothing at any layer"
    return f"{peak.flow:<{name}}  window {peak.window}: {text}"


def _index(kind: str, labels: Sequence[Any], label: Any) -> int:
    """Return the index of the label."""
    if label not in labels:
        raise TraceError(
            f"no {kind} {label!r} in this attention knockout: it holds {', '.join(map(repr, labels))}; "
            "pass one of these, or compute it again with that one"
        )
    return labels.index(label)
