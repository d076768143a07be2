"""Tracing and editing chained: trace the facts, let the traces choose layers and tokens, edit there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..editing.changes import NO_OWNER
from ..editing.closed_form import ClosedFormEditor
from ..editing.delta import Delta, compose
from ..editing.editors import MultEdit
from ..editing.errors import EditError
from ..editing.moments import Moments
from ..editing.requests import EditRequest
from ..models import VisionLanguageModel
from ..models.errors import gist
from ..tracing import AverageTrace, CausalTrace, Corruption, EditSite, TraceError, causal_trace
from ..tracing.engine.cells import KINDS
from ..tracing.engine.rows import Item
from .locate import GROUPS, Located, groups_of, locate

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
    each: bool = False,
    groups: Sequence[Item] = GROUPS,
    kinds: Sequence[str] = KINDS,
    window: int = 3,
    fraction: float = 0.25,
    after: bool = False,
    progress: bool = False,
) -> LocatedEdit:
    """Traces, sites and deltas for these facts; the model is left as it was.

    Where to edit is found as in `locate`. editor: settings whose layer and token are set by the trace, or what makes
    them from `layer` and `token`, such as a class of editors; work is spread over no layer below the onset. moments as
    the editor needs them. jointly: one delta for all requests; requests with the same site share a solve, sites follow
    each other from the lowest layer up, each solved with the earlier ones in the model. Else one delta each, every one
    for the model as it is. after: trace once more with the edit in place, under the same corruptions.

    A request that cannot be edited is named in the notes, and in a joint delta by its status, while the others go on.
    Errors as `locate`; EditError as the editor's `edit` if no request can be edited at all.
    """
    requests = tuple(requests)
    if after and corruptions is None:
        raise TraceError("a second trace needs corruptions to trace under; pass corruptions=, or after=False")
    tracing = {"groups": groups, "kinds": kinds, "window": window, "progress": progress}
    found = locate(vlm, requests, corruptions=corruptions, traces=traces, each=each, fraction=fraction, **tracing)
    work = _Edits(vlm, requests, found.sites, editor, moments, progress=progress)
    deltas = (work.jointly(),) if jointly else work.one_by_one()
    shifts: tuple[TraceShift | None, ...] = ()
    if after:
        first = found if traces is None else locate(vlm, requests, corruptions=corruptions, **tracing)
        shifts = _shifts(vlm, requests, corruptions, first.traces, deltas, **tracing)
    parts = {"sites": found.sites, "traces": found.traces, "trace": found.trace}
    return LocatedEdit(deltas=deltas, shifts=shifts, notes=(*found.notes, *work.notes), **parts)


class _Edits:
    """Requests with their sites, edited."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        sites: Sequence[EditSite],
        editor: EditorAt,
        moments: Moments | None,
        *,
        progress: bool,
    ) -> None:
        self.vlm, self.requests, self.moments, self.progress = vlm, requests, moments, progress
        self.notes: list[str] = []
        self.editors = [self._at(site, editor) for site in sites]
        self.metrics: dict[ClosedFormEditor, Any] = {}

    def one_by_one(self) -> tuple[Delta | None, ...]:
        """A delta per request, each for the model as it is."""
        found: list[Delta | None] = []
        errors: list[EditError] = []
        for index in tqdm(range(len(self.requests)), desc="editing facts", disable=not self.progress):
            try:
                found.append(self._edit([index], (), progress=False))
            except EditError as error:
                found.append(None)
                errors.append(error)
                self.notes.append(f"{self.requests[index].label!r} could not be edited: {gist(error)}")
        if len(errors) == len(self.requests):
            raise errors[0]
        return tuple(found)

    def jointly(self) -> Delta:
        """One delta for all, whose requests are in the order given."""
        groups: dict[ClosedFormEditor, list[int]] = {}
        for index, editor in enumerate(self.editors):
            groups.setdefault(editor, []).append(index)
        deltas: list[Delta] = []
        order: list[int] = []
        failed: dict[int, str] = {}
        errors: list[EditError] = []
        with ExitStack() as stack:
            for _, members in sorted(groups.items(), key=lambda pair: pair[0].place[0]):
                try:
                    deltas.append(self._edit(members, deltas, progress=self.progress))
                except EditError as error:
                    errors.append(error)
                    failed |= dict.fromkeys(members, f"failed: {gist(error)}")
                    continue
                order += members
                stack.enter_context(deltas[-1].applied(self.vlm))
        if not deltas:
            raise errors[0]
        for index, reason in failed.items():
            self.notes.append(f"{self.requests[index].label!r} {reason}")
        return _in_order(compose(*deltas), order, self.requests, failed)

    def _edit(self, members: Sequence[int], earlier: Sequence[Delta], *, progress: bool) -> Delta:
        editor = self.editors[members[0]]
        words: dict[str, Any] = {"moments": self.moments, "earlier": earlier, "progress": progress}
        if self.moments is not None and editor.has_fixed_cost:
            if editor not in self.metrics:
                self.metrics[editor] = editor.metrics(self.vlm, self.moments)
            words["metrics"] = self.metrics[editor]
        return editor.edit(self.vlm, [self.requests[index] for index in members], **words)

    def _at(self, site: EditSite, editor: EditorAt) -> ClosedFormEditor:
        """The editor at a site, its work spread over no layer below the onset."""
        place = {"layer": site.layer, "token": site.token}
        made = replace(editor, where=None, **place) if isinstance(editor, ClosedFormEditor) else editor(**place)
        room = site.layer - site.onset + 1
        if made.spread <= room:
            return made
        note = (
            f"the edit at layer {site.layer} is spread over {room} layers and not {made.spread}: the picture arrives "
        )
        note += f"at {site.token!r} in layer {site.onset}"
        if note not in self.notes:
            self.notes.append(note)
            logger.info("%s", note)
        return replace(made, spread=room)


def _in_order(delta: Delta, order: Sequence[int], requests: Sequence[EditRequest], failed: Mapping[int, str]) -> Delta:
    """The delta whose request i is the one that was request order[i]'s; those that failed have a report and no keys."""
    reports = {index: {**requests[index].summary(), "status": status} for index, status in failed.items()}
    reports |= dict(zip(order, delta.requests, strict=True))
    places = torch.tensor([*order, NO_OWNER])  # the last entry is for rows without an owner
    changes = {name: replace(change, owners=places[change.owners]) for name, change in delta.changes.items()}
    return replace(delta, changes=changes, requests=tuple(reports[index] for index in range(len(requests))))


def _shifts(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    corruptions: Sequence[Corruption | None],
    before: Sequence[CausalTrace | None],
    deltas: Sequence[Delta | None],
    *,
    groups: Sequence[Item],
    kinds: Sequence[str],
    window: int,
    progress: bool,
) -> tuple[TraceShift | None, ...]:
    """What each edit moved; the picture may matter no more, so that a weak corruption is traced all the same."""
    owners = deltas * len(requests) if len(deltas) == 1 else deltas
    settings = {"sites": kinds, "window": window, "even_if_weak": True, "progress": False}
    found: list[TraceShift | None] = []
    for index in tqdm(range(len(requests)), desc="tracing again", disable=not progress):
        if before[index] is None or owners[index] is None:
            found.append(None)
            continue
        words = {"corruption": corruptions[index], "positions": groups_of(requests[index], groups), **settings}
        with owners[index].applied(vlm):
            traced = causal_trace(vlm, requests[index].prompt, **words)
        found.append(TraceShift(before=before[index], after=traced))
    return tuple(found)
