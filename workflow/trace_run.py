"""Causal traces of many records: what `multrace trace` computes of each, and the traces that place an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from ..data import DataError, EditRecord, Question, find_span, inspect_picture
from ..models import VisionLanguageModel, open_images
from ..tracing import (
    Blocks,
    Box,
    CausalTrace,
    Corruption,
    Engine,
    SwapImage,
    TraceError,
    causal_trace,
    parse_corruption,
)
from ..tracing.corruptions.kinds import SPELLINGS, corruption_pictures
from ..tracing.engine.cells import KINDS
from ..tracing.engine.positions import Item, parse_position
from .analysis import Analysis, Outcome, Record, RunningAverage, Summary, Task, question_of_record
from .located_edit import POSITIONS, Located, locate

TRACE = "trace"
"""The name of the trace among the results of a record."""
_BLOCKS = 3
"""Maximum number of causal blocks in a summary, per kind of site."""


@dataclass(frozen=True, kw_only=True)
class TraceRun(Analysis):
    """A causal trace of each record, with these settings of `causal_trace`.

    An edit record is traced for the answer that it replaces. Raises `TraceError` for a misspelt corruption.

    Example:
        >>> from multrace.workflow import TraceRun
        >>> TraceRun(corrupt="text-noise:3", positions=("last",)).settings()["positions"]
        ['last']
    """

    name: ClassVar[str] = "trace"

    corrupt: str | None = None
    """The corruption of records that name none, as `parse_corruption` reads it."""
    window: int = 3
    """Number of MLP or attention layers that are restored together."""
    positions: tuple[Item, ...] | None = None
    """The rows of the map as `causal_trace` takes them; None for each text token on its own."""
    seed: int = 0
    """Random seed of the noise."""
    answer: str | None = None
    """The answer that is scored where a record names none; None for the model's own answer."""
    whole_answer: bool = False
    """Score all tokens of the answer instead of its first."""
    metrics: tuple[str, ...] = ("probability",)
    sites: tuple[str, ...] = KINDS
    direction: str = "restore"
    effect: str = "total"
    severed: str | None = None
    exact_cells: int | None = None
    even_if_weak: bool = False
    engine: str = "auto"
    checks: int = 2
    memory: int = 2048
    """MiB that the replay engine may use; it changes no result and is no part of the settings of a run."""
    draw: bool = False
    """Draw the map of each record, too."""

    def __post_init__(self) -> None:
        if self.corrupt is not None:
            parse_corruption(self.corrupt)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, without those that change no result."""
        values = {name: value for name, value in asdict(self).items() if name != "memory"}
        rows = None if self.positions is None else [_spelled(item) for item in self.positions]
        return {**values, "positions": rows}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the analysis with settings that `settings` gave."""
        made = super().from_settings(settings)
        rows = None if made.positions is None else tuple(parse_position(str(item)) for item in made.positions)
        return replace(made, positions=rows)

    def check(self, record: Question | EditRecord) -> None:
        """Raise `TraceError` or `ModelError` for a record without a usable picture, constraint or corruption."""
        question = question_of_record(record)
        open_images(question.image)
        for words in question.words.values():
            find_span(question.text, words)
        self.corruption(question)

    def sources(self, record: Question | EditRecord) -> tuple[Any, ...]:
        """Return the corruption of the record; its pictures count by their content."""
        text = question_of_record(record).corrupt or self.corrupt
        if text is None:
            return ()
        pictures = tuple(Path(path) for path in corruption_pictures(parse_corruption(text)))
        return (text.partition(":")[0], *pictures) if pictures else (text,)

    def corruption(self, question: Question) -> Corruption:
        """Return the corruption of a question. Raises `TraceError` if there is none or the question does not fit it."""
        text = question.corrupt or self.corrupt
        if text is None:
            raise TraceError(f"no corruption is given; pass one, or write 'corrupt' into the record: {SPELLINGS}")
        corruption = parse_corruption(text)
        group = getattr(corruption, "group", "image")
        if group == "image" and not question.images:
            raise TraceError(
                f"the corruption {text!r} needs a picture, and the question has none; give it one, or corrupt its words"
            )
        if group.startswith("constraint") and not question.words:
            raise TraceError(
                f"the corruption {text!r} needs the words of the question to corrupt; give the question a constraint"
            )
        for path in corruption_pictures(corruption):
            open_images(path)
        has_seed = any(each.name == "seed" for each in fields(cast(Any, corruption)))
        return replace(cast(Any, corruption), seed=self.seed) if has_seed else corruption

    def arguments(self, question: Question, *, checkpoint: Path | None = None) -> dict[str, Any]:
        """Return the arguments of `causal_trace` for a question, whose `answer`, `foil` and `corrupt` come first.

        checkpoint: file that keeps the finished cells meanwhile.
        """
        return {
            "corruption": self.corruption(question),
            "sites": self.sites,
            "window": self.window,
            "positions": "tokens" if self.positions is None else self.positions,
            "answer": self.answer if question.answer is None else question.answer,
            "foil": question.foil,
            "whole_answer": self.whole_answer,
            "metrics": self.metrics,
            "direction": self.direction,
            "effect": self.effect,
            "severed": self.severed,
            "exact_cells": self.exact_cells,
            "even_if_weak": self.even_if_weak,
            "engine": Engine(name=self.engine, memory=self.memory, checks=self.checks, checkpoint=checkpoint),
        }

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the trace of a record, with its scores and its strongest cells in the row."""
        question = question_of_record(task.record)
        if "logit_difference" not in self.metrics:  # a data set names foils for whoever wants them
            question = replace(question, foil=None)
        prompt = vlm.prompt_for(question)
        trace = causal_trace(vlm, prompt, **self.arguments(question), progress=False)
        row = {
            "question": trace.question,
            "answer": trace.answer,
            "foil": trace.foil,
            "corruption": trace.corruption,
            "clean": trace.clean,
            "corrupted": float(trace.corrupted.mean()),
            "total_effect": trace.total_effect,
        }
        for kind in trace.kinds:
            peak = trace.best(kind)
            row |= {f"{kind}_effect": peak.effect, f"{kind}_row": peak.row, f"{kind}_layer": peak.layer}
        drawings: dict[str, Callable[[Path], Any]] = {}
        if self.draw:
            drawings["trace.png"] = trace.plot
            if trace.has_overlay:
                drawings["overlay.png"] = partial(trace.overlay, prompt)
        return Outcome(row=row, results={TRACE: trace}, files=drawings)

    def summary(self) -> Summary:
        """Return the average of all traces, which needs two of them and common rows."""
        return RunningAverage("trace", CausalTrace, stem="average", at_least=2)


def other_pictures(records: Sequence[Record]) -> dict[str, Corruption]:
    """Return, by the key of each question with a picture, the picture of another record that a trace puts in its place.

    It is that of the nearest earlier record with another picture and the same question, else of the nearest later
    one; a picture of another kind of thing would also corrupt the kind, which the words of the question reveal early.
    Where no other record has the same question, it is the picture of any other record, found in the same order. A
    record whose picture no other record differs from has none, nor has one whose picture cannot be read.
    """
    questions = [each.question if isinstance(each, EditRecord) else each for each in records]
    questions = [each for each in questions if _is_readable(each)]
    usable = [each if _has_pictures(each) else None for each in questions]
    pictures: dict[str, Corruption] = {}
    for index, own in enumerate(questions):
        others = [*reversed(usable[:index]), *usable[index + 1 :]]
        shown = [each for each in others if each is not None and own.images and each.image != own.image]
        if shown:
            chosen = next((each for each in shown if each.text == own.text), shown[0])
            pictures.setdefault(own.key, SwapImage(chosen.images[0]))
    return pictures


@dataclass(frozen=True, kw_only=True)
class PlaceTrace(Analysis):
    """The trace of the question of each edit under another picture, which shows where the edit is to be made."""

    name: ClassVar[str] = "place trace"

    corruptions: Mapping[str, Corruption] = field(default_factory=dict)
    """Key of a question -> what replaces its picture, as `other_pictures` returns it."""
    window: int = 3
    """Number of consecutive layers that are restored together at MLP and attention sites."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; the pictures belong to the records."""
        return {"window": self.window}

    def check(self, record: Record) -> None:
        """Raise `TraceError` for a question without a picture, or if no record has another one."""
        question = record.question if isinstance(record, EditRecord) else record
        if question.key not in self.corruptions:
            missing = "it has no picture" if not question.images else "no other record has another picture"
            raise TraceError(f"{question.text!r} cannot be traced: {missing}; name the place by --where LAYER:TOKEN")

    def sources(self, record: Record) -> Sequence[Any]:
        """Return the other picture, which counts by its content."""
        question = record.question if isinstance(record, EditRecord) else record
        corruption = self.corruptions.get(question.key)
        image = getattr(corruption, "image", None)
        return (Path(image) if isinstance(image, str) else image,)

    def located(self, vlm: VisionLanguageModel, record: EditRecord) -> Located:
        """Return the trace of a record and the place that it shows. Raises `TraceError` if it shows none."""
        options = {"per_request": True, "positions": POSITIONS, "sites": KINDS, "window": self.window}
        return locate(vlm, [record], corruptions=[self.corruptions[record.question.key]], progress=False, **options)

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the trace of a record. Raises `TraceError` if it shows no place."""
        return self.outcome(self.located(vlm, cast(EditRecord, task.record)))

    @staticmethod
    def outcome(located: Located) -> Outcome:
        """Return the trace and the place of one record."""
        site, trace = located.edit_site, cast(CausalTrace, located.traces[0])
        return Outcome(row={"layer": site.layer, "token": str(site.token)}, results={TRACE: trace})

    def summary(self) -> Summary:
        """Return a summary with nothing besides the table."""
        return Summary()


def _is_readable(question: Question) -> bool:
    """Whether the files of all pictures of a question can be read."""
    try:
        return bool(question.key)
    except DataError:
        return False


def _has_pictures(question: Question) -> bool:
    """Whether a question has pictures, and none that is seen by its header to be unusable."""
    paths = [image for image in question.images if isinstance(image, Path)]
    return bool(question.images) and all(inspect_picture(path).problem is None for path in paths)


def trace_summary(trace: CausalTrace) -> list[str]:
    """Return total effect, engine, the strongest causal blocks of each kind of site, and where to edit, as lines."""
    verb = "restored" if trace.direction == "restore" else "corrupted"
    rows = [(verb, "token", "layers", "indirect effect"), *_blocks(trace)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    against = f" against {trace.foil!r}" if trace.foil is not None else ""
    return [
        f"question      {trace.question}",
        f"scored        {trace.answer!r}{against}",
        f"corruption    {trace.corruption}",
        f"total effect  {trace.total_effect:.3f} ({trace.metrics[0].replace('_', ' ')} {trace.clean:.3f} clean, "
        f"{float(trace.corrupted.mean()):.3f} corrupted)",
        f"traced        {trace.variant}",
        f"engine        {trace.engine.summary()}",
        *_estimates(trace),
        "",
        *table,
        "",
        _site(trace),
    ]


def _site(trace: CausalTrace) -> str:
    """The place of an edit as `--where` takes it, or why the trace shows none."""
    try:
        site = trace.edit_site()
    except TraceError as error:
        return f"edit site     none: {error}"
    token = site.token if isinstance(site.token, str) else f"(token {site.token}, which has no name)"
    return f"edit site     {site.layer}:{token}; {site.reason}"


def _estimates(trace: CausalTrace) -> list[str]:
    """How many cells are estimated, and how well the estimates rank cells whose exact values are known."""
    count = sum(int(flags.sum()) for flags in trace.estimated.values())
    if not count:
        return []
    ranks = ", ".join(f"{kind} {value:.2f}" for kind, value in trace.agreement.items())
    return [f"estimated     {count} cells; rank agreement with exact ones: {ranks or 'unknown'}"]


def _blocks(trace: CausalTrace) -> list[tuple[str, str, str, str]]:
    rows = []
    for kind in trace.kinds:
        blocks = trace.causal_blocks(kind)[:_BLOCKS]
        rows += [
            (kind, repr(block.row), _layers(block.layers[0], block.layers[-1]), _effect(block.effect, block.spread))
            for block in blocks
        ] or [(kind, "none", "-", "nothing brings the answer back")]
    return rows


def _effect(effect: float, spread: float | None) -> str:
    return f"{effect:.3f}" if spread is None else f"{effect:.3f} (spread over samples {spread:.3f})"


def _layers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _spelled(item: Item) -> str | int:
    """The row as `parse_position` reads it."""
    if isinstance(item, Blocks):
        return f"blocks:{item.size}"
    return f"box:{item.left},{item.top},{item.right},{item.bottom}" if isinstance(item, Box) else item
