"""Run `multrace trace --data`: trace every line of a file, and report the lines that cannot be traced."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from ..artefacts.files import digest
from ..artefacts.folders import ArtefactError, write_whole
from ..data import DataError
from ..models import ModelError, VisionLanguageModel
from ..models.errors import gist
from ..tracing import CausalTrace, Corruption, TraceError, average
from .errors import CommandError
from .json_lines import read_lines, read_object, read_texts
from .options.asking import pictures_of
from .options.trace import TraceOptions
from .outputs import check_files, new_files
from .trace_files import TRACE, compute_trace, forget_cells, write_trace

REPORT, AVERAGE = "report.json", ("average.safetensors", "average.png")
_RECORD = "record.json"
_KEYS = ("image", "question", "constraint", "answer", "foil", "corrupt")
_PLACES = ("data", "limit", "out", "resume", "memory", "checks")
"""Options that change neither what is traced nor the result."""
_ERRORS = (CommandError, DataError, ModelError, TraceError, ArtefactError, OSError)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One line that can be traced, as far as that is known without the model."""

    line: int
    settings: TraceOptions
    corruption: Corruption

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return self.settings.out

    def identity(self) -> str:
        """Return everything that its trace depends on, including the content of pictures."""
        options = {each.name: getattr(self.settings, each.name) for each in fields(self.settings)}
        pictures = [path for path in (self.settings.image, *pictures_of(self.corruption)) if path is not None]
        digests = {str(path): digest(Path(path).read_bytes()) for path in pictures}
        kept = {name: value for name, value in options.items() if name not in _PLACES}
        return json.dumps({**kept, "pictures": digests}, indent=2, default=str) + "\n"

    def finished(self) -> CausalTrace | None:
        """Return the trace of an earlier run, if it belongs to the same record and is complete."""
        try:
            known = (self.folder / _RECORD).read_text(encoding="utf-8")
            return CausalTrace.load(self.folder / TRACE) if known == self.identity() else None
        except (OSError, UnicodeDecodeError, TraceError, ArtefactError):
            return None


def trace_records(settings: TraceOptions) -> int:
    """0 once every record is traced that can be; writes traces, average and report. CommandError if none can."""
    lines = read_lines(settings.data, "records")[: settings.limit]
    check_files(settings.out, (REPORT, *AVERAGE))
    found = {line: _prepared(settings, line, text) for line, text in lines}
    records = [each for each in found.values() if isinstance(each, _Record)]
    skipped = {line: reason for line, reason in found.items() if isinstance(reason, str)}
    traced: list[_Record] = []
    if records:
        vlm = settings.open_model()
        for record in records:
            try:
                _trace(vlm, record)
                traced.append(record)
            except _ERRORS as error:
                skipped[record.line] = gist(error)
                print(f"line {record.line}: skipped: {skipped[record.line]}", flush=True)
    reason = _write_average([record.folder / TRACE for record in traced], settings.out)
    _report(settings, [record.line for record in traced], dict(sorted(skipped.items())), reason)
    return 0


def _prepared(settings: TraceOptions, line: int, text: bytes) -> _Record | str:
    """The record of a line, or the reason why it cannot be traced."""
    try:
        words = read_texts(read_object(text, _KEYS), _KEYS)
        folder = cast(Path, settings.data).parent
        if words.get("image"):
            words["image"] = str(folder / words["image"])
        if words.get("corrupt"):
            words["corrupt"] = _placed(words["corrupt"], folder)
        out = settings.out / f"line_{line:04d}"
        asked = replace(settings, **words, data=None, limit=None, out=out)
        asked.check_question()
        return _Record(line=line, settings=asked, corruption=asked.corruption())
    except _ERRORS as error:
        return gist(error)


def _placed(corrupt: str, folder: Path) -> str:
    """A corruption whose paths are made relative to the folder."""
    kind, _, value = corrupt.partition(":")
    paths = {"swap": [value], "mean": value.split(",")}.get(kind)
    if paths is None or not value.strip():
        return corrupt
    return f"{kind}:{','.join(str(folder / path.strip()) for path in paths)}"


def _trace(vlm: VisionLanguageModel, record: _Record) -> None:
    """Trace the record and write the trace to its folder, unless that was done before."""
    trace, how = record.finished(), "done before"
    if trace is None:
        prompt, how = record.settings.prompt(vlm), "traced"
        trace = compute_trace(record.settings, vlm, prompt, record.corruption)
        write_trace(trace, prompt, record.folder, {_RECORD: record.identity()})
        forget_cells(record.folder)
    effect = f"total effect {trace.total_effect:.3f}"
    print(f"line {record.line}: {how}: {trace.question!r} -> {trace.answer!r}, {effect}", flush=True)


def _write_average(paths: Sequence[Path], out: Path) -> str | None:
    """Average the traces in these files; return why there is no average, or None. An average of other traces goes."""
    try:
        if len(paths) < 2:
            raise TraceError(f"an average needs two traces, there are {len(paths)}")
        mean = average(CausalTrace.load(path) for path in paths)
        with new_files(out) as folder:
            mean.save(folder / AVERAGE[0])
            mean.plot(folder / AVERAGE[1])
        return None
    except (TraceError, ArtefactError) as error:
        for name in AVERAGE:
            (out / name).unlink(missing_ok=True)
        return gist(error)


def _report(settings: TraceOptions, traced: Sequence[int], skipped: Mapping[int, str], reason: str | None) -> None:
    """Write and print what was traced and what was skipped. Raises `CommandError` if nothing was traced."""
    content: dict[str, Any] = {
        "records": str(settings.data),
        "traced": [{"line": line, "folder": f"line_{line:04d}"} for line in traced],
        "skipped": [{"line": line, "reason": text} for line, text in skipped.items()],
        "average": reason or AVERAGE[0],
    }
    write_whole(settings.out / REPORT, f"{json.dumps(content, indent=2)}\n".encode())
    if not traced:
        line, text = next(iter(skipped.items()))
        raise CommandError(
            f"none of the {len(skipped)} records in {str(settings.data)!r} could be traced; line {line}: {text} "
            f"(the others: {settings.out / REPORT})"
        )
    print(f"\n{len(traced)} records traced, {len(skipped)} skipped")
    print(*(f"  line {line}: {text}" for line, text in skipped.items()), sep="\n", end="\n" if skipped else "")
    print("average:", "none: " + reason if reason else ", ".join(str(settings.out / name) for name in AVERAGE))
    print("written:", settings.out / REPORT)
