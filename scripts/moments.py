"""Run `multrace moments`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ..data import DataError
from ..editing.moments import Moments, memory_of_moments, second_moments
from ..models import ModelError, Prompt, VisionLanguageModel
from ..models.errors import gist
from .errors import CommandError
from .flow_questions import FlowQuestion, read_questions, world_questions
from .options.moments import MomentOptions
from .outputs import check_files, new_files

FILES = ("moments.safetensors",)
_SHOWN = 8
"""Maximum number of readings of convergence, or of skipped lines, that are printed."""


class _Prompts(Sequence[Prompt]):
    """Prompts that are made on demand, since all pictures of a corpus would fill the memory."""

    def __init__(self, vlm: VisionLanguageModel, questions: Sequence[FlowQuestion]) -> None:
        self._vlm, self._questions = vlm, questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: Any) -> Any:
        return self._questions[index].prompt(self._vlm)


def run(settings: MomentOptions) -> int:
    """Compute the moments, write them, print the counts and the convergence."""
    settings.check()
    layers = settings.layer_numbers()
    check_files(settings.out, FILES)
    if settings.cache is not None:
        check_files(settings.cache, ())
    questions, skipped = _questions(settings)
    vlm = settings.open_model()
    needed = memory_of_moments(vlm, layers, projection=settings.projection)
    print(f"reading {len(questions)} prompts; all layers in one pass take {needed:.3g} MiB", flush=True)
    started = time.monotonic()
    moments = second_moments(
        vlm,
        _Prompts(vlm, questions),
        layers=layers,
        projection=settings.projection,
        batch_size=settings.batch_size,
        memory=settings.memory,
        tolerance=settings.tolerance,
        every=settings.every,
        cache=settings.cache,
        progress=True,
    )
    seconds = time.monotonic() - started
    with new_files(settings.out) as folder:
        moments.save(folder / FILES[0])
    print(*_lines(moments, len(questions), skipped), sep="\n")
    print(f"time         {seconds:.1f} s", f"written: {settings.out / FILES[0]}", sep="\n")
    return 0


def _questions(settings: MomentOptions) -> tuple[tuple[FlowQuestion, ...], tuple[str, ...]]:
    """The questions, and why lines were skipped. Raises `CommandError` if no question is left."""
    if settings.world:
        return world_questions(settings.limit, seed=settings.seed), ()
    questions, problems = read_questions(settings.data, images=settings.images)
    questions = questions[: settings.limit]
    fit, skipped = [], list(problems)
    for question in tqdm(questions, desc="checking pictures", unit="question", leave=False):
        try:
            question.check()
            fit.append(question)
        except (DataError, ModelError, OSError) as error:
            skipped.append(f"{question.id}: {gist(error)}")
    if not fit:
        raise CommandError(f"none of the {len(questions)} records in {str(settings.data)!r} can be read; {skipped[0]}")
    return tuple(fit), tuple(skipped)


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
