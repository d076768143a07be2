"""Trace facts, let the traces choose the layer and the token of each, and edit the facts there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.errors import gist
from ..data.facts import EditRequest, Question
from ..editing.changes import NO_OWNER, Delta, compose
from ..editing.moments import Moments, MomentSource, OwnMoments, pictures_of_requests
from ..editing.requests import EditError, request_text
from ..editing.solve import ClosedFormEditor, ClosedFormSession, MultEdit
from ..editing.values import RequestValues
from ..models import Prompt, VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace, Corruption, EditSite, TraceError, average, causal_trace
from ..tracing.engine.cells import KINDS
from ..tracing.engine.positions import Item
from .site_choice import EditorAt, SiteChooser, placed

logger = logging.getLogger("multrace")
POSITIONS = ("image", "question", "constraint_last", "last")
"""The token groups that are traced by default."""


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
    editor: EditorAt | None = MultEdit,
    moments: Moments | None = None,
    per_request: bool = False,
    positions: Sequence[Item] = POSITIONS,
    sites: Sequence[str] = KINDS,
    window: int = 3,
    fraction: float = 0.25,
    progress: bool = True,
) -> Located:
    """Return the layer and token at which each fact should be edited; the model is left unchanged.

    Each request's prompt is traced for the answer that the model gives now, under the request's own corruption. Sites
    are chosen by cause and by geometry (`choose_site`): of the MLPs that act most, at or after the layer where the
    picture arrives at the token, the one where a change is predicted to reach the fact and to leak little. A request
    whose trace shows no site gets the site of the average, and a note says so. A request whose prompts do not all have
    a constraint span is edited at the token that the trace names, and a note says so, too.

    Args:
        vlm: The model to be edited.
        requests: The facts to locate.
        corruptions: One corruption per request; None for a request that cannot be corrupted. Use a picture of something
            else (`SwapImage`), since only a corruption of the picture shows where the picture arrives.
        traces: Traces made before, in place of corruptions: one per request (or the error of a request that could not
            be traced), or one average for all.
        editor: Settings of the edits whose reach and leak are predicted, as `locate_then_edit` takes them; None chooses
            by the effects alone (`CausalTrace.edit_site`).
        moments: Second moments of keys, for a prediction with an editor that weighs old keys by them.
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
        choose = SiteChooser(vlm, requests, editor, moments, fraction, progress)
        site = choose.site(traces, range(len(requests)))
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
    choose = SiteChooser(vlm, requests, editor, moments, fraction, progress)
    choice = _Choice(vlm, requests, own, rows, failures, choose)
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
        choose: SiteChooser,
    ) -> None:
        self.vlm, self.requests, self.traces, self.choose = vlm, requests, traces, choose
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
                return self.choose.site(trace, [index])
            except TraceError as error:
                self.failures[index] = error
        own = [self.averages[key] for key in (self.keys[index],) if key in self.averages]
        site = self._first([*own, *self.averages.values()], self.requests[index].question, index)
        if index in self.failures:
            reason = f"its own trace shows no site ({gist(self.failures[index])})"
            self.note(self.requests[index], f"takes the site of the average, layer {site.layer}: {reason}")
        return site

    def _members(self, average_trace: AverageTrace) -> list[int]:
        """The requests whose traces were averaged."""
        keys = [key for key, own in self.averages.items() if own is average_trace]
        return [index for index, key in enumerate(self.keys) if key in keys]

    def note(self, request: EditRequest, text: str) -> None:
        self.notes.append(f"{request.label!r} {text}")
        logger.info("%s", self.notes[-1])

    def _first(self, averages: Sequence[AverageTrace], question: Question, index: int) -> EditSite:
        reason = self.failures.get(index)
        for trace in averages:
            try:
                site = self.choose.site(trace, self._members(trace))
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


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceShift:
    """One prompt traced before the edit and with it, each time for the answer that the model then gives."""

    before: CausalTrace
    after: CausalTrace

    def effect(self, kind: str) -> Tensor:
        """(row, layer) float64, indirect effects with the edit minus those before it, in units of the main metric."""
        return self.after.indirect_effect(kind) - self.before.indirect_effect(kind)

    def lines(self) -> Iterator[str]:
        """The total effects and, per kind of site, the cell that moved most."""
        before, after = self.before, self.after
        yield (
            f"{before.answer!r} before, {after.answer!r} with the edit; "
            f"total effect {before.total_effect:.3f}, then {after.total_effect:.3f}"
        )
        for kind in before.kinds:
            moved = self.effect(kind).nan_to_num()
            row, layer = divmod(int(moved.abs().argmax()), moved.shape[1])
            yield f"{kind}: {before.rows[row]!r} at layer {layer} moved most, by {float(moved[row, layer]):+.3f}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LocatedEdit(Located):
    """What `locate_then_edit` found and made."""

    deltas: tuple[Delta | None, ...] = field(repr=False)
    """One delta for all requests together, or one for each, then None for requests that could not be edited."""
    shifts: tuple[TraceShift | None, ...] = ()
    """What the edit moved in the trace of each request, where asked for; None for requests without a trace."""


def locate_then_edit(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    *,
    corruptions: Sequence[Corruption | None] | None = None,
    traces: Sequence[CausalTrace] | AverageTrace | None = None,
    editor: EditorAt = MultEdit,
    moments: MomentSource = None,
    jointly: bool = True,
    per_request: bool = False,
    positions: Sequence[Item] = POSITIONS,
    sites: Sequence[str] = KINDS,
    window: int = 3,
    fraction: float = 0.25,
    trace_after: bool = False,
    progress: bool = True,
) -> LocatedEdit:
    """Trace the facts, edit them where their traces say, and return traces, sites and deltas.

    The model is left unchanged: put the edit into it with `Delta.applied`. A request that cannot be edited is named in
    the notes, and by its status in a joint delta, while the others go on.

    Args:
        vlm: The model to be edited.
        requests: The facts to write.
        corruptions: As in `locate`.
        traces: As in `locate`.
        editor: Settings whose layer and token the trace replaces, or a class or function that makes settings from
            `layer` and `token`. The change is spread over no layer below the one where the picture arrives.
        moments: Second moments of keys, for editors that need them; as in `MultEdit.start`. Only moments that are given
            take part in the choice of the site, since own ones are made of the layers that are edited alone.
        jointly: Make one delta of all requests. All values are searched for on the unedited model, as MEMIT (arXiv
            2210.07229) does for a batch; requests with the same site are then solved together, and the sites follow
            each other from the lowest layer up, each solved with the earlier ones in the model. Otherwise each request
            gets a delta of its own for the unedited model.
        per_request: As in `locate`.
        positions: As in `locate`.
        sites: As in `locate`.
        window: As in `locate`.
        fraction: As in `locate`.
        trace_after: Trace each prompt once more with the edit in place, under the same corruptions.
        progress: Show progress bars.

    Returns:
        The sites and traces as `locate` gives them, with the deltas and, if asked for, how the traces moved.

    Raises:
        TraceError: As in `locate`, or `trace_after` without corruptions.
        EditError: No request can be edited at all.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import World, tiny_vlm_path
        >>> vlm, world = mt.load(tiny_vlm_path()), World()
        >>> case, other = world.edit_cases("outdated", "choose")[:2]
        >>> pictures = [world.picture(world.entities[each.fact.entity], 0).image for each in (case, other)]
        >>> question = world.question(case.fact)
        >>> prompt = vlm.prompt(pictures[0], question.text, constraint=question.constraint)
        >>> request = mt.EditRequest(question=prompt, target=case.target)
        >>> edit = mt.locate_then_edit(vlm, [request], corruptions=[mt.SwapImage(pictures[1])], progress=False)
        >>> with edit.deltas[0].applied(vlm):
        ...     vlm.answers([prompt]) == [case.target]
        True
    """
    requests = tuple(requests)
    if trace_after and corruptions is None:
        raise TraceError("a second trace needs corruptions to trace under; pass corruptions=, or trace_after=False")
    tracing = {"positions": positions, "sites": sites, "window": window, "progress": progress}
    given = moments if isinstance(moments, Moments) else None
    choice = {"per_request": per_request, "fraction": fraction, "editor": editor, "moments": given}
    located = locate(vlm, requests, corruptions=corruptions, traces=traces, **choice, **tracing)
    work = EditsAtSites(vlm, requests, located.edit_sites, editor=editor, moments=moments, progress=progress)
    deltas = (work.jointly(),) if jointly else work.one_by_one()
    shifts: tuple[TraceShift | None, ...] = ()
    if trace_after and corruptions is not None:
        first = located if traces is None else locate(vlm, requests, corruptions=corruptions, **tracing)
        shifts = trace_shifts(vlm, requests, corruptions, first.traces, deltas, **tracing)
    parts = {"edit_sites": located.edit_sites, "traces": located.traces, "average": located.average}
    return LocatedEdit(deltas=deltas, shifts=shifts, notes=(*located.notes, *work.notes), **parts)


class EditsAtSites:
    """Edits of requests, each at its own site.

    values: what a value search found for each request on the unedited model; None to search here.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        sites: Sequence[EditSite],
        *,
        editor: EditorAt,
        moments: MomentSource = None,
        values: Sequence[RequestValues] | None = None,
        progress: bool,
    ) -> None:
        self.requests, self.values, self.progress = requests, values, progress
        self.notes: list[str] = []
        self.editors = [self._at(site, editor) for site in sites]
        if moments is None:  # of the pictures of all requests, whichever is edited first
            moments = OwnMoments(vlm, pictures=pictures_of_requests(requests), progress=progress)
        self.session = ClosedFormSession(vlm, self._editor_of, moments=moments)

    def one_by_one(self) -> tuple[Delta | None, ...]:
        """Return a delta per request, each for the model as it is."""
        found: list[Delta | None] = []
        errors: list[EditError] = []
        for index in tqdm(range(len(self.requests)), desc="editing facts", disable=not self.progress):
            try:
                found.append(self.session.propose([self.requests[index]]))
            except EditError as error:
                found.append(None)
                errors.append(error)
                self.notes.append(f"{self.requests[index].label!r} could not be edited: {gist(error)}")
        if len(errors) == len(self.requests):
            raise errors[0]
        return tuple(found)

    def jointly(self) -> Delta:
        """Return one delta for all, whose requests are in the order given.

        The values are those of the unedited model, so that those of a request do not depend on the other sites. Each
        site's change is measured from what the model gives with the earlier sites' changes in place.
        """
        deltas: list[Delta] = []
        order: list[int] = []
        failed: dict[int, str] = {}
        errors: list[EditError] = []
        groups = self._groups()
        values = [self._values_of(members) for members in groups]
        with self.session as session:
            for members, found in zip(groups, values, strict=True):
                own = [self.requests[index] for index in members]
                try:
                    if isinstance(found, EditError):
                        raise found
                    deltas.append(session.edit(own, values=found, progress=self.progress))
                except EditError as error:
                    errors.append(error)
                    failed |= dict.fromkeys(members, f"failed: {gist(error)}")
                    continue
                order += members
        if not deltas:
            raise errors[0]
        for index, reason in failed.items():
            self.notes.append(f"{self.requests[index].label!r} {reason}")
        return _in_order(compose(*deltas), order, self.requests, failed)

    def _groups(self) -> list[list[int]]:
        """The indices of the requests that are solved together, from the lowest layer up."""
        groups: dict[ClosedFormEditor, list[int]] = {}
        for index, editor in enumerate(self.editors):
            groups.setdefault(editor, []).append(index)
        return [members for _, members in sorted(groups.items(), key=lambda pair: pair[0].place[0])]

    def _values_of(self, members: Sequence[int]) -> Sequence[RequestValues] | EditError:
        """The values of requests that are solved together, or why they cannot be searched for."""
        if self.values is not None:
            return [self.values[index] for index in members]
        try:
            return self.session.search([self.requests[index] for index in members], check=True, progress=self.progress)
        except EditError as error:
            return error

    def _editor_of(self, requests: Sequence[EditRequest]) -> ClosedFormEditor:
        return next(editor for editor, own in zip(self.editors, self.requests, strict=True) if own is requests[0])

    def _at(self, site: EditSite, editor: EditorAt) -> ClosedFormEditor:
        made, note = editor_at(editor, site)
        if note and note not in self.notes:
            self.notes.append(note)
            logger.info("%s", note)
        return made


def editor_at(editor: EditorAt, site: EditSite) -> tuple[ClosedFormEditor, str]:
    """Return the editor at a site, its work spread over no layer below the onset, and a note if that shortens it."""
    made = placed(editor, layer=site.layer, token=site.token)
    room = site.layer - site.onset + 1
    if made.spread <= room:
        return made, ""
    note = f"the edit at layer {site.layer} is spread over {room} layers and not {made.spread}: the picture arrives "
    return replace(made, spread=room), f"{note}at {site.token!r} in layer {site.onset}"


def _in_order(delta: Delta, order: Sequence[int], requests: Sequence[EditRequest], failed: Mapping[int, str]) -> Delta:
    """The delta whose request i is the one that was request order[i]'s; those that failed have a report and no keys."""
    reports = {index: {**request_text(requests[index]), "status": status} for index, status in failed.items()}
    reports |= dict(zip(order, delta.requests, strict=True))
    places = torch.tensor([*order, NO_OWNER])  # the last entry is for rows without an owner
    changes = {name: replace(change, owners=places[change.owners]) for name, change in delta.changes.items()}
    return replace(delta, changes=changes, requests=tuple(reports[index] for index in range(len(requests))))


def trace_shifts(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    corruptions: Sequence[Corruption | None],
    before: Sequence[CausalTrace | None],
    deltas: Sequence[Delta | None],
    *,
    positions: Sequence[Item],
    sites: Sequence[str],
    window: int,
    progress: bool,
) -> tuple[TraceShift | None, ...]:
    """What each edit moved; the picture may matter no more, so that a weak corruption is traced all the same."""
    owners = [deltas[0]] * len(requests) if len(deltas) == 1 else deltas
    settings = {"sites": sites, "window": window, "even_if_weak": True, "progress": False}
    found: list[TraceShift | None] = []
    for index in tqdm(range(len(requests)), desc="tracing again", disable=not progress):
        corruption, earlier, delta = corruptions[index], before[index], owners[index]
        if corruption is None or earlier is None or delta is None:
            found.append(None)
            continue
        place = {"corruption": corruption, "positions": positions_of(vlm, requests[index], positions)}
        with delta.applied(vlm):
            traced = causal_trace(vlm, vlm.prompt_for(requests[index].question), **place, **settings)
        found.append(TraceShift(before=earlier, after=traced))
    return tuple(found)
