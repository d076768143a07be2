"""Flows of attention x gradient saliency over prompts: geometric means with intervals, saved, exported and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.curves import Curve, CurvePanel, draw_curves
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ..errors import TraceError
from ..knockout.styles import flow_styles
from .saliency_result import AttentionSaliency

_LAYOUT = "multrace average attention saliency 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageSaliency:
    """Mean saliency of flows between groups of tokens, and each prompt's own. Made by `average_saliencies`.

    Flows of different prompts differ by orders of magnitude, and a few large ones would be most of an arithmetic mean.
    So means are geometric, and their intervals those of the mean of the logarithms. A flow that is exactly zero has no
    logarithm: it is left out of mean and interval and counted by `zeros`. Where only some prompts are zero, the mean
    says how strong the flow is where there is any.
    """

    model: str
    """Name or path of the model."""
    revision: str | None
    layers: tuple[int, ...]
    """The decoder layers that were read, in order."""
    questions: tuple[str, ...]
    """Each prompt's."""
    flows: tuple[str, ...]
    """"source -> target" of two groups, each flow of at least one prompt."""
    prompt_flows: Tensor
    """(flow, prompt, layer) float64, at least 0: mean saliency per edge; NaN where a prompt has no such flow."""

    @property
    def count(self) -> int:
        """How many prompts were averaged."""
        return len(self.questions)

    @property
    def counts(self) -> dict[str, int]:
        """How many of them have each flow, be it zero or not."""
        has_flow = (~self.prompt_flows.isnan()).any(-1)
        return dict(zip(self.flows, has_flow.sum(1).tolist(), strict=True))

    def of(self, flow: str) -> Tensor:
        """(layer,) float64: geometric mean over the prompts in which the flow is above zero; NaN where it is in none.

        TraceError for a flow that no prompt has.
        """
        return 10 ** self._logs[self._index(flow)].nanmean(0)

    def interval(self, flow: str) -> tuple[Tensor, Tensor]:
        """(low, high), each (layer,): 95 % interval of `of` over prompts, by Student's t on the logarithms.

        NaN where fewer than two prompts are above zero; TraceError for an average of one prompt or an unknown flow.
        """
        low, high = mean_interval(self._logs[self._index(flow)])
        return 10**low, 10**high

    def zeros(self, flow: str) -> Tensor:
        """(layer,) int64: in how many prompts the flow is exactly zero. TraceError for a flow that no prompt has."""
        return (self.prompt_flows[self._index(flow)] == 0).sum(0)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageSaliency":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: all flows over the layers, by powers of ten, with their 95 % intervals as bands.

        A line has a gap where its flow is zero in every prompt. The legend says how many prompts have a flow where
        that differs. The suffix names the format (png, pdf or svg).
        """
        styles = dict(zip(self.flows, flow_styles(self.flows), strict=True))
        layers, counts, curves = torch.tensor(self.layers), self.counts, []
        for flow, (mean, low, high) in zip(self.flows, self._log_means.unbind(1), strict=True):
            label = flow if counts[flow] == self.count else f"{flow} (n = {counts[flow]})"
            curves.append(Curve(label=label, x=layers, y=mean, low=low, high=high, style=styles[flow]))
        label = "log10 of saliency per edge"
        return draw_curves(path, [CurvePanel(curves=curves)], titles=self._titles(), y_label=label, reference=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per flow and layer: saliency (geometric mean), low and high of its 95 % interval, n and zeros.

        n: the prompts that the mean is over; zeros: those whose flow is exactly zero. low and high are NaN where n is
        1, all three where it is 0.
        """
        mean, low, high = 10**self._log_means
        counts = {"n": (~self._logs.isnan()).sum(1), "zeros": (self.prompt_flows == 0).sum(1)}
        axes = [("flow", self.flows), ("layer", self.layers)]
        return long_frame(axes, {"saliency": mean, "low": low, "high": high, **counts})

    @property
    def _logs(self) -> Tensor:
        """(flow, prompt, layer): log10; NaN also for zero."""
        return self.prompt_flows.masked_fill(self.prompt_flows == 0, torch.nan).log10()

    @property
    def _log_means(self) -> Tensor:
        """(3, flow, layer): means of the logarithms and both ends of their intervals, NaN for a single prompt."""
        logs = self._logs.transpose(0, 1)
        mean = logs.nanmean(0)
        unknown = torch.full_like(mean, torch.nan)
        return torch.stack([mean, *(mean_interval(logs) if self.count > 1 else (unknown, unknown))])

    def _index(self, flow: str) -> int:
        if flow not in self.flows:
            raise TraceError(f"no flow {flow!r} in this average; pass {', '.join(map(repr, self.flows))}")
        return self.flows.index(flow)

    def _titles(self) -> tuple[str, str]:
        """Title and subtitle of the picture."""
        over = f"geometric mean over {self.count} prompts" if self.count > 1 else "one prompt"
        bands = "; bands: 95% intervals of the mean" if self.count > 1 else ""
        is_zero = self.prompt_flows == 0
        is_partly_zero = is_zero.any(1) & ~self._logs.isnan().all(1)
        zeros = "\nwhere a flow is zero in some prompts, it is the mean of the others" if is_partly_zero.any() else ""
        return "What the answer rests on", f"attention x gradient of its loss, {over}{bands}{zeros}"


def average_saliencies(saliencies: Sequence[AttentionSaliency | AverageSaliency]) -> AverageSaliency:
    """Geometric mean over prompts to one model of each flow between groups; a prompt without a flow is left out of it.

    Averages among them stand for the prompts that they are over, and take far less memory than their saliencies.
    TraceError for none, where models or layers differ, and where no prompt has a flow.
    """
    _check_alike(saliencies)
    first, own = saliencies[0], [flows for each in saliencies for flows in _flows_of(each)]
    names = tuple(dict.fromkeys(name for flows in own for name in flows))
    if not names:
        raise TraceError("these saliencies have no flow between groups; read them again with later queries")
    absent = torch.full((len(first.layers),), torch.nan, dtype=torch.float64)
    asked = [each.questions if isinstance(each, AverageSaliency) else (each.question,) for each in saliencies]
    return AverageSaliency(
        model=first.model,
        revision=first.revision,
        layers=first.layers,
        questions=tuple(question for questions in asked for question in questions),
        flows=names,
        prompt_flows=torch.stack([torch.stack([flows.get(name, absent) for flows in own]) for name in names]),
    )


def _flows_of(found: AttentionSaliency | AverageSaliency) -> list[dict[str, Tensor]]:
    """Per prompt the flows (layer,) that it has."""
    if isinstance(found, AttentionSaliency):
        return [found.flows]
    own = [dict(zip(found.flows, flows, strict=True)) for flows in found.prompt_flows.unbind(1)]
    return [{name: flow for name, flow in flows.items() if not flow.isnan().all()} for flows in own]


def _check_alike(saliencies: Sequence[AttentionSaliency | AverageSaliency]) -> None:
    """TraceError for none, or for several that cannot be averaged."""
    if not saliencies:
        raise TraceError("no attention saliencies to average; pass at least one")
    for name in ("model", "revision", "layers"):
        found = dict.fromkeys(getattr(each, name) for each in saliencies)
        if len(found) > 1:
            raise TraceError(
                f"these attention saliencies differ in their {name} ({' and '.join(map(str, found))}); average equal "
                "ones only"
            )


def _problem(found: AverageSaliency) -> str | None:
    """What does not fit together in an average that was read from a file."""
    shape = (len(found.flows), len(found.questions), len(found.layers))
    if found.prompt_flows.shape != shape or 0 in shape:
        return "its flows are of another shape than its names, prompts and layers"
    return "some of its flows are below zero" if (found.prompt_flows < 0).any() else None
