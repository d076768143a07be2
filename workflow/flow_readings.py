"""The readings of information flow: what they have in common, attention knockout and the logit lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..artefacts import Result
from ..data import Question
from ..models import Prompt, VisionLanguageModel
from ..tracing import (
    AttentionKnockout,
    Box,
    Engine,
    FilteredQuestion,
    Flow,
    LogitLens,
    TraceError,
    attention_knockout,
    logit_lens,
)
from ..tracing.knockout import parse_flow
from ..tracing.lens import state_name, token_text
from .analysis import RunningAverage, Summary
from .run_folder import StoredRecord

Files = Mapping[str, Callable[[Path], Any]]
"""File name -> function that writes the file to a path."""

_BOXED = ("object", "other patches")
_NAMED = ("constraint", "constraint_last")
_LENS_GROUPS = ("last", "question", "question_only", *_NAMED, "image", "all")
_CUT_GROUPS = ("image", "question", "question_only", "last", "all", "separators", "system", "template", *_NAMED)
_CUT_GROUPS += (*_BOXED, "object words", "true option", "false option", "options", "question without options")
_DRAWN = 12
"""Maximum number of flows in one plot; flows by head are many more."""
_COLUMNS = 24
"""Maximum number of positions in a table of tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedQuestion:
    """One question to one model, with the model's own answer."""

    vlm: VisionLanguageModel
    question: Question
    prompt: Prompt
    generated: str
    engine: Engine
    progress: bool = False
    """Whether readings show their own progress bars."""


@dataclass(frozen=True, kw_only=True)
class FlowReading:
    """One kind of result; the fields of its subclasses are its settings."""

    name: ClassVar[str]
    """Name of its files."""
    analysis: ClassVar[str]
    """The analysis that it belongs to."""
    kind: ClassVar[type[Result]]
    """The class of its results."""
    counts_wrong: ClassVar[bool] = False
    """Whether questions that the model answers wrongly are included."""
    always_drawn: ClassVar[bool] = False
    """Whether each result is drawn even in a run over many questions, since there is no average to draw."""

    def check_settings(self) -> None:
        """Raise `TraceError` for settings that no model could follow."""

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question that lacks what this reading needs."""

    def experiment(self, asked: AskedQuestion) -> Callable[[], Any]:
        """Return the call that computes the result for one question; it raises an error if there is none."""
        raise NotImplementedError

    def reduced(self, result: Any) -> Any:
        """Return the part of a result that is kept."""
        return result

    def files(self, result: Any, prompt: Prompt) -> Files:
        """Return the drawings of one result."""
        return {}

    def lines(self, result: Any) -> list[str]:
        """Return the result as lines of text."""
        return repr(result).splitlines()

    def row(self, result: Any) -> dict[str, Any]:
        """Return the columns of the table of a run."""
        return {}

    def average(self) -> RunningAverage | Summary | None:
        """Return a new average, or None if results of several questions are not averaged."""
        return ReadingAverage(self)


class ReadingAverage(RunningAverage):
    """The average of a reading, with figures and words of its own."""

    def __init__(
        self,
        reading: FlowReading,
        *,
        files: Callable[[Any], Files] = lambda value: {},
        words: Callable[[Any], list[str]] = lambda value: repr(value).splitlines(),
        **options: Any,
    ) -> None:
        super().__init__(reading.name, reading.kind, **options)
        self._own_files, self._own_words = files, words

    def _files(self, value: Any) -> dict[str, Callable[[Path], Any]]:
        return {**super()._files(value), **self._own_files(value)}

    def _words(self, value: Any) -> list[str]:
        return [self.name, *(f"  {line}" for line in self._own_words(value))]


# ---- attention knockout ----


@dataclass(frozen=True, kw_only=True)
class KnockoutReading(FlowReading):
    """What the answer loses without attention from one group of tokens to another."""

    name = analysis = "knockout"
    kind = AttentionKnockout

    flows: tuple[str, ...] | None
    windows: tuple[int, ...] | None
    heads: str | tuple[int, ...] | None
    whole_answer: bool

    def check_settings(self) -> None:
        """Raise `TraceError` for a flow, window or head that no model has."""
        for group in self._groups():
            check_group(group, _CUT_GROUPS)
        if wrong := [window for window in self.windows or () if window < 1]:
            raise TraceError(f"a window of {wrong[0]} layers; cut the edges in at least one layer")
        if isinstance(self.heads, tuple) and (wrong := [head for head in self.heads if head < 0]):
            raise TraceError(f"no head {wrong[0]}; heads are counted from 0")

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question without the picture, boxes or words that its flows need."""
        groups = self._groups()
        if self.flows is None or "image" in groups:
            need_image(question, self.name)
        if (boxed := [group for group in groups if group in _BOXED]) and not question.boxes:
            raise TraceError(f"the group {boxed[0]!r} needs the boxes of the question: where the object is")
        if named := [group for group in groups if group in _NAMED]:
            need_constraint(question, f"the group {named[0]!r}")

    def experiment(self, asked: AskedQuestion) -> Callable[[], AttentionKnockout]:
        """Return the call for the answer's probability with each flow cut."""
        return partial(
            attention_knockout,
            asked.vlm,
            asked.prompt,
            flows=self.flows,
            windows=self.windows,
            heads=self.heads,
            boxes=[Box(*box) for box in asked.question.boxes],
            whole_answer=self.whole_answer,
            gold=asked.question.answer,
            generated=asked.generated,
            engine=asked.engine,
            progress=asked.progress,
        )

    def files(self, result: AttentionKnockout, prompt: Prompt) -> Files:
        """Return one plot of the flows, and a table of all values."""
        return {"knockout.png": _flow_plot(result), "knockout.csv": table_file(result)}

    def lines(self, result: AttentionKnockout) -> list[str]:
        """Return the strongest change of each flow, and how it was computed."""
        return [*result.summary().splitlines()[1:], f"  {result.engine.summary()}", *_left_undrawn(result)]

    def row(self, result: AttentionKnockout) -> dict[str, Any]:
        """Return the strongest change of each flow in the narrowest window, and its layer."""
        peaks = {flow: result.strongest(flow) for flow in result.flows} if len(result.flows) <= _DRAWN else {}
        return {f"knockout {flow}": peak.change for flow, peak in peaks.items()}

    def average(self) -> KnockoutAverage:
        """Return the average over the questions that the model answers rightly."""
        return KnockoutAverage(self)

    def _groups(self) -> list[str]:
        """Token groups that the flows name."""
        flows: list[Flow] = [parse_flow(flow) for flow in self.flows or ()]
        return [each for flow in flows for each in (flow.source, flow.target) if isinstance(each, str)]


class KnockoutAverage(ReadingAverage):
    """The average of knockouts, which lists the questions that were left out for a wrong answer."""

    def __init__(self, reading: KnockoutReading) -> None:
        super().__init__(
            reading,
            files=lambda value: {"knockout.png": _flow_plot(value)},
            words=lambda value: [*value.summary().splitlines(), *_left_undrawn(value)],
            only_right=False,
        )

    def add(self, record: StoredRecord) -> None:
        """Add a result, or list its question as left out."""
        row = record.row
        if row["left_out"]:
            question = FilteredQuestion(question=row["question"], gold=row["answer"] or "", generated=row["generated"])
            self.averager.leave_out(question)
        super().add(record)


def _flow_plot(result: Any) -> Callable[[Path], Any]:
    """Draws all flows, or those that change the answer most, in their order."""
    peaks = result.change().nan_to_num(nan=0).abs().flatten(1).amax(1)
    flows = tuple(result.flows[index] for index in sorted(peaks.topk(min(_DRAWN, len(peaks))).indices.tolist()))
    return partial(result.plot, flows=flows)


def _left_undrawn(result: Any) -> list[str]:
    count = len(result.flows)
    return [f"  drawn are the {_DRAWN} strongest of {count} flows"] if count > _DRAWN else []


# ---- logit lens ----


@dataclass(frozen=True, kw_only=True)
class LensReading(FlowReading):
    """From which layer on the output head would say the answer."""

    name = analysis = "lens"
    kind = LogitLens

    positions: tuple[str | int, ...]

    def check_settings(self) -> None:
        """Raise `TraceError` for a group that no prompt has."""
        for group in self.positions:
            if isinstance(group, str):
                check_group(group, _LENS_GROUPS)

    def check(self, question: Question) -> None:
        """Raise `TraceError` for a question that has no tokens in a group."""
        for group in self.positions:
            if group == "image":
                need_image(question, "the lens at the image")
            if group in _NAMED:
                need_constraint(question, f"the lens at {group!r}")

    def experiment(self, asked: AskedQuestion) -> Callable[[], LogitLens]:
        """Return the call for the ranks, after every layer, of the right answer or else of the model's own."""
        return partial(
            logit_lens,
            asked.vlm,
            asked.prompt,
            positions=self.positions,
            answer=asked.question.answer or asked.generated or None,
            foil=asked.question.foil,
            progress=asked.progress,
        )

    def files(self, result: LogitLens, prompt: Prompt) -> Files:
        """Return curves at the first position, and the likeliest tokens at the last few positions."""
        order = sorted(range(len(result.positions)), key=result.positions.__getitem__)[-_COLUMNS:]
        return {"lens.png": result.plot, "lens_tokens.png": partial(result.plot_tokens, positions=order)}

    def lines(self, result: LogitLens) -> list[str]:
        """Return the layer from which each followed token is the likeliest."""
        lines = [f"read at {result.position_roles[0]}, with the model's final norm"]
        tokens = zip(result.followed.ids, result.followed.texts, result.followed.roles, strict=True)
        for number, text, roles in tokens:
            layer, last = result.first_layer(number), float(result.probability(number)[-1])
            when = "not the likeliest in the end" if layer is None else f"the likeliest from {_state(layer)} on"
            lines.append(f"  {token_text(text)!r} ({'; '.join(roles)}): {when}, {last:.3g} in the end")
        return lines

    def row(self, result: LogitLens) -> dict[str, Any]:
        """Return the layer from which the first followed token is the likeliest, and its probability in the end."""
        number = result.followed.ids[0]
        return {"lens_layer": result.first_layer(number), "lens_probability": float(result.probability(number)[-1])}

    def average(self) -> ReadingAverage:
        """Return the mean curves at the first position."""
        return ReadingAverage(self, words=_lens_words)


def _lens_words(average: Any) -> list[str]:
    """The layer from which each role is the likeliest token in half of the prompts."""
    lines = [f"read at {average.position_role} in {average.count} prompts, with the model's final norm"]
    for role in average.roles:
        shares, last = average.mean(role, "share").tolist(), float(average.mean(role)[-1])
        layer = next((layer for layer, share in zip(average.layers, shares, strict=True) if share >= 0.5), None)
        when = "never in half of them" if layer is None else f"in half of them from {_state(layer)} on"
        lines.append(f"  {role}: the likeliest token {when}; in the end in {shares[-1]:.0%}, {last:.3g} probable")
    return lines


def _state(layer: int) -> str:
    return f"the {state_name(layer)}" if layer < 0 else state_name(layer)


# ---- what questions need ----


def check_group(name: str, known: Sequence[str]) -> None:
    """Raise `TraceError` with the nearest name, unless this is a known token group or a named constraint."""
    if name in known or name.startswith("constraint:"):
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, and positions as numbers"
    raise TraceError(f"no token group {name!r}; {hint}")


def need_image(question: Question, what: str) -> None:
    """Raise `TraceError` for a question without a picture."""
    if not question.images:
        raise TraceError(f"{what} needs a picture; give the question an image")


def need_constraint(question: Question, what: str) -> None:
    """Raise `TraceError` for a question without words that name its subject."""
    if not question.words:
        raise TraceError(
            f"{what} needs the words of the question that name its subject; give the question a constraint"
        )


def table_file(result: Any) -> Callable[[Path], Any]:
    """Return a function that writes the result's data frame as CSV."""
    return lambda path: result.to_dataframe().to_csv(path, index=False)
