"""A session whose edits are deltas, which it adds to a history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...data.facts import EditRequest
from ...models import VisionLanguageModel
from ...models.guards import uninterrupted
from .delta import Delta
from .history import History, HistoryEntry
from .weight_change import AppliedDelta, EditSession


class DeltaSession(EditSession[Delta]):
    """A session of edits that are deltas. It begins with the edits of a history, to which each of its own is added."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        make: Callable[[tuple[EditRequest, ...], bool], Delta],
        *,
        history: History | None = None,
    ) -> None:
        """Prepare a session. make: as in `EditSession`. history: None for an empty one in memory."""
        super().__init__(vlm, make)
        self.history = History() if history is None else history
        """The edits in effect, those of this session included."""

    def edit(self, requests: Sequence[EditRequest], *, name: str = "", progress: bool = False) -> Delta:
        """Return the change that makes these edits; it is in effect until the session ends, and is in the history.

        Args:
            requests: The facts to write.
            name: Name of the edit in the session's history; by default its number.
            progress: Show progress bars.

        Raises:
            EditError: As `EditSession.edit`, or if the history cannot be written.
        """
        handle = self._open_handle()
        return self._kept(handle, self.propose(requests, progress=progress), name)

    def adopt(self, requests: Sequence[EditRequest], change: Any) -> None:
        """As `EditSession.adopt`; the edit is added to the history."""
        super().adopt(requests, change)
        self._record(change, "")
        self._follow(self.history.entries[-1], change)

    def _kept(self, handle: AppliedDelta, delta: Delta, name: str) -> Delta:
        """Put an edit into the model and the history, or, after an error, into neither; return it."""
        own = self._put_in(handle, delta)
        try:
            self._record(delta, name)
        except BaseException:
            uninterrupted(own.restore)
            raise
        self._follow(self.history.entries[-1], delta)
        return delta

    def _record(self, delta: Delta, name: str) -> None:
        self.history = self.history.added(name or self._free_name(), delta, on_top=bool(self.history.names))

    def _follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        """What a session notes of an edit that is now in the model. delta: the edit, unless it is in its file alone."""

    def _begin(self, handle: AppliedDelta) -> None:
        if not self.history.names:
            self.history.check_base(self.vlm)
            return
        self.history.put_in(handle)
        for entry in self.history.entries:
            if entry.dropped is None:
                self._follow(entry)

    def _free_name(self) -> str:
        taken = {entry.name for entry in self.history.entries}
        number = len(taken) + 1
        while str(number) in taken:
            number += 1
        return str(number)
