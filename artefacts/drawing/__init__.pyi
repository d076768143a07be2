from .figures import (
    Curve as Curve,
    CurvePanel as CurvePanel,
    add_colour_bar as add_colour_bar,
    add_legend as add_legend,
    add_picture as add_picture,
    check_format as check_format,
    curves_figure as curves_figure,
    dress as dress,
    finished as finished,
    sample_line as sample_line,
    titled_figure as titled_figure,
)
from .maps import (
    FLOOR as FLOOR,
    Overlay as Overlay,
    Panel as Panel,
    choice_in_words as choice_in_words,
    heat_maps as heat_maps,
    over_patches as over_patches,
    overlays_figure as overlays_figure,
    show_numbers as show_numbers,
    strongest as strongest,
)
from .styles import CYCLE as CYCLE, FLOW_STYLES as FLOW_STYLES, LineStyle as LineStyle, flow_styles as flow_styles
