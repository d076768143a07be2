from .curves import Curve as Curve, CurvePanel as CurvePanel, curves_figure as curves_figure, sample_line as sample_line
from .figure import (
    add_colour_bar as add_colour_bar,
    add_legend as add_legend,
    add_picture as add_picture,
    check_format as check_format,
    dress as dress,
    finished as finished,
    titled_figure as titled_figure,
)
from .heat_map import Panel as Panel, heat_maps as heat_maps, show_numbers as show_numbers
from .overlay import (
    Overlay as Overlay,
    over_patches as over_patches,
    overlays_figure as overlays_figure,
    strongest as strongest,
)
from .styles import CYCLE as CYCLE, LineStyle as LineStyle
