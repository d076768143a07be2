"""What an evaluation found: every question with both raw answers, and the means that follow from them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from ...artefacts import Result, drawing, files, from_plain
from ...artefacts.drawing.styles import DASH_DOT, DASHED, DOTTED, LineStyle
from ...data.facts import ASPECTS, EDITED, EFFICACY, GENERALITY, KINDS, LOCALITY, counted
from ...models import VisionLanguageModel
from ..requests import FAILED, NOT_GENERATED, EditError
from .metrics import EXACT, SPLITS, UNCHANGED, Interval, bootstrap_interval, split_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_Kind = TypeVar("_Kind")

ALL = "all"
MEANS = {"efficacy": EXACT, "generality": EXACT, "locality": UNCHANGED}
"""What is measured at every point -> its protocol."""
_STYLES = {
    "efficacy": LineStyle(colour="#0072B2", marker="o"),
    "generality": LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    "locality": LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    "retention": LineStyle(colour="#CC79A7", dashes=DOTTED, marker="D"),
}
_HEADLINES = (EXACT, UNCHANGED)
Pair = tuple[float, float]
"""A number of the unedited and of the edited model."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation measures. Raises `EditError` for numbers out of range."""

    forced: bool = True
    """Also measure how the model predicts given answers (teacher forcing), which about doubles the time. False
    measures free generation only."""
    max_new_tokens: int = 16
    """Maximum length of a free answer in tokens."""
    fluency_tokens: int = 0
    """Length in tokens of the free answers whose fluency is measured, for edited questions; 0 skips fluency."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.fluency_tokens < 0:
            raise EditError(
                f"got max_new_tokens={self.max_new_tokens} and fluency_tokens={self.fluency_tokens}; "
                "pass at least 1 and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A question that was not asked, and why."""

    record: str
    kind: str
    question: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """One question, what both models said, and its numbers."""

    record: str
    kind: str
    hops: int | None
    question: str
    pictures: tuple[str, ...]
    """Its pictures: the name of each file, if there is one, and the start of the SHA-256 of the content."""
    new: str
    """The answer that should come with the edit; where the answer should stay, the one that should not."""
    old: str
    """The present answer: as the caller knows it, else what the unedited model says."""
    before: str
    """The unedited model's free answer."""
    after: str
    """The edited model's free answer."""
    numbers: Mapping[str, Pair]
    """Protocol -> (unedited, edited)."""

    @property
    def aspect(self) -> str:
        """What it measures."""
        return KINDS[self.kind][0]


@dataclass(frozen=True, kw_only=True)
class EditScore:
    """The mean of one number over the questions of one kind, of the unedited and of the edited model."""

    aspect: str
    kind: str
    """Kind of question, with its hops for portability; "all" of the aspect."""
    protocol: str
    before: Interval
    after: Interval


@dataclass(frozen=True, kw_only=True)
class SequencePoint:
    """All edits so far, measured after one more."""

    edits: int
    """How many edits were asked for so far, those that failed included."""
    efficacy: Interval
    generality: Interval
    locality: Interval
    first_holds: bool | None
    """The first edit's own question still gives its target; None if it did not right after the edit."""
    retention: float
    """Of the edits that gave their target right after they were made, the share that still do; NaN for none."""
    growth: float
    """Largest relative growth of the Frobenius norm of an edited weight since the start; 0.1 is ten percent."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the point from the plain values of its fields. Raises `EditError` if they are not whole."""
        return _loaded(cls, "a point of a sequence", content)


@dataclass(frozen=True, kw_only=True, repr=False)
class EditCurve(Result):
    """A sequence of edits, each on top of the others. Part of the report of `evaluate(mode="sequence")`."""

    layout: ClassVar[str] = "multrace edit curve 4"

    model: str
    revision: str | None
    points: tuple[SequencePoint, ...]
    statuses: Mapping[str, str]
    """Record -> "edited", "not generated", "nothing to do", or "failed: " and why."""
    bound: float
    """The growth from which on a warning is due."""
    exceeded_at: int | None
    """The number of edits at which the growth first passed the bound."""
    stopped_at: int | None = None
    """The number of edits after which the sequence was stopped for that, if that was asked for."""

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
        """Return a table with one row per point: edits; mean, low and high of each measure; retention and growth."""
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
            }
            for point in self.points
        )

    def summary(self) -> str:
        """Return the points as text, one per line; shares are in percent, with their 95 % intervals."""
        titles = (f"{name} ({protocol})" for name, protocol in MEANS.items())
        lines: list[tuple[object, ...]] = [("edits", *titles, "first edit", "retention", "norm growth")]
        for point in self.points:
            bands = (getattr(point, name) for name in MEANS)
            shares = (f"{100 * each.mean:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})" for each in bands)
            first = {None: "never held", True: "holds", False: "lost"}[point.first_holds]
            lines.append((point.edits, *shares, first, f"{100 * point.retention:.1f}", f"{point.growth:+.2%}"))
        tail = [f"{name}: {status}" for name, status in self.statuses.items() if status.startswith("failed")]
        if self.exceeded_at is not None:
            tail.append(f"the norm of an edited weight had grown by more than {self.bound:.0%} at {self.exceeded_at}")
        return "\n".join([*aligned(lines), *tail])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of each measure against the number of edits, with 95 % bands.

        The figure is also written if a path is given (png, pdf or svg). Raises `ArtefactError` if that fails.
        """
        edits = torch.tensor([point.edits for point in self.points], dtype=torch.float64)
        curves = []
        for name, style in _STYLES.items():
            values = [getattr(point, name) for point in self.points]
            label = f"{name}: {MEANS[name]}" if name in MEANS else "retention: still as right after the edit"
            parts = {"y": [value.mean if name in MEANS else value for value in values]}
            if name in MEANS:
                parts |= {end: [getattr(value, end) for value in values] for end in ("low", "high")}
            tensors = {part: 100 * torch.tensor(numbers, dtype=torch.float64) for part, numbers in parts.items()}
            if not tensors["y"].isnan().all():  # else nothing of that kind was asked
                curves.append(drawing.Curve(label=label, x=edits, style=style, **tensors))
        failed = sum(status.startswith("failed") for status in self.statuses.values())
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
        """Write the curve as a JSON file with a digest, whole or not at all, and return the path."""
        return files.write_json(path, self.layout, asdict(self), error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the curve that `save` wrote. Raises `EditError` if the file is missing or damaged."""
        return _loaded(cls, path, files.read_json(path, cls.layout, error=EditError))


@dataclass(frozen=True, kw_only=True, repr=False)
class EditReport(Result):
    """The evaluation of edits: every question with both answers, and the scores that follow. Made by `evaluate`.

    It is saved as JSON, since it has texts and no tensors.
    """

    layout: ClassVar[str] = "multrace edit report 5"

    model: str
    """Name or path of the model."""
    revision: str | None
    mode: str
    """"single": one edit at a time; "batch": all edits in the model at once; "sequence": one on top of the other."""
    settings: Mapping[str, str]
    """What was measured and how, as text."""
    rows: tuple[ProbeRow, ...]
    statuses: Mapping[str, str]
    """Record -> "edited", "not generated" if its own question is not answered with the target afterwards, "nothing to
    do", or "failed: " and why; the questions of a failed record met the unedited model."""
    left_out: tuple[LeftOut, ...] = ()
    """Questions that were not asked, and why: their answers depend on edits that are or are not in the model."""
    curve: EditCurve | None = None
    """The points on the way, in mode "sequence"."""
    seed: int = 0
    """Random seed of the bootstrap."""

    @classmethod
    def of(
        cls,
        vlm: VisionLanguageModel,
        mode: str,
        settings: EvaluationSettings,
        rows: Sequence[ProbeRow],
        **parts: Any,
    ) -> Self:
        """Return the report on these rows of a model; parts are the further fields."""
        return cls(
            model=vlm.name,
            revision=vlm.revision,
            mode=mode,
            settings={name: str(value) for name, value in asdict(settings).items()},
            rows=tuple(rows),
            seed=settings.seed,
            **parts,
        )

    def _lines(self) -> tuple[str, str]:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        failed += f", {len(self.not_generated)} not generated" if self.not_generated else ""
        line = f"EditReport of {self.model!r}, mode {self.mode!r}: {counted(len(self.statuses), 'edit')}{failed}"
        shown = []
        for aspect, protocol in MEANS.items():
            if any(row.aspect == aspect and protocol in row.numbers for row in self.rows):
                score = self.score(aspect, protocol)
                shown.append(f"{aspect} {score.after.mean:.0%} (unedited {score.before.mean:.0%})")
        return f"{line}, {counted(len(self.rows), 'question')}", ", ".join(shown)

    def scores(self) -> tuple[EditScore, ...]:
        """Return the mean and 95 % interval (bootstrap by record) of every protocol, by aspect and kind of question."""
        found = []
        for aspect in ASPECTS:
            own = [row for row in self.rows if row.aspect == aspect]
            names = [name for kind in KINDS for name in dict.fromkeys(map(_name, own)) if name.split(",")[0] == kind]
            groups = {ALL: own} if own else {}
            if len(names) > 1:
                groups |= {name: [row for row in own if _name(row) == name] for name in names}
            for kind, rows in groups.items():
                protocols = dict.fromkeys(protocol for row in rows for protocol in row.numbers)
                found += [self._score(aspect, kind, protocol, rows) for protocol in protocols]
        return tuple(found)

    def score(self, aspect: str, protocol: str, kind: str = ALL) -> EditScore:
        """Return one of the scores. Raises `EditError` if there is none."""
        chosen = [row for row in self.rows if row.aspect == aspect and kind in (ALL, row.kind, _name(row))]
        if not any(protocol in row.numbers for row in chosen):
            found = sorted({f"{score.aspect}/{score.kind}/{score.protocol}" for score in self.scores()})
            raise EditError(f"no score {aspect}/{kind}/{protocol}; this report has: {'; '.join(found)}")
        return self._score(aspect, kind, protocol, chosen)

    def splits(self) -> Mapping[str, str]:
        """Record -> what kind of success its edit is (`metrics.split_of`); only edits that free generation shows."""
        by_record: dict[str, list[ProbeRow]] = {}
        for row in self.rows:
            by_record.setdefault(row.record, []).append(row)
        return {
            name: split_of(moved=_shown(rows, GENERALITY, EXACT), kept=_shown(rows, LOCALITY, UNCHANGED))
            for name, rows in by_record.items()
            if _shown(rows, EFFICACY, EXACT) == [True]
        }

    def split_shares(self) -> Mapping[str, float]:
        """Share of the successful edits that are "generalised", "too narrow", "too broad" or "both"; NaN for none."""
        found = [*self.splits().values()]
        return {name: found.count(name) / len(found) if found else float("nan") for name in SPLITS}

    @property
    def failed(self) -> Mapping[str, str]:
        """Record -> why it could not be edited."""
        return {name: status for name, status in self.statuses.items() if status.startswith(FAILED)}

    @property
    def not_generated(self) -> Mapping[str, str]:
        """Record -> what the edited model says in place of its target."""
        said = {row.record: row.after for row in self.rows if row.kind == EDITED}
        return {name: said[name] for name, status in self.statuses.items() if status == NOT_GENERATED}

    def generations(self) -> tuple[Mapping[str, Any], ...]:
        """Return every question with both raw answers, as plain values that fill one line each."""
        rows = (asdict(row) | {"pictures": list(row.pictures)} for row in self.rows)
        return tuple({key: value for key, value in row.items() if key != "numbers"} for row in rows)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score: what it is of, mean and interval before and after, values, records."""
        import pandas as pd

        return pd.DataFrame(
            {
                **{name: getattr(score, name) for name in ("aspect", "kind", "protocol")},
                **_columns("before", score.before),
                **_columns("after", score.after),
                "number": score.after.number,
                "records": score.after.records,
            }
            for score in self.scores()
        )

    def summary(self, *, protocols: Iterable[str] | None = None) -> str:
        """Return the scores as text, one per line, the unedited model beside the edited one; shares are in percent."""
        wanted = None if protocols is None else set(protocols)
        scores = [score for score in self.scores() if wanted is None or score.protocol in wanted]
        titles = ("aspect", "kind", "protocol", "unedited", "edited", "95 % interval", "values", "records")
        lines: list[tuple[object, ...]] = [titles]
        for score in scores:
            after = score.after
            texts = [_text(score.protocol, value) for value in (score.before.mean, after.mean, after.low, after.high)]
            band = f"{texts[2]} to {texts[3]}"
            lines.append((score.aspect, score.kind, score.protocol, *texts[:2], band, after.number, after.records))
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.split_shares().items())
        tail = [f"of {len(self.splits())} successful edits: {shares}"] if self.splits() else []
        if self.left_out:
            tail.append(
                f"left out: {counted(len(self.left_out), 'question')} that other edits change or that need them"
            )
        tail += [f"{name}: not generated; the model says {said!r}" for name, said in self.not_generated.items()]
        tail += [f"{name}: {status}" for name, status in self.failed.items()]
        return "\n".join([*aligned(lines), *tail])

    def headlines(self) -> str:
        """Return the table of free generation alone."""
        return self.summary(protocols=_HEADLINES)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of the scores of free generation by kind of question, of both states, with 95 % intervals.

        The figure is also written if a path is given (png, pdf or svg). Raises `ArtefactError` if that fails, or if
        nothing was asked.
        """
        scores = [score for score in self.scores() if score.protocol in _HEADLINES]
        labels = [f"{score.aspect}, {score.kind}: {score.protocol}" for score in scores]
        titles = (f"{counted(len(self.statuses), 'edit')}, mode {self.mode!r}", self.model)
        figure, body = drawing.titled_figure(9.5, 1.2 + 0.3 * len(scores), titles)
        axes = body.subplots()
        for state, offset, style in (("before", -0.14, _STYLES["retention"]), ("after", 0.14, _STYLES["efficacy"])):
            for place, score in enumerate(scores):
                interval = getattr(score, state)
                line = {"color": style.colour, "marker": style.marker, "linestyle": "none"}
                name = {"before": "unedited", "after": "edited"}[state] if place == 0 else None
                axes.plot(100 * interval.mean, place + offset, label=name, **line)
                axes.plot([100 * interval.low, 100 * interval.high], [place + offset] * 2, color=style.colour)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(-2, 102)
        axes.legend(frameon=False)
        drawing.dress(axes, x_label="share of questions, %")
        return drawing.finished(figure, path)

    def save(self, path: str | Path) -> Path:
        """Write rows and scores as a JSON file with a digest, whole or not at all, and return the path."""
        scores = json.loads(self.to_dataframe().to_json(orient="records"))
        return files.write_json(path, self.layout, {**asdict(self), "scores": scores}, error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the report that `save` wrote. Raises `EditError` if the file is missing or damaged."""
        content = files.read_json(path, cls.layout, error=EditError)
        content.pop("scores", None)  # they follow from the rows
        report = _loaded(cls, path, content)
        if problem := report._problem():
            raise EditError(f"the report in {str(path)!r} has {problem}; evaluate again")
        return report

    def _problem(self) -> str | None:
        if self.seed < 0:
            return "a negative seed"
        unknown = sorted({row.kind for row in self.rows} - KINDS.keys())
        return f"questions of the unknown kind {unknown[0]!r}" if unknown else None

    def _score(self, aspect: str, kind: str, protocol: str, rows: Sequence[ProbeRow]) -> EditScore:
        chosen = [row for row in rows if protocol in row.numbers]
        records = [row.record for row in chosen]
        means = [
            bootstrap_interval([row.numbers[protocol][state] for row in chosen], records, seed=self.seed)
            for state in (0, 1)
        ]
        return EditScore(aspect=aspect, kind=kind, protocol=protocol, before=means[0], after=means[1])


def aligned(lines: Sequence[Sequence[object]]) -> list[str]:
    """Return rows of cells as lines; every column is as wide as its longest cell."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = np.max([[len(cell) for cell in line] for line in cells], axis=0)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _loaded(kind: type[_Kind], path: str | Path, words: Mapping[str, Any]) -> _Kind:
    """Return a report or a curve from its plain values. Raises `EditError` if they do not have the right types."""
    try:
        return from_plain(kind, words)
    except (KeyError, TypeError, ValueError) as error:
        raise EditError(
            f"what '{path}' holds is no whole {kind.__name__} ({str(error)[:200]}); evaluate again"
        ) from error


def _name(row: ProbeRow) -> str:
    return row.kind if row.hops is None else f"{row.kind}, {row.hops} hops"


def _shown(rows: Sequence[ProbeRow], aspect: str, protocol: str) -> list[bool]:
    """Whether the edited model does as it should at each question of the aspect to which the protocol applies."""
    return [row.numbers[protocol][1] == 1 for row in rows if row.aspect == aspect and protocol in row.numbers]


def _columns(state: str, interval: Interval) -> dict[str, float]:
    return {state: interval.mean, f"{state}_low": interval.low, f"{state}_high": interval.high}


def _text(protocol: str, value: float) -> str:
    """In percent if the number is a share."""
    return f"{value:.4g}" if any(word in protocol for word in ("nats", "bits", " - ")) else f"{100 * value:.1f}"
