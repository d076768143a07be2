"""What a run computes: the protocol of an analysis of one record, and of what all records give together.

To add an analysis, subclass `Analysis` as a frozen dataclass whose fields are its settings (plain values that JSON
holds: text, numbers, booleans, None, tuples of these), and define `compute` and `summary`:

    @dataclass(frozen=True, kw_only=True)
    class AnswerLength(Analysis):
        name = "answer length"
        max_new_tokens: int = 16

        def compute(self, vlm, task):
            question = question_of_record(task.record)
            answer = vlm.answers([vlm.prompt_for(question)], max_new_tokens=self.max_new_tokens)[0]
            return Outcome(row={"question": question.text, "answer": answer, "length": len(answer)})

        def summary(self):
            return Summary()

`compute` must depend on nothing but the settings, the model and the task, so that a continued run gives the same bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..artefacts import ArtefactError, Result
from ..artefacts.files import digest
from ..data import DataError, EditRecord, Question
from ..data.errors import gist
from ..data.facts import counted
from ..editing import EditError
from ..models import ModelError, VisionLanguageModel
from ..tracing import TraceError, averager_of
from .run_folder import RECORDS, ROWS, SETTINGS, RunError, RunFolder, StoredRecord, differences

if TYPE_CHECKING:
    import pandas as pd

Record = Question | EditRecord
Rows = Iterable[tuple[int, Record | DataError]]
"""Records with the number of their row or line in the file, and the errors of those that cannot be read."""
_NAMED = 5
"""Maximum number of records with the same problem, or of settings that differ, in a message."""
INPUT_ERRORS = (ModelError, TraceError, EditError, ArtefactError, DataError)
"""Errors that say something about one record, so that the others can go on."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One record to analyse."""

    record: Record
    name: str = ""
    """The name of its folder."""
    number: int
    """Its position in the run, from 0."""
    calibration: Mapping[str, Any] | None = None
    """What `Analysis.calibrate` returned."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What an analysis may need to know of its run before the first record is computed."""

    folder: RunFolder
    records: Mapping[str, Record]
    """The records that `Analysis.check` accepts, by the names of their folders, in the order of the run."""
    calibration: Mapping[str, Any] | None = None
    """What `Analysis.calibrate` returned."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an analysis finds out about one record."""

    row: Mapping[str, Any]
    """One row of the table of the run: text, numbers, booleans and None by column."""
    results: Mapping[str, Result] = field(default_factory=dict)
    """Results by name; each is kept as NAME.safetensors."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Parts of the analysis that this record lacks, each with the reason."""
    files: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)
    """More files, such as drawings: file name -> function that writes the file to a path."""
    error: str | None = None
    """Why the record failed, where more is kept of it than that; its row is then in no table."""


class Summary:
    """What the records of a run give together. The base class has nothing besides the table."""

    def add(self, record: StoredRecord) -> None:
        """Add a record that did not fail; records come in the order of the run and are not kept."""

    def add_failed(self, record: StoredRecord) -> None:
        """Add a record that failed, in its place among the others; most summaries leave it out."""

    def finish(self, vlm: VisionLanguageModel, tasks: Sequence[Task], *, progress: bool = True) -> None:
        """Compute what needs the model and all records that did not fail, once they are added.

        Called only if the analysis `ends_with_model`.
        """

    def files(self) -> Mapping[str, Callable[[Path], Any]]:
        """Return the files of the averages: file name -> function that writes the file to a path."""
        return {}

    def lines(self) -> list[str]:
        """Return the averages as lines of text, and why an average is missing. Called after `files`."""
        return []

    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """Return more columns of the table, which all records together give: name of a record -> its values."""
        return {}

    @property
    def missed(self) -> int:
        """The number of records that did not fail, but whose outcome is not what was asked for."""
        return 0


class RunningAverage(Summary):
    """The average of the results of one name, which are added record by record.

    Args:
        name: The name of the results, and of the average's files unless `stem` says otherwise.
        kind: The class of the results.
        stem: The name of the average's files without suffix (default: `name`).
        at_least: Number of results that an average needs (default 1).
        options: Settings of this kind's average, as `multrace.average` takes them.
    """

    def __init__(
        self, name: str, kind: type[Result], *, stem: str | None = None, at_least: int = 1, **options: Any
    ) -> None:
        self.name, self.stem = name, stem or name
        self.averager: Any = averager_of(kind, **options)
        self.value: Any = None
        """The average, once `files` was called."""
        self.problem = ""
        """Why there is no average."""
        self._kind, self._at_least = kind, at_least
        self._model: str | None = None

    def add(self, record: StoredRecord) -> None:
        """Add the result of a record that has one; a result that does not fit the others ends the average."""
        if self.problem or not record.has(self.name):
            return
        result: Any = record.load(self.name, self._kind)
        model = getattr(result, "model", None)
        self._model = self._model or model
        if model != self._model:  # a run has one model by its weights, which may have been moved meanwhile
            result = replace(result, model=self._model)
        try:
            self.averager.add(result)
        except (TraceError, ArtefactError) as error:
            self.problem = gist(error)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Return the average, its figure and its table; nothing if there is no average."""
        if not self.problem and self.averager.count < self._at_least > 1:
            self.problem = f"an average needs {self._at_least} results, there are {self.averager.count}"
        if not self.problem:
            try:
                self.value = self.averager.average()
            except (TraceError, ArtefactError) as error:
                self.problem = gist(error)
        return {} if self.problem else self._files(self.value)

    def _files(self, value: Any) -> dict[str, Callable[[Path], Any]]:
        return {
            f"{self.stem}.safetensors": value.save,
            f"{self.stem}.png": value.plot,
            f"{self.stem}.csv": lambda path: value.to_dataframe().to_csv(path, index=False),
        }

    def lines(self) -> list[str]:
        """Return the average in words, or why there is none."""
        return [f"no average of {self.name}: {self.problem}"] if self.value is None else self._words(self.value)

    def _words(self, value: Any) -> list[str]:
        return repr(value).splitlines()


class Analysis(ABC):
    """What is computed of each record; a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]
    """The name of the analysis in the folder of a run."""
    ends_with_model: ClassVar[bool] = False
    """Whether the summary is computed with the model from all records (`Summary.finish`)."""

    is_whole: ClassVar[bool] = False
    """Whether the outcome of each record depends on all others, so that a run cannot go on with other records."""
    is_ordered: ClassVar[bool] = False
    """Whether each record needs the earlier ones, so that one process computes all in order."""

    @property
    def together(self) -> int:
        """The number of records that go through the model together (default 1).

        Records are grouped in the order of the run, without those that `check` refuses. A group is computed by one
        process, and its outcomes appear at the same moment.
        """
        return 1

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; a run with other ones cannot continue in the same folder."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the analysis with settings that `settings` gave."""
        return cls(**{name: _tuples(value) for name, value in settings.items()})

    def check(self, record: Record) -> None:  # noqa: B027 -- most analyses take every record
        """Raise one of `INPUT_ERRORS` for a record that lacks what is needed, as far as it shows without the model."""

    def sources(self, record: Record) -> Sequence[Any]:
        """Return what else the outcome depends on: plain values, and paths of files that count by their content."""
        return ()

    def traces(self) -> Analysis | None:
        """Return an analysis whose outcomes of all records are needed before this one begins, or None.

        It is a run of its own in the folder "traces" of the run, and shares its records among the same processes.
        """
        return None

    def calibrate(
        self,
        vlm: VisionLanguageModel,
        records: Mapping[str, Record],
        *,
        traces: Mapping[str, StoredRecord],
        known: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Mapping[str, Any] | None:
        """Return plain values that are measured once over all records, or None if there is nothing to measure.

        Args:
            vlm: The model.
            records: The records that `check` accepts, by the names of their folders.
            traces: The outcomes of `traces`, by the same names.
            known: Values of an earlier call that do not hold for these records (`holds`).
            progress: Show progress bars.
        """
        return None

    def holds(self, calibration: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Return whether values that were measured in an earlier call hold for the records of these names."""
        return True

    @abstractmethod
    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the outcome of one record. Raise one of `INPUT_ERRORS` if it has none."""

    def opened(self, vlm: VisionLanguageModel, work: RunContext) -> AbstractContextManager[Analysis]:
        """Return a block in which records are computed, with the analysis that computes them: by default this one."""
        return nullcontext(self)

    def compute_together(self, vlm: VisionLanguageModel, tasks: Sequence[Task]) -> Sequence[Outcome | ValueError]:
        """Return the outcome of each record of a group, or the one of `INPUT_ERRORS` that says why it has none.

        It is called where `together` is more than 1, and computes one record after the other unless it is overridden.
        """
        outcomes: list[Outcome | ValueError] = []
        for task in tasks:
            try:
                outcomes.append(self.compute(vlm, task))
            except INPUT_ERRORS as error:
                outcomes.append(error)
        return outcomes

    @abstractmethod
    def summary(self) -> Summary:
        """Return a new summary, to which the records are added."""


def question_of_record(record: Record) -> Question:
    """Return the question of a record; that of an edit has the record's id, and the present answer if it is known."""
    if isinstance(record, Question):
        return record
    question = record.question
    answer = question.answer if question.answer is not None else record.old
    return replace(question, id=record.id or question.id, answer=answer)


def plain(value: Any) -> Any:
    """Return the value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run has done."""

    folder: Path
    done: int
    """Number of records with an outcome, including those of earlier calls and other processes."""
    failed: Sequence[tuple[str, str]]
    """Id of each record that failed, with its error."""
    unreadable: Sequence[tuple[int, str]]
    """Row of each record that could not be read, with the error."""
    skipped: Sequence[tuple[str, str, str]]
    """Id, part of the analysis and reason for each part that a record lacks."""
    missing: int
    """Number of records that other shards have still to do; there is no summary before they are done."""
    lines: Sequence[str]
    """The averages in words."""
    files: Sequence[str]
    """Names of the files of the summary."""
    missed: int = 0
    """Number of records that did not fail, but whose outcome is not what was asked for."""

    @property
    def is_clean(self) -> bool:
        """Whether every record was readable, did not fail and has the outcome that was asked for."""
        return not (self.failed or self.unreadable or self.missed)

    def summary(self) -> list[str]:
        """Return the averages, the counts and what went wrong, grouped by reason, as lines of text."""
        counts = [f"{counted(self.done, 'record')} done"]
        counts += [f"{len(self.failed)} failed"] if self.failed else []
        counts += [f"{counted(len(self.unreadable), 'row')} unreadable"] if self.unreadable else []
        counts += [f"{self.missing} left to other shards"] if self.missing else []
        lines = [*self.lines, *([""] if self.lines else []), ", ".join(counts)]
        lines += _grouped((f"{reason}", id) for id, reason in self.failed)
        lines += _grouped((f"no {part}: {reason}", id) for id, part, reason in self.skipped)
        lines += _grouped((reason, f"row {row}") for row, reason in self.unreadable)
        return lines

    def __repr__(self) -> str:
        open_ = f", {self.missing} left to other shards" if self.missing else ""
        return (
            f"RunReport({str(self.folder)!r}: {self.done} done, {len(self.failed)} failed, {len(self.unreadable)} "
            f"unreadable{open_})"
        )


def read_rows(folder: str | Path) -> pd.DataFrame:
    """Return the table of a finished run: `record`, `id` and `content`, then the columns of its analysis.

    Raises `RunError` if the run is not finished or the table is damaged.
    """
    import pandas as pd

    if RunFolder(folder).report() is None:
        inside = sorted(str(path.parent) for path in Path(folder).glob(f"*/{SETTINGS}"))
        advice = f"pass one of those in it ({', '.join(inside)})" if inside else "finish it with the same command first"
        raise RunError(f"{str(folder)!r} holds no finished run; {advice}")
    return pd.read_parquet(RunFolder(folder).summary / ROWS)


def _records_of(folder: RunFolder) -> dict[str, Any]:
    """The list of records, which a run writes before it starts. Raises `RunError` if it has vanished since."""
    records = folder.read(RECORDS)
    if records is None:
        raise RunError(f"{str(folder.path / RECORDS)!r} has vanished; bring the folder back, or choose another one")
    return records


def records_digest(records: Mapping[str, Any], stored: Iterable[StoredRecord]) -> str:
    """Return the SHA-256 of the list of records, with the rows that could not be read, and of all outcomes."""
    return digest(repr(records["unreadable"]), *(record.digest for record in stored))


def run_report(folder: RunFolder, analysis: Analysis) -> RunReport:
    """Return the report of a run. Raises `RunError` if every record failed."""
    records = _records_of(folder)
    stored = [record for name in records["names"] if (record := folder.stored(name)) is not None]
    failed = {record.name: record for record in stored if record.error is not None}
    if failed and len(failed) == len(records["names"]):
        first = next(iter(failed.values()))
        more = f"; the errors of all are in {str(folder.records)!r}" if len(failed) > 1 else ""
        raise RunError(f"{every_failed(analysis, len(failed))}; {first.id}: {first.error}{more}")
    missing = len(records["names"]) - len(stored)
    summary = folder.report() or {"lines": [], "files": {}, "missed": 0}
    if analysis.ends_with_model and not missing and not summary["files"]:
        summary["lines"] = ["all records are there; start the command of this run with this folder once more to end it"]
    return RunReport(
        folder=folder.path,
        done=len(stored) - len(failed),
        failed=tuple((record.id, str(record.error)) for record in failed.values()),
        unreadable=tuple((row, reason) for row, reason in records["unreadable"]),
        skipped=tuple((record.id, part, reason) for record in stored for part, reason in record.skipped.items()),
        missing=missing,
        lines=tuple(summary["lines"]),
        files=(*summary["files"],),
        missed=summary["missed"],
    )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The end of a run whose records are all done: a summary that is still to be written."""

    folder: RunFolder
    summary: Summary
    """The summary, to which all records were added one at a time."""
    done: Sequence[StoredRecord]
    """The records that did not fail."""
    sources: Mapping[str, Any]
    """The digests of all that the summary depends on."""

    @classmethod
    def of(cls, folder: RunFolder, analysis: Analysis, *, has_model: bool = False) -> Ending | None:
        """Return the end of a run, or None if its summary is there already or cannot be made.

        has_model: The caller can call `Summary.finish`; without it, a run that ends with the model gets no summary.
        """
        records = _records_of(folder)
        stored = [folder.stored_or_refuse(name) for name in records["names"]]
        sources = {"records": records_digest(records, stored), "shared": folder.shared_files()}
        known = folder.report()
        done = [record for record in stored if record.error is None]
        is_known = known is not None and all(known[name] == value for name, value in sources.items())
        if is_known or (analysis.ends_with_model and not (has_model and done)):
            return None
        summary = analysis.summary()
        for record in stored:
            summary.add(record) if record.error is None else summary.add_failed(record)
        return cls(folder=folder, summary=summary, done=done, sources=sources)

    @contextmanager
    def writing(self) -> Iterator[dict[Path, Callable[[Path], Any]]]:
        """Yield what writes each file of the averages, by its path; table and report are written around the block.

        The summary appears all at once, if the block ends without an error.
        """
        with self.folder.new_summary() as part:
            files, columns = self.summary.files(), self.summary.columns()
            _write_table(part / ROWS, self.done, columns)
            yield {part / name: write for name, write in files.items()}
            content = {**self.sources, "lines": list(self.summary.lines()), "missed": self.summary.missed}
            self.folder.write_report(part, content)


def _write_table(path: Path, done: Sequence[StoredRecord], columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows of the records that did not fail, in order, as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"record": each.name, "id": each.id, "content": each.content, **each.row, **columns.get(each.name, {})}
        for each in done
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)


def every_failed(analysis: Analysis, count: int) -> str:
    """Return the words for a run in which every record failed."""
    return f"{analysis.name} failed for {'the only record' if count == 1 else f'all {count} records'}"


def refuse_difference(one: Mapping[str, Any], other: Mapping[str, Any], refusal: str) -> None:
    """Raise `RunError` with the refusal and the entries in which the two differ, if they do."""
    if words := differences(one, other):
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        raise RunError(f"{refusal}: {'; '.join(words[:_NAMED])}{more}; choose another folder, or the same settings")


def refuse_shared(is_shared: bool) -> None:
    """Raise `RunError` for a model that several processes hold together: in a run each would take other records."""
    if is_shared:
        raise RunError(
            "the processes of a run compute records of their own, and those of a model with tp_plan have to compute "
            "the same; load the model without tp_plan, or call the analysis itself for each record"
        )


def _grouped(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Lines that name the records with the same problem together."""
    together: dict[str, list[str]] = {}
    for reason, name in problems:
        together.setdefault(reason, []).append(name)
    shown = {reason: ", ".join(names[:_NAMED]) for reason, names in together.items()}
    more = {reason: len(names) - _NAMED for reason, names in together.items()}
    return [
        f"  {names}{f' and {more[reason]} more' if more[reason] > 0 else ''}: {reason}"
        for reason, names in shown.items()
    ]
