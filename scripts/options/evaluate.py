"""Make edits, ask the model about and around them, and compare with the unedited model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lazy_loader
from cyclopts import App, Parameter

from ... import editing
from ..edit import TRACE
from ..editors import NAMES, EditorOptions
from ..errors import CommandError
from .choices import SEQUENCE_LENGTHS, SPLITS
from .running import RunOptions

EXAMPLE = """examples:
  multrace evaluate --model DIR --data records.jsonl --editor multedit ft --where 5:last --out out/eval
          each edit of the file on its own, by two editors
  multrace evaluate --data records.jsonl --where 5:last --shard 1/8 --out out/array
          the first of eight parts, for a job array
  multrace evaluate --world outdated --limit 20 --where 5:last --general world:200
          outdated facts of the built-in world, and how 200 facts fare that no edit is about
  multrace evaluate --world outdated --limit 20 --where trace
          each edit at the layer and token that its own trace names
  multrace evaluate --world outdated --limit 100 --mode sequence --where 5:last
          one edit on top of the other, measured after 1, 10, 20, 30 and 100

With --data, --mode single and a place in --where, OUT/EDITOR is the folder of a run: records/ID-.../evaluation.json is
the report on one record, and summary/ has evaluation.json (multrace.editing.EditReport.load), generations.jsonl (every
question with both raw answers), table.txt and rows.parquet (one row per record). The same command again continues an
interrupted run, --shard and torchrun share it, and records that fail are kept with their errors. In other cases the
command writes OUT/EDITOR/report.json, generations.jsonl and table.txt at the end; for sequences also curve.json and
curve.png. docs/formats.md describes the file of --data.
"""
app = App(name="evaluate", help=__doc__, help_epilogue=EXAMPLE)
_work: Any = lazy_loader.load("multrace.scripts.evaluate", suppress_warning=True)  # needs torch
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class Evaluate(RunOptions, EditorOptions):
    """Options of `multrace evaluate`."""

    world: Annotated[
        str | None,
        Parameter(help="use edits of the built-in world instead: outdated or long_tail facts", choices=SPLITS),
    ] = None
    part: Annotated[
        str,
        Parameter(
            help="half of the world's edits: choose (for choosing settings) or report (for results)",
            choices=("choose", "report"),
        ),
    ] = "choose"
    probes: Annotated[
        int, Parameter(help="number of probes of each kind for each of the world's edits", metavar="N")
    ] = 8
    contexts: Annotated[
        int, Parameter(help="number of other pictures that each of the world's edits is given", metavar="N")
    ] = 0
    by_name: Annotated[bool, Parameter(help="the world's edits also rewrite the question that asks by name")] = False
    keep: Annotated[
        int, Parameter(help="number of other entities that each of the world's edits has to keep", metavar="N")
    ] = 0
    # pyrefly: ignore[bad-override] -- several editors are compared
    editor: Annotated[
        tuple[str, ...], Parameter(help=f"one or more editors: {', '.join(NAMES)}", choices=NAMES, metavar="NAME")
    ] = ("multedit",)
    where: Annotated[
        str,
        Parameter(
            help="place to edit: LAYER (at the last token), LAYER:TOKEN, FIRST-LAST:TOKEN, or 'trace': where a trace "
            "of each edit's question under the picture of another edit leads (in the built-in world: of another thing "
            "of its kind); a batch has one place, from the mean of the traces"
        ),
    ]
    mode: Annotated[
        str,
        Parameter(
            help="single: each edit on its own; batch: all at once; sequence: one on top of the other", choices=MODES
        ),
    ] = SINGLE
    at: Annotated[
        tuple[int, ...],
        Parameter(
            help="sequence: numbers of edits after which to measure "
            f"(default: {' '.join(map(str, SEQUENCE_LENGTHS))} and all)",
            metavar="N",
        ),
    ] = SEQUENCE_LENGTHS
    growth: Annotated[float, Parameter(help="sequence: warn once a weight's norm has grown by this share")] = 0.1
    stop: Annotated[bool, Parameter(help="sequence: stop at that point instead")] = False
    general: Annotated[
        str | None,
        Parameter(
            help="held-out questions asked before and after: a file with image, question and answer per line, or, of "
            "the built-in world, world or world:N (facts that no edit is about)",
            metavar="FILE",
        ),
    ] = None
    free_only: Annotated[
        bool, Parameter(help="generate freely only and skip teacher forcing, which halves the time")
    ] = False
    max_new_tokens: Annotated[int, Parameter(help="maximum number of tokens of an answer", metavar="N")] = 16
    fluency_tokens: Annotated[
        int, Parameter(help="length in tokens of the answers whose fluency is measured", metavar="N")
    ] = 0
    batch_size: Annotated[int, Parameter(help="number of questions answered together", metavar="N")] = 32
    seed: Annotated[int, Parameter(help="random seed of the bootstrap")] = 0
    out: Annotated[Path, Parameter(help="folder for the results")] = Path("out/eval")

    @property
    def is_run(self) -> bool:
        """Whether every record is measured by itself, so that a run can be interrupted and shared."""
        return self.data is not None and self.mode == SINGLE and self.where != TRACE

    @property
    def measured(self) -> editing.EvaluationSettings:
        """What is measured. Raises `EditError` for numbers out of range."""
        return editing.EvaluationSettings(
            forced=not self.free_only,
            max_new_tokens=self.max_new_tokens,
            fluency_tokens=self.fluency_tokens,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises `CommandError` or `EditError` for options that do not fit together or numbers out of range."""
        if (self.data is None) == (self.world is None):
            raise CommandError("pass either --data FILE or --world outdated (or long_tail)")
        self.check_run()
        if not self.is_run and (given := self.given(("shard", "retry_failed"))):
            raise CommandError(f"{given[0]} needs --data, --mode single and a place to edit, such as --where 5:last")
        if self.probes < 1 or min(self.contexts, self.keep) < 0:
            raise CommandError(f"--probes is {self.probes}; pass at least 1 (--contexts and --keep at least 0)")
        if min(self.at) < 1:
            raise CommandError(f"--at is {min(self.at)}; pass numbers of edits, at least 1")
        if self.mode == SEQUENCE and self.general is not None:
            raise CommandError("--general is asked in the modes single and batch; leave it out of a sequence")
        self.measured  # noqa: B018  raises for numbers out of range


@app.default
def run(options: Evaluate) -> int:
    """Run the command."""
    return _work.run(options)
