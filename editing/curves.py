"""What is left of edits as more of them follow: points of a sequence, as numbers, text, file and picture."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .errors import EditError
from .metrics import EXACT, UNCHANGED, Interval
from .report_files import read_report, write_whole
from .reports import aligned

FORMAT = "multrace edit curve 1"
MEANS = {"efficacy": EXACT, "generality": EXACT, "locality": UNCHANGED}
"""What is measured at every point -> its protocol."""
_STYLES = {
    "efficacy": ("#0072B2", "o", "-"),
    "generality": ("#009E73", "^", (0, (5, 1.4, 1.2, 1.4))),
    "locality": ("#E69F00", "s", (0, (4, 1.6))),
    "retained": ("#CC79A7", "D", (0, (1.2, 1.4))),
}
_FORMATS = ("png", "pdf", "svg")


@dataclass(frozen=True, kw_only=True)
class SequencePoint:
    """All edits so far, measured after one more."""

    edits: int
    """How many edits were asked for so far, those that failed included."""
    efficacy: Interval
    generality: Interval
    locality: Interval
    first_retained: bool | None
    """The first edit's own question still gives its target; None if it did not right after the edit."""
    retained: float
    """Of the edits that gave their target right after they were made, the share that still do; NaN for none."""
    growth: float
    """Largest relative growth of the Frobenius norm of an edited weight since the start; 0.1 is ten percent."""


@dataclass(frozen=True, kw_only=True)
class EditCurve:
    """A sequence of edits, each on top of the others. Made by `evaluate_sequentially`."""

    model: str
    revision: str | None
    points: tuple[SequencePoint, ...]
    statuses: Mapping[str, str]
    """Record -> "edited", "nothing to do", or "failed: " and why."""
    bound: float
    """The growth from which on a warning is due."""
    exceeded_at: int | None
    """The number of edits at which the growth first passed the bound."""
    stopped_at: int | None = None
    """The number of edits after which the sequence was stopped for that, if that was asked for."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per point: edits; mean, low and high of each measure; retention and growth."""
        return pd.DataFrame(
            {
                "edits": point.edits,
                **{
                    f"{name}{end}": getattr(getattr(point, name), part)
                    for name in MEANS
                    for end, part in (("", "mean"), ("_low", "low"), ("_high", "high"))
                },
                **{name: getattr(point, name) for name in ("first_retained", "retained", "growth")},
            }
            for point in self.points
        )

    def table(self) -> str:
        """The points as text, one per line; shares in percent with their 95 % intervals."""
        titles = (f"{name} ({protocol})" for name, protocol in MEANS.items())
        lines: list[tuple[object, ...]] = [("edits", *titles, "first edit", "retained", "norm growth")]
        for point in self.points:
            bands = (getattr(point, name) for name in MEANS)
            shares = (f"{100 * each.mean:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})" for each in bands)
            first = {None: "never held", True: "holds", False: "lost"}[point.first_retained]
            lines.append((point.edits, *shares, first, f"{100 * point.retained:.1f}", f"{point.growth:+.2%}"))
        tail = [f"{name}: {status}" for name, status in self.statuses.items() if status.startswith("failed")]
        if self.exceeded_at is not None:
            tail.append(f"the norm of an edited weight had grown by more than {self.bound:.0%} at {self.exceeded_at}")
        return "\n".join([*aligned(lines), *tail])

    def plot(self, path: str | Path) -> Path:
        """The path of the picture written (png, pdf or svg): each measure against the number of edits, with bands."""
        kind = Path(path).suffix.lstrip(".").lower()
        if kind not in _FORMATS:
            raise EditError(f"cannot draw to '{path}': pass a name that ends in {', '.join(_FORMATS)}")
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes, edits = figure.add_subplot(), [point.edits for point in self.points]
        for name, (colour, marker, dashes) in _STYLES.items():
            values = [getattr(point, name) for point in self.points]
            means = [100 * (each.mean if name in MEANS else each) for each in values]
            if all(map(math.isnan, means)):  # nothing of that kind was asked
                continue
            label = f"{name}: {MEANS[name]}" if name in MEANS else "retained: still as right after the edit"
            axes.plot(edits, means, color=colour, marker=marker, linestyle=dashes, label=label)
            if name in MEANS:
                lows, highs = ([100 * getattr(each, end) for each in values] for end in ("low", "high"))
                axes.fill_between(edits, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="edits in sequence", ylabel="share of questions, %", ylim=(-2, 102))
        if len(edits) > 1 and edits[-1] > 10 * edits[0]:
            axes.set_xscale("log")
        axes.set_xticks(edits, [str(each) for each in edits], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150)
        return write_whole(path, content.getvalue())

    def save(self, path: str | Path) -> Path:
        """The path of the JSON file written, whole or not at all."""
        return write_whole(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The curve in a file that save wrote. EditError if it is missing or damaged."""
        words = read_report(path, FORMAT)
        try:
            points = tuple(_point(each) for each in words["points"])
            return cls(**{name: value for name, value in words.items() if name != "format"} | {"points": points})
        except (KeyError, TypeError, AttributeError) as error:
            raise EditError(f"the curve in '{path}' is damaged ({error!r}); evaluate again") from error


def _point(words: Mapping[str, Any]) -> SequencePoint:
    return SequencePoint(**{**words, **{name: Interval(**words[name]) for name in MEANS}})
