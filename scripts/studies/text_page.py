"""The page of the study of editors on a real text model, written from the folders of its runs as far as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...artefacts import read_json
from ...editing.evaluation import EditCost, EditReport, ProbeRow, SequencePoint
from ...workflow import StoredRecord, read_cost
from ...workflow.evaluate_run import EVALUATION, stored_report
from ...workflow.evaluate_sequence import SequenceSummary
from ...workflow.run_folder import RECORDS, SETTINGS as RUN_SETTINGS, RunFolder
from .text_facts import DATA_SETS, DataSet, Share, TextScores, scores_of
from .text_rows import TextRow, text_rows

NAME = "results_real.md"
CHOICE = "multrace text choice 1"
_HEADER = """# Editors on a real text model: CounterFact and zsRE

Made by `python -m multrace.scripts.studies.results_real` on {model}. The model continues texts and was trained on real
ones, so that nobody here put into it the facts that are edited. [Results on the embedded model](results.md) are of
pictures and of facts that were taught.

## How to read the tables

- The edits of each file are halved, every second one going to either half. The settings of a row (layer and token, rate
  or step) are chosen on edits of one half, one edit at a time, by the mean of rewrite, rephrase and unchanged, and are
  reported on the other. Sequences that are longer than the reporting half go on with the last edits of the first.
- CounterFact is asked as it is, after a line end, and zsRE as "Question: … Answer:". All answers are **generated
  freely**; no target is fed in.
- **The model goes on after its answers**, so an exact match would be next to none. An answer is right here if it
  *begins with* the whole words of the wanted one (without articles, in any case).
- *rewrite* (efficacy): answers to the edited question that begin with the target. *rephrase* (generality): the same in
  other words.
- *unchanged* (locality): questions about others whose first words, up to the first mark that ends them, are those of
  the unedited model. *right*: those whose answers begin with the right answer, and in parentheses that share as a
  share of the unedited model's own: a small model knows few of these answers, and an editor cannot keep what is not
  there.
- *step*: edits that are made together. *s per edit*: of the first and of the last hundred edits, on a machine that
  may have done other work too, and only of calls that were not killed. *memory*: how far the peak of the process rose.
  *growth*: largest relative growth of the norm of an edited weight. *perplexity*: of texts that the unedited model
  sampled, as a multiple of that before.
- Brackets hold 95 % bootstrap intervals over edits. The number of edits that were made stands in each line; "not run
  yet" is said where there are none, and a sequence that is under way is shown up to its last measurement.
- Second moments are over texts that the model sampled by itself.

| row | editor |
|---|---|
{legend}
"""
_TITLES = {
    "single": "one edit at a time",
    "steps": "in sequence, a hundred edits per step",
    "sequence": "in sequence, one edit per step",
}
_COLUMNS = (
    *("row", "edits", "step", "rewrite", "rephrase", "unchanged", "right", "growth", "perplexity", "s per edit"),
    "memory",
)


# ---- where runs are ----


def folder_of(out: Path, data_set: str, setting: str, row: str, length: int | None) -> Path:
    """Return the folder of a run. length: that of a sequence, since sequences of other lengths are other runs."""
    return out / "runs" / data_set / (setting if length is None else f"{setting} {length}") / row


def choice_of(out: Path, data_set: str, row: str) -> Path:
    """Return the file of the settings that were chosen for a row."""
    return out / "chosen" / data_set / f"{row}.json"


# ---- what runs hold ----


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """A line of a table: a row after some number of edits."""

    scores: TextScores
    edits: int
    step: int = 1
    failed: int = 0
    """Number of edits that could not be made, which no score of single edits holds."""
    growth: float | None = None
    cost: EditCost | None = None


def single_scores(folder: Path) -> TextScores:
    """Return the scores of a run of single edits, as far as it is."""
    return scores_of(_rows(_stored(folder)))


def _stored(folder: Path) -> list[StoredRecord]:
    """What a run has kept so far, in the order of its records."""
    run = RunFolder(folder)
    names = run.read(RECORDS) if folder.is_dir() else None
    found = [run.stored(name) for name in names["names"]] if names is not None else []
    return [each for each in found if each is not None]


def _rows(stored: Sequence[StoredRecord]) -> Iterator[ProbeRow]:
    for each in stored:
        if each.error is None:
            yield from stored_report(each).rows


def _lines(out: Path, data_set: DataSet, setting: str, row: TextRow) -> list[MeasuredRow]:
    """The lines of a row, from the longest run that is there."""
    if setting == "single":
        folder = folder_of(out, data_set.name, setting, row.name, None)
        stored = _stored(folder)
        if all(each.error is not None for each in stored):
            return []
        failed = sum(each.error is not None for each in stored)
        scores = scores_of(_rows(stored))
        return [MeasuredRow(scores=scores, edits=len(stored), failed=failed, cost=read_cost(folder))]
    folders = sorted((out / "runs" / data_set.name).glob(f"{setting} */{row.name}"), key=_length)
    for folder in reversed(folders):
        if lines := list(_sequence_lines(folder)):
            return [*lines[:-1], replace(lines[-1], cost=read_cost(folder))]
    return []


def _length(folder: Path) -> int:
    return int(folder.parent.name.split()[-1])


def _sequence_lines(folder: Path) -> Iterator[MeasuredRow]:
    step = int((RunFolder(folder).read(RUN_SETTINGS) or {"settings": {"per_step": 1}})["settings"]["per_step"])
    for each in _stored(folder):
        point = _point(each)
        if point is not None:
            report = stored_report(each)
            failed = sum(status.startswith("failed") for status in report.statuses.values())
            scores = scores_of(report.rows)
            yield MeasuredRow(scores=scores, edits=point.edits, step=step, failed=failed, growth=point.growth)


def _point(stored: StoredRecord) -> SequencePoint | None:
    """The measurement after a record's edit; None if there was none."""
    summary = SequenceSummary(bound=0.0)
    summary.add(stored)
    return summary.points[0] if summary.points else None


# ---- the page ----


def document(out: Path) -> str:
    """Return the page with everything that the folder of the study holds."""
    rows = text_rows()
    legend = "\n".join(f"| {row.label} | {row.text} |" for row in rows)
    parts = [_HEADER.format(model=_model(out), legend=legend)]
    for data_set in DATA_SETS:
        parts += _section(out, data_set, rows)
    return "\n".join(parts)


def _model(out: Path) -> str:
    """The model of the runs: that of the first one."""
    for path in sorted(out.glob(f"runs/*/*/*/{RUN_SETTINGS}")):
        about = RunFolder(path.parent).read(RUN_SETTINGS) or {}
        report = next(path.parent.glob(f"records/*/{EVALUATION}"), None)
        name = "a text model" if report is None else Path(EditReport.load(report).model).name
        return f"{name} (weights {about['model'][:12]}, multrace {about['version']})"
    return "no model yet"


def _section(out: Path, data_set: DataSet, rows: Sequence[TextRow]) -> Iterator[str]:
    for setting, title in _TITLES.items():
        yield f"## {data_set.title}: {title}\n"
        measured = [(row, _lines(out, data_set, setting, row)) for row in rows]
        if not any(lines for _, lines in measured):
            yield "Not run yet.\n"
            continue
        yield "| " + " | ".join(_COLUMNS) + " |"
        yield "|---" * len(_COLUMNS) + "|"
        yield _unedited(next(lines[-1].scores for _, lines in measured if lines))
        for row, lines in measured:
            yield from [_line(row, line) for line in lines] or [_cells(row.label, "not run yet")]
        yield ""
        yield from _choices(out, data_set, rows) if setting == "single" else ()


def _unedited(scores: TextScores) -> str:
    """The line of the unedited model, over the questions of the first row."""
    before = {name: share.before for name in ("rewrite", "rephrase", "right") if (share := getattr(scores, name))}
    shown = {name: f"{100 * value:.0f}" for name, value in before.items()}
    return _cells("*unedited*", "", "", shown.get("rewrite", ""), shown.get("rephrase", ""), "", shown.get("right", ""))


def _line(row: TextRow, line: MeasuredRow) -> str:
    scores, cost = line.scores, line.cost
    edits = f"{line.edits}{f' ({line.failed} failed)' if line.failed else ''}"
    right = _share(scores.right)
    if scores.kept_right is not None:
        right = f"{right} ({100 * scores.kept_right:.0f} %)"
    growth = "" if line.growth is None else f"{100 * line.growth:.1f} %"
    perplexity = "" if scores.perplexity is None else f"×{scores.perplexity:.3g}"
    time, memory = ("", "") if cost is None else (_time(cost), _memory(cost))
    shares = [_share(each) for each in (scores.rewrite, scores.rephrase, scores.unchanged)]
    return _cells(row.label, edits, str(line.step), *shares, right, growth, perplexity, time, memory)


def _cells(*texts: str) -> str:
    cells = [*texts, *[""] * (len(_COLUMNS) - len(texts))]
    return "| " + " | ".join(cells) + " |"


def _share(share: Share | None) -> str:
    if share is None:
        return ""
    after, low, high = (100 * value for value in (share.after, share.low, share.high))
    return f"{after:.0f} [{low:.0f}, {high:.0f}]"


def _time(cost: EditCost) -> str:
    if cost.first_seconds is None or cost.last_seconds is None:
        return ""
    return f"{cost.first_seconds:.2g}, {cost.last_seconds:.2g}" if cost.edits > 100 else f"{cost.first_seconds:.2g}"


def _memory(cost: EditCost) -> str:
    return "" if cost.peak_mib is None else f"{cost.peak_mib:.0f} MiB"


def _choices(out: Path, data_set: DataSet, rows: Sequence[TextRow]) -> Iterator[str]:
    """Yield what was chosen for each row, and on how many edits."""
    choices: list[tuple[TextRow, Any]] = []
    for row in rows:
        path = choice_of(out, data_set.name, row.name)
        if path.is_file():
            choices.append((row, read_json(path, CHOICE)))
    if not choices:
        return
    yield "Chosen on the other half, with the mean of rewrite, rephrase and unchanged of each setting that was tried:\n"
    yield "| row | chosen | edits to choose on | tried |"
    yield "|---|---|---|---|"
    for row, choice in choices:
        tried = "; ".join(
            f"{name}: {'no edit' if worth is None else f'{100 * worth:.0f}'}"
            for name, worth in choice["worths"].items()
        )
        alone = len(choice["worths"]) == 1
        yield f"| {row.label} | {choice['chosen']} | {'' if alone else choice['edits']} | {'' if alone else tried} |"
    yield ""
