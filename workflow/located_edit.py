"""Trace facts, let the traces choose layers and tokens, and edit the facts there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.errors import gist
from ..data.facts import EditRequest
from ..editing.changes import NO_OWNER, Delta, compose
from ..editing.moments import Moments
from ..editing.requests import EditError, request_text
from ..editing.solve import ClosedFormEditor, ClosedFormSession, MultEdit
from ..editing.values import RequestValues
from ..models import VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace, Corruption, EditSite, TraceError, causal_trace
from ..tracing.engine.cells import KINDS
from ..tracing.engine.positions import Item
from .sites import POSITIONS, Located, locate, positions_of

logger = logging.getLogger("multrace")
EditorAt = ClosedFormEditor | Callable[..., ClosedFormEditor]
"""Settings whose layer and token are replaced, or what makes settings from `layer` and `token`."""


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
    moments: Moments | None = None,
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
        moments: Second moments of keys, for editors that need them.
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
    choice = {"per_request": per_request, "fraction": fraction}
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
        moments: Moments | None = None,
        values: Sequence[RequestValues] | None = None,
        progress: bool,
    ) -> None:
        self.requests, self.values, self.progress = requests, values, progress
        self.notes: list[str] = []
        self.editors = [self._at(site, editor) for site in sites]
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
    place = {"layer": site.layer, "token": site.token}
    made = replace(editor, where=None, **place) if isinstance(editor, ClosedFormEditor) else editor(**place)
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
