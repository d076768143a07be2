"""Colours, dashes and markers, and what pictures call things. Importing this imports no matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INK, GREY = "#222222", "#555555"
SITE_NAMES: Mapping[str, str] = {"hidden": "hidden state", "mlp": "MLP"}
"""Names of kinds of sites in text for people, where they differ from the identifiers."""
_COLOURS = {
    "hidden": "Purples",
    "mlp": "Greens",
    "attention": "Reds",
    "head": "Oranges",
    "vision": "Blues",
    "projector": "Greys",
}


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How a curve is drawn; dashes and marker tell it apart in print without colours."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    """Matplotlib's line style."""
    marker: str = "o"
    """One of matplotlib's filled markers."""


DASHED, DOTTED, DASH_DOT = (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4))
CYCLE = (  # the colours that Okabe and Ito chose for colour-blind readers, without their yellow, which is pale on white
    LineStyle(colour="#0072B2", marker="o"),
    LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    LineStyle(colour="#CC79A7", marker="D"),
    LineStyle(colour="#D55E00", dashes=DASHED, marker="v"),
    LineStyle(colour="#56B4E9", dashes=DASH_DOT, marker="P"),
    LineStyle(colour="#222222", dashes=DOTTED, marker="X"),
)


def cycled(styles: Sequence[LineStyle], index: int) -> LineStyle:
    """Return the style with this index; after the last one, colours repeat with other dashes and markers."""
    turn, count = index // len(styles), len(styles)
    dashes, marker = styles[(index + turn) % count].dashes, styles[(index + 2 * turn) % count].marker
    return LineStyle(colour=styles[index % count].colour, dashes=dashes, marker=marker)


def colours_of(kind: str) -> str:
    """Return the colour map of a kind of site: ROME's for hidden states, MLPs and attentions, others for the rest."""
    return _COLOURS.get(kind.split()[0], "YlGnBu")


def name_of_model(model: str) -> str:
    """Return a hub id as it is, and only the last part of a folder on this machine."""
    path = Path(model)
    return path.name if path.is_absolute() else model
