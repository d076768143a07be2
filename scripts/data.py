"""Check, repair and convert files of questions and edits; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import artefacts, data
from ..data.worlds import flags
from .options import DATA_FORMS, STYLE, CommandError, FileOptions, GeneralOptions, check_new_folder, new_files

EXAMPLE = """examples:
  multrace data check corrections.jsonl
  multrace data convert vlkeb/eval.json corrections.jsonl --images vlkeb/images
  multrace data flags out/errors --split wrong --half choosing
  multrace data schema

docs/formats.md describes our own JSON lines, the public formats that can be read, and each kind of finding.
"""
CHECK = """Check every row of a data file: whether it can be read, its pictures can be used and its parts fit together.

Of the pictures only the headers are read. Spans are looked up in the questions; targets are compared with the present
answers, rephrases with their questions, answers with those of annotators, and rows with one another. An error prevents
a row, or one of its questions, from being used; a warning says that a measured number may mislead; a note is worth
knowing. The exit code is 0 if no error remains, 1 if one does, and 2 for bad input.
"""
CHECK_EXAMPLE = """examples:
  multrace data check corrections.jsonl
  multrace data check mmedit/evqa_eval.json --images coco --fix clean.jsonl
  multrace data check mmedit/evqa_eval.json --answers mmedit/okvqa_loc.json --no-pictures --json out/findings.json

--fix leaves out rows that cannot be read or whose picture is missing, duplicates, and rephrases that repeat the
question; it spells spans as the question does and cuts boxes to the picture. The checked file stays as it is.
"""
CONVERT = """Write the records of a data file in another form, and report what that form cannot hold.

Our own JSON lines can hold everything. Rows that cannot be read, or that the form cannot hold, are left out and listed;
the exit code is then 1.
"""
CONVERT_EXAMPLE = """examples:
  multrace data convert counterfact.json corrections.jsonl
  multrace data convert corrections.jsonl mmedit.json --to mmedit
"""
FLAGS = """Write questions of the flags world, with their pictures, as a file of our own JSON lines.

The split "known" becomes questions to trace. The splits "wrong" and "long_tail" become edits: the target is the true
answer, and the probes ask about other renderings, in other words, by name, and about known facts, which have to stay.
"""
FLAGS_EXAMPLE = """examples:
  multrace data flags out/known --split known --half reporting --limit 100
  multrace data flags out/errors --split wrong --half choosing --limit 10 --probes 2

The command writes DIR/flags.jsonl and DIR/pictures/*.png. docs/flags_world.md describes the world and its splits.
"""
SCHEMA = "Print the JSON Schema of our own JSON lines: each key, its meaning, and examples."
SCHEMA_EXAMPLE = """examples:
  multrace data schema
"""
app = App(name="data", help=__doc__, help_epilogue=EXAMPLE, group_parameters=STYLE["group_parameters"])


@dataclass(frozen=True)
class OneFile:
    """The file to read; as the last base of the options, it can be named without --file."""

    file: Annotated[
        Path, Parameter(help="file of questions or edits, or folder with the six CSV files of GQA", metavar="FILE")
    ]


@dataclass(frozen=True)
class TwoFiles(OneFile):
    """The file to read and the file to write."""

    out: Annotated[Path, Parameter(help="file to write", metavar="OUT")]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(FileOptions, OneFile):
    """Options of `multrace data check`."""

    answers: Annotated[
        Path | None,
        Parameter(
            help="file or folder of OK-VQA with the answers of its annotators (default: those in the file itself)",
            metavar="FILE",
        ),
    ] = None
    no_pictures: Annotated[bool, Parameter(help="do not look at the pictures")] = False
    fix: Annotated[Path | None, Parameter(help="also write a cleaned file of our own JSON lines", metavar="FILE")] = (
        None
    )
    show: Annotated[int, Parameter(help="maximum number of findings of each kind that are printed", metavar="N")] = 3
    json: Annotated[Path | None, Parameter(help="also write all findings as JSON", metavar="FILE")] = None


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FileOptions, TwoFiles):
    """Options of `multrace data convert`."""

    answers: Annotated[
        Path | None,
        Parameter(
            help="file or folder of OK-VQA with the answers of its annotators (default: those in the file itself)",
            metavar="FILE",
        ),
    ] = None
    to: Annotated[str, Parameter(help="form of the file to write", choices=DATA_FORMS)] = "lines"


@dataclass(frozen=True)
class OneFolder:
    """The folder to write; as the last base of the options, it can be named without --out."""

    out: Annotated[Path, Parameter(help="folder to write", metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class FlagsOptions(GeneralOptions, OneFolder):
    """Options of `multrace data flags`."""

    split: Annotated[str, Parameter(help="facts to write", choices=tuple(flags.SPLITS))]
    half: Annotated[
        str | None,
        Parameter(help="half of the split, to choose settings or to report (default: both)", choices=flags.HALVES),
    ] = None
    limit: Annotated[int | None, Parameter(help="maximum number of facts (default: all)", metavar="N")] = None
    probes: Annotated[int, Parameter(help="maximum number of probes of each kind for each edit", metavar="N")] = 4
    splits: Annotated[
        Path | None,
        Parameter(help="CSV file of the splits of another model (default: those of the shipped model)", metavar="FILE"),
    ] = None

    def check(self) -> None:
        """Raise `CommandError` for numbers below 1, and for a folder that cannot be written to."""
        for name, value in (("limit", self.limit), ("probes", self.probes)):
            if value is not None and value < 1:
                raise CommandError(f"--{name} is {value}; pass at least 1")
        check_new_folder(self.out)


@app.command(name="check", help=CHECK, help_epilogue=CHECK_EXAMPLE)
def run_check(options: CheckOptions) -> int:
    """Print the findings by kind; return 1 if errors remain."""
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
    """Write the file, and print what was left out or lost; return 1 if a row was left out."""
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


@app.command(name="flags", help=FLAGS, help_epilogue=FLAGS_EXAMPLE)
def run_flags(options: FlagsOptions) -> int:
    """Write the file and its pictures."""
    options.check()
    world = data.FlagWorld()
    splits = world.splits if options.splits is None else flags.read_splits(options.splits)
    rows = flags.split_rows(splits, options.split, options.half)[: options.limit]
    if options.split == flags.KNOWN:
        records = data.flag_questions([world.fact(row.id) for row in rows], world=world)
    else:
        known = [world.fact(row.id) for row in flags.split_rows(splits, flags.KNOWN, options.half)]
        records = data.flag_records(rows, known, world=world, count=options.probes)
    with new_files(options.out) as folder:
        name = data.write_flags(folder, records).name
    print(f"written: {options.out / name} ({len(records)} {'questions' if options.split == flags.KNOWN else 'edits'})")
    return 0


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
        findings = [finding for finding in report.findings if finding.kind == name]
        yield from (f"    {finding}" for finding in findings[: max(0, options.show)])
        if len(findings) > options.show > 0:
            yield f"    and {len(findings) - options.show} more (--show, --json)"
    yield ""
    if report.written == 0:
        yield "no row would be left, so nothing is written; if the pictures are elsewhere, pass --images DIR"
    elif report.written is not None:
        yield f"written: {options.fix} ({report.written} of {report.rows} rows)"
    number = len(report.remaining_errors)
    yield f"{number} error{'' if number == 1 else 's'}{' left' if report.written else ''}"
