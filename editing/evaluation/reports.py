"""The results of an evaluation: every question with the answers of both models, and the means that follow from them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from ...artefacts import ArtefactError, Result, drawing, files, from_plain
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
"""What is measured at every point of a sequence -> its protocol."""
_STYLES = {
    "efficacy": LineStyle(colour="#0072B2", marker="o"),
    "generality": LineStyle(colour="#009E73", dashes=DASH_DOT, marker="^"),
    "locality": LineStyle(colour="#E69F00", dashes=DASHED, marker="s"),
    "retention": LineStyle(colour="#CC79A7", dashes=DOTTED, marker="D"),
}
_HEADLINES = (EXACT, UNCHANGED)
Pair = tuple[float, float]
"""One number for the unedited model and the same number for the edited model."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation measures. Raises `EditError` for a number that is out of range."""

    forced: bool = True
    """Also measure how the model predicts given answers (teacher forcing), which about doubles the time. False
    measures free generation only."""
    max_new_tokens: int = 16
    """Maximum length of a free answer in tokens."""
    fluency_tokens: int = 0
    """Maximum length in tokens of the answers to edited questions whose fluency is measured; 0 skips fluency."""
    seed: int = 0
    """Random seed of the bootstrap intervals, at least 0."""

    def __post_init__(self) -> None:
        for name, least in {"max_new_tokens": 1, "fluency_tokens": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise EditError(f"EvaluationSettings got {name}={getattr(self, name)}; pass at least {least}")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A question that was not asked, and why."""

    record: str
    """Id of the record."""
    kind: str
    """Kind of question, one of `data.facts.KINDS`."""
    question: str
    """Text of the question."""
    reason: str
    """Why it was left out, as text for people."""


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """One question with the free answers of both models and its numbers."""

    record: str
    """Id of the record."""
    kind: str
    """Kind of question, one of `data.facts.KINDS`."""
    hops: int | None
    """For portability, the number of steps from the edited fact to the answer; None if it is not known."""
    question: str
    """Text of the question."""
    pictures: tuple[str, ...]
    """For each picture of the question, the name of its file, if there is one, and the start of the SHA-256 of its
    content."""
    new: str
    """The answer that should come with the edit. If the answer should stay, the target, which must not replace it."""
    old: str
    """The present answer: what the caller said it is, else the free answer of the unedited model."""
    before: str
    """Free answer of the unedited model; empty if its logits are not finite."""
    after: str
    """Free answer of the edited model; empty if its logits are not finite."""
    numbers: Mapping[str, Pair]
    """Protocol -> (unedited, edited)."""

    @property
    def aspect(self) -> str:
        """The property of an edit that the question measures, one of `data.facts.ASPECTS`."""
        return KINDS[self.kind][0]


@dataclass(frozen=True, kw_only=True)
class EditScore:
    """The mean of one number over the questions of one kind, for the unedited and for the edited model."""

    aspect: str
    """What is measured, one of `data.facts.ASPECTS`."""
    kind: str
    """Kind of question, for portability with its number of hops; "all" for all questions of the aspect."""
    protocol: str
    """How it is measured, such as "free generation, exact match"."""
    before: Interval
    """The mean for the unedited model."""
    after: Interval
    """The mean for the edited model."""


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

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the point from the plain values of its fields. Raises `EditError` if some are missing or wrong."""
        return _loaded(cls, "a point of a sequence", content)


@dataclass(frozen=True, kw_only=True, repr=False)
class EditCurve(Result):
    """The course of a sequence of edits, each made on top of the earlier ones.

    It is part of the report of `evaluate(mode="sequence")` and is saved as JSON.
    """

    layout: ClassVar[str] = "multrace edit curve 4"

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

        The last columns are `first_holds`, `retention` and `growth`.
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
            }
            for point in self.points
        )

    def summary(self) -> str:
        """Return the points as a text table, one line each; shares are in percent, with their 95 % intervals.

        Below it come the edits that failed, and where the norm of a weight exceeded the bound.
        """
        titles = (f"{name} ({protocol})" for name, protocol in MEANS.items())
        lines: list[tuple[object, ...]] = [("edits", *titles, "first edit", "retention", "norm growth")]
        for point in self.points:
            bands = (getattr(point, name) for name in MEANS)
            shares = (f"{100 * each.mean:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})" for each in bands)
            first = {None: "never held", True: "holds", False: "lost"}[point.first_holds]
            lines.append((point.edits, *shares, first, f"{100 * point.retention:.1f}", f"{point.growth:+.2%}"))
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
        for name, style in _STYLES.items():
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
        return _loaded(cls, path, files.read_json(path, cls.layout, error=EditError))


@dataclass(frozen=True, kw_only=True, repr=False)
class EditReport(Result):
    """The evaluation of edits: every question with both answers, and the scores that follow. Made by `evaluate`.

    It holds texts and no tensors, and is saved as JSON.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro", id="winner")
        >>> report = mt.evaluate(vlm, [record], mt.MultEdit(layer=5, steps=25), progress=False)
        >>> report.statuses
        {'winner': 'edited'}
        >>> score = report.score("efficacy", "free generation, exact match")
        >>> score.before.mean, score.after.mean
        (0.0, 1.0)
    """

    layout: ClassVar[str] = "multrace edit report 5"

    model: str
    """Name or path of the model."""
    revision: str | None
    """Revision of the model; None if it has none."""
    mode: str
    """"single": one edit at a time; "batch": all edits in the model at once; "sequence": one on top of the other."""
    settings: Mapping[str, str]
    """What was measured, the fields of `EvaluationSettings` as text."""
    rows: tuple[ProbeRow, ...]
    """Every question that was asked."""
    statuses: Mapping[str, str]
    """Record -> "edited", "not generated" if its own question is not answered with the target afterwards, "nothing to
    do", or "failed: " and the reason. The questions of a failed record were answered without its edit: by the unedited
    model in mode "single", and by the model with the edits of the other records in the other modes."""
    left_out: tuple[LeftOut, ...] = ()
    """Questions that were not asked, since their answers depend on edits that are, or are not, in the model."""
    curve: EditCurve | None = None
    """The measurements during the sequence; None in the other modes."""
    seed: int = 0
    """Random seed of the bootstrap intervals, at least 0."""

    @classmethod
    def of(
        cls,
        vlm: VisionLanguageModel,
        mode: str,
        settings: EvaluationSettings,
        rows: Sequence[ProbeRow],
        **parts: Any,
    ) -> Self:
        """Return the report on these rows of a model.

        Args:
            vlm: The model; only its name and revision are read.
            mode: How the edits were made, as in the field `mode`.
            settings: What was measured.
            rows: The questions with both answers.
            **parts: The remaining fields by name; `statuses` has no default.
        """
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
        """Return the mean of every protocol with its 95 % interval (bootstrap by record), by aspect and kind.

        Each aspect comes first over all its questions (kind "all"), then by kind if it has several kinds.
        """
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
        """Return one score: the mean of one protocol over the questions of an aspect, or of one kind.

        Args:
            aspect: One of `data.facts.ASPECTS`, such as "efficacy".
            protocol: Name of the protocol, such as `evaluation.EXACT`.
            kind: Kind of question, with or without its hops ("portability, 2 hops"); "all" for the whole aspect.

        Raises:
            EditError: The report has no such score; the message lists those that it has.
        """
        chosen = [row for row in self.rows if row.aspect == aspect and kind in (ALL, row.kind, _name(row))]
        if not any(protocol in row.numbers for row in chosen):
            found = sorted({f"{score.aspect}/{score.kind}/{score.protocol}" for score in self.scores()})
            raise EditError(f"no score {aspect}/{kind}/{protocol}; this report has: {'; '.join(found)}")
        return self._score(aspect, kind, protocol, chosen)

    def splits(self) -> Mapping[str, str]:
        """Return record -> kind of success (`split_of`), for records whose question gets its target by free generation.

        Probes of generality are judged by exact match, and probes of locality by whether the answer is unchanged.
        Records that lack either of them are left out, since nothing shows of which kind their success is.
        """
        by_record: dict[str, list[ProbeRow]] = {}
        for row in self.rows:
            by_record.setdefault(row.record, []).append(row)
        return {
            name: split_of(moved=moved, kept=kept)
            for name, rows in by_record.items()
            if _shown(rows, EFFICACY, EXACT) == [True]
            and (moved := _shown(rows, GENERALITY, EXACT))
            and (kept := _shown(rows, LOCALITY, UNCHANGED))
        }

    def split_shares(self) -> Mapping[str, float]:
        """Return the shares of the edits in `splits` that are "generalised", "too narrow", "too broad" or "both".

        They are between 0 and 1, and NaN if there is no such edit.
        """
        found = [*self.splits().values()]
        return {name: found.count(name) / len(found) if found else float("nan") for name in SPLITS}

    @property
    def failed(self) -> Mapping[str, str]:
        """Record -> its status with the reason, for records that could not be edited."""
        return {name: status for name, status in self.statuses.items() if status.startswith(FAILED)}

    @property
    def not_generated(self) -> Mapping[str, str]:
        """Record -> the answer of the edited model to its question, for edits that are "not generated"."""
        said = {row.record: row.after for row in self.rows if row.kind == EDITED}
        return {name: said[name] for name, status in self.statuses.items() if status == NOT_GENERATED}

    def generations(self) -> tuple[Mapping[str, Any], ...]:
        """Return the rows without their numbers as plain values, so that each can be written as one line of JSON."""
        rows = (asdict(row) | {"pictures": list(row.pictures)} for row in self.rows)
        return tuple({key: value for key, value in row.items() if key != "numbers"} for row in rows)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score.

        Its columns are aspect, kind and protocol, the mean and interval ("_low", "_high") before and after, and the
        numbers of values and records.
        """
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
        """Return the scores as a text table, one line each, with the unedited model beside the edited one.

        Shares are in percent. Below it come the kinds of success, and the edits that failed or are not generated.

        protocols: names of the protocols to show; None for all.
        """
        wanted = None if protocols is None else set(protocols)
        scores = [score for score in self.scores() if wanted is None or score.protocol in wanted]
        titles = ("aspect", "kind", "protocol", "unedited", "edited", "95 % interval", "values", "records")
        lines: list[tuple[object, ...]] = [titles]
        for score in scores:
            after = score.after
            texts = [_text(score.protocol, value) for value in (score.before.mean, after.mean, after.low, after.high)]
            band = f"{texts[2]} to {texts[3]}"
            lines.append((score.aspect, score.kind, score.protocol, *texts[:2], band, after.number, after.records))
        tail = []
        if splits := self.splits():
            shares = ", ".join(f"{name} {share:.1%}" for name, share in self.split_shares().items())
            tail.append(f"of {len(splits)} successful edits with probes of generality and locality: {shares}")
        if self.left_out:
            tail.append(
                f"left out: {counted(len(self.left_out), 'question')} that other edits change or that need them"
            )
        tail += [f"{name}: not generated; the model says {said!r}" for name, said in self.not_generated.items()]
        tail += [f"{name}: {status}" for name, status in self.failed.items()]
        return "\n".join([*aligned(lines), *tail])

    def headlines(self) -> str:
        """Return the table of `summary` with the two headline protocols of free generation only."""
        return self.summary(protocols=_HEADLINES)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of the headline scores of both models by kind of question, with 95 % intervals.

        The figure is also written to the path if one is given (png, pdf or svg). Raises `ArtefactError` if that fails,
        or if no question was asked.
        """
        scores = [score for score in self.scores() if score.protocol in _HEADLINES]
        if not scores:
            raise ArtefactError("the report has no questions to draw; evaluate at least one record")
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
        """Write rows and scores as a JSON file with a digest, completely or not at all, and return the path.

        Raises `EditError` if the file cannot be written.
        """
        scores = json.loads(self.to_dataframe().to_json(orient="records"))
        return files.write_json(path, self.layout, {**asdict(self), "scores": scores}, error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the report that `save` wrote; its scores are computed again from the rows.

        Raises `EditError` if the file is missing, damaged or of another kind.
        """
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
    """Return one line of text per row of cells; each column is as wide as its longest cell."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = np.max([[len(cell) for cell in line] for line in cells], axis=0)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _loaded(kind: type[_Kind], source: str | Path, content: Mapping[str, Any]) -> _Kind:
    """Return a report or a curve from its plain values. Raises `EditError` if they do not have the right types."""
    try:
        return from_plain(kind, content)
    except (KeyError, TypeError, ValueError) as error:
        raise EditError(f"'{source}' holds no whole {kind.__name__} ({str(error)[:200]}); evaluate again") from error


def _name(row: ProbeRow) -> str:
    return row.kind if row.hops is None else f"{row.kind}, {row.hops} hops"


def _shown(rows: Sequence[ProbeRow], aspect: str, protocol: str) -> list[bool]:
    """Whether the edited model passes the protocol, for each question of the aspect that has it."""
    return [row.numbers[protocol][1] == 1 for row in rows if row.aspect == aspect and protocol in row.numbers]


def _columns(state: str, interval: Interval) -> dict[str, float]:
    return {state: interval.mean, f"{state}_low": interval.low, f"{state}_high": interval.high}


def _text(protocol: str, value: float) -> str:
    """The value as text, in percent if the protocol gives a share."""
    return f"{value:.4g}" if any(word in protocol for word in ("nats", "bits", " - ")) else f"{100 * value:.1f}"
