"""A session of closed-form edits: keys, wanted values and one solve per layer for each edit, and what edits share."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from ...data.facts import EditRequest
from ...models import ModelError, VisionLanguageModel
from ..changes import AppliedDelta, Delta, DeltaSession, History, HistoryEntry
from ..moments import MomentSource
from ..requests import (
    listed_requests,
    with_answers_seen,
)
from ..values import (
    Goals,
    PlainGoal,
    RequestValues,
    check_goals,
    goals_of,
)
from .settings import ClosedFormSettings
from .shared import Shared
from .under_way import EditUnderWay


class ClosedFormSession(DeltaSession):
    """A session of closed-form edits. It holds what edits share, so that each costs the same.

    That is what `Shared` has, the hashes of the weights that it wrote, and the history, to which each edit is added.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        choose: Callable[[Sequence[EditRequest]], ClosedFormSettings],
        *,
        moments: MomentSource = None,
        history: History | None = None,
    ) -> None:
        """Prepare a session. choose: gives the editor of requests that are edited together.

        moments: as in `ClosedFormEditor.start`.
        """
        super().__init__(vlm, self._made, history=history)
        self._choose, self.shared = choose, Shared(vlm, moments)

    def search(
        self,
        requests: Sequence[EditRequest],
        *,
        check: bool = False,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> tuple[RequestValues, ...]:
        """Return what the value search finds for each request in the model as it is now.

        It is most of the work of an edit; `propose` and `edit` take its result as `values`.

        Args:
            requests: The facts to write.
            check: Look first whether requests contradict each other (default False).
            checkpoint: As in `search_values`: where finished batches are kept for a later call with the same model.
            progress: Show progress bars (default False).

        Raises:
            EditError: Requests contradict each other, a token does not exist in a prompt, or contexts disagree.
        """
        requests = listed_requests(requests)
        with self.vlm.gradients():
            edit = EditUnderWay(self, self.shared, self._choose(requests), requests, progress=progress)
            return edit.search(check=check, checkpoint=checkpoint)

    def measure_anchor(
        self,
        requests: Sequence[EditRequest],
        *,
        values: Sequence[RequestValues] | None = None,
        progress: bool = False,
    ) -> float:
        """Return the norm anchor of pilot requests in the model as it is now, and keep it for `norm_anchor="pilot"`.

        Nothing is edited. Measured before the first edit, it spares the stream its pilot edits.

        Args:
            requests: The pilot: facts such as those that will be edited.
            values: What `search` found for each of them; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: As `search`, or if no request has values.
        """
        requests = listed_requests(requests)
        with self.vlm.gradients():
            edit = EditUnderWay(self, self.shared, self._choose(requests), requests, progress=progress)
            return self.shared.anchors.set(edit.place_name, edit.wanted_norms(values))

    def check(self, request: EditRequest) -> None:
        """Raise the error that an edit of a request would raise because of its prompts, without running the model.

        A question whose answer is to stay needs as much room as the target, since its answer is not known yet.
        """
        editor = self._choose((request,))
        ends = {"end": editor.stops, "every": editor.answer_keys}
        kept = [PlainGoal(questions=(question,), target=request.target) for question in request.preserve_prompts]
        check_goals(self.vlm, Goals(self.vlm, [*goals_of(request), *kept]), editor.place[1], **ends)

    def propose(
        self,
        requests: Sequence[EditRequest],
        *,
        values: Sequence[RequestValues] | None = None,
        progress: bool = False,
    ) -> Delta:
        """Return the change that would make these edits in the model as it is now, and leave the model unchanged.

        Args:
            requests: The facts to write.
            values: What `search` found for each request; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, or no edit can be made.
        """
        requests = listed_requests(requests)
        return with_answers_seen(self.vlm, self._made(requests, progress, values), requests)

    def edit(
        self,
        requests: Sequence[EditRequest],
        *,
        name: str = "",
        values: Sequence[RequestValues] | None = None,
        progress: bool = False,
    ) -> Delta:
        """Return the change that makes these edits; it is in effect until the session ends, and is in the history.

        Args:
            requests: The facts to write.
            name: Name of the edit in the session's history; by default its number.
            values: What `search` found for each request; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: As `EditSession.edit`, or if the history cannot be written.
        """
        handle = self._open_handle()
        delta = self.propose(requests, values=values, progress=progress)
        self.shared.note_norms(delta.changes)
        self._kept(handle, delta, name)
        _give_back_memory()
        return delta

    def adopt(self, requests: Sequence[EditRequest], change: Delta) -> None:
        """As `EditSession.adopt`; the edit is added to the history."""
        if self._choose(requests).earlier_weight is not None:
            for name, own in change.changes.items():
                if own.rank:  # a Gram matrix is made when it is first needed, and its bits depend on when that was
                    self.shared.keys.gram(self.vlm.weight(name), name, set())
        self.shared.note_norms(change.changes)
        super().adopt(requests, change)
        _give_back_memory()

    def _made(
        self, requests: tuple[EditRequest, ...], progress: bool, values: Sequence[RequestValues] | None = None
    ) -> Delta:
        editor = self._choose(requests)
        edit = EditUnderWay(self, self.shared, editor, requests, progress=progress)
        unedited = nullcontext() if self._handle is None else self._handle.taken_out()
        self.shared.weigh(editor, edit.projections, requests, unedited=unedited, progress=progress)
        with self.vlm.gradients():
            return edit.run(values)

    def _begin(self, handle: AppliedDelta) -> None:
        self.shared.anchors.follow([report for entry in self.history.entries for report in entry.requests])
        if self.history.names:
            with suppress(ModelError):  # of another model, which the next line says better
                self.shared.note_norms(self.history.base)
        super()._begin(handle)

    def _follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        if delta is None:  # of the history that the session begins with, whose norms `_begin` has taken in
            self.shared.keys.follow(entry)
        else:
            self.shared.follow(entry, delta)

    def _end(self) -> None:
        super()._end()
        self.shared.forget()


def _give_back_memory() -> None:
    """Let the C library give the memory that an edit has freed back to the system, where it is glibc.

    Each edit makes matrices as wide as its keys are long. If they are of at most 32 MiB, glibc keeps what is freed for
    later, but the factors of the edit, which stay, may lie in between: the process would then grow by one such matrix
    with every edit.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
