"""Runs: one analysis of many records, resumable, in shards, with averages. The loop behind every command with --data.

An `Analysis` (analysis.py) says what is computed of one record. `run` does that for every record of an iterable such as
`multrace.data.read_data(...)`, and keeps each outcome in the folder of the run as soon as it is there
(`run_folder.py` describes the files). A call that was stopped at any moment, even by SIGKILL, is continued by the next
one, and the end result has the same bytes as that of an undisturbed run:

* Each record has a folder of its own, which appears all at once. It is named by the record's id and by a SHA-256 of
  everything that its outcome depends on besides the settings and the model, never by a line number or a path.
* Averages are computed at the end, from the stored results in the order of the records, one at a time in memory.
* The folder belongs to one analysis, one set of settings, one model (by a digest of its weights) and one version of
  multrace. Other ones are refused with the difference, as is a folder with records that this run does not have. More
  records than before are fine.
* A record that cannot be analysed is kept with its error, and the run goes on. An error of the environment, such as a
  full disk, a vanished folder or a vanished picture, stops the run with a `RunError`.
* With `shard`, or under `torchrun` and `accelerate launch`, a process computes its share of the records. Processes may
  use one folder, and the last one to end makes the summary; or each a folder of its own, and `merge` joins them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import distributed
from tqdm import tqdm

from .. import models
from ..artefacts.files import digest
from ..data import DataError
from ..data.errors import gist
from ..data.facts import counted
from .analysis import (
    INPUT_ERRORS,
    Analysis,
    Ending,
    Outcome,
    Record,
    Rows,
    RunContext,
    RunReport,
    Task,
    every_failed,
    plain,
    question_of_record,
    refuse_difference,
    refuse_shared,
    run_report,
)
from .run_folder import (
    CALIBRATION,
    RECORDS,
    SETTINGS,
    TRACES,
    Contents,
    FolderInUseError,
    RunError,
    RunFolder,
    Shard,
    StoredRecord,
    record_name,
)

_WAIT = 60.0
"""Seconds that the files of other machines may need to become visible here."""
_PATIENCE = timedelta(days=30)
"""How long a process waits for the others, which may have slower records."""


@dataclass(frozen=True)
class ModelToLoad:
    """A model that is opened only if something has to be computed; the options are those of `multrace.load`."""

    path_or_id: str | os.PathLike[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> models.VisionLanguageModel:
        """Return the model. Under torchrun, the device map "cuda" means the process's own accelerator."""
        options = dict(self.options)
        if options.get("device_map") == "cuda" and "LOCAL_RANK" in os.environ:
            options["device_map"] = f"cuda:{os.environ['LOCAL_RANK']}"
        return models.load(self.path_or_id, **options)

    def source(self) -> dict[str, Any] | None:
        """Return where the model lies, its options, and sizes and dates of its files; None if it is not here yet.

        As long as these stay the same, the model is the same.
        """
        place = self._place()
        if place is None:
            return None
        paths = sorted(place.iterdir()) if place.is_dir() else [place]
        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()}
        kept = {name: value for name, value in self.options.items() if name not in ("device_map", "offload_folder")}
        return {"folder": str(place.absolute()), "options": plain(kept), "files": files}

    def _place(self) -> Path | None:
        """The folder of the model's files, or its GGUF file, if they are on this machine."""
        path = Path(self.path_or_id).expanduser()
        if path.exists():
            return path
        try:
            known = huggingface_hub.try_to_load_from_cache(
                str(self.path_or_id), "config.json", revision=self.options.get("revision")
            )
        except ValueError:  # neither a folder nor an id: opening it explains that
            return None
        return Path(known).parent if isinstance(known, str) else None


def run(
    vlm: models.VisionLanguageModel | ModelToLoad,
    analysis: Analysis,
    records: Rows,
    folder: str | Path,
    *,
    shard: Shard | str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> RunReport:
    """Analyse every record, keep each outcome in the folder, and return what was done.

    Continues what an earlier call with the same settings began. Under `torchrun` or `accelerate launch` each process
    computes its share of the records, and the first one makes the summary after all have ended.

    Args:
        vlm: The model, or a `ModelToLoad`, which is opened only if there is something to compute.
        analysis: What is computed of each record.
        records: Pairs of a row number and a record, or of a row number and the error of an unreadable record, such as
            `read_data` yields or `enumerate(records, 1)`.
        folder: The folder of the run: new, empty, or of an earlier call.
        shard: The part of the records to compute, a `Shard` or text such as "2/8" (default: all).
        retry_failed: Analyse records again that failed in an earlier call.
        progress: Show a progress bar with the time left.

    Returns:
        The counts, errors, averages in words and files of the run.

    Raises:
        RunError: The folder belongs to another run or is in use, nothing could be analysed, or the environment failed.
        ModelError: The model cannot be opened.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import Question, tiny_vlm_path
        >>> from multrace.workflow import TraceRun, run
        >>> vlm = mt.load(tiny_vlm_path())
        >>> names = ("Kimdor", "Lovmis")
        >>> questions = [Question(text=f"Who founded {name}?", constraint=name, id=name) for name in names]
        >>> settings = TraceRun(corrupt="text-noise:3", positions=("last",), sites=("hidden",), even_if_weak=True)
        >>> run(vlm, settings, enumerate(questions, 1), "run", progress=False)
        RunReport('run': 2 done, 0 failed, 0 unreadable)
    """
    given = Shard.parse(shard) if isinstance(shard, str) else shard or Shard()
    refuse_shared("tp_plan" in vlm.options if isinstance(vlm, ModelToLoad) else vlm.processes > 1)
    with _process_group() as (rank, size, barrier):
        if analysis.is_ordered and given.part(rank, size).count > 1:
            raise RunError(f"{analysis.name} has no shards: each edit needs all earlier ones; start one process")
        job = _Job(vlm, analysis, records, RunFolder(folder), progress=progress and rank == 0)
        job.work(given.part(rank, size), retry_failed=retry_failed)
        barrier()
        if rank == 0:
            job.summarise(wait=_WAIT if size > 1 else 0.0)
        barrier()
        return job.report()


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One record of the run, without and with the model."""

    name: str
    id: str
    row: int
    content: str
    record: Record
    problem: str | None
    """Why its files cannot be read, or None."""


class _Job:
    """One process's share of a run."""

    def __init__(
        self,
        vlm: models.VisionLanguageModel | ModelToLoad,
        analysis: Analysis,
        records: Rows,
        folder: RunFolder,
        *,
        progress: bool,
        is_part: bool = False,
    ) -> None:
        """Read the records. is_part: the run is part of another one, which says when records may be missing."""
        self.is_part = is_part
        self.model, self.analysis, self.folder, self.progress = vlm, analysis, folder, progress
        self.contents = Contents()
        self.unreadable: list[list[Any]] = []
        self.entries: dict[str, _Entry] = {}
        self._computing = analysis
        """The analysis that computes the records, as `Analysis.opened` yields it."""
        self._take(records)

    def _take(self, records: Rows) -> None:
        words = {"desc": "reading records", "unit": "record", "leave": False, "delay": 1.0}
        for row, record in tqdm(records, disable=not self.progress, **words):
            if isinstance(record, DataError):
                self.unreadable.append([row, gist(record)])
                continue
            entry = self._entry(row, record)
            if (twin := self.entries.get(entry.name)) is not None:
                self.unreadable.append([row, f"the same record as row {twin.row}"])
            else:
                self.entries[entry.name] = entry
        if not self.entries:
            first = f"; row {self.unreadable[0][0]}: {self.unreadable[0][1]}" if self.unreadable else ""
            raise RunError(f"there is no record to analyse{first}")

    def _entry(self, row: int, record: Record) -> _Entry:
        """The record with its name, and what is wrong with its files."""
        id, problem = record.id or question_of_record(record).text, None
        try:
            content, key = self._keys(record)
        except INPUT_ERRORS as error:
            problem = gist(error)
            content = key = Contents(by_path=True).key(record)
        return _Entry(name=record_name(id, key), id=id, row=row, content=content, record=record, problem=problem)

    def _keys(self, record: Record) -> tuple[str, str]:
        """SHA-256 of the record's content, and of everything that its outcome depends on."""
        content = self.contents.key(record)
        return content, self.contents.key(content, *self.analysis.sources(record))

    @cached_property
    def vlm(self) -> models.VisionLanguageModel:
        """The model, opened at the first use."""
        return self.model.open() if isinstance(self.model, ModelToLoad) else self.model

    def work(self, shard: Shard, *, retry_failed: bool = False) -> None:
        """Analyse the records of a shard that are not done yet."""
        self._check_any()
        self.folder.prepare()
        with self.folder.working(shard):
            self._begin()
            groups = [group for place, group in enumerate(self._groups()) if shard.holds(place)]
            known = {name: self.folder.stored(name) for group in groups for name in group}
            todo = {name for name, stored in known.items() if stored is None or (retry_failed and stored.error)}
            self._say_damaged(f"records/{name}" for name in self.folder.damaged(todo))
            if not self._mend_shared() and not todo:
                return
            if todo:
                self.folder.remove_summary()
            if self.analysis.is_ordered and todo:
                todo = {*list(known)[min(map(list(known).index, todo)) :]}
                for name in todo:
                    self.folder.remove(name)
            calibration = self._calibration(shard)
            words = {"desc": self.analysis.name, "unit": "record", "disable": not self.progress}
            with self._opened(calibration), tqdm(total=len(known), initial=len(known) - len(todo), **words) as bar:
                for group in groups:
                    if names := [name for name in group if name in todo]:
                        self._analyse(group, names, calibration, shard)
                        bar.update(len(names))

    def _mend_shared(self) -> bool:
        """Remove changed files of what is made once for all records; return whether something has to be made anew."""
        with self.folder.alone():
            report = self.folder.report()
            damaged = self.folder.remove_changed(None if report is None else report["shared"])
        self._say_damaged(damaged)
        if damaged or self._has_damaged_traces():
            return True
        if report is None:
            return self.analysis.ends_with_model
        return self.folder.shared_files() != report["shared"]

    def _has_damaged_traces(self) -> bool:
        """Whether the run that comes first is not as it was when it was finished; it may have been removed."""
        folder = RunFolder(self.folder.path / TRACES)
        if not folder.path.is_dir():
            return False
        settings, records = folder.read(SETTINGS), folder.read(RECORDS)
        if settings is None or records is None or folder.report() is None:
            return True
        return None in map(folder.stored, records["names"])

    def _say_damaged(self, names: Iterable[str]) -> None:
        names = sorted(names)
        if names and self.progress:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            tqdm.write(f"not as they were written, and made anew: {names[0]!r}{more}, in {str(self.folder.path)!r}")

    @contextmanager
    def _opened(self, calibration: Mapping[str, Any] | None) -> Iterator[None]:
        """A block in which the analysis is ready to compute records."""
        records = {name: entry.record for name, entry in self.entries.items() if self._problem(entry) is None}
        work = RunContext(folder=self.folder, records=records, calibration=calibration, progress=self.progress)
        with self.analysis.opened(self.vlm, work) as self._computing:
            yield

    def _work_on_all(self, shard: Shard) -> None:
        """Analyse the records of a shard, and then those of other shards that no other process is analysing."""
        shards = [shard, *(Shard(index, shard.count) for index in range(shard.count) if index != shard.index)]
        while True:
            for each in shards:
                with suppress(FolderInUseError):
                    self.work(each)
            if not self.folder.missing(self.entries):
                return
            time.sleep(1)

    def _groups(self) -> list[list[str]]:
        """The names of all records, those that go through the model together in one list."""
        size = self.analysis.together
        if size == 1:
            return [[name] for name in self.entries]
        groups: list[list[str]] = [[]]
        count = 0
        for name, entry in self.entries.items():
            is_ready = self._problem(entry) is None
            if is_ready and count == size:
                groups.append([])
                count = 0
            groups[-1].append(name)
            count += is_ready
        return groups

    def _check_any(self) -> None:
        """Raise `RunError` if no record can be analysed, as far as that shows before the model is opened."""
        problem = ""
        for entry in self.entries.values():
            if (reason := self._problem(entry)) is None:
                return
            problem = problem or f"{entry.id}: {reason}"
        raise RunError(f"{every_failed(self.analysis, len(self.entries))}; {problem}")

    def _begin(self) -> None:
        """Check that the folder belongs to this run, and write what identifies it."""
        with self.folder.alone():
            self._check_settings()
            records = {"names": list(self.entries), "unreadable": self.unreadable}
            others = self.folder.others(self.entries)
            if (known := self.folder.read(RECORDS)) == records and not others:
                return
            if self.analysis.is_whole and known is not None and known["names"] != records["names"]:
                raise RunError(
                    f"{str(self.folder.path)!r} holds a run of other records, and {self.analysis.name} depends on all "
                    "of them together; choose another folder, or the same records"
                )
            stale = []
            for name in others:
                stored = self.folder.stored(name)
                if stored is None or stored.error is not None or self.is_part:
                    self.folder.remove(name)
                else:
                    stale.append(stored.id)
            if stale:
                raise RunError(
                    f"{str(self.folder.path)!r} holds results of {counted(len(stale), 'record')} that this run does "
                    f"not have, such as {min(stale)!r}: the data, their pictures or the limit differ; choose another "
                    "folder"
                )
            self.folder.remove_summary()
            self.folder.write(RECORDS, records)

    def _check_settings(self) -> None:
        """Write the settings, or compare them with those of the folder; opens the model only if its files changed."""
        own = {"analysis": self.analysis.name, "version": _version(), "settings": plain(self.analysis.settings())}
        known = self.folder.read(SETTINGS)
        refusal = f"{str(self.folder.path)!r} holds a run with other settings"
        if known is not None:
            refuse_difference(own, {name: known[name] for name in own}, refusal)
        elif self.folder.names():
            raise RunError(
                f"{str(self.folder.path)!r} holds records without {SETTINGS}, which tells their settings; choose "
                "another folder"
            )
        source = self.model.source() if isinstance(self.model, ModelToLoad) else None
        if known is not None and source is not None and source == known["source"]:
            return
        own["model"] = self.vlm.weights_digest(progress=self.progress)
        if known is not None:
            refuse_difference({"model": own["model"]}, {"model": known["model"]}, refusal)
        self.folder.write(SETTINGS, {**own, "hash": digest(repr(own)), "source": source})

    def _calibration(self, shard: Shard) -> Mapping[str, Any] | None:
        """What is measured once for all records; the first process measures, and the others read it."""
        entries = [entry for entry in self.entries.values() if self._problem(entry) is None]
        names = [entry.name for entry in entries]
        known = self._known_calibration(names)
        if known is not None and not self._has_damaged_traces():
            return known
        traces = self._traces(entries, shard)
        with self.folder.alone():
            if (known := self._known_calibration(names)) is None:
                stored = self.folder.read(CALIBRATION)
                known = self.analysis.calibrate(
                    self.vlm,
                    {entry.name: entry.record for entry in entries},
                    traces=traces,
                    known=None if stored is None else stored["values"],
                    progress=self.progress,
                )
                if known is not None:
                    self.folder.write(CALIBRATION, {"values": plain(known)})
            return known

    def _known_calibration(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        """What an earlier call or another process has measured, if it holds for these records."""
        stored = self.folder.read(CALIBRATION)
        return stored["values"] if stored is not None and self.analysis.holds(stored["values"], names) else None

    def _traces(self, entries: Sequence[_Entry], shard: Shard) -> dict[str, StoredRecord]:
        """The outcomes of the analysis that comes first, by the names that the records have here."""
        analysis = self.analysis.traces()
        if analysis is None:
            return {}
        rows = [(entry.row, entry.record) for entry in entries]
        job = _Job(self.vlm, analysis, rows, RunFolder(self.folder.path / TRACES), progress=self.progress, is_part=True)
        job._work_on_all(shard)
        job.summarise(wait=0)
        stored = [job.folder.stored_or_refuse(name) for name in job.entries]
        return {entry.name: each for entry, each in zip(entries, stored, strict=True)}

    def _analyse(
        self, group: Sequence[str], names: Sequence[str], calibration: Mapping[str, Any] | None, shard: Shard
    ) -> None:
        """Compute the outcomes of a group of records, and keep those of these names, or their errors, all at once."""
        errors = {name: self._problem(self.entries[name]) for name in group}
        tasks = self._tasks([name for name in group if errors[name] is None], calibration)
        outcomes: dict[str, Outcome] = {}
        if any(task.name in names for task in tasks):
            for task, outcome in zip(tasks, self._outcomes(tasks), strict=True):
                if isinstance(outcome, Outcome):
                    outcomes[task.name] = outcome
                error = outcome.error if isinstance(outcome, Outcome) else gist(outcome)
                if error is not None and task.name in names:
                    self._check_unchanged(self.entries[task.name], outcome if isinstance(outcome, Exception) else None)
                    errors[task.name] = error
        with self.folder.new_records(shard) as part:
            for name in names:
                self._keep(self.entries[name], outcomes.get(name, Outcome(row={})), errors[name], part / name)

    def _tasks(self, names: Sequence[str], calibration: Mapping[str, Any] | None) -> list[Task]:
        numbers = {name: number for number, name in enumerate(self.entries)}
        return [
            Task(record=self.entries[name].record, name=name, number=numbers[name], calibration=calibration)
            for name in names
        ]

    def _outcomes(self, tasks: Sequence[Task]) -> Sequence[Outcome | ValueError]:
        try:
            if self._computing.together > 1:
                return self._computing.compute_together(self.vlm, tasks)
            return [self._outcome(task) for task in tasks]
        except (OSError, MemoryError, torch.OutOfMemoryError) as cause:
            entry = self.entries[tasks[0].name]
            raise RunError(
                f"the run stopped at {entry.id}: {gist(cause)}; what is done is kept, so mend that and start again"
            ) from cause

    def _outcome(self, task: Task) -> Outcome | ValueError:
        try:
            return self._computing.compute(self.vlm, task)
        except INPUT_ERRORS as error:
            return error

    def _keep(self, entry: _Entry, outcome: Outcome, error: str | None, folder: Path) -> None:
        """Write what there is of a record into a new folder."""
        if error is not None and self.progress:
            tqdm.write(f"{entry.id}: {error}")
        folder.mkdir()
        for name, result in outcome.results.items():
            result.save(folder / f"{name}.safetensors")
        for name, write in outcome.files.items():
            write(folder / name)
        own = {"id": entry.id, "content": entry.content, "row": dict(outcome.row)}
        self.folder.write_record(folder, {**own, "skipped": dict(outcome.skipped), "error": error})

    def _problem(self, entry: _Entry) -> str | None:
        """Why the record cannot be analysed, as far as that shows without the model."""
        try:
            self.analysis.check(entry.record)
        except INPUT_ERRORS as error:
            return gist(error)
        return entry.problem

    def _check_unchanged(self, entry: _Entry, cause: Exception | None) -> None:
        """Raise `RunError` if the record failed because its files vanished or changed while the run went on."""
        try:
            _, key = self._keys(entry.record)
        except INPUT_ERRORS as error:
            raise RunError(
                f"a file of {entry.id!r} has vanished since the run began: {gist(error)}; bring it back and start again"
            ) from cause
        if record_name(entry.id, key) != entry.name:
            raise RunError(f"a picture of {entry.id!r} changed while the run went on; start again") from cause

    def summarise(self, *, wait: float) -> None:
        """Make the summary once all records are done; `wait` is for files of other machines to become visible."""
        end = time.monotonic() + wait
        while self.folder.missing(self.entries) and time.monotonic() < end:
            time.sleep(1)
        if not self.folder.missing(self.entries):
            with self.folder.alone():
                self._end()

    def _end(self) -> None:
        """Write the summary, unless it is there already."""
        if (ending := Ending.of(self.folder, self.analysis, has_model=True)) is None:
            return
        if self.analysis.ends_with_model:
            stored = self.folder.read(CALIBRATION)
            calibration = None if stored is None else stored["values"]
            tasks = self._tasks([record.name for record in ending.done], calibration)
            ending.summary.finish(self.vlm, tasks, progress=self.progress)
        with ending.writing() as files:
            for path, write in files.items():
                write(path)

    def report(self) -> RunReport:
        """Return what was done. Raises `RunError` if every record failed."""
        return run_report(self.folder, self.analysis)


def _version() -> str:
    """The version of multrace; its root is above this floor, and has been imported whenever this runs."""
    return sys.modules[__name__.partition(".")[0]].__version__


@contextmanager
def _process_group() -> Iterator[tuple[int, int, Callable[[], object]]]:
    """Yield the number of this process, how many there are, and a barrier; set up by torchrun or accelerate launch."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield 0, 1, lambda: None
        return
    is_ours = not distributed.is_initialized()
    if is_ours:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield int(distributed.get_rank()), int(distributed.get_world_size()), distributed.barrier
    finally:
        if is_ours:
            distributed.destroy_process_group()
