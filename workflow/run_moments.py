"""The second moments of keys in runs: those of a file, or own ones, the same for all records and all processes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..artefacts.files import digest
from ..data import EditRecord
from ..editing import ClosedFormEditor, Moments
from ..editing.moments import MomentSource, OwnMoments, pictures_of_requests
from ..models import VisionLanguageModel


def moments_setting(file: Path | None, editor: Any) -> str | None:
    """Return what tells the second moments of a run from others; None for an editor that needs none."""
    if file is not None:
        return digest(file.read_bytes())
    return "own samples" if getattr(editor, "needs_moments", False) else None


def check_moments(vlm: VisionLanguageModel, file: Path | None, editor: Any) -> None:
    """Raise `EditError` if the moments in a file are not of this model, or not what the editor needs."""
    moments = None if file is None else Moments.load(file)
    if moments is not None:
        moments.check(vlm)
    if isinstance(editor, ClosedFormEditor):
        editor.check_moments(moments)


def moments_of_run(
    vlm: VisionLanguageModel, file: Path | None, records: Iterable[Any], *, progress: bool
) -> MomentSource:
    """Return the moments in a file, or own ones about the pictures of the first records of the run.

    Nothing is sampled before an editor asks for it. Records that are added to a run later do not change which pictures
    these are, unless there were hardly any.
    """
    if file is not None:
        return Moments.load(file)
    edits = [record for record in records if isinstance(record, EditRecord)]
    return OwnMoments(vlm, pictures=pictures_of_requests(edits), progress=progress)
