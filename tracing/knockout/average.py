"""Averages of attention knockout over questions, with intervals, and with the questions that were left out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.figure import name_of_model
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ..errors import TraceError
from .centres import FlowCentre, centre_of_loss, jackknife
from .maps import FlowMap, FlowPeak, draw_flows
from .result import AttentionKnockout, cut_label, place_words

_LAYOUT = "multrace average information flow 1"
_SHARED = ("model", "revision", "layers", "windows", "scores")


@dataclass(frozen=True, kw_only=True)
class FilteredQuestion:
    """A question that is not averaged, because the model's own answer to it is wrong."""

    question: str
    gold: str
    """The right answer."""
    generated: str
    """The model's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageKnockout(FlowMap):
    """Mean changes over questions that were asked with the same cuts, and each question's own. Made by `average_knockouts`.

    Flows are found by their names; a question without one (no box of an object, say) is left out of that flow's mean.
    """

    questions: tuple[str, ...]
    """The questions that are averaged."""
    answers: tuple[str, ...]
    """Per question the answer that was scored."""
    right: tuple[bool | None, ...]
    """Per question whether the model's own answer is the right one; None where that is not known."""
    clean: Tensor
    """(score, question) float64: each answer's probability without any cut."""
    changes: Tensor
    """(score, question, flow, window, layer) float64: change in percent; NaN where a question has no such flow."""
    filtered: tuple[FilteredQuestion, ...]
    """The questions that were left out for a wrong answer."""

    @property
    def count(self) -> int:
        """How many questions were averaged."""
        return len(self.questions)

    @property
    def counts(self) -> dict[str, int]:
        """How many of them each flow's mean is over."""
        has_flow = (~self.changes.isnan()).flatten(3).any(-1).any(0)  # (question, flow)
        return dict(zip(self.flows, has_flow.sum(0).tolist(), strict=True))

    def change(self, score: str | None = None) -> Tensor:
        """(flow, window, layer) float64: change in percent, mean over the questions that have the flow."""
        return self.changes[self._score(score)].nanmean(0)

    def interval(self, score: str | None = None, *, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """(low, high), each (flow, window, layer): 95 % interval of the mean change over questions, by Student's t.

        corrected: intervals that hold all layers of a curve together (Bonferroni), as one must ask for who looks at
        its largest change. NaN for a flow of a single question; TraceError for an average of one question.
        """
        return mean_interval(self.changes[self._score(score)], comparisons=self.layers if corrected else 1)

    def peak(self, flow: str, window: int | None = None, score: str | None = None) -> FlowPeak:
        """The layer with the strongest mean change, up or down (default: first window), with its corrected interval."""
        count, interval = self.counts[self.flows[self._flow(flow)]], None
        peak = self._peak(flow, window, score, count=count)
        if count > 1:
            ends = self.interval(score, corrected=True)
            low, high = (float(end[self._flow(flow), self._window(window), peak.layer]) for end in ends)
            interval = (low, high)
        return replace(peak, interval=interval)

    def centre(self, flow: str, window: int | None = None, score: str | None = None) -> FlowCentre | None:
        """How early or late in the model the flow matters: the centre of mass of what its mean curve loses.

        The interval comes from leaving out each question in turn (jackknife). None where the mean nowhere falls below
        zero. Meaningful only for a flow whose peak is clearly below zero: noise has its centre in the middle.
        """
        curves = self._own_curves(flow, window, score)
        value, interval = jackknife(curves, centre_of_loss)
        index = self._window(window)
        place = {"flow": flow, "window": self.windows[index], "count": len(curves)}
        if interval is not None:
            interval = (max(interval[0], 0.0), min(interval[1], self.layers - 1.0))  # no centre lies outside the model
        return None if value is None else FlowCentre(layer=value, interval=interval, **place)

    def summary(self, score: str | None = None) -> str:
        """Lines for people: per flow and window the strongest change, where it is and where its centre lies.

        Then which questions were left out, with the wrong answers.
        """
        wrong, unknown = self.right.count(False), self.right.count(None)
        notes = [f"{wrong} of them answered wrongly"] if wrong else []
        notes += [f"{unknown} of them without a known right answer"] if unknown else []
        lines = [f"information flow in {self.model}, mean over {', '.join([_questions(self.count), *notes])}"]
        lines += [f"  {self._line(flow, window, score)}" for flow in self.flows for window in self.windows]
        lines += [f"left out because the model's own answer is wrong: {_questions(len(self.filtered))}"]
        lines += [f"  {each.question!r}: {each.generated!r}, not {each.gold!r}" for each in self.filtered]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, replace(self, filtered=tuple(asdict(each) for each in self.filtered)))

    @classmethod
    def load(cls, path: str | Path) -> "AverageKnockout":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        stored = load(path, _LAYOUT, cls, check=_problem)
        return replace(stored, filtered=tuple(FilteredQuestion(**each) for each in stored.filtered))

    def to_dataframe(self) -> pd.DataFrame:
        """One line per score, flow, window and layer, the window's centre.

        Columns: the mean change (percent), low and high of its 95 % interval (NaN where n is 1), n, the questions that
        have the flow, and first_layer and last_layer of the cut.
        """
        axes = [("score", self.scores), ("flow", self.flows), ("window", self.windows), ("layer", range(self.layers))]
        values, low, high = (torch.stack(each) for each in zip(*map(self._with_ends, self.scores), strict=True))
        counts = (~self.changes.isnan()).sum(1)
        return long_frame(axes, {"change": values, "low": low, "high": high, "n": counts, **self._span_columns()})

    def plot(
        self,
        path: str | Path,
        window: int | None = None,
        score: str | None = None,
        *,
        flows: Sequence[str] | None = None,
    ) -> Path:
        """The written picture (png, pdf or svg by suffix): mean change by layer, a line per flow, 95 % bands.

        All flows or these; a panel per window or only one. The legend says how many questions have a flow where that
        differs. TraceError for a flow, window or score that was not computed.
        """
        windows = self.windows if window is None else (self.windows[self._window(window)],)
        values, curves = torch.stack(self._with_ends(score)), []
        for flow in self.flows if flows is None else flows:
            index, count = self._flow(flow), self.counts[flow]
            label = cut_label(flow) + ("" if count == self.count else f" (n = {count})")
            curves.append((flow, label, values[:, index]))
        return draw_flows(path, self, windows=windows, curves=curves, titles=self._titles(score))

    def _own_curves(self, flow: str, window: int | None, score: str | None) -> Tensor:
        """(question, layer): the curves of the questions that have the flow."""
        curves = self.changes[self._score(score), :, self._flow(flow), self._window(window)]
        return curves[~curves.isnan().any(-1)]

    def _with_ends(self, score: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean changes and both ends of their intervals, which are NaN for a single question."""
        values = self.change(score)
        unknown = torch.full_like(values, torch.nan)
        return (values, *(self.interval(score) if self.count > 1 else (unknown, unknown)))

    def _line(self, flow: str, window: int, score: str | None) -> str:
        """One line on a flow and window."""
        peak, centre = self.peak(flow, window, score), self.centre(flow, window, score)
        ends = "" if peak.interval is None else " [{:+.1f}, {:+.1f}]".format(*peak.interval)
        found = f"{peak.change:+.1f} %{ends} at {place_words(peak)}" if peak.change else "changes nothing at any layer"
        if peak.change and not peak.is_clear:
            found += ", not clear of zero"
        elif centre is not None and peak.change < 0:
            between = "" if centre.interval is None else " [{:.1f}, {:.1f}]".format(*centre.interval)
            found += f", centre of the loss at layer {centre.layer:.1f}{between}"
        return f"{flow:<{max(map(len, self.flows))}}  window {window}: {found}, {_questions(peak.count)}"

    def _titles(self, score: str | None) -> tuple[str, str]:
        """Title and subtitle of pictures."""
        index = self._score(score)
        name = f" ({self.scores[index]})" if len(self.scores) > 1 else ""
        clean = f"mean probability without a cut {float(self.clean[index].mean()):.3g}{name}"
        bands = "; bands: 95% intervals" if self.count > 1 else ""
        wrong = f"; {self.right.count(False)} of them answered wrongly" if False in self.right else ""
        left_out = f"{len(self.filtered)} left out for a wrong answer" if self.filtered else "none left out"
        title = f"Information flow over {_questions(self.count)}"
        return title, f"{name_of_model(self.model)}; {left_out}{wrong}\n{clean}{bands}"


def average_knockouts(
    flows: Sequence[AttentionKnockout], *, only_right: bool = True, filtered: Sequence[FilteredQuestion] = ()
) -> AverageKnockout:
    """Mean changes over questions that one model was asked with the same windows and scores.

    only_right: questions that the model itself answers wrongly are not averaged but listed in `filtered`, as in arXiv
    2411.18620, section 3; those whose right answer is not known are averaged. filtered: questions that were left out
    before any flow was computed. TraceError where no question is left or the results differ in what was cut.
    """
    wrong = [flow for flow in flows if only_right and flow.is_right is False]
    left_out = [FilteredQuestion(question=each.question, gold=each.gold, generated=each.generated) for each in wrong]
    left_out = (*filtered, *left_out)
    kept = [flow for flow in flows if not (only_right and flow.is_right is False)]
    if not kept:
        raise _none_left(left_out)
    heads = _check_alike(flows)
    first = kept[0]
    names = tuple(dict.fromkeys(name for flow in kept for name in flow.flows))
    return AverageKnockout(
        flows=names,
        flow_heads=tuple(heads[name] for name in names),
        spans=first.spans,
        questions=tuple(flow.question for flow in kept),
        answers=tuple(flow.answer for flow in kept),
        right=tuple(flow.is_right for flow in kept),
        clean=torch.stack([flow.clean for flow in kept], 1),
        changes=torch.stack([_aligned(flow, names) for flow in kept], 1),
        filtered=left_out,
        **{name: getattr(first, name) for name in _SHARED},
    )


def _none_left(filtered: Sequence[FilteredQuestion]) -> TraceError:
    if not filtered:
        return TraceError("no information flows to average; pass at least one")
    first = filtered[0]
    return TraceError(
        f"no question is left to average: the model's own answer is wrong to all {len(filtered)} (to "
        f"{first.question!r} it says {first.generated!r}, not {first.gold!r}); ask what the model knows, or pass the "
        "flows with only_right=False"
    )


def _check_alike(flows: Sequence[AttentionKnockout]) -> dict[str, tuple[int, ...]]:
    """Per flow its heads; TraceError where the results differ in what was asked."""
    for name in _SHARED:
        found = {getattr(flow, name): None for flow in flows}
        if len(found) > 1:
            raise TraceError(
                f"these information flows differ in their {name} ({' and '.join(map(str, found))}); average equal ones "
                "only"
            )
    if not all(torch.equal(flow.spans, flows[0].spans) for flow in flows):
        raise TraceError("these information flows differ in the layers that a window cuts; average equal ones only")
    heads = {}
    for flow in flows:
        for name, own in zip(flow.flows, flow.flow_heads, strict=True):
            if heads.setdefault(name, own) != own:
                found = " and ".join(str(each or "all") for each in (heads[name], own))
                raise TraceError(f"these information flows cut {name!r} in heads {found}; average equal ones only")
    return heads


def _aligned(flow: AttentionKnockout, names: Sequence[str]) -> Tensor:
    """(score, flow, window, layer): changes in percent, NaN for flows that this question lacks."""
    changes = torch.stack([flow.change(score) for score in flow.scores])
    absent = torch.full_like(changes[:, 0], torch.nan)
    own = {name: changes[:, index] for index, name in enumerate(flow.flows)}
    return torch.stack([own.get(name, absent) for name in names], 1)


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"


def _problem(average: AverageKnockout) -> str | None:
    """What does not fit together in an average that was read from a file."""
    for each in average.filtered:
        FilteredQuestion(**each)  # a TypeError says what is missing
    count, scores = average.count, len(average.scores)
    fits = average.fits_together()
    fits += [average.clean.shape == (scores, count), len(average.answers) == len(average.right) == count > 0]
    fits += [average.changes.shape == (scores, count, len(average.flows), len(average.windows), average.layers)]
    return None if all(fits) else "its tensors are of other shapes than its flows, windows, layers and questions"
