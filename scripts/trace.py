"""Locate an answer by causal tracing: corrupt the picture or the question, and find the states that restore it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import data, tracing, workflow
from .options import (
    DIRECTIONS,
    EFFECTS,
    KINDS,
    METRICS,
    SITES,
    CommandError,
    CorruptionOptions,
    EngineOptions,
    RunOptions,
    print_report,
)

EXAMPLE = """examples:
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt swap:other.jpg --out out/trace
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt text-noise:auto --window 1 \\
      --positions image constraint_last last --out out/noise
  multrace trace --image photo.jpg --question "What is this?" --corrupt image-noise:3 \\
      --positions patches --effect direct --sites hidden --out out/patches
  multrace trace --data questions.jsonl --corrupt image-noise:3 --positions image constraint_last last --out out/all
  multrace trace --data questions.jsonl --corrupt blank --shard 1/8 --out out/array

For one question the command writes OUT/trace.safetensors (to be read by multrace.tracing.CausalTrace.load),
OUT/trace.png and, if parts of the picture were restored, OUT/overlay.png. With --data it writes
OUT/records/ID-.../trace.safetensors for each record, OUT/summary/rows.parquet (one row per record) and the average of
all traces as OUT/summary/average.safetensors (multrace.tracing.AverageTrace.load), .png and .csv. A record may name its
own answer, foil and corruption ("corrupt"); a record of an edit is traced for the answer that the edit replaces. The
same command again continues an interrupted run. Under torchrun or accelerate launch the processes divide the records;
--device-map cuda then gives each process a GPU of its own.
The exit code is 0 if every record is done, 1 if a record failed or could not be read, and 2 for bad input.
"""
app = App(name="trace", help=__doc__, help_epilogue=EXAMPLE)
_CELLS = "trace.unfinished"
_OF_ONE = ("image", "constraint", "foil")
_OF_MANY = ("format", "images", "limit", "shard", "retry_failed", "draw")


@dataclass(frozen=True, kw_only=True)
class TraceOptions(CorruptionOptions, RunOptions, EngineOptions):
    """Options of `multrace trace`."""

    # pyrefly: ignore[bad-override] -- not needed if there is a file of records
    question: Annotated[
        str | None, Parameter(help="question to ask; either this or --data is needed", metavar="TEXT")
    ] = None
    answer: Annotated[
        str | None,
        Parameter(help="answer whose first token is scored (default: the model's own answer)", metavar="ANSWER"),
    ] = None
    whole_answer: Annotated[bool, Parameter(help="score all tokens of the answer instead of its first")] = False
    foil: Annotated[
        str | None,
        Parameter(
            help="answer that the metric logit_difference compares with (default: the answer of the corrupted run)",
            metavar="ANSWER",
        ),
    ] = None
    metrics: Annotated[
        tuple[str, ...],
        Parameter(help="scores of the answer to compute, the main one first", choices=METRICS, metavar="METRIC"),
    ] = ("probability",)
    sites: Annotated[
        tuple[str, ...],
        Parameter(
            help="kinds of sites to restore: hidden states, outputs of the MLPs or of attention, each attention head, "
            "layers of the vision tower, the output of the projector",
            choices=SITES,
            metavar="KIND",
        ),
    ] = KINDS
    direction: Annotated[
        str,
        Parameter(
            help="restore: patch clean states into the corrupted run; corrupt: patch corrupted states into the clean "
            "run",
            choices=DIRECTIONS,
        ),
    ] = "restore"
    effect: Annotated[
        str,
        Parameter(
            help="total: the patch acts through all later tokens; direct: the other image tokens keep their states, so "
            "that the patch acts through the text only",
            choices=EFFECTS,
        ),
    ] = "total"
    severed: Annotated[
        str | None,
        Parameter(
            help="kind of module that is cut off from the patch: in later layers it keeps its outputs of the "
            "unpatched run at the restored tokens (default: none)",
            choices=("mlp", "attention"),
        ),
    ] = None
    exact_cells: Annotated[
        int | None,
        Parameter(
            help="number of cells to compute exactly: one backward pass estimates all cells (attribution patching), "
            "and the largest are computed (default: all)",
            metavar="N",
        ),
    ] = None
    even_if_weak: Annotated[
        bool, Parameter(help="trace even if the corruption does not lower the answer's score in the main metric")
    ] = False
    draw: Annotated[bool, Parameter(help="also draw the map of each record of --data")] = False
    resume: Annotated[
        bool,
        Parameter(
            help="one question: keep finished cells in OUT while tracing, and continue from those of an interrupted "
            "call"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the results", metavar="DIR")] = Path("out/trace")

    def check(self) -> None:
        """Raises `CommandError` unless either a question or a file is given, with options that belong to it."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question or --data FILE")
        if self.data is not None and (wrong := self.given(_OF_ONE)):
            raise CommandError(f"{wrong[0]} belongs to one question; with --data, write it into each record")
        if self.data is not None and self.resume:
            raise CommandError(
                "--resume belongs to one question; leave it out, since a run over --data always continues"
            )
        if self.data is None and (wrong := self.given(_OF_MANY)):
            raise CommandError(f"{wrong[0]} belongs to --data FILE; leave it out")
        self.check_run()

    def asked(self) -> data.Question:
        """Return the question of the command line. Raises `DataError` for an empty one."""
        return data.Question(
            text=self.question or "", image=self.image, constraint=self.constraint, foil=self.foil, id="question"
        )

    def settings(self) -> workflow.TraceRun:
        """Return the settings of the trace. Raises `TraceError` for a misspelt corruption."""
        return workflow.TraceRun(**{row.name: getattr(self, row.name) for row in fields(workflow.TraceRun)})


@app.default
def run(options: TraceOptions = TraceOptions()) -> int:
    """Trace one question or every record of a file; write traces and maps, and print the strongest effects."""
    options.check()
    settings = options.settings()
    if options.question is None:
        report = workflow.run(options.model_to_load(), settings, options.records(), options.out, **options.share)
        return print_report(report)
    question = options.asked()
    settings.check(question)
    workflow.check_result_folder(options.out, spare=_CELLS)
    vlm = options.open_model()
    prompt = vlm.prompt_for(question)
    arguments = settings.arguments(question, checkpoint=options.out / _CELLS if options.resume else None)
    trace = tracing.causal_trace(vlm, prompt, **arguments)
    with workflow.result_folder(options.out, spare=_CELLS) as new:
        trace.save(new / "trace.safetensors")
        trace.plot(new / "trace.png")
        if trace.has_overlay:
            trace.overlay(prompt, new / "overlay.png")
    print(*workflow.trace_summary(trace), sep="\n")
    print("written:", ", ".join(str(path) for path in sorted(options.out.iterdir())))
    return 0
