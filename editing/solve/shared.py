"""What the edits of a session share: costs, the keys of earlier edits, norm anchors and norms before the first edit."""

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...data.facts import EditRequest
from ...models import Projection, VisionLanguageModel
from ..changes import Delta, HistoryEntry, WeightChange
from ..moments import Moments, MomentSource
from ..siblings import SiblingFinder
from .anchor import NormAnchors
from .cost import Cost
from .earlier import EarlierKeys
from .limits import check_limits, weight_norm
from .old_keys import OldKeys
from .settings import ClosedFormSettings


class Shared:
    """What the edits of one model share, so that each costs the same however many came before it."""

    def __init__(self, vlm: VisionLanguageModel, moments: MomentSource) -> None:
        """Begin without edits. moments: as in `ClosedFormEditor.start`."""
        self.vlm = vlm
        self.moments = moments if isinstance(moments, Moments) else None
        """The second moments by which the edit under way weighs old keys, always of the unedited model."""
        self._old_keys = OldKeys(vlm, moments)
        self.keys = EarlierKeys()
        """The keys of the edits that are in the model, as one running matrix for each weight, and its inverse."""
        self.anchors = NormAnchors()
        """The norm anchors of the layers, which `norm_anchor="pilot"` takes."""
        self.siblings = SiblingFinder(vlm)
        """Finds what requests are not to change, and remembers the names that the model gave."""
        self._norms: dict[str, float] = {}
        """The Frobenius norm of each edited weight before the first edit."""
        self._costs: dict[tuple[object, ...], tuple[int, Cost]] = {}
        """The factorised cost of each weight, and how many times its null space was taken anew."""

    def forget(self) -> None:
        """Forget the edits, which are not in the model any more; costs of weights as they were stay."""
        self.keys, self.anchors, self._norms = EarlierKeys(), NormAnchors(), {}

    def follow(self, entry: HistoryEntry, delta: Delta | None = None) -> None:
        """Take note of an edit that is now in the model."""
        self.keys.follow(entry, delta)
        self.anchors.follow(entry.requests)

    def note_norms(self, names: Iterable[str]) -> None:
        """Measure the weights that are edited for the first time."""
        for name in names:
            if name not in self._norms:
                self._norms[name] = weight_norm(self.vlm, name)

    def weigh(
        self,
        editor: ClosedFormSettings,
        projections: Mapping[int, Projection],
        requests: Sequence[EditRequest],
        *,
        unedited: AbstractContextManager[Any],
        progress: bool,
    ) -> None:
        """Take the second moments that an edit needs; the arguments and errors are those of `OldKeys.moments`."""
        options = {"unedited": unedited, "progress": progress}
        self.moments = self._old_keys.moments(editor, projections, requests, **options)

    def cost(self, editor: ClosedFormSettings, layer: int, projection: Projection, ridge: float) -> Cost:
        """Return the cost of a weight, factorised once for all edits that have the same ridge and null space."""
        null_space = (editor.null_threshold, editor.null_share, editor.null_refresh, editor.null_moment_weight)
        key = (projection.name, editor.moment_weight, editor.moment_kind, *null_space, editor.refined)
        taken = 0 if editor.null_refresh is None else self.keys.edits // editor.null_refresh
        before, cost = self._costs.get(key, (-1, None))
        if cost is None or before != taken:
            edited = self._edited_moment(projection.name, taken * (editor.null_refresh or 0))
            cost = editor.cost(layer, projection, self.moments, ridge, edited=edited)
        elif cost.ridge != ridge:
            cost = replace(cost, ridge=ridge)
        self._costs[key] = taken, cost
        return cost

    def _edited_moment(self, name: str, edits: int) -> Tensor | None:
        return self.keys.mean(self.vlm.weight(name), name, edits) if edits else None

    def holding(self, cost: Cost, editor: ClosedFormSettings, name: str, facts: Set[str]) -> Cost:
        """Return the cost of a weight with the outputs of earlier edits held, save for those of facts edited again."""
        if editor.earlier_weight is None:
            return cost
        return self.keys.held(cost, editor.earlier_weight, self.vlm.weight(name), name, facts)

    def check_limits(self, editor: ClosedFormSettings, changes: Mapping[str, WeightChange]) -> None:
        """Raise `EditError` if changes are larger, or let their weights grow further, than the editor allows."""
        for name, change in changes.items():
            check_limits(self.vlm, name, change, editor, start=self._norms.get(name))
