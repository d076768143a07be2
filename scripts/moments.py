"""multrace moments: second moments of what a model's projections read over pictures and texts, for editors."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..editing.moments import Moments, memory_of_moments, second_moments
from ..models import ModelError, Prompt, VisionLanguageModel
from ..models.errors import gist
from .errors import CommandError
from .flow_questions import FlowQuestion, read_questions, world_questions
from .options import ModelOptions, add_options, option, read
from .outputs import check_files, new_files

HELP = "second moments of what layers read, over a corpus of pictures and texts"
EXAMPLE = """examples:
  multrace moments --synthetic 400 --layers 1-3 --out out/moments        the embedded model and its world
  multrace moments --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map cuda:0 \\
      --data records.jsonl --layers 5-9 --tolerance 0.05 --cache out/parts --out out/moments

a line of records.jsonl: {"image": "photo.jpg", "question": "Who founded the company in this photo?"}
("image" may be null or left out: a text; paths are taken from the file's folder, or from --images)

writes OUT/moments.safetensors (multrace.editing.moments.Moments.load)
"""
FILES = ("moments.safetensors",)
_SHOWN = 8
"""Readings of convergence, or lines that were left out, that are printed at most."""


@dataclass(frozen=True, kw_only=True)
class MomentOptions(ModelOptions):
    """Options of `multrace moments`."""

    data: Path | None = option(
        "file with one JSON object per line, or the study's CSV files as in multrace flow",
        default=None,
        type=Path,
        metavar="FILE",
    )
    images: Path | None = option("folder of the pictures that the records name", default=None, type=Path, metavar="DIR")
    synthetic: int | None = option(
        "instead of --data: so many questions about the embedded model's world", default=None, type=int, metavar="N"
    )
    seed: int = option("of the questions of --synthetic (default 0)", default=0, type=int)
    layers: str | None = option("such as 5, 3-7 or 0,2,5-7 (default: all)", default=None)
    projection: str = option(
        "whose inputs: mlp (down projections, the default) or attention (output maps)",
        default="mlp",
        choices=("mlp", "attention"),
    )
    batch_size: int = option("prompts that run together (default 8)", default=8, type=int, metavar="N")
    memory: float | None = option(
        "GB for the sums of one pass; layers then go in groups, one pass each (default: all in one)",
        default=None,
        type=float,
        metavar="GB",
    )
    tolerance: float | None = option(
        "stop once the moments move by less than this share (default: read everything)", default=None, type=float
    )
    every: int | None = option(
        "prompts between two readings of convergence (default: a sixteenth of all, at most 256)",
        default=None,
        type=int,
        metavar="N",
    )
    cache: Path | None = option(
        "keep sums in this folder: an interrupted call goes on from there, and a finished one is found again",
        default=None,
        type=Path,
        metavar="DIR",
    )
    out: Path = option("folder for the result (default out/moments)", default=Path("out/moments"), type=Path)

    def questions(self) -> tuple[tuple[FlowQuestion, ...], tuple[str, ...]]:
        """What is read, and why lines are left out. CommandError if nothing is left, or for both or no source."""
        if (self.data is None) == (self.synthetic is None):
            raise CommandError("pass one of --data FILE and --synthetic N, so that there is something to read")
        if self.synthetic is not None:
            if self.synthetic < 1:
                raise CommandError(f"--synthetic {self.synthetic}: ask at least one question")
            return world_questions(self.synthetic, seed=self.seed), ()
        questions, problems = read_questions(self.data, images=self.images)
        fit, skipped = [], list(problems)
        for question in tqdm(questions, desc="checking pictures", unit="question", leave=False):
            try:
                question.check()
                fit.append(question)
            except (ModelError, OSError) as error:
                skipped.append(f"{question.id}: {gist(error)}")
        if not fit:
            raise CommandError(f"none of the {len(questions)} records in {str(self.data)!r} can be read; {skipped[0]}")
        return tuple(fit), tuple(skipped)


class _Prompts(Sequence[Prompt]):
    """Prompts that are made when they are asked for, since all the pictures of a corpus would fill the memory."""

    def __init__(self, vlm: VisionLanguageModel, questions: Sequence[FlowQuestion]) -> None:
        self._vlm, self._questions = vlm, questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Prompt:
        return self._questions[index].prompt(self._vlm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `MomentOptions`."""
    add_options(parser, MomentOptions)


def run(options: argparse.Namespace) -> int:
    """Computes the moments, writes them, prints what was counted and how far they still moved."""
    settings = read(MomentOptions, options)
    layers = None if settings.layers is None else parse_layers(settings.layers)
    check_files(settings.out, FILES)
    if settings.cache is not None:
        check_files(settings.cache, ())
    questions, skipped = settings.questions()
    vlm = settings.open_model()
    needed = memory_of_moments(vlm, layers, projection=settings.projection)
    print(f"reading {len(questions)} prompts; all layers in one pass take {needed / 1e9:.2g} GB", flush=True)
    started = time.monotonic()
    moments = second_moments(
        vlm,
        _Prompts(vlm, questions),
        layers=layers,
        projection=settings.projection,
        batch_size=settings.batch_size,
        memory=None if settings.memory is None else int(settings.memory * 1e9),
        tolerance=settings.tolerance,
        every=settings.every,
        cache=settings.cache,
        progress=True,
    )
    seconds = time.monotonic() - started
    with new_files(settings.out, FILES) as folder:
        moments.save(folder / FILES[0])
    print(*_lines(moments, len(questions), skipped), sep="\n")
    print(f"time         {seconds:.1f} s", f"written: {settings.out / FILES[0]}", sep="\n")
    return 0


def parse_layers(text: str) -> tuple[int, ...]:
    """The layers that a text such as "5", "3-7" or "0,2,5-7" names. CommandError for anything else."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise CommandError(f"no layers {text!r}; write --layers 5, --layers 3-7 or --layers 0,2,5-7")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _lines(moments: Moments, offered: int, skipped: Sequence[str]) -> Iterator[str]:
    yield f"layers       {', '.join(map(str, moments.layers))} ({moments.projection})"
    yield f"prompts      {moments.prompts} of {offered}" + (f"; {len(skipped)} records left out" if skipped else "")
    yield from (f"  {line}" for line in skipped[:_SHOWN])
    yield "tokens       " + ", ".join(f"{kind} {moments.count(kind)}" for kind in moments.counts)
    if not moments.convergence:
        yield "convergence  not read: too few prompts, or lower --every"
        return
    yield "convergence  prompts  halves apart  change"
    for reading in moments.convergence[-_SHOWN:]:
        change = max(reading.change)
        shown = "-" if change == float("inf") else f"{change:.2%}"
        yield f"             {reading.prompts:7d}  {max(reading.halves):12.2%}  {shown:>6}"
