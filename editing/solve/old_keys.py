"""The second moments by which a session's edits weigh old keys: those given, or those of the model's own samples."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ...data.facts import EditRequest
from ...models import Projection, VisionLanguageModel
from ..moments import Moments, MomentSource, OwnMoments, pictures_of_requests
from .settings import ClosedFormSettings


class OldKeys:
    """The second moments of a session, which are made when an edit first needs them.

    Args:
        vlm: The model.
        source: As `ClosedFormEditor.start` takes moments.
    """

    def __init__(self, vlm: VisionLanguageModel, source: MomentSource) -> None:
        self._vlm, self._source = vlm, source
        self._found: dict[tuple[object, ...], Moments] = {}
        """Moments of own samples, by what is read in which layers."""

    def moments(
        self,
        editor: ClosedFormSettings,
        projections: Mapping[int, Projection],
        requests: Sequence[EditRequest],
        *,
        unedited: AbstractContextManager[Any],
        progress: bool,
    ) -> Moments | None:
        """Return the moments that an edit needs, or None.

        Args:
            editor: The settings of the edit.
            projections: The projections that it changes, by layer.
            requests: Its requests, about whose pictures the model is asked if there are no samples yet.
            unedited: A block in which the model has no edits of the session, for samples.
            progress: Show progress bars.

        Raises:
            EditError: The editor needs moments and gets none, or not those of these projections.
        """
        editor.check_moments(self._source, projections.values())
        if self._source is None and editor.needs_moments:
            self._source = OwnMoments(self._vlm, pictures=pictures_of_requests(requests), progress=progress)
        if not editor.needs_moments or not isinstance(self._source, OwnMoments):
            return self._source if isinstance(self._source, Moments) else None
        read = editor.read_by(next(iter(projections.values())))
        if (read, *projections) not in self._found:
            expert = int(read.removeprefix("expert ")) if read.startswith("expert") else None
            with unedited:
                made = self._source.of([*projections], projection=editor.projection, expert=expert)
            self._found[read, *projections] = made
        return self._found[read, *projections]
