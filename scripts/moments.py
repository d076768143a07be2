"""Collect second moments of the inputs of projections over a corpus, for editors that weigh old keys by them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from tqdm import tqdm

from .. import data, editing, models, workflow
from ..data.errors import gist
from ..editing import moments as moment_sums
from .options import PROJECTIONS, CommandError, FileOptions, ModelOptions, SourceOptions, check_files, new_files

EXAMPLE = """examples:
  multrace moments --world --limit 400 --layers 3-5 --out out/moments        the embedded model and its world
  multrace moments --model llava-hf/llava-1.5-7b-hf --own --images photos --layers 5-9 --out out/own_moments
          texts that the model samples, and its own answers about the pictures in a folder: no corpus is needed
  multrace moments --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map cuda:0 \\
      --data records.jsonl --layers 5-9 --tolerance 0.05 --cache out/parts --out out/llava_moments

A line of records.jsonl: {"image": "photo.jpg", "question": "Who founded the company in this photo?"}
("image" may be null or left out for a text without a picture). docs/formats.md describes the other formats.

The command writes OUT/moments.safetensors, which multrace.editing.Moments.load reads, and multrace edit --moments and
multrace evaluate --moments.
"""
FILES = ("moments.safetensors",)
_SHOWN = 8
"""Maximum number of measurements of convergence, or of skipped records, that are printed."""
app = App(name="moments", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class MomentOptions(ModelOptions, FileOptions, SourceOptions):
    """Options of `multrace moments`."""

    world: Annotated[
        bool, Parameter(help="read questions about the built-in world instead of a file; --limit says how many")
    ] = False
    own: Annotated[
        bool,
        Parameter(
            help="read texts that the model itself samples and, with --images FOLDER, its own answers to questions "
            "about the pictures there, instead of a file: as multrace edit does without --moments"
        ),
    ] = False
    limit: Annotated[
        int | None,
        Parameter(
            help="maximum number of records or questions to read, or number of samples of --own (default: all records; "
            "200 to 1000 samples, until there are four tokens for each entry of a key)",
            metavar="N",
        ),
    ] = None
    seed: Annotated[int, Parameter(help="random seed of the order of --world or the samples of --own", metavar="N")] = 0
    layers: Annotated[
        str | None, Parameter(help="layers to read, such as 5, 3-7 or 0,2,5-7 (default: all)", metavar="LAYERS")
    ] = None
    projection: Annotated[
        str,
        Parameter(
            help="weights whose inputs are read: mlp (the down projections) or attention (the output projections)",
            choices=PROJECTIONS,
        ),
    ] = "mlp"
    expert: Annotated[
        int | None,
        Parameter(
            help="number of a routed expert whose inputs are read instead, for multrace edit --expert with the same "
            "number (default: none)",
            metavar="N",
        ),
    ] = None
    batch_size: Annotated[int, Parameter(help="number of prompts that run together", metavar="N")] = 8
    memory: Annotated[
        int | None,
        Parameter(
            help="memory in MiB for the sums of one pass; if all layers need more, they are read in groups, with one "
            "pass over the corpus for each group (default: no limit)",
            metavar="MIB",
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        Parameter(
            help="stop once the moments change by less than this share (default: read everything)", metavar="SHARE"
        ),
    ] = None
    every: Annotated[
        int | None,
        Parameter(
            help="number of prompts between two measurements of convergence (default: a sixteenth of all, at most 256)",
            metavar="N",
        ),
    ] = None
    cache: Annotated[
        Path | None,
        Parameter(
            help="folder for intermediate sums, from which an interrupted call continues and a repeated one answers "
            "at once (default: keep none; with --own, the cache of the user)",
            metavar="DIR",
        ),
    ] = None
    out: Annotated[Path, Parameter(help="folder for the result", metavar="DIR")] = Path("out/moments")

    def check(self) -> None:
        """Raises `CommandError` unless there is exactly one source, with options that belong to it and are in range."""
        if (self.data is not None) + self.world + self.own != 1:
            raise CommandError("pass one of --data FILE, --world and --own, so that there is something to read")
        if self.world and (wrong := self.given(("format", "images"))):
            raise CommandError(f"{wrong[0]} belongs to --data FILE; leave it out")
        if self.own and (wrong := self.given(("format", "batch_size", "memory", "tolerance", "every"))):
            raise CommandError(f"{wrong[0]} does not belong to --own; leave it out")
        if self.world and self.limit is None:
            raise CommandError("--world has no end; pass the number of questions as --limit N")
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit {self.limit}: read at least one question")

    def layer_numbers(self) -> tuple[int, ...] | None:
        """Return the numbers in --layers, or None for all layers. Raises `CommandError` for other text."""
        return None if self.layers is None else parse_layers(self.layers)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as "5", "3-7" or "0,2,5-7" names. Raises `CommandError` for other text."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise CommandError(f"no layers {text!r}; write --layers 5, --layers 3-7 or --layers 0,2,5-7")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


@app.default
def run(options: MomentOptions = MomentOptions()) -> int:
    """Compute the moments, write them, and print the counts and the convergence."""
    options.check()
    layers = options.layer_numbers()
    check_files(options.out, FILES)
    if options.cache is not None:
        check_files(options.cache, ())
    if options.own:
        return _run_own(options, layers)
    questions, skipped = _questions(options)
    vlm = options.open_model()
    needed = moment_sums.memory_of_moments(vlm, layers, projection=options.projection, expert=options.expert)
    print(f"reading {len(questions)} prompts; one pass over the requested layers takes {needed:.3g} MiB", flush=True)
    started = time.monotonic()
    moments = editing.second_moments(
        vlm,
        _Prompts(vlm, questions),
        layers=layers,
        projection=options.projection,
        expert=options.expert,
        batch_size=options.batch_size,
        memory=options.memory,
        tolerance=options.tolerance,
        every=options.every,
        cache=options.cache,
        progress=True,
    )
    return _written(options, moments, len(questions), skipped, time.monotonic() - started)


def _run_own(options: MomentOptions, layers: tuple[int, ...] | None) -> int:
    """Sample texts and answers of the model and write their moments."""
    pictures = () if options.images is None else options.images
    moment_sums.pictures_to_ask_about(pictures)  # says what is wrong with the folder before the model is opened
    vlm, started = options.open_model(), time.monotonic()
    given = {"layers": layers, "projection": options.projection, "expert": options.expert, "cache": options.cache}
    moments = editing.own_moments(vlm, **given, pictures=pictures, number=options.limit, seed=options.seed)
    return _written(options, moments, moments.prompts, (), time.monotonic() - started)


def _written(
    options: MomentOptions, moments: editing.Moments, offered: int, skipped: Sequence[str], seconds: float
) -> int:
    """Write moments and print what they are of."""
    with new_files(options.out) as folder:
        moments.save(folder / FILES[0])
    print(*_lines(moments, offered, skipped), sep="\n")
    print(f"time         {seconds:.1f} s", f"written: {options.out / FILES[0]}", sep="\n")
    return 0


def _questions(options: MomentOptions) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Return the questions, and why records were skipped. Raises `CommandError` if no question is left."""
    if options.world:
        return data.world_questions(options.limit, seed=options.seed), ()
    fit, skipped = [], []
    rows = islice(data.read_data(options.data, format=options.format, images=options.images), options.limit)
    for row, record in tqdm(rows, desc="checking pictures", unit="question", leave=False):
        try:
            if isinstance(record, data.DataError):
                raise record
            question = workflow.question_of_record(record)
            models.open_images(question.image)
            fit.append(question)
        except (data.DataError, models.ModelError, OSError) as error:
            skipped.append(f"row {row}: {gist(error)}")
    if not fit:
        raise CommandError(
            f"none of the {len(skipped)} records in {str(options.data)!r} can be read; {skipped[0]}; multrace data "
            "check lists all"
        )
    return tuple(fit), tuple(skipped)


def _lines(moments: editing.Moments, offered: int, skipped: Sequence[str]) -> Iterator[str]:
    yield f"layers       {', '.join(map(str, moments.layers))} ({moments.projection})"
    yield f"prompts      {moments.prompts} of {offered}" + (f"; {len(skipped)} records left out" if skipped else "")
    yield from (f"  {line}" for line in skipped[:_SHOWN])
    yield "tokens       " + ", ".join(f"{kind} {moments.count(kind)}" for kind in moments.counts)
    if not moments.convergence:
        yield "convergence  not measured: there were too few prompts; pass more, or a lower --every"
        return
    yield "convergence  prompts  halves apart  change"
    for reading in moments.convergence[-_SHOWN:]:
        change = max(reading.change)
        percent = "-" if change == float("inf") else f"{change:.2%}"
        yield f"             {reading.prompts:7d}  {max(reading.halves):12.2%}  {percent:>6}"


class _Prompts(Sequence):
    """Prompts that are made on demand, because the pictures of a corpus would not fit into memory together."""

    def __init__(self, vlm: models.VisionLanguageModel, questions: Sequence[Any]) -> None:
        self._vlm, self._questions = vlm, questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: Any) -> Any:
        return self._vlm.prompt_for(self._questions[index])
