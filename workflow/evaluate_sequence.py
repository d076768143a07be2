"""Evaluations of a sequence of edits as runs: steps on top of each other, kept as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from ..artefacts.files import digest, read_json, write_json
from ..data import EditRecord
from ..editing import (
    Baseline,
    EditCurve,
    EditError,
    EditReport,
    NormBound,
)
from ..editing.baselines import change_file, save_change, stored_change
from ..editing.evaluation import (
    MadeEdit,
    SequencePoint,
    SequenceSteps,
    baseline as measure_baseline,
)
from ..editing.requests import FAILED
from ..models import VisionLanguageModel
from .analysis import INPUT_ERRORS, Analysis, Outcome, RunContext, Summary, Task
from .costs import metered
from .evaluate_run import EVALUATION, EvaluationSummary, LocatedTogether, id_of, named_record, stored_report
from .run_folder import RunError, StoredRecord

_UNEDITED = "unedited"
_UNEDITED_LAYOUT, _POINT_LAYOUT = (f"multrace {name}" for name in ("unedited 1", "point 3"))
POINT, CURVE, DRAWING = "point.json", "curve.json", "curve.png"


@dataclass(frozen=True, kw_only=True)
class EvaluateSequenceRun(LocatedTogether):
    """Edits on top of earlier ones, one or several at a time; each step and each measurement is kept at once.

    The answers of the unedited model are asked first, and kept too. A run that goes on puts the edits that were kept
    back into the model, which then has the same bits as if it had never been stopped. It has one process, since each
    edit needs all earlier ones. A record whose edit fails counts as failed, and the sequence goes on.
    """

    name: ClassVar[str] = "evaluate sequence"
    is_ordered: ClassVar[bool] = True

    at: tuple[int, ...] = ()
    """Numbers of edits after which all questions so far are asked; they are also asked after the last edit."""
    per_step: int = 1
    """Number of edits that are made together; the records of a step are computed and kept together."""
    growth: float = 0.1
    """Relative growth of a weight's norm from which on a warning is due."""
    stop: bool = False
    """End the sequence there: the later records count as failed."""
    unedited: Path | None = None
    """Folder for the answers of the unedited model, which runs of the same model and records share; None keeps them in
    the folder of the run. It changes no result and is no setting of the run."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        own = {"at": list(self.at), "per_step": self.per_step, "growth": self.growth, "stop": self.stop}
        return super().settings() | own

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the analysis with settings that `settings` gave, which can sum up a run and make no edit."""
        own = {name: settings[name] for name in ("per_step", "growth", "stop")}
        return replace(super().from_settings(settings), at=tuple(settings["at"]), **own)

    @contextmanager
    def opened(self, vlm: VisionLanguageModel, work: RunContext) -> Iterator[Analysis]:
        """Yield the analysis that goes on with the sequence, whose earlier edits are then in the model."""
        session = self.session_editor(work).start(vlm, moments=self.moments_of(vlm, work))
        parts: dict[str, Baseline] = {}
        records, problems = self._usable(vlm, work, partial(self._ask_unedited, vlm, work.folder.shared, parts))
        reference = replace(Baseline.joined([*parts.values()]), model=vlm.name, revision=vlm.revision)
        bound, ability = NormBound(growth=self.growth, stop=self.stop), self.ability(work.calibration)
        beside = ability.beside(records.values())
        steps = SequenceSteps(vlm, session, reference, norm_bound=bound, ability=beside)
        with metered(work.folder, vlm.device) as meter, ExitStack() as stack:
            steps.meter = meter
            stack.enter_context(steps)
            for step in _groups(work.records, self.per_step):
                stored = {name: work.folder.stored(name) for name in step if name in records}
                if None in stored.values():
                    break
                for made in _restored(records, cast(Mapping[str, StoredRecord], stored)):
                    steps.restore(made)
                steps.resume()
            yield _Sequence(self, steps, stack, problems, last=[*records][-1])

    @property
    def together(self) -> int:
        """The number of edits of a step."""
        return self.per_step

    @property
    def _has_one_place(self) -> bool:
        return self.per_step > 1  # one solve for all edits of a step

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Edits are made in the block of `opened`."""
        raise EditError("each edit of a sequence needs the earlier ones; start them by run()")

    def summary(self) -> Summary:
        """Return the report on the state after the last edit, and the curve of the way there."""
        return SequenceSummary(bound=self.growth)

    def _ask_unedited(
        self, vlm: VisionLanguageModel, folder: Path, parts: dict[str, Baseline], name: str, record: EditRecord
    ) -> None:
        """Add the answers of the unedited model to a record's questions; they are kept in the folder once asked."""
        if self.unedited is not None:
            key = digest(vlm.weights_digest(), repr(asdict(self.evaluation)))[:12]
            folder = self.unedited / key
        path = folder / f"{_UNEDITED}-{name}.json"
        if not path.is_file():
            options = {"settings": self.evaluation, "batch_size": self.batch_size, "progress": False}
            part = measure_baseline(vlm, [record], **options)
            folder.mkdir(parents=self.unedited is not None, exist_ok=True)
            write_json(path, _UNEDITED_LAYOUT, part.as_json(), error=RunError)
        parts[name] = Baseline.from_json(read_json(path, _UNEDITED_LAYOUT, error=RunError))


class _Sequence(Analysis):
    """The steps of a sequence, each made on top of the earlier ones."""

    name: ClassVar[str] = EvaluateSequenceRun.name

    def __init__(
        self,
        run: EvaluateSequenceRun,
        steps: SequenceSteps,
        stack: ExitStack,
        problems: Mapping[str, str],
        *,
        last: str,
    ) -> None:
        self.run, self.steps, self.stack, self.problems, self.last = run, steps, stack, problems, last

    @property
    def together(self) -> int:
        """The number of edits of a step."""
        return self.run.per_step

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return what one more edit gives. Raises `EditError` if the sequence has been stopped."""
        (outcome,) = self.compute_together(vlm, [task])
        if not isinstance(outcome, Outcome):
            raise outcome
        return outcome

    def compute_together(self, vlm: VisionLanguageModel, tasks: Sequence[Task]) -> Sequence[Outcome | ValueError]:
        """Return what one more step gives: the outcome of each of its edits, or why there is none.

        The last one has what is measured after the step.
        """
        usable = {task.name: task for task in tasks if task.name not in self.problems}
        given: dict[str, Outcome | ValueError] = {}
        try:
            if self.steps.is_stopped:
                count = self.steps.count
                raise EditError(f"the sequence was stopped after {count} edits, since the norm of a weight had grown")
            given |= self._step(vlm, usable) if usable else {}
        except INPUT_ERRORS as error:
            given |= dict.fromkeys(usable, error)
        return [given.get(task.name) or EditError(self.problems[task.name]) for task in tasks]

    def _step(self, vlm: VisionLanguageModel, tasks: Mapping[str, Task]) -> dict[str, Outcome]:
        """The outcome of each task, by name; that of the last one has the files of the report, if one is due."""
        run, steps = self.run, self.steps
        made = steps.make([named_record(task) for task in tasks.values()], batch_size=run.batch_size)
        rows = {record.id: row for each in made for record, row in zip(each.records, each.rows, strict=True)}
        holders = {record.id: each for each in made for record in each.records}
        outcomes: dict[str, Outcome] = {}
        for name, task in tasks.items():
            id = id_of(task.record, name)
            edit, row = holders[id], {**rows[id], **run.place(task)}
            is_holder = edit.records[0].id == id and edit.change is not None
            if run.per_step > 1:
                row["change"] = None if edit.change is None else edit.records[0].id
            status = str(row["status"])
            error = status.removeprefix(f"{FAILED}: ") if status.startswith(FAILED) else None
            outcomes[name] = Outcome(row=row, files=_change_files(edit.change) if is_holder else {}, error=error)
        name, last = [*outcomes.items()][-1]
        return outcomes | {name: replace(last, files={**last.files, **self._measured(vlm, name, len(tasks))})}

    def _measured(self, vlm: VisionLanguageModel, name: str, step: int) -> dict[str, Callable[[Path], Any]]:
        """The files of what is measured after a step of so many edits that ends with this record, if it is due."""
        run, steps = self.run, self.steps
        if name == self.last or steps.is_stopped:
            state = steps.finish(self.stack, batch_size=run.batch_size)
        elif steps.is_due(run.at, step):
            state = steps.measure(batch_size=run.batch_size)
        else:
            return {}
        parts = {"statuses": state.statuses, "left_out": state.left_out, "step": run.per_step}
        report = EditReport.of(vlm, "sequence", run.evaluation, state.rows, **parts)
        is_cut = steps.is_stopped and name != self.last
        point = {"point": asdict(state.point), "exceeded_at": state.exceeded_at, "is_cut": is_cut}
        return {EVALUATION: report.save, POINT: lambda path: write_json(path, _POINT_LAYOUT, point, error=RunError)}

    def summary(self) -> Summary:
        """Return the summary of the run."""
        return self.run.summary()


class SequenceSummary(EvaluationSummary):
    """The report on the state after the last edit of a sequence, and the curve of the lengths measured on the way."""

    def __init__(self, *, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.points: list[SequencePoint] = []
        self.exceeded_at: int | None = None
        self.stopped_at: int | None = None

    def add(self, record: StoredRecord) -> None:
        """Add a record, with what was measured after its edit."""
        if not (record.folder / EVALUATION).is_file():
            return
        self.first = stored_report(record)
        content = read_json(record.folder / POINT, _POINT_LAYOUT, error=RunError)
        self.points.append(SequencePoint.from_json(content["point"]))
        self.exceeded_at = content["exceeded_at"]
        self.stopped_at = self.points[-1].edits if content["is_cut"] else None

    def add_failed(self, record: StoredRecord) -> None:
        """Add what was measured after an edit that failed."""
        self.add(record)

    def report(self) -> EditReport | None:
        """Return the report after the last edit, with the curve."""
        if self.first is None:
            return None
        curve = EditCurve(
            model=self.first.model,
            revision=self.first.revision,
            points=tuple(self.points),
            statuses=self.first.statuses,
            bound=self.bound,
            exceeded_at=self.exceeded_at,
            stopped_at=self.stopped_at,
        )
        return replace(self.first, curve=curve)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Return the files of the report, and the curve with its drawing."""
        report = self.report()
        curve = None if report is None else report.curve
        return super().files() | ({} if curve is None else {CURVE: curve.save, DRAWING: curve.plot})

    def lines(self) -> list[str]:
        """Return the table of free generation, then the points of the curve."""
        report = self.report()
        curve = None if report is None else report.curve
        return super().lines() + ([] if curve is None else ["", *curve.summary().splitlines()])


def _groups(names: Iterable[str], size: int) -> Iterator[list[str]]:
    """The names in groups of one size but for the last, as the run computes records together."""
    names = list(names)
    return (names[start : start + size] for start in range(0, len(names), size))


def _change_files(change: Any) -> dict[str, Callable[[Path], Any]]:
    """The file of a change, in the folder of the first record that it edits."""
    return {change_file(change): lambda path: save_change(change, path)}


def _restored(records: Mapping[str, EditRecord], stored: Mapping[str, StoredRecord]) -> list[MadeEdit]:
    """The changes of a step that was kept, each with the records that it edits; none of a step that was not begun."""
    groups: dict[Any, list[str]] = {}
    for name, each in stored.items():
        if each.row:  # an edit was made or attempted
            own = each.row.get("change", name)
            groups.setdefault(name if own is None else own, []).append(name)
    return [
        MadeEdit(
            records=tuple(records[name] for name in names),
            change=stored_change(stored[names[0]].folder),
            statuses=tuple(str(stored[name].row["status"]) for name in names),
            rows=[stored[name].row for name in names],
        )
        for names in groups.values()
    ]
