"""Colours, dashes and markers, and names in figures. Importing this module does not import matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INK, GREY = "#222222", "#555555"
SITE_NAMES: Mapping[str, str] = {"hidden": "hidden state", "mlp": "MLP"}
"""Readable names of kinds of sites, where they differ from the identifiers."""
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
    """The style of a curve; dashes and marker distinguish it in print without colours."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    """Matplotlib's line style."""
    marker: str = "o"
    """One of matplotlib's filled markers."""


DASHED, DOTTED, DASH_DOT = (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4))
CYCLE = (  # the palette of Okabe and Ito for colour-blind readers, without its yellow, which is pale on white
    LineStyle(colour="#0072B2", marker="o"),
    LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    LineStyle(colour="#CC79A7", marker="D"),
    LineStyle(colour="#D55E00", dashes=DASHED, marker="v"),
    LineStyle(colour="#56B4E9", dashes=DASH_DOT, marker="P"),
    LineStyle(colour="#222222", dashes=DOTTED, marker="X"),
)
FLOW_STYLES = {
    "question -> last": LineStyle(colour="#0072B2", marker="o"),
    "image -> last": LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    "image -> question": LineStyle(colour="#D55E00", dashes=DASH_DOT, marker="^"),
    "last -> last": LineStyle(colour="#6E6E6E", dashes=DOTTED, marker="X"),
    "object -> question": LineStyle(colour="#009E73", marker="D"),
    "other patches -> question": LineStyle(colour="#CC79A7", dashes=DASHED, marker="v"),
    "true option -> last": LineStyle(colour="#56B4E9", marker="P"),
    "false option -> last": LineStyle(colour="#882255", dashes=DASHED, marker="<"),
    "options -> last": LineStyle(colour="#222222", dashes=DASH_DOT, marker="h"),
    "question without options -> last": LineStyle(colour="#8A8A00", dashes=DOTTED, marker=">"),
}
"""The fixed styles of the flows of arXiv 2411.18620 (sections 4 and 5)."""
_OTHER_FLOWS = (  # from Tol's muted scheme and Okabe and Ito's, alternately dark and light
    LineStyle(colour="#332288", marker="p"),
    LineStyle(colour="#44AA99", dashes=DASHED, marker="*"),
    LineStyle(colour="#AA4499", dashes=DASH_DOT, marker="d"),
    LineStyle(colour="#999933", marker="8"),
    LineStyle(colour="#661100", dashes=DASHED, marker="H"),
    LineStyle(colour="#88AADD", dashes=DASH_DOT, marker="P"),
    LineStyle(colour="#117733", dashes=DOTTED, marker="s"),
)


def cycled(styles: Sequence[LineStyle], index: int) -> LineStyle:
    """Return the style with this index; after the last style, colours repeat with other dashes and markers."""
    turn, count = index // len(styles), len(styles)
    dashes, marker = styles[(index + turn) % count].dashes, styles[(index + 2 * turn) % count].marker
    return LineStyle(colour=styles[index % count].colour, dashes=dashes, marker=marker)


def flow_styles(flows: Sequence[str]) -> tuple[LineStyle, ...]:
    """Return a style per flow: the fixed one in `FLOW_STYLES`, or for other names the next one of a cycle."""
    others = [flow for flow in flows if flow not in FLOW_STYLES]
    cycle = {flow: cycled(_OTHER_FLOWS, index) for index, flow in enumerate(others)}
    return tuple((FLOW_STYLES | cycle)[flow] for flow in flows)


def colours_of(kind: str) -> str:
    """Return the colour map of a kind of site: ROME's for hidden states, MLPs and attentions, others for all else."""
    return _COLOURS.get(kind.split()[0], "YlGnBu")


def name_of_model(model: str) -> str:
    """Return a hub id unchanged, or only the last part of a local folder."""
    path = Path(model)
    return path.name if path.is_absolute() else model
