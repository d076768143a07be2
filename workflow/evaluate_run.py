"""Evaluations of edits as runs: what `multrace evaluate` computes of each record, in each of its modes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

from ..artefacts.files import digest
from ..data import EditRecord, Question
from ..data.facts import EDITED, EFFICACY, GENERALITY, LOCALITY, PORTABILITY
from ..editing import (
    ClosedFormEditor,
    EditError,
    Editor,
    EditorByRequest,
    EditReport,
    EditSession,
    EvaluationSettings,
    GradientEditor,
)
from ..editing.baselines import change_file, save_change, stored_change
from ..editing.evaluation import (
    EXACT,
    TEXTS,
    UNCHANGED,
    AbilityTests,
    CostMeter,
    LeftOut,
    ProbeRow,
    ability_tests,
    batch_checks,
    measured,
    measured_edit,
    seen_statuses,
    statuses_of,
    transform_of,
)
from ..editing.moments import MomentSource
from ..editing.requests import FAILED
from ..editing.solve import ClosedFormSession
from ..models import VisionLanguageModel
from ..tracing import EditSite
from .analysis import Analysis, Outcome, Record, RunContext, Summary, Task, every_failed
from .costs import metered
from .edit_run import check_questions, sites_of, stored_traces, unusable, without_contradictions
from .located_edit import editor_at
from .run_folder import REMADE, RunError, StoredRecord
from .run_moments import check_moments, moments_of_run, moments_setting
from .trace_run import PlaceTrace

EVALUATION, GENERATIONS, TABLE = "evaluation.json", "generations.jsonl", "table.txt"
_VALUES = "values"
_MEASURES = {EFFICACY: EXACT, GENERALITY: EXACT, PORTABILITY: EXACT, LOCALITY: UNCHANGED}
"""What a row of the table shows of each aspect -> its protocol."""


class _NamedEditor(Editor, Protocol):
    """An editor that can name its settings, which belong to those of the run."""

    def as_text(self) -> Mapping[str, str]:
        """Return the editor's name and its settings as text."""


@dataclass(frozen=True, kw_only=True)
class _Evaluation(Analysis):
    """What the modes of an evaluation share."""

    editor: _NamedEditor | None = None
    """What makes the edits; None for a run that is only summed up."""
    moments: Path | None = None
    """File of second moments of keys, for editors that need them; None for those of the model's own samples."""
    general: tuple[Question, ...] = ()
    """Held-out questions with their answers."""
    texts: tuple[str, ...] = ()
    """Texts whose perplexity is measured, besides those that the unedited model samples."""
    cloze: tuple[Question, ...] = ()
    """Questions with their answers about facts that no edit touches."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is measured."""
    batch_size: int = 32
    """Number of questions that are answered together."""
    trace: PlaceTrace | None = None
    """How each record is traced; the place that this shows replaces the layer and the token of the editor."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; files and questions count by their content."""
        editor = {} if self.editor is None else dict(self.editor.as_text())
        if self.trace is not None:
            editor = {name: value for name, value in editor.items() if name not in ("layer", "token", "where")}
        return {
            "editor": editor,
            "moments": moments_setting(self.moments, self.editor),
            "general": digest(*(f"{question.key} {question.answer}" for question in self.general)),
            "texts": digest(*self.texts),
            "cloze": digest(*(f"{question.key} {question.answer}" for question in self.cloze)),
            "evaluation": asdict(self.evaluation),
            "batch_size": self.batch_size,
            "trace": None if self.trace is None else self.trace.settings(),
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the analysis with settings that `settings` gave, which can sum up a run and make no edit."""
        return cls(evaluation=EvaluationSettings(**settings["evaluation"]), batch_size=settings["batch_size"])

    def check(self, record: Record) -> None:
        """Raise `EditError` for a question without a target, and `TraceError` for one that cannot be traced."""
        if not isinstance(record, EditRecord):
            raise EditError(f"{record.text!r} is a question without a target; pass records of edits")
        if self.trace is not None:
            self.trace.check(record)

    def sources(self, record: Record) -> Sequence[Any]:
        """Return the picture under which the record is traced, if it is."""
        return () if self.trace is None else self.trace.sources(record)

    def summary(self) -> Summary:
        """Return the report of all records together."""
        return EvaluationSummary()

    def editor_at(self, site: EditSite | None) -> _NamedEditor:
        """Return the editor at the place that a trace shows; None stands for the editor's own place."""
        if self.editor is None:
            raise EditError("this analysis has no editor and can only sum up what is there; pass editor=")
        if site is None:
            return self.editor
        if isinstance(self.editor, ClosedFormEditor):
            return editor_at(self.editor, site)[0]
        if isinstance(self.editor, GradientEditor):
            raise EditError(f"no trace chooses the layers of {type(self.editor).__name__}; pass trace=None")
        layer = {} if getattr(self.editor, "layer", None) is None else {"layer": site.layer}
        return replace(cast(Any, self.editor), **layer)

    def calibrate(
        self,
        vlm: VisionLanguageModel,
        records: Mapping[str, Record],
        *,
        traces: Mapping[str, StoredRecord],
        known: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Mapping[str, Any] | None:
        """Return what the unedited model says to texts and cloze questions; None if there are none."""
        if not (self.texts or self.cloze or self.evaluation.perplexity_texts):
            return None
        asked = {"texts": self.texts, "cloze": self.cloze, "settings": self.evaluation}
        return {"ability": ability_tests(vlm, **asked, batch_size=self.batch_size).as_json()}

    def ability(self, calibration: Mapping[str, Any] | None) -> AbilityTests:
        """Return the tests of general ability that `calibrate` made."""
        options: dict[str, Any] = {"settings": self.evaluation, "batch_size": self.batch_size}
        if calibration is None or "ability" not in calibration:
            return AbilityTests(**options)
        return AbilityTests.from_json(calibration["ability"], self.cloze, **options)

    def moments_of(self, vlm: VisionLanguageModel, work: RunContext) -> MomentSource:
        """Return the second moments for all records of the run."""
        return moments_of_run(vlm, self.moments, work.records.values(), progress=work.progress)


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(_Evaluation):
    """One edit at a time, with these settings of `evaluate`: the report of each record, and of all together.

    Example:
        >>> import multrace as mt
        >>> from multrace.workflow import EvaluateRun
        >>> EvaluateRun(editor=mt.MultEdit(layer=5)).settings()["editor"]["layer"]
        '5'
    """

    name: ClassVar[str] = "evaluate"

    @contextmanager
    def opened(self, vlm: VisionLanguageModel, work: RunContext) -> Iterator[Analysis]:
        """Yield the analysis that takes the time of each edit."""
        moments = self.moments_of(vlm, work)
        with metered(work.folder, vlm.device) as meter:
            yield _SingleEdits(self, moments, self.ability(work.calibration), meter)

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the report on one record. Raises `EditError` if its edit cannot be made."""
        moments = moments_of_run(vlm, self.moments, [task.record], progress=False)
        return _SingleEdits(self, moments, self.ability(task.calibration), CostMeter(vlm.device)).compute(vlm, task)


class _SingleEdits(Analysis):
    """Edits that are made one at a time, with the time that each takes."""

    name: ClassVar[str] = EvaluateRun.name

    def __init__(self, run: EvaluateRun, moments: MomentSource, ability: AbilityTests, meter: CostMeter) -> None:
        self.run, self.moments, self.ability, self.meter = run, moments, ability, meter

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the report on one record. Raises `EditError` if its edit cannot be made."""
        run, record = self.run, named_record(task)
        where = Outcome(row={})
        site = None
        if run.trace is not None:
            located = run.trace.located(vlm, record)
            where, site = run.trace.outcome(located), located.edit_site
        with self.meter.edits(1):
            change = run.editor_at(site).start(vlm, moments=self.moments).propose([record])
        (status,) = statuses_of(change, 1)
        if status.startswith(FAILED):
            raise EditError(status.removeprefix(f"{FAILED}: "))
        options: dict[str, Any] = {"general": run.general, "ability": self.ability}
        options |= {"settings": run.evaluation, "batch_size": run.batch_size}
        result = measured_edit(vlm, id_of(record, task.name), record, change, status, **options)
        outcome = _reported(run, vlm, "single", {result.record: result.status}, result.rows, result.left_out)
        return replace(outcome, row={**outcome.row, **where.row}, results=where.results)

    def summary(self) -> Summary:
        """Return the summary of the run."""
        return self.run.summary()


@dataclass(frozen=True, kw_only=True)
class LocatedTogether(_Evaluation):
    """A mode in which the edits of all records belong together, so that all are traced before the first is made."""

    is_whole: ClassVar[bool] = True

    def check(self, record: Record) -> None:
        """Raise an error also for pictures or words that no model could use: they would stop the edit of all."""
        super().check(record)
        check_questions(cast(EditRecord, record))

    def traces(self) -> PlaceTrace | None:
        """Return the trace of each record, where traces choose the places."""
        return self.trace

    def calibrate(
        self,
        vlm: VisionLanguageModel,
        records: Mapping[str, Record],
        *,
        traces: Mapping[str, StoredRecord],
        known: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Mapping[str, Any] | None:
        """Return the site of each record according to the traces, unless the editor names it, and what is said."""
        options = {"traces": traces, "known": known, "progress": progress}
        ability = super().calibrate(vlm, records, **options)
        check_moments(vlm, self.moments, self.editor)
        if self.trace is None:
            if isinstance(self.editor, ClosedFormEditor):
                self.editor.projections(vlm)  # a layer that does not exist is an error of the run, not of each record
            return ability
        edits, options = cast(Mapping[str, EditRecord], records), {"per_request": not self._has_one_place}
        sites, _ = sites_of(vlm, edits, stored_traces(vlm, records, traces), progress=progress, **options)
        spare = next(iter(sites.values()))  # for records whose edits fail in any case
        if self._has_one_place:  # requests without a constraint, say, have an average of their own
            places = [(site.layer, site.token) for site in sites.values()]
            most = max(dict.fromkeys(places), key=places.count)
            spare = [*sites.values()][places.index(most)]
            sites = {}
        return {"sites": {name: sites.get(name, spare).as_json() for name in records}, **(ability or {})}

    @property
    def _has_one_place(self) -> bool:
        """Whether all edits are made at the same place."""
        return False

    def _usable(
        self, vlm: VisionLanguageModel, work: RunContext, check: Callable[[str, EditRecord], None] | None = None
    ) -> tuple[dict[str, EditRecord], dict[str, str]]:
        """The records whose prompts can be made and that `check` passes, by name, and what is wrong with the others."""
        own = cast(Mapping[str, EditRecord], work.records)
        records = {name: replace(record, id=id_of(record, name)) for name, record in own.items()}
        room = self.evaluation.max_new_tokens
        problems = unusable(vlm, records, room=room, check=check, progress=work.progress)
        if len(problems) == len(records):
            name, problem = next(iter(problems.items()))
            raise RunError(f"{every_failed(self, len(records))}; {records[name].id}: {problem}")
        return {name: record for name, record in records.items() if name not in problems}, problems

    def place(self, task: Task) -> dict[str, Any]:
        """Return the layer and the token of a record's edit for the table, where traces have chosen them."""
        if self.trace is None:
            return {}
        site = cast(Mapping[str, Any], task.calibration)["sites"][task.name]
        return {"layer": site["layer"], "token": str(site["token"])}

    def session_editor(self, work: RunContext) -> Editor:
        """Return the editor that makes the edits of all records, each at its place."""
        if self.trace is None:
            return self.editor_at(None)
        sites = cast(Mapping[str, Any], work.calibration)["sites"]
        by_id = {id_of(record, name): self.editor_at(EditSite(**sites[name])) for name, record in work.records.items()}
        is_closed = isinstance(self.editor, ClosedFormEditor)
        return EditorByRequest(choose=lambda requests: cast(Any, by_id[requests[0].id]), closed_form=is_closed)


@dataclass(frozen=True, kw_only=True)
class EvaluateBatchRun(LocatedTogether):
    """All edits in the model at once: the one change is made and kept first, then each record's questions are asked.

    A held-out question is asked together with one of the records. Processes that share the records share the change.
    """

    name: ClassVar[str] = "evaluate batch"

    @contextmanager
    def opened(self, vlm: VisionLanguageModel, work: RunContext) -> Iterator[Analysis]:
        """Yield the analysis that asks about the change, which the first process makes and the others read."""
        session = self.session_editor(work).start(vlm, moments=self.moments_of(vlm, work))
        is_closed = isinstance(session, ClosedFormSession)
        usable, problems = self._usable(vlm, work, (lambda _, record: session.check(record)) if is_closed else None)
        records = {record.id: record for record in usable.values()}
        with work.folder.alone():
            work.folder.shared.mkdir(exist_ok=True)
            change = stored_change(work.folder.shared)
            if change is None:
                with metered(work.folder, vlm.device) as meter, meter.edits(len(records)):
                    change = self._change(session, [*records.values()], work)
                save_change(change, work.folder.shared / change_file(change))
            for path in work.folder.shared.glob(f"{_VALUES}-*"):
                path.unlink()
        ability = self.ability(work.calibration).beside(records.values())
        yield _BatchQuestions(self, change, records, problems, ability)

    def _change(self, session: EditSession, records: Sequence[EditRecord], work: RunContext) -> Any:
        """The change of all records; the values that a closed-form edit searches for are kept on the way."""
        progress = work.progress
        if not isinstance(session, ClosedFormSession):
            return session.propose(records, progress=progress)
        found = session.search(records, checkpoint=work.folder.shared / _VALUES, progress=progress)
        values = without_contradictions(records, found, [None] * len(records))
        return session.propose(records, values=values, progress=progress)

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Records are asked about in the block of `opened`."""
        raise EditError("the edits of a batch are made together; start them by run()")

    @property
    def _has_one_place(self) -> bool:
        return True


class _BatchQuestions(Analysis):
    """The questions of each record, asked while the change of all records is in the model."""

    name: ClassVar[str] = EvaluateBatchRun.name

    def __init__(
        self,
        run: EvaluateBatchRun,
        change: Any,
        records: Mapping[str, EditRecord],
        problems: Mapping[str, str],
        ability: AbilityTests,
    ) -> None:
        self.run, self.change, self.problems, self.ability = run, change, problems, ability
        self.statuses = dict(zip(records, statuses_of(change, len(records)), strict=True))
        self.checks, self.left_out = batch_checks(records, self.statuses, run.general)
        self.first = next((id for id, status in self.statuses.items() if not status.startswith(FAILED)), None)
        """The record with which texts and cloze questions are asked."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the report on one record. Raises `EditError` if its edit could not be made."""
        id, run = id_of(task.record, task.name), self.run
        if task.name in self.problems:
            raise EditError(self.problems[task.name])
        if self.statuses[id].startswith(FAILED):
            raise EditError(self.statuses[id].removeprefix(f"{FAILED}: "))
        options = {"settings": run.evaluation, "batch_size": run.batch_size, "transform": transform_of(self.change)}
        rows = measured(vlm, self.checks[id], self.change, **options)
        rows += self.ability.rows_with(vlm, self.change) if id == self.first else ()
        statuses = seen_statuses({id: self.statuses[id]}, rows)
        left_out = [each for each in self.left_out if each.record == id]
        outcome = _reported(run, vlm, "batch", statuses, rows, left_out, step=len(self.statuses))
        return replace(outcome, row={**outcome.row, **run.place(task)})

    def summary(self) -> Summary:
        """Return the summary of the run."""
        return self.run.summary()


class EvaluationSummary(Summary):
    """The reports of all records joined into one."""

    def __init__(self) -> None:
        self.first: EditReport | None = None
        self.rows: list[ProbeRow] = []
        self.statuses: dict[str, str] = {}
        self.left_out: list[LeftOut] = []

    def add(self, record: StoredRecord) -> None:
        """Add the report of a record."""
        report = stored_report(record)
        self.first = self.first or report
        self.rows += report.rows
        self.statuses |= report.statuses
        self.left_out += report.left_out

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Return the report, every question with both raw answers, and the table."""
        report = self.report()
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
        report = self.report()
        return [] if report is None else report.headlines().splitlines()

    def report(self) -> EditReport | None:
        """Return the report of all records that were added, or None if there is none."""
        if self.first is None:
            return None
        parts = {"rows": tuple(self.rows), "statuses": dict(self.statuses), "left_out": tuple(self.left_out)}
        return replace(self.first, **parts)


def id_of(record: Record, name: str) -> str:
    """Return what the report calls a record: its id, or else the name of its folder."""
    return record.id or name


def named_record(task: Task) -> EditRecord:
    """Return the record of a task, with an id."""
    return replace(cast(EditRecord, task.record), id=id_of(task.record, task.name))


def _reported(
    run: _Evaluation,
    vlm: VisionLanguageModel,
    mode: str,
    statuses: Mapping[str, str],
    rows: Sequence[ProbeRow],
    left_out: Sequence[LeftOut],
    *,
    step: int = 1,
) -> Outcome:
    """The outcome of one record: its report, and a row of the table."""
    report = EditReport.of(vlm, mode, run.evaluation, rows, statuses=statuses, left_out=left_out, step=step)
    own = next(row for row in rows if row.kind == EDITED)
    row = {"question": own.question, "target": own.new, "status": statuses[own.record], "before": own.before}
    row |= {"after": own.after, **_shares(rows), "questions": sum(row.kind not in TEXTS for row in rows)}
    return Outcome(row=row, files={EVALUATION: report.save})


def stored_report(record: StoredRecord) -> EditReport:
    """Return the report on one record. Raises `RunError` if its file is damaged."""
    try:
        return EditReport.load(record.folder / EVALUATION)
    except EditError as error:
        raise RunError(f"{error}; {REMADE.format(repr(str(record.folder)))}") from error


def _shares(rows: Sequence[ProbeRow]) -> dict[str, float | None]:
    """Share of the questions of each aspect that the edited model answers as it should; None where none is asked."""
    shares: dict[str, float | None] = {}
    for aspect, protocol in _MEASURES.items():
        values = [row.numbers[protocol][1] for row in rows if row.aspect == aspect and protocol in row.numbers]
        shares[aspect] = sum(values) / len(values) if values else None
    return shares
