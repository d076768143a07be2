"""multrace flow for many questions: each one's results, kept as they come, then the averages and a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..artefacts.folders import ArtefactError
from ..data import DataError
from ..models import ModelError, VisionLanguageModel
from ..models.errors import gist
from ..tracing import TraceError
from .errors import CommandError
from .flow_analyses import readings_of
from .flow_asking import check_question, many_questions
from .flow_degraded import degraded_questions
from .flow_files import QUESTIONS, Kept, kept_questions
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Asked, Reading
from .flow_report import REPORT, Findings, Skip, report_findings, write_averages
from .options.flow import FlowOptions
from .outputs import check_files

_ERRORS = (CommandError, DataError, ModelError, TraceError, ArtefactError, OSError)
_AT_ONCE = 16
"""Number of questions whose processed pictures are in memory at a time while they are answered."""
_CHECKED = 3
"""Number of questions for which the engine checks itself."""


def flow_records(settings: FlowOptions) -> int:
    """0 once every question is done that can be; writes results, averages and report. CommandError if none can."""
    questions, problems = many_questions(settings)
    readings = readings_of(settings)
    names = [name for reading in readings for name in (reading.file, *reading.average_drawings)]
    check_files(settings.out, [REPORT, *names])
    check_files(settings.out / QUESTIONS, ())
    findings = Findings(problems=problems, count=len(questions))
    fit = _fit_questions(settings, questions, findings)
    if fit:
        vlm = settings.open_model()
        fit = _degraded(settings, vlm, fit, findings)
        asked = [question for question, _ in fit]
        kept = kept_questions(settings, asked, folder=settings.out, engine=settings.engine)
        run = _Run(settings=settings, vlm=vlm, findings=findings, kept=kept)
        run.answer(asked)
        run.read([(question, wanted) for question, wanted in fit if question in findings.answers])
    write_averages(settings, readings, findings)
    report_findings(settings, findings)
    return 0


def _fit_questions(
    settings: FlowOptions, questions: Sequence[FlowQuestion], findings: Findings
) -> list[tuple[FlowQuestion, list[Reading]]]:
    """The questions that can be asked, with the readings that fit each of them; the others are reported."""
    fit = []
    for question in tqdm(questions, desc="checking questions", unit="question", leave=False):
        wanted = []
        try:
            check_question(question)
            if settings.degrade and (question.image is None or question.gold is None):
                raise CommandError("--degrade needs a picture and the right answer; write both into the record")
        except _ERRORS as error:
            findings.skipped.append(Skip(question=question.id, reading="all", reason=gist(error)))
            continue
        for reading in readings_of(settings):
            try:
                reading.check(question)
                wanted.append(reading)
            except CommandError as error:
                findings.skipped.append(Skip(question=question.id, reading=reading.name, reason=gist(error)))
        if wanted:
            fit.append((question, wanted))
    return fit


def _degraded(
    settings: FlowOptions,
    vlm: VisionLanguageModel,
    fit: list[tuple[FlowQuestion, list[Reading]]],
    findings: Findings,
) -> list[tuple[FlowQuestion, list[Reading]]]:
    """The same questions with noise on their pictures, if --degrade was given."""
    if not settings.degrade:
        return fit
    damaged, findings.degraded = degraded_questions(vlm, [question for question, _ in fit], seed=settings.seed)
    print(f"pictures damaged: {findings.degraded}", flush=True)
    return [(question, wanted) for question, (_, wanted) in zip(damaged, fit, strict=True)]


@dataclass(kw_only=True)
class _Run:
    """Questions asked one after the other, and their results."""

    settings: FlowOptions
    vlm: VisionLanguageModel
    findings: Findings
    kept: dict[FlowQuestion, Kept]
    computed: int = field(default=0)
    """Number of questions for which something was computed in this call."""

    def answer(self, questions: Sequence[FlowQuestion]) -> None:
        """Record the model's answer to each question, in batches, unless an earlier call did."""
        found = {question: self.kept[question].answer() for question in questions}
        todo = [question for question in questions if found[question] is None]
        with tqdm(total=len(todo), desc="answering", unit="question", disable=not todo) as bar:
            for start in range(0, len(todo), _AT_ONCE):
                chunk = todo[start : start + _AT_ONCE]
                found |= self._answers(chunk)
                bar.update(len(chunk))
        for question in questions:
            if (generated := found[question]) is not None:
                self.findings.answers[question] = Answered(question=question, generated=generated)

    def read(self, fit: Sequence[tuple[FlowQuestion, Sequence[Reading]]]) -> None:
        """Compute every reading of every question that is included, unless an earlier call did."""
        for question, wanted in tqdm(fit, desc="following information", unit="question"):
            answered = self.findings.answers[question]
            leaves_out = answered.is_right is False and not self.settings.all
            counted = [reading for reading in wanted if reading.counts_wrong or not leaves_out]
            if len(counted) < len(wanted):
                self.findings.filtered.append(answered)
            try:
                self._read(answered, counted)
            except _ERRORS as error:  # the prompt cannot be made
                self._skip(question, "all", error)

    def _answers(self, questions: Sequence[FlowQuestion]) -> dict[FlowQuestion, str]:
        """The answers to a few questions, which are written; questions that cannot be asked are reported."""
        prompts = {}
        for question in questions:
            try:
                prompts[question] = question.prompt(self.vlm)
            except _ERRORS as error:
                self._skip(question, "all", error)
        if not prompts:
            return {}
        pixels = [prompt.inputs.get("pixel_values") for prompt in prompts.values()]
        is_uniform = len({each.shape[1:] for each in pixels if each is not None}) < 2
        texts = self.vlm.answers(list(prompts.values()), batch_size=_AT_ONCE if is_uniform else 1)
        answers = dict(zip(prompts, texts, strict=True))
        for question, text in answers.items():
            self.kept[question].keep_answer(text)
        return answers

    def _read(self, answered: Answered, readings: Sequence[Reading]) -> None:
        kept, question = self.kept[answered.question], answered.question
        found = {reading: kept.result(reading, answered.generated) for reading in readings}
        if any(result is None for result in found.values()):
            engine = self.settings.engine_settings(checked=self.computed < _CHECKED)
            common = {"vlm": self.vlm, "question": question, "generated": answered.generated}
            asked = Asked(prompt=question.prompt(self.vlm), engine=engine, progress=False, **common)
            self.computed += 1
            for reading in readings:
                if found[reading] is None:
                    found[reading] = self._compute(reading, asked)
        for reading, result in found.items():
            if result is not None:
                self.findings.add(reading, answered, kept.folder / reading.file)

    def _compute(self, reading: Reading, asked: Asked) -> Any:
        """The result, which is written; None, with a report, if there is none."""
        try:
            result = reading.compute(asked)
            self.kept[asked.question].keep_result(reading, result, asked.prompt, asked.generated)
            return result
        except _ERRORS as error:
            self._skip(asked.question, reading.name, error)
            return None

    def _skip(self, question: FlowQuestion, reading: str, error: Exception) -> None:
        skip = Skip(question=question.id, reading=reading, reason=gist(error))
        self.findings.skipped.append(skip)
        tqdm.write(str(skip))
