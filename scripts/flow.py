"""Run `multrace flow` for one question or for many."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..artefacts.folders import ArtefactError
from ..models import ModelError
from ..models.errors import gist
from ..tracing import TraceError
from .errors import CommandError
from .flow_analyses import check_settings, readings_of
from .flow_asking import one_question
from .flow_files import result_files, write_files
from .flow_reading import Asked, Reading
from .flow_records import flow_records
from .options.flow import FlowOptions
from .outputs import check_files


def run(settings: FlowOptions) -> int:
    """Analyse one question or many; write results and pictures, print a summary."""
    check_settings(settings)
    return _flow_one(settings) if settings.is_one else flow_records(settings)


def _flow_one(settings: FlowOptions) -> int:
    question, readings = one_question(settings), readings_of(settings)
    for reading in readings:
        reading.check(question)
    known = [name for reading in readings for name in (reading.file, *reading.drawings)]
    check_files(settings.out, known)
    vlm = settings.open_model()
    prompt = question.prompt(vlm)
    generated = vlm.answers([prompt])[0]
    engine = settings.engine_settings(checked=True)
    asked = Asked(vlm=vlm, question=question, prompt=prompt, generated=generated, engine=engine, progress=True)
    results, failed = _results(readings, asked)
    if not results:
        raise _said(failed)
    files = {}
    for reading, result in results.items():
        files |= result_files(reading, result, prompt)
    written = write_files(settings.out, files, stale=known)
    print(f"question  {question.question}\nanswer    {asked.answered.verdict}")
    for reading, result in results.items():
        print(f"\n{reading.name}", *(f"  {line}" for line in reading.told(result)), sep="\n")
    print(f"\nwritten to {settings.out}:", ", ".join(path.name for path in written))
    if failed:
        raise _said(failed)
    return 0


def _results(readings: Sequence[Reading], asked: Asked) -> tuple[dict[Reading, Any], dict[str, str]]:
    """The result of each reading, and why others failed; a failure does not affect the other readings."""
    results, failed = {}, {}
    for reading in readings:
        try:
            results[reading] = reading.compute(asked)
        except (CommandError, ModelError, TraceError, ArtefactError) as error:
            failed[reading.name] = gist(error)
    return results, failed


def _said(failed: Mapping[str, str]) -> CommandError:
    """The error that names each reading without a result, with the reason."""
    return CommandError("; ".join(f"no {name}: {reason}" for name, reason in failed.items()))
