"""Line styles of flows, the same in every figure and distinguishable by colour-blind readers and in greyscale."""

from collections.abc import Sequence

from ...artefacts.drawing.styles import DASH_DOT, DASHED, DOTTED, LineStyle, cycled

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
_OTHERS = (  # from Tol's muted scheme and Okabe and Ito's, alternately dark and light
    LineStyle(colour="#332288", marker="p"),
    LineStyle(colour="#44AA99", dashes=DASHED, marker="*"),
    LineStyle(colour="#AA4499", dashes=DASH_DOT, marker="d"),
    LineStyle(colour="#999933", marker="8"),
    LineStyle(colour="#661100", dashes=DASHED, marker="H"),
    LineStyle(colour="#88AADD", dashes=DASH_DOT, marker="P"),
    LineStyle(colour="#117733", dashes=DOTTED, marker="s"),
)


def flow_styles(flows: Sequence[str]) -> tuple[LineStyle, ...]:
    """Return a style per flow: the fixed one in `FLOW_STYLES`, or for other names the next one of a cycle."""
    others = [flow for flow in flows if flow not in FLOW_STYLES]
    cycle = {flow: cycled(_OTHERS, index) for index, flow in enumerate(others)}
    return tuple((FLOW_STYLES | cycle)[flow] for flow in flows)
