"""The editors of the study on a real text model, each with the settings that are tried for it on the choosing half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...editing import ClosedFormEditor, StableEdit, UltraEdit
from ...editing.baselines import FineTune, Lora
from ...editing.solve import EMMET, MEMIT, ROME, AlphaEdit, MultEdit

Candidates = Mapping[str, Any]
"""Name of a setting that is tried -> the editor with it."""
_LATE, _LATER, _EARLY = 24 / 30, 26 / 30, 6 / 30
"""Layers as shares of the depth: of 30 layers these are 24, 26 and 6."""
_RATES = (1e-3, 5e-3)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A line of the tables."""

    name: str
    label: str
    """Its name in the tables."""
    text: str
    """Its description."""
    candidates: Callable[[int], Candidates]
    """Returns the settings to try for a model with so many layers."""

    def moment_layers(self, layers: int) -> set[int]:
        """Return the layers whose second moments any of its settings needs, for a model with so many layers."""
        editors = [each for each in self.candidates(layers).values() if isinstance(each, ClosedFormEditor)]
        needing = [each for each in editors if each.needs_moments]
        return {layer for each in needing for layer in range(each.place[0] - each.spread + 1, each.place[0] + 1)}


def text_rows() -> tuple[TextRow, ...]:
    """Return every line, the default editor first."""
    return (
        _closed("multedit", "MultEdit", "MultEdit, which keeps siblings (default settings)", MultEdit),
        _closed("multedit-bare", "… without siblings", "the same without siblings", partial(MultEdit, siblings=None)),
        _closed("rome", "ROME", "ROME, with second moments", ROME),
        _closed("memit", "MEMIT", "MEMIT over three layers, with second moments", _spread(MEMIT)),
        _closed(
            "memit-earlier",
            "… with earlier keys",
            "the same, with the keys of earlier edits (`earlier_weight=1`)",
            _spread(partial(MEMIT, earlier_weight=1.0)),
        ),
        _closed("emmet", "EMMET", "EMMET, with second moments", EMMET),
        _closed("alphaedit", "AlphaEdit", "AlphaEdit over three layers, with second moments", _spread(AlphaEdit)),
        TextRow(
            name="ultraedit", label="UltraEdit", text="UltraEdit over two layers", candidates=partial(_steps, UltraEdit)
        ),
        TextRow(
            name="stableedit",
            label="StableEdit",
            text="StableEdit over two layers",
            candidates=partial(_steps, StableEdit),
        ),
        TextRow(
            name="ft-bf",
            label="FineTune, breadth first",
            text="fine-tuning of one down projection, in epochs over mini-batches (LocFT-BF)",
            candidates=partial(_trained, FineTune.breadth_first),
        ),
        TextRow(
            name="lora-bf",
            label="LoRA, breadth first",
            text="LoRA of rank 8 in all layers, in epochs over mini-batches",
            candidates=lambda layers: {"all layers": Lora.breadth_first()},
        ),
        TextRow(
            name="ft",
            label="FineTune",
            text="fine-tuning of one down projection, in steps over all edits at once",
            candidates=partial(_trained, FineTune),
        ),
    )


def _closed(name: str, label: str, text: str, make: Callable[..., Any]) -> TextRow:
    def candidates(layers: int) -> Candidates:
        places = dict.fromkeys(
            (token, _layer(share, layers))
            for token, share in (("last", _LATE), ("last", _LATER), ("constraint_last", _EARLY))
        )
        return {f"layer {layer}, {token}": make(layer=layer, token=token) for token, layer in places}

    return TextRow(name=name, label=label, text=text, candidates=candidates)


def _spread(make: Callable[..., Any]) -> Callable[..., Any]:
    """The editor over three layers, or fewer where fewer lie below."""

    def made(*, layer: int, token: str) -> Any:
        return make(layer=layer, token=token, spread=min(3, layer + 1))

    return made


def _steps(make: Callable[..., Any], layers: int) -> Candidates:
    """One gradient step at two late or two early layers, and a shorter one."""
    late = tuple(dict.fromkeys(_layer(share, layers) for share in (_LATE, _LATER)))
    early = tuple(dict.fromkeys((_layer(_EARLY, layers), min(_layer(_EARLY, layers) + 2, layers - 1))))
    tried = {(late, 3.0): None, (late, 1.0): None, (early, 3.0): None}
    return {
        f"layers {' and '.join(map(str, chosen))}, step {step:g}": make(layers=chosen, step_size=step)
        for chosen, step in tried
    }


def _trained(make: Callable[..., Any], layers: int) -> Candidates:
    layer = _layer(_LATE, layers)
    return {f"layer {layer}, rate {rate:g}": make(layer=layer, learning_rate=rate) for rate in _RATES}


def _layer(share: float, layers: int) -> int:
    return min(round(share * layers), layers - 1)
