"""The results of an evaluation: every question with the answers of both models, and the means that follow from them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ...artefacts import ArtefactError, Result, drawing, files
from ...data.facts import ABILITY, ASPECTS, EDITED, EFFICACY, GENERALITY, GIVEN_TEXT, KINDS, LOCALITY, OWN_TEXT, counted
from ...models import VisionLanguageModel
from ..requests import FAILED, NOT_GENERATED, EditError
from .costs import EditCost
from .curves import MEANS, STYLES, EditCurve, aligned, loaded
from .judging import Judge, Verdicts
from .metrics import (
    BEGINS,
    EXACT,
    JUDGED,
    NOT_NEW,
    PERPLEXITY,
    SPLITS,
    UNCHANGED,
    Interval,
    bootstrap_interval,
    split_of,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


ALL = "all"
_DRAWN = (EXACT, UNCHANGED)
_HEADLINES = (*_DRAWN, NOT_NEW, PERPLEXITY)
Pair = tuple[float, float]
"""One number for the unedited model and the same number for the edited model."""
TEXTS = (OWN_TEXT, GIVEN_TEXT)
"""Kinds of rows that are texts and no questions."""
_ORDER = {kind: place for place, kind in enumerate(KINDS)}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation measures. Raises `EditError` for a number that is out of range."""

    forced: bool = True
    """Also measure how the model predicts given answers (teacher forcing), which about doubles the time. False
    measures free generation only."""
    max_new_tokens: int = 32
    """Maximum length of a free answer in tokens. An answer ends where the model ends it, so that this is no length that
    is expected; it is not derived from the target's, since a model that goes on after the target has another answer."""
    fluency_tokens: int = 0
    """Maximum length in tokens of the answers to edited questions whose fluency is measured; 0 skips fluency."""
    perplexity_texts: int = 0
    """Number of texts that are sampled from the unedited model and whose perplexity is measured before and after the
    edits (general ability); 0 samples none."""
    perplexity_tokens: int = 64
    """Maximum length of such a text in tokens."""
    seed: int = 0
    """Random seed of the bootstrap intervals and of the sampled texts, at least 0."""

    def __post_init__(self) -> None:
        lowest = {"max_new_tokens": 1, "fluency_tokens": 0, "perplexity_texts": 0, "perplexity_tokens": 2, "seed": 0}
        for name, least in lowest.items():
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

    @property
    def stays(self) -> bool:
        """Whether its answer should be the same after the edit."""
        return self.aspect in (LOCALITY, ABILITY)


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

    layout: ClassVar[str] = "multrace edit report 6"

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
    step: int = 1
    """Number of edits that are made together: 1 in mode "single", all of them in mode "batch", and at most so many at a
    time in mode "sequence". A method that makes one edit per step has a harder task than one that makes a hundred."""
    cost: EditCost | None = field(default=None, compare=False)
    """Time per edit and peak memory, as measured in this run; None where nothing was measured."""
    seed: int = 0
    """Random seed of the bootstrap intervals and of the sampled texts, at least 0."""

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
        questions = sum(row.kind not in TEXTS for row in self.rows)
        return f"{line}, {counted(questions, 'question')}", ", ".join(shown)

    def scores(self) -> tuple[EditScore, ...]:
        """Return the mean of every protocol with its 95 % interval (bootstrap by record), by aspect and kind.

        Each aspect comes first over all its questions (kind "all"), then by kind if it has several kinds.
        """
        found = []
        for aspect in ASPECTS:
            own = [row for row in self.rows if row.aspect == aspect]
            ordered = sorted(own, key=lambda row: (_ORDER[row.kind], row.hops or 0))
            names = [*dict.fromkeys(map(_name, ordered))]
            groups = {ALL: own} if own else {}
            if len(names) > 1 or any(row.hops is not None for row in own):
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
        """Return the questions without their numbers as plain values, so that each can be one line of JSON."""
        rows = (asdict(row) | {"pictures": list(row.pictures)} for row in self.rows if row.kind not in TEXTS)
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

        Shares are in percent. Below it come the step size and the cost, the kinds of success, and the edits that failed
        or are not generated.

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
        tail = [f"{counted(self.step, 'edit')} per step" + (f"; {self.cost}" if self.cost is not None else "")]
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
        """Return the table of `summary` with the headlines only: exact match, unchanged answers, and perplexity.

        Of a model that goes on after its answers, the shares of answers that begin with the target are shown too.
        """
        pairs = [(row.numbers[EXACT], row.numbers[BEGINS]) for row in self.rows if {EXACT, BEGINS} <= {*row.numbers}]
        goes_on = any(exact != begins for exact, begins in pairs)
        return self.summary(protocols=(*_HEADLINES, BEGINS) if goes_on else _HEADLINES)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of the headline scores of both models by kind of question, with 95 % intervals.

        The figure is also written to the path if one is given (png, pdf or svg). Raises `ArtefactError` if that fails,
        or if no question was asked.
        """
        scores = [score for score in self.scores() if score.protocol in _DRAWN]
        if not scores:
            raise ArtefactError("the report has no questions to draw; evaluate at least one record")
        labels = [f"{score.aspect}, {score.kind}: {score.protocol}" for score in scores]
        titles = (f"{counted(len(self.statuses), 'edit')}, mode {self.mode!r}", self.model)
        figure, body = drawing.titled_figure(9.5, 1.2 + 0.3 * len(scores), titles)
        axes = body.subplots()
        for state, offset, style in (("before", -0.14, STYLES["retention"]), ("after", 0.14, STYLES["efficacy"])):
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

    def judged(self, judge: Judge) -> Self:
        """Return the report with a judge's verdicts beside exact match, under "free generation, judged".

        The answers of both models to every question with an expected answer are judged: against the answer that should
        come with the edit, or, where the answer should stay, against the present one. A judge that raises an error or
        returns something else than a truth value or a number from 0 to 1 costs the row in question its verdict; a
        warning says how many. The report keeps the judge's name (in `settings`), and no code.

        judge: A function judge(question, expected, answer), such as a local language model that compares them.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro", id="winner")
            >>> report = mt.evaluate(vlm, [record], mt.MultEdit(layer=5, steps=25), progress=False)
            >>> judged = report.judged(lambda question, expected, answer: answer.lower() == expected.lower())
            >>> judged.score("efficacy", "free generation, judged").after.mean
            1.0
        """
        verdicts = Verdicts(judge)
        rows = []
        for row in self.rows:
            pair = None
            if row.kind not in TEXTS:
                pair = verdicts.of(row.question, row.old if row.stays else row.new, (row.before, row.after))
            rows.append(row if pair is None else replace(row, numbers={**row.numbers, JUDGED: pair}))
        verdicts.warn()
        return replace(self, rows=tuple(rows), settings={**self.settings, "judge": verdicts.name})

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
        report = loaded(cls, path, content)
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


def _name(row: ProbeRow) -> str:
    return row.kind if row.hops is None else f"{row.kind}, {counted(row.hops, 'hop')}"


def _shown(rows: Sequence[ProbeRow], aspect: str, protocol: str) -> list[bool]:
    """Whether the edited model passes the protocol, for each question of the aspect that has it."""
    return [row.numbers[protocol][1] == 1 for row in rows if row.aspect == aspect and protocol in row.numbers]


def _columns(state: str, interval: Interval) -> dict[str, float]:
    return {state: interval.mean, f"{state}_low": interval.low, f"{state}_high": interval.high}


def _text(protocol: str, value: float) -> str:
    """The value as text, in percent if the protocol gives a share."""
    return (
        f"{value:.4g}"
        if any(word in protocol for word in ("nats", "bits", " - ", PERPLEXITY))
        else f"{100 * value:.1f}"
    )
