"""What attention knockout found for one question: the answer's probability without each flow, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.figure import name_of_model
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ..engine.report import EngineReport
from .maps import FlowMap, FlowPeak, draw_flows

_LAYOUT = "multrace information flow 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionKnockout(FlowMap):
    """One question's answer with attention edges cut. Made by `attention_knockout`; arXiv 2411.18620, section 3."""

    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    flow_sources: tuple[tuple[int, ...], ...]
    """Per flow the positions that are no longer attended to."""
    flow_targets: tuple[tuple[int, ...], ...]
    """Per flow the positions that no longer attend to them."""
    answer: str
    """The scored tokens' text."""
    answer_ids: tuple[int, ...]
    gold: str | None
    """The right answer, if it is known."""
    generated: str | None
    """The model's own free answer."""
    clean: Tensor
    """(score,) float64: the answer's probability without any cut."""
    probabilities: Tensor
    """(score, flow, window, layer) float64: its probability with the edges cut."""
    free: Tensor
    """(flow, window, layer) bool: known without computing, as nothing that is cut could act."""
    engine: EngineReport

    @property
    def is_right(self) -> bool | None:
        """The model itself answers with the right answer (`same_answer`); None where either is not known."""
        return None if self.gold is None or self.generated is None else same_answer(self.generated, self.gold)

    def change(self, score: str | None = None) -> Tensor:
        """(flow, window, layer) float64: (p_cut - p_clean) / p_clean, in percent; -100 to infinity.

        NaN where p_clean is 0, as nothing can be said then. TraceError for a score that was not computed.
        """
        index = self._score(score)
        clean = self.clean[index]
        ratio = self.probabilities[index] / clean
        return torch.where(clean > 0, (ratio - 1) * 100, torch.nan)

    def strongest(self, flow: str, window: int | None = None, score: str | None = None) -> FlowPeak:
        """The layer at which cutting this flow changes the answer most, up or down (default: first window)."""
        return self._peak(flow, window, score)

    def summary(self, score: str | None = None) -> str:
        """Lines for people: the answer, then per flow and window the strongest change and where it is."""
        peaks = [self.strongest(flow, window, score) for flow in self.flows for window in self.windows]
        name = max(map(len, self.flows))
        return "\n".join([self.question, self._answers(score), *(f"  {_peak_line(peak, name)}" for peak in peaks)])

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionKnockout":
        """The information flow that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem, nested={"engine": EngineReport})

    def to_dataframe(self) -> pd.DataFrame:
        """One line per score, flow, window and layer, the window's centre.

        Columns: probability and change (percent) with the cut, first_layer and last_layer of it, and free.
        """
        axes = [("score", self.scores), ("flow", self.flows), ("window", self.windows), ("layer", range(self.layers))]
        changes = torch.stack([self.change(score) for score in self.scores])
        values = {"probability": self.probabilities, "change": changes, **self._span_columns(), "free": self.free}
        return long_frame(axes, values)

    def plot(
        self,
        path: str | Path,
        window: int | None = None,
        score: str | None = None,
        *,
        flows: Sequence[str] | None = None,
    ) -> Path:
        """The written picture (png, pdf or svg by suffix): all flows or these overlaid, a panel per window or only one.

        TraceError for a flow, window or score that was not computed.
        """
        changes = self.change(score)
        windows = self.windows if window is None else (self.windows[self._window(window)],)
        curves = []
        for flow in self.flows if flows is None else flows:
            values = changes[self._flow(flow)]
            curves.append((flow, cut_label(flow), torch.stack([values, *[torch.full_like(values, torch.nan)] * 2])))
        titles = (self.question, f"{self._answers(score)}\n{name_of_model(self.model)}")
        return draw_flows(path, self, windows=windows, curves=curves, titles=titles)

    def _answers(self, score: str | None) -> str:
        """The scored answer with its probability, and how it fares against the right one."""
        index = self._score(score)
        name = f" ({self.scores[index]})" if len(self.scores) > 1 else ""
        parts = [f"p({self.answer.strip()}) = {float(self.clean[index]):.3g} without a cut{name}"]
        if self.is_right is not None:
            parts.append("the model is right" if self.is_right else f"the model says {self.generated!r}")
        if self.gold is not None and not self.is_right:
            parts.append(f"the right answer is {self.gold!r}")
        return ", ".join(parts)


def same_answer(a: str, b: str) -> bool:
    """The two are equal but for case, blanks around them and a final full stop."""
    plain = [text.strip().lower().removesuffix(".").rstrip() for text in (a, b)]
    return plain[0] == plain[1]


def cut_label(flow: str) -> str:
    """A flow's name in a figure, with the crossed arrow of the paper."""
    return flow.replace("->", "\N{RIGHTWARDS ARROW WITH STROKE}")


def place_words(peak: FlowPeak) -> str:
    """Where a flow is cut, in words."""
    single = peak.first_layer == peak.last_layer
    return f"layer {peak.layer}" + ("" if single else f" (cut in {peak.first_layer} to {peak.last_layer})")


def _peak_line(peak: FlowPeak, name: int) -> str:
    """One line on a flow's strongest change; the names are filled up to so many letters."""
    found = f"{peak.change:+.1f} % at {place_words(peak)}" if peak.change else "changes nothing at any layer"
    return f"{peak.flow:<{name}}  window {peak.window}: {found}"


def _problem(flow: AttentionKnockout) -> str | None:
    """What does not fit together in an information flow that was read from a file."""
    shape = (len(flow.flows), len(flow.windows), flow.layers)
    fits = flow.fits_together()
    fits += [flow.clean.shape == (len(flow.scores),), flow.probabilities.shape == (len(flow.scores), *shape)]
    fits += [flow.free.shape == shape and flow.free.dtype == torch.bool]
    fits += [len(flow.flow_sources) == len(flow.flow_targets) == len(flow.flows)]
    return None if all(fits) else "its tensors are of other shapes than its flows, windows, layers and scores"
