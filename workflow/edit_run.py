"""Edits of many records in one solve: what `multrace edit` computes of each record, and of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from tqdm import tqdm

from ..artefacts import ArtefactError
from ..artefacts.files import digest
from ..data import DataError, EditRecord, EditRequest, find_spans, inspect_picture, questions_of
from ..data.errors import gist
from ..editing import (
    Augmentation,
    ClosedFormEditor,
    Delta,
    EditError,
    Moments,
    RequestValues,
)
from ..editing.requests import FAILED, edited_questions
from ..editing.solve import ClosedFormSession, contradictions
from ..models import VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace, EditSite, TraceError
from ..tracing.engine.positions import Item
from .analysis import INPUT_ERRORS, Analysis, Outcome, Record, Summary, Task, question_of_record
from .edit_outcome import EditOutcome, Place
from .located_edit import EditsAtSites, TraceShift, editor_at, locate, positions_of, trace_shifts
from .run_folder import REMADE, TRACES, RunError, StoredRecord
from .run_moments import moments_setting
from .trace_run import TRACE, TraceRun

CANDIDATES = ("constraint_last", "last")
"""The tokens among which a trace chooses: names, which mean the same token in other wordings, where the edit has to
work too."""
SITES = ("hidden", "mlp")
"""The kinds of sites that the choice of a place needs."""
EDIT, OUTCOME = "edit.safetensors", "edit.json"
_VALUES = "values.safetensors"


@dataclass(frozen=True, kw_only=True)
class EditTrace(TraceRun):
    """The trace that shows where to edit: of the answer that the model gives now, at tokens that all prompts have."""

    name: ClassVar[str] = "edit trace"
    positions: tuple[Item, ...] | None = CANDIDATES
    sites: tuple[str, ...] = SITES

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the trace of a record of an edit."""
        record = cast(EditRecord, task.record)
        question = replace(question_of_record(record), answer=None, foil=None)
        settings = replace(self, positions=positions_of(vlm, record, self.positions or CANDIDATES))
        return TraceRun.compute(settings, vlm, replace(task, record=question))


@dataclass(frozen=True, kw_only=True)
class EditRun(Analysis):
    """All records edited in one solve, with a value search of each that is kept as soon as it is there.

    A place is that of the editor, or the one that traces find: each record is traced first, and the layer and token of
    the editor are replaced. All values are searched for on the unedited model. The delta is the one that `editor.edit`
    (with traces, `locate_then_edit`) makes of all records that can be edited; it is made again from the kept values
    whenever the set of records has changed.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import Question, tiny_vlm_path
        >>> from multrace.workflow import EditRun, run
        >>> vlm = mt.load(tiny_vlm_path())
        >>> facts = {"Who won?": "Pruro", "Who lost?": "Draivo"}
        >>> records = [mt.EditRecord(question=Question(text=text), target=facts[text], id=text) for text in facts]
        >>> run(vlm, EditRun(editor=mt.MultEdit(layer=5, steps=40)), enumerate(records, 1), "edits", progress=False)
        RunReport('edits': 2 done, 0 failed, 0 unreadable)
        >>> with mt.Delta.load("edits/summary/edit.safetensors").applied(vlm):
        ...     vlm.answers([vlm.prompt_for(record.question) for record in records])
        ['Pruro', 'Draivo']
    """

    name: ClassVar[str] = "edit"
    ends_with_model: ClassVar[bool] = True

    editor: ClosedFormEditor | None = None
    """What makes the edit; None for a run that is only merged."""
    moments: Path | None = None
    """File of second moments of keys, for editors that need them; None for those of the model's own samples."""
    trace: EditTrace | None = None
    """How each record is traced; its place replaces that of the editor unless there are `trace_files`."""
    trace_files: tuple[Path, ...] = ()
    """Traces made before: one for each record, or an average for all."""
    each: bool = False
    """Edit each record at the place of its own trace instead of at one place, from the mean of the traces."""
    trace_after: bool = False
    """Trace each record again with the edit in place."""
    augmentation: Augmentation | None = None
    """Variants of each picture that become contexts."""
    together: int = 16  # pyrefly: ignore[bad-override] -- a field of this analysis
    """Number of records whose values are searched for together: more are faster on a GPU and need more memory. It
    decides how numbers are rounded, and no more."""

    def __post_init__(self) -> None:
        if self.trace_after and self.trace is None:
            raise TraceError("a second trace needs a first one; pass trace=, or trace_after=False")
        if self.together < 1:
            raise EditError(f"together is {self.together}; search for the values of at least 1 record at a time")

    @property
    def is_located(self) -> bool:
        """Whether traces choose the place."""
        return self.trace is not None or bool(self.trace_files)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; files count by their content."""
        editor = {} if self.editor is None else dict(self.editor.as_text())
        if self.is_located:
            editor = {name: value for name, value in editor.items() if name not in ("layer", "token")}
        return {
            "editor": editor,
            "moments": moments_setting(self.moments, self.editor),
            "trace": None if self.trace is None else self.trace.settings(),
            "trace_files": [digest(path.read_bytes()) for path in self.trace_files],
            "each": self.each,
            "trace_after": self.trace_after,
            "augmentation": None if self.augmentation is None else asdict(self.augmentation),
            "together": self.together,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return an analysis that can be merged and makes no edit."""
        return cls(together=settings["together"])

    def check(self, record: Record) -> None:
        """Raise an error for a question without a target, or for pictures or words that no model could use."""
        if not isinstance(record, EditRecord):
            raise EditError(f"{record.text!r} is a question without a target; add the new answer")
        check_questions(record)

    def sources(self, record: Record) -> tuple[Any, ...]:
        """Return the corruption of the record; its pictures count by their content."""
        return () if self.trace is None else self.trace.sources(record)

    def traces(self) -> EditTrace | None:
        """Return the trace of each record, where one is needed."""
        return self.trace if self.trace_after or not self.trace_files else None

    def calibrate(
        self,
        vlm: VisionLanguageModel,
        records: Mapping[str, Record],
        *,
        traces: Mapping[str, StoredRecord],
        known: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Mapping[str, Any] | None:
        """Return the site of each record from the traces; None if the editor names the place.

        Args:
            vlm: The model, which the editor and the moments are checked against.
            records: The records to edit, by name.
            traces: The trace of each record.
            known: The sites of fewer records, which must be those of now.
            progress: Show progress bars.

        Raises:
            EditError: The editor or the moments do not fit the model.
            TraceError: No trace shows a site.
            RunError: With more records, the traces name another place.
        """
        editor = self._made_editor
        if (moments := self._moments) is not None:
            moments.check(vlm)
        if not self.is_located:
            editor.projections(vlm)
            return None
        located, notes = sites_of(
            vlm,
            cast(Mapping[str, EditRecord], records),
            load_traces(self.trace_files) if self.trace_files else stored_traces(vlm, records, traces),
            per_request=self.each,
            editor=editor,
            moments=moments,
            positions=CANDIDATES if self.trace is None else self.trace.positions or CANDIDATES,
            progress=progress,
        )
        spare = next(iter(located.values()))  # for records whose edits fail in any case
        sites = {name: located.get(name, spare).as_json() for name in records}
        homes = {name: stored.name for name, stored in traces.items()}
        self._check_sites(sites, {} if known is None else known["sites"], records)
        return {"sites": sites, "traces": homes, "notes": list(notes)}

    def holds(self, calibration: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Return whether the sites were chosen from the traces of just these records."""
        return set(calibration["sites"]) == set(names)

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the values of one record. Raises `EditError` if it cannot be edited."""
        (outcome,) = self.compute_together(vlm, [task])
        if isinstance(outcome, Outcome):
            return outcome
        raise outcome

    def compute_together(self, vlm: VisionLanguageModel, tasks: Sequence[Task]) -> Sequence[Outcome | ValueError]:
        """Return the values of each record of a group. Those of one editor are searched for together."""
        outcomes: dict[str, Outcome | ValueError] = {}
        members: dict[ClosedFormEditor, list[tuple[Task, EditRequest]]] = {}
        sessions: dict[ClosedFormEditor, ClosedFormSession] = {}
        for task in tasks:
            try:
                request, editor = self.request(task), self._editor(vlm, task)
                if editor not in sessions:
                    sessions[editor] = ClosedFormSession(vlm, lambda _requests, editor=editor: editor)
                sessions[editor].check(request)
                members.setdefault(editor, []).append((task, request))
            except INPUT_ERRORS as error:
                outcomes[task.name] = error
        for editor, own in members.items():
            values = sessions[editor].search([request for _, request in own])
            for (task, _), result in zip(own, values, strict=True):
                outcomes[task.name] = _outcome(task, result, Place.of_editor(editor, vlm.layer_index(editor.place[0])))
        return [outcomes[task.name] for task in tasks]

    def summary(self) -> EditSummary:
        """Return the edit of all records together, and its report."""
        return EditSummary(analysis=self)

    def request(self, task: Task) -> EditRequest:
        """Return the request of a record, with variants of its picture if they are asked for."""
        record = cast(EditRecord, task.record)
        return self.augmentation.of(record) if self.augmentation and record.question.images else record

    def joint_edit(
        self, vlm: VisionLanguageModel, tasks: Sequence[Task], values: Sequence[RequestValues], *, progress: bool
    ) -> tuple[Delta, tuple[Place, ...], list[str]]:
        """Return one change with these values of all records, the place of each record, and notes."""
        requests, editor = [self.request(task) for task in tasks], self._made_editor
        places = [(_site(task).layer, _site(task).token) if self.is_located else None for task in tasks]
        values = without_contradictions(requests, values, places)
        if not self.is_located:
            editor = self._editor(vlm, tasks[0])
            place = Place.of_editor(editor, vlm.layer_index(editor.place[0]))
            delta = editor.edit(vlm, requests, moments=self._moments, values=values, progress=progress)
            return delta, (place,) * len(tasks), []
        sites = [_site(task) for task in tasks]
        options = {"moments": self._moments, "values": values, "progress": progress}
        work = EditsAtSites(vlm, requests, sites, editor=editor, **options)
        delta = work.jointly()
        notes = [*cast(Mapping[str, Any], tasks[0].calibration)["notes"], *work.notes]
        return delta, tuple(map(Place.of_site, sites)), notes

    def shifts(
        self,
        vlm: VisionLanguageModel,
        tasks: Sequence[Task],
        before: Sequence[CausalTrace | None],
        delta: Delta,
        *,
        progress: bool,
    ) -> tuple[TraceShift | None, ...]:
        """Return what the change moved in the trace of each record, which was `before` without it."""
        if not self.trace_after or self.trace is None:
            return ()
        corruptions = [
            None if trace is None else self.trace.corruption(question_of_record(task.record))
            for task, trace in zip(tasks, before, strict=True)
        ]
        options = {"positions": self.trace.positions or CANDIDATES, "sites": self.trace.sites}
        return trace_shifts(
            vlm,
            [cast(EditRecord, task.record) for task in tasks],
            corruptions,
            before,
            [delta],
            window=self.trace.window,
            progress=progress,
            **options,
        )

    @cached_property
    def _moments(self) -> Moments | None:
        return None if self.moments is None else Moments.load(self.moments)

    @property
    def _made_editor(self) -> ClosedFormEditor:
        if self.editor is None:
            raise EditError("this analysis has no editor and can only be merged; pass editor=")
        return self.editor

    def _editor(self, vlm: VisionLanguageModel, task: Task) -> ClosedFormEditor:
        """The editor at the place of a record, with its layer counted from 0."""
        editor = self._made_editor
        if self.is_located:
            return editor_at(editor, _site(task))[0]
        return editor if editor.layer is None else replace(editor, layer=vlm.layer_index(editor.layer))

    def _check_sites(
        self, sites: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], records: Mapping[str, Any]
    ) -> None:
        for name in known.keys() & sites.keys():
            one, other = ((each[name]["layer"], each[name]["token"]) for each in (known, sites))
            if one != other:
                raise RunError(
                    f"with other records the traces place the edit of {records[name].label!r} at layer {other[0]}, "
                    f"token {other[1]!r} instead of layer {one[0]}, token {one[1]!r}; choose another folder"
                )


class EditSummary(Summary):
    """The one change of all records, and what the model answers with it."""

    def __init__(self, *, analysis: EditRun) -> None:
        self.analysis = analysis
        self.values: list[RequestValues] = []
        self.names: list[str] = []
        self.folder = Path()
        """The folder of the run."""
        self.outcome: EditOutcome | None = None

    def add(self, record: StoredRecord) -> None:
        """Add the values of a record."""
        try:
            self.values.append(RequestValues.load(record.folder / _VALUES))
        except ArtefactError as error:
            raise RunError(f"{error}; {REMADE.format(repr(str(record.folder)))}") from error
        self.names.append(record.name)
        self.folder = record.folder.parents[1]

    def finish(self, vlm: VisionLanguageModel, tasks: Sequence[Task], *, progress: bool = True) -> None:
        """Solve for the change, and ask the model before, with and after it."""
        delta, places, notes = self.analysis.joint_edit(vlm, tasks, self.values, progress=progress)
        shifts: tuple[TraceShift | None, ...] = ()
        if self.analysis.trace_after:
            before = [self._trace(task) for task in tasks]
            shifts = self.analysis.shifts(vlm, tasks, before, delta, progress=progress)
        requests = [cast(EditRecord, task.record) for task in tasks]
        options = {"places": places, "notes": notes, "shifts": shifts, "progress": progress}
        self.outcome = EditOutcome.of(vlm, requests, delta, **options)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Return the change and its report."""
        return {} if self.outcome is None else {EDIT: self.outcome.delta.save, OUTCOME: self.outcome.save_report}

    def lines(self) -> list[str]:
        """Return what was edited where, and the answers."""
        return [] if self.outcome is None else list(self.outcome.lines())

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the status of each record, its answers, and how much of the change was retained."""
        if self.outcome is None:
            return {}
        outcome, columns = self.outcome, {}
        for index, name in enumerate(self.names):
            before, edited, after = outcome.answers[index]
            said = {"before": before, "edited": edited, "undone": after, "says_target": outcome.says_target(index)}
            status = {"status": str(outcome.delta.requests[index]["status"]), "retained": outcome.shares[index]}
            columns[name] = status | said
        return columns

    @property
    def missed(self) -> int:
        """The number of records whose targets the edited model does not say."""
        return 0 if self.outcome is None else self.outcome.missed

    def _trace(self, task: Task) -> CausalTrace | None:
        """The trace of a record without the change."""
        home = self.folder / TRACES / "records" / cast(Mapping[str, Any], task.calibration)["traces"][task.name]
        path = home / "trace.safetensors"
        return CausalTrace.load(path) if path.is_file() else None


def check_questions(record: EditRecord) -> None:
    """Raise `DataError` for a picture that cannot be read, or for words that a question of the record does not say."""
    for _, question in questions_of(record):
        for image in question.images:
            if isinstance(image, Path) and (problem := inspect_picture(image).problem):
                raise DataError(problem)
        for words in question.words.values():
            find_spans(question.text, words)


def unusable(
    vlm: VisionLanguageModel,
    records: Mapping[str, EditRecord],
    *,
    room: int = 1,
    check: Callable[[str, EditRecord], None] | None = None,
    progress: bool,
) -> dict[str, str]:
    """Return, by the names of records, why an edit of the record would fail, before the edits of all are made together.

    The prompts of all its questions are made once, which decodes their pictures.

    room: how many tokens of an answer have to fit behind each question. check: raises the error of an edit of one
    record, which it gets with its name.
    """
    problems: dict[str, str] = {}
    words = {"desc": "checking records", "unit": "record", "leave": False, "delay": 1.0}
    for name, record in tqdm(records.items(), disable=not progress, **words):
        try:
            for _, question in questions_of(record):
                vlm.check_room([vlm.prompt_for(question)], room)
            for question in edited_questions(record):
                vlm.prompt_for(question, answer=record.target)
            if check is not None:
                check(name, record)
        except INPUT_ERRORS as error:
            problems[name] = gist(error)
    return problems


def stored_traces(
    vlm: VisionLanguageModel, names: Iterable[str], stored: Mapping[str, StoredRecord]
) -> list[CausalTrace | TraceError]:
    """Return the traces of the records of these names, or why they could not be traced."""
    traces: list[CausalTrace | TraceError] = []
    for name in names:
        record = stored[name]
        if record.error is not None:
            traces.append(TraceError(record.error))
        else:  # a run has one model by its weights, which may have been moved since it was traced
            traces.append(replace(record.load(TRACE, CausalTrace), model=vlm.name))
    return traces


def sites_of(
    vlm: VisionLanguageModel,
    records: Mapping[str, EditRecord],
    traces: Sequence[CausalTrace | TraceError] | AverageTrace,
    *,
    progress: bool,
    **options: Any,
) -> tuple[dict[str, EditSite], tuple[str, ...]]:
    """Return the site of each record, by its name, and the notes of `locate`, which takes the options.

    Records that are `unusable` are left out, since their edits fail in any case.
    """
    problems = unusable(vlm, records, progress=progress)
    names = [name for name in records if name not in problems]
    if not names:
        raise TraceError(next(iter(problems.values())))
    if problems and not isinstance(traces, AverageTrace):
        traces = [trace for name, trace in zip(records, traces, strict=False) if name not in problems]
    located = locate(vlm, [records[name] for name in names], traces=traces, progress=progress, **options)
    return dict(zip(names, located.edit_sites, strict=True)), located.notes


def load_traces(paths: Sequence[Path]) -> tuple[CausalTrace, ...] | AverageTrace:
    """Return the traces in these files, one for each request, or an average for all of them.

    Raises `TraceError` if a file is missing, damaged or no trace, or for an average beside other files.
    """
    found = [_load(path) for path in paths]
    averages = [trace for trace in found if isinstance(trace, AverageTrace)]
    if averages and len(found) > 1:
        raise TraceError("pass one trace for each request, or one average for all of them, not both")
    return averages[0] if averages else tuple(trace for trace in found if isinstance(trace, CausalTrace))


def _load(path: Path) -> CausalTrace | AverageTrace:
    try:
        return CausalTrace.load(path)
    except (TraceError, ArtefactError) as error:
        try:
            return AverageTrace.load(path)
        except (TraceError, ArtefactError):
            raise error from None


def _outcome(task: Task, values: RequestValues, place: Place) -> Outcome | EditError:
    """The values of one record, with the hardest of its goals in the row."""
    if values.status.startswith(FAILED):
        return EditError(values.status.removeprefix(f"{FAILED}: "))
    record = cast(EditRecord, task.record)
    worst = min(values.results, key=lambda result: result.probability, default=None)
    row = {"question": record.question.text, "target": record.target, "layer": place.layer, "token": str(place.token)}
    row |= {"loss": worst and worst.loss, "probability": worst and worst.probability}
    steps = max((result.steps for result in values.results), default=0)
    return Outcome(row={**row, "steps": steps}, files={_VALUES: values.save})


def without_contradictions(
    requests: Sequence[EditRequest], values: Sequence[RequestValues], places: Sequence[Any]
) -> list[RequestValues]:
    """Return the values, failed for requests that want different answers at the same key of the same place."""
    kept = list(values)
    for place in set(places):
        goals = [(n, each.keys[0]) for n, own in enumerate(values) if places[n] == place for each in own.results]
        if not goals:
            continue
        owners, keys = zip(*goals, strict=True)
        for one, other in contradictions(keys, [requests[owner].target for owner in owners]):
            label = requests[owners[other]].label
            reason = f"{FAILED}: it has the key of {label!r} and another target; drop one of them"
            kept[owners[one]] = RequestValues(status=reason)
    return kept


def _site(task: Task) -> EditSite:
    """The site that was chosen for a record."""
    return EditSite(**cast(Mapping[str, Any], task.calibration)["sites"][task.name])
