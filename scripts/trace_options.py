"""The options of multrace trace, and the trace that they ask for."""

from dataclasses import dataclass
from pathlib import Path

from ..models import Prompt, VisionLanguageModel
from ..tracing import CausalTrace, Corruption, causal_trace
from ..tracing.causal.trace import DIRECTIONS
from ..tracing.engine.cells import KINDS
from ..tracing.engine.grid import EFFECTS, SITES
from ..tracing.engine.scoring import METRICS
from ..tracing.engine.settings import ENGINES, Engine
from .errors import CommandError
from .options import CorruptionOptions, ModelOptions, option

UNFINISHED = "trace.unfinished"
_ENGINE = Engine()


@dataclass(frozen=True, kw_only=True)
class Trace(ModelOptions, CorruptionOptions):
    """Options of `multrace trace`."""

    question: str | None = option("what to ask", default=None)
    records: Path | None = option(
        "trace every line of this file instead: a JSON object with question and, as needed, image, constraint, answer, "
        "foil and corrupt (else the options'); paths are relative to the file; lines that are already done are skipped",
        default=None,
        type=Path,
        metavar="FILE.jsonl",
    )
    answer: str | None = option(
        "score the first token of this answer (default: of the model's own)", default=None, metavar="ANSWER"
    )
    whole_answer: bool = option(
        "score all tokens of the answer, not only its first", default=False, action="store_true"
    )
    foil: str | None = option(
        "what a logit difference compares the answer with (default: the corrupted run's answer)",
        default=None,
        metavar="ANSWER",
    )
    metrics: tuple[str, ...] = option(
        f"what is scored, the main metric first (default: probability): {', '.join(METRICS)}",
        default=("probability",),
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
    )
    sites: tuple[str, ...] = option(
        f"kinds of states to restore (default: {' '.join(KINDS)}): {', '.join(SITES)}",
        default=KINDS,
        nargs="+",
        choices=SITES,
        metavar="KIND",
    )
    direction: str = option(
        "restore: clean states into the corrupted run (default); corrupt: corrupted states into the clean run",
        default="restore",
        choices=DIRECTIONS,
    )
    effect: str = option(
        "total (default); direct: the other image tokens stay as they are, so that a patch acts on the text only",
        default="total",
        choices=EFFECTS,
    )
    severed: str | None = option(
        "keep later MLPs or attentions at the restored tokens as they were", default=None, choices=("mlp", "attention")
    )
    exact_cells: int | None = option(
        "compute only so many cells, the most promising by one backward pass, and estimate the others",
        default=None,
        type=int,
        metavar="N",
    )
    even_if_weak: bool = option(
        "trace even if the damage does not lower the answer's probability", default=False, action="store_true"
    )
    engine: str = option(
        "auto (default); replay: compute only what can have changed; plain: one forward pass per cell",
        default=_ENGINE.name,
        choices=ENGINES,
    )
    memory: int = option(
        f"MiB that replay may use beside the model and the two runs (default {_ENGINE.memory})",
        default=_ENGINE.memory,
        type=int,
        metavar="MIB",
    )
    checks: int = option(
        f"random cells that are computed a second time the plain way (default {_ENGINE.checks})",
        default=_ENGINE.checks,
        type=int,
        metavar="N",
    )
    resume: bool = option(
        "keep finished cells in OUT while tracing, and go on from there", default=False, action="store_true"
    )
    out: Path = option("folder for the results (default out/trace)", default=Path("out/trace"), type=Path)

    def check(self) -> None:
        """CommandError unless there is either a question or a file of records, without what only a question has."""
        if (self.question is None) == (self.records is None):
            raise CommandError("pass either --question or --records FILE.jsonl")
        given = [name for name in ("image", "constraint", "answer", "foil") if getattr(self, name) is not None]
        if self.records is not None and given:
            raise CommandError(f"--{given[0]} belongs to one question; with --records, write it into each line")

    def trace(self, vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, *, folder: Path) -> CausalTrace:
        """The trace of one prompt. folder: where finished cells are kept, with `resume`, until it is done."""
        checkpoint = folder / UNFINISHED if self.resume else None
        engine = Engine(name=self.engine, memory=self.memory, checks=self.checks, checkpoint=checkpoint)
        return causal_trace(
            vlm,
            prompt,
            corruption=corruption,
            sites=self.sites,
            window=self.window,
            positions=self.positions("tokens"),
            answer=self.answer,
            foil=self.foil,
            whole_answer=self.whole_answer,
            metrics=self.metrics,
            direction=self.direction,
            effect=self.effect,
            severed=self.severed,
            exact_cells=self.exact_cells,
            even_if_weak=self.even_if_weak,
            engine=engine,
        )

    def forget_cells(self, folder: Path) -> None:
        """Removes the finished cells kept in the folder, once they have become a result."""
        for path in folder.glob(f"{UNFINISHED}*"):  # one for each sequence of tokens that is scored
            path.unlink()
