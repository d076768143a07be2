"""The options that choose an editor and set it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ... import editing, models
from .choices import BASELINES, EDITORS, MOMENT_KINDS, PROJECTIONS
from .option import option

NAMES = (*EDITORS, *BASELINES)
"""Every name that --editor takes."""
PAPER = "paper"


@dataclass(frozen=True, kw_only=True)
class EditorOptions:
    """Which editor, and its settings; None leaves a setting as the editor (or the preset) has it."""

    editor: str = option(
        f"editor (default: multedit): {', '.join(NAMES)}", default="multedit", choices=NAMES, metavar="NAME"
    )
    preset: str | None = option(
        "paper: the published constants of the editor; other options override them", default=None, choices=(PAPER,)
    )
    moments: Path | None = option(
        "second moments of keys (made by multrace moments), by which rome, memit, emmet and alphaedit weigh old keys",
        default=None,
        type=Path,
        metavar="FILE",
    )
    projection: str | None = option(
        "weight that is changed: mlp (down projection, the default) or attention (output projection)",
        default=None,
        choices=PROJECTIONS,
    )
    spread: int | None = option(
        "number of layers that share the change; the last of them is the layer to edit (default: the editor's own; 1 "
        "for multedit)",
        default=None,
        type=int,
        metavar="N",
    )
    steps: int | None = option("maximum number of value-search steps", default=None, type=int, metavar="N")
    learning_rate: float | None = option("learning rate of the value search", default=None, type=float, metavar="RATE")
    stop_loss: float | None = option(
        "loss in nats per target token at which the value search stops", default=None, type=float, metavar="NATS"
    )
    clamp: float | None = option(
        "maximum norm of the change at a key, as a multiple of its output's norm; inf for no limit",
        default=None,
        type=float,
    )
    weight_decay: float | None = option("weight of the norm penalty", default=None, type=float, metavar="WEIGHT")
    essence_weight: float | None = option(
        "weight of the KL penalty on the essence prompts", default=None, type=float, metavar="WEIGHT"
    )
    ridge_fraction: float | None = option(
        "ridge as a share of the mean squared key norm", default=None, type=float, metavar="SHARE"
    )
    ridge: float | None = option("absolute ridge, instead of --ridge-fraction", default=None, type=float)
    weight: float | None = option(
        "weight of each edited key in the least squares; inf for an exact fit",
        default=None,
        type=float,
        metavar="WEIGHT",
    )
    preserve_weight: float | None = option(
        "weight of the keys of prompts whose answers are kept; inf for an exact fit",
        default=None,
        type=float,
        metavar="WEIGHT",
    )
    moment_weight: float | None = option(
        "number of old keys that the second moment stands for; 0 needs no --moments",
        default=None,
        type=float,
        metavar="WEIGHT",
    )
    moment_kind: str | None = option("tokens whose second moment is used", default=None, choices=MOMENT_KINDS)
    null_threshold: float | None = option(
        "protect directions whose second moment is above this share of its mean",
        default=None,
        type=float,
        metavar="SHARE",
    )

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, by the editors' names for them."""
        apart = ("editor", "preset", "moments", "spread")
        names = [row.name for row in fields(EditorOptions) if row.name not in apart]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def open_moments(self, vlm: models.VisionLanguageModel) -> editing.Moments | None:
        """Return the moments in --moments, if given. Raises `EditError` if they do not fit the model."""
        if self.moments is None:
            return None
        moments = editing.Moments.load(self.moments)
        moments.check(vlm)
        return moments
