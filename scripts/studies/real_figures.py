"""The figures of the study of a real model, drawn from its numbers, as small pictures for the documentation."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ...artefacts import drawing, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI, _COLOURS = 90, 256
TRACES = {
    "rome": "ROME's figure on the text model",
    "swap": "Another country's flag",
    "noise": "Noise on the words that point at the country",
    "noise by name": "Noise on the country's name",
}
"""The parts that are causal traces, with the titles of their figures."""


def write_figures(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write a figure for each part that has one, and return the name of the file by the name of the part."""
    drawings: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        **{part: _trace(title) for part, title in TRACES.items()},
        "flows": _flows,
        "emergence": _emergence,
        "tokens": _tokens,
        "cliff": _cliff,
    }
    names = {}
    for part, draw in drawings.items():
        if part in results:
            names[part] = f"real_{part.replace(' ', '_')}.png"
            write_whole(folder / names[part], small_png(draw(results[part])))
    return names


def small_png(figure: "Figure") -> bytes:
    """Return the figure as a PNG with few colours, which takes a third of the space."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    with Image.open(raw) as picture:
        # median cut, the default, gives heat maps wrong hues: few of their pixels are dark
        method = Image.Quantize.MAXCOVERAGE
        reduced = picture.convert("RGB").quantize(_COLOURS, method=method, dither=Image.Dither.NONE)
    reduced.save(small, "png", optimize=True)
    return small.getvalue()


def _tensor(values: Any) -> Tensor:
    """Return nested lists as a tensor, None as NaN."""
    return torch.tensor(_filled(values), dtype=torch.float64)


def _filled(values: Any) -> Any:
    if isinstance(values, list):
        return [_filled(each) for each in values]
    return torch.nan if values is None else values


def _trace(title: str) -> Callable[[Mapping[str, Any]], "Figure"]:
    """Return what draws one heat map for each kind of site."""

    def draw(part: Mapping[str, Any]) -> "Figure":
        panels = []
        for kind, cells in part["kinds"].items():
            low, high = _tensor(cells["low"]), _tensor(cells["high"])
            panel = drawing.Panel(
                kind=kind,
                window=part["window"],
                values=_tensor(cells["effect"]),
                low=0.0,
                scale=part["total"][0],
                clear=(low > 0) | (high < 0),
            )
            panels.append(panel)
        words = f"Mean over {part['count']} facts: clean {part['clean']:.3f}, corrupted {part['corrupted']:.3f}"
        stars = ["constraint" in row for row in part["rows"]]
        return drawing.heat_maps(panels, rows=part["rows"], stars=stars, titles=(title, words), unit="indirect effect")

    return draw


def _curve(label: str, rows: Sequence[Sequence[float | None]], x: Sequence[int]) -> drawing.Curve:
    """Return the curve of rows [value, low, high, ...]."""
    values = _tensor([list(row[:3]) for row in rows])
    return drawing.Curve(label=label, x=torch.tensor(x), y=values[:, 0], low=values[:, 1], high=values[:, 2])


def _flows(part: Mapping[str, Any]) -> "Figure":
    layers = range(part["layers"])
    panels = []
    for window in part["windows"]:
        curves = []
        for name, by_window in part["flows"].items():
            cells = by_window[str(window)]
            rows = list(zip(cells["change"], cells["low"], cells["high"], strict=True))
            curves.append(_curve(name, rows, layers))
        title = "one layer cut" if window == 1 else f"{window} layers cut together"
        panels.append(drawing.CurvePanel(curves=curves, title=title))
    titles = "Attention between groups of tokens cut", f"Mean over {part['count']} facts; bands: 95% intervals"
    return drawing.curves_figure(panels, titles=titles, y_label="change of the probability, %")


def _emergence(part: Mapping[str, Any]) -> "Figure":
    curves = []
    for place, cells in part["places"].items():
        curves.append(_curve(place.replace("_", " "), cells["leads"], range(-1, len(cells["leads"]) - 1)))
    titles = "When the answer leads", f"Share of {part['count']} facts; bands: 95% intervals; -1 is the embedding"
    return drawing.curves_figure([drawing.CurvePanel(curves=curves)], titles=titles, y_label="share of facts")


def _tokens(part: Mapping[str, Any]) -> "Figure":
    x = [*part["keep"]]
    curves = [_curve(name, part[key], x) for name, key in (("largest contributions", "best"), ("at random", "random"))]
    panel = drawing.CurvePanel(curves=curves, x_label=f"image tokens that stay, of {part['tokens']}")
    titles = "Answers that a few image tokens keep", f"Share of {part['count']} facts; bands: 95% intervals"
    return drawing.curves_figure([panel], titles=titles, y_label="share of answers")


def _cliff(part: Mapping[str, Any]) -> "Figure":
    panel = drawing.CurvePanel(curves=[_curve("answers that stay", part["stays"], part["layers"])])
    titles = "All image tokens dropped from a layer on", f"Share of {part['count']} facts; bands: 95% intervals"
    return drawing.curves_figure([panel], titles=titles, y_label="share of answers")
