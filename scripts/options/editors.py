"""The options that choose an editor and set it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ... import editing, models
from .asking import EDITOR, GeneralOptions
from .choices import BASELINES, EDITORS, MOMENT_KINDS, PROJECTIONS

NAMES = (*EDITORS, *BASELINES)
"""Every name that --editor takes."""
PAPER = "paper"


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
            help="second moments of keys (made by multrace moments), by which rome, memit, emmet and alphaedit weigh old keys",
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
            help="number of layers that share the change; the last of them is the layer to edit (default: the editor's own; 1 "
            "for multedit)",
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
