"""The report of the demo: a self-contained HTML page (pictures inside, user text escaped), and a bar chart."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from .verification import PROBES, ProbeAnswers, ProbeScore


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows; texts are plain and escaped when the page is made."""

    title: str
    subtitle: str
    reason: str
    """Why the trace chose the site."""
    undo: str
    """Whether undoing restored the weights."""
    scores: Sequence[ProbeScore]
    chart: tuple[Path, str]
    """The scores as a picture: (picture file, caption)."""
    plots: Sequence[tuple[Path, str]]
    """The traces as pictures: (picture file, caption)."""
    facts: Sequence[Sequence[ProbeAnswers]]
    """The probes of every fact, the edited question first."""


def write_report(report: Report, path: Path) -> Path:
    """Write the page and return its path."""
    environment = Environment(
        loader=PackageLoader("multrace.scripts", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=report.title,
        subtitle=report.subtitle,
        reason=report.reason,
        undo=report.undo,
        scores=_score_rows(report.scores),
        chart=_figure(*report.chart),
        plots=[_figure(file, caption) for file, caption in report.plots],
        facts=[_fact(probes) for probes in report.facts],
    )
    path.write_text(page, encoding="utf-8")
    return path


def plot_scores(scores: Sequence[ProbeScore], path: Path) -> Path:
    """Return the written PNG: for every kind of probe, the shares of right answers unedited, edited and undone."""
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
    kept = [score.kind for score in scores if not PROBES[score.kind][1]]
    return [
        {
            "label": PROBES[score.kind][0],
            "number": score.number,
            "starts_locality": kept[:1] == [score.kind],
            **{state: f"{getattr(score, state):.0%}" for state in ("unedited", "edited", "undone")},
        }
        for score in scores
    ]


def _fact(probes: Sequence[ProbeAnswers]) -> Mapping[str, Any]:
    first, record = probes[0], probes[0].record
    start = record.text.index(record.constraint)
    end = start + len(record.constraint)
    return {
        "picture": _image_source(record.image),
        "before": record.text[:start],
        "constraint": record.text[start:end],
        "after": record.text[end:],
        "target": record.answer,
        "unedited": first.unedited,
        "edited": first.edited,
        "is_right": first.is_right("edited"),
        "failures": sum(not probe.is_right("edited") for probe in probes[1:]),
        "probes": [_probe(probe) for probe in probes[1:]],
    }


def _probe(probe: ProbeAnswers) -> Mapping[str, Any]:
    return {
        "picture": _image_source(probe.record.image),
        "question": probe.record.text,
        "kind": PROBES[probe.kind][0],
        "answer": probe.record.answer,
        "unedited": probe.unedited,
        "edited": probe.edited,
        "is_right": probe.is_right("edited"),
    }


def _image_source(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_source(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
