"""Editors by the names that commands take, and the options that choose one and set it."""

# No postponed annotations: commands inherit these options, and their own module would have to know every name in them.

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .. import editing, models
from ..editing import solve
from .options import BASELINES, EDITOR, EDITORS, MOMENT_KINDS, PROJECTIONS, CommandError, GeneralOptions

_PLACE = ("layer", "token", "spread", "where")
NAMES = (*EDITORS, *BASELINES)
"""Every name that --editor takes."""
PAPER = "paper"
ANY_LAYER = 10**6
"""A layer that has every number of layers below it, for editors whose layer is chosen later."""


@dataclass(frozen=True, kw_only=True)
class EditorOptions(GeneralOptions):
    """Which editor, and its settings; None leaves a setting as the editor (or the preset) has it."""

    editor: Annotated[str, Parameter(help="editor", group=EDITOR, choices=NAMES, metavar="NAME")] = "multedit"
    preset: Annotated[
        str | None,
        Parameter(
            help="paper: the published constants of the editor; other options override them",
            group=EDITOR,
            choices=(PAPER,),
        ),
    ] = None
    moments: Annotated[
        Path | None,
        Parameter(
            help="second moments of keys (made by multrace moments), by which rome, memit, emmet and alphaedit weigh "
            "old keys",
            group=EDITOR,
            metavar="FILE",
        ),
    ] = None
    projection: Annotated[
        str | None,
        Parameter(
            help="weight that is changed: mlp (down projection, the default) or attention (output projection)",
            group=EDITOR,
            choices=PROJECTIONS,
        ),
    ] = None
    spread: Annotated[
        int | None,
        Parameter(
            help="number of layers that share the change; the last of them is the layer to edit (default: the editor's "
            "own; 1 for multedit)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    steps: Annotated[int | None, Parameter(help="maximum number of value-search steps", group=EDITOR, metavar="N")] = (
        None
    )
    learning_rate: Annotated[
        float | None, Parameter(help="learning rate of the value search", group=EDITOR, metavar="RATE")
    ] = None
    stop_loss: Annotated[
        float | None,
        Parameter(help="loss in nats per target token at which the value search stops", group=EDITOR, metavar="NATS"),
    ] = None
    clamp: Annotated[
        float | None,
        Parameter(
            help="maximum norm of the change at a key, as a multiple of its output's norm; inf for no limit",
            group=EDITOR,
        ),
    ] = None
    weight_decay: Annotated[
        float | None, Parameter(help="weight of the norm penalty", group=EDITOR, metavar="WEIGHT")
    ] = None
    essence_weight: Annotated[
        float | None, Parameter(help="weight of the KL penalty on the essence prompts", group=EDITOR, metavar="WEIGHT")
    ] = None
    ridge_fraction: Annotated[
        float | None, Parameter(help="ridge as a share of the mean squared key norm", group=EDITOR, metavar="SHARE")
    ] = None
    ridge: Annotated[float | None, Parameter(help="absolute ridge, instead of --ridge-fraction", group=EDITOR)] = None
    weight: Annotated[
        float | None,
        Parameter(
            help="weight of each edited key in the least squares; inf for an exact fit", group=EDITOR, metavar="WEIGHT"
        ),
    ] = None
    preserve_weight: Annotated[
        float | None,
        Parameter(
            help="weight of the keys of prompts whose answers are kept; inf for an exact fit",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    moment_weight: Annotated[
        float | None,
        Parameter(
            help="number of old keys that the second moment stands for; 0 needs no --moments",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    moment_kind: Annotated[
        str | None, Parameter(help="tokens whose second moment is used", group=EDITOR, choices=MOMENT_KINDS)
    ] = None
    null_threshold: Annotated[
        float | None,
        Parameter(
            help="protect directions whose second moment is above this share of its mean", group=EDITOR, metavar="SHARE"
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, by the editors' names for them."""
        apart = ("editor", "preset", "moments", "spread", *(row.name for row in fields(GeneralOptions)))
        names = [row.name for row in fields(EditorOptions) if row.name not in apart]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def open_moments(self, vlm: "models.VisionLanguageModel") -> "editing.Moments | None":
        """Return the moments in --moments, if given. Raises `EditError` if they do not fit the model."""
        if self.moments is None:
            return None
        moments = editing.Moments.load(self.moments)
        moments.check(vlm)
        return moments


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """How a baseline is made from the options that all editors share."""

    kind: str
    """Name of its settings in `editing`."""
    preset: str | None = None
    """The method of the class that gives the settings to start from; None for the class itself."""
    paper: str | None = None
    """The one that gives the published settings."""
    has_layer: bool = False


_BASELINES: Mapping[str, _Baseline] = {
    "ft": _Baseline(kind="FineTune", paper="paper", has_layer=True),
    "ft-l": _Baseline(kind="FineTune", preset="constrained", paper="constrained", has_layer=True),
    "lora": _Baseline(kind="Lora"),
    "in-context": _Baseline(kind="InContext"),
}
"""Fine-tuning of the layer's projection, the same within a bound, LoRA in all layers, and telling the facts before the
question."""


def editor(
    name: str,
    *,
    layer: int,
    token: str | int = "last",
    spread: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Any:
    """Return the editor of this name; all of them start sessions.

    Args:
        name: One of `NAMES`.
        layer: The (last) layer that is changed. "lora" adapts all layers unless the settings name `layers`, and
            "in-context" changes none.
        token: Token at which a closed-form editor edits.
        spread: How many layers share the change of a closed-form editor; None is the editor's own number, or fewer
            where fewer layers lie below.
        preset: "paper" for the published constants, which the settings override; None for the defaults.
        settings: Fields of the editor.

    Raises:
        CommandError: An unknown name, preset or setting.
        EditError: A setting out of range.
    """
    if preset not in (None, PAPER):
        raise CommandError(f"no preset {preset!r}; pass 'paper', or none for the defaults")
    if name in EDITORS:
        kind = solve.EDITORS[name]
        _check_settings(name, kind, settings)
        place = {"layer": ANY_LAYER, "token": token}  # presets spread the change over no more layers than there are
        made = kind.paper(**place) if preset else kind(**place)
        if spread is None:
            spread = min(made.spread, layer + 1) if layer >= 0 else made.spread
        return replace(made, layer=layer, spread=spread, **settings)
    if name not in BASELINES:
        raise CommandError(f"no editor {name!r}; pass one of {', '.join(NAMES)}")
    row = _BASELINES[name]
    if preset and row.paper is None:
        raise CommandError(f"{name} has no published constants; leave the preset out")
    kind = getattr(editing, row.kind)
    _check_settings(name, kind, settings)
    start = row.paper if preset else row.preset
    made = (getattr(kind, start) if start else kind)(**{"layer": layer} if row.has_layer else {})
    return replace(made, **settings)


def _check_settings(name: str, kind: type, settings: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(kind) if each.name not in _PLACE]
    if unknown := [each for each in settings if each not in known]:
        raise CommandError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}")


def make_editor(options: EditorOptions, *, layer: int, token: str | int = "last", spread: int | None = None) -> Any:
    """Return the editor that the options ask for, at this place.

    spread: how many layers share the change; None means --spread, or else the editor's own. Errors as in `editor`.
    """
    place = {"layer": layer, "token": token, "spread": options.spread if spread is None else spread}
    return editor(options.editor, **place, preset=options.preset, **options.settings())
