"""What a figure shows: its text and its pixels."""

import io

from matplotlib.figure import Figure
from PIL import Image


def labels(figure: Figure) -> str:
    """The text of a figure as SVG, which matplotlib keeps in comments beside the outlines."""
    return _written(figure, "svg").getvalue().decode()


def pixels(figure: Figure) -> Image.Image:
    """The figure as it is drawn."""
    return Image.open(_written(figure, "png")).convert("RGB")


def _written(figure: Figure, format_: str) -> io.BytesIO:
    content = io.BytesIO()
    figure.savefig(content, format=format_, dpi=160, facecolor="white")
    content.seek(0)
    return content
