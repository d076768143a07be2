"""Changes put into a model's weights in place, and the way back from saved copies."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..models import VisionLanguageModel
from .changes import WeightChange
from .errors import EditError


class AppliedDelta:
    """A change that is in a model's weights, and the way back: it holds a copy of every touched weight."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self.fingerprints: Mapping[str, str] = {}
        self._saved: dict[str, Tensor] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Also copies these weights, unless they are kept already; restore puts them back as they are now."""
        for name in names:
            if name not in self._saved:
                self._saved[name] = self.vlm.weight(name).detach().clone()

    def undo(self) -> None:
        """Puts the touched weights back, bit-equal to before. EditError if already undone, or if one was changed since.

        A later change of the same weight has to be undone first; silently dropping it, or keeping half of it, would
        be worse.
        """
        if not self._saved:
            raise EditError(f"this edit of '{self.vlm.name}' is already undone; apply it again for a new handle")
        with self.vlm.lock:
            found = self.vlm.fingerprint(list(self._saved))
            changed = [name for name in self._saved if found[name] != self.fingerprints[name]]
            if changed:
                raise EditError(
                    f"cannot undo this edit of '{self.vlm.name}': {', '.join(changed)} was changed after it; "
                    "undo the later change first (last in, first out)"
                )
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the touched weights back whatever was written to them since; does nothing once undone."""
        with self.vlm.lock:
            for name, value in self._saved.items():
                self.vlm.weight(name).copy_(value)
            self._saved = {}


@torch.no_grad()
def put_in(vlm: VisionLanguageModel, steps: Sequence[Mapping[str, WeightChange]]) -> AppliedDelta:
    """A handle on changes by parameter name, just written to the model in this order.

    The way back is one copy of each touched weight, however many steps there are. The changes must
    fit. EditError if a weight leaves the finite numbers of its dtype; the weights are then as they were.
    """
    names = {name: None for changes in steps for name in changes}
    handle = AppliedDelta(vlm)
    with vlm.lock:
        try:
            handle.keep(names)
            for changes in steps:
                for name, change in changes.items():
                    write(vlm, name, change)
            handle.fingerprints = vlm.fingerprint(names)
        except BaseException:
            handle.restore()
            raise
    return handle


@torch.no_grad()
def write(vlm: VisionLanguageModel, name: str, change: WeightChange) -> None:
    """Adds the change to the model's weight in place. EditError if it overflows, with part of it written."""
    weight = vlm.weight(name)
    for run, rows in change.rows(weight, transposed=vlm.stores_transposed):
        if not torch.isfinite(rows).all():
            raise EditError(f"the edited {name} overflows {weight.dtype}; load in float32 or edit with a clamp")
        weight[run] = rows


def check_fingerprints(vlm: VisionLanguageModel, wanted: Mapping[str, str], model: str) -> None:
    """EditError unless the weights of these names are bit by bit the ones that were edited."""
    found = vlm.fingerprint(wanted)
    for name, digest in wanted.items():
        if found[name] != digest:
            raise EditError(
                f"this edit was made on '{model}', where {name} has hash {digest[:12]}; in '{vlm.name}' "
                f"({vlm.dtype}) it has {found[name][:12]}: another model or precision, or an edit is applied; "
                "go back to the weights that were edited, or pass on_other_weights=True to add the change to these"
            )
