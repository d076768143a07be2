"""Editors by the names that commands take, closed-form ones and baselines alike, and the options that set them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..editing.baselines import FineTune, InContext, Lora
from ..editing.closed_form import ClosedFormEditor
from ..editing.editors import EDITORS
from ..editing.moments import Moments
from ..editing.requests import EditRequest
from ..models import VisionLanguageModel
from .errors import CommandError
from .options import option

PAPER = "paper"
_PLACE = ("layer", "token", "spread", "where")
_DOWN = {"mlp": "down"}
"""What baselines call a projection where it is not what closed-form editors call it."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline behind the call of the closed-form editors: it trains on the model as it is and needs nothing else."""

    settings: FineTune | Lora | InContext
    needs_moments: bool = False
    has_fixed_cost: bool = False

    def edit(
        self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = False, **_unused: Any
    ) -> Any:
        """The baseline's change. Moments, metrics and earlier edits make no difference to it. EditError as its edit."""
        return self.settings.edit(vlm, requests, progress=progress)

    def as_text(self) -> dict[str, str]:
        """The editor's name and its settings."""
        return self.settings.as_text()


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """How a baseline is made from the options that all editors share."""

    kind: type[FineTune] | type[Lora] | type[InContext]
    base: Callable[[int], FineTune | Lora | InContext]
    """The settings to start from, for a layer."""
    paper: Callable[[int], FineTune] | None = None
    """The published ones."""


BASELINES: Mapping[str, _Trained] = {
    "ft": _Trained(
        kind=FineTune, base=lambda layer: FineTune(layer=layer), paper=lambda layer: FineTune.paper(layer=layer)
    ),
    "ft-l": _Trained(
        kind=FineTune,
        base=lambda layer: FineTune.constrained(layer=layer),
        paper=lambda layer: FineTune.constrained(layer=layer),
    ),
    "lora": _Trained(kind=Lora, base=lambda _: Lora()),
    "in-context": _Trained(kind=InContext, base=lambda _: InContext()),
}
"""Baselines by name: fine-tuning of the layer's projection, the same within a bound, LoRA in all layers, and telling
the facts before the question."""
NAMES = (*EDITORS, *BASELINES)
"""Every name that `editor` takes."""


def editor(
    name: str,
    *,
    layer: int,
    token: str | int = "last",
    spread: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> ClosedFormEditor | Baseline:
    """The editor of this name, all with the same `edit`.

    layer: the (last) layer that is changed; "lora" adapts all layers unless settings name `layers`, and "in-context"
    changes none. token and spread are for closed-form editors alone; spread None is the editor's own, cut where there
    are fewer layers below. preset "paper": the published constants, over which settings go. CommandError for an
    unknown name, preset or setting; EditError for a setting out of range.
    """
    if preset not in (None, PAPER):
        raise CommandError(f"no preset {preset!r}; pass 'paper', or none for the defaults")
    if name in EDITORS:
        _check_settings(name, EDITORS[name], settings)
        place = {"layer": layer, "token": token}
        made = EDITORS[name].paper(**place) if preset else EDITORS[name](**place)
        if spread is None:
            spread = min(made.spread, layer + 1) if layer >= 0 else made.spread
        return replace(made, spread=spread, **settings)
    if name not in BASELINES:
        raise CommandError(f"no editor {name!r}; pass one of {', '.join(NAMES)}")
    row = BASELINES[name]
    if preset and row.paper is None:
        raise CommandError(f"{name} has no published constants; leave the preset out")
    if "projection" in settings and row.kind is FineTune:
        settings["projection"] = _DOWN.get(settings["projection"], settings["projection"])
    _check_settings(name, row.kind, settings)
    return Baseline(settings=replace((row.paper if preset else row.base)(layer), **settings))


def _check_settings(name: str, kind: type, settings: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(kind) if each.name not in _PLACE]
    if unknown := [each for each in settings if each not in known]:
        raise CommandError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class EditorOptions:
    """Which editor, and its settings; None leaves a setting as the editor (or the preset) has it."""

    editor: str = option(
        f"which editor (default multedit): {', '.join(NAMES)}", default="multedit", choices=NAMES, metavar="NAME"
    )
    preset: str | None = option(
        "paper: the editor's published constants, over which other options go", default=None, choices=(PAPER,)
    )
    moments: Path | None = option(
        "second moments of keys (multrace moments), which rome, memit, emmet and alphaedit weigh old keys by",
        default=None,
        type=Path,
        metavar="FILE",
    )
    projection: str | None = option(
        "the weight that is changed: mlp (down projection, the default) or attention (output map)",
        default=None,
        choices=("mlp", "attention"),
    )
    spread: int | None = option(
        "how many layers share the work, the last of them the one to edit (default: the editor's own; multedit 1)",
        default=None,
        type=int,
        metavar="N",
    )
    steps: int | None = option("steps of the value search at most", default=None, type=int, metavar="N")
    learning_rate: float | None = option("of the value search", default=None, type=float, metavar="RATE")
    stop_loss: float | None = option("nats per target token that are enough", default=None, type=float, metavar="NATS")
    clamp: float | None = option(
        "longest change at a key, as a multiple of its output's norm; inf for any", default=None, type=float
    )
    weight_decay: float | None = option("price of a long change", default=None, type=float, metavar="PRICE")
    essence_weight: float | None = option(
        "price of moving what a request's essence prompts say", default=None, type=float, metavar="PRICE"
    )
    ridge_fraction: float | None = option(
        "ridge as a share of the mean squared key norm", default=None, type=float, metavar="SHARE"
    )
    ridge: float | None = option("absolute ridge instead", default=None, type=float)
    weight: float | None = option(
        "of each edited key in the least squares, inf for exact", default=None, type=float, metavar="WEIGHT"
    )
    keep_weight: float | None = option(
        "of the keys of prompts whose answers stay, inf for exact", default=None, type=float, metavar="WEIGHT"
    )
    moment_weight: float | None = option(
        "how many old keys the second moment stands for; 0 does without one", default=None, type=float, metavar="WEIGHT"
    )
    moment_kind: str | None = option(
        "which tokens' second moment",
        default=None,
        choices=("all", "image", "question", "template", "text"),
    )
    null_threshold: float | None = option(
        "do not touch directions in which the second moment is above this share of its mean",
        default=None,
        type=float,
        metavar="SHARE",
    )

    def settings(self) -> dict[str, Any]:
        """The settings that were given, by the editors' names for them."""
        apart = ("editor", "preset", "moments", "spread")
        named = [each.name for each in fields(EditorOptions) if each.name not in apart]
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}

    def make_editor(self, *, layer: int, token: str | int = "last", spread: int | None = None) -> Any:
        """The editor asked for, at this place; spread None is --spread, or the editor's own. Errors as `editor`."""
        place = {"layer": layer, "token": token, "spread": self.spread if spread is None else spread}
        return editor(self.editor, **place, preset=self.preset, **self.settings())

    def open_moments(self, vlm: VisionLanguageModel) -> Moments | None:
        """The moments in --moments, if given, which fit the model. EditError if they do not."""
        if self.moments is None:
            return None
        moments = Moments.load(self.moments)
        moments.check(vlm)
        return moments
