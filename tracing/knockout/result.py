"""The result of an attention knockout, for one question and averaged over questions.

The probability of the answer with each flow cut, layer by layer; averages have intervals and list the questions that
were left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean, student_interval
from ...artefacts.drawing.styles import flow_styles, name_of_model
from ...artefacts.results import Result
from ..engine.cells import EngineReport, TraceError
from ..engine.scoring import same_answer

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


_SHARED = ("model", "revision", "layers", "windows", "scores", "spans")


@dataclass(frozen=True, kw_only=True)
class FlowCentre:
    """The centre of mass, over layers, of the loss in a mean curve."""

    flow: str
    window: int
    layer: float
    """The centre, between 0 and the last layer."""
    interval: tuple[float, float] | None
    """95 % interval over questions; None for fewer than two."""
    count: int
    """Number of questions that have this flow."""


@dataclass(frozen=True, kw_only=True)
class FilteredQuestion:
    """A question that is left out of the average because the model's own answer to it is wrong."""

    question: str
    gold: str
    """The right answer."""
    generated: str
    """The model's own answer."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageKnockout(FlowMap):
    """Mean changes over questions with the same cuts. Made by `average`.

    Flows are matched by name; a question without a flow (for example without a box of the object) is left out of that
    flow's mean.
    """

    layout: ClassVar[str] = "multrace average attention knockout 2"

    count: int
    """Number of questions that were averaged."""
    wrong: int
    """Number of averaged questions that the model itself answers wrongly."""
    ungraded: int
    """Number of averaged questions whose right answer is not known."""
    clean: Mean
    """(score,): probability of the answer without any cut."""
    changes: Mean
    """(score, flow, window, layer): change in percent of the uncut probability."""
    covariance: Tensor
    """(score, flow, window, layer, layer) float64: covariance of the changes in two layers over questions."""
    filtered: tuple[FilteredQuestion, ...]
    """The questions that were left out for a wrong answer."""

    @property
    def counts(self) -> dict[str, int]:
        """The number of questions in the mean of each flow."""
        most = self.changes.count.amax(0).flatten(1).amax(1)
        return dict(zip(self.flows, most.tolist(), strict=True))

    def change(self, score: str | None = None) -> Tensor:
        """Return (flow, window, layer) float64: change in percent, averaged over the questions that have the flow."""
        return self.changes.mean[self._score(score)]

    def interval(self, score: str | None = None, *, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (flow, window, layer): 95 % interval of the mean change (Student's t).

        Args:
            score: one of `scores`; the first one by default.
            corrected: give intervals that hold jointly for all layers of a curve (Bonferroni). Use them to judge the
                largest change of a curve.

        Returns:
            Both ends, NaN for a flow that only one question has.

        Raises:
            ArtefactError: for an average of one question.
        """
        return self.changes[self._score(score)].interval(comparisons=self.layers if corrected else 1)

    def peak(self, flow: str, window: int | None = None, score: str | None = None) -> FlowPeak:
        """Return the layer with the strongest mean change, up or down, with its corrected interval.

        The default is the first window and the first score.
        """
        count, interval = self.counts[self.flows[self._flow(flow)]], None
        peak = self._peak(flow, window, score, count=count)
        if count > 1:
            ends = self.interval(score, corrected=True)
            low, high = (float(end[self._flow(flow), self._window(window), peak.layer]) for end in ends)
            interval = (low, high)
        return replace(peak, interval=interval)

    def centre(self, flow: str, window: int | None = None, score: str | None = None) -> FlowCentre | None:
        """Return how early or late in the model a flow matters: the centre of mass of the loss in its mean curve.

        The interval is Student's t for the centre's first-order change with the mean curve (infinitesimal jackknife).
        The result is None if the mean is nowhere below zero. The centre is meaningful only for a flow whose peak is
        clearly below zero: pure noise has its centre in the middle.
        """
        place = self._score(score), self._flow(flow), self._window(window)
        layer, slope = centre_of_loss(self.changes.mean[place])
        if layer.isnan():
            return None
        count, interval = self.changes.count[place].min(), None
        if int(count) > 1:
            deviation = (slope @ self.covariance[place] @ slope).clamp(min=0).sqrt()
            low, high = (float(end) for end in student_interval(layer, deviation, count))
            interval = (max(low, 0.0), min(high, self.layers - 1.0))  # a centre cannot lie outside the model
        return FlowCentre(
            flow=flow, window=self.windows[place[2]], layer=float(layer), interval=interval, count=int(count)
        )

    def summary(self, score: str | None = None) -> str:
        """Return lines of text: per flow and window the strongest change, its layers and the centre of the loss.

        The questions that were left out follow, with the wrong answers.
        """
        notes = [f"{self.wrong} of them answered wrongly"] if self.wrong else []
        notes += [f"{self.ungraded} of them without a known right answer"] if self.ungraded else []
        lines = [f"attention knockout in {self.model}, mean over {', '.join([_questions(self.count), *notes])}"]
        lines += [f"  {self._line(flow, window, score)}" for flow in self.flows for window in self.windows]
        lines += [f"left out because the model's own answer is wrong: {_questions(len(self.filtered))}"]
        lines += [f"  {each.question!r}: {each.generated!r}, not {each.gold!r}" for each in self.filtered]
        return "\n".join(lines)

    def plot(
        self,
        path: str | Path | None = None,
        window: int | None = None,
        score: str | None = None,
        *,
        flows: Sequence[str] | None = None,
    ) -> "Figure":
        """Return a figure with a line per flow: mean change by layer with its 95 % band, in a panel per window.

        The legend gives the number of questions with each flow if it differs from flow to flow.

        Args:
            path: where to write the figure as well (png, pdf or svg by suffix); None for nowhere.
            window: the only window to draw; all by default.
            score: one of `scores`; the first one by default.
            flows: the flows to draw; all by default.

        Raises:
            TraceError: for a flow, window or score that was not computed.
            ArtefactError: if the file cannot be written.
        """
        changes = self.changes[self._score(score)]
        counts = {flow: "" if count == self.count else f" (n = {count})" for flow, count in self.counts.items()}
        labels = {flow: cut_label(flow) + counts[flow] for flow in self.flows}
        values = torch.stack([changes.mean, *changes.band()])
        return self._figure(path, window, flows, values, labels, self._titles(score))

    def _columns(self) -> dict[str, Tensor]:
        low, high = self.changes.band()
        values = {"change": self.changes.mean, "low": low, "high": high, "n": self.changes.count}
        return values | self._span_columns()

    def _line(self, flow: str, window: int, score: str | None) -> str:
        """Return one line on a flow and window."""
        peak, centre = self.peak(flow, window, score), self.centre(flow, window, score)
        ends = "" if peak.interval is None else " [{:+.1f}, {:+.1f}]".format(*peak.interval)
        text = f"{peak.change:+.1f} %{ends} at {place_words(peak)}" if peak.change else "changes nothing at any layer"
        if peak.change and not peak.is_clear:
            text += ", not clear of zero"
        elif centre is not None and peak.change < 0:
            between = "" if centre.interval is None else " [{:.1f}, {:.1f}]".format(*centre.interval)
            text += f", centre of the loss at layer {centre.layer:.1f}{between}"
        return f"{flow:<{max(map(len, self.flows))}}  window {window}: {text}, {_questions(peak.count)}"

    def _titles(self, score: str | None) -> tuple[str, str]:
        """Return title and subtitle of figures."""
        probability = float(self.clean.mean[self._score(score)])
        clean = f"mean probability without a cut {probability:.3g}{self._named(score)}"
        bands = "; bands: 95% intervals" if self.count > 1 else ""
        wrong = f"; {self.wrong} of them answered wrongly" if self.wrong else ""
        left_out = f"{len(self.filtered)} left out for a wrong answer" if self.filtered else "none left out"
        title = f"Attention knockout over {_questions(self.count)}"
        return title, f"{name_of_model(self.model)}; {left_out}{wrong}\n{clean}{bands}"

    def _lines(self) -> tuple[str, str]:
        peaks = sorted((self.peak(flow) for flow in self.flows), key=lambda peak: -abs(peak.change))
        changes = [f"{peak.flow} {peak.change:+.1f} % (layer {peak.layer})" for peak in peaks]
        left_out = f", {len(self.filtered)} left out for a wrong answer" if self.filtered else ""
        return (
            f"AverageKnockout of {self.model} over {_questions(self.count)}{left_out}",
            f"mean p = {float(self.clean.mean[0]):.3g} without a cut; window {self.windows[0]}: {', '.join(changes)}",
        )

    def _problem(self) -> str | None:
        shape = (len(self.scores), len(self.flows), len(self.windows), self.layers)
        fits = [*self._fits(), self.clean.fits(len(self.scores)), self.changes.fits(*shape), self.count > 0]
        fits += [self.covariance.shape == (*shape, self.layers)]
        return None if all(fits) else "its tensors are of other shapes than its flows, windows, layers and scores"


class KnockoutAverager(Averager[AttentionKnockout, AverageKnockout]):
    """An average of attention knockout over questions to one model with the same windows and scores.

    Args:
        only_right: leave out the questions that the model itself answers wrongly, and list them in `filtered`, as in
            arXiv 2411.18620, section 3. Those whose right answer is not known are averaged.
        filtered: questions that were left out before any knockout was computed.
    """

    alike = _SHARED

    def __init__(self, *, only_right: bool = True, filtered: Sequence[FilteredQuestion] = ()) -> None:
        super().__init__()
        self._only_right, self._filtered = only_right, list(filtered)
        self._heads: dict[str, tuple[int, ...]] = {}
        self._wrong = self._ungraded = 0

    def add(self, result: AttentionKnockout) -> None:
        """Add a result to the average, or list its question if the answer is wrong."""
        gold, generated = result.gold, result.generated
        if self._only_right and result.is_right is False and gold is not None and generated is not None:
            self.leave_out(FilteredQuestion(question=result.question, gold=gold, generated=generated))
        else:
            super().add(result)

    def leave_out(self, question: FilteredQuestion) -> None:
        """List a question as left out."""
        self._filtered.append(question)

    def average(self) -> AverageKnockout:
        """Return the average so far. Raises `TraceError` if all questions were left out."""
        if self.count or not self._filtered:
            return super().average()
        first = self._filtered[0]
        raise TraceError(
            f"no question is left to average: the model's own answer is wrong to all {len(self._filtered)} (to "
            f"{first.question!r} it says {first.generated!r}, not {first.gold!r}); ask what the model knows, or pass "
            "only_right=False"
        )

    def _take(self, result: AttentionKnockout) -> None:
        for name, own in zip(result.flows, result.flow_heads, strict=True):
            if self._heads.setdefault(name, own) != own:
                heads = " and ".join(str(each or "all") for each in (self._heads[name], own))
                raise TraceError(f"these results cut {name!r} in heads {heads}; average equal ones only")
        self._wrong += result.is_right is False
        self._ungraded += result.is_right is None
        self._add("clean", result.clean, {"score": result.scores})
        changes = torch.stack([result.change(score) for score in result.scores])
        self._add("changes", changes, result._axes(), joint=True)

    def _average(self) -> AverageKnockout:
        flows = self._labels("changes", "flow")
        return AverageKnockout(
            flows=flows,
            flow_heads=tuple(self._heads[name] for name in flows),
            count=self.count,
            wrong=self._wrong,
            ungraded=self._ungraded,
            clean=self._mean("clean"),
            changes=self._mean("changes"),
            covariance=self._means["changes"].covariance,
            filtered=tuple(self._filtered),
            **{name: getattr(self.first, name) for name in _SHARED},
        )


def centre_of_loss(curve: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean layer of a curve (layer,), weighted by how far it lies below zero, and its derivative (layer,).

    The centre is NaN for a curve that is nowhere below zero.
    """
    loss, layers = (-curve).clamp(min=0), torch.arange(len(curve), dtype=curve.dtype)
    centre = (loss * layers).sum() / loss.sum()
    return centre, torch.where(loss > 0, (centre - layers) / loss.sum(), 0.0)


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"
