"""multrace evaluate: make edits, ask the model about and around them, and compare with the unedited model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ... import editing
from ..errors import CommandError
from .asking import ModelOptions
from .choices import SEQUENCE_LENGTHS, SPLITS
from .editors import NAMES, EditorOptions
from .option import option

HELP = "measure what edits do: efficacy, generality, locality, portability, beside the unedited model"
EXAMPLE = """examples:
  multrace evaluate --model DIR --data records.jsonl --editor multedit ft --where 5:last --out out/eval
          each edit of the file on its own, by two editors
  multrace evaluate --world outdated --limit 20 --where 5:last --general world:200
          outdated facts of the built-in world, and how 200 facts fare that no edit is about
  multrace evaluate --world outdated --limit 20 --where trace
          each edit at the layer and token that its own trace names
  multrace evaluate --world outdated --limit 100 --mode sequence --where 5:last
          one edit on top of the other, measured after 1, 10, 20, 30 and 100

For each editor the command writes OUT/EDITOR/report.json (multrace.editing.EditReport.load), generations.jsonl (every
question with both raw answers) and table.txt; for sequences also curve.json and curve.png. multrace edit --help
describes the file of --data.
"""
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions, EditorOptions):
    """Options of `multrace evaluate`."""

    data: Path | None = option(
        "file of edits with their probes, one JSON object per line", default=None, type=Path, metavar="FILE.jsonl"
    )
    world: str | None = option(
        "use edits of the built-in world instead: outdated or long_tail facts", default=None, choices=SPLITS
    )
    part: str = option(
        "half of the world's edits: choose (for choosing settings, the default) or report (for results)",
        default="choose",
        choices=("choose", "report"),
    )
    probes: int = option(
        "number of probes of each kind for each of the world's edits (default: 8)", default=8, type=int, metavar="N"
    )
    contexts: int = option(
        "number of other pictures that each of the world's edits is given (default: 0)",
        default=0,
        type=int,
        metavar="N",
    )
    by_name: bool = option(
        "the world's edits also rewrite the question that asks by name", default=False, action="store_true"
    )
    keep: int = option(
        "number of other entities that each of the world's edits has to keep (default: 0)",
        default=0,
        type=int,
        metavar="N",
    )
    limit: int | None = option("use only the first N edits", default=None, type=int, metavar="N")
    # pyrefly: ignore[bad-override] -- several editors are compared
    editor: tuple[str, ...] = option(
        f"one or more editors (default: multedit): {', '.join(NAMES)}",
        default=("multedit",),
        nargs="+",
        choices=NAMES,
        metavar="NAME",
    )
    where: str = option(
        "place to edit: LAYER (at the last token), LAYER:TOKEN, FIRST-LAST:TOKEN, or 'trace': where a trace of each "
        "edit's question under the picture of another edit leads (in the built-in world: of another thing of its "
        "kind); a batch has one place, from the mean of the traces"
    )
    mode: str = option(
        "single: each edit on its own (default); batch: all at once; sequence: one on top of the other",
        default=SINGLE,
        choices=MODES,
    )
    at: tuple[int, ...] = option(
        f"sequence: numbers of edits after which to measure (default: {' '.join(map(str, SEQUENCE_LENGTHS))} and all)",
        default=SEQUENCE_LENGTHS,
        nargs="+",
        type=int,
        metavar="N",
    )
    growth: float = option(
        "sequence: warn once a weight's norm has grown by this share (default: 0.1)", default=0.1, type=float
    )
    stop: bool = option("sequence: stop at that point instead", default=False, action="store_true")
    general: str | None = option(
        "held-out questions asked before and after: a file with image, question and answer per line, or, of the "
        "built-in world, world or world:N (facts that no edit is about)",
        default=None,
        metavar="FILE",
    )
    free_only: bool = option(
        "generate freely only and skip teacher forcing, which halves the time", default=False, action="store_true"
    )
    max_new_tokens: int = option(
        "maximum number of tokens of an answer (default: 16)", default=16, type=int, metavar="N"
    )
    fluency_tokens: int = option(
        "length in tokens of the answers whose fluency is measured (default: 0, not measured)",
        default=0,
        type=int,
        metavar="N",
    )
    batch_size: int = option("number of questions answered together (default: 32)", default=32, type=int, metavar="N")
    seed: int = option("random seed of the bootstrap (default: 0)", default=0, type=int)
    out: Path = option("folder for the results (default: out/eval)", default=Path("out/eval"), type=Path)

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
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit is {self.limit}; pass at least 1")
        if self.probes < 1 or min(self.contexts, self.keep) < 0:
            raise CommandError(f"--probes is {self.probes}; pass at least 1 (--contexts and --keep at least 0)")
        if min(self.at) < 1:
            raise CommandError(f"--at is {min(self.at)}; pass numbers of edits, at least 1")
        if self.mode == SEQUENCE and self.general is not None:
            raise CommandError("--general is asked in the modes single and batch; leave it out of a sequence")
        self.measured  # noqa: B018  raises for numbers out of range


OPTIONS = Evaluate
