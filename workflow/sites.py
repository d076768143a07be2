"""Choose the layer and the token at which each fact should be edited, from causal traces."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from tqdm import tqdm

from ..data import DataError
from ..data.errors import gist
from ..data.facts import EditRecord, EditRequest, Question
from ..models import Prompt, VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace, Corruption, EditSite, SwapImage, TraceError, average, causal_trace
from ..tracing.engine.cells import KINDS
from ..tracing.engine.positions import Item
from .analysis import Analysis, Outcome, Record, Summary, Task

logger = logging.getLogger("multrace")
POSITIONS = ("image", "question", "constraint_last", "last")
"""The token groups that are traced by default."""
TRACE = "trace"
"""The name of the trace among the results of a record."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """The places at which facts should be edited, according to traces. Made by `locate`."""

    edit_sites: tuple[EditSite, ...]
    """The layer and token of each request."""
    traces: tuple[CausalTrace | None, ...] = field(repr=False)
    """Each request's own trace; None where its corruption was too weak, or where only an average was given."""
    average: AverageTrace | None = field(repr=False)
    """Mean indirect effects over the requests (those with the same rows, if these differ); None where single tokens
    cannot be lined up."""
    notes: tuple[str, ...] = ()
    """What was not as expected, and what was done about it."""

    @property
    def edit_site(self) -> EditSite:
        """The site of the first request, which is the site of all requests if one was chosen for all."""
        return self.edit_sites[0]


def locate(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    *,
    corruptions: Sequence[Corruption | None] | None = None,
    traces: Sequence[CausalTrace | TraceError] | AverageTrace | None = None,
    per_request: bool = False,
    positions: Sequence[Item] = POSITIONS,
    sites: Sequence[str] = KINDS,
    window: int = 3,
    fraction: float = 0.25,
    progress: bool = True,
) -> Located:
    """Return the layer and token at which each fact should be edited; the model is left unchanged.

    Each request's prompt is traced for the answer that the model gives now, under the request's own corruption. Sites
    follow the rule of `CausalTrace.edit_site`: the strongest MLP at or after the layer where the picture arrives at the
    token. A request whose trace shows no site gets the site of the average, and a note says so. A request whose prompts
    do not all have a constraint span is edited at the token that the trace names, and a note says so, too.

    Args:
        vlm: The model to be edited.
        requests: The facts to locate.
        corruptions: One corruption per request; None for a request that cannot be corrupted. Use a picture of something
            else (`SwapImage`), since only a corruption of the picture shows where the picture arrives.
        traces: Traces made before, in place of corruptions: one per request (or the error of a request that could not
            be traced), or one average for all.
        per_request: Choose a site for each request from its own trace. By default all requests get the site of the
            mean trace.
        positions: Token groups or positions to trace.
        sites: Kinds of sites to trace; "hidden" and "mlp" are needed.
        window: Number of consecutive layers that are restored together at MLP and attention sites.
        fraction: The picture has arrived at a token where restoring its hidden state recovers at least this share of
            the total effect.
        progress: Show a progress bar.

    Returns:
        The edit sites in the order of the requests, with the traces that they were chosen from.

    Raises:
        TraceError: The numbers of requests and of corruptions (or traces) differ, a trace belongs to another model or
            question, or no trace shows a site.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> case, other = world.edit_cases("outdated", "choose")[:2]
        >>> pictures = [world.picture(world.entities[each.fact.entity], 0).image for each in (case, other)]
        >>> question = world.question(case.fact)
        >>> prompt = vlm.prompt(pictures[0], question.text, constraint=question.constraint)
        >>> request = mt.EditRequest(question=prompt, target=case.target)
        >>> located = mt.locate(vlm, [request], corruptions=[mt.SwapImage(pictures[1])], progress=False)
        >>> located.edit_site.layer, located.edit_site.token
        (6, 'last')
    """
    requests = tuple(requests)
    _check_numbers(requests, corruptions, traces)
    if isinstance(traces, AverageTrace):
        _check_model(vlm, traces)
        site = traces.edit_site(fraction)
        for request in requests:
            if isinstance(site.token, str) and not _has(vlm, request.question, site.token):
                raise TraceError(
                    f"this average trace names the token {site.token!r}, which {request.question.text!r} lacks; "
                    "give it a constraint, or trace it by itself"
                )
        return Located(edit_sites=(site,) * len(requests), traces=(None,) * len(requests), average=traces)
    rows = [positions_of(vlm, request, positions) for request in requests]
    failures: dict[int, TraceError] = {}
    if traces is None:
        settings = {"sites": sites, "window": window}
        own = _traced(vlm, requests, corruptions or (), rows, failures, settings, progress)
    else:
        failures = {index: trace for index, trace in enumerate(traces) if isinstance(trace, TraceError)}
        own = [None if isinstance(trace, TraceError) else trace for trace in traces]
        for request, trace in zip(requests, own, strict=True):
            if trace is not None:
                _check_model(vlm, trace)
                _check_question(vlm.prompt_for(request.question), trace)
    choice = _Choice(vlm, requests, own, rows, failures, fraction)
    chosen = tuple(choice.site(index, per_request=per_request) for index in range(len(requests)))
    for index, request in enumerate(requests):
        if _lacks_constraint(vlm, request, positions):
            choice.note(request, f"has no constraint span in all its prompts; edited at {chosen[index].token!r}")
    return Located(edit_sites=chosen, traces=tuple(own), average=choice.largest, notes=tuple(choice.notes))


class _Choice:
    """Sites of requests from their traces."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        traces: Sequence[CausalTrace | None],
        rows: Sequence[tuple[Item, ...]],
        failures: Mapping[int, TraceError],
        fraction: float,
    ) -> None:
        self.vlm, self.requests, self.traces, self.fraction = vlm, requests, traces, fraction
        self.failures, self.notes = dict(failures), []
        self.keys = [_alike(trace) if trace else rows[index] for index, trace in enumerate(traces)]
        self.averages: dict[Any, AverageTrace] = {}
        members: dict[Any, list[CausalTrace]] = {}
        for key, trace in zip(self.keys, traces, strict=True):
            if trace is not None:
                members.setdefault(key, []).append(trace)
        for key, group in sorted(members.items(), key=lambda pair: -len(pair[1])):
            try:
                self.averages[key] = average(group)
            except TraceError as error:  # single tokens that cannot be lined up; a site of one's own needs no average
                self.notes.append(f"no average of {len(group)} traces: {gist(error)}")
        if not members:
            raise next(iter(self.failures.values()))

    @property
    def largest(self) -> AverageTrace | None:
        """The average over most requests."""
        return next(iter(self.averages.values()), None)

    def site(self, index: int, *, per_request: bool) -> EditSite:
        """The site of one request; TraceError if neither its own trace nor an average shows any."""
        trace = self.traces[index]
        if trace is not None and (per_request or self.keys[index] not in self.averages):
            try:
                return trace.edit_site(self.fraction)
            except TraceError as error:
                self.failures[index] = error
        own = [self.averages[key] for key in (self.keys[index],) if key in self.averages]
        site = self._first([*own, *self.averages.values()], self.requests[index].question, index)
        if index in self.failures:
            reason = f"its own trace shows no site ({gist(self.failures[index])})"
            self.note(self.requests[index], f"takes the site of the average, layer {site.layer}: {reason}")
        return site

    def note(self, request: EditRequest, text: str) -> None:
        self.notes.append(f"{request.label!r} {text}")
        logger.info("%s", self.notes[-1])

    def _first(self, averages: Sequence[AverageTrace], question: Question, index: int) -> EditSite:
        reason = self.failures.get(index)
        for trace in averages:
            try:
                site = trace.edit_site(self.fraction)
            except TraceError as error:
                reason = reason or error
                continue
            if isinstance(site.token, int) or _has(self.vlm, question, site.token):
                return site
        raise reason or TraceError(
            f"no average trace names a token that {question.text!r} has; give it a constraint, or trace other groups"
        )


def _traced(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    corruptions: Sequence[Corruption | None],
    rows: Sequence[tuple[Item, ...]],
    failures: dict[int, TraceError],
    settings: Mapping[str, Any],
    progress: bool,
) -> list[CausalTrace | None]:
    """A trace per request; None, and its error among the failures, where there is nothing to trace."""
    traces: list[CausalTrace | None] = []
    alone = len(requests) == 1
    for index in tqdm(range(len(requests)), desc="tracing facts", disable=alone or not progress):
        corruption = corruptions[index]
        if corruption is None:
            traces.append(None)
            failures[index] = TraceError("no corruption is given for it")
            continue
        keywords = {"corruption": corruption, "positions": rows[index], "progress": progress and alone}
        try:
            traces.append(causal_trace(vlm, vlm.prompt_for(requests[index].question), **keywords, **settings))
        except TraceError as error:
            traces.append(None)
            failures[index] = error
    return traces


def positions_of(vlm: VisionLanguageModel, request: EditRequest, positions: Sequence[Item]) -> tuple[Item, ...]:
    """The positions at which this request can be traced and edited, without groups that one of its prompts lacks.

    Only a missing constraint or picture is left out; any other name that does not exist is an error of the trace.
    """
    absent = set() if request.question.images else {"image"}
    absent |= {
        name
        for name in positions
        if isinstance(name, str) and _is_constraint(name) and not _all_have(vlm, request, name)
    }
    return tuple(name for name in positions if name not in absent)


def _lacks_constraint(vlm: VisionLanguageModel, request: EditRequest, positions: Sequence[Item]) -> bool:
    return any(
        isinstance(name, str) and _is_constraint(name) and not _all_have(vlm, request, name) for name in positions
    )


def _is_constraint(name: str) -> bool:
    return name.startswith("constraint")


def _all_have(vlm: VisionLanguageModel, request: EditRequest, name: str) -> bool:
    questions = (request.question, *request.contexts, *request.rewrite_prompts, *request.preserve_prompts)
    return all(_has(vlm, question, name) for question in questions)


def _has(vlm: VisionLanguageModel, question: Question, name: str) -> bool:
    """Whether the question's prompt has the token group of this name."""
    return name in vlm.prompt_for(question).groups


def _alike(trace: CausalTrace) -> Any:
    """Traces for which this is equal can be averaged."""
    return trace.rows if trace.grouped else None


def _check_numbers(
    requests: Sequence[EditRequest], corruptions: Sequence[Any] | None, traces: Sequence[Any] | AverageTrace | None
) -> None:
    if corruptions is None and traces is None:
        raise TraceError("nothing tells where to edit; pass corruptions= to trace under, or traces= made before")
    for name, given in (("corruptions", corruptions), ("traces", traces)):
        if given is None or isinstance(given, AverageTrace):
            continue
        if not requests or len(requests) != len(given):
            raise TraceError(
                f"{len(requests)} requests with {len(given)} {name}; "
                f"pass at least one request, and one of the {name} for each"
            )


def _check_model(vlm: VisionLanguageModel, trace: CausalTrace | AverageTrace) -> None:
    if trace.model != vlm.name or trace.layers != vlm.layers:
        raise TraceError(
            f"this trace is of '{trace.model}' ({trace.layers} layers), and the edit is of '{vlm.name}' "
            f"({vlm.layers} layers); trace the model that is to be edited"
        )


def _check_question(prompt: Prompt, trace: CausalTrace) -> None:
    end = prompt.groups["last"][0] + 1
    ids = tuple(prompt.inputs["input_ids"][0, :end].tolist())
    if trace.input_ids[:end] != ids:
        how = " with other tokens" if trace.question == prompt.question else ""
        raise TraceError(
            f"this trace is of the question {trace.question!r}{how}, and the edit is of {prompt.question!r}; "
            "trace the prompt that is to be edited"
        )


def other_pictures(records: Sequence[Record]) -> dict[str, Corruption]:
    """Return, by the key of each question with a picture, the picture of another record that a trace puts in its place.

    It is that of the nearest earlier record with another picture and the same question, else of the nearest later
    one; a picture of another kind of thing would also corrupt the kind, which the words of the question reveal early.
    Where no other record has the same question, it is the picture of any other record, found in the same order. A
    record whose picture no other record differs from has none, nor has one whose picture cannot be read.
    """
    questions = [each.question if isinstance(each, EditRecord) else each for each in records]
    questions = [each for each in questions if _is_readable(each)]
    pictures: dict[str, Corruption] = {}
    for index, own in enumerate(questions):
        others = [*reversed(questions[:index]), *questions[index + 1 :]]
        shown = [each for each in others if own.images and each.images and each.image != own.image]
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
