"""Averages over many questions of `multrace flow`, the report, and both as text."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..artefacts.folders import ArtefactError
from ..models.errors import gist
from ..tracing import TraceError
from ..tracing.knockout.average import FilteredQuestion
from .errors import CommandError
from .flow_files import QUESTIONS, write_files
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Reading, Stored
from .options.flow import FlowOptions

REPORT = "report.json"
_NAMED = 5
"""Maximum number of questions listed for the same problem."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A question for which a reading could not be computed."""

    question: str
    reading: str
    """"all" for a question that could not be asked."""
    reason: str

    def __str__(self) -> str:
        return f"{self.question}: {self._what}: {self.reason}"

    @property
    def _what(self) -> str:
        return "skipped" if self.reading == "all" else f"{self.reading} skipped"


@dataclass(kw_only=True)
class Findings:
    """Collects the results of the questions."""

    problems: Sequence[str]
    """Lines of the file that are not questions."""
    count: int
    """How many questions there are."""
    degraded: str | None = None
    """How noise was added to the pictures."""
    answers: dict[FlowQuestion, Answered] = field(default_factory=dict)
    filtered: list[Answered] = field(default_factory=list)
    """Questions left out for a wrong answer."""
    skipped: list[Skip] = field(default_factory=list)
    results: dict[str, list[tuple[Answered, Path]]] = field(default_factory=dict)
    """Reading -> its questions, each with the file of the result."""
    averages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reading -> its average, or why there is none."""

    def add(self, reading: Reading, answered: Answered, path: Path) -> None:
        """Add a result, which lies in this file."""
        self.results.setdefault(reading.name, []).append((answered, path))

    def right(self, value: bool | None) -> int:
        """Return how many answers are right (True), wrong (False) or not known to be either (None)."""
        return sum(each.is_right is value for each in self.answers.values())


def write_averages(settings: FlowOptions, readings: Sequence[Reading], findings: Findings) -> None:
    """Write and print the average of each reading that has one; otherwise an older average is removed."""
    filtered = [
        FilteredQuestion(question=each.question.question, gold=each.question.gold or "", generated=each.generated)
        for each in findings.filtered
    ]
    for reading in readings:
        found = findings.results.get(reading.name, [])
        if not reading.has_average:
            continue
        known = (reading.file, *reading.average_drawings)
        try:
            average = reading.average(Stored(reading.kind, found), filtered)
            files = {reading.file: average.save, **reading.average_files(average)}
            written = write_files(settings.out, files, stale=known)
        except (TraceError, ArtefactError) as error:
            findings.averages[reading.name] = {"questions": len(found), "none": gist(error)}
            write_files(settings.out, {}, stale=known)
            continue
        findings.averages[reading.name] = {"questions": len(found), "files": [path.name for path in written]}
        print(f"\n{reading.name}", *(f"  {line}" for line in reading.average_told(average)), sep="\n")


def report_findings(settings: FlowOptions, findings: Findings) -> None:
    """Write and print what was done and what was skipped. Raises `CommandError` if nothing was done."""
    text = json.dumps(_report(settings, findings), indent=2, default=str) + "\n"
    write_files(settings.out, {REPORT: lambda path: path.write_text(text, encoding="utf-8")})
    if not findings.results:
        raise CommandError(f"{_why_nothing(findings)}; the others: {str(settings.out / REPORT)!r}")
    print(f"\n{_counts(findings)}")
    if "knockout" not in findings.averages:  # its own words name them
        said = [f"  {each.question.question!r}: {each.verdict}" for each in findings.filtered]
        print(*said, sep="\n", end="\n" if said else "")
    for name, each in findings.averages.items():
        if "none" in each:
            print(f"no average of {name}: {each['none']}")
    print(*_problems(findings), sep="\n", end="\n" if findings.problems or findings.skipped else "")
    files = [name for each in findings.averages.values() for name in each.get("files", ())]
    print(f"written to {settings.out}:", ", ".join((*files, REPORT, f"{QUESTIONS}/")))


def _report(settings: FlowOptions, findings: Findings) -> dict[str, Any]:
    """The content of the report."""
    done = {name: [answered.question.id for answered, _ in found] for name, found in findings.results.items()}
    return {
        "settings": asdict(settings),
        "analyses": settings.analyses,
        "counts": {
            "questions": findings.count,
            "answered": len(findings.answers),
            "right": findings.right(True),
            "wrong": findings.right(False),
            "right answer unknown": findings.right(None),
            "filtered": len(findings.filtered),
        },
        "degraded": findings.degraded,
        "problems": list(findings.problems),
        "filtered": [_said(each) for each in findings.filtered],
        "skipped": [asdict(each) for each in findings.skipped],
        "done": done,
        "averages": findings.averages,
        "answers": [_said(each) | {"is_right": each.is_right} for each in findings.answers.values()],
    }


def _said(answered: Answered) -> dict[str, Any]:
    """A question with its right answer and the model's own."""
    question = answered.question
    return {"id": question.id, "question": question.question, "gold": question.gold, "generated": answered.generated}


def _counts(findings: Findings) -> str:
    """How many questions there were, and how they were answered."""
    known = findings.right(True) + findings.right(False)
    parts = [f"{findings.count} questions"]
    parts += [f"{findings.right(True)} of {known} answered rightly"] if known else []
    parts += [f"{findings.right(None)} without a known right answer"] if findings.right(None) else []
    parts += [f"{len(findings.filtered)} left out for a wrong answer"] if findings.filtered else []
    parts += [f"{len(findings.problems)} lines of records left out"] if findings.problems else []
    return ", ".join(parts)


def _problems(findings: Findings) -> list[str]:
    """Lines that are not questions, and skipped readings grouped by reason."""
    together: dict[tuple[str, str], list[str]] = {}
    for skip in findings.skipped:
        together.setdefault((skip.reading, skip.reason), []).append(skip.question)
    lines = [f"  left out: {problem}" for problem in findings.problems]
    for (reading, reason), names in together.items():
        what = "skipped" if reading == "all" else f"{reading} skipped"
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"  {what}: {', '.join(names[:_NAMED])}{more}: {reason}")
    return lines


def _why_nothing(findings: Findings) -> str:
    """Why there is no result of any question."""
    if findings.skipped:
        return f"nothing came of the {findings.count} questions; {findings.skipped[0]}"
    first = findings.filtered[0]
    return (
        f"the model's own answer is wrong to all {len(findings.filtered)} questions, which are left out (to "
        f"{first.question.question!r} it says {first.verdict}); pass --all to keep them"
    )
