"""Edits of many records, each made on the unedited model, measured and undone: what `multrace evaluate` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

from ..artefacts.files import digest
from ..data import EditRecord, Question
from ..data.facts import EDITED, EFFICACY, GENERALITY, LOCALITY, PORTABILITY
from ..editing import EditError, Editor, EditReport, EvaluationSettings, Moments
from ..editing.evaluation import EXACT, UNCHANGED, ProbeRow, evaluate_each
from ..models import VisionLanguageModel
from .analysis import Analysis, Outcome, Record, Summary, Task
from .run_folder import RunError, StoredRecord

EVALUATION, GENERATIONS, TABLE = "evaluation.json", "generations.jsonl", "table.txt"
_MEASURES = {EFFICACY: EXACT, GENERALITY: EXACT, PORTABILITY: EXACT, LOCALITY: UNCHANGED}
"""What a row of the table shows of each aspect -> its protocol."""


class _NamedEditor(Editor, Protocol):
    """An editor that can name its settings, which belong to those of the run."""

    def as_text(self) -> Mapping[str, str]:
        """Return the editor's name and its settings as text."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(Analysis):
    """One edit at a time, with these settings of `evaluate`: the report of each record, and of all together.

    Example:
        >>> import multrace as mt
        >>> from multrace.workflow import EvaluateRun
        >>> EvaluateRun(editor=mt.MultEdit(layer=5)).settings()["editor"]["layer"]
        '5'
    """

    name: ClassVar[str] = "evaluate"

    editor: _NamedEditor | None = None
    """What makes the edits; None for a run that is only summed up."""
    moments: Path | None = None
    """File of second moments of keys, for editors that need them."""
    general: tuple[Question, ...] = ()
    """Held-out questions with their answers, asked after every edit."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is measured."""
    batch_size: int = 32
    """Number of questions that are answered together."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; files and questions count by their content."""
        return {
            "editor": {} if self.editor is None else dict(self.editor.as_text()),
            "moments": None if self.moments is None else digest(self.moments.read_bytes()),
            "general": digest(*(f"{question.key} {question.answer}" for question in self.general)),
            "evaluation": asdict(self.evaluation),
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the analysis with settings that `settings` gave, which can sum up a run and make no edit."""
        return cls(evaluation=EvaluationSettings(**settings["evaluation"]), batch_size=settings["batch_size"])

    def check(self, record: Record) -> None:
        """Raise `EditError` for a question without a target."""
        if not isinstance(record, EditRecord):
            raise EditError(f"{record.text!r} is a question without a target; pass records of edits")

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the report on one record. Raises `EditError` if its edit cannot be made."""
        if self.editor is None:
            raise EditError("this analysis has no editor and can only sum up what is there; pass editor=")
        self.check(task.record)
        record = cast(EditRecord, task.record)
        options = {"general": self.general, "settings": self.evaluation, "batch_size": self.batch_size}
        (result,) = evaluate_each(
            vlm,
            [record],
            self.editor,
            moments=self._moments,
            progress=False,
            **options,  # pyrefly: ignore
        )
        if result.status.startswith("failed"):
            raise EditError(result.status.removeprefix("failed: "))
        parts = {"statuses": {result.record: result.status}, "left_out": result.left_out}
        report = EditReport.of(vlm, "single", self.evaluation, result.rows, **parts)
        own = next(row for row in result.rows if row.kind == EDITED)
        row = {"question": own.question, "target": own.new, "status": result.status, "before": own.before}
        row |= {"after": own.after, **_shares(result.rows), "questions": len(result.rows)}
        return Outcome(row=row, files={EVALUATION: report.save})

    def summary(self) -> Summary:
        """Return the report of all records together."""
        return EvaluationSummary()

    @cached_property
    def _moments(self) -> Moments | None:
        return None if self.moments is None else Moments.load(self.moments)


class EvaluationSummary(Summary):
    """The reports of all records joined into one."""

    def __init__(self) -> None:
        self.first: EditReport | None = None
        self.rows: list[ProbeRow] = []
        self.statuses: dict[str, str] = {}
        self.left_out: list[Any] = []

    def add(self, record: StoredRecord) -> None:
        """Add the report of a record."""
        try:
            report = EditReport.load(record.folder / EVALUATION)
        except EditError as error:
            raise RunError(f"{error}; remove {str(record.folder)!r} and start the run again") from error
        self.first = self.first or report
        self.rows += report.rows
        self.statuses |= report.statuses
        self.left_out += report.left_out

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Return the report, every question with both raw answers, and the table."""
        report = self._report()
        if report is None:
            return {}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in report.generations())
        return {
            EVALUATION: report.save,
            GENERATIONS: lambda path: path.write_text(lines, encoding="utf-8"),
            TABLE: lambda path: path.write_text(report.summary() + "\n", encoding="utf-8"),
        }

    def lines(self) -> list[str]:
        """Return the table of free generation."""
        report = self._report()
        return [] if report is None else report.headlines().splitlines()

    def _report(self) -> EditReport | None:
        if self.first is None:
            return None
        first = self.first
        return EditReport(
            model=first.model,
            revision=first.revision,
            mode=first.mode,
            settings=first.settings,
            rows=tuple(self.rows),
            statuses=self.statuses,
            left_out=tuple(self.left_out),
            seed=first.seed,
        )


def _shares(rows: Sequence[ProbeRow]) -> dict[str, float | None]:
    """Share of the questions of each aspect that the edited model answers as it should; None where none is asked."""
    shares: dict[str, float | None] = {}
    for aspect, protocol in _MEASURES.items():
        values = [row.numbers[protocol][1] for row in rows if row.aspect == aspect and protocol in row.numbers]
        shares[aspect] = sum(values) / len(values) if values else None
    return shares
