"""Compare editors on CounterFact and zsRE in a real text model: one edit at a time, and long sequences of edits.

Every row of every table is a run in a folder of its own, which keeps each edit as soon as it is made and goes on where
it was stopped. The page is written from whatever is there, so that the study can be made piece by piece.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from ...artefacts import read_json, write_json, write_whole
from ...data import EditRecord
from ...editing import EvaluationSettings
from ...models import VisionLanguageModel, load
from ...workflow import EvaluateRun, EvaluateSequenceRun, RunError, run as run_analysis
from ..main import execute
from ..options import STYLE, CommandError, GeneralOptions, check_files, paragraphs
from . import text_page as page
from .text_facts import DATA_SETS, DataSet, Facts, known_moments, own_texts
from .text_rows import Candidates, TextRow, text_rows

EXAMPLE = """examples:
  python -m multrace.scripts.studies.results_real --model DIR --counterfact edit.json --zsre zsre.json --out out/text
  python -m multrace.scripts.studies.results_real --model DIR --counterfact edit.json --out out/text --limit 30 \\
          --settings single --only multedit rome
  python -m multrace.scripts.studies.results_real --out out/text --page-only --docs docs

The program writes results_real.md into OUT or DOCS. Rows that are not finished are shown as far as they are.
A smaller number of single edits can be raised later; sequences of another length are other runs.
"""
ROWS = tuple(row.name for row in text_rows())
SINGLE, STEPS, SEQUENCE = SETTINGS = ("single", "steps", "sequence")
"""One edit at a time; a hundred edits per step; one edit per step."""
PER_STEP = {STEPS: 100, SEQUENCE: 1}
AT = (100, 500, 1000, 2000)
"""Numbers of edits after which a sequence is measured."""
LAYOUT = page.CHOICE
_MOMENTS = "moments.safetensors"
MEASURED, FEW = 16, 4
"""Numbers of the model's own texts whose perplexity is measured: in a sequence, and after each single edit."""
app = App(
    name="python -m multrace.scripts.studies.results_real", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)


@dataclass(frozen=True, kw_only=True)
class ResultsReal(GeneralOptions):
    """Options of the study of editors on a real text model."""

    out: Annotated[Path, Parameter(help="folder for the runs and the page", metavar="DIR")]
    model: Annotated[Path | None, Parameter(help="the text model", metavar="DIR")] = None
    counterfact: Annotated[Path | None, Parameter(help="edits of CounterFact", metavar="FILE")] = None
    zsre: Annotated[Path | None, Parameter(help="edits of zsRE in MEND's form", metavar="FILE")] = None
    limit: Annotated[
        int | None, Parameter(help="largest number of edits of a row (default: as many as asked for)", metavar="N")
    ] = None
    single: Annotated[int, Parameter(help="number of single edits", metavar="N")] = 200
    length: Annotated[int, Parameter(help="number of edits of a sequence", metavar="N")] = 2000
    choosing: Annotated[
        int, Parameter(help="number of edits of the other half on which the settings of a row are chosen", metavar="N")
    ] = 16
    texts: Annotated[
        int, Parameter(help="number of the model's own texts whose keys are what it knows", metavar="N")
    ] = 256
    only: Annotated[
        tuple[str, ...], Parameter(help=f"rows to measure: {', '.join(ROWS)}", metavar="ROW", negative_iterable=())
    ] = ROWS
    settings: Annotated[
        tuple[str, ...],
        Parameter(
            help="single: one edit at a time; steps: a sequence of a hundred edits per step; sequence: of one edit per "
            "step",
            metavar="SETTING",
            negative_iterable=(),
        ),
    ] = SETTINGS
    page_only: Annotated[bool, Parameter(help="measure nothing, and write the page from what is there")] = False
    docs: Annotated[Path | None, Parameter(help="folder for the page (default: OUT)", metavar="DIR")] = None

    def check(self) -> None:
        """Raises `CommandError` for unknown rows or settings, numbers below 1, or missing files."""
        for name, given, known in (("only", self.only, ROWS), ("settings", self.settings, SETTINGS)):
            if unknown := [each for each in given if each not in known]:
                raise CommandError(f"cannot measure --{name} {unknown[0]}; pass some of {', '.join(known)}")
        for name in ("limit", "single", "length", "choosing", "texts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"--{name} is {value}; pass at least 1")
        if not self.page_only and self.model is None:
            raise CommandError("no model to edit; pass --model DIR, such as the one that multrace fetch-smollm2 makes")
        if not self.page_only and not self.files:
            raise CommandError("no edits to make; pass --counterfact FILE or --zsre FILE, or --page-only")
        check_files(self.docs or self.out, (page.NAME,))

    @property
    def files(self) -> dict[DataSet, Path]:
        """The data sets that were given, with their files."""
        paths = {data_set: getattr(self, data_set.name) for data_set in DATA_SETS}
        return {data_set: path for data_set, path in paths.items() if path is not None}

    def number(self, setting: str) -> int:
        """The number of edits of a row."""
        number = self.single if setting == SINGLE else self.length
        return number if self.limit is None else min(number, self.limit)


@app.default
def run(options: ResultsReal) -> int:
    """Measure the rows that are missing, and write the page after each of them."""
    options.check()
    if not options.page_only:
        rows = [row for row in text_rows() if row.name in options.only]
        study = TextStudy(vlm=load(options.model), out=options.out, options=options)
        facts = {data_set: Facts.read(path, data_set) for data_set, path in options.files.items()}
        items = [*product(facts, options.settings, rows)]
        for number, (data_set, setting, row) in enumerate(items, 1):
            print(f"{number} of {len(items)}: {data_set.title}, {setting}, {row.name}", flush=True)
            try:
                study.measure(data_set, facts[data_set], setting, row)
            except RunError as error:  # a row that cannot be measured, such as one whose edits all fail
                print(f"left out: {error}", flush=True)
            _write_page(options)
    print(f"written: {_write_page(options)}")
    return 0


def _write_page(options: ResultsReal) -> Path:
    """Write the page from all runs that are there."""
    text = page.document(options.out)
    return write_whole((options.docs or options.out) / page.NAME, text.encode())


@dataclass(frozen=True, kw_only=True, eq=False)
class TextStudy:
    """The runs of the study on one model."""

    vlm: VisionLanguageModel
    out: Path
    options: ResultsReal

    def measure(self, data_set: DataSet, facts: Facts, setting: str, row: TextRow) -> None:
        """Make the edits of one row that are missing."""
        editor = self._chosen(data_set, facts, row)
        number = self.options.number(setting)
        records = facts.reported(number)
        folder = page.folder_of(self.out, data_set.name, setting, row.name, None if setting == SINGLE else len(records))
        if setting == SINGLE:
            self._single(data_set, records, editor, folder, self._texts[:FEW])
            return
        analysis = EvaluateSequenceRun(
            editor=editor,
            moments=self._moments_for(editor),
            texts=self._texts[:MEASURED],
            evaluation=_evaluation(data_set),
            at=tuple(at for at in AT if at < len(records)),
            per_step=PER_STEP[setting],
            unedited=self.out / "unedited",
        )
        run_analysis(self.vlm, analysis, enumerate(records, 1), folder)

    def _single(
        self, data_set: DataSet, records: Sequence[EditRecord], editor: Any, folder: Path, texts: tuple[str, ...] = ()
    ) -> None:
        given = {"moments": self._moments_for(editor), "texts": texts, "evaluation": _evaluation(data_set)}
        run_analysis(self.vlm, EvaluateRun(editor=editor, **given), enumerate(records, 1), folder)

    def _chosen(self, data_set: DataSet, facts: Facts, row: TextRow) -> Any:
        """Return the editor with the settings that were, or are now, chosen on the choosing half.

        A choice is kept: more edits to choose on would otherwise change the editor of a run that has begun.
        """
        candidates = row.candidates(self.vlm.layers)
        path = page.choice_of(self.out, data_set.name, row.name)
        if path.is_file():
            name = read_json(path, LAYOUT)["chosen"]
            if name not in candidates:
                raise CommandError(f"{str(path)!r} chose {name!r}, which is no setting of {row.name}; remove that file")
            return candidates[name]
        records = facts.choosing[: self.options.choosing]
        worths = self._worths(data_set, records, row, candidates) if len(candidates) > 1 else dict.fromkeys(candidates)
        chosen = max(worths, key=lambda name: worths[name] or 0.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, LAYOUT, {"chosen": chosen, "worths": worths, "edits": len(records)})
        return candidates[chosen]

    def _worths(
        self, data_set: DataSet, records: Sequence[EditRecord], row: TextRow, candidates: Candidates
    ) -> dict[str, float | None]:
        """The mean of rewrite, rephrase and unchanged of each setting; None where no edit can be made."""
        worths: dict[str, float | None] = {}
        for number, (name, editor) in enumerate(candidates.items()):
            folder = self.out / "choosing" / data_set.name / f"{row.name} {number}"
            print(f"choosing: {name}", flush=True)
            try:
                self._single(data_set, records, editor, folder)
                worths[name] = page.single_scores(folder).worth
            except RunError as error:
                print(f"not chosen: {error}", flush=True)
                worths[name] = None
        return worths

    def _moments_for(self, editor: Any) -> Path | None:
        return self._moments if getattr(editor, "needs_moments", False) else None

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Texts that the model samples: the first ones are measured, the others say what it knows."""
        self.out.mkdir(parents=True, exist_ok=True)
        return own_texts(self.vlm, self.out / "texts.json", MEASURED + self.options.texts)

    @cached_property
    def _moments(self) -> Path:
        """The file of second moments, of all layers that any row needs."""
        layers = sorted({layer for row in text_rows() for layer in row.moment_layers(self.vlm.layers)})
        return known_moments(self.vlm, self.out / _MOMENTS, layers, self._texts[MEASURED:])


def _evaluation(data_set: DataSet) -> EvaluationSettings:
    return EvaluationSettings(forced=False, max_new_tokens=data_set.max_new_tokens)


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
