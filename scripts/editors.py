"""Editors by the names that commands take: closed-form editors and baselines behind one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..editing.baselines import FineTune, InContext, Lora
from ..editing.solve import EDITORS, ClosedFormEditor
from .errors import CommandError
from .options.editors import NAMES, PAPER, EditorOptions

_PLACE = ("layer", "token", "spread", "where")


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


def editor(
    name: str,
    *,
    layer: int,
    token: str | int = "last",
    spread: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> ClosedFormEditor | FineTune | Lora | InContext:
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
        _check_settings(name, EDITORS[name], settings)
        place = {"layer": layer, "token": token}
        kind: Any = EDITORS[name]
        made = kind.paper(**place) if preset else kind(**place)
        if spread is None:
            spread = min(made.spread, layer + 1) if layer >= 0 else made.spread
        return replace(made, spread=spread, **settings)
    if name not in BASELINES:
        raise CommandError(f"no editor {name!r}; pass one of {', '.join(NAMES)}")
    row = BASELINES[name]
    base = row.paper if preset else row.base
    if base is None:
        raise CommandError(f"{name} has no published constants; leave the preset out")
    _check_settings(name, row.kind, settings)
    return replace(base(layer), **settings)


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
