"""multrace flow --knockout: what the answer loses without attention from one group of tokens to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models import Prompt
from ..tracing import average
from ..tracing.knockout.average import AverageKnockout, FilteredQuestion
from ..tracing.knockout.knockout import attention_knockout, parse_flow
from ..tracing.knockout.result import AttentionKnockout
from .errors import CommandError
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Asked, Files, Reading, check_group, need_image, write_table

_BOXED = ("object", "other patches")
_NAMED = ("constraint", "constraint_last")
_GROUPS = ("image", "question", "question_only", "last", "all", "separators", "system", "template", *_NAMED, *_BOXED)
_GROUPS += ("object words", "true option", "false option", "options", "question without options")
_DRAWN = 12
"""Maximum number of flows in one plot; flows by head are many more."""


@dataclass(frozen=True, kw_only=True)
class Knockout(Reading):
    """Attention knockout with these settings of `attention_knockout`."""

    name = analysis = "knockout"
    kind = AttentionKnockout
    drawings = average_drawings = ("knockout.png", "knockout.csv")
    uses_engine = True

    flows: tuple[str, ...] | None
    windows: tuple[int, ...] | None
    heads: str | tuple[int, ...] | None
    whole_answer: bool

    def check_settings(self) -> None:
        """Raises `CommandError` or `TraceError` for a flow, window or head that no model has."""
        for group in self._groups():
            check_group(group, _GROUPS)
        if wrong := [window for window in self.windows or () if window < 1]:
            raise CommandError(f"--windows {wrong[0]}: cut the edges in at least one layer")
        if isinstance(self.heads, tuple) and (wrong := [head for head in self.heads if head < 0]):
            raise CommandError(f"--heads {wrong[0]}: heads are counted from 0")

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question without the picture, box or words that its flows need."""
        groups = self._groups()
        if self.flows is None or "image" in groups:
            need_image(question, self.name)
        if (boxed := [group for group in groups if group in _BOXED]) and not question.boxes:
            raise CommandError(f"the group {boxed[0]!r} needs --box (or 'boxes' in the record): where the object is")
        if (named := [group for group in groups if group in _NAMED]) and not question.spans:
            raise CommandError(
                f"the group {named[0]!r} needs --constraint (or 'constraint' in the record): words of the question"
            )

    def compute(self, asked: Asked) -> AttentionKnockout:
        """Return the answer's probability with each flow cut."""
        return attention_knockout(
            asked.vlm,
            asked.prompt,
            flows=self.flows,
            windows=self.windows,
            heads=self.heads,
            boxes=asked.question.boxes,
            whole_answer=self.whole_answer,
            gold=asked.question.gold,
            generated=asked.generated,
            engine=asked.engine,
            progress=asked.progress,
        )

    def files(self, result: AttentionKnockout, prompt: Prompt) -> Files:
        """Return one plot of the flows, and a table of all values."""
        return {
            "knockout.png": lambda path: result.plot(path, flows=_strongest(result)),
            "knockout.csv": lambda path: write_table(result, path),
        }

    def told(self, result: AttentionKnockout) -> list[str]:
        """Return the strongest change of each flow, and how it was computed."""
        return [*result.summary().splitlines()[1:], f"  {result.engine.summary()}", *_left_undrawn(result)]

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> AverageKnockout:
        """Return the mean changes; wrong answers were filtered before."""
        return average((result for _, result in found), only_right=False, filtered=filtered)

    def average_files(self, average: AverageKnockout) -> Files:
        """Return one plot of the flows, and a table of all values."""
        drawing = {"knockout.png": lambda path: average.plot(path, flows=_strongest(average))}
        return super().average_files(average) | drawing

    def average_told(self, average: AverageKnockout) -> list[str]:
        """Return the strongest mean change of each flow, and the questions that were left out."""
        return [*average.summary().splitlines(), *_left_undrawn(average)]

    def _groups(self) -> list[str]:
        """Token groups that the flows name."""
        flows = [parse_flow(flow) for flow in self.flows or ()]
        return [each for flow in flows for each in (flow.source, flow.target) if isinstance(each, str)]


def _strongest(found: AttentionKnockout | AverageKnockout) -> tuple[str, ...]:
    """The flows to draw, in their order: all, or those that change the answer most."""
    peaks = found.change().nan_to_num(nan=0).abs().flatten(1).amax(1)
    return tuple(found.flows[index] for index in sorted(peaks.topk(min(_DRAWN, len(peaks))).indices.tolist()))


def _left_undrawn(found: AttentionKnockout | AverageKnockout) -> list[str]:
    count = len(found.flows)
    return [f"  drawn are the {_DRAWN} strongest of {count} flows"] if count > _DRAWN else []
