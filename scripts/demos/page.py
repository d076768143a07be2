"""The report of a demo: one HTML page that needs no other file, and the chart of its scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from .answers import PROBES, STATES, ProbeScore, VerifiedQuestion

if TYPE_CHECKING:
    from ...data import Question


@dataclass(frozen=True, kw_only=True)
class ReportedFact:
    """An edited fact: the answers around its edit, and its own trace."""

    probes: Sequence[VerifiedQuestion]
    """The edited question first."""
    leak: str = ""
    """Predicted leak of the edit in words; empty where it is not known."""
    trace: tuple[Path, str] | None = None
    """The trace as a picture: (picture file, caption); None if the fact has none of its own."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows, in plain texts, which are escaped when the page is made."""

    title: str
    subtitle: str
    reason: str
    """Why the trace chose the site."""
    undo: str
    """Whether undoing restored the weights."""
    rule: str
    """How answers are marked."""
    notes: Sequence[str] = ()
    """What was not as expected."""
    scores: Sequence[ProbeScore]
    chart: tuple[Path, str]
    """The scores as a picture: (picture file, caption)."""
    plots: Sequence[tuple[Path, str]]
    """The traces as pictures: (picture file, caption)."""
    facts: Sequence[ReportedFact]


def write_report(report: Report, path: Path) -> Path:
    """Write the page and return its path."""
    environment = Environment(
        loader=PackageLoader("multrace.scripts.demos", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=report.title,
        subtitle=report.subtitle,
        reason=report.reason,
        undo=report.undo,
        rule=report.rule,
        notes=report.notes,
        scores=_score_rows(report.scores),
        chart=_figure(*report.chart),
        plots=[_figure(file, caption) for file, caption in report.plots],
        facts=[_fact(fact) for fact in report.facts],
    )
    path.write_text(page, encoding="utf-8")
    return path


def plot_scores(scores: Sequence[ProbeScore], path: Path) -> Path:
    """Draw the shares of right answers, unedited, edited and undone, for each kind of probe; return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.62 * len(scores) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {"unedited": "#b8c0cc", "edited": "#2f6f4f", "undone": "#7c8797"}
    for offset, (state, colour) in enumerate(colours.items()):
        places = [row + (offset - 1) * 0.27 for row in range(len(scores))]
        shares = [getattr(score, state) for score in scores]
        bars = axes.barh(places, shares, height=0.25, color=colour, label=state)
        axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    axes.set_yticks(range(len(scores)), [PROBES[score.kind][0] for score in scores])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of answers that are right after the edit")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=150)
    return path


def _figure(file: Path, caption: str) -> Mapping[str, str]:
    return {"caption": caption, "source": _file_source(file)}


def _score_rows(scores: Sequence[ProbeScore]) -> list[Mapping[str, Any]]:
    locality = [score.kind for score in scores if not PROBES[score.kind][1]]
    return [
        {
            "label": PROBES[score.kind][0],
            "number": score.number,
            "starts_locality": locality[:1] == [score.kind],
            **{state: f"{getattr(score, state):.0%}" for state in STATES},
        }
        for score in scores
    ]


def _fact(fact: ReportedFact) -> Mapping[str, Any]:
    probes = fact.probes
    first, text, constraint = probes[0].answers, probes[0].question.text, str(probes[0].question.constraint)
    start = text.index(constraint)
    end = start + len(constraint)
    return {
        "picture": _image_source(probes[0].question),
        "before": text[:start],
        "constraint": text[start:end],
        "after": text[end:],
        "target": first.wanted,
        "unedited": first.unedited,
        "edited": first.edited,
        "is_right": probes[0].is_right("edited"),
        "leak": fact.leak,
        "trace": _figure(*fact.trace) if fact.trace else None,
        "failures": sum(not probe.is_right("edited") for probe in probes[1:]),
        "probes": [_probe(probe) for probe in probes[1:]],
    }


def _probe(probe: VerifiedQuestion) -> Mapping[str, Any]:
    return {
        "picture": _image_source(probe.question),
        "question": probe.question.text,
        "kind": PROBES[probe.kind][0],
        "answer": probe.answers.wanted,
        "unedited": probe.answers.unedited,
        "edited": probe.answers.edited,
        "is_right": probe.is_right("edited"),
    }


def _image_source(question: Question) -> str | None:
    """Return the picture of a question as a data URL, or None if it has none."""
    if not question.images:
        return None
    buffer = io.BytesIO()
    cast(Image.Image, question.images[0]).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_source(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
