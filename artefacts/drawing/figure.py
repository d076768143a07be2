"""Pictures of results as files: one place for formats, fonts and colours."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import ArtefactError
from ..files import write_atomically

INK, GREY = "#222222", "#555555"
_FORMATS = ("png", "pdf", "svg")
_COLOURS = {
    "hidden": "Purples",
    "mlp": "Greens",
    "attention": "Reds",
    "head": "Oranges",
    "vision": "Blues",
    "projector": "Greys",
}


def colours_of(kind: str) -> str:
    """The colour map of a kind of site: ROME's for hidden states, MLPs and attentions, others for the rest."""
    return _COLOURS.get(kind.split()[0], "YlGnBu")


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without any of matplotlib's global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def name_of_model(model: str) -> str:
    """What pictures call a model: a hub id as it is, of a folder on this machine only its own name."""
    path = Path(model)
    return path.name if path.is_absolute() else model


def wrap(text: str, width: float, size: float) -> str:
    """The text in lines that fit into so many inches, each letter taking `size` of them."""
    lines = text.splitlines() or [""]
    return "\n".join(textwrap.fill(line, max(30, int(width / size))) for line in lines)


def write_titles(figure: Figure, titles: Sequence[str], height: float) -> None:
    """Writes title and subtitle from the top left corner."""
    title, subtitle = titles
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=11, weight="bold", color=INK, va="top", parse_math=False)
    below = 0.16 + 0.2 * (title.count("\n") + 1)
    figure.text(0.012, 1 - below / height, subtitle, fontsize=8.5, color=GREY, va="top", parse_math=False)


def draw_bar(axes: Axes, colours: ScalarMappable, unit: str) -> None:
    """Draws a colour bar into these axes."""
    bar = axes.figure.colorbar(colours, cax=axes)
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=7, length=2, color="#a0a0a0", labelcolor=INK)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_title(unit, fontsize=7.5, color=INK, pad=5, parse_math=False)


def write_figure(path: str | Path, figure: Figure) -> Path:
    """The written picture; ArtefactError for a place that cannot be written."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token outside the font is drawn as a box
        figure.savefig(content, format=check_format(path), dpi=160, facecolor="white")
    return write_atomically(path, content.getvalue())


def check_format(path: str | Path) -> str:
    """The format that the path's suffix names: png, pdf or svg; ArtefactError for another."""
    suffix = Path(path).suffix
    if suffix.lower().lstrip(".") not in _FORMATS:
        raise ArtefactError(f"cannot draw into {str(path)!r}: no format {suffix!r}; end the name in .png, .pdf or .svg")
    return suffix.lower().lstrip(".")
