"""The course of a sequence of edits: what was measured after each number of edits, as a table and a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from ...artefacts import Result, drawing, files, from_plain
from ...artefacts.drawing.styles import DASH_DOT, DASHED, DOTTED, LineStyle
from ...data.facts import counted
from ..requests import FAILED, EditError
from .metrics import EXACT, UNCHANGED, Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Kind = TypeVar("Kind")

MEANS = {"efficacy": EXACT, "generality": EXACT, "locality": UNCHANGED}
"""What is measured at every point of a sequence -> its protocol."""
STYLES = {
    "efficacy": LineStyle(colour="#0072B2", marker="o"),
    "generality": LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    "locality": LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    "retention": LineStyle(colour="#CC79A7", dashes=DOTTED, marker="D"),
}


@dataclass(frozen=True, kw_only=True)
class SequencePoint:
    """The state of a sequence after some number of edits: all questions of these edits, measured together."""

    edits: int
    """Number of edits so far, those that failed included."""
    efficacy: Interval
    """Share of edited questions that are answered with their targets ("free generation, exact match")."""
    generality: Interval
    """The same share for the probes of generality."""
    locality: Interval
    """Share of probes of locality whose answers are those of the unedited model ("free generation, unchanged")."""
    first_holds: bool | None
    """Whether the question of the first edit still gets its target; None if it did not right after the edit."""
    retention: float
    """Of the edits whose question got its target right after the edit, the share for which it still does; NaN if there
    are none."""
    growth: float
    """Largest relative growth of the Frobenius norm of any edited weight after any edit so far; 0.1 is ten percent."""
    perplexity: Interval | None = None
    """Mean perplexity of the texts that the unedited model sampled, or, without any, of the caller's; None if there are
    none."""
    perplexity_before: float | None = None
    """The same mean for the unedited model."""
    cloze: Interval | None = None
    """Share of the cloze questions, all of which the unedited model answers rightly, that still get the same answer
    ("free generation, unchanged"); None if there are none."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the point from the plain values of its fields. Raises `EditError` if some are missing or wrong."""
        return loaded(cls, "a point of a sequence", content)


@dataclass(frozen=True, kw_only=True, repr=False)
class EditCurve(Result):
    """The course of a sequence of edits, each made on top of the earlier ones.

    It is part of the report of `evaluate(mode="sequence")` and is saved as JSON.
    """

    layout: ClassVar[str] = "multrace edit curve 5"

    model: str
    """Name or path of the model."""
    revision: str | None
    """Revision of the model; None if it has none."""
    points: tuple[SequencePoint, ...]
    """The measurements, in order of the number of edits."""
    statuses: Mapping[str, str]
    """Record -> "edited", "not generated", "nothing to do", or "failed: " and the reason, at the last point."""
    bound: float
    """Relative growth of a weight's norm beyond which a warning is logged."""
    exceeded_at: int | None
    """Number of edits at which the growth first exceeded the bound; None if it never did."""
    stopped_at: int | None = None
    """Number of edits after which the sequence was stopped because of that; None if it went on to its end."""

    def _lines(self) -> tuple[str, str]:
        edits, points = counted(len(self.statuses), "edit"), counted(len(self.points), "point")
        line = f"EditCurve of {self.model!r}: {edits} in sequence, measured at {points}"
        if not self.points:
            return line, "no point was measured"
        last = self.points[-1]
        means = {name: getattr(last, name).mean for name in MEANS}
        shown = "".join(f"{name} {mean:.0%}, " for name, mean in means.items() if not math.isnan(mean))
        return line, f"after {last.edits}: {shown}norm growth {last.growth:+.1%}"

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per point: the number of edits, then mean, low and high of each measure.

        The last columns are `first_holds`, `retention`, `growth`, and the means `perplexity`, `perplexity_before` and
        `cloze`, None where they were not measured.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "edits": point.edits,
                **{
                    f"{name}{end}": getattr(getattr(point, name), part)
                    for name in MEANS
                    for end, part in (("", "mean"), ("_low", "low"), ("_high", "high"))
                },
                **{name: getattr(point, name) for name in ("first_holds", "retention", "growth")},
                "perplexity": None if point.perplexity is None else point.perplexity.mean,
                "perplexity_before": point.perplexity_before,
                "cloze": None if point.cloze is None else point.cloze.mean,
            }
            for point in self.points
        )

    def summary(self) -> str:
        """Return the points as a text table, one line each; shares are in percent, with their 95 % intervals.

        Below it come the edits that failed, and where the norm of a weight exceeded the bound.
        """
        titles = (f"{name} ({protocol})" for name, protocol in MEANS.items())
        ability = {
            "perplexity (unedited)": any(point.perplexity is not None for point in self.points),
            f"cloze ({UNCHANGED})": any(point.cloze is not None for point in self.points),
        }
        more = [title for title, is_measured in ability.items() if is_measured]
        lines: list[tuple[object, ...]] = [("edits", *titles, "first edit", "retention", "norm growth", *more)]
        for point in self.points:
            bands = (getattr(point, name) for name in MEANS)
            shares = (f"{100 * each.mean:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})" for each in bands)
            first = {None: "never held", True: "holds", False: "lost"}[point.first_holds]
            row = (point.edits, *shares, first, f"{100 * point.retention:.1f}", f"{point.growth:+.2%}")
            lines.append((*row, *_ability_cells(point)))
        tail = [f"{name}: {status}" for name, status in self.statuses.items() if status.startswith(FAILED)]
        if self.exceeded_at is not None:
            tail.append(f"the norm of an edited weight had grown by more than {self.bound:.0%} at {self.exceeded_at}")
        return "\n".join([*aligned(lines), *tail])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of each measure against the number of edits, with 95 % bands.

        Measures for which no questions were asked are left out. The figure is also written to the path if one is given
        (png, pdf or svg). Raises `ArtefactError` if that fails.
        """
        edits = torch.tensor([point.edits for point in self.points], dtype=torch.float64)
        curves = []
        for name, style in STYLES.items():
            values = [getattr(point, name) for point in self.points]
            label = f"{name}: {MEANS[name]}" if name in MEANS else "retention: still as right after the edit"
            parts = {"y": [value.mean if name in MEANS else value for value in values]}
            if name in MEANS:
                parts |= {end: [getattr(value, end) for value in values] for end in ("low", "high")}
            tensors = {part: 100 * torch.tensor(numbers, dtype=torch.float64) for part, numbers in parts.items()}
            if not tensors["y"].isnan().all():  # else nothing of that kind was asked
                curves.append(drawing.Curve(label=label, x=edits, style=style, **tensors))
        failed = sum(status.startswith(FAILED) for status in self.statuses.values())
        titles = (f"{len(self.statuses)} edits in sequence", f"{self.model}" + (f"; {failed} failed" if failed else ""))
        panel = drawing.CurvePanel(curves=curves, x_label="edits in sequence")
        figure = drawing.curves_figure([panel], titles=titles, y_label="share of questions, %", reference=None)
        (axes,) = figure.axes
        axes.set_ylim(-2, 102)
        if len(edits) > 1 and edits[-1] > 10 * edits[0]:
            axes.set_xscale("log")
        axes.set_xticks(edits.tolist(), [f"{count:.0f}" for count in edits])
        axes.minorticks_off()
        return drawing.finished(figure, path)

    def save(self, path: str | Path) -> Path:
        """Write the curve as a JSON file with a digest, completely or not at all, and return the path.

        Raises `EditError` if the file cannot be written.
        """
        return files.write_json(path, self.layout, asdict(self), error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the curve that `save` wrote. Raises `EditError` if the file is missing, damaged or of another kind."""
        return loaded(cls, path, files.read_json(path, cls.layout, error=EditError))


def aligned(lines: Sequence[Sequence[object]]) -> list[str]:
    """Return one line of text per row of cells; each column is as wide as its longest cell."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = np.max([[len(cell) for cell in line] for line in cells], axis=0)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def loaded(kind: type[Kind], source: str | Path, content: Mapping[str, Any]) -> Kind:
    """Return a report or a curve from its plain values. Raises `EditError` if they do not have the right types."""
    try:
        return from_plain(kind, content)
    except (KeyError, TypeError, ValueError) as error:
        raise EditError(f"'{source}' holds no whole {kind.__name__} ({str(error)[:200]}); evaluate again") from error


def _ability_cells(point: SequencePoint) -> list[str]:
    """The cells of the perplexity and the cloze questions of a point, as far as they were measured."""
    cells = []
    if point.perplexity is not None:
        cells.append(f"{point.perplexity.mean:.4g} ({point.perplexity_before:.4g})")
    if point.cloze is not None:
        cells.append(f"{100 * point.cloze.mean:.1f} ({100 * point.cloze.low:.1f} to {100 * point.cloze.high:.1f})")
    return cells
