"""Check, mend and convert files of questions and edits; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import artefacts, data
from .options import DATA_FORMS, FileOptions, GeneralOptions

EXAMPLE = """examples:
  multrace data check corrections.jsonl
  multrace data convert vlkeb/eval.json corrections.jsonl --images vlkeb/images
  multrace data schema

docs/formats.md describes our own lines, the public formats that are read, and each finding.
"""
CHECK = """Look at every row of a data file: can it be read, can its pictures be used, does it say what it should?

The pictures' headers are read, not their pixels. Spans are looked for in the questions, targets are compared with
present answers, rephrases with their questions, answers with those of annotators, and rows with one another. Errors
keep a row, or a question of it, from being used; warnings say that a number may mislead; notes are worth knowing. The
exit code is 1 if errors remain.
"""
CHECK_EXAMPLE = """examples:
  multrace data check corrections.jsonl
  multrace data check mmedit/evqa_eval.json --images coco --fix clean.jsonl
  multrace data check mmedit/evqa_eval.json --answers mmedit/okvqa_loc.json --no-pictures --json out/findings.json

--fix leaves out rows that cannot be read or have no picture, duplicates, and rephrases that repeat the question; it
spells spans as the question does and cuts boxes to the picture. The checked file stays as it is.
"""
CONVERT = """Write the records of a data file in another form, and say what the form has no place for.

Our own lines can hold everything. Rows that cannot be read, or that the form cannot hold, are left out and listed; the
exit code is 1 if there are any.
"""
CONVERT_EXAMPLE = """examples:
  multrace data convert counterfact.json corrections.jsonl
  multrace data convert corrections.jsonl mmedit.json --to mmedit
"""
SCHEMA = "Print the JSON Schema of one of our own lines: each key, what it holds, and examples."
SCHEMA_EXAMPLE = """examples:
  multrace data schema
"""
app = App(name="data", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True)
class OneFile:
    """The file that is read; a base of the options that comes last, so that the file can be named without --file."""

    file: Annotated[Path, Parameter(help="file of questions or edits, or a folder of GQA's files", metavar="FILE")]


@dataclass(frozen=True)
class TwoFiles(OneFile):
    """The file that is read and the file that is written."""

    out: Annotated[Path, Parameter(help="file to write", metavar="OUT")]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(FileOptions, OneFile):
    """Options of `multrace data check`."""

    answers: Annotated[
        Path | None, Parameter(help="file or folder of OK-VQA with the answers of annotators", metavar="FILE")
    ] = None
    no_pictures: Annotated[bool, Parameter(help="leave the pictures alone")] = False
    fix: Annotated[Path | None, Parameter(help="write a cleaned file of our own lines", metavar="FILE")] = None
    show: Annotated[
        int, Parameter(help="maximum number of rows that are shown of each kind of finding", metavar="N")
    ] = 3
    json: Annotated[Path | None, Parameter(help="also write all findings as JSON", metavar="FILE")] = None


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FileOptions, TwoFiles):
    """Options of `multrace data convert`."""

    answers: Annotated[
        Path | None, Parameter(help="file or folder of OK-VQA with the answers of annotators", metavar="FILE")
    ] = None
    to: Annotated[str, Parameter(help="form of the written file", choices=DATA_FORMS)] = "lines"


@app.command(name="check", help=CHECK, help_epilogue=CHECK_EXAMPLE)
def run_check(options: CheckOptions) -> int:
    """Print the findings by kind; 1 if errors remain."""
    report = data.check_data(
        options.file,
        format=options.format,
        images=options.images,
        answers=options.answers,
        pictures=not options.no_pictures,
        fix=options.fix,
    )
    if options.json is not None:
        artefacts.write_whole(options.json, json.dumps(report.to_dict(), indent=1).encode())
    print(*_lines(report, options), sep="\n")
    return 1 if report.remaining_errors else 0


@app.command(name="convert", help=CONVERT, help_epilogue=CONVERT_EXAMPLE)
def run_convert(options: ConvertOptions) -> int:
    """Write the file and print what was left out and lost; 1 if a row was left out."""
    report = data.convert_data(
        options.file,
        options.out,
        to=options.to,
        format=options.format,
        images=options.images,
        answers=options.answers,
    )
    print(report)
    return 1 if report.skipped else 0


@app.command(name="schema", help=SCHEMA, help_epilogue=SCHEMA_EXAMPLE)
def run_schema(options: GeneralOptions = GeneralOptions()) -> int:
    """Print the schema."""
    print(json.dumps(data.schema(), indent=2))
    return 0


def _lines(report: data.CheckReport, options: CheckOptions) -> Iterator[str]:
    yield str(report)
    kinds = {kind: data.FINDINGS[kind] for kind in report.counts}
    width = max((len(kind.title) for kind in kinds.values()), default=0)
    for name, kind in kinds.items():
        fix = f"--fix: {kind.fix}" if kind.fix else ""
        yield f"\n{kind.severity:8}{report.counts[name]:7}  {kind.title:{width}}  {fix}".rstrip()
        found = [finding for finding in report.findings if finding.kind == name]
        yield from (f"    {finding}" for finding in found[: max(0, options.show)])
        if len(found) > options.show > 0:
            yield f"    and {len(found) - options.show} more (--show, --json)"
    yield ""
    if report.written == 0:
        yield "no row would be left, so nothing is written; are the pictures elsewhere? Pass --images or --no-pictures"
    elif report.written is not None:
        yield f"written: {options.fix} ({report.written} of {report.rows} rows)"
    number = len(report.remaining_errors)
    yield f"{number} error{'' if number == 1 else 's'}{' left' if report.written else ''}"
