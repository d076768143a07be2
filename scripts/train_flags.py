"""Train the model that reads flags: LLaVA over SmolLM2, whose tower, projector and changes of attention are ours.

The text model teaches its own answers: under the picture of a flag, a sentence about the country in the photo is to go
on as the text model goes on with the sentence that has the country's name in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .. import workflow
from .options import CommandError, GeneralOptions
from .training import flags

EXAMPLE = """examples:
  multrace train-flags --out out/flags                  the full recipe, some hours on two cores
  multrace train-flags --out out/trial --share 0.01     1% of the steps, as a trial
  multrace train-flags --out out/b --parts out/flags    the stages that the recipe has and these parts lack

Start the same command again to go on with a run that was cut; it comes to the same parts. DIR then holds the parts that
multrace build-flags puts over the text model (factors.safetensors, at most 12 MB, and its settings), and after a full
run also the whole model and a card with its scores. The folder DIR/work (pictures, 3 GB, and checkpoints) can go then.
"""
app = App(name="train-flags", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class TrainFlags(GeneralOptions):
    """Options of `multrace train-flags`."""

    out: Annotated[Path, Parameter(help="folder of the run: a new one, or one that goes on", metavar="DIR")]
    text_model: Annotated[
        Path | None,
        Parameter(help="folder of the text model (default: that of multrace fetch-smollm2)", metavar="DIR"),
    ] = None
    parts: Annotated[
        Path | None,
        Parameter(help="folder of trained parts to go on from, with the stages that they lack", metavar="DIR"),
    ] = None
    seed: Annotated[int, Parameter(help="random seed of the weights, the pictures and the steps", metavar="N")] = 0
    threads: Annotated[int, Parameter(help="number of CPU threads", metavar="N")] = 2
    share: Annotated[
        float, Parameter(help="share of the steps and pictures of the recipe, above 0 and up to 1", metavar="SHARE")
    ] = 1.0
    every: Annotated[int, Parameter(help="number of steps between two checkpoints", metavar="N")] = 100


@app.default
def run(options: TrainFlags) -> int:
    """Train and write the parts; after a full run also examine the whole model and write its card."""
    training = flags.FlagsTraining(
        out=options.out,
        text_model=options.text_model or _cached_text_model(),
        parts=options.parts,
        seed=options.seed,
        share=options.share,
        every=options.every,
        threads=options.threads,
    )
    minutes = flags.train_flags(training)
    print(f"the parts are in {options.out}, after {minutes:.0f} minutes")
    if options.share < 1:
        print("this was a trial with a share of the steps, so the model is not examined and has no card")
        return 0
    print(flags.score_tables(flags.examine_run(training)))
    return 0


def _cached_text_model() -> Path:
    folder = workflow.cached_model("smollm2-135m-instruct")
    if folder is None:
        raise CommandError("no text model in the cache; run multrace fetch-smollm2, or pass --text-model DIR")
    return folder
